"""From a checkpoint of any kind to a model on its mesh, parameter by parameter: the host never holds two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jserve.checkpoints import orbax_dir
from jserve.checkpoints.tensors import Checkpoint, open_checkpoint
from jserve.errors import ModelError
from jserve.models.family import CausalLM, Family, Source
from jserve.models.placement import build, param_shardings, parameters
from jserve.models.registry import family_of, parse_config
from jserve.models.spec import ModelSpec
from jserve.progress import Progress, SilentProgress
from jserve.pull import name_of


@dataclass(frozen=True)
class LoadedModel:
    """A model, filled and sharded."""

    spec: ModelSpec
    model: CausalLM
    name: str
    """What to call it: its hub id, the file's stem or the directory's name."""
    path: Path
    """Where it came from, and its tokenizer with it."""


def load(source: Path, mesh: Mesh, dtype: Any, progress: Progress | None = None) -> LoadedModel:
    """Read a model directory, a GGUF file or a converted checkpoint. Raises ModelError or ConfigError."""
    progress, dtype = progress or SilentProgress(), jnp.dtype(dtype)
    if orbax_dir.is_converted(source):
        spec, model = orbax_dir.restore(source, mesh, dtype, progress)
    else:
        checkpoint = open_checkpoint(source)
        spec = parse_config(checkpoint.config, _config_place(source))
        model = build(spec, dtype)
        fill(model, checkpoint, mesh, progress)
    return LoadedModel(spec, model, name_of(source), source)


def fill(model: CausalLM, checkpoint: Checkpoint, mesh: Mesh, progress: Progress) -> None:
    """Give every parameter its value from the checkpoint, on the mesh, in its own dtype."""
    shardings = param_shardings(model, mesh)
    found, leaves = matched_sources(model.spec, checkpoint), parameters(model)
    total = sum(int(np.prod(p.shape)) * p.dtype.itemsize for p in leaves.values())
    with progress.track(f"Loading {checkpoint.path.name}", total, "B") as task:
        for path, param in leaves.items():
            value = _combine(found[path], checkpoint, param.dtype)
            assert value.shape == param.shape, f"{path}: made {value.shape}, wanted {param.shape}"
            # Waiting bounds the host memory in flight to one parameter.
            param.set_value(jax.block_until_ready(jax.device_put(value, shardings[path])))
            task.advance(value.nbytes)


def matched_sources(spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, Source]:
    """Each parameter's source, once the checkpoint is known to hold exactly the tensors that the model needs."""
    family = family_of(spec)
    found = {path: _as_named(source, checkpoint) for path, source in family.sources(spec).items()}
    for source in found.values():
        for name, shape in source.tensors:
            if name not in checkpoint.shapes:
                raise ModelError(f"{checkpoint.path} has no tensor {checkpoint.label(name)}: the checkpoint is "
                                 "incomplete, or its config does not describe it")  # fmt: skip
            if checkpoint.shapes[name] != shape:
                raise ModelError(f"{checkpoint.path}: tensor {checkpoint.label(name)} has shape "
                                 f"{list(checkpoint.shapes[name])}, and the config asks for {list(shape)}")  # fmt: skip
    _check_unused(family, spec, checkpoint, {name for source in found.values() for name, _ in source.tensors})
    return found


def _as_named(source: Source, checkpoint: Checkpoint) -> Source:
    """Older checkpoints hold the inner model alone, without the leading "model."."""

    def named(name: str) -> str:
        short = name.removeprefix("model.")
        return short if name not in checkpoint.shapes and short in checkpoint.shapes else name

    return Source(tuple((named(name), shape) for name, shape in source.tensors), source.combine)


def _check_unused(family: Family, spec: ModelSpec, checkpoint: Checkpoint, used: set[str]) -> None:
    """A tensor that nobody asked for means a model that is not what its config says: its output would be wrong."""
    ignored = (*family.ignored, *(("lm_head.weight",) if spec.tie_embeddings else ()))
    unused = sorted(name for name in set(checkpoint.shapes) - used if not name.endswith(ignored))
    if unused:
        more = f" and {len(unused) - 1} more tensors" if len(unused) > 1 else ""
        raise ModelError(f"{checkpoint.path}: tensor {checkpoint.label(unused[0])}{more} have no place in a "
                         f"{spec.architecture} model of this config: its variant is not supported")  # fmt: skip


def _combine(source: Source, checkpoint: Checkpoint, dtype: Any) -> np.ndarray:
    parts = [checkpoint.read(name).astype(dtype, copy=False) for name, _ in source.tensors]
    return np.ascontiguousarray(source.combine(*parts))


def _config_place(source: Path) -> str:
    return str(source if source.is_file() else source / "config.json")
