"""What the FlashGen paper reports (ASPLOS'25, DOI 10.1145/3676641.3716245), to stand beside our numbers."""

from __future__ import annotations

THROUGHPUT_RATIO = {"opt-13b": 1.56, "opt-30b": 1.63, "llama-2-13b": 1.55, "llama-2-70b": 2.85}
"""FlashGen over vLLM at 100 ms a token, figure 9."""
TTFT_P95_S = {
    "opt-30b": {
        "vllm": 16.87,
        "cachedattention": 7.79,
        "flashgen-sched": 14.2,
        "flashgen-cache": 3.82,
        "flashgen": 1.29,
    },
    "llama-2-13b": {
        "vllm": 6.96,
        "cachedattention": 2.58,
        "flashgen-sched": 3.46,
        "flashgen-cache": 2.37,
        "flashgen": 0.51,
    },
}
"""Figure 11, at about one request a second."""
TPOT_P99_S = {"flashgen": 0.103, "vllm": 0.608}
"""OPT-30B, figure 13."""
PROMPT_PHASE_SPEEDUP = {"opt-30b": 1.13, "llama-2-13b": 1.19}
"""Over CachedAttention, figure 12."""
KV_UTILISATION = {"flashgen": 0.98, "vllm": 0.88}
"""OPT-30B, figures 7 and 18."""
BATCH_RATIO = {"opt-13b": 1.15, "opt-30b": 1.15, "llama-2-13b": 1.06, "llama-2-70b": 1.06}
"""Mean batch over vLLM's, table 2."""
LONG_CONTEXT = {
    "vllm": {16384: 0.92, 32768: 0.78},
    "flashgen-sched": {16384: 0.99, 32768: 0.97},
}
"""KV utilisation by the longest prompt, figure 19; at 32k, throughput is 1.17 times vLLM's."""
