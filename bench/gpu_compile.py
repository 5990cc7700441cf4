"""What XLA made of a program for a GPU: memory, what is updated in place, copies, collectives, kernels, registers.

The numbers come from four places: the executable's memory analysis, its HLO, the sequence of launches that XLA dumps,
and the reports of ptxas, which XLA runs through a script of ours that asks for them.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bench.gpu_targets import GpuTarget, quiet


@dataclass(frozen=True)
class Candidate:
    """A program to compile, and what is to be seen in it; bytes are of one device."""

    name: str
    target: GpuTarget
    mesh: Mesh
    lower: Callable[[], Any]
    pool_bytes: int = 0
    """Of the KV cache that it must update in place; 0 if it updates none."""
    page_bytes: int = 0
    """Of a layer's keys, which it must never copy; 0 if it sees none."""
    held_bytes: int = 0
    """What lies in memory while it runs, whether it reads it or not."""


@dataclass(frozen=True)
class KernelFacts:
    """One kernel of a program, as it is launched and as ptxas assembled it."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    launches: int
    ours: bool
    """Written in Pallas; else XLA's own."""
    registers: int
    spill_bytes: int
    """Stored and loaded by one thread because it had no register."""


@dataclass(frozen=True)
class ProgramFacts:
    """One compiled program; bytes are of one device."""

    compile_s: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Of outputs that lie where a donated argument was."""
    temp_bytes: int
    page_copies: int
    """Copies of a whole page array in the HLO."""
    collectives: Mapping[str, int]
    host_waits: int
    """Conditionals, and loops of unknown length: the host reads from the device how to go on, which stands still."""
    kernels: tuple[KernelFacts, ...]

    @property
    def peak_bytes(self) -> int:
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def spilling(self) -> tuple[KernelFacts, ...]:
        return tuple(kernel for kernel in self.kernels if kernel.spill_bytes)


class GpuCompiler:
    """Compiles with `ptxas` and keeps its reports; one for a process, since XLA looks for ptxas once."""

    def __init__(self, ptxas: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="jserve-a100-")
        self._reports = Path(self._folder.name) / "reports"
        self._reports.mkdir()
        script = Path(self._folder.name) / "ptxas"
        script.write_text(_PTXAS.format(reports=shlex.quote(str(self._reports)), ptxas=shlex.quote(str(ptxas))))
        script.chmod(0o755)
        os.environ["PATH"] = f"{self._folder.name}{os.pathsep}{os.environ.get('PATH', '')}"

    def compile(self, candidate: Candidate) -> ProgramFacts:
        """Lower and compile; raises what JAX and XLA raise."""
        # Pallas looks at the ambient mesh for the GPU that it lowers to (JAX 0.11 and later).
        with jax.sharding.use_abstract_mesh(candidate.mesh.abstract_mesh):
            lowered = candidate.lower()
        for report in self._reports.iterdir():
            report.unlink()
        with tempfile.TemporaryDirectory(dir=self._folder.name) as dump:
            start_s = time.perf_counter()
            with quiet():
                compiled = lowered.compile(compiler_options={"xla_dump_to": dump})
            compile_s = time.perf_counter() - start_s
            (sequence,) = Path(dump).glob("*thunk_sequence.txt")
            launches = sequence.read_text()
        assembled = assembled_kernels("\n".join(report.read_text() for report in self._reports.iterdir()))
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        return ProgramFacts(
            compile_s=compile_s,
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            page_copies=large_copies(hlo, candidate.page_bytes) if candidate.page_bytes else 0,
            collectives=collectives(hlo),
            host_waits=host_waits(hlo),
            kernels=launched_kernels(launches, assembled, pallas_names(hlo)),
        )

    def close(self) -> None:
        self._folder.cleanup()


_PTXAS = """#!/bin/sh
# XLA's call with -v, whose report goes to a file of its own; what XLA reads stays as it is.
report=$(mktemp {reports}/XXXXXX) || exit 1
{ptxas} -v "$@" 2>"$report" && exit 0
code=$?
cat "$report" >&2
exit $code
"""


# --- reading what XLA and ptxas say -------------------------------------------------------------------------------

_LAUNCH = re.compile(
    r"(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]\s+shared_memory: (\d+) bytes"
)
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_PALLAS = re.compile(r'custom_call_target="__gpu\$xla\.gpu\.triton".*?\bname = "([^"]+)"')
_COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_COPY = re.compile(r"= \(?(\w+?)(\d+)\w*\[([\d,]*)\]\S* (?:.*? )?(?:copy|copy-start|transpose)\(")


def assembled_kernels(report: str) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of each kernel in `ptxas -v`'s words."""
    found: dict[str, tuple[int, int]] = {}
    name, spilled = "", 0
    for line in report.splitlines():
        if match := _ENTRY.search(line):
            name, spilled = match[1], 0
        elif match := _SPILLS.search(line):
            spilled = int(match[1]) + int(match[2])
        elif (match := _REGISTERS.search(line)) and name:
            found[name] = int(match[1]), spilled
    return found


def launched_kernels(
    launches: str, assembled: Mapping[str, tuple[int, int]], ours: set[str]
) -> tuple[KernelFacts, ...]:
    """The kernels of XLA's launch sequence. Raises KeyError for one that ptxas did not report."""
    counts = Counter(_LAUNCH.findall(launches))
    return tuple(
        KernelFacts(
            name=name,
            grid=(int(x), int(y), int(z)),
            threads=math.prod(map(int, threads)),
            shared_bytes=int(shared),
            launches=count,
            ours=re.sub(r"_\d+$", "", name) in ours or name in ours,
            registers=assembled[name][0],
            spill_bytes=assembled[name][1],
        )
        for (name, x, y, z, *threads, shared), count in counts.items()
    )


def pallas_names(hlo: str) -> set[str]:
    return set(_PALLAS.findall(hlo))


def collectives(hlo: str) -> dict[str, int]:
    """By kind; an asynchronous one counts once."""
    return dict(Counter(_COLLECTIVE.findall(hlo)))


def host_waits(hlo: str) -> int:
    """Control flow that the host follows; a loop with a known number of turns is none."""
    branches = re.findall(r" (?:conditional|while)\(.*", hlo)
    return sum("known_trip_count" not in branch for branch in branches)


def large_copies(hlo: str, least_bytes: int) -> int:
    """Copies and transposes, inside fusions too, of arrays of at least so many bytes."""
    sizes = (
        max(1, int(bits) // 8) * math.prod(map(int, filter(None, shape.split(","))))
        for _, bits, shape in _COPY.findall(hlo)
    )
    return sum(size >= least_bytes for size in sizes)
