"""A checkpoint as Hugging Face writes one: a config.json and tensors by name. Finds out which kind a path is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jserve.errors import ModelError


class Checkpoint(Protocol):
    """Open for reading; holds no tensor in memory."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Every tensor's name and shape."""

    def label(self, name: str) -> str:
        """The tensor's name as the file itself has it, for errors."""

    def read(self, name: str) -> np.ndarray:
        """A copy in memory that the caller owns, in the file's dtype, or float32 if it was quantized."""


def open_checkpoint(path: Path) -> Checkpoint:
    from jserve.checkpoints.gguf_file import GgufCheckpoint
    from jserve.checkpoints.safetensors_dir import SafetensorsCheckpoint

    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist: give a model directory or a .gguf file")
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    raise ModelError(f"{path} is not a model: give a directory with config.json and safetensors, or a .gguf file")
