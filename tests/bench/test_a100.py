"""bench.a100 counts as failed what does not compile, fit or write in place; the compiler itself runs in `make a100`."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

from bench import a100, gpu_models, gpu_targets
from bench.a100 import Outcome, metrics_of
from bench.gpu_compile import Candidate, KernelFacts, ProgramFacts
from bench.gpu_targets import TARGETS
from jserve.errors import ConfigError

A100 = TARGETS["a100-80gb"]
DECODE = KernelFacts("decode_attention", (64, 32, 1), 128, 21504, 32, True, 96, 0)
FACTS = ProgramFacts(
    compile_s=1.0,
    argument_bytes=70 << 30,
    output_bytes=60 << 30,
    alias_bytes=60 << 30,
    temp_bytes=1 << 30,
    page_copies=0,
    collectives={"all-reduce": 97},
    host_waits=0,
    kernels=(DECODE,),
)


def outcome(*, facts: ProgramFacts | None = FACTS, held_bytes: int = 0, error: str = "", **changes: Any) -> Outcome:
    candidate = Candidate(
        name="decode",
        target=A100,
        mesh=cast(Any, None),
        lower=lambda: None,
        pool_bytes=60 << 30,
        page_bytes=1 << 30,
        held_bytes=held_bytes,
    )
    return Outcome("decode", A100.name, candidate, facts and dataclasses.replace(facts, **changes), error)


def test_a_program_that_fits_and_writes_in_place_is_fine() -> None:
    assert outcome().problem == ""
    assert metrics_of([outcome()]) == {
        "programs": 1,
        "programs_failed": 0,
        "pool_copies": 0,
        "spills": 0,
        "xla_spills": 0,
    }


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (outcome(temp_bytes=11 << 30), "fit"),
        (outcome(held_bytes=80 << 30), "fit"),
        (outcome(alias_bytes=59 << 30), "in place"),
        (outcome(facts=None, error="RESOURCE_EXHAUSTED: shared memory"), "shared memory"),
        (outcome(kernels=(dataclasses.replace(DECODE, spill_bytes=8),)), "spills"),
    ],
)
def test_what_is_wrong_is_named_and_counted(bad: Outcome, why: str) -> None:
    assert why in bad.problem
    assert metrics_of([outcome(), bad])["programs_failed"] == 1
    assert len(bad.row()) == len(a100.COLUMNS)
    assert bad.document()["program"] == "decode"


def test_spills_of_jserve_and_of_xla_are_counted_apart() -> None:
    spilling = dataclasses.replace(DECODE, name="prefill_attention", spill_bytes=76)
    theirs = dataclasses.replace(spilling, name="gemm_fusion", ours=False)
    counts = metrics_of([outcome(kernels=(DECODE, spilling, theirs), page_copies=2)])
    assert (counts["spills"], counts["xla_spills"], counts["pool_copies"]) == (1, 1, 2)


def test_without_the_plugin_one_line_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("jax_cuda12_plugin") or importlib.util.find_spec("jax_cuda13_plugin"):
        pytest.skip("JAX's CUDA plugin is installed here")
    monkeypatch.setattr(gpu_targets, "folder", lambda: tmp_path / "nothing")
    assert a100.main(["--short"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`python -m bench.a100 --install`" in line


class CpuTarget:
    """A target whose device is here, for programs that are not compiled."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes

    def mesh(self, tp: int) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.array(jax.devices()[:tp]), ("tp",))


def test_a_models_pool_takes_what_its_weights_leave() -> None:
    decode, prefill, sample = gpu_models.step_candidates("tiny", 1, cast(Any, CpuTarget(3 << 30)))
    assert decode.pool_bytes == prefill.pool_bytes == 8 * decode.page_bytes
    assert sample.pool_bytes == 0
    weight_bytes = decode.held_bytes - decode.pool_bytes
    assert 30 << 20 < weight_bytes < 45 << 20
    assert 0.85 < decode.pool_bytes / ((1 << 30) - weight_bytes) <= 0.9


def test_weights_that_leave_no_room_are_an_error_with_numbers() -> None:
    with pytest.raises(ConfigError, match="no room for one context of 4096 tokens in 1 GiB"):
        gpu_models.step_candidates("tiny", 1, cast(Any, CpuTarget(1 << 30)))
