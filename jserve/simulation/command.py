"""`jserve simulate`: what a trace would do on hardware that is not at hand, by policy and load."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jserve.cache.cost import CostModel
from jserve.config import CacheConfig, SchedConfig
from jserve.errors import ConfigError
from jserve.progress import Progress
from jserve.settings import build
from jserve.simulation.arms import ARMS, arm
from jserve.simulation.playing import Span
from jserve.simulation.profiles import hardware, hardware_names, model_names, model_shape
from jserve.simulation.simulator import Simulated, System, simulate, system
from jserve.simulation.summary import Summary, kv_utilisation, mean_batch, summarise
from jserve.simulation.traces import read_trace
from jserve.simulation.workload import Workload, bursts, closed_loop, compressed, poisson

HOST_GIB_PER_DEVICE = 100.0
"""What a policy with tiers gets unless told: about half of what comes with a rented A100."""
SIZES = ("block_size", "device_blocks", "memory_fraction", "host_gib", "disk_gib", "staging_gib", "load_timeout_s")
LIMITS = ("max_running", "token_budget", "max_waiting")


@dataclass(frozen=True)
class Row:
    """One policy under one load."""

    policy: str
    load: str
    summary: Summary
    kv_used: float
    batch: float
    simulated_s: float
    run: Simulated

    def as_dict(self) -> dict[str, Any]:
        about = {"policy": self.policy, "load": self.load, "kv_used": self.kv_used, "batch": self.batch}
        return about | self.summary.as_dict()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the command needs besides the settings of cache and scheduler."""
    parser.add_argument("trace", type=Path, metavar="TRACE", help="turn lengths, a Mooncake or Azure trace, dialogues")
    add_system_flags(parser)
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"of {', '.join(ARMS)}; repeat it to compare (default: jserve)",
    )
    parser.add_argument(
        "--clients", type=_counts, metavar="N,N,...", help="closed loop: so many clients; several loads"
    )
    parser.add_argument("--rate", type=_rates, metavar="R,R,...", help="open loop: Poisson, sessions a second")
    parser.add_argument("--burst", type=int, default=1, metavar="N", help="with --rate: N sessions at once (default 1)")
    parser.add_argument(
        "--compress", type=float, default=1.0, metavar="F", help="everything F times as fast (default 1)"
    )
    parser.add_argument("--sessions", type=int, metavar="N", help="only the first N of the trace")
    parser.add_argument("--warm-up", type=int, default=0, metavar="N", help="turns of each client that do not count")
    parser.add_argument("--calls", type=int, metavar="N", help="stop after N measured requests")
    parser.add_argument("--seed", type=int, default=0, help="draws the arrivals of --rate (default 0)")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency, TTFT, hits and memory (png, svg, pdf)")


