"""The inner loop of the Triton attention kernels: a tile of queries walks a stretch of its row's context.

Softmax is online (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691): float32, in powers of
two. A head is taken in pieces of a power of two (80 is 64 + 16), because Triton's arrays are that long, so that no
bandwidth or matrix unit works on padding.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas import triton as plt

from jserve.pallas_kernels.quantization import code_factor, decode, is_quantized

MIN_DOT = 16
"""Triton's matrix products are at least this long on each side."""


@dataclass(frozen=True)
class Scoring:
    """How a query and a key make a score, and which keys a query sees besides being at or after them."""

    scale: float
    window: int | None = None
    """The query itself and the `window - 1` tokens before it are seen; None is all."""
    soft_cap: float | None = None
    """Scores s become soft_cap * tanh(s / soft_cap)."""


class Piece(NamedTuple):
    start: int
    size: int
    live: int
    """Less than `size` where the piece reaches past the head's end."""

    def dims(self) -> Array:
        return self.start + jnp.arange(self.size)

    def mask(self) -> Array | None:
        return None if self.live == self.size else (jnp.arange(self.size) < self.live)[None, :]


def pieces_of(dim: int, shortest: int = MIN_DOT) -> list[Piece]:
    pieces, start = [], 0
    while start < dim:
        size = max(shortest, 1 << ((dim - start).bit_length() - 1))
        pieces.append(Piece(start, size, min(size, dim - start)))
        start += size
    return pieces


class Pages(NamedTuple):
    """References to a row's KV: pages of one kv head, and their scales when they are codes."""

    table: Any
    k: Any
    v: Any
    k_scale: Any | None
    v_scale: Any | None
    row: Array
    head: Array
    kv_tokens: int
    """Of a step."""
    interpret: bool

    def one_block(self) -> bool:
        """Whether the tokens of every step lie in one block, so that its id is one number that all threads share."""
        return bool(self.k.shape[1] % self.kv_tokens == 0)

    def blocks(self, base: Array, end: Array) -> Array:
        """The block, or each token's block, of positions from `base` on; past `end`, that of the last before it."""
        at = base if self.one_block() else base + jnp.arange(self.kv_tokens)
        column = jax.lax.div(jnp.maximum(jnp.minimum(at, end - 1), 0), self.k.shape[1])
        found: Array = plt.load(self.table.at[self.row, column])
        return found


class Queries(NamedTuple):
    """The tile: its rows are (query, head of the group) pairs."""

    pieces: list[Piece]
    values: list[Array]
    """Of each piece."""
    position: Array
    """Of each row."""
    first: Array
    """Position of the first query."""
    last: Array
    """Position of the last one."""


Carry = tuple["State", Array]
"""And the blocks of the next step."""


class State(NamedTuple):
    out: tuple[Array, ...]
    top: Array
    """Largest score so far, times log2(e)."""
    total: Array


def both(a: Array | None, b: Array | None) -> Array | None:
    return b if a is None else a if b is None else a & b


def load(ref: Any, mask: Array | None) -> Array:
    """What a mask leaves out is zero; of codes, any: they are numbers all, and times a weight of zero are zero."""
    if mask is None:
        loaded: Array = plt.load(ref)
    elif is_quantized(ref.dtype):
        loaded = plt.load(ref, mask=mask)
    else:
        loaded = plt.load(ref, mask=mask, other=0)
    return loaded


def load_queries(
    q_ref: Any, pieces: list[Piece], rows: int, token: Array, count: Array, position: Array, head: Array, group: int
) -> tuple[Queries, Array]:
    """The tile of `count` queries from `token` on, `position` of its row, and the numbers of its `rows` pairs.

    Pairs past the last query's are zeros, which harm nothing and are not to be stored.
    """
    m = jnp.arange(rows)
    live = (m < count * group)[:, None]
    query, member = jax.lax.div(m, group), jax.lax.rem(m, group)
    values = [
        load(
            q_ref.at[(token + query)[:, None], (head * group + member)[:, None], p.dims()[None, :]],
            both(live, p.mask()),
        )
        for p in pieces
    ]
    return Queries(pieces, values, position + query, position, position + count - 1), m


