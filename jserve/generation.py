"""From a user's request to engine requests, and from engine outputs to text: written once for every door.

`Intake` makes prompts. A `Generation` is one request on its way: it asks an `EnginePort` for its n continuations and
turns their outputs into `Chunk`s. Pure but for the port; the gRPC servicer drives it from asyncio, `LLM` from a thread.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec

from jserve import errors
from jserve.chat_template import Message
from jserve.detokenizer import Detokenizer, StopStrings
from jserve.errors import InvalidRequest, JserveError, Unavailable
from jserve.request import EngineOutput, EngineRequest, SamplingParams, Terms
from jserve.result import Chunk, Usage
from jserve.tokenizer import Tokenizer

MAX_SALT_CHARS = 1024
MAX_ID_CHARS = 128

Deliver = Callable[[EngineOutput], None]


class EnginePort(Protocol):
    """The engine as front-ends see it. No call waits; a refusal comes back as an output with an error."""

    def is_open(self, request_id: str) -> bool:
        """Whether a request of this name is under way."""

    def add(self, request: EngineRequest, deliver: Deliver) -> None:
        """Queue a request; every output of it goes to `deliver`, until its last."""

    def abort(self, request_id: str) -> None:
        """End a request and free what it holds. Nothing more is delivered."""


class Intake:
    """Makes prompts for one model, refusing what can never be served before it costs anything."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_model_len: int, max_open: int) -> None:
        self.tokenizer = tokenizer
        self.max_open = max_open
        """Continuations that the engine takes at once."""
        self._vocab_size = vocab_size
        self._max_tokens = max_model_len
        self._max_chars = max_model_len * tokenizer.longest_token_chars

    def of_text(self, text: str) -> list[int]:
        self._check_chars(len(text))
        token_ids = self.tokenizer.encode(text) if text else []
        if not token_ids:
            raise InvalidRequest("the prompt is empty: give at least one token of text")
        return token_ids

    def of_messages(self, messages: Sequence[Message]) -> list[int]:
        text = self.tokenizer.render_chat(messages)
        self._check_chars(len(text))
        return self.tokenizer.encode(text, add_special_tokens=False)

    def of_token_ids(self, token_ids: Sequence[int]) -> list[int]:
        if len(token_ids) > self._max_tokens:
            raise InvalidRequest(
                f"the prompt has {len(token_ids)} tokens, and the context only {self._max_tokens}: shorten it"
            )
        token_ids = list(token_ids)
        for token in token_ids:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise InvalidRequest(
                    f"token id {token!r} is none of this model's: use whole numbers from 0 to {self._vocab_size - 1}"
                )
        return token_ids

    def check(self, sampling: SamplingParams, cache_salt: str, terms: Terms | None = None) -> None:
        sampling.check(self._vocab_size)
        if terms is not None:
            terms.check()
            if not _is_unicode(terms.tenant):
                raise InvalidRequest(f"tenant is {terms.tenant!r}: use text")
        if sampling.n > self.max_open:
            raise InvalidRequest(
                f"n is {sampling.n}, and {self.max_open} continuations are taken at once: lower it, "
                "or raise max_running or max_waiting"
            )
        if not isinstance(cache_salt, str) or not _is_unicode(cache_salt):
            raise InvalidRequest(f"cache_salt is {cache_salt!r}: use text")
        if len(cache_salt) > MAX_SALT_CHARS:
            raise InvalidRequest(f"cache_salt has {len(cache_salt)} characters: use at most {MAX_SALT_CHARS}")

    def generation(
        self,
        port: EnginePort,
        deliver: Deliver,
        prompt: list[int],
        sampling: SamplingParams,
        cache_salt: str = "",
        request_id: str | None = None,
        terms: Terms | None = None,
        deadline_s: float | None = None,
    ) -> Generation:
        """Checked, and not yet started. Whether the prompt fits is for the engine, which knows its limits.

        `request_id`: what the caller calls it, for `explain`; drawn if None. `deadline_s`: time until it is given up.
        """
        terms = terms or Terms()
        self.check(sampling, cache_salt, terms)
        terms.check_deadline(deadline_s)
        name = new_request_id() if request_id is None else _checked_id(request_id)
        requests = _engine_requests(name, prompt, sampling, cache_salt, self.tokenizer.eos_token_ids, terms, deadline_s)
        return Generation(port, deliver, self.tokenizer, name, sampling, requests)

    def _check_chars(self, chars: int) -> None:
        if chars > self._max_chars:
            raise InvalidRequest(
                f"the prompt has {chars} characters, more than the {self._max_chars} that could ever fit the context: "
                "shorten it"
            )


