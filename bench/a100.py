"""`python -m bench.a100`: compiles jserve for an A100 80GB and an H200, on a machine that needs to have neither.

XLA's whole GPU pipeline runs, ptxas included, on the runner's own programs for five models and on every kernel. For
each it says whether it fits the memory, whether the KV cache is updated in place and never copied, which collectives
it has, and what its kernels take: blocks, threads, shared memory, registers and spills. Nothing runs, and nothing is
timed but the compiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from bench import report
from bench.gpu_compile import Candidate, GpuCompiler, KernelFacts, ProgramFacts
from bench.gpu_models import STEPS, step_candidates
from bench.gpu_targets import TARGETS, GpuTarget, install, prepare
from bench.kernel_programs import kernel_candidates
from bench.timing import stoppable
from jserve.console import RichProgress
from jserve.errors import JserveError
from jserve.progress import Progress

MODELS = (("llama-2-7b", 1), ("llama-2-13b", 1), ("opt-13b", 1), ("opt-30b", 2), ("llama-2-70b", 2))
"""With the number of GPUs that share each."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program: facts, or the first line of the error."""

    name: str
    gpu: str
    candidate: Candidate | None = None
    facts: ProgramFacts | None = None
    error: str = ""

    @property
    def fits(self) -> bool:
        assert self.facts is not None
        assert self.candidate is not None
        beside = self.facts.peak_bytes - self.facts.argument_bytes
        held = max(self.facts.argument_bytes, self.candidate.held_bytes)
        return held + beside <= self.candidate.target.memory_bytes

    @property
    def in_place(self) -> bool:
        assert self.facts is not None
        assert self.candidate is not None
        return self.facts.alias_bytes >= self.candidate.pool_bytes

    @property
    def problem(self) -> str:
        """Why it counts as failed; empty if it does not."""
        if self.facts is None:
            return self.error
        if not self.fits:
            return "does not fit the memory"
        if not self.in_place:
            return "does not update the KV cache in place"
        spills = [kernel.name for kernel in self.facts.spilling if kernel.name.startswith("decode_attention")]
        return "spills registers in the decode kernel" if spills else ""

    def row(self) -> tuple[object, ...]:
        facts = self.facts
        if facts is None or self.candidate is None:
            return (self.name, self.gpu, "failed", *("-",) * (len(COLUMNS) - 3))
        return (
            self.name,
            self.gpu,
            "yes" if self.fits else "NO",
            f"{facts.argument_bytes / 2**30:.2f}",
            f"{facts.temp_bytes / 2**20:.1f}",
            f"{facts.alias_bytes / 2**30:.2f}",
            ("yes" if self.in_place else "NO") if self.candidate.pool_bytes else "-",
            facts.page_copies if self.candidate.page_bytes else "-",
            ", ".join(f"{count} {kind}" for kind, count in sorted(facts.collectives.items())) or "-",
            facts.launches,
            facts.host_waits,
            len(facts.spilling),
            f"{facts.compile_s:.1f}",
        )

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {"program": self.name, "gpu": self.gpu}
        facts = self.facts
        if facts is None or self.candidate is None:
            return found | {"error": self.error}
        shown = [_kernel_document(kernel) for kernel in facts.kernels if kernel.ours or kernel.spill_bytes]
        return found | {
            "fits": self.fits,
            "in_place": self.in_place,
            "argument_bytes": facts.argument_bytes,
            "temp_bytes": facts.temp_bytes,
            "alias_bytes": facts.alias_bytes,
            "pool_bytes": self.candidate.pool_bytes,
            "pool_copies": facts.page_copies,
            "collectives": dict(facts.collectives),
            "launches": facts.launches,
            "host_waits": facts.host_waits,
            "kernels": shown,
        }