def store_pieces(
    ref: Any, place: tuple[Array, ...], values: tuple[Array, ...], pieces: list[Piece], live: Array
) -> None:
    """Stores row m of each value where the last of `place` says."""
    spread = tuple(x[:, None] if x.shape else x for x in place)
    for value, piece in zip(values, pieces, strict=True):
        mask = both(live[:, None], piece.mask())
        plt.store(ref.at[(*spread, piece.dims()[None, :])], value.astype(ref.dtype), mask=mask)


def walk(queries: Queries, pages: Pages, begin: Array, end: Array, scoring: Scoring, *, check_all: bool) -> State:
    """Attend to positions `begin` to `end`, as far as each query sees them. `begin` is a multiple of `kv_tokens`.

    Every step checks what each query sees if `check_all`, in one loop that never drains: best where memory is the
    limit. Else only the first and last steps do, in loops of their own: best where arithmetic is.
    """
    rows, kv_tokens = queries.position.shape[0], pages.kv_tokens
    state = State(
        tuple(jnp.zeros((rows, q.shape[1]), jnp.float32) for q in queries.values),
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )

    def run(carry: Carry, lower: Array, upper: Array, *, check: bool) -> Carry:
        def step(i: Array, carry: Carry) -> Carry:
            state, blocks = carry
            # Looked up a step ahead: as a load that others wait for in the same step, Triton would give this one half
            # of the pipeline's stages.
            ahead = pages.blocks((i + 1) * kv_tokens, end)
            stretch = _Stretch(pages, blocks, i * kv_tokens, bounds if check else None)
            return _step(state, stretch, queries, scoring), ahead

        result: Carry = jax.lax.fori_loop(lower, upper, step, carry)
        return result

    # What no query of the tile sees is not read: it may belong to others by now, and be NaN.
    bounds = (None if scoring.window is None else queries.first - (scoring.window - 1), end)
    lower, upper = jax.lax.div(begin, kv_tokens), jax.lax.div(end + (kv_tokens - 1), kv_tokens)
    carry = state, pages.blocks(begin, end)
    if check_all:
        return run(carry, lower, upper, check=True)[0]
    whole_from = lower
    if scoring.window is not None:
        all_see_from = jnp.maximum(queries.last - (scoring.window - 1), begin)
        whole_from = jnp.minimum(jax.lax.div(all_see_from + (kv_tokens - 1), kv_tokens), upper)
        carry = run(carry, lower, whole_from, check=True)
    all_see_to = jnp.minimum(jnp.maximum(queries.first + 1, 0), end)
    whole_to = jnp.maximum(jax.lax.div(all_see_to, kv_tokens), whole_from)
    return run(run(carry, whole_from, whole_to, check=False), whole_to, upper, check=True)[0]


def log_sum_exp(state: State) -> Array:
    """Natural; -inf for a query that saw nothing."""
    total = jnp.where(state.total > 0, state.total, 1.0)
    return jnp.where(state.total > 0, state.top * math.log(2) + jnp.log(total), -jnp.inf)


def normalized(state: State) -> tuple[Array, ...]:
    """The attention output, piece by piece; zeros for a query that saw nothing."""
    share = 1.0 / jnp.where(state.total > 0, state.total, 1.0)
    return tuple(out * share[:, None] for out in state.out)


class _Stretch:
    """A step's tokens of one kv head, from position `base` on, all of them unless there are `bounds`."""

    def __init__(self, pages: Pages, blocks: Array, base: Array, bounds: tuple[Array | None, Array] | None) -> None:
        self.pages, self.blocks = pages, blocks
        self.at = base + jnp.arange(pages.kv_tokens)
        self.held = None
        if bounds is not None:
            first, end = bounds
            self.held = both(None if first is None else self.at >= first, self.at < end)
        self.slot = jax.lax.rem(base if pages.one_block() else self.at, pages.k.shape[1])
        if pages.one_block():
            self.slot += jnp.arange(pages.kv_tokens)

    def page(self, ref: Any, piece: Piece, dtype: Any) -> Array:
        """[kv_tokens, piece.size], codes as what they are before scaling."""
        block = self.blocks[:, None] if self.blocks.shape else self.blocks
        held = None if self.held is None else self.held[:, None]
        where = (block, self.slot[:, None], self.pages.head, piece.dims()[None, :])
        page = load(ref.at[where], both(held, piece.mask()))
        return decode(page, dtype, triton=not self.pages.interpret) if is_quantized(page.dtype) else page

    def scaled(self, x: Array, ref: Any, constant: float) -> Array:
        """[rows, kv_tokens], times each token's scale and a constant."""
        scale = load(ref.at[self.blocks, self.pages.head], self.held if self.blocks.shape else None)
        scale = scale * np.float32(constant)
        return x * (scale[None, :] if scale.shape else scale)


