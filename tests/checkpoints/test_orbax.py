"""A converted checkpoint is the same model, restored straight onto any mesh, and appears whole or not at all."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jserve import checkpoints
from jserve.checkpoints import orbax_dir
from jserve.errors import ConfigError, ModelError
from jserve.models import dense, param_shardings, parameters

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
PROMPT = list(range(4, 40))


def mesh(tp: int = 1) -> Mesh:
    return Mesh(np.array(jax.devices()[:tp]), ("tp",), axis_types=(AxisType.Auto,))


def load(path: Path, tp: int = 1, dtype: str = "float32") -> checkpoints.LoadedModel:
    return checkpoints.load(path, mesh(tp), dtype)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    checkpoints.save(load(MODELS / "llama_yarn").model, tmp_path / "converted")
    return tmp_path / "converted"


@pytest.mark.parametrize("variant", ["llama3", "opt_350m", "smollm2"])
def test_what_is_restored_is_what_was_saved(tmp_path: Path, variant: str) -> None:
    original = load(MODELS / variant)
    checkpoints.save(original.model, tmp_path / "converted")
    restored = load(tmp_path / "converted")
    assert restored.spec == original.spec
    np.testing.assert_array_equal(dense.logits(restored.model, PROMPT), dense.logits(original.model, PROMPT))


def test_it_restores_onto_another_mesh(converted: Path) -> None:
    whole, split = load(converted), load(converted, tp=2)
    wanted = param_shardings(split.model, mesh(2))
    assert all(param[...].sharding == wanted[path] for path, param in parameters(split.model).items())
    np.testing.assert_allclose(
        dense.logits(split.model, PROMPT), dense.logits(whole.model, PROMPT), rtol=1e-4, atol=1e-4
    )


def test_it_restores_in_another_dtype(converted: Path) -> None:
    exact, rounded = (parameters(load(converted, dtype=d).model) for d in ("float32", "bfloat16"))
    for path, param in rounded.items():
        assert str(param[...].dtype) == "bfloat16"
        np.testing.assert_array_equal(param[...], exact[path][...].astype("bfloat16"))


def test_the_tokenizer_comes_with_it(tmp_path: Path) -> None:
    source = Path(shutil.copytree(MODELS / "llama2_mha", tmp_path / "source"))
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    checkpoints.save(load(source).model, tmp_path / "converted", tokenizer_from=source)
    assert (tmp_path / "converted" / "tokenizer.json").read_text() == '{"a": 1}'
    assert sorted(f.name for f in (tmp_path / "converted").iterdir()) == [
        "generation_config.json",
        "jserve.json",
        "params",
        "tokenizer.json",
    ]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(orbax_dir, "copy_tokenizer", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(load(MODELS / "opt").model, tmp_path / "converted", tokenizer_from=MODELS / "opt")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_overwritten(converted: Path) -> None:
    with pytest.raises(ModelError, match="converted exists already: choose another directory"):
        checkpoints.save(load(MODELS / "opt").model, converted)


def test_a_mesh_that_does_not_divide_the_model_is_refused(tmp_path: Path) -> None:
    checkpoints.save(load(MODELS / "smollm2").model, tmp_path / "converted")
    with pytest.raises(ConfigError, match="3 KV heads"):
        load(tmp_path / "converted", tp=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves coroutines behind
def test_damaged_parameters_are_named(converted: Path) -> None:
    for file in (converted / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match="params cannot be restored, it may be damaged"):
        load(converted)
    gc.collect()


def test_missing_parameters_are_named(converted: Path) -> None:
    shutil.rmtree(converted / "params")
    with pytest.raises(ModelError, match="params cannot be restored, it may be damaged"):
        load(converted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "has format 99, and this jserve reads 1: convert the model again"),
        ({"spec": {"vocab_size": 3}}, "does not describe a model"),
        ({"spec": None}, "does not describe a model"),
    ],
)
def test_a_foreign_manifest_is_refused(converted: Path, change: dict[str, object], message: str) -> None:
    manifest = json.loads((converted / "jserve.json").read_text())
    (converted / "jserve.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ModelError, match=message):
        load(converted)


def test_a_changed_shape_is_refused(converted: Path) -> None:
    manifest = json.loads((converted / "jserve.json").read_text())
    manifest["spec"]["mlp_size"] = 80
    (converted / "jserve.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="params cannot be restored"):
        load(converted)