class Generation:
    """n continuations of one prompt, from start to the last chunk.

    The first continuation starts alone; the others start with its first token, so that they find the KV of the prompt
    in the prefix index instead of computing it again.
    """

    def __init__(
        self,
        port: EnginePort,
        deliver: Deliver,
        tokenizer: Tokenizer,
        request_id: str,
        sampling: SamplingParams,
        requests: Sequence[EngineRequest],
    ) -> None:
        self.request_id = request_id
        self._port = port
        self._deliver = deliver
        self._prompt_tokens = len(requests[0].token_ids)
        self._cached_tokens = 0
        self._continuations = {
            request.request_id: _Continuation(index, request, sampling, tokenizer)
            for index, request in enumerate(requests)
        }
        self._not_started = list(self._continuations.values())

    def start(self) -> None:
        """Raises InvalidRequest if its name is in use."""
        if taken := next((name for name in self._continuations if self._port.is_open(name)), None):
            raise InvalidRequest(f"request id {taken!r} is in use: choose another, or leave it out")
        self._add(self._not_started.pop(0))

    @property
    def done(self) -> bool:
        return all(continuation.done for continuation in self._continuations.values())

    @property
    def usage(self) -> Usage:
        output_tokens = sum(continuation.output_tokens for continuation in self._continuations.values())
        return Usage(self._prompt_tokens, self._cached_tokens, output_tokens)

    def feed(self, outputs: Iterable[EngineOutput]) -> list[Chunk]:
        """What these outputs mean, at most one chunk a continuation. Raises the error that one of them carries."""
        chunks: dict[int, Chunk] = {}
        for output in outputs:
            continuation = self._continuations[output.request_id]
            if continuation.done:  # the engine was ahead of our abort
                continue
            _raise_if_failed(output)
            self._begin(continuation, output)
            chunk = chunks.setdefault(continuation.index, Chunk(continuation.index))
            if continuation.feed(output, chunk):
                self._port.abort(output.request_id)
        return list(chunks.values())

    def close(self) -> None:
        """Free whatever is still running. Harmless at the end."""
        for request_id, continuation in self._continuations.items():
            if not continuation.done and continuation not in self._not_started:
                self._port.abort(request_id)
            continuation.done = True

    def _begin(self, continuation: _Continuation, output: EngineOutput) -> None:
        if continuation.index == 0:
            self._cached_tokens = output.cached_tokens
        for waiting in self._not_started:
            self._add(waiting)
        self._not_started = []

    def _add(self, continuation: _Continuation) -> None:
        self._port.add(continuation.request, self._deliver)


class _Continuation:
    """One engine request and the text that comes of it."""

    def __init__(self, index: int, request: EngineRequest, sampling: SamplingParams, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.output_tokens = 0
        self.done = False
        self._sampling = sampling
        self._detokenizer = Detokenizer(tokenizer.decode, request.token_ids)
        self._stops = StopStrings(sampling.stop)

    def feed(self, output: EngineOutput, chunk: Chunk) -> bool:
        """Add an output to a chunk. True if the text has ended before the engine knows: abort it."""
        ended = output.finish_reason is not None
        for i, token in enumerate(output.token_ids):
            self.output_tokens += 1
            chunk.token_ids.append(token)
            if output.logprobs:
                chunk.logprobs.append(output.logprobs[i])
            last = ended and i == len(output.token_ids) - 1
            if last and output.finish_reason == "stop" and token in self.request.stop_token_ids:
                chunk.stopped_by = token if token in self._sampling.stop_token_ids else None
            elif self._say(self._detokenizer.push([token]), chunk):
                return not last
        if ended:
            self._finish(output, chunk)
        return False

    def _say(self, text: str, chunk: Chunk) -> bool:
        """Add text to the chunk. True if it holds a stop string: then all is said."""
        if self.output_tokens < self._sampling.min_tokens:
            chunk.text += text
            return False
        said, stop = self._stops.push(text)
        chunk.text += said
        if stop is not None:
            chunk.stopped_by, chunk.finish_reason, self.done = stop, "stop", True
        return self.done

    def _finish(self, output: EngineOutput, chunk: Chunk) -> None:
        if not self._say(self._detokenizer.flush(), chunk):
            chunk.text += self._stops.flush()
            chunk.finish_reason = output.finish_reason
            self.done = True


def new_request_id() -> str:
    """One that nobody else draws."""
    return uuid.uuid4().hex


def _checked_id(request_id: str) -> str:
    """Printable, so that a log or a shell can hold it; a slash sets off the continuations' numbers."""
    if not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_ID_CHARS:
        raise InvalidRequest(f"request_id is {request_id!r}: use 1 to {MAX_ID_CHARS} characters, or leave it out")
    if "/" in request_id or " " in request_id or not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest(f"request_id is {request_id!r}: use ASCII letters, digits and signs, but no space or /")
    return request_id


def _engine_requests(
    name: str,
    prompt: list[int],
    sampling: SamplingParams,
    cache_salt: str,
    eos_token_ids: Sequence[int],
    terms: Terms,
    deadline_s: float | None,
) -> list[EngineRequest]:
    """One for each continuation: the same prompt, a seed of its own, and if there are several a number in its name."""
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
    ends = sorted({*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)})
    return [
        EngineRequest(
            request_id=name if sampling.n == 1 else f"{name}/{index}",
            token_ids=prompt,
            sampling=msgspec.structs.replace(sampling, n=1, seed=_wrap_int64(seed + index), stop=()),
            stop_token_ids=ends,
            cache_salt=cache_salt,
            terms=terms,
            deadline_s=deadline_s,
        )
        for index in range(sampling.n)
    ]


def _is_unicode(text: str) -> bool:
    """Whether it can be encoded: half a surrogate pair cannot."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _raise_if_failed(output: EngineOutput) -> None:
    if output.finish_reason == "abort":
        raise Unavailable("the engine ended the request: the server is shutting down")
    if output.finish_reason == "error":
        kind = getattr(errors, output.error_kind or "", JserveError)
        raise kind(output.error or "the engine gave no reason", **output.error_details)
