"""An OpenAI-compatible server in a few lines of asyncio: it echoes how many words it was sent, one piece at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeServer:
    """What it does, and what it saw."""

    pieces: int = 4
    tokens_per_piece: int = 2
    delay_s: float = 0.001
    status: int = 200
    break_off: bool = False
    usage: bool = True
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0
    most: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        self.now += 1
        self.most = max(self.most, self.now)
        if self.status != 200:
            writer.write(f"HTTP/1.1 {self.status} No\r\nConnection: close\r\n\r\nno room left".encode())
        else:
            await self._stream(writer, self.bodies[-1])
        self.now -= 1
        writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        prompt = sum(len(m["content"].split()) for m in body["messages"])
        for n in range(self.pieces):
            await asyncio.sleep(self.delay_s)
            self._event(writer, {"choices": [{"delta": {"content": f" reply{prompt}.{n}"}}]})
        if self.break_off:
            self._event(writer, {"error": "out of blocks"})
        elif self.usage:
            tokens = self.pieces * self.tokens_per_piece
            told = {
                "prompt_tokens": prompt,
                "completion_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": prompt // 2},
            }
            self._event(writer, {"choices": [], "usage": told})
        self._chunks(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        self._chunks(writer, b"data: " + json.dumps(event).encode() + b"\n\n")

    @staticmethod
    def _chunks(writer: asyncio.StreamWriter, data: bytes) -> None:
        """Cut in the middle of a line, as a network may."""
        for part in (data[:7], data[7:]):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")


@asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[FakeServer]:
    server = await asyncio.start_server(fake.answer, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()
        await server.wait_closed()
