"""Between the protobuf messages of jserve.v1 and jserve's own: one function for each and each way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from jserve.errors import InvalidRequest
from jserve.request import FinishReason, SamplingParams, Terms, TokenLogprobs
from jserve.result import Chunk, Usage
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.timeline import History, Moment, StepRecord, Timeline

MAX_MESSAGE_BYTES = 64 << 20
"""A request may have so many; parsing a larger one would hold up every stream."""

_SCALARS = tuple(
    field.name for field in pb.SamplingParams.DESCRIPTOR.fields if field.has_presence and field.message_type is None
)
_FINISH_TO_PB = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_FINISH_FROM_PB: dict[int, FinishReason] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    return SamplingParams(
        **given,
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
    )


def sampling_to_pb(sampling: SamplingParams) -> pb.SamplingParams:
    given = {name: value for name in _SCALARS if (value := getattr(sampling, name)) is not None}
    try:
        return pb.SamplingParams(
            **given, logit_bias=sampling.logit_bias, stop=sampling.stop, stop_token_ids=sampling.stop_token_ids
        )
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the sampling parameters cannot be sent: {error}") from None


_TERMS = tuple(field.name for field in pb.Terms.DESCRIPTOR.fields)


def terms_from_pb(message: pb.Terms) -> Terms:
    return Terms(**{name: getattr(message, name) for name in _TERMS if message.HasField(name)})


def terms_to_pb(terms: Terms | None) -> pb.Terms | None:
    if terms is None:
        return None
    terms.check()
    return pb.Terms(**{name: value for name in _TERMS if (value := getattr(terms, name)) is not None})


def messages_from_pb(messages: Iterable[pb.ChatMessage]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def messages_to_pb(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """As protobuf's constructors take them."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def chunk_to_pb(chunk: Chunk) -> pb.GenerateResponse:
    message = pb.Chunk(index=chunk.index, text=chunk.text, token_ids=chunk.token_ids)
    for entry in chunk.logprobs:
        message.logprobs.add(logprob=entry.logprob, top_ids=entry.top_ids, top_logprobs=entry.top_logprobs)
    if chunk.finish_reason is not None:
        message.finish_reason = _FINISH_TO_PB[chunk.finish_reason]
    if isinstance(chunk.stopped_by, str):
        message.stop_string = chunk.stopped_by
    elif chunk.stopped_by is not None:
        message.stop_token_id = chunk.stopped_by
    return pb.GenerateResponse(chunk=message)


def chunk_from_pb(message: pb.Chunk) -> Chunk:
    logprobs = [TokenLogprobs(e.logprob, list(e.top_ids), list(e.top_logprobs)) for e in message.logprobs]
    finish = _FINISH_FROM_PB.get(message.finish_reason) if message.HasField("finish_reason") else None
    by = message.WhichOneof("stopped_by")
    stopped_by = getattr(message, by) if by else None
    return Chunk(message.index, message.text, list(message.token_ids), logprobs, finish, stopped_by)


def usage_to_pb(usage: Usage, request_id: str) -> pb.GenerateResponse:
    counts = pb.Usage(
        prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens, output_tokens=usage.output_tokens
    )
    return pb.GenerateResponse(complete=pb.Complete(usage=counts, request_id=request_id))


def usage_from_pb(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.output_tokens)


def history_to_pb(history: History) -> pb.ExplainResponse:
    """Field by field: the messages have the names of the structs."""
    return pb.ExplainResponse(
        now_s=history.now_s,
        timelines=[
            pb.Timeline(
                request_id=timeline.request_id,
                moments=[pb.Moment(**msgspec.structs.asdict(moment)) for moment in timeline.moments],
                forgotten=timeline.forgotten,
            )
            for timeline in history.timelines
        ],
        steps=[pb.Step(**msgspec.structs.asdict(step)) for step in history.steps],
    )


def history_from_pb(message: pb.ExplainResponse) -> History:
    return History(
        message.now_s,
        [
            Timeline(
                timeline.request_id,
                [Moment(m.time_s, m.kind, m.by if m.HasField("by") else None, m.detail) for m in timeline.moments],
                timeline.forgotten,
            )
            for timeline in message.timelines
        ],
        [StepRecord(*(getattr(step, name) for name in StepRecord.__struct_fields__)) for step in message.steps],
    )
