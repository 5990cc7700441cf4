"""The detokenizer on long and broken output: its work a token is bounded, and its text is the whole's all the same."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers.decoders import ByteFallback, Fuse
from tokenizers.decoders import Sequence as Decoders

from jserve.detokenizer import Detokenizer

TOKENS = 1500
BOUND = 40  # tokens decoded again for one that comes


class Counting:
    """A decoder that knows how much it was given at most."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.most = max(self.most, len(ids))
        return self.text(ids)

    def text(self, ids: Sequence[int]) -> str:
        """Byte-level: a replacement character for each broken part."""
        return bytes(ids).decode(errors="replace")


class Fallback(Counting):
    """As SentencePiece models: one broken byte breaks the whole run of bytes. 256 is a word."""

    _decoder = Decoders([ByteFallback(), Fuse()])

    def text(self, ids: Sequence[int]) -> str:
        return self._decoder.decode([f"<0x{id:02X}>" if id < 256 else "word" for id in ids])


def pieces(decoder: Counting, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decoder)
    return [*(detokenizer.push([id]) for id in ids), detokenizer.flush()]


BROKEN = [
    b"\x80",
    b"\xff",
    b"\xf0\x9f\x98",
    b"a\xf0\x9f",
    b"\xe2\x82\xf0\x9f\x98\x80",
    random.Random(1).randbytes(TOKENS),
]


@pytest.mark.parametrize("unit", BROKEN)
def test_endless_broken_bytes_lose_nothing_and_cost_no_more_than_text(unit: bytes) -> None:
    decoder, ids = Counting(), list(unit * TOKENS)[:TOKENS]
    assert "".join(pieces(decoder, ids)) == decoder.text(ids)
    assert decoder.most < BOUND


def test_characters_in_byte_fallback_follow_each_other_whole_however_many() -> None:
    decoder, text = Fallback(), "🙂é漢🙂🙂" * (TOKENS // 17)
    said = pieces(decoder, list(text.encode()))
    assert [piece for piece in said if piece] == list(text)
    assert decoder.most < BOUND


def test_words_among_characters_in_byte_fallback_keep_their_place() -> None:
    decoder, ids = Fallback(), [256, *"🙂é漢🙂".encode(), 256] * 100
    assert "".join(pieces(decoder, ids)) == decoder.text(ids) == "word🙂é漢🙂word" * 100
