"""`python -m bench.tune`: measures tile sizes of the attention kernels on the GPU at hand, for jserve's table of them.

For each entry every candidate runs the entry's first case; the fastest few, and the table's own, run the others too,
and the least time over all of them wins. `--write` puts the winners into pallas_kernels/tiles.py, entry by entry.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from bench import report
from bench.attention_cases import AttentionCase, AttentionInputs, attention, random_inputs
from bench.kernel_sweep import MAX_ERROR, relative_error
from bench.timing import device_seconds
from jserve.console import RichProgress
from jserve.errors import JserveError
from jserve.pallas_kernels import pallas_triton
from jserve.pallas_kernels import tiles as tile_table
from jserve.pallas_kernels.online_softmax import Scoring
from jserve.pallas_kernels.tiles import TABLE, Key, Tile
from jserve.progress import Progress

TABLE_FILE = report.ROOT / "pallas_kernels" / "tiles.py"
BUDGET_S = 480.0
FINALISTS = 4
HEADS = {64: [(32, 32), (32, 8)], 128: [(40, 40), (32, 8)], 256: [(16, 16), (16, 4)]}
"""(query, KV) heads of the cases, by head_dim."""
CALLS = 4


@dataclass(frozen=True)
class Tuned:
    """One entry: its tile and the time of each case's call, before and after."""

    key: Key
    before: Tile
    before_s: float
    after: Tile
    after_s: float
    tried: int
    refused: tuple[str, ...]
    """Why the compiler, or the comparison of results, turned candidates down."""


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not args.toy:
        print(
            f"bench.tune: JAX sees no NVIDIA GPU here, only {jax.default_backend()}: run it on the machine to tune for",
            file=sys.stderr,
        )
        return 2
    console = report.console(args)
    keys = [key for key in TABLE if key.family == tile_table.family() and _wanted(key, args)]
    tuned, missing = tune_all(keys, args, RichProgress())
    columns = ("entry", "before", "us", "after", "us", "tried", "refused")
    rows = [
        (_name(t.key), str(t.before), t.before_s * 1e6, str(t.after), t.after_s * 1e6, t.tried, len(t.refused))
        for t in tuned
    ]
    if not console.is_terminal:
        console.width = 200
    console.print(report.table(f"tiles on {jax.devices()[0].device_kind}", columns, rows))
    changes = {t.key: t.after for t in tuned if t.after != t.before}
    if args.write and on_gpu:
        TABLE_FILE.write_text(with_entries(TABLE_FILE.read_text(), changes))
        report.note(console, f"wrote {len(changes)} entries to {TABLE_FILE.relative_to(report.ROOT)}")
    metrics = {"entries": len(tuned), "changed": len(changes)}
    gains = {"speedup": min((t.before_s / t.after_s for t in tuned), default=1.0)}
    config = {"device": jax.devices()[0].device_kind, "entries": [_document(t) for t in tuned]}
    report.emit(report.Result("tune", metrics | gains, config, args.seed, missing=missing), args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--kernel", choices=("decode", "prefill"), help="only this one")
    parser.add_argument("--head-dim", type=int, choices=(64, 128, 256), default=128, help="entries of this size (128)")
    parser.add_argument("--kind", choices=("16-bit", "8-bit", "float32"), default="16-bit", help="entries for these")
    parser.add_argument("--all", action="store_true", help="every entry of this GPU's family")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="start no candidate after so long (480)")
    parser.add_argument("--write", action="store_true", help="put the winners into pallas_kernels/tiles.py")
    parser.add_argument(
        "--toy", action="store_true", help="tiny cases and two candidates, on any device; never written"
    )
    report.add_arguments(parser)
    return parser


def _wanted(key: Key, args: argparse.Namespace) -> bool:
    if args.kernel not in (None, key.kernel):
        return False
    return bool(args.all) or (key.head_dim == args.head_dim and key.kind == args.kind)


def tune_all(keys: Sequence[Key], args: argparse.Namespace, progress: Progress) -> tuple[list[Tuned], dict[str, str]]:
    """Each entry in turn, as far as the time goes; what it does not reach is named."""
    deadline_s = time.perf_counter() + args.budget_s
    tuned: list[Tuned] = []
    missing: dict[str, str] = {}
    with progress.track("tuning", len(keys)) as task:
        for key in keys:
            if time.perf_counter() > deadline_s:
                missing[_name(key)] = "the time budget was spent"
                continue
            try:
                tuned.append(tune(key, cases_of(key, args.toy), candidates_of(key, args.toy), args.seed, deadline_s))
            except Exception as error:  # the other entries are still to be tuned
                missing[_name(key)] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
                )
            task.advance()
    return tuned, missing


