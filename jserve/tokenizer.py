"""Text to token ids and back, from a model directory or a GGUF file.

Owns the `tokenizers` object, the chat template and the end-of-sequence ids. A GGUF file's vocabulary takes seconds to
read, so what is built from one is kept under the cache root as an ordinary tokenizer directory. The engine process
never imports this module.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jserve.chat_template import ChatTemplate, Message
from jserve.config import cache_root
from jserve.errors import InvalidRequest, ModelError, Unsupported
from jserve.publish import publish_directory

LONG_TEXT_CHARS = 4096
"""From here on encoding releases the interpreter lock, so that it is worth a thread."""

_GGUF_FORMAT = 1  # part of the cache key: raise it when what is built from a GGUF file changes


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer. Safe to share between threads."""

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    chat_template: ChatTemplate | None = None

    @classmethod
    def load(cls, model: Path) -> Tokenizer:
        """Of a model directory or a GGUF file."""
        return _from_gguf(model) if model.is_file() else _from_directory(model)

    def save(self, directory: Path) -> None:
        """Write the files that `load` reads, among a model's others."""
        template = self.chat_template
        config = {
            **(template.special_tokens if template else {}),
            **({"chat_template": template.source} if template else {}),
        }
        self.backend.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")
        (directory / "generation_config.json").write_text(
            json.dumps({"eos_token_id": list(self.eos_token_ids)}), "utf-8"
        )

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size())

    @cached_property
    def longest_token_chars(self) -> int:
        """No text of n tokens has more than n times as many characters."""
        return max(map(len, self.backend.get_vocab()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; of a plain prompt, with the special tokens that the model puts around one (such as BOS)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # the library would call it "not a str"
            raise InvalidRequest(f"the text is not valid Unicode at character {error.start}: {error.reason}") from None
        if len(text) < LONG_TEXT_CHARS:
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        else:
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The conversation as the model's chat template writes it, ready for the assistant's next message."""
        if self.chat_template is None:
            raise Unsupported("the model has no chat template: use Generate with a plain prompt, or a chat model")
        return self.chat_template.render(messages)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of `render_chat`: the template has put every special token itself."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; ids outside the vocabulary have none."""
        return str(self.backend.decode(token_ids, skip_special_tokens=True))


# --- directories ------------------------------------------------------------------------------------------------------


def _from_directory(directory: Path) -> Tokenizer:
    config = _json(directory / "tokenizer_config.json")
    backend = _backend(directory, config)
    special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    source = _template_source(directory, config)
    named = {name: text for name, text in special.items() if text is not None}
    return Tokenizer(
        backend, _eos_ids(directory, backend, special["eos_token"]), ChatTemplate(source, named) if source else None
    )


def _backend(directory: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """tokenizer.json, or what transformers can make of older files (vocab.json with merges.txt, tokenizer.model)."""
    ready = directory / "tokenizer.json"
    if ready.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(ready))
        except Exception as error:  # the Rust library raises bare Exceptions
            raise ModelError(f"{ready} is not a tokenizer that the tokenizers library can read: {error}") from None
    if not any((directory / name).is_file() for name in _OLDER_FILES):
        raise ModelError(
            f"{directory} has no tokenizer: looked for tokenizer.json, {', '.join(_OLDER_FILES)}; "
            "copy it from the model's source"
        )
    from transformers import AutoTokenizer  # slow to import, so only here

    try:
        made = AutoTokenizer.from_pretrained(directory, local_files_only=True).backend_tokenizer
        assert isinstance(made, tokenizers.Tokenizer)
        return made
    except Exception as error:  # whatever a model's files make transformers raise
        raise ModelError(f"transformers cannot make a tokenizer of the files in {directory}: {error}") from None


_OLDER_FILES = ("vocab.json", "tokenizer.model")


def _eos_ids(directory: Path, backend: tokenizers.Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """The first source that says: generation_config.json (as transformers' generate), config.json, the tokenizer."""
    converted = _json(directory / "jserve.json").get("spec", {})  # a checkpoint that `jserve convert` wrote
    for said in (
        _json(directory / "generation_config.json").get("eos_token_id"),
        _json(directory / "config.json").get("eos_token_id"),
        converted.get("eos_token_ids") or None,
    ):
        if said is not None:
            return tuple(said) if isinstance(said, list) else (int(said),)
    named = backend.token_to_id(eos_token) if eos_token is not None else None
    return () if named is None else (named,)


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    said = config.get("chat_template")
    if isinstance(said, list):  # several, by name
        said = {entry.get("name"): entry.get("template") for entry in said}.get("default")
    return said if isinstance(said, str) else None


def _token_text(said: Any) -> str | None:
    """A special token as configurations write it: a string, or an object with its `content`."""
    content = said.get("content") if isinstance(said, dict) else said
    return content if isinstance(content, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    return content if isinstance(content, dict) else {}


# --- GGUF -------------------------------------------------------------------------------------------------------------

_CONTROL = 3  # a GGUF token type: not text
_DIGITS = tokenizers.pre_tokenizers.Digits(individual_digits=True)
_BYTES_AFTER_REGEX = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2_WORDS = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _from_gguf(file: Path) -> Tokenizer:
    """Built once for each file, then loaded from the cache root like any model directory."""
    stat = file.stat()
    identity = f"{_GGUF_FORMAT} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    kept = cache_root() / "tokenizers" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if not (kept / "tokenizer.json").is_file():
        built = _read_gguf(file)
        try:
            with publish_directory(kept) as staging:
                built.save(staging)
        except OSError:  # a read-only or full cache costs seconds, not the answer
            return built
    return _from_directory(kept)


def _read_gguf(file: Path) -> Tokenizer:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(file)).fields
    except Exception as error:  # the reader raises whatever the bytes make it stumble over
        raise ModelError(f"{file} cannot be read as GGUF: {error}") from None

    def field(name: str, default: Any = None) -> Any:
        found = fields.get(f"tokenizer.{name}")
        return default if found is None else found.contents()

    tokens: list[str] | None = field("ggml.tokens")
    if tokens is None:
        raise ModelError(f"{file} has no tokenizer: looked for the field tokenizer.ggml.tokens")
    kind = field("ggml.model")
    if kind != "gpt2":
        raise ModelError(f"{file} has a tokenizer of kind {kind!r}, and only gpt2 (byte-level BPE) is read from GGUF: "
                         "put it in a directory with the model's tokenizer.json")  # fmt: skip
    types = field("ggml.token_type", [])
    special = [token for token, type_ in zip(tokens, types, strict=False) if type_ == _CONTROL]
    bos = field("ggml.bos_token_id") if field("ggml.add_bos_token", False) else None
    backend = _byte_level_bpe(tokens, field("ggml.merges", []), special, _words(field("ggml.pre", "default"), file))
    if bos is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    named = {f"{name}_token": field(f"ggml.{name}_token_id") for name in ("bos", "eos")}
    texts = {name: tokens[id_] for name, id_ in named.items() if id_ is not None}
    source = field("chat_template")
    ends = {id_ for id_ in (field("ggml.eos_token_id"), field("ggml.eot_token_id")) if id_ is not None}
    return Tokenizer(backend, tuple(sorted(ends)), ChatTemplate(source, texts) if source else None)


def _words(name: str, file: Path) -> Any:
    """How text is cut before the merges, by the name that the GGUF file gives to it."""
    regex = tokenizers.Regex(_LLAMA3_WORDS)
    known = {
        "smollm": tokenizers.pre_tokenizers.Sequence([_DIGITS, _GPT2_WORDS]),
        "gpt-2": _GPT2_WORDS,
        "llama-bpe": tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Split(regex, behavior="isolated"), _BYTES_AFTER_REGEX]
        ),
    }
    if name not in known:
        raise ModelError(f"{file} cuts words as {name!r}, and jserve knows {', '.join(known)}: "
                         "put it in a directory with the model's tokenizer.json")  # fmt: skip
    return known[name]


def _byte_level_bpe(tokens: list[str], merges: list[str], special: list[str], words: Any) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = words
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    return backend
