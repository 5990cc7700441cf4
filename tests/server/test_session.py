"""`jserve session`: a conversation goes on at another server, from the KV that the first one computed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from byte_model import ascii_tokenizer

from jserve import cli
from jserve.errors import ConfigError
from jserve.llm import LLM
from jserve.progress import SilentProgress
from jserve.session import KVLayout, export_session, import_session

FIXTURE = Path(__file__).parents[1] / "fixtures" / "models" / "llama2_gqa"
FIRST = [{"role": "user", "content": "Tell me of rain."}]
BLOCK = 8


@dataclass(frozen=True)
class Talk:
    """A first turn, told by a server whose tiers are in `disk`, and what any server says next."""

    model: Path
    disk: Path
    history: list[dict[str, str]]
    next_text: str


@pytest.fixture(scope="module", autouse=True)
def own_calibrations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jserve.calibrate.cache_root", lambda: folder)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    directory.mkdir()
    ascii_tokenizer().save(directory)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, directory)
    return directory


def serve(model: Path, disk: Path | None = None) -> LLM:
    tiers = {"host_gib": 0.01, "disk_dir": str(disk), "restore": "always"} if disk else {}
    return LLM(
        str(model),
        progress=SilentProgress(),
        block_size=BLOCK,
        device_blocks=64,
        max_running=4,
        token_budget=32,
        token_buckets=(8, 32),
        compile_cache_dir=os.environ.get("JAX_COMPILATION_CACHE_DIR"),
        **tiers,
    )


@pytest.fixture(scope="module")
def talk(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    disk = tmp_path_factory.mktemp("first")
    with serve(model, disk) as first:
        reply = first.chat(FIRST, max_tokens=12, ignore_eos=True)
    history = [*FIRST, {"role": "assistant", "content": reply.text}]
    with serve(model) as plain:
        said = plain.chat([*history, {"role": "user", "content": "And snow?"}], max_tokens=12)
    return Talk(model, disk, history, said.text)


def session(verb: str, snapshot: Path, disk: Path, model: Path, *more: str) -> int:
    flags = ["--disk-dir", str(disk), "--model", str(model), "--block-size", str(BLOCK), *more]
    return cli.main(["session", verb, str(snapshot), *flags])


def export(talk: Talk, snapshot: Path, *more: str) -> int:
    messages = snapshot.with_suffix(".messages.json")
    messages.write_text(json.dumps(talk.history))
    return session("export", snapshot, talk.disk, talk.model, "--messages", str(messages), *more)


@pytest.fixture(scope="module")
def snapshot(talk: Talk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("snapshots") / "rain"
    assert export(talk, target) == 0
    return target


def test_a_conversation_goes_on_at_another_server_with_the_same_words(
    talk: Talk, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert session("import", snapshot, other, talk.model) == 0
    prompt_tokens = len(ascii_tokenizer().encode_chat(FIRST))
    held = len(json.loads((snapshot / "session.json").read_text())["token_ids"])
    assert capsys.readouterr().out == f"{other}: the KV of {held} tokens\n"
    assert held >= prompt_tokens // BLOCK * BLOCK
    with serve(talk.model, other) as server:
        reply = server.chat([*talk.history, {"role": "user", "content": "And snow?"}], max_tokens=12)
        assert server.cache_stats()["disk_hit_tokens"] == held
    assert (reply.cached_tokens, reply.text) == (held, talk.next_text)


def test_the_salt_is_chosen_at_the_import(talk: Talk, snapshot: Path, tmp_path: Path) -> None:
    assert session("import", snapshot, tmp_path, talk.model, "--cache-salt", "tenant") == 0
    with serve(talk.model, tmp_path) as server:
        messages = [*talk.history, {"role": "user", "content": "And snow?"}]
        assert server.chat(messages, max_tokens=1).cached_tokens == 0
        assert server.chat(messages, max_tokens=12, cache_salt="tenant").text == talk.next_text
        assert server.cache_stats()["disk_hit_tokens"] > 0


def refused(capsys: pytest.CaptureFixture[str], status: int, said: str) -> bool:
    """One line, whatever the command has noted before."""
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("jserve: "), captured.err
    assert said in last
    return status == 2 and captured.out == ""


def test_what_is_not_there_is_named(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = Talk(talk.model, tmp_path / "empty", talk.history, "")
    assert refused(capsys, export(empty, tmp_path / "a"), f"{tmp_path / 'empty'} has no KV of tiny in float32")
    assert not empty.disk.exists()
    assert refused(capsys, export(talk, tmp_path / "a", "--block-size", "4"), "with blocks of 4 tokens")
    assert refused(capsys, export(talk, tmp_path / "a", "--cache-salt", "other"), "no block of this conversation")
    strange = Talk(talk.model, talk.disk, [{"role": "user", "content": "Something else entirely."}], "")
    assert refused(capsys, export(strange, tmp_path / "a"), "no block of this conversation")
    assert not (tmp_path / "a").exists()
    (tmp_path / "there").mkdir()
    assert refused(capsys, export(talk, tmp_path / "there"), "exists already")
    assert refused(capsys, session("import", tmp_path / "there", tmp_path, talk.model), "is no session")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ('{"role": "user"}', "holds no list"),
        ("[]", "messages is empty"),
        ("[1]", "messages[0] is 1"),
    ],
)
def test_messages_that_are_none_are_refused(
    talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "messages").write_text(text)
    flags = ["--messages", str(tmp_path / "messages")]
    assert refused(capsys, session("export", tmp_path / "a", talk.disk, talk.model, *flags), said)


def test_other_weights_and_other_blocks_are_refused(
    talk: Talk, snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tiny"
    shutil.copytree(talk.model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert refused(capsys, session("import", snapshot, tmp_path / "disk", other), "or has other weights")
    status = session("import", snapshot, tmp_path / "disk", talk.model, "--block-size", "4")
    assert refused(capsys, status, "blocks of 8 tokens, and here they have 4")
    assert not (tmp_path / "disk").exists()


def a_layout(dtype: str = "bfloat16") -> KVLayout:
    return KVLayout("m", "f" * 32, dtype, (2, 2, 4, 1, 64))


def filled(directory: Path, layout: KVLayout, token_ids: list[int]) -> None:
    """As if a server had talked."""
    from jserve.session import _opened

    with _opened(layout, str(directory)) as store:
        for i, key in enumerate(layout.keys(token_ids, "")):
            store.write(i, key, np.full(layout.block_shape, i + 0.5, ml_dtypes.bfloat16))


def test_a_conversation_whose_middle_is_lost_moves_up_to_there(tmp_path: Path) -> None:
    layout, token_ids = a_layout(), list(range(23))
    filled(tmp_path / "first", layout, token_ids)
    lost = layout.keys(token_ids, "")[3].hex()
    next((tmp_path / "first").rglob(lost)).unlink()
    assert export_session(layout, str(tmp_path / "first"), token_ids, tmp_path / "snapshot") == 12
    assert import_session(layout, str(tmp_path / "second"), tmp_path / "snapshot") == 12
    assert len(list((tmp_path / "second").glob("kv-*/??/*"))) == 3


def refusal(layout: KVLayout, disk: Path, snapshot: Path) -> str:
    """Why the snapshot cannot be imported; empty if it can."""
    try:
        import_session(layout, str(disk), snapshot)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_damaged_snapshot_is_refused_or_the_damage_means_nothing(tmp_path: Path) -> None:
    layout, token_ids = a_layout(), list(range(20))
    filled(tmp_path / "first", layout, token_ids)
    good, bad, second = tmp_path / "good", tmp_path / "bad", tmp_path / "second"
    export_session(layout, str(tmp_path / "first"), token_ids, good)
    truth = {path.name: path.read_bytes() for path in (tmp_path / "first").glob("kv-*/??/*")}
    assert len(truth) == 5
    rng = random.Random(0)
    refused_files = set()
    for file in [path.relative_to(good) for path in sorted(good.rglob("*")) if path.is_file()] * 3:
        shutil.copytree(good, bad)
        data = bytearray((bad / file).read_bytes() or b"0")
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        (bad / file).write_bytes(data if rng.random() < 0.7 else data[:at])
        if why := refusal(layout, second, bad):
            assert str(bad) in why
            assert not second.exists()
            refused_files.add(file)
        else:  # Orbax's own notes, for one, hold nothing that is needed
            assert {path.name: path.read_bytes() for path in second.glob("kv-*/??/*")} == truth
            shutil.rmtree(second)
        shutil.rmtree(bad)
    assert len(refused_files) > 2
    shutil.rmtree(good / "kv")
    assert f"{good} is damaged" in refusal(layout, second, good)
