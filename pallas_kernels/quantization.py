"""What a quantised KV cache holds, to the bit: codes of 8 bits, and a float32 scale for each block and kv head.

A value is code * scale. Codes are int8 in [-127, 127] or float8_e4m3fn in [-448, 448], rounded half to even. A scale is
the smallest power of two with which the largest magnitude written to that block and head since its first slot was
written still fits. So a block may fill token by token: its scale only grows, by whole powers of two, and when it does,
the codes that the block already holds are divided by that power and rounded again. For int8 all these roundings
together stay below one step of the final scale; for e4m3 they are exact, but for numbers below 2**-6 of the scale.

Scaling by a power of two is exact in float32, so every backend gives the same codes. All of it works in a Triton kernel
of any GPU, as integer operations: sm_80 has no instruction that converts e4m3, and Triton makes none up there.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Shaped

QuantizedDType = Literal["int8", "float8_e4m3fn"]
QUANTIZED_DTYPES: tuple[QuantizedDType, ...] = ("int8", "float8_e4m3fn")

_MIN_EXPONENT = -100
"""Scales are at least 2**-100, so that both they and their inverses are normal numbers."""
# The largest code of each type as 1.mantissa * 2**exponent: 127 is 1.984375 * 2**6, 448 is 1.75 * 2**8.
_MAX_CODE = {"int8": (127.0, 0x7E0000, 6), "float8_e4m3fn": (448.0, 0x600000, 8)}


def is_quantized(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype).name in QUANTIZED_DTYPES


def scale_for(largest: Float32[Array, "..."], dtype: DTypeLike) -> Float32[Array, "..."]:
    """The smallest power of two s, at least 2**-100, with `largest` <= s * (the largest code)."""
    _, mantissa, exponent = _MAX_CODE[jnp.dtype(dtype).name]
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    # The exponent field, one more if the mantissa is above that of the largest code.
    biased = jax.lax.shift_right_logical(bits + np.int32(0x7FFFFF - mantissa), np.int32(23)) - np.int32(exponent)
    biased = jnp.maximum(biased, np.int32(127 + _MIN_EXPONENT))
    return jax.lax.bitcast_convert_type(jax.lax.shift_left(biased, np.int32(23)), jnp.float32)


def encode(x: Float32[Array, "..."], dtype: DTypeLike) -> Shaped[Array, "..."]:
    """Values, already divided by their scale, as codes; what is too large becomes the largest code."""
    largest, _, _ = _MAX_CODE[jnp.dtype(dtype).name]
    x = jnp.minimum(jnp.maximum(x, np.float32(-largest)), np.float32(largest))
    if jnp.dtype(dtype) == jnp.int8:
        return _round(x).astype(jnp.int8)
    size = jnp.abs(x)
    bits = jax.lax.bitcast_convert_type(size, jnp.int32)
    # Half to even at e4m3's 3 bits of mantissa; its exponent's bias is 120 less than float32's.
    odd = jax.lax.shift_right_logical(bits, np.int32(20)) & np.int32(1)
    normal = jax.lax.shift_right_logical(bits + np.int32(0x7FFFF) + odd, np.int32(20)) - np.int32(120 << 3)
    subnormal = _round(size * np.float32(2.0**9)).astype(jnp.int32)
    code = jnp.where(size < np.float32(2.0**-6), subnormal, normal)
    code |= jax.lax.shift_right_logical(jax.lax.bitcast_convert_type(x, jnp.int32), np.int32(24)) & np.int32(0x80)
    return jax.lax.bitcast_convert_type(code.astype(jnp.int8), jnp.float8_e4m3fn)


def decode(codes: Shaped[Array, "..."], dtype: DTypeLike, *, triton: bool = False) -> Float[Array, "..."]:
    """The codes, divided by `code_factor`, as numbers of `dtype`: exact in any float of 16 bits or more.

    With `triton`, inside a compiled kernel, bfloat16 is made four codes at a time: one by one, with instructions that
    run at an eighth of the others' rate, takes as long as the codes take to arrive.
    """
    is_int8 = codes.dtype == jnp.int8
    bits = codes if is_int8 else jax.lax.bitcast_convert_type(codes, jnp.int8)
    if triton and dtype == jnp.bfloat16:
        [four] = plt.elementwise_inline_asm(
            INT8_TO_BFLOAT16 if is_int8 else E4M3_TO_BFLOAT16,
            args=[bits],
            constraints="=r,=r,r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(bits.shape, jnp.bfloat16)],
        )
        decoded: Array = four
        return decoded
    if is_int8:
        return codes.astype(dtype)
    bits = bits.astype(jnp.int16)
    # Sign extension has put the sign bit where float16 has it; the 7 others move up by 7, exponent and mantissa alike.
    half = (bits & np.int16(-0x8000)) | jax.lax.shift_left(bits & np.int16(0x7F), np.int16(7))
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(dtype)


def _pairwise(setup: str, low: str, high: str, convert: str) -> str:
    """PTX that spreads the bytes of $2 over two registers of pairs, and converts each to $0 and $1."""
    steps = (
        f"prmt.b32 x, $2, 0, {spread}; {convert.replace('OUT', out)} " for spread, out in ((low, "$0"), (high, "$1"))
    )
    return f"{{ .reg .b32 x, y, c, d; {setup} {''.join(steps)}}}"


# Of an int8, bfloat16 128 takes the 7 lower bits as its mantissa; from 128 + these, 128 is subtracted, or 256 for a
# negative one: 128 with the sign bit at the end of its exponent.
INT8_TO_BFLOAT16 = _pairwise(
    "mov.b32 c, 0xbf80bf80;",
    "0x4140",
    "0x4342",
    "and.b32 y, x, 0x00800080; or.b32 y, y, 0x43004300; and.b32 x, x, 0x007f007f; or.b32 x, x, 0x43004300; "
    "fma.rn.bf16x2 OUT, y, c, x;",
)
# An e4m3 becomes the upper byte, all of it but the sign moves down by 4, and a multiplication by 2**112 makes up for
# the difference of the exponents' biases, but for `code_factor`.
E4M3_TO_BFLOAT16 = _pairwise(
    "mov.b32 c, 0x77807780; mov.b32 d, 0x80008000;",
    "0x1404",
    "0x3424",
    "and.b32 y, x, 0x80008000; and.b32 x, x, 0x7f007f00; shr.b32 x, x, 4; or.b32 x, x, y; fma.rn.bf16x2 OUT, x, c, d;",
)


def code_factor(dtype: DTypeLike) -> float:
    """What `decode` leaves to be multiplied by: for e4m3, whose exponent's bias is 8 less than float16's, 2**8."""
    return 1.0 if jnp.dtype(dtype) == jnp.int8 else 2.0**8


def _round(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Half to even, for magnitudes up to 2**22; Triton's lowering has no rounding of its own.

    Adding 1.5 * 2**23 leaves no bits for a fraction. The barrier of the two bit casts keeps the compiler from
    cancelling the sum.
    """
    shifted = jax.lax.bitcast_convert_type(x + np.float32(12582912.0), jnp.int32)
    return (shifted - np.int32(0x4B400000)).astype(jnp.float32)
