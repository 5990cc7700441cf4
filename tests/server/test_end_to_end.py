"""The whole of it: `jserve serve` on a tiny real model, XLA steps and all, against transformers' golden tokens."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_model import ascii_tokenizer
from running_server import Server, end, launch

from jserve.server.client import Client

FIXTURE = Path(__file__).parents[1] / "fixtures" / "models" / "smollm2"
SIZES = ["--max-running", "8", "--token-budget", "64", "--device-blocks", "128", "--block-size", "8"]
TALK = [{"role": "user", "content": "Tell me something."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    ascii_tokenizer().save(directory)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, directory)
    return directory


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    compiled = tmp_path_factory.mktemp("compiled")
    running = launch(["-m", "jserve.cli", "serve"], "--model", str(model), *SIZES, "--compile-cache-dir", str(compiled))
    yield running
    end(running)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("case", [0, 1])
def test_greedy_tokens_are_those_of_transformers(client: Client, case: int) -> None:
    golden = np.load(FIXTURE / "golden.npz")
    prompt, greedy = golden[f"prompt_{case}"].tolist(), golden[f"greedy_{case}"].tolist()
    result = client.generate(prompt, max_tokens=len(greedy), ignore_eos=True)
    assert result.token_ids == greedy


def test_a_second_turn_is_served_from_the_first_ones_kv(client: Client) -> None:
    first = client.chat(TALK, max_tokens=24)
    history = [*TALK, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And more?"}]
    second = client.chat(history, max_tokens=8)
    assert second.cached_tokens >= first.prompt_tokens // 8 * 8
    assert second.token_ids == client.chat(history, max_tokens=8, cache_salt="computed afresh").token_ids


def test_logprobs_are_those_of_the_chosen_tokens(client: Client) -> None:
    result = client.chat(TALK, max_tokens=6, logprobs=4)
    assert len(result.logprobs) == len(result.token_ids) == 6
    for token, entry in zip(result.token_ids, result.logprobs, strict=True):
        assert len(entry.top_ids) == len(entry.top_logprobs) == 4
        assert entry.top_ids[0] == token  # greedy
        assert math.isclose(entry.logprob, entry.top_logprobs[0], abs_tol=1e-5)
        assert entry.top_logprobs == sorted(entry.top_logprobs, reverse=True)


def test_a_seed_decides_the_text_whatever_else_runs(client: Client) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    three = client.chat(TALK, seed=5, n=3, **sampling)
    assert [choice.token_ids for choice in three.choices] == [
        client.chat(TALK, seed=seed, **sampling).token_ids for seed in (5, 6, 7)
    ]
    assert len({tuple(choice.token_ids) for choice in three.choices}) == 3
    assert three.output_tokens == 36


def test_nothing_compiles_and_nothing_stays_after_all_that(server: Server, client: Client) -> None:
    client.chat(TALK, max_tokens=3, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, logprobs=2)
    assert server.idle_stats()["compiles_after_warmup"] == 0


def test_jserve_chat_answers_turns_as_json_lines(server: Server, client: Client) -> None:
    command = [sys.executable, "-m", "jserve.cli", "chat", "--target", server.target, "--max-tokens", "10", "--json"]
    done = subprocess.run([*command, "-m", "Hello.", "-m", "Again."], capture_output=True, text=True, timeout=60)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first.keys() == {"text", "request_id", "prompt_tokens", "cached_tokens", "output_tokens", "ttft_s"}
    assert first["text"] == client.chat([{"role": "user", "content": "Hello."}], max_tokens=10).text
    assert second["cached_tokens"] > 0
    assert (done.returncode, done.stderr) == (0, "")
