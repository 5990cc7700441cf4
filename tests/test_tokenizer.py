"""Text to tokens and back: from directories and GGUF files, through chat templates, and token by token."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from jserve.chat_template import ChatTemplate
from jserve.detokenizer import Detokenizer, StopStrings
from jserve.errors import InvalidRequest, ModelError, Unsupported
from jserve.tokenizer import LONG_TEXT_CHARS, Tokenizer

ALPHABET = sorted(ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "12 3", "Ġ w", "Ġw o"]
VOCAB = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("JSERVE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def write_gguf(path: Path, *, model: str = "gpt2", pre: str = "smollm", template: str | None = TEMPLATE) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCAB)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(VOCAB) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [VOCAB[token] for token in tokenizer.encode(text)]


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_gguf_tokenizer_merges_words_but_never_digits(gguf_file: Path) -> None:
    tokenizer = Tokenizer.load(gguf_file)
    assert pieces(tokenizer, "hello wo 123") == ["hello", "Ġwo", "Ġ", "1", "2", "3"]
    assert tokenizer.decode(tokenizer.encode("hello wo 123")) == "hello wo 123"
    assert tokenizer.eos_token_ids == (2,)


def test_other_word_cutters_merge_digits(tmp_path: Path) -> None:
    for pre in ("gpt-2", "llama-bpe"):
        tokenizer = Tokenizer.load(write_gguf(tmp_path / f"{pre}.gguf", pre=pre))
        assert pieces(tokenizer, "hello123") == ["hello", "123"]


def test_special_tokens_are_one_token_and_no_text(gguf_file: Path) -> None:
    tokenizer = Tokenizer.load(gguf_file)
    assert tokenizer.encode("<|im_start|>he") == [1, VOCAB.index("he")]
    assert tokenizer.decode([1, VOCAB.index("he"), 2]) == "he"


def test_the_chat_template_of_a_gguf_file_is_applied(gguf_file: Path) -> None:
    tokenizer = Tokenizer.load(gguf_file)
    said = tokenizer.render_chat(USER)
    assert said == "<|im_start|><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_chat(USER) == tokenizer.encode(said)


def test_what_was_built_from_a_gguf_file_is_kept_and_equal(gguf_file: Path, cache: Path) -> None:
    text = "hello, wörld 42 — <|im_end|>"
    built = Tokenizer.load(gguf_file)
    (kept,) = (cache / "tokenizers").iterdir()
    stamp = (kept / "tokenizer.json").stat().st_mtime_ns
    loaded = Tokenizer.load(gguf_file)
    assert (kept / "tokenizer.json").stat().st_mtime_ns == stamp
    assert loaded.encode(text) == built.encode(text)
    assert loaded.render_chat(USER) == built.render_chat(USER)
    assert loaded.eos_token_ids == built.eos_token_ids


def test_another_file_at_the_same_place_is_read_anew(gguf_file: Path) -> None:
    assert Tokenizer.load(gguf_file).chat_template is not None
    gguf_file.unlink()
    assert Tokenizer.load(write_gguf(gguf_file, template=None)).chat_template is None


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(gguf_file: Path, cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    assert pieces(Tokenizer.load(gguf_file), "hello") == ["hello"]


def test_gguf_tokenizers_that_are_not_understood_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="kind 'llama'"):
        Tokenizer.load(write_gguf(tmp_path / "spm.gguf", model="llama"))
    with pytest.raises(ModelError, match="cuts words as 'klingon'"):
        Tokenizer.load(write_gguf(tmp_path / "pre.gguf", pre="klingon"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        Tokenizer.load(tmp_path / "broken.gguf")


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_from_its_directory(gguf_file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(gguf_file)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert loaded.encode_chat(USER) == tokenizer.encode_chat(USER)
    assert loaded.eos_token_ids == (2,)


def test_transformers_reads_a_saved_tokenizer_the_same_way(gguf_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(gguf_file)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in ("hello wo 123", "12 123 1234", "naïve — 世界 🙂", "<|im_start|>user\n"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.apply_chat_template(USER, add_generation_prompt=True, tokenize=False) == tokenizer.render_chat(USER)


def test_the_older_files_of_a_byte_level_bpe_will_do(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCAB)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 0}))
    tokenizer = Tokenizer.load(tmp_path)
    assert pieces(tokenizer, "hello wo") == ["hello", "Ġwo"]
    assert tokenizer.eos_token_ids == (0,)


def test_a_directory_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer: looked for tokenizer\.json, vocab\.json"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 0]}, "config.json": {"eos_token_id": 1}}, (2, 0)),
        ({"config.json": {"eos_token_id": 1}}, (1,)),
        ({"jserve.json": {"spec": {"eos_token_ids": [1, 2]}}}, (1, 2)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}}}, (0,)),
        ({"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, (2,)),
        ({}, ()),
    ],
)
def test_what_ends_a_text_comes_from_the_first_file_that_says(
    gguf_file: Path, tmp_path: Path, files: dict[str, object], ends: tuple[int, ...]
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    Tokenizer.load(gguf_file).backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    assert Tokenizer.load(directory).eos_token_ids == ends


def test_a_long_text_tokenizes_as_its_parts_do(gguf_file: Path) -> None:
    tokenizer = Tokenizer.load(gguf_file)
    part = "hello wo 123\n"
    times = LONG_TEXT_CHARS // len(part) + 1
    assert tokenizer.encode(part * times) == tokenizer.encode(part) * times


def test_text_that_is_not_unicode_is_an_invalid_request(gguf_file: Path) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        Tokenizer.load(gguf_file).encode("half a pair \ud800")


# --- chat templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages is empty"),
        ([{"role": "wizard", "content": "hi"}], r"messages\[0\].role is 'wizard'"),
        ([*USER, {"role": "user"}], r"messages\[1\] is"),
        ([{"role": "user", "content": 7}], r"messages\[0\] is"),
    ],
)
def test_messages_that_no_template_takes_are_named(messages: list[dict[str, str]], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        ChatTemplate(TEMPLATE, {}).render(messages)


def test_without_a_chat_template_chat_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="no chat template"):
        Tokenizer.load(write_gguf(tmp_path / "plain.gguf", template=None)).encode_chat(USER)


def test_a_template_may_refuse_and_may_not_touch_the_machine() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render(USER)
    with pytest.raises(ModelError, match="fails on these messages"):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render(USER)
    with pytest.raises(ModelError, match="does not parse"):
        ChatTemplate("{% for %}", {})


def test_templates_have_what_hugging_face_gives_them() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}",
        {},
    )
    assert template.render([*USER, *USER]) == '{"role": "user", "content": "hello"}4'


# --- token by token ---------------------------------------------------------------------------------------------------


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(ALPHABET)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


BYTES = byte_level()


@given(st.text(max_size=60), st.text(max_size=10))
def test_text_comes_out_whole_and_never_half_a_character(text: str, prompt: str) -> None:
    detokenizer = Detokenizer(BYTES.decode, BYTES.encode(prompt).ids)
    said = [detokenizer.push([token]) for token in BYTES.encode(text).ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in said)
    assert "".join(said) + detokenizer.flush() == text


@given(st.lists(st.integers(0, 255), max_size=80), st.randoms(use_true_random=False))
def test_whatever_the_bytes_and_however_cut_the_pieces_are_the_whole(ids: list[int], rng: random.Random) -> None:
    detokenizer, said, rest = Detokenizer(BYTES.decode), "", ids
    while rest:
        count = rng.randint(1, 5)
        said, rest = said + detokenizer.push(rest[:count]), rest[count:]
    assert said + detokenizer.flush() == BYTES.decode(ids)


def test_a_character_of_four_bytes_appears_with_its_last_one() -> None:
    detokenizer = Detokenizer(BYTES.decode)
    assert [detokenizer.push([token]) for token in BYTES.encode("🙂!").ids] == ["", "", "", "🙂", "!"]


def test_a_word_after_the_prompt_keeps_its_space() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"▁a": 0, "▁b": 1}, merges=[]))
    backend.decoder = tokenizers.decoders.Metaspace()
    assert backend.decode([1]) == "b"
    assert Detokenizer(backend.decode, [0]).push([1]) == " b"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_strings_cut_where_the_first_is_complete_however_the_text_comes(
    text: str, stops: list[str], size: int
) -> None:
    ends = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    expected, expected_stop = (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)
    strings, said, stop = StopStrings(stops), "", None
    for at in range(0, len(text), size):
        piece, stop = strings.push(text[at : at + size])
        said += piece
        assert expected.startswith(said)
        if stop is not None:
            break
    else:
        said += strings.flush()
    assert (said, stop) == (expected, expected_stop)


def test_what_may_start_a_stop_string_is_held_back_and_no_more() -> None:
    strings = StopStrings(["<end>"])
    assert strings.push("hello <e") == ("hello ", None)
    assert strings.push("x <") == ("<ex ", None)
    assert strings.push("end") == ("", None)
    assert strings.push(">!") == ("", "<end>")
