"""A Hugging Face directory loads from one file or many, and whatever is wrong with it is one error that names it."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from safetensors.numpy import load_file, save_file

from jserve import checkpoints
from jserve.checkpoints.safetensors_dir import SafetensorsCheckpoint
from jserve.errors import ModelError
from jserve.models import dense, parameters

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
PROMPT = list(range(4, 20))


def load(path: Path, dtype: str = "float32") -> checkpoints.LoadedModel:
    return checkpoints.load(path, Mesh(np.array(jax.devices()[:1]), ("tp",), axis_types=(AxisType.Auto,)), dtype)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS / "llama2_gqa", tmp_path / "llama"))


@pytest.fixture
def opt(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODELS / "opt", tmp_path / "opt"))


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shard(directory: Path) -> None:
    """The same tensors as three files and an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, directory / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def configure(directory: Path, **change: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))


def test_shards_make_the_same_model_as_one_file(llama: Path) -> None:
    whole = load(llama)
    shard(llama)
    np.testing.assert_array_equal(dense.logits(load(llama).model, PROMPT), dense.logits(whole.model, PROMPT))


def test_the_model_is_named_after_its_directory(llama: Path) -> None:
    loaded = load(llama)
    assert (loaded.name, loaded.path, loaded.spec.num_kv_heads) == ("llama", llama, 2)


def test_bfloat16_files_load_in_the_asked_dtype(llama: Path) -> None:
    rewrite(llama, lambda t: t.update({name: x.astype(ml_dtypes.bfloat16) for name, x in t.items()}))
    for dtype in ("float32", "bfloat16", "float16"):
        assert {str(p.dtype) for p in parameters(load(llama, dtype).model).values()} == {dtype}


def test_generation_config_knows_the_end_of_sequence_tokens(llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load(llama).spec.eos_token_ids == (7, 9)


def test_tensors_of_the_inner_model_alone_are_found(opt: Path) -> None:
    """As facebook/opt-125m has them: without the leading "model."."""
    expected = dense.logits(load(opt).model, PROMPT)
    rewrite(opt, lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)])
    np.testing.assert_array_equal(dense.logits(load(opt).model, PROMPT), expected)


def test_leftovers_that_change_nothing_are_ignored(llama: Path) -> None:
    expected = dense.logits(load(llama).model, PROMPT)
    rewrite(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    np.testing.assert_array_equal(dense.logits(load(llama).model, PROMPT), expected)


def test_a_tied_model_may_carry_its_head_twice(opt: Path) -> None:
    expected = dense.logits(load(opt).model, PROMPT)
    rewrite(opt, lambda t: t.update({"lm_head.weight": t["model.decoder.embed_tokens.weight"].copy()}))
    np.testing.assert_array_equal(dense.logits(load(opt).model, PROMPT), expected)


def test_a_tensor_without_a_place_is_refused(llama: Path) -> None:
    """A bias that the config does not speak of would be missed in every answer."""
    rewrite(llama, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}))
    with pytest.raises(ModelError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.bias have no place in a llama"):
        load(llama)


def test_a_missing_tensor_is_named(llama: Path) -> None:
    rewrite(llama, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"llama has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama)


def test_a_wrong_shape_is_named(llama: Path) -> None:
    rewrite(llama, lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[31\], and the config asks for \[32\]"):
        load(llama)


@pytest.mark.parametrize("keep", [0, 5, 700, -100])
def test_a_truncated_file_is_named(llama: Path, keep: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read as safetensors, it may be cut short"):
        load(llama)


def test_a_file_that_is_not_safetensors_is_named(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read as safetensors"):
        load(llama)


def test_a_missing_shard_is_named(llama: Path) -> None:
    shard(llama)
    (llama / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors is missing"):
        load(llama)


def test_an_index_without_a_map_is_named(llama: Path) -> None:
    (llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json has no weight_map"):
        load(llama)


def test_pickled_weights_are_refused_with_the_way_out(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights in pytorch_model\.bin, a pickle.*save_pretrained"):
        load(llama)


def test_an_unknown_architecture_is_refused_with_the_known_ones(llama: Path) -> None:
    configure(llama, model_type="qwen3")
    with pytest.raises(ModelError, match=r"config\.json: model_type 'qwen3' is not supported: use one of llama, opt"):
        load(llama)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), r"config\.json cannot be read as JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json holds no JSON object"),
        (lambda d: (d / "model.safetensors").unlink(), r"llama has no weights: looked for model\.safetensors"),
        (lambda d: shutil.rmtree(d), r"llama does not exist"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(llama: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(llama)
    with pytest.raises(ModelError, match=message):
        load(llama)


def test_a_file_of_another_kind_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is not a model: give a directory"):
        load(llama / "config.json")


def test_tensors_are_dropped_as_soon_as_their_parameter_is_made(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 26 GB of weights do not need 52 GB."""
    read, alive, most = SafetensorsCheckpoint.read, weakref.WeakValueDictionary[str, np.ndarray](), 0

    def watched(self: SafetensorsCheckpoint, name: str) -> np.ndarray:
        nonlocal most
        most = max(most, len(alive))
        alive[name] = tensor = read(self, name)
        return tensor

    monkeypatch.setattr(SafetensorsCheckpoint, "read", watched)
    load(llama, dtype="bfloat16")
    assert most <= 3  # Q, K and V become one parameter
