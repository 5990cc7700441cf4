"""Tile sizes of the attention kernels: a small table for each family of GPUs.

An entry that nobody has measured is chosen from what the compiler says: no spilled registers in a loop, two or more
decode programs on a multiprocessor. `python -m bench.tune --write` replaces entries by the fastest on the GPU at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jserve.pallas_kernels.quantization import is_quantized

Family = Literal["ampere", "hopper"]
Kernel = Literal["prefill", "decode"]
Kind = Literal["float32", "16-bit", "8-bit"]
"""Of the numbers: float32 throughout, 16 bits throughout, or 16 bits with codes of 8 bits in the cache."""


class Key(NamedTuple):
    family: Family
    kernel: Kernel
    head_dim: int
    """The largest that the entry is for: 64, 128 or 256."""
    kind: Kind


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time, and how Triton compiles it."""

    rows: int
    """(query, head of the group) pairs: a power of two, at least 16, the shortest side of a Triton matrix product."""
    kv_tokens: int
    """Tokens of the context in a step: a power of two, at least 16."""
    num_warps: int
    num_stages: int
    """Steps in flight: while one is computed, the next ones are on their way to shared memory."""


def choose_tile(kernel: Kernel, head_dim: int, dtype: DTypeLike, kv_dtype: DTypeLike, *, interpret: bool) -> Tile:
    """The sizes for queries of `dtype` on the GPU that is being compiled for, or small ones for the interpreter."""
    if interpret:
        return _INTERPRETED[kernel]
    kind: Kind = "8-bit" if is_quantized(kv_dtype) else "16-bit"
    if jnp.dtype(dtype) == jnp.float32:
        kind = "float32"
    return TABLE[Key(family(), kernel, max(64, 1 << (head_dim - 1).bit_length()), kind)]


def multiprocessors(*, interpret: bool) -> int:
    """Of the largest GPU of the family, an A100 or an H200; one for the interpreter."""
    return 1 if interpret else {"ampere": 108, "hopper": 132}[family()]


def family() -> Family:
    """Of the mesh's devices, or else of this machine's; "ampere" for what is not known, for its sizes run anywhere."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.device_kind if device is not None else jax.devices()[0].device_kind
    return "hopper" if any(known in name for known in ("H100", "H200", "GH200", "H800", "H20")) else "ampere"


_INTERPRETED: dict[Kernel, Tile] = {"decode": Tile(16, 16, 4, 2), "prefill": Tile(32, 16, 4, 2)}

TABLE: dict[Key, Tile] = {
    Key("ampere", "decode", 64, "16-bit"): Tile(16, 64, 4, 4),
    Key("ampere", "decode", 64, "8-bit"): Tile(16, 64, 4, 4),
    Key("ampere", "decode", 64, "float32"): Tile(16, 16, 8, 3),
    Key("ampere", "decode", 128, "16-bit"): Tile(16, 64, 4, 3),
    Key("ampere", "decode", 128, "8-bit"): Tile(16, 64, 4, 4),
    Key("ampere", "decode", 128, "float32"): Tile(16, 16, 8, 3),
    Key("ampere", "decode", 256, "16-bit"): Tile(16, 32, 4, 3),
    Key("ampere", "decode", 256, "8-bit"): Tile(16, 32, 4, 4),
    Key("ampere", "decode", 256, "float32"): Tile(16, 16, 8, 3),
    Key("ampere", "prefill", 64, "16-bit"): Tile(64, 64, 4, 3),
    Key("ampere", "prefill", 64, "8-bit"): Tile(64, 64, 4, 3),
    Key("ampere", "prefill", 64, "float32"): Tile(32, 32, 4, 2),
    Key("ampere", "prefill", 128, "16-bit"): Tile(128, 64, 8, 3),
    Key("ampere", "prefill", 128, "8-bit"): Tile(128, 64, 8, 3),
    Key("ampere", "prefill", 128, "float32"): Tile(16, 32, 8, 2),
    Key("ampere", "prefill", 256, "16-bit"): Tile(64, 32, 8, 2),
    Key("ampere", "prefill", 256, "8-bit"): Tile(64, 32, 8, 2),
    Key("ampere", "prefill", 256, "float32"): Tile(16, 16, 8, 2),
    Key("hopper", "decode", 64, "16-bit"): Tile(16, 64, 4, 4),
    Key("hopper", "decode", 64, "8-bit"): Tile(16, 64, 4, 4),
    Key("hopper", "decode", 64, "float32"): Tile(16, 16, 8, 3),
    Key("hopper", "decode", 128, "16-bit"): Tile(16, 64, 4, 3),
    Key("hopper", "decode", 128, "8-bit"): Tile(16, 64, 4, 4),
    Key("hopper", "decode", 128, "float32"): Tile(16, 16, 8, 3),
    Key("hopper", "decode", 256, "16-bit"): Tile(16, 32, 4, 3),
    Key("hopper", "decode", 256, "8-bit"): Tile(16, 32, 4, 4),
    Key("hopper", "decode", 256, "float32"): Tile(16, 16, 8, 3),
    Key("hopper", "prefill", 64, "16-bit"): Tile(128, 128, 8, 3),
    Key("hopper", "prefill", 64, "8-bit"): Tile(128, 64, 8, 3),
    Key("hopper", "prefill", 64, "float32"): Tile(32, 32, 4, 2),
    Key("hopper", "prefill", 128, "16-bit"): Tile(128, 128, 8, 2),
    Key("hopper", "prefill", 128, "8-bit"): Tile(128, 64, 8, 3),
    Key("hopper", "prefill", 128, "float32"): Tile(16, 32, 8, 2),
    Key("hopper", "prefill", 256, "16-bit"): Tile(128, 64, 8, 2),
    Key("hopper", "prefill", 256, "8-bit"): Tile(64, 32, 4, 2),
    Key("hopper", "prefill", 256, "float32"): Tile(16, 16, 8, 2),
}
