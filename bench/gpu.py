"""`make gpu`: everything that needs an NVIDIA GPU, in one command of at most nine minutes.

The tests marked `gpu`, decode of a 13B shape, and the kernels beside their peers, each in a process of its own with a
time of its own. A part that fails or runs out of time is named with its error, and the others go on. Uses the Python
and packages that are installed; installs nothing and needs no network.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import report

TOTAL_S = 530.0
LAST_WORDS_S = 20.0
"""What a part gets to write down its results when its time is over."""
KERNELS_SHARE = 0.4
"""Of the whole time: after it the kernels' benchmark starts no new case."""
TAIL_LINES = 25
GPU_TESTS = ("tests/kernels", "tests/test_token_equality.py")


@dataclass(frozen=True)
class Part:
    """A command, the most time it may take, and how its result is to be found."""

    name: str
    command: Sequence[str]
    limit_s: float
    has_json: bool = True
    """Its last line of output is a benchmark's JSON."""


@dataclass(frozen=True)
class Done:
    """How a part ended."""

    part: Part
    code: int | None
    """None: its time was over."""
    seconds: float
    output: str

    @property
    def document(self) -> dict[str, Any] | None:
        """The benchmark's JSON, whatever else happened."""
        lines = self.output.strip().splitlines()
        try:
            found = json.loads(lines[-1]) if lines and self.part.has_json else None
        except ValueError:
            return None
        return found if isinstance(found, dict) and "metrics" in found else None

    @property
    def problem(self) -> str:
        """What went wrong; empty if nothing did."""
        if self.code is None:
            return f"not finished after {self.seconds:.0f} s"
        if self.code:
            lines = self.output.strip().splitlines()
            return f"exit code {self.code}" + (f": {lines[-1][:300]}" if lines and not self.document else "")
        return "" if self.document or not self.part.has_json else "it printed no result"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    start_s = time.perf_counter()
    platform = _platform()
    if platform != "gpu" and not args.toy:
        print(
            f"bench.gpu: JAX sees no NVIDIA GPU here ({platform}): install jax[cuda12] and a driver, or run on a "
            "machine with one",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    done: list[Done] = []
    for part in parts(args):
        left_s = args.limit_s - (time.perf_counter() - start_s) - LAST_WORDS_S
        _say(f"{part.name}: {' '.join(part.command[2:])} (at most {min(left_s, part.limit_s):.0f} s)")
        # The tests take the CPU if nobody asks for more.
        done.append(run(part, min(left_s, part.limit_s), {} if args.toy else {"JAX_PLATFORMS": "cuda,cpu"}))
        _say(f"{part.name}: {done[-1].problem or 'done'}, {done[-1].seconds:.0f} s")
        if not part.has_json:
            print("\n".join(done[-1].output.strip().splitlines()[-TAIL_LINES:]), file=sys.stderr, flush=True)
        if (document := done[-1].document) is not None:
            _write(args.out / f"{part.name}-{args.label}.json", document)
        _write(args.out / f"summary-{args.label}.json", summary(done, args).document())
    if args.json:
        print(json.dumps(summary(done, args).document()), flush=True)
    return 1 if any(one.problem for one in done) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="directory for the JSON (bench/results)")
    parser.add_argument("--label", default="gpu", help="part of the files' names (gpu)")
    parser.add_argument("--limit-s", type=float, default=TOTAL_S, help="seconds for all parts together (530)")
    parser.add_argument("--short", action="store_true", help="fewer cases of the kernels")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any device: to try the command")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON on stdout")
    parser.add_argument("--seed", type=int, default=0, help="chooses the work (default 0)")
    return parser


def parts(args: argparse.Namespace) -> list[Part]:
    """In the order of what would be missed most; what a part leaves of its time is the next ones'."""
    decode, plot = args.out / f"decode-{args.label}.json", args.out / f"kernels-{args.label}.png"
    tests = GPU_TESTS[:1] if args.toy else GPU_TESTS
    pytest = "pytest -m gpu --import-mode=importlib --continue-on-collection-errors -q"
    shape = "llama-2-13b --batch 1,16,64"
    if args.toy:
        shape = "tiny --batch 1,2 --context 32 --steps 4 --device-blocks 64"
    sizes = "--toy" if args.toy else "--short" if args.short else ""
    kernels = f"bench.kernels --json {sizes} --budget-s {args.limit_s * KERNELS_SHARE:.0f}"
    return [
        Part("tests", _python(pytest, *tests), 150, has_json=False),
        Part("decode", _python(f"bench.decode --json --shape {shape}"), 200),
        Part("kernels", _python(kernels, "--decode-json", str(decode), "--plot", str(plot)), args.limit_s),
    ]


def _python(module: str, *paths: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *module.split(), *paths)


def run(part: Part, limit_s: float, environment: Mapping[str, str]) -> Done:
    """Its stderr goes to ours as it comes. At the limit it is asked to end, then made to."""
    start_s = time.perf_counter()
    path = os.pathsep.join(filter(None, (str(report.ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        part.command,
        cwd=report.ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    late = False
    try:
        output, _ = process.communicate(timeout=max(1.0, limit_s))
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return Done(part, None if late else process.returncode, time.perf_counter() - start_s, output)


def summary(done: Sequence[Done], args: argparse.Namespace) -> report.Result:
    """All metrics in one, and what each part came to."""
    metrics: dict[str, float] = {}
    missing: dict[str, str] = {}
    for one in done:
        if one.problem:
            missing[one.part.name] = one.problem
        document = one.document or {"metrics": _counts(one.output)}
        metrics |= document["metrics"]
        missing |= {what: why for what, why in document.get("missing", {}).items() if what not in metrics}
    config = {"parts": {one.part.name: round(one.seconds, 1) for one in done}, "short": args.short, "toy": args.toy}
    return report.Result("gpu", metrics, config, args.seed, missing=missing)


def _counts(output: str) -> dict[str, float]:
    """What pytest's last line says."""
    lines = output.strip().splitlines()
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []
    return {f"gpu_tests_{what}": int(count) for count, what in found}


def _platform() -> str:
    """Of JAX's devices, asked in another process: one that has seen the GPU keeps most of its memory."""
    ask = (sys.executable, "-c", "import jax; print(jax.default_backend())")
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "JAX did not start within two minutes"
    lines = (found.stdout if not found.returncode else found.stderr).strip().splitlines()
    return lines[-1] if lines else "JAX did not start"


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")


def _say(text: str) -> None:
    print(f"bench.gpu: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
