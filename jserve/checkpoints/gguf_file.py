"""A GGUF file, seen as the Hugging Face checkpoint that it was made from: names, config and row order translated."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize

from jserve.errors import ModelError
from jserve.models.family import GgufLayout
from jserve.models.registry import FAMILIES

_LAYOUTS: dict[str, GgufLayout] = {name: layout for f in FAMILIES.values() for name, layout in f.gguf.items()}


class GgufCheckpoint:
    """See the module. Quantized tensors are read as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata, tensors = _read_header(path)
        architecture = metadata.get("general.architecture")
        if architecture not in _LAYOUTS:
            raise ModelError(f"{path}: GGUF architecture {architecture!r} is not supported: use {', '.join(_LAYOUTS)}")
        self._layout = _LAYOUTS[architecture]
        self._tensors = {self._translate(name): tensor for name, tensor in tensors.items()}
        self._labels = {self._translate(name): name for name in tensors}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        small = {name: self._read_plain(name) for name, shape in self.shapes.items() if len(shape) == 1}
        self.config = self._config(metadata, small)

    def label(self, name: str) -> str:
        if name in self._labels:
            return self._labels[name]
        stem, number, part = _split(name)
        for theirs, ours in self._layout.tensors.items():
            if ours == stem:
                return f"{theirs.format(number)}.{part}"
        return name

    def read(self, name: str) -> np.ndarray:
        array = self._read_plain(name)
        heads_field = self._layout.interleaved.get(_split(name)[0])
        return array if heads_field is None else _halves(array, self.config[heads_field])

    def _read_plain(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
        try:
            values: np.ndarray = dequantize(raw.reshape(-1, tensor.row_bytes), tensor.kind)
        except NotImplementedError:
            raise ModelError(f"{self.path}: tensor {self.label(name)} has the unsupported type {tensor.kind.name}: "
                             "use a Q4_1, Q8_0, F16 or F32 file of the model") from None  # fmt: skip
        return values.reshape(tensor.shape)

    def _config(self, metadata: dict[str, Any], small: dict[str, np.ndarray]) -> dict[str, Any]:
        config = self._layout.config(metadata, small)
        embedding = self.shapes.get("model.embed_tokens.weight")
        if embedding is not None:
            config.setdefault("vocab_size", embedding[0])
        config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        return config

    def _translate(self, name: str) -> str:
        """Hugging Face's name; a name that the layout does not know stays as it is."""
        stem, number, part = _split(name)
        ours = self._layout.tensors.get(stem)
        return name if ours is None else f"{ours.format(number)}.{part}"


@dataclass(frozen=True)
class _Tensor:
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    row_bytes: int
    offset: int
    n_bytes: int


class _HeaderReader(GGUFReader):
    """Steps over lists (the vocabulary): as numpy arrays they take seconds, and nothing here needs them."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data = self.data.data
        kind, count = struct.unpack_from("<IQ", data, orig_offs)
        offset = orig_offs + 12
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                offset += 8 + struct.unpack_from("<Q", data, offset)[0]
        else:
            offset += count * np.dtype(self.gguf_scalar_to_np[GGUFValueType(kind)]).itemsize
        return offset - orig_offs, [], [], [GGUFValueType.ARRAY]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """The metadata without its lists, and where each tensor is."""
    try:
        reader = _HeaderReader(str(path))
        scalars = {name: f for name, f in reader.fields.items() if GGUFValueType.ARRAY not in f.types}
        metadata = {name: field.contents() for name, field in scalars.items()}
        tensors = {
            t.name: _Tensor(
                GGMLQuantizationType(t.tensor_type),
                tuple(int(n) for n in t.shape[::-1]),  # GGUF lists the fastest-changing dimension first
                int(t.n_bytes) // int(np.prod(t.shape[1:])),
                int(t.data_offset),
                int(t.n_bytes),
            )
            for t in reader.tensors
        }
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # the reader stumbles in many ways over a file that is cut short or not GGUF
        raise ModelError(f"{path} cannot be read as GGUF, it may be cut short: {error}") from None
    return metadata, tensors


def _split(name: str) -> tuple[str, str, str]:
    """ "blk.3.attn_q.weight" as ("blk.{}.attn_q", "3", "weight"); without a layer the number is empty."""
    stem, _, part = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", stem)
    if number is None:
        return stem, "", part
    return f"{stem[: number.start(1)]}{{}}{stem[number.end(1) :]}", number[1], part


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """From rotary pairs side by side, as GGUF keeps them, to all first halves of a head before all second ones."""
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
