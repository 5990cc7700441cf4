"""From token ids, as they come, to text that may be shown: whole characters, and nothing of a stop string.

Pure: one `Detokenizer` and one `StopStrings` for each continuation, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_CONTEXT_TOKENS = range(6, 10)  # decoders look back: a space belongs to the next word, up to 4 bytes to a character
_WINDOW_TOKENS = 24
_MAX_PARTIAL = 3  # the bytes that a UTF-8 character can lack its last one: so many tokens, or characters


class Detokenizer:
    """Incremental decoding. The pieces, joined, are the decoded whole; no piece ends within a character.

    Only a window of the last tokens is decoded again; `_sent` of its characters have been given out. It last
    ended with a whole character `_pending` tokens ago.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window: list[int] = list(prompt_ids[-_CONTEXT_TOKENS[0] :])
        self._sent = len(_whole(self._decode(self._window)))
        self._pending = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        self._window += token_ids
        self._pending += len(token_ids)
        whole = _whole(text := self._decode(self._window))
        if len(whole) == len(text):
            self._pending = 0
        elif self._pending <= _MAX_PARTIAL:  # byte fallback breaks a whole run of characters until it is complete
            return ""
        piece = whole[self._sent :]
        self._sent = max(self._sent, len(whole))
        if len(self._window) > _WINDOW_TOKENS:
            self._shrink(text)
        return piece

    def _shrink(self, text: str) -> None:
        """Forget the window but for its end, cut where a character begins: there its text ends as before."""
        held = len(text) - self._sent
        for size in _CONTEXT_TOKENS:
            end = self._decode(self._window[-size:])
            if len(end) >= held and text.endswith(end):
                self._window = self._window[-size:]
                self._sent = len(end) - held
                return

    def flush(self) -> str:
        """At the end: what was held back, although its character is not complete."""
        text = self._decode(self._window)
        piece = text[self._sent :]
        self._sent = len(text)
        return piece


def _whole(text: str) -> str:
    """Without the end that more bytes could still turn into a character."""
    stripped = text.rstrip(_BROKEN)
    return text[: max(len(stripped), len(text) - _MAX_PARTIAL)]


class StopStrings:
    """Lets text through up to the first stop string, holding back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can no longer be part of a stop string, and the stop string if one is now complete."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)  # the first to be complete, so that it does not matter how the text was cut
            self._held = ""
            return text[:at], stop
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """At the end: what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
