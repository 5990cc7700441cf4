"""What a caller gets back, the same from `LLM` and from `Client`: chunks as they come, and the whole at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from jserve.errors import Unavailable
from jserve.request import FinishReason, TokenLogprobs


@dataclass(slots=True)
class Chunk:
    """New output of continuation `index`."""

    index: int = 0
    text: str = ""
    """May be empty, while a character or a possible stop string is not complete."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry a token, if asked for."""
    finish_reason: FinishReason | None = None
    """On the continuation's last chunk."""
    stopped_by: str | int | None = None
    """The stop string or stop token that ended it, where one did."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all continuations together; the prompt counts once."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Choice:
    """One whole continuation."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None

    def append(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason
        self.stopped_by = chunk.stopped_by


@dataclass(frozen=True)
class Result:
    """A finished answer. With n > 1, `text` and its like are those of the first continuation."""

    choices: list[Choice]
    usage: Usage
    request_id: str
    """For `explain`."""
    ttft_s: float
    """From the call to the first token, as the caller saw it."""
    duration_s: float

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def prompt_tokens(self) -> int:
        return self.usage.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self.usage.cached_tokens

    @property
    def output_tokens(self) -> int:
        return self.usage.output_tokens


class ResultStream(Iterator[Chunk]):
    """An answer under way: iterate over its chunks, then ask for `result()`. Leaving it early cancels it."""

    def __init__(self, events: Iterator[Chunk | Usage], cancel: Callable[[], None], request_id: str) -> None:
        self.request_id = request_id
        self._events = events
        self._cancel = cancel
        self._choices: dict[int, Choice] = {}
        self._usage: Usage | None = None
        self._start_s = time.perf_counter()
        self._ttft_s = self._duration_s = 0.0

    def __next__(self) -> Chunk:
        for event in self._events:
            self._duration_s = time.perf_counter() - self._start_s
            if isinstance(event, Usage):
                self._usage = event
                continue
            self._ttft_s = self._ttft_s or self._duration_s
            self._choices.setdefault(event.index, Choice()).append(event)
            return event
        raise StopIteration

    def result(self) -> Result:
        """The whole answer, waiting for what is still to come."""
        for _ in self:
            pass
        if self._usage is None:
            raise Unavailable("the stream was closed before its end: ask again, and read it to the end")
        choices = [self._choices[index] for index in sorted(self._choices)]
        return Result(choices, self._usage, self.request_id, self._ttft_s, self._duration_s)

    def close(self) -> None:
        """Cancel what is still to come. Harmless at the end."""
        self._cancel()
        self._events = iter(())

    def __del__(self) -> None:
        self._cancel()  # also where nobody ever asked for the first chunk

    def __enter__(self) -> ResultStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