COLUMNS = (
    *("program", "GPU", "fits", "arguments GiB", "temp MiB", "alias GiB", "in place", "pool copies", "collectives"),
    *("launches", "host waits", "spilling", "compiled in s"),
)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    gpu = args.gpu or ("a100-80gb" if args.short else "all")
    targets = list(TARGETS.values()) if gpu == "all" else [TARGETS[gpu]]
    console = report.console(args)
    if not console.is_terminal:
        console.width = 200  # a log is read with all its columns
    try:
        if args.install:
            install()
        compiler = GpuCompiler(prepare())
    except JserveError as error:
        print(f"bench.a100: {error}", file=sys.stderr)
        return 2
    try:
        outcomes = compile_all(compiler, targets, args.short, args.only, RichProgress())
    finally:
        compiler.close()
    console.print(report.table("programs, compiled and not run", COLUMNS, [outcome.row() for outcome in outcomes]))
    console.print(_kernel_table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.problem]
    for outcome in failed:
        report.note(console, f"{outcome.name} on {outcome.gpu}: {outcome.problem}")
    metrics = metrics_of(outcomes)
    report.note(console, ", ".join(f"{name} {value}" for name, value in metrics.items()))
    config = {
        "short": args.short,
        "gpu": gpu,
        "only": args.only,
        "programs": [outcome.document() for outcome in outcomes],
    }
    report.emit(report.Result("a100", metrics, config, args.seed), args)
    return 1 if failed or metrics["pool_copies"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.a100", description=__doc__)
    parser.add_argument("--short", action="store_true", help="for an A100, one model and each kernel once")
    parser.add_argument("--gpu", choices=(*TARGETS, "all"), help="what to compile for (all, or with --short an A100)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only programs with this in their name")
    parser.add_argument("--install", action="store_true", help="first download JAX's CUDA plugin and ptxas (220 MB)")
    report.add_arguments(parser)
    return parser


def compile_all(
    compiler: GpuCompiler, targets: Sequence[GpuTarget], short: bool, only: str, progress: Progress
) -> list[Outcome]:
    """Every program for every target; one that fails does not stop the others."""
    jobs: list[tuple[str, GpuTarget, int, Callable[[], list[Candidate]]]] = []
    for target in targets:
        kernels = kernel_candidates(target, short=short)
        steps = STEPS[:2] if short else STEPS
        for shape, tp in MODELS[:1] if short else MODELS:
            wanted = [step for step in steps if only in f"{shape} {step}"]
            jobs.append((shape, target, len(wanted), partial(step_candidates, shape, tp, target, wanted)))
        jobs += [(kernel.name, target, 1, partial(list, [kernel])) for kernel in kernels if only in kernel.name]
        jobs = [job for job in jobs if job[2]]
    outcomes: list[Outcome] = []
    try:
        with stoppable(), progress.track("compiling", sum(count for _, _, count, _ in jobs)) as task:
            for name, target, count, candidates in jobs:
                try:
                    found = candidates()
                except JserveError as error:
                    outcomes.append(Outcome(name, target.name, error=str(error)))
                    task.advance(count)
                    continue
                for candidate in found:
                    outcomes.append(_compiled(compiler, candidate))
                    task.advance()
    except KeyboardInterrupt:
        outcomes.append(Outcome("all others", "-", error="stopped before they were compiled"))
    return outcomes


def _compiled(compiler: GpuCompiler, candidate: Candidate) -> Outcome:
    outcome = partial(Outcome, candidate.name, candidate.target.name, candidate)
    try:
        return outcome(compiler.compile(candidate))
    except Exception as error:  # whatever a compiler may raise: the others are still to be seen
        return outcome(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def metrics_of(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """`spills`: kernels of jserve that spill; `xla_spills`: those that XLA made."""
    facts = [outcome.facts for outcome in outcomes if outcome.facts is not None]
    spilling = {(o.gpu, o.name, k.name): k.ours for o in outcomes if o.facts is not None for k in o.facts.spilling}
    return {
        "programs": len(outcomes),
        "programs_failed": sum(bool(outcome.problem) for outcome in outcomes),
        "pool_copies": sum(found.page_copies for found in facts),
        "spills": sum(spilling.values()),
        "xla_spills": sum(not ours for ours in spilling.values()),
    }


def _kernel_table(outcomes: Sequence[Outcome]) -> Table:
    columns = ("kernel", "of", "GPU", "grid", "threads", "shared bytes", "registers", "spilled bytes", "launches")
    rows = [
        (
            k.name,
            outcome.name,
            outcome.gpu,
            str(k.grid),
            k.threads,
            k.shared_bytes,
            k.registers,
            k.spill_bytes,
            k.launches,
        )
        for outcome in outcomes
        if outcome.facts is not None
        for k in outcome.facts.kernels
        if k.ours or k.spill_bytes
    ]
    return report.table("kernels of jserve, and any other that spills", columns, rows)


def _kernel_document(kernel: KernelFacts) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "ours": kernel.ours,
        "grid": list(kernel.grid),
        "threads": kernel.threads,
        "shared_bytes": kernel.shared_bytes,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_bytes,
        "launches": kernel.launches,
    }


if __name__ == "__main__":
    sys.exit(main())
