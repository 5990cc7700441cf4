"""What XLA and ptxas say of a program is read as they mean it. The texts are excerpts of their own (JAX 0.10.2)."""

from __future__ import annotations

import pytest

from bench.gpu_compile import (
    KernelFacts,
    assembled_kernels,
    collectives,
    host_waits,
    large_copies,
    launched_kernels,
    pallas_names,
)

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'decode_attention' for 'sm_80'
ptxas info    : Function properties for decode_attention
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 432 bytes cmem[0]
ptxas info    : Compile time = 98.656 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm_fusion_dot_2' for 'sm_80'
ptxas info    : Function properties for gemm_fusion_dot_2
    40 bytes stack frame, 36 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 384 bytes cmem[0]
"""
LAUNCHES = """
001: kCopy         [source       | next=006 (5)] kCopy
006: kWhile        [prev=005 (1) | next=012 (1)]
condition:
    007: kCustomKernel [source | sink] gemm_fusion_dot_2 grid: [11008, 1, 1] threads: [64, 1, 1]  shared_memory: 6144 bytes
022: kCustomKernel [prev=021 (1) | next=023 (1)] decode_attention grid: [64, 32, 1] threads: [128, 1, 1]  shared_memory: 21504 bytes
031: kCustomKernel [prev=030 (1) | next=032 (1)] decode_attention grid: [64, 32, 1] threads: [128, 1, 1]  shared_memory: 21504 bytes
"""  # noqa: E501
HLO = """
%fused_copy (p: bf16[1024,16,32,128]) -> bf16[1024,16,32,128] {
  ROOT %copy.1 = bf16[1024,16,32,128]{3,1,2,0} copy(%p)
}
ENTRY %main {
  %small = s32[64]{0} copy(%ids)
  %turned = bf16[1024,32,16,128]{3,2,1,0} transpose(%k), dimensions={0,2,1,3}
  %copy-start.2 = (bf16[1024,16,32,128]{3,2,1,0}, bf16[1024,16,32,128]{3,2,1,0}, u32[]) copy-start(%v)
  %copy-done.2 = bf16[1024,16,32,128]{3,2,1,0} copy-done(%copy-start.2)
  %custom-call.5 = bf16[64,32,128]{2,1,0} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton", \
operand_layout_constraints={}, backend_config={grid_x = 64 : i32, name = "decode_attention", num_stages = 2 : i32}
  %all-reduce-start.1 = bf16[64,4096]{1,0} all-reduce-start(%x), to_apply=%add
  %all-reduce-done.1 = bf16[64,4096]{1,0} all-reduce-done(%all-reduce-start.1)
  %all-reduce.7 = bf16[64,4096]{1,0} all-reduce(%y), to_apply=%add
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"32"}}
  %while.2 = (s32[], f32[8]{0}) while(%u), condition=%c, body=%b
  %conditional.1 = (f32[64]{0}) conditional(%flag, %f, %g), true_computation=%yes, false_computation=%no
  %all-gather.1 = f32[64,32000]{1,0} all-gather(%z), dimensions={1}
}
"""
POOL_BYTES = 2 * 1024 * 16 * 32 * 128


def test_registers_and_spills_are_those_of_each_kernel() -> None:
    assert assembled_kernels(PTXAS) == {"decode_attention": (96, 0), "gemm_fusion_dot_2": (255, 76)}


def test_launches_are_counted_by_kernel_and_ours_are_told_from_xlas() -> None:
    assert pallas_names(HLO) == {"decode_attention"}
    gemm, ours = sorted(
        launched_kernels(LAUNCHES, assembled_kernels(PTXAS), pallas_names(HLO)), key=lambda kernel: kernel.ours
    )
    assert ours == KernelFacts("decode_attention", (64, 32, 1), 128, 21504, 2, True, 96, 0)
    assert (gemm.name, gemm.launches, gemm.ours, gemm.spill_bytes) == ("gemm_fusion_dot_2", 1, False, 76)


def test_a_kernel_without_a_report_is_an_error_rather_than_free_of_spills() -> None:
    with pytest.raises(KeyError, match="decode_attention"):
        launched_kernels(LAUNCHES, {"gemm_fusion_dot_2": (1, 0)}, set())


def test_copies_of_a_page_array_are_found_wherever_they_hide() -> None:
    """In a fusion, turned around, or asynchronous; what is smaller does not count."""
    assert large_copies(HLO, POOL_BYTES) == 3
    assert large_copies(HLO, POOL_BYTES + 1) == 0
    assert large_copies(HLO, 1) == 4


def test_control_flow_that_the_host_follows_is_counted() -> None:
    """A loop with a known number of turns is launched without a look at the device."""
    assert host_waits(HLO) == 2


def test_an_asynchronous_collective_counts_once() -> None:
    assert collectives(HLO) == {"all-reduce": 2, "all-gather": 1}
