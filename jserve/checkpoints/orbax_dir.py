"""jserve's own checkpoint: an Orbax tree that restores straight onto any mesh, with the spec and tokenizer beside it.

    DIR/jserve.json     format, spec and dtype
    DIR/params/         Orbax, one array for each parameter path
    DIR/...             tokenizer files, as in a Hugging Face directory

A checkpoint appears whole or not at all: it is written beside its place and renamed into it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jserve.checkpoints.safetensors_dir import read_json
from jserve.errors import ModelError
from jserve.models.family import CausalLM
from jserve.models.placement import build, param_shardings, parameters
from jserve.models.registry import FAMILIES
from jserve.models.spec import ModelSpec, RopeSpec
from jserve.progress import Progress
from jserve.publish import publish_directory

MANIFEST = "jserve.json"
FORMAT = 1

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def is_converted(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def save(model: CausalLM, directory: Path, tokenizer_from: Path | None = None) -> None:
    """Write a filled model as a new directory. `tokenizer_from`: the directory or GGUF file that it was loaded from."""
    import orbax.checkpoint as ocp  # seconds to import, so only where it is used

    if directory.exists():
        raise ModelError(f"{directory} exists already: choose another directory, or remove it")
    values = {path: param[...] for path, param in parameters(model).items()}
    dtype = str(next(iter(values.values())).dtype)
    manifest = {"format": FORMAT, "dtype": dtype, "spec": asdict(model.spec)}
    with publish_directory(directory) as staging:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((staging / "params").absolute(), values)
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, staging)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """The tokenizer's files from a model directory, or what the GGUF file's tokenizer makes of them."""
    if source.is_file():
        from jserve.tokenizer import Tokenizer

        Tokenizer.load(source).save(directory)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def restore(path: Path, mesh: Mesh, dtype: Any, progress: Progress) -> tuple[ModelSpec, CausalLM]:
    """Read a converted checkpoint onto the mesh, in `dtype`."""
    import orbax.checkpoint as ocp

    spec = _read_spec(path)
    model = build(spec, dtype)
    shardings = param_shardings(model, mesh)
    leaves = parameters(model)
    wanted = {
        name: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=shardings[name]) for name, param in leaves.items()
    }
    with progress.track(f"Restoring {path.name}", 1) as task:
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                values = checkpointer.restore((path / "params").absolute(), wanted)
        except Exception as error:  # Orbax and TensorStore report a damaged tree in many ways
            raise ModelError(f"{path / 'params'} cannot be restored, it may be damaged: {_first_line(error)}") from None
        task.advance()
    for name, param in leaves.items():
        param.set_value(values[name])
    return spec, model


def _read_spec(path: Path) -> ModelSpec:
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ModelError(f"{path / MANIFEST} has format {manifest.get('format')!r}, and this jserve reads {FORMAT}: "
                         "convert the model again")  # fmt: skip
    try:
        said = dict(manifest["spec"])
        rope = said.pop("rope")
        ends = tuple(said.pop("eos_token_ids"))
        spec = ModelSpec(**said, eos_token_ids=ends, rope=None if rope is None else RopeSpec(**rope))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path / MANIFEST} does not describe a model ({error}): convert the model again") from None
    if spec.architecture not in FAMILIES:
        raise ModelError(f"{path / MANIFEST}: architecture {spec.architecture!r} is not supported: "
                         f"use one of {', '.join(FAMILIES)}")  # fmt: skip
    return spec


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
