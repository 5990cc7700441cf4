"""What a request is, at the border between front-ends and the engine: plain messages, checked once.

A front-end (gRPC server, `LLM`) turns text into token ids and sends an `EngineRequest`; the engine answers with
`EngineOutput`s. Both travel between processes as msgpack. Text, stop strings and chat templates stay with the
front-end. A request with n > 1 becomes n engine requests that share the prompt's blocks through the prefix index.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from jserve.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKEN_IDS = 16
MAX_STOP_STRINGS = 16
MAX_STOP_IDS = 32
"""Token ids that end one request: the model's own and the request's."""
MAX_STOP_CHARS = 1024
MAX_N = 64
MAX_PRIORITY = 100
MAX_SLO_S = 86400.0
MAX_TENANT_CHARS = 256
MIN_TEMPERATURE = 1e-3
"""What is divided by less leaves the range of float32."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen. The default is greedy. `check()` tells what is wrong with one."""

    n: int = 1
    """Independent continuations of the prompt."""
    max_tokens: int | None = None
    """Output tokens at most; None goes on to the end of the context."""
    min_tokens: int = 0
    """Output tokens before an end-of-sequence or stop token may be chosen."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, if negative) the logits of tokens seen in prompt or output (CTRL, 2019)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """Same seed, same text, whatever else is in the batch; None draws one."""
    logprobs: int | None = None
    """Log-probability of each chosen token and of this many alternatives (0 to 20); None for none."""
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    """Strings that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the model's own."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SamplingParams:
        """From keyword arguments, as callers write them: a single stop string will do, and lists for tuples."""
        unknown = sorted(given.keys() - set(cls.__struct_fields__))
        if unknown:
            raise InvalidRequest(f"{unknown[0]!r} is no sampling parameter: use {', '.join(cls.__struct_fields__)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        if isinstance(stop := values.get("stop"), str):
            values["stop"] = (stop,)
        return _typed(values)

    def check(self, vocab_size: int) -> None:
        """Raise InvalidRequest naming the first field that cannot be served."""
        _typed(msgspec.structs.asdict(self))
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}: lower it")
        if self.temperature != 0:
            _number("temperature", self.temperature, MIN_TEMPERATURE, 100.0, or_else="0 (greedy), or ")
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias token id", token, 0, vocab_size - 1)
            _number(f"logit_bias of token {token}", bias, -100.0, 100.0)
        _at_most("stop", len(self.stop), MAX_STOP_STRINGS)
        if any(not s for s in self.stop):
            raise InvalidRequest("stop has an empty string: leave it out, or give at least one character")
        if any(len(s) > MAX_STOP_CHARS for s in self.stop):
            raise InvalidRequest(
                f"stop has a string of {max(map(len, self.stop))} characters: use at most {MAX_STOP_CHARS}"
            )
        _at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, vocab_size - 1)


class Terms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request is served among others. `check()` tells what is wrong with it."""

    priority: int = 0
    """Higher is sooner, where the server orders by priority: -100 to 100."""
    slo_ttft_s: float | None = None
    """When the first token is due. A request that will not have it in time is refused at once."""
    slo_tpot_s: float | None = None
    """What each further token may take."""
    tenant: str = ""
    """Tenants that compete share the server by their weights."""

    def check(self) -> None:
        """Raise InvalidRequest naming the first field that cannot be served."""
        try:
            msgspec.convert(msgspec.structs.asdict(self), Terms)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"the terms of the request cannot be read: {error}") from None
        _integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        for name in ("slo_ttft_s", "slo_tpot_s"):
            value = getattr(self, name)
            if value is not None:
                _number(name, value, 0.0, MAX_SLO_S, low_open=True)
        if len(self.tenant) > MAX_TENANT_CHARS:
            raise InvalidRequest(f"tenant has {len(self.tenant)} characters: use at most {MAX_TENANT_CHARS}")

    def check_deadline(self, deadline_s: float | None) -> None:
        """Raise InvalidRequest if the first token may come after the end."""
        if self.slo_ttft_s is not None and deadline_s is not None and self.slo_ttft_s > deadline_s:
            raise InvalidRequest(
                f"slo_ttft_s is {self.slo_ttft_s:g}, and the call's deadline is in {deadline_s:.3g} s: "
                "lower the first, or allow more time"
            )


class EngineRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One continuation to compute. `sampling` is checked, its `n` is 1 and its `seed` drawn by the front-end."""

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    stop_token_ids: list[int] = []
    """Every token id that ends this request: the model's own unless ignore_eos, and the request's."""
    cache_salt: str = ""
    """Requests share prefix blocks only with requests of the same salt (tenant)."""
    terms: Terms = Terms()
    deadline_s: float | None = None
    """Time until the request is given up, from its arrival."""


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Of one output token: its own log-probability, and the most likely tokens with theirs."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class EngineOutput(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """News of one request: new tokens, or its end, or both."""

    request_id: str
    token_ids: list[int] = []
    """New tokens. If one of `stop_token_ids` ended the request, it is the last one here (and is no text)."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a token, if asked for."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    """With finish_reason "error": what happened, for the user."""
    error_kind: str | None = None
    """With finish_reason "error": the class name of the JserveError to raise."""
    error_details: dict[str, float] = {}
    """With finish_reason "error": the keywords of that class."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens whose KV was found, when the request was first admitted."""


def _typed(values: Mapping[str, Any]) -> SamplingParams:
    """Each value of its field's type, or InvalidRequest."""
    try:
        return msgspec.convert(values, SamplingParams)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        name = re.findall(r"\w+", place.partition("$.")[2])[0]
        raise InvalidRequest(f"{name} is {values[name]!r}: {problem.lower()}") from None


def _integer(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value!r}: use a whole number from {low} to {high}")


def _number(name: str, value: float, low: float, high: float, *, low_open: bool = False, or_else: str = "") -> None:
    if not low <= value <= high or (low_open and value == low):
        bounds = f"above {low:g}, up to {high:g}" if low_open else f"from {low:g} to {high:g}"
        raise InvalidRequest(f"{name} is {value!r}: use {or_else}a number {bounds}")


def _at_most(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"{name} has {count} entries: use at most {limit}")
