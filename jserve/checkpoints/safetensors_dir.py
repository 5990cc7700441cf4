"""A model directory: config.json with model.safetensors, or the shards that model.safetensors.index.json names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jserve.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """See the module. Files are mapped only while a tensor is copied out, so that resident memory stays a tensor's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _config(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        for file in _files(path):
            with _open(file) as tensors:
                for name in list(tensors.keys()):
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    self._file_of[name] = file

    def label(self, name: str) -> str:
        return name

    def read(self, name: str) -> np.ndarray:
        with _open(self._file_of[name]) as tensors:
            array: np.ndarray = tensors.get_tensor(name)
        return array


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read as safetensors, it may be cut short: {error}") from None
    except (AttributeError, TypeError) as error:  # a dtype that numpy has no name for
        raise ModelError(f"{file} has a tensor of a kind that is not supported: {error}") from None


def _config(directory: Path) -> dict[str, Any]:
    """config.json, with the end-of-sequence ids of generation_config.json, which know more of chat models."""
    config = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file():
        ends = read_json(generation).get("eos_token_id")
        config |= {} if ends is None else {"eos_token_id": ends}
    return config


def _files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        return _shards(directory)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    others = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.safetensors") for f in directory.glob(pattern))
    if any(name.endswith(".bin") or name.endswith((".pt", ".pth")) for name in others):
        raise ModelError(
            f"{directory} has its weights in {others[0]}, a pickle, which jserve does not read: get the model's "
            "safetensors, or make them with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise ModelError(
        f"{directory} has no weights: looked for {SINGLE} and {INDEX}" + (f", found {others[0]}" if others else "")
    )


def _shards(directory: Path) -> list[Path]:
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ModelError(f"{directory / INDEX} has no weight_map from tensor names to files")
    files = [directory / name for name in sorted(set(index.values()))]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file} is missing, and {INDEX} says it holds tensors: get the rest of the model")
    return files


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: a model directory needs one") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content
