"""`python -m bench.simulator`: the simulator's own speed: simulated decode tokens a second of one core, a long trace.

Tokens are counted on the device alone and with three tiers, to which every block of 16 tokens is written through. Times
are the CPU's of this process, so that other processes on the machine count little; how many cores these took is told.
"""

from __future__ import annotations

import argparse
import sys
import time

from bench import report
from bench.noise import Noise
from bench.workloads import lengths
from jserve.config import CacheConfig, SchedConfig
from jserve.console import RichProgress
from jserve.simulation.profiles import hardware, model_shape
from jserve.simulation.simulator import System, simulate, system
from jserve.simulation.summary import summarise
from jserve.simulation.traces import read_trace
from jserve.simulation.workload import Segment, Session, Turn, Workload, closed_loop, contents

REPEATS = 5
"""The best counts: the others were disturbed by what else runs on the machine."""
BATCH, PROMPT, OUTPUT = 256, 512, 1024
LONGEST = 131_072
DEVICE_ALONE = CacheConfig(block_size=16)
THREE_TIERS = CacheConfig(block_size=16, host_gib=100.0, disk_dir="simulated", disk_gib=1000.0)


def main() -> int:
    args = _arguments()
    console = report.console(args)
    noise = Noise()
    metrics = {
        "decode_tokens_per_cpu_s": max(_decode_speed(DEVICE_ALONE) for _ in range(REPEATS)),
        "decode_tokens_per_cpu_s_three_tiers": max(_decode_speed(THREE_TIERS) for _ in range(REPEATS)),
    }
    missing = {}
    if lengths.MOONCAKE.exists():
        metrics |= _mooncake()
    else:
        missing["mooncake_cpu_s"] = f"{lengths.MOONCAKE} is not there"
    metrics["others_cores"] = noise.others_cores()
    console.print(report.table("the simulator's own speed", ["", ""], [[k, v] for k, v in metrics.items()]))
    config = {"batch": BATCH, "prompt": PROMPT, "output": OUTPUT, "repeats": REPEATS}
    report.emit(report.Result("simulator", metrics, config, args.seed, missing=missing), args)
    return 0


def _decode_speed(cache: CacheConfig) -> float:
    """Two batches of long answers, one after the other, on an H200."""
    fresh = contents()
    sessions = (Session(str(n), (Turn((Segment(next(fresh), PROMPT),), OUTPUT),)) for n in range(2 * BATCH))
    work = closed_loop(Workload("decode", tuple(sessions)), BATCH)
    start_s = time.process_time()
    done = simulate(_machine(cache, 1), work)
    return done.played.stats_after["decode_tokens"] / (time.process_time() - start_s)


def _mooncake() -> dict[str, float]:
    """12,031 requests with shared prefixes, at their own times, on four H200 with host memory."""
    start_s = time.process_time()
    work = read_trace(lengths.MOONCAKE, LONGEST)
    machine = _machine(CacheConfig(block_size=128, host_gib=400.0, restore="cost"), 4)
    summary = summarise(simulate(machine, work, progress=RichProgress()).played)
    return {
        "mooncake_cpu_s": time.process_time() - start_s,
        "mooncake_requests": summary.calls,
        "mooncake_cached_share": summary.cached_share,
        "mooncake_ttft_p95_s": summary.ttft_p95_s,
    }


def _machine(cache: CacheConfig, tp: int) -> System:
    limits = SchedConfig(max_running=BATCH, max_waiting=100_000, admission="queue")
    gpu, model = hardware("h200"), model_shape("llama-3-8b")
    return system(gpu, model, tp=tp, max_model_len=LONGEST, cache=cache, sched=limits)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulator", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    report.add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
