"""A model directory with a tokenizer of bytes and a ChatML template, and nothing else."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from jserve.chat_template import ChatTemplate
from jserve.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EOS = 258


def byte_tokenizer(template: str | None = CHATML) -> Tokenizer:
    """Ids 0 to 255 are bytes, 256 to 258 <|endoftext|>, <|im_start|>, <|im_end|>."""
    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, (EOS,), ChatTemplate(template, {}) if template else None)


def write_byte_model(directory: Path, template: str | None = CHATML) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    byte_tokenizer(template).save(directory)
    return directory


def ascii_tokenizer() -> Tokenizer:
    """For the tiny models of 128 tokens: ids 0 to 2 are special (2 ends a turn), then newline and printable ASCII."""
    chars = [chr(code) for code in range(33, 127)]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\u010a", "\u0120", *chars]  # byte-level for newline, space
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(words[:3])
    return Tokenizer(backend, (2,), ChatTemplate(CHATML, {}))
