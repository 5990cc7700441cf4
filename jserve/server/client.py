"""A client of a jserve server: `Client("localhost:8475").chat([...])`. Errors are those of `jserve.errors`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import grpc

from jserve.chat_template import Message, check_messages
from jserve.errors import InvalidRequest
from jserve.generation import new_request_id
from jserve.request import SamplingParams, Terms
from jserve.result import Chunk, Result, ResultStream, Usage
from jserve.server import convert
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.server.proto.jserve.v1 import jserve_pb2_grpc as pb_grpc
from jserve.server.status import error_of
from jserve.timeline import History

T = TypeVar("T")

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves, and within which limits."""

    model: str
    max_model_len: int
    vocab_size: int
    block_size: int
    device_blocks: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    server_version: str


class Client:
    """Safe to share between threads; each call has its own stream.

    `timeout_s` is the request's deadline. Sampling parameters are the fields of `SamplingParams`, by name. `session_id`
    is a hint that goes to the server, which does not use it yet. `request_id` is what `history` shall know it by.
    `terms` say how it is served among others: its priority, when its tokens are due, its tenant.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._stub: Any = pb_grpc.JserveStub(self._channel)  # type: ignore[no-untyped-call]

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        timeout_s: float | None = None,
        session_id: str | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
        model: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> ResultStream: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        timeout_s: float | None = None,
        session_id: str | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
        model: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result: ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        timeout_s: float | None = None,
        session_id: str | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
        model: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result | ResultStream:
        """The assistant's next message."""
        check_messages(messages)
        request = _message(
            pb.ChatRequest,
            messages=convert.messages_to_pb(messages),
            sampling=_sampling(sampling),
            session_id=session_id,
            cache_salt=cache_salt,
            request_id=(name := new_request_id() if request_id is None else request_id),
            model=model,
            terms=convert.terms_to_pb(terms),
        )
        return self._run(self._stub.Chat(request, timeout=timeout_s), stream, name)

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        timeout_s: float | None = None,
        session_id: str | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
        model: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> ResultStream: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        timeout_s: float | None = None,
        session_id: str | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
        model: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        timeout_s: float | None = None,
        session_id: str | None = None,
        cache_salt: str | None = None,
        request_id: str | None = None,
        model: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result | ResultStream:
        """What follows a text, or token ids."""
        request = _message(
            pb.GenerateRequest,
            **({"text": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": list(prompt)}}),
            sampling=_sampling(sampling),
            session_id=session_id,
            cache_salt=cache_salt,
            request_id=(name := new_request_id() if request_id is None else request_id),
            model=model,
            terms=convert.terms_to_pb(terms),
        )
        return self._run(self._stub.Generate(request, timeout=timeout_s), stream, name)

    def tokenize(self, prompt: str | Sequence[Message], *, timeout_s: float | None = None) -> list[int]:
        """The token ids of a text, or of a conversation through the chat template."""
        if isinstance(prompt, str):
            request = _message(pb.TokenizeRequest, text=prompt)
        else:
            check_messages(prompt)
            request = _message(pb.TokenizeRequest, conversation={"messages": convert.messages_to_pb(prompt)})
        return list(_call(self._stub.Tokenize, request, timeout_s).token_ids)

    def model_info(self, *, timeout_s: float | None = None) -> ModelInfo:
        answer = _call(self._stub.GetModelInfo, pb.GetModelInfoRequest(), timeout_s)
        fields = {field.name: getattr(answer, field.name) for field in answer.DESCRIPTOR.fields}
        return ModelInfo(**{**fields, "eos_token_ids": tuple(answer.eos_token_ids)})

    def stats(self, *, timeout_s: float | None = None) -> Mapping[str, float]:
        """The engine's counters, by the names of EngineStats."""
        return dict(_call(self._stub.GetStats, pb.GetStatsRequest(), timeout_s).stats)

    def history(self, request_id: str | None = None, *, timeout_s: float | None = None) -> History:
        """What has happened to a request, or to all that are remembered, and the steps of that time.

        Raises NotFound for a request that is not remembered. `jserve.explain` has ways to show it.
        """
        request = _message(pb.ExplainRequest, request_id=request_id)
        return convert.history_from_pb(_call(self._stub.Explain, request, timeout_s))

    def close(self) -> None:
        """Ends every call under way."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, call: Any, stream: bool, request_id: str) -> Result | ResultStream:
        answer = ResultStream(_events(call), call.cancel, request_id)
        if stream:
            return answer
        with answer:  # an interrupt cancels it
            return answer.result()


def _events(call: Any) -> Iterator[Chunk | Usage]:
    try:
        for response in call:
            if response.WhichOneof("event") == "chunk":
                yield convert.chunk_from_pb(response.chunk)
            else:
                yield convert.usage_from_pb(response.complete.usage)
    except grpc.RpcError as error:
        if call.cancelled():  # by us: `ResultStream.result` says so
            return
        raise error_of(error) from None


def _call(method: Any, request: Any, timeout_s: float | None) -> Any:
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise error_of(error) from None


def _sampling(given: Mapping[str, Any]) -> pb.SamplingParams:
    return convert.sampling_to_pb(SamplingParams.of(given))


def _message(kind: Any, **fields: Any) -> Any:
    """A protobuf message; what it cannot hold (a negative token id, half a Unicode pair) is the caller's mistake."""
    try:
        message = kind(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from None
    if (size := message.ByteSize()) > convert.MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"the request has {size} bytes, and servers take {convert.MAX_MESSAGE_BYTES}: shorten it")
    return message