def tune(key: Key, cases: Sequence[AttentionCase], candidates: Sequence[Tile], seed: int, deadline_s: float) -> Tuned:
    """The tile of least time (geometric mean over the cases) that computes what the XLA backend does."""
    own = TABLE[key]
    benches = [_Bench(key, case, seed) for case in cases]
    first = {
        tile: benches[0].seconds(tile) for tile in dict.fromkeys([own, *candidates]) if _in_time(deadline_s, tile, own)
    }
    if first[own] == math.inf:
        raise JserveError(f"the table's own tile does not run: {benches[0].refused[0]}")
    ranked = sorted((tile for tile in first if first[tile] < math.inf), key=lambda tile: first[tile])
    finalists = dict.fromkeys([*ranked[:FINALISTS], own])
    means = {
        tile: math.prod([first[tile], *(bench.seconds(tile) for bench in benches[1:])]) ** (1 / len(benches))
        for tile in finalists
    }
    best = min(means, key=lambda tile: means[tile])
    return Tuned(key, own, means[own], best, means[best], len(first), tuple(benches[0].refused))


def _in_time(deadline_s: float, tile: Tile, own: Tile) -> bool:
    return tile == own or time.perf_counter() < deadline_s


class _Bench:
    """One case, run with any tile."""

    def __init__(self, key: Key, case: AttentionCase, seed: int) -> None:
        self._key, self._case = key, case
        self._inputs = random_inputs(case, seed)
        self._wanted = np.asarray(jax.jit(attention(case, "xla"))(self._inputs), np.float32)
        self.refused: list[str] = []

    def seconds(self, tile: Tile) -> float:
        """Of one call; infinite for a tile that does not compile or computes something else."""
        run = jax.jit(partial(self._chain, tile))
        try:
            first, _ = run(self._inputs)
            error = relative_error(np.asarray(first, np.float32), self._wanted)
            if error <= MAX_ERROR:
                return device_seconds(lambda: run(self._inputs)) / CALLS
            self.refused.append(f"{tile}: {error:.3g} away from the XLA backend's result")
        except Exception as error:  # too much shared memory, mostly; the compiler has many words for it
            self.refused.append(f"{tile}: {type(error).__name__}: {str(error).strip()[:120]}")
        return math.inf

    def _chain(self, tile: Tile, x: AttentionInputs) -> tuple[Array, Array]:
        tiles: dict[str, Tile] = {f"{self._key.kernel}_tile": tile}
        attend: Callable[..., tuple[Array, Array]] = pallas_triton.attend
        results = [x.q]
        for _ in range(CALLS):
            results.append(attend(results[-1], x.k, x.v, x.scales, x.meta, Scoring(self._case.scale), **tiles)[0])
        return results[1], results[-1]


def cases_of(key: Key, toy: bool) -> list[AttentionCase]:
    case = partial(
        AttentionCase,
        head_dim=key.head_dim,
        dtype="float32" if key.kind == "float32" else "bfloat16",
        kv_dtype="int8" if key.kind == "8-bit" else "",
    )
    fewer = 8 if toy else 1
    batch, context = (2, 40) if toy else (32, 4096) if key.kernel == "decode" else (1, 4096)
    queries = 1 if key.kernel == "decode" else context
    return [
        case(batch, context, queries, heads=heads // fewer, kv_heads=max(1, kv_heads // fewer))
        for heads, kv_heads in HEADS[key.head_dim][: 1 if toy else None]
    ]


def candidates_of(key: Key, toy: bool) -> list[Tile]:
    if toy:
        return [Tile(16, 16, 4, 2)]
    rows = (16,) if key.kernel == "decode" else (32, 64, 128)
    return [Tile(*sizes) for sizes in itertools.product(rows, (16, 32, 64, 128), (4, 8), (2, 3, 4))]


def with_entries(source: str, entries: Mapping[Key, Tile]) -> str:
    """The text of tiles.py with other tiles at these keys. Raises KeyError if one is not there, each on a line."""
    for key, tile in entries.items():
        where = f'    Key("{key.family}", "{key.kernel}", {key.head_dim}, "{key.kind}"): '
        line = f"{where}Tile({tile.rows}, {tile.kv_tokens}, {tile.num_warps}, {tile.num_stages}),"
        source, found = re.subn(f"^{re.escape(where)}Tile\\([^)]*\\),$", line, source, flags=re.MULTILINE)
        if found != 1:
            raise KeyError(f"{key} is {found} times in {TABLE_FILE.name}")
    return source


def _name(key: Key) -> str:
    return f"{key.kernel} {key.head_dim} {key.kind}"


def _document(t: Tuned) -> dict[str, Any]:
    def sizes(tile: Tile) -> list[int]:
        return [tile.rows, tile.kv_tokens, tile.num_warps, tile.num_stages]

    return {
        "entry": list(t.key),
        "before": sizes(t.before),
        "before_us": t.before_s * 1e6,
        "after": sizes(t.after),
        "after_us": t.after_s * 1e6,
        "tried": t.tried,
        "refused": len(t.refused),
        "refusals": list(t.refused[:3]),
    }


if __name__ == "__main__":
    sys.exit(main())
