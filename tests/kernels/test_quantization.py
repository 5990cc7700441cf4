"""Quantised KV: codes and scales are what the definition says, to the bit, in JAX and in the PTX of the kernels."""

from __future__ import annotations

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jserve.pallas_kernels.quantization import (
    E4M3_TO_BFLOAT16,
    INT8_TO_BFLOAT16,
    code_factor,
    decode,
    encode,
    scale_for,
)

CODES = (jnp.int8, jnp.float8_e4m3fn)
LARGEST = {jnp.int8: 127.0, jnp.float8_e4m3fn: 448.0}
ALL_BYTES = np.arange(256, dtype=np.uint8)


def as_numbers(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.float64)


@pytest.mark.parametrize("dtype", CODES)
def test_a_scale_is_the_smallest_power_of_two_that_fits(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    edges = LARGEST[dtype] * 2.0 ** np.arange(-20, 20)
    largest = np.concatenate([edges, np.nextafter(np.float32(edges), np.float32(np.inf)), rng.lognormal(0, 5, 200)])
    largest = largest.astype(np.float32)
    scale = np.asarray(scale_for(jnp.asarray(largest), dtype), np.float64)
    assert (np.log2(scale) % 1 == 0).all()
    assert (largest <= scale * LARGEST[dtype]).all()
    assert (largest > scale / 2 * LARGEST[dtype]).all()
    assert float(scale_for(jnp.float32(0), dtype)) == 2.0**-100


@pytest.mark.parametrize("dtype", CODES)
def test_encode_rounds_half_to_even_and_saturates(dtype: jnp.dtype) -> None:
    rng = np.random.default_rng(0)
    finite = as_numbers(ALL_BYTES.view(dtype))
    finite = np.unique(finite[np.isfinite(finite)])
    halves = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate([finite, halves, rng.normal(scale=100, size=1000), rng.normal(scale=0.01, size=1000)])
    x = np.clip(x, -LARGEST[dtype], LARGEST[dtype]).astype(np.float32)
    expected = np.rint(x).astype(np.int8) if dtype == jnp.int8 else x.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(as_numbers(np.asarray(encode(jnp.asarray(x), dtype))), as_numbers(expected))
    beyond = as_numbers(np.asarray(encode(jnp.array([1e30, -500.0, jnp.inf]), dtype)))
    np.testing.assert_array_equal(beyond, np.array([1, -1, 1]) * LARGEST[dtype])


@pytest.mark.parametrize("number", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dtype", CODES)
def test_decode_is_exact_and_makes_a_number_of_every_code(dtype: jnp.dtype, number: jnp.dtype) -> None:
    codes = ALL_BYTES.view(dtype)
    decoded = decode(jnp.asarray(codes), number)
    assert decoded.dtype == number
    values = np.asarray(decoded.astype(jnp.float32), np.float64) * code_factor(dtype)
    meant = ~np.isnan(as_numbers(codes))
    np.testing.assert_array_equal(values[meant], as_numbers(codes)[meant])
    assert np.isfinite(values).all()


@pytest.mark.parametrize(("dtype", "ptx"), [(jnp.int8, INT8_TO_BFLOAT16), (jnp.float8_e4m3fn, E4M3_TO_BFLOAT16)])
def test_the_ptx_that_decodes_four_codes_at_a_time_does_the_same(dtype: jnp.dtype, ptx: str) -> None:
    codes = np.concatenate([ALL_BYTES, np.random.default_rng(0).permutation(ALL_BYTES)])
    expected = np.asarray(decode(jnp.asarray(codes.view(dtype)), jnp.bfloat16)).view(np.uint16)
    got = [half for four in codes.view("<u4") for half in run_ptx(ptx, int(four))]
    np.testing.assert_array_equal(np.array(got, np.uint16), expected)


def run_ptx(ptx: str, operand: int) -> tuple[int, ...]:
    """The four 16-bit results of a straight line of the six instructions that these need, by the PTX manual."""
    registers = {"$2": operand}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in ptx.strip("{} ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, target, *operands = re.split(r"[,\s]+", line.strip())
        a, b, c = (*map(value, operands), 0, 0)[:3]
        match name:
            case "mov.b32":
                result = a
            case "and.b32":
                result = a & b
            case "or.b32":
                result = a | b
            case "shr.b32":
                result = a >> b
            case "prmt.b32":
                source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
                result = int.from_bytes(bytes(source[c >> 4 * i & 7] for i in range(4)), "little")
            case "fma.rn.bf16x2":
                x, y, z = (np.array([v], "<u4").view(ml_dtypes.bfloat16).astype(np.float64) for v in (a, b, c))
                result = int((x * y + z).astype(ml_dtypes.bfloat16).view("<u4")[0])
            case _:
                raise AssertionError(f"unknown instruction {name}")
        registers[target] = result
    return tuple(registers[out] >> shift & 0xFFFF for out in ("$0", "$1") for shift in (0, 16))
