"""Copies whole blocks, all layers of them, between the paged KV cache and one contiguous buffer, for the tiers.

A block outside the device is one contiguous [layers, 2, block_size, kv_heads, head_dim]: many small copies become a
single large one. What a page is made of does not matter here: quantised pages and their scales are copied alike.

On GPUs XLA copies too slowly: it gathers in one kernel of single elements, each finding its page through a chain of
2 * layers branches, and scatters in 2 * layers kernels. The Pallas kernels here, through Triton, take the pages of all
layers at once; a program copies the same stretch of one block in every layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Float32, Int32, Shaped

from jserve.pallas_kernels import native
from jserve.pallas_kernels.backends import Backend
from jserve.pallas_kernels.dispatch import by_platform

Pages = Sequence[Shaped[Array, "blocks ..."]]
"""K or V of the whole cache: one [blocks, block_size, kv_heads, head_dim] a layer (or one array of its scales)."""

_TILE_BYTES = (8192, 4096, 2048)
"""The stretch of a page that a program copies at once, 64 to 16 bytes a thread: the largest of enough programs."""
_PROGRAMS = 512
"""Enough to keep the memory of an A100 or an H200 busy."""
_AHEAD_BYTES = 32768
"""What a program loads before it stores the first of it, so that latencies overlap: 256 bytes a thread at most."""
_WARPS = 4


def gather_blocks(k: Pages, v: Pages, ids: Int32[Array, "n"], *, backend: Backend) -> Shaped[Array, "n layers 2 ..."]:
    """The blocks `ids` of every layer in one buffer. An id outside the pool, as padding has, gives any block.

    Works under jit, where the XLA backend follows the sharding of the pages, and with local shapes inside shard_map
    over kv heads. Raises ValueError if pages differ in shape or dtype.
    """
    _check_pages(k, v)
    shape = (ids.shape[0], len(k), 2, *k[0].shape[1:])
    if backend == "pallas":
        _check_addressable(k[0].shape, shape, itemsize=k[0].dtype.itemsize)
        gathered: Array = by_platform(_pallas_gather, list(k), list(v), ids)
        return gathered
    if backend == "native":
        return native.gather(k, v, ids)
    # clip, for jnp's own default fills with NaN, which is a pass over the result.
    pairs = ([x.at[ids].get(mode="clip") for x in pair] for pair in zip(k, v, strict=True))
    return jnp.stack([jnp.stack(pair, axis=1) for pair in pairs], axis=1)


def scatter_blocks(
    k: Pages, v: Pages, ids: Int32[Array, "n"], buffer: Shaped[Array, "n layers 2 ..."], *, backend: Backend
) -> tuple[list[Array], list[Array]]:
    """The cache with block `ids[i]` of every layer taken from `buffer[i]`; in place when the cache is donated.

    An id outside the pool, as padding has, is dropped; those inside it are distinct. Works where `gather_blocks` does.
    Raises ValueError if the buffer does not fit the pages.
    """
    _check_pages(k, v)
    expected = (ids.shape[0], len(k), 2, *k[0].shape[1:])
    if buffer.shape != expected or buffer.dtype != k[0].dtype:
        raise ValueError(f"the buffer is {buffer.shape} {buffer.dtype}, and the pages need {expected} {k[0].dtype}")
    if backend == "pallas":
        _check_addressable(k[0].shape, expected, itemsize=buffer.dtype.itemsize)
        written: tuple[list[Array], list[Array]] = by_platform(_pallas_scatter, list(k), list(v), ids, buffer)
        return written
    if backend == "native":
        return native.scatter(k, v, ids, buffer)
    ids = jnp.where(ids < 0, k[0].shape[0], ids)  # a negative index would count from the end
    return (
        [x.at[ids].set(buffer[:, i, 0], mode="drop") for i, x in enumerate(k)],
        [x.at[ids].set(buffer[:, i, 1], mode="drop") for i, x in enumerate(v)],
    )


def copy_blocks_out(k: Pages, v: Pages, places: Int32[Array, "n 3"]) -> Float32[Array, ""]:
    """Copy blocks of every layer straight into host memory, on CPU; the seconds that it took.

    `places`: rows of a block's id and the two halves (low, high) of the address of its contiguous
    [layers, 2, block_size, kv_heads, head_dim]; the first row whose id is outside the pool ends them. XLA does not know
    of that memory: it must stay, and be nobody else's, until the result is there.
    """
    _check_pages(k, v)
    return native.copy_out(k, v, places)


def copy_blocks_in(
    k: Pages, v: Pages, places: Int32[Array, "n 3"]
) -> tuple[Float32[Array, ""], list[Array], list[Array]]:
    """The way back: the seconds that it took, and the cache with these blocks; in place, so it must be donated."""
    _check_pages(k, v)
    return native.copy_in(k, v, places)


def _check_pages(k: Pages, v: Pages) -> None:
    kinds = {f"{x.shape} {x.dtype}" for x in (*k, *v)}
    if len(kinds) != 1 or len(k) != len(v):
        raise ValueError(f"{len(k)} layers of keys and {len(v)} of values, of {sorted(kinds)}: they must be alike")


def _check_addressable(*shapes: tuple[int, ...], itemsize: int) -> None:
    """Pallas counts in 64 bits in arrays of more than 2**32 bytes, else in signed 32: enough but for single bytes."""
    for shape in shapes:
        if 2**31 <= math.prod(shape) <= 2**32 // itemsize:
            raise ValueError(
                f"an array of {shape} has more bytes than the pallas backend addresses one by one: copy fewer blocks "
                "at a time, or use a smaller pool"
            )


# --- Pallas through Triton ----------------------------------------------------------------------------------------


def _pallas_gather(k: list[Array], v: list[Array], ids: Array, *, interpret: bool) -> Array:
    pages = _flat_pages(k, v)
    words = pages[0].shape[1]
    buffer: Array = _copy_call(
        _gather_kernel,
        pages,
        ids,
        out_shape=jax.ShapeDtypeStruct((ids.shape[0], len(pages), words), pages[0].dtype),
        in_specs=[pl.no_block_spec] * (1 + len(pages)),
        out_specs=pl.no_block_spec,
        interpret=interpret,
        name="gather_blocks",
    )(ids, *pages)
    return buffer.reshape(ids.shape[0], len(k), 2, *k[0].shape[1:])


def _pallas_scatter(
    k: list[Array], v: list[Array], ids: Array, buffer: Array, *, interpret: bool
) -> tuple[list[Array], list[Array]]:
    pages = _flat_pages(k, v)
    specs = [pl.no_block_spec] * len(pages)
    written = _copy_call(
        _scatter_kernel,
        pages,
        ids,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pages],
        in_specs=[pl.no_block_spec] * 2 + specs,
        out_specs=specs,
        input_output_aliases={2 + i: i for i in range(len(pages))},
        interpret=interpret,
        name="scatter_blocks",
    )(ids, buffer.reshape(ids.shape[0], len(pages), -1), *pages)
    shaped = [x.reshape(k[0].shape) for x in written]
    return shaped[0::2], shaped[1::2]


def _flat_pages(k: list[Array], v: list[Array]) -> list[Array]:
    """[blocks, words] of each: the keys of layer 0, its values, the keys of layer 1, ..."""
    return [x.reshape(x.shape[0], -1) for pair in zip(k, v, strict=True) for x in pair]


def _copy_call(kernel: Callable[..., None], pages: list[Array], ids: Array, **options: Any) -> Callable[..., Any]:
    """A grid of one program for each stretch of each block."""
    count, words, itemsize = ids.shape[0], pages[0].shape[1], pages[0].dtype.itemsize
    enough = (size for size in _TILE_BYTES if count * pl.cdiv(words * itemsize, size) >= _PROGRAMS)
    tile = min(pl.next_power_of_2(words), next(enough, _TILE_BYTES[-1]) // itemsize)
    call: Callable[..., Any] = pl.pallas_call(
        functools.partial(kernel, tile=tile, ahead=max(1, _AHEAD_BYTES // (max(tile, 128) * itemsize))),
        grid=(count, pl.cdiv(words, tile)),
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=1),
        **options,
    )
    return call


def _gather_kernel(ids_ref: Any, *refs: Any, tile: int, ahead: int) -> None:
    *pages, buffer = refs
    i, at = pl.program_id(0), pl.program_id(1) * tile + jnp.arange(tile)
    held = at < pages[0].shape[1]
    block = jnp.clip(ids_ref[i], 0, pages[0].shape[0] - 1)
    for first in range(0, len(pages), ahead):
        tiles = [plt.load(page.at[block, at], mask=held) for page in pages[first : first + ahead]]
        for part, value in enumerate(tiles, start=first):
            plt.store(buffer.at[i, part, at], value, mask=held)


def _scatter_kernel(ids_ref: Any, buffer: Any, *refs: Any, tile: int, ahead: int) -> None:
    pages = refs[len(refs) // 2 :]  # the first half are the same pages as inputs
    i, at = pl.program_id(0), pl.program_id(1) * tile + jnp.arange(tile)
    block = ids_ref[i]
    inside = (block >= 0) & (block < pages[0].shape[0])
    held = (at < pages[0].shape[1]) & inside
    block = jnp.where(inside, block, 0)
    for first in range(0, len(pages), ahead):
        parts = range(first, min(first + ahead, len(pages)))
        tiles = [plt.load(buffer.at[i, part, at], mask=held) for part in parts]
        for part, value in zip(parts, tiles, strict=True):
            plt.store(pages[part].at[block, at], value, mask=held)
