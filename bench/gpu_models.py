"""The runner's own programs for a model's shape, ready to be compiled for GPUs that are not here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from bench.gpu_compile import Candidate
from bench.gpu_targets import GpuTarget
from bench.shapes import SHAPES
from jserve.batch import Limits
from jserve.errors import ConfigError
from jserve.models.placement import build, param_shardings, parameters
from jserve.models.registry import parse_config
from jserve.models.spec import ModelSpec
from jserve.programs import Programs

BLOCK_SIZE = 16
DECODES, PREFILL_TOKENS = 64, 2048
STEPS = ("decode", "prefill", "sample")
SPARE_BYTES = 2 << 30
"""Beside weights and pool: temporaries, the sampler's state, CUDA's own."""
MEMORY_FRACTION = 0.9
DTYPE = jnp.dtype(jnp.bfloat16)


def step_candidates(shape: str, tp: int, target: GpuTarget, steps: Sequence[str] = STEPS) -> list[Candidate]:
    """A decode step, a prefill step, the sampler, with as large a KV pool as the runner would take.

    Raises ConfigError if the weights alone are too much.
    """
    mesh = target.mesh(tp)
    spec = parse_config(SHAPES[shape], shape)
    model = build(spec, DTYPE)
    shardings = param_shardings(model, mesh)
    weight_bytes = 0
    for path, param in parameters(model).items():
        placed = jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=shardings[path])
        weight_bytes += math.prod(shardings[path].shard_shape(param.shape)) * param.dtype.itemsize
        param.set_value(placed)  # type: ignore[arg-type]
    limits = _limits(spec, target, tp, weight_bytes)
    programs = Programs(model, spec, mesh, limits, "pallas")
    page_bytes = math.prod(programs.pool_shape()) // tp * DTYPE.itemsize
    pool_bytes = 2 * spec.num_layers * page_bytes

    label = f"{shape} tp={tp}" if tp > 1 else shape
    held = {"page_bytes": page_bytes, "held_bytes": weight_bytes + pool_bytes}
    made = {
        "decode": partial(
            Candidate,
            f"{label} decode[{DECODES}]",
            lower=partial(programs.lower_forward, DECODES),
            pool_bytes=pool_bytes,
        ),
        "prefill": partial(
            Candidate,
            f"{label} prefill[{PREFILL_TOKENS}]",
            lower=partial(programs.lower_forward, PREFILL_TOKENS),
            pool_bytes=pool_bytes,
        ),
        "sample": partial(Candidate, f"{label} sample[{DECODES}]", lower=partial(programs.lower_head, DECODES)),
    }
    return [made[step](target=target, mesh=mesh, **held) for step in steps]


def _limits(spec: ModelSpec, target: GpuTarget, tp: int, weight_bytes: int) -> Limits:
    """As `Runner` sizes the pool: a share of what is free."""
    block_bytes = 2 * spec.num_layers * BLOCK_SIZE * spec.num_kv_heads * spec.head_dim * DTYPE.itemsize // tp
    per_sequence = -(-spec.max_position // BLOCK_SIZE)
    free_bytes = MEMORY_FRACTION * (target.memory_bytes - weight_bytes - SPARE_BYTES)
    blocks = min(int(free_bytes // block_bytes), DECODES * per_sequence)
    if blocks < per_sequence:
        raise ConfigError(
            f"weights of {weight_bytes / 2**30:.1f} GiB leave no room for one context of {spec.max_position} tokens "
            f"in {target.memory_bytes / 2**30:.0f} GiB"
        )
    return Limits(DECODES, per_sequence, BLOCK_SIZE, blocks)
