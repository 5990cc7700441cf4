"""Any checkpoint written as a Hugging Face directory, for programs that read nothing else (the benchmarks' peers)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jserve.checkpoints.loading import matched_sources
from jserve.checkpoints.orbax_dir import copy_tokenizer
from jserve.checkpoints.safetensors_dir import SINGLE
from jserve.checkpoints.tensors import open_checkpoint
from jserve.errors import ModelError
from jserve.models.registry import parse_config
from jserve.publish import publish_directory


def export_hf(source: Path, directory: Path, dtype: str = "float32") -> None:
    """Write config.json, model.safetensors and the tokenizer of a GGUF file or model directory. Whole or not at all.

    All tensors are in memory at once: meant for small models.
    """
    if directory.exists():
        raise ModelError(f"{directory} exists already: choose another directory, or remove it")
    checkpoint = open_checkpoint(source)
    found = matched_sources(parse_config(checkpoint.config, str(source)), checkpoint)
    names = [name for tensor in found.values() for name, _ in tensor.tensors]
    config = checkpoint.config | {"dtype": dtype, "torch_dtype": dtype}
    with publish_directory(directory) as staging:
        tensors = {name: np.ascontiguousarray(checkpoint.read(name).astype(dtype, copy=False)) for name in names}
        save_file(tensors, staging / SINGLE, metadata={"format": "pt"})
        (staging / SINGLE).chmod(0o644)
        (staging / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        copy_tokenizer(source, staging)
