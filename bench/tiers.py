"""`python -m bench.tiers`: the KV hierarchy, part by part, and what it does for conversations.

- links: blocks between device and host, as a share of one plain copy of as many bytes.
- disk: the disk tier, as a share of plain sequential I/O with the same flags (`bench.disk`).
- decision: what `TieredCache.arrive` takes for a long prompt (`bench/tier_decision.py` says what is in it).
- write-through: a decode step with a host tier over the same step without one.
- conversations: later turns with a device pool of a quarter of the working set and a host tier, against a pool that
  holds everything (TTFT) and against the small pool alone (throughput). Its model is a shape with random weights: much
  to compute and little KV for each token, so that loading must win. It is told from which bandwidth on that holds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from bench import disk, profiling, report, tier_decision, tier_links, tier_write_through
from bench.shapes import SHAPES
from bench.tier_chat import Played, Talk, play
from bench.tier_engines import make_runner, plain_engine, tiered_engine
from bench.timing import stoppable
from jserve import calibrate
from jserve.cache.cost import CostModel, break_even_bytes_per_s
from jserve.config import CacheConfig, EngineConfig, RunnerConfig, SchedConfig
from jserve.console import RichProgress
from jserve.engine import Engine
from jserve.errors import JserveError
from jserve.progress import Progress
from jserve.runner import Runner
from jserve.transfer import JaxTransfer

CPU_BUDGET = 256
"""Tokens of a step."""
LARGE_BLOCK_BYTES = 8 << 20
"""The disk is measured with these, too: of Llama-2-7B, 16 tokens."""
SECTOR = 4096
"""Direct I/O wants multiples of this."""
INFINITE, TIERED, RECOMPUTE = SYSTEMS = ("all on device", "quarter + host", "quarter alone")


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    link_turns: int
    """At each place in memory."""
    disk_bytes: int
    disk_turns: int
    prompts: int
    pairs: int
    steps: int
    rounds: int
    talk: Talk


FULL = Effort(20, 192 << 20, 3, 64, 6, 32, 2, Talk(15, 3, 4, 256, 64, 24))
SHORT = Effort(6, 48 << 20, 1, 24, 2, 16, 1, Talk(8, 2, 3, 192, 64, 8))
TOY = Effort(1, 1 << 16, 1, 4, 1, 8, 1, Talk(8, 2, 2, 40, 16, 4))


@dataclass
class Found:
    """What the parts have found so far."""

    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    effort = TOY if args.toy else SHORT if args.short else FULL
    found, progress, screen = Found(), RichProgress(), report.console(args)
    parts: Mapping[str, Callable[[], None]] = {
        "links, disk and write-through": lambda: _measure_parts(args, effort, found, progress),
        "decision": lambda: _measure_decision(effort, args.seed, found, progress),
        "conversations": lambda: _measure_conversations(args, effort, found, progress),
    }
    left = dict(parts)
    try:
        with stoppable():
            for name, part in parts.items():
                part()
                del left[name]
    except KeyboardInterrupt:
        found.missing |= dict.fromkeys(left, "stopped before it was measured")
    except (JserveError, OSError) as error:
        print(f"bench.tiers: {error}", file=sys.stderr)
        return 2
    for table in found.tables:
        screen.print(table)
    for line in [*found.notes, "A machine that others use at the same time measures them too."]:
        report.note(screen, line)
    report.emit(report.Result("tiers", found.metrics, found.config, args.seed, missing=found.missing), args)
    return 1 if found.missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tiers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="of all but the conversations: directory, GGUF file or hub id (the embedded)")
    parser.add_argument("--shape", choices=SHAPES, help="a shape with random weights instead of a model")
    parser.add_argument("--chat-shape", choices=SHAPES, default="wide", help="of the conversations (wide)")
    parser.add_argument("--block-size", type=int, help="tokens (default: the engine's)")
    parser.add_argument("--batch", type=int, default=8, help="rows of the decode steps (8)")
    parser.add_argument("--context", type=int, default=200, help="tokens before the decode steps (200)")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    parser.add_argument("--buffered", action="store_true", help="disk through the page cache, instead of direct")
    parser.add_argument("--short", action="store_true", help="fewer repetitions: below a minute")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: to try the command")
    profiling.add_argument(parser)
    report.add_arguments(parser)
    return parser


# --- links, disk, write-through ---------------------------------------------------------------------------------


def _measure_parts(args: argparse.Namespace, effort: Effort, found: Found, progress: Progress) -> None:
    """All of one model."""
    work = tier_write_through.Work(args.batch, args.context, effort.steps)
    block_size = args.block_size or 16
    config = _config(args, args.model, max(tier_links.HISTORY, work.blocks(min(8, block_size))), args.batch)
    runner = make_runner(config, args.shape, progress)
    found.config |= {"model": runner.info.model, "dtype": runner.info.dtype, "backend": runner.info.backend}
    found.config |= {"block_size": runner.info.block_size, "block_bytes": runner.block_bytes, **asdict(work)}
    try:
        _measure_links(runner, effort, found, progress)
        _measure_write_through(config, runner, work, args.seed, effort, found, progress)
        block_bytes = runner.block_bytes
    finally:
        runner.close()
    _measure_disk(args, block_bytes, effort, found, progress)


def _config(args: argparse.Namespace, model: str | None, blocks: int, rows: int) -> EngineConfig:
    """Of the programs only those that are measured: compiling them takes longer than measuring."""
    return EngineConfig(
        model=model,
        cache=CacheConfig(block_size=args.block_size, device_blocks=blocks, host_gib=1.0),
        sched=SchedConfig(max_running=rows, token_budget=CPU_BUDGET),
        runner=RunnerConfig(token_buckets=tuple(sorted({rows, 64, CPU_BUDGET}))),
    )


def _measure_links(runner: Runner, effort: Effort, found: Found, progress: Progress) -> None:
    rows = []
    with progress.track("copies", 2 * tier_links.PLACES * (effort.link_turns + 1)) as task:
        for blocks, suffix in ((tier_links.HISTORY, ""), (tier_links.STEP, "_step")):
            links = tier_links.measure(runner, effort.link_turns, task.advance, blocks=blocks)
            for name, label, link in zip(("d2h", "h2d"), ("device to host", "host to device"), links, strict=True):
                low, high = link.share_spread
                found.metrics[f"{name}{suffix}_share"] = link.share
                found.metrics[f"{name}{suffix}_share_low"], found.metrics[f"{name}{suffix}_share_high"] = low, high
                found.metrics[f"{name}{suffix}_gb_per_s"] = link.bytes_per_s / 1e9
                found.metrics[f"{name}{suffix}_plain_gb_per_s"] = link.plain_bytes_per_s / 1e9
                what = f"{label}, {blocks} blocks, {link.num_bytes / 2**20:.2f} MiB"
                spread = f"{low:.2f} to {high:.2f}"
                rows.append((what, link.bytes_per_s / 1e9, link.plain_bytes_per_s / 1e9, link.share, spread))
    columns = ("", "tier GB/s", "plain GB/s", "share", "half of the pairs")
    found.tables.append(report.table(f"copies, {runner.info.backend}", columns, rows))


def _measure_write_through(
    config: EngineConfig,
    runner: Runner,
    work: tier_write_through.Work,
    seed: int,
    effort: Effort,
    found: Found,
    progress: Progress,
) -> None:
    cost = calibrate.measure(config, runner, JaxTransfer(runner), progress)
    with progress.track("decode with and without write-through", 2 * effort.pairs + 2) as task:
        pairs = tier_write_through.measure(config, runner, cost, work, effort.pairs, seed, task.advance)
    period = runner.info.block_size
    each = [tier_write_through.compare([pair], period) for pair in pairs]
    all_together = tier_write_through.compare(pairs, period)
    found.metrics |= {
        "write_through_overhead": all_together.overhead,
        "write_through_overhead_least": min(pair.overhead for pair in each),
        "write_through_overhead_most": max(pair.overhead for pair in each),
        "decode_step_ms": all_together.plain_s * 1e3,
        "decode_step_write_through_ms": all_together.tiered_s * 1e3,
    }
    named = {**{str(i): pair for i, pair in enumerate(each)}, "together": all_together}
    rows = [(name, pair.plain_s * 1e3, pair.tiered_s * 1e3, pair.overhead) for name, pair in named.items()]
    title = f"decode step, {runner.info.model}, batch {work.batch}, {work.steps} steps from {work.context} tokens on"
    found.tables.append(report.table(title, ("pair", "without ms", "with ms", "overhead"), rows))
    found.config["stored_blocks"] = pairs[0].stored_blocks


def _measure_disk(args: argparse.Namespace, block_bytes: int, effort: Effort, found: Found, progress: Progress) -> None:
    """With this model's blocks, and with large ones."""
    sizes = {"disk": block_bytes} if args.toy else {"disk": block_bytes, "disk_large": LARGE_BLOCK_BYTES}
    need = 3 * (effort.disk_turns + 1) * max(effort.disk_bytes, disk.DEPTH * max(sizes.values()))
    if shutil.disk_usage(args.directory).free < need:
        found.missing["disk"] = f"{args.directory} has less than the {need} bytes that measuring takes"
        return
    rows = []
    with progress.track("disk", len(sizes)) as task:
        for name, size in sizes.items():
            blocks = max(disk.DEPTH, effort.disk_bytes // size)
            wanted = not args.buffered and size % SECTOR == 0
            rates, direct = disk.measure(args.directory, size, blocks, effort.disk_turns, direct=wanted, seed=args.seed)
            tier, plain = rates["disk tier"], rates["plain"]
            for way, ours, theirs in (("write", tier.write, plain.write), ("read", tier.read, plain.read)):
                share = median(ours) / median(theirs)
                found.metrics[f"{name}_{way}_share"] = share
                label = f"{way}, {blocks} of {size / 2**20:.2f} MiB, {'direct' if direct else 'buffered'}"
                rows.append((label, median(ours) / 1e9, median(theirs) / 1e9, share))
            task.advance()
    found.tables.append(report.table("disk", ("", "tier GB/s", "plain GB/s", "share"), rows))


# --- decision ---------------------------------------------------------------------------------------------------


def _measure_decision(effort: Effort, seed: int, found: Found, progress: Progress) -> None:
    with progress.track("decisions", effort.prompts) as task:
        taken = tier_decision.measure(effort.prompts, seed, task.advance)
    found.metrics |= {
        "decision_us": median(taken.arrive_s) * 1e6,
        "decision_with_hashing_us": median(taken.arrive_and_hash_s) * 1e6,
        "decision_strategy_us": median(taken.strategy_s) * 1e6,
        "stage_block_us": median(taken.stage_block_s) * 1e6,
    }
    rows = [
        ("arrive, keys known", found.metrics["decision_us"]),
        ("arrive, keys to be hashed", found.metrics["decision_with_hashing_us"]),
        ("the choice alone", found.metrics["decision_strategy_us"]),
        ("later, for each block from disk", found.metrics["stage_block_us"]),
    ]
    title = f"decision, {median(taken.blocks):.0f} blocks of {tier_decision.BLOCK} tokens"
    found.tables.append(report.table(title, ("", "median us"), rows))


# --- conversations ----------------------------------------------------------------------------------------------


def _measure_conversations(args: argparse.Namespace, effort: Effort, found: Found, progress: Progress) -> None:
    talk = effort.talk
    blocks = talk.blocks(args.block_size or 8) + talk.users
    config = _config(args, None, blocks, talk.users)
    config = replace(config, runner=replace(config.runner, **profiling.of(args)))
    runner = make_runner(config, args.chat_shape, progress)
    try:
        cost = calibrate.measure(config, runner, JaxTransfer(runner), progress)
        quarter = talk.blocks(runner.info.block_size) // 4
        engines: dict[str, Callable[[], Engine]] = {
            INFINITE: lambda: plain_engine(config, runner, blocks),
            TIERED: lambda: tiered_engine(config, runner, quarter, blocks, cost),
            RECOMPUTE: lambda: plain_engine(config, runner, quarter),
        }
        rounds = _play_rounds(engines, talk, effort.rounds, args.seed, progress)
        found.metrics["compiles_after_warmup"] = runner.compiles_after_warmup
        found.config |= {"chat_model": runner.info.model, **{f"chat_{k}": v for k, v in asdict(talk).items()}}
        found.config |= {"chat_device_blocks": quarter, "chat_block_size": runner.info.block_size}
        _tell_conversations(rounds, runner, found)
        _tell_break_even(cost, talk, runner, found)
    finally:
        runner.close()


def _play_rounds(
    engines: Mapping[str, Callable[[], Engine]], talk: Talk, rounds: int, seed: int, progress: Progress
) -> list[dict[str, Played]]:
    """Each round has new conversations, and takes the systems in the other order."""
    small = Talk(talk.users, talk.users, 2, talk.turn_tokens, talk.turn_tokens, 4)
    played: list[dict[str, Played]] = []
    with progress.track("conversations", (rounds + 1) * len(SYSTEMS)) as task:
        for i in range(rounds + 1):
            order = SYSTEMS if i % 2 else SYSTEMS[::-1]
            played.append({})
            for name in order:
                played[-1][name] = play(engines[name](), talk if i else small, seed + i)
                task.advance()
    return played[1:]  # the first warms up


def _tell_conversations(rounds: Sequence[Mapping[str, Played]], runner: Runner, found: Found) -> None:
    """Each ratio is the median of the rounds' own ratios."""
    found.metrics |= {
        "later_ttft_vs_infinite": median(r[TIERED].later_ttft_p50_s / r[INFINITE].later_ttft_p50_s for r in rounds),
        "recompute_ttft_vs_infinite": median(
            r[RECOMPUTE].later_ttft_p50_s / r[INFINITE].later_ttft_p50_s for r in rounds
        ),
        "throughput_vs_recompute": median(
            r[TIERED].output_tokens_per_s / r[RECOMPUTE].output_tokens_per_s for r in rounds
        ),
        "same_tokens": int(all(r[name].told == r[INFINITE].told for r in rounds for name in SYSTEMS)),
    }
    rows = []
    for name in SYSTEMS:
        mine = [r[name] for r in rounds]
        ttft_ms = median(p.later_ttft_p50_s for p in mine) * 1e3
        rate, cached = median(p.output_tokens_per_s for p in mine), median(p.cached_share for p in mine)
        rows.append((name, ttft_ms, rate, cached))
    title = f"conversations, {runner.info.model}, {len(rounds)} rounds"
    columns = ("KV cache", "later TTFT p50 ms", "tokens/s", "cached share")
    found.tables.append(report.table(title, columns, rows))
    if not found.metrics["same_tokens"]:
        found.notes.append("The systems did not say the same tokens.")


def _tell_break_even(cost: CostModel, talk: Talk, runner: Runner, found: Found) -> None:
    """Whether loading can win here at all."""
    token_bytes = runner.block_bytes / runner.info.block_size
    needed = break_even_bytes_per_s(cost.prefill, talk.mean_history, token_bytes, cost.host_to_device.per_copy_s)
    there = cost.host_to_device.bytes_per_s
    found.metrics |= {"break_even_bytes_per_s": needed, "link_bytes_per_s": there}
    found.notes.append(
        f"{runner.info.model}: loading a history of {talk.mean_history} tokens ({token_bytes:.0f} bytes each) is "
        f"quicker than computing it from {needed / 1e6:.4g} MB/s on; host to device: {there / 1e6:.4g} MB/s here."
    )


if __name__ == "__main__":
    sys.exit(main())
