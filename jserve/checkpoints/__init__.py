"""Checkpoints: safetensors directories, GGUF files and jserve's Orbax directories, read onto a mesh leaf by leaf."""

from jserve.checkpoints.export import export_hf
from jserve.checkpoints.loading import LoadedModel, load
from jserve.checkpoints.orbax_dir import save

__all__ = ["LoadedModel", "export_hf", "load", "save"]
