"""The gRPC service jserve.v1.Jserve: parses, admits, streams. What a request means is in `jserve.generation`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from jserve import __version__
from jserve.chat_template import Message
from jserve.doors import EngineInfo
from jserve.errors import DeadlineExceeded, InvalidRequest, JserveError, NotFound, Overloaded, Unavailable
from jserve.generation import Generation, Intake
from jserve.request import EngineOutput
from jserve.server import convert
from jserve.server.engine_client import EngineClient
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.server.proto.jserve.v1 import jserve_pb2_grpc as pb_grpc
from jserve.server.status import code_of, trailers_of
from jserve.tokenizer import LONG_TEXT_CHARS

T = TypeVar("T")

_MESSAGE_CHARS = 32  # what a template puts around one


@dataclass(frozen=True)
class Serving:
    """What there is once the model is ready."""

    engine: EngineClient
    intake: Intake
    info: EngineInfo
    model_names: frozenset[str]
    """What a request may call the model."""


class JserveServicer(pb_grpc.JserveServicer):
    """One for the process. `serving` is None while the model loads; `refusing` says why no request is taken."""

    def __init__(self) -> None:
        self.serving: Serving | None = None
        self.refusing: str | None = "the model is loading: ask again when grpc.health.v1 says SERVING"
        self.under_way = 0
        """Continuations of the Generate and Chat calls that have not ended, wherever they are."""

    # --- the methods of the service ---------------------------------------------------------------------------------

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async def prompt(intake: Intake) -> list[int]:
            if request.WhichOneof("input") == "token_ids":
                return intake.of_token_ids(request.token_ids.ids)
            return await _off_loop(len(request.text), lambda: intake.of_text(request.text))

        await self._answer(context, self._stream(request, prompt, context))

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        async def prompt(intake: Intake) -> list[int]:
            return await _encode_chat(intake, convert.messages_from_pb(request.messages))

        await self._answer(context, self._stream(request, prompt, context))

    async def Tokenize(self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext) -> pb.TokenizeResponse:
        async def answer() -> pb.TokenizeResponse:
            intake = self._admit(request.model).intake
            if request.WhichOneof("input") == "conversation":
                token_ids = await _encode_chat(intake, convert.messages_from_pb(request.conversation.messages))
            else:
                token_ids = await _off_loop(len(request.text), lambda: intake.of_text(request.text))
            return pb.TokenizeResponse(token_ids=token_ids)

        return await self._answer(context, answer())

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        async def answer() -> pb.GetModelInfoResponse:
            serving = self._serving()
            tokenizer, info = serving.intake.tokenizer, serving.info
            return pb.GetModelInfoResponse(
                model=info.model,
                max_model_len=min(info.max_model_len, info.block_size * info.device_blocks),
                vocab_size=info.vocab_size,
                block_size=info.block_size,
                device_blocks=info.device_blocks,
                eos_token_ids=tokenizer.eos_token_ids,
                has_chat_template=tokenizer.chat_template is not None,
                server_version=__version__,
            )

        return await self._answer(context, answer())

    async def GetStats(self, request: pb.GetStatsRequest, context: grpc.aio.ServicerContext) -> pb.GetStatsResponse:
        async def answer() -> pb.GetStatsResponse:
            return pb.GetStatsResponse(stats=await self._serving().engine.stats())

        return await self._answer(context, answer())

    async def Explain(self, request: pb.ExplainRequest, context: grpc.aio.ServicerContext) -> pb.ExplainResponse:
        async def answer() -> pb.ExplainResponse:
            name = request.request_id if request.HasField("request_id") else None
            history = await self._serving().engine.history(name)
            return await asyncio.to_thread(convert.history_to_pb, history)  # all of it would hold up every stream

        return await self._answer(context, answer())

    # --- admission --------------------------------------------------------------------------------------------------

    def _serving(self) -> Serving:
        if self.serving is None:
            raise Unavailable(self.refusing or "the model is not ready")
        return self.serving

    def _admit(self, model: str) -> Serving:
        """Refuse before anything is spent on it."""
        if self.refusing is not None:
            raise Unavailable(self.refusing)
        serving = self._serving()
        if model and model not in serving.model_names:
            raise NotFound(f"model {model!r} is not served here: this server has {serving.info.model!r}")
        return serving

    @contextmanager
    def _places(self, count: int, limit: int) -> Iterator[None]:
        """Room for the continuations of one call, from before its prompt is tokenized until its last word is out."""
        if self.under_way + count > limit:
            raise Overloaded(
                f"{self.under_way} requests are under way of {limit} that this server takes: retry later",
                retry_after_s=1.0,
            )
        self.under_way += count
        try:
            yield
        finally:
            self.under_way -= count

    # --- streaming --------------------------------------------------------------------------------------------------

    async def _stream(
        self,
        request: pb.GenerateRequest | pb.ChatRequest,
        prompt: Callable[[Intake], Awaitable[list[int]]],
        context: grpc.aio.ServicerContext,
    ) -> None:
        sampling = convert.sampling_from_pb(request.sampling)
        serving = self._admit(request.model)
        intake = serving.intake
        terms = convert.terms_from_pb(request.terms)
        intake.check(sampling, request.cache_salt, terms)
        terms.check_deadline(context.time_remaining())
        with self._places(sampling.n, intake.max_open):
            token_ids = await prompt(intake)
            outputs: asyncio.Queue[EngineOutput] = asyncio.Queue()
            generation = intake.generation(
                serving.engine,
                outputs.put_nowait,
                token_ids,
                sampling,
                request.cache_salt,
                request.request_id if request.HasField("request_id") else None,
                terms,
                context.time_remaining(),
            )
            try:
                async with asyncio.timeout(context.time_remaining()):
                    await _write(generation, outputs, context)
            except TimeoutError:
                raise DeadlineExceeded("the call's deadline has passed") from None

    async def _answer(self, context: grpc.aio.ServicerContext, work: Awaitable[T]) -> T:
        """Errors that are for the user become their status."""
        try:
            return await work
        except JserveError as error:
            await context.abort(code_of(error), str(error), trailers_of(error))
            raise AssertionError("abort raises") from error


async def _write(
    generation: Generation, outputs: asyncio.Queue[EngineOutput], context: grpc.aio.ServicerContext
) -> None:
    """Chunks as they come; a slow reader gets several tokens in one. Left in any way, nothing stays in the engine."""
    generation.start()
    try:
        while not generation.done:
            news = [await outputs.get()]
            while not outputs.empty():
                news.append(outputs.get_nowait())
            for chunk in generation.feed(news):
                await context.write(convert.chunk_to_pb(chunk))
        await context.write(convert.usage_to_pb(generation.usage, generation.request_id))
    finally:
        generation.close()


async def _encode_chat(intake: Intake, messages: Sequence[Message]) -> list[int]:
    chars = sum(len(message["content"]) + _MESSAGE_CHARS for message in messages)
    return await _off_loop(chars, lambda: intake.of_messages(messages))


async def _off_loop(chars: int, work: Callable[[], T]) -> T:
    """Tokenizing a long text would hold up every stream: a thread does it."""
    return work() if chars < LONG_TEXT_CHARS else await asyncio.to_thread(work)


class RefuseMalformed(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """A message that is no protobuf, or has text that is not UTF-8, gets INVALID_ARGUMENT instead of INTERNAL."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        parse = handler.request_deserializer
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def behave(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                parsed = parse(request)
            except Exception as error:  # protobuf's DecodeError, whichever backend it has
                problem = InvalidRequest(f"the request cannot be read: {error} (is all text valid UTF-8?)")
                await context.abort(code_of(problem), str(problem))
            return await inner(parsed, context)

        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(behave, response_serializer=handler.response_serializer)
