"""The default model's weights as the peers read them: a Hugging Face directory and GGUF files, all of the same numbers.

The embedded model is quantised (Q4_1). jserve computes with its dequantised float32 numbers, so the float32 peers get
just these; llama.cpp gets the quantised file besides.
"""

from __future__ import annotations

from pathlib import Path

import gguf

from jserve.checkpoints import export_hf
from jserve.console import RichProgress
from jserve.pull import resolve_model


def source(model: str | None) -> Path:
    """The model's own file or directory; the embedded default for None."""
    return resolve_model(model, RichProgress())


def hf_directory(model: Path, folder: Path) -> Path:
    """A Hugging Face directory in float32, made once."""
    directory = folder / f"{model.stem}-float32"
    if not directory.exists():
        folder.mkdir(parents=True, exist_ok=True)
        export_hf(model, directory)
    return directory


def float32_gguf(model: Path, folder: Path) -> Path:
    """A GGUF file with every tensor dequantised, made once; all else is copied."""
    path = folder / f"{model.stem}-float32.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _dequantise(gguf.GGUFReader(model), partial)
        partial.rename(path)
    return path


def _dequantise(reader: gguf.GGUFReader, path: Path) -> None:
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = gguf.LlamaFileType.ALL_F32 if name == "general.file_type" else entry.contents()
        item = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, entry.types[0], item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
