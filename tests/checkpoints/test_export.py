"""Any checkpoint can be written as a Hugging Face directory that is the same model."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file

from jserve import checkpoints
from jserve.errors import ModelError
from jserve.models import dense

MODELS = Path(__file__).parent.parent / "fixtures" / "models"


def load(path: Path) -> checkpoints.LoadedModel:
    return checkpoints.load(path, Mesh(np.array(jax.devices()[:1]), ("tp",), axis_types=(AxisType.Auto,)), "float32")


@pytest.mark.parametrize("variant", ["llama3", "opt_350m"])
def test_the_export_is_the_same_model(tmp_path: Path, variant: str) -> None:
    checkpoints.export_hf(MODELS / variant, tmp_path / "hf")
    original, exported = load(MODELS / variant), load(tmp_path / "hf")
    assert exported.spec == original.spec
    np.testing.assert_array_equal(dense.logits(exported.model, [5, 6, 7]), dense.logits(original.model, [5, 6, 7]))


def test_tensors_are_written_in_the_asked_dtype(tmp_path: Path) -> None:
    checkpoints.export_hf(MODELS / "opt", tmp_path / "hf", dtype="float16")
    assert {str(x.dtype) for x in load_file(tmp_path / "hf" / "model.safetensors").values()} == {"float16"}


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    shutil.copytree(MODELS / "opt", tmp_path / "hf")
    with pytest.raises(ModelError, match="hf exists already"):
        checkpoints.export_hf(MODELS / "opt", tmp_path / "hf")