def _step(state: State, stretch: _Stretch, queries: Queries, scoring: Scoring) -> State:
    pages, dtype = stretch.pages, queries.values[0].dtype
    scores, to_score = _scores(stretch, queries, scoring)
    if stretch.held is not None:
        seen = (stretch.at[None, :] <= queries.position[:, None]) & stretch.held[None, :]
        if scoring.window is not None:
            seen &= stretch.at[None, :] > queries.position[:, None] - scoring.window
        scores = jnp.where(seen, scores, -jnp.inf)
    # `to_score` is positive, so it can wait until after the maximum, and then is part of one multiply-add.
    to_log2 = np.float32(to_score * math.log2(math.e))
    top = jnp.maximum(state.top, scores.max(axis=1) * to_log2)
    # A query that has seen nothing yet keeps top = -inf, and -inf - -inf is NaN.
    base = top if stretch.held is None else jnp.where(top == -jnp.inf, 0.0, top)
    weights = _exp2(scores, to_log2, base, pages.interpret)
    shrink = jnp.exp2(state.top - base)
    total = state.total * shrink + weights.sum(axis=1)
    value_dtype = dtype
    if pages.v_scale is not None:
        # Weights times scales may leave float16's range, never bfloat16's; codes of 8 bits fit both.
        value_dtype = dtype if dtype == jnp.float32 else jnp.dtype(jnp.bfloat16)
        weights = stretch.scaled(weights, pages.v_scale, code_factor(pages.v.dtype))
    weights = weights.astype(value_dtype)
    out = tuple(
        out * shrink[:, None]
        + plt.dot(weights, stretch.page(pages.v, piece, value_dtype), precision=_precision(value_dtype))
        for out, piece in zip(state.out, queries.pieces, strict=True)
    )
    return State(out, top, total)


def _exp2(x: Array, factor: np.float32, less: Array, interpret: bool) -> Array:
    """2 ** (x * factor - less), `less` for each row.

    Triton, as XLA calls it, neither contracts multiply-adds nor flushes denormals, and the library's power of two
    spends four more instructions on these: a sixth of all that the prefill loop issues.
    """
    if interpret:
        return jnp.exp2(x * factor - less[:, None])
    constant = f"0f{int(factor.view(np.uint32)):08X}"
    [result] = plt.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.f32 t, $1, {constant}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[x, jnp.broadcast_to(-less[:, None], x.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    exponential: Array = result
    return exponential


def _scores(stretch: _Stretch, queries: Queries, scoring: Scoring) -> tuple[Array, float]:
    """[rows, kv_tokens], and what makes scores of them when multiplied."""
    pages = stretch.pages
    products = (
        plt.dot(q, stretch.page(pages.k, piece, q.dtype), trans_b=True, precision=_precision(q.dtype))
        for q, piece in zip(queries.values, queries.pieces, strict=True)
    )
    scores = functools.reduce(operator.add, products)
    if pages.k_scale is not None:
        scores = stretch.scaled(scores, pages.k_scale, code_factor(pages.k.dtype))
    if scoring.soft_cap is None:
        return scores, scoring.scale
    # tanh(x) = 1 - 2 / (1 + e**2x); the library's has branches.
    power = jnp.exp2(scores * np.float32(2 * math.log2(math.e) * scoring.scale / scoring.soft_cap))
    return 1.0 - 2.0 / (1.0 + power), scoring.soft_cap


def _precision(dtype: Any) -> jax.lax.Precision | None:
    """Float32 products are exact ones, never TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
