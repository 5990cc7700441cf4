"""bench.kernels measures what it says, takes the worst case as its claim, and names whatever it could not measure."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import kernel_sweep, kernels
from bench.attention_cases import AttentionCase, random_inputs
from bench.kernel_peers import CudnnPaged, JaxPaged, Jserve, Unavailable
from bench.kernel_sweep import Measured, Sizes, Sweep
from bench.kernels import Ceilings, metrics_of
from jserve.progress import SilentProgress

DECODE = AttentionCase(16, 2048, heads=8, kv_heads=8)
LONGER = AttentionCase(16, 4096, heads=8, kv_heads=8)
PREFILL = AttentionCase(1, 4096, 4096, heads=8, kv_heads=8)
ROOF = Ceilings(bytes_per_s=1e12, flops_per_s=1e14)


def sweep_of(*measured: Measured, copies: list[tuple[str, str, float]] | None = None) -> Sweep:
    sweep = Sweep("pallas", seed=0, deadline_s=0)
    sweep.measured.extend(measured)
    sweep.copies.extend(copies or [])
    return sweep


def test_least_bytes_and_operations_are_those_of_the_algorithm() -> None:
    assert DECODE.kv_bytes() == 16 * 2048 * 2 * 8 * 128 * 2
    assert DECODE.flops() == 16 * 2048 * 4 * 8 * 128
    chunk = AttentionCase(1, 10, 4, heads=1, kv_heads=1, head_dim=1)
    assert chunk.flops() == 4 * (7 + 8 + 9 + 10)
    codes = AttentionCase(16, 2048, heads=8, kv_heads=8, kv_dtype="int8")
    assert codes.kv_bytes() == DECODE.kv_bytes() // 2


def test_a_claim_is_its_worst_case() -> None:
    at_roof, half = DECODE.least_bytes() / 1e12, 2 * LONGER.least_bytes() / 1e12
    metrics, missing = metrics_of(
        sweep_of(
            Measured(DECODE, "jserve_pallas", at_roof, 0.0),
            Measured(DECODE, "cudnn_paged_attention", 3 * at_roof, 0.0),
            Measured(DECODE, "flashinfer", 1.5 * at_roof, 0.0),
            Measured(LONGER, "jserve_pallas", half, 0.0),
            Measured(LONGER, "flashinfer", 0.9 * half, 0.0),
            copies=[("13b", "gather", 9e11), ("13b", "scatter", 8e11)],
        ),
        ROOF,
    )
    assert metrics["decode_bandwidth_share"] == pytest.approx(0.5)
    assert metrics["decode_vs_best_peer"] == pytest.approx(0.9)
    assert metrics["gather_bandwidth_share"] == pytest.approx(0.8)
    assert {"prefill_flops_share", "prefill_vs_best_peer"} <= set(missing)


def test_small_batches_short_contexts_and_codes_are_no_part_of_the_claim() -> None:
    few, codes = AttentionCase(1, 4096), AttentionCase(64, 4096, kv_dtype="int8")
    _, missing = metrics_of(
        sweep_of(Measured(few, "jserve_pallas", 1, 0), Measured(codes, "jserve_pallas", 1, 0)), ROOF
    )
    assert "decode_bandwidth_share" in missing
    metrics, _ = metrics_of(sweep_of(Measured(PREFILL, "jserve_pallas", PREFILL.flops() / 7e13, 0)), ROOF)
    assert metrics["prefill_flops_share"] == pytest.approx(0.7)


class Wrong:
    name = "wrong"

    def prepare(self, case: AttentionCase, x: Any) -> Any:
        return x

    def attend(self, case: AttentionCase, prepared: Any, q: Any) -> Any:
        return Jserve("xla").attend(case, prepared, q) * 1.1


class Broken(Wrong):
    name = "broken"

    def prepare(self, case: AttentionCase, x: Any) -> Any:
        raise RuntimeError("out of memory\nwith details")


TINY = AttentionCase(2, 20, heads=2, kv_heads=1, head_dim=8, block_size=4, dtype="float32")


def test_a_sweep_goes_on_past_peers_that_fail_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sweep, "jax_peers", lambda: [Broken(), CudnnPaged()])
    sweep = Sweep("xla", seed=0, deadline_s=time.perf_counter() + 60)
    sweep.run(Sizes([TINY], [], [], [("toy", 2, (4, 1, 8), 8, 3)], 64, 1 << 20), SilentProgress())
    (ours,) = sweep.measured
    assert (ours.name, ours.case, ours.error) == ("jserve_xla", TINY, 0.0)
    assert ours.seconds > 0
    assert [(name, way) for name, way, _ in sweep.copies] == [("toy", "gather"), ("toy", "scatter")]
    assert "needs an NVIDIA GPU" in sweep.missing["broken"]
    assert "needs an NVIDIA GPU" in sweep.missing["cudnn_paged_attention"]
    assert {"flashinfer", "torch_sdpa_gathered"} <= set(sweep.missing)


def test_a_result_that_is_another_functions_is_not_timed() -> None:
    sweep = Sweep("xla", seed=0, deadline_s=0)
    with pytest.raises(Unavailable, match="not the XLA backend's"):
        sweep._keep(TINY, "wrong", 1.0, kernel_sweep.relative_error(np.full(4, 1.1), np.ones(4)))
    with pytest.raises(Unavailable):
        sweep._keep(TINY, "broken", 1.0, float("nan"))


def test_what_the_time_did_not_reach_is_named() -> None:
    sweep = Sweep("xla", seed=0, deadline_s=time.perf_counter() - 1)
    sweep.run(Sizes([TINY], [], [], [], 64, 1 << 20), SilentProgress())
    assert not sweep.measured
    assert sweep.missing == {"case": f"the time budget was spent ({TINY})"}


def test_peers_refuse_what_they_do_not_do() -> None:
    chunk = AttentionCase(1, 20, 4, heads=2, kv_heads=1, head_dim=8, block_size=4)
    inputs = random_inputs(chunk, seed=0)
    with pytest.raises(Unavailable, match="decode alone"):
        JaxPaged(1).prepare(chunk, inputs)
    with pytest.raises(Unavailable, match="causal mask"):
        CudnnPaged().prepare(chunk, inputs)


def test_jaxs_own_paged_attention_computes_the_same_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted; so that what is compared on a GPU is the same work."""
    from jax.experimental.pallas.ops.gpu import paged_attention as theirs

    monkeypatch.setattr(theirs, "paged_attention", partial(theirs.paged_attention, interpret=True))
    case = AttentionCase(2, 100, heads=4, kv_heads=2, head_dim=32, dtype="float32")
    inputs = random_inputs(case, seed=0)
    wanted = Jserve("xla").attend(case, inputs, inputs.q)
    peer = JaxPaged(16)
    np.testing.assert_allclose(peer.attend(case, peer.prepare(case, inputs), inputs.q), wanted, rtol=1e-4, atol=1e-5)


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no NVIDIA GPU" in line
    assert "--toy" in line


def test_the_toy_run_ends_with_its_json_and_takes_up_the_decode_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "TOY", Sizes([TINY], [], [], [], 64, 1 << 20))
    decode = tmp_path / "decode.json"
    decode.write_text(json.dumps({"metrics": {"decode_step_over_floor": 1.1, "idle_share": 0.02}}))
    assert kernels.main(["--toy", "--json", "--decode-json", str(decode), "--plot", str(tmp_path / "roof.png")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == "kernels"
    assert found["config"]["backend"] == "cpu/xla"
    assert found["config"]["sizes"] == "toy"
    assert found["metrics"]["idle_share"] == 0.02
    assert found["config"]["cases"][0]["by"] == "jserve_xla"
    assert (tmp_path / "roof.png").exists() or "matplotlib" in found["missing"]["roofline plot"]
