"""How the closed loop talks to a server: one streaming chat call, over gRPC or OpenAI-compatible HTTP.

Both are as light as asyncio allows: the client shares the machine's cores with the server it measures.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

CALL_TIMEOUT_S = 300.0
Message = Mapping[str, str]


class ChatError(Exception):
    """A server refused, broke off or answered something else than a chat stream."""


@dataclass(frozen=True)
class Usage:
    """What the server says it did. Tokens are counted here, never by chunks."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    """None: the server does not tell."""


class Transport(Protocol):
    """One server."""

    def chat(self, messages: Sequence[Message], max_tokens: int, salt: str) -> AsyncIterator[str | Usage]:
        """Greedy reply of exactly `max_tokens` tokens: pieces of text as they come, then the usage.

        Calls of different salts share no cached prefix, where the server has salts.
        """

    async def close(self) -> None: ...


class JserveTransport:
    """jserve.v1 over one gRPC channel."""

    def __init__(self, target: str) -> None:
        import grpc

        from jserve.server.proto.jserve.v1 import jserve_pb2, jserve_pb2_grpc

        self._pb = jserve_pb2
        self._target = target
        self._failure = grpc.RpcError
        self._channel = grpc.aio.insecure_channel(target)
        self._stub: Any = jserve_pb2_grpc.JserveStub(self._channel)  # type: ignore[no-untyped-call]

    async def chat(self, messages: Sequence[Message], max_tokens: int, salt: str) -> AsyncIterator[str | Usage]:
        pb = self._pb
        request = pb.ChatRequest(
            messages=[pb.ChatMessage(role=m["role"], content=m["content"]) for m in messages],
            sampling=pb.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            cache_salt=salt,
        )
        try:
            async for response in self._stub.Chat(request, timeout=CALL_TIMEOUT_S):
                if response.HasField("complete"):
                    usage = response.complete.usage
                    yield Usage(usage.prompt_tokens, usage.output_tokens, usage.cached_tokens)
                else:
                    yield response.chunk.text
        except self._failure as error:
            raise ChatError(f"jserve on {self._target}: {error.code().name}: {error.details()}") from error

    async def stats(self) -> dict[str, float]:
        """The engine's counters by the names of `EngineStats`."""
        return dict((await self._stub.GetStats(self._pb.GetStatsRequest(), timeout=CALL_TIMEOUT_S)).stats)

    async def close(self) -> None:
        await self._channel.close()


@dataclass(frozen=True)
class OpenAITransport:
    """POST /v1/chat/completions with server-sent events, one connection a call."""

    base_url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What this server wants in the body besides: how it is told to go on past the end of sequence."""

    async def chat(self, messages: Sequence[Message], max_tokens: int, salt: str) -> AsyncIterator[str | Usage]:
        body = {
            "model": self.model,
            "messages": [dict(m) for m in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"cache_salt": salt} if salt else {}),
            **self.extra,
        }
        async with asyncio.timeout(CALL_TIMEOUT_S):
            async for line in post(f"{self.base_url}/v1/chat/completions", json.dumps(body).encode()):
                if not line.startswith(b"data:") or line == b"data: [DONE]":
                    continue
                event = json.loads(line[5:])
                if event.get("error"):
                    raise ChatError(f"{self.base_url} broke off: {event['error']}")
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text
                if usage := event.get("usage"):
                    details = usage.get("prompt_tokens_details") or {}
                    yield Usage(usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens"))

    async def close(self) -> None: ...


async def post(url: str, body: bytes) -> AsyncIterator[bytes]:
    """The lines of the answer to one HTTP/1.1 POST of JSON, as they arrive."""
    parts = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    except OSError as error:
        raise ChatError(f"{url}: {error}") from error
    try:
        head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        status, chunked = await _response_head(reader)
        rest = b""
        said = []
        async for data in _body(reader, chunked):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if status == 200:
                    yield line.rstrip(b"\r")
                else:
                    said.append(line)
        if status != 200:
            raise ChatError(f"{url} answered {status}: {b' '.join([*said, rest])[:500].decode(errors='replace')}")
        if rest:
            yield rest
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise ChatError(f"{url}: {error or type(error).__name__}") from error
    finally:
        writer.close()


async def _response_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the body comes in chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    return int(head[0].split()[1]), any(h.startswith("transfer-encoding:") and "chunked" in h for h in head)


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    while True:
        if not chunked:
            data = await reader.read(65536)
        else:
            size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
            data = (await reader.readexactly(size + 2))[:size]
        if not data:
            return
        yield data