def add_system_flags(parser: argparse.ArgumentParser) -> None:
    """The hardware and the model, for `simulate` and `plan`."""
    parser.add_argument("--gpu", default="a100-80gb", metavar="NAME", help=f"of {', '.join(hardware_names())}")
    parser.add_argument("--model", default="llama-3-8b", metavar="NAME", help=f"of {', '.join(model_names())}")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="devices that share each layer (default 1)")
    parser.add_argument("--drives", type=int, metavar="N", help="NVMe drives of the disk tier (default: one a device)")
    parser.add_argument("--bytes", type=int, default=2, choices=(1, 2, 4), help="of a weight and of a KV number (2)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="longest context (default: the model's)")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="costs as `jserve calibrate --json` printed them"
    )


def run(args: argparse.Namespace, progress: Progress) -> str:
    """The command: its table, or its JSON."""
    names = args.policy or ["jserve"]
    policies = [(name, described(args, name)) for name in names]
    work = _work(args, policies[0][1].max_model_len, progress)
    rows = []
    for load, loaded in _loads(args, work):
        for name, of in policies:
            rows.append(_row(name, load, of, loaded, Span(args.warm_up, args.calls), progress))
    if args.plot is not None:
        from jserve.simulation.plots import draw_rows

        draw_rows(rows, work.name, args.plot)
        progress.note(f"drawn {args.plot}")
    return as_json(rows, policies[0][1], work) if args.json else table(rows, policies[0][1], work)


def described(args: argparse.Namespace, policy: str) -> System:
    """The system that the flags describe, under a policy."""
    given = vars(args)
    sizes = build(CacheConfig, {name: given[name] for name in SIZES if name in given})
    host_gib = sizes.host_gib or HOST_GIB_PER_DEVICE * args.tp
    sizes = replace(sizes, host_gib=host_gib, disk_dir=None if args.no_disk else "simulated")
    limits = build(SchedConfig, {name: given[name] for name in LIMITS if name in given})
    caching, scheduling = arm(policy).policies(sizes, limits)
    of = system(
        hardware(args.gpu),
        model_shape(args.model),
        tp=args.tp,
        drives=args.drives or args.tp,
        bytes_per_number=args.bytes,
        max_model_len=args.max_model_len,
        cache=caching,
        sched=scheduling,
    )
    return (
        of
        if args.calibration is None
        else replace(of, cost=calibration(args.calibration), hardware=args.calibration.name)
    )


def calibration(path: Path) -> CostModel:
    """A cost model from a file. Raises ConfigError."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is no calibration ({error}): write one with jserve calibrate --json") from None
    names = ("format", *CostModel.__dataclass_fields__)
    return CostModel.from_dict({name: said[name] for name in names if name in said})


def _work(args: argparse.Namespace, max_tokens: int, progress: Progress) -> Workload:
    work = read_trace(args.trace, max_tokens)
    everything = read_trace(args.trace, sys.maxsize).num_turns
    if left_out := everything - work.num_turns:
        progress.note(
            f"{left_out} of the {everything} requests in {args.trace.name} are left out: they are longer than the "
            f"context of {max_tokens} tokens, which --max-model-len raises"
        )
    if args.sessions is not None:
        work = replace(work, sessions=work.sessions[: args.sessions])
    return compressed(work, args.compress) if args.compress != 1.0 else work


def _loads(args: argparse.Namespace, work: Workload) -> list[tuple[str, Workload]]:
    """The work under each load, by name."""
    if args.clients is not None and args.rate is not None:
        raise ConfigError("--clients and --rate exclude each other: a loop is closed or open")
    if args.clients is not None:
        return [(f"{n} clients", closed_loop(work, n)) for n in args.clients]
    if args.rate is not None:
        return [
            (
                f"{rate:g}/s",
                poisson(work, rate, args.seed) if args.burst == 1 else bursts(work, rate, args.burst, args.seed),
            )
            for rate in args.rate
        ]
    if not any(session.start_s for session in work.sessions):
        raise ConfigError(f"{work.name} tells no times of arrival: give --clients 20,40,... or --rate 0.5,1,...")
    return [("its own times", work)]


def _row(name: str, load: str, of: System, work: Workload, span: Span, progress: Progress) -> Row:
    done = simulate(of, replace(work, name=f"{name}, {load}"), span=span, progress=progress)
    return Row(name, load, summarise(done.played), kv_utilisation(done), mean_batch(done), done.played.end_s, done)


def table(rows: Sequence[Row], of: System, work: Workload) -> str:
    """For people."""
    columns = {
        "policy": [row.policy for row in rows],
        "load": [row.load for row in rows],
        "requests/s": [f"{row.summary.requests_per_s:.3g}" for row in rows],
        "tokens/s": [f"{row.summary.output_tokens_per_s:.4g}" for row in rows],
        "ms/token": [f"{1e3 * row.summary.normalised_latency_s:.4g}" for row in rows],
        "TTFT p50": [_seconds(row.summary.ttft_p50_s) for row in rows],
        "TTFT p95": [_seconds(row.summary.ttft_p95_s) for row in rows],
        "TPOT p50": [_seconds(row.summary.tpot_p50_s) for row in rows],
        "TPOT p99": [_seconds(row.summary.tpot_p99_s) for row in rows],
        "found gpu/host/disk": [_hits(row.summary) for row in rows],
        "KV used": [f"{100 * row.kv_used:.0f} %" for row in rows],
        "batch": [f"{row.batch:.1f}" for row in rows],
        "refused": [str(row.summary.refused) for row in rows],
    }
    lines = [
        f"simulated: {of.model} on {of.hardware}, {work.name} ({work.num_turns} requests)",
        f"KV pool of {of.device_blocks * of.cost.block_tokens} tokens, blocks of {of.cost.block_tokens}",
        "",
    ]
    widths = [max(len(title), *map(len, cells)) for title, cells in columns.items()]
    for cells in ([*columns], *zip(*columns.values(), strict=True)):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return "\n".join(lines)


def as_json(rows: Sequence[Row], of: System, work: Workload) -> str:
    """For programs: one line."""
    about = {
        "simulated": True,
        "model": of.model,
        "hardware": of.hardware,
        "trace": work.name,
        "requests": work.num_turns,
        "device_kv_tokens": of.device_blocks * of.cost.block_tokens,
        "block_tokens": of.cost.block_tokens,
    }
    return json.dumps(about | {"rows": [row.as_dict() for row in rows]})


def _hits(summary: Summary) -> str:
    shares = (summary.device_hit_share, summary.host_hit_share, summary.disk_hit_share)
    return " / ".join(f"{100 * share:.0f}" for share in shares) + " %"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]
