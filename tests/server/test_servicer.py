"""Admission: who is counted, and from when on."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import grpc
import pytest
from byte_model import byte_tokenizer

from jserve.doors import EngineInfo
from jserve.generation import Intake
from jserve.server.engine_client import EngineClient
from jserve.server.frontend import _address
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.server.servicer import JserveServicer, Serving
from jserve.tokenizer import LONG_TEXT_CHARS


class Aborted(Exception):
    """A call's status."""


class Call:
    """A ServicerContext that nobody listens to."""

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object = ()) -> None:
        raise Aborted(f"{code.name}: {details}")

    def time_remaining(self) -> None:
        return None


class SlowIntake(Intake):
    """Tokenizes when told to, and finds nothing."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer(), 259, 10**9, max_open=3)
        self.go_on = threading.Event()

    def of_text(self, text: str) -> list[int]:
        assert self.go_on.wait(20)
        return super().of_text("")


def ask(n: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="x" * LONG_TEXT_CHARS, sampling=pb.SamplingParams(n=n))


def test_a_prompt_that_is_still_being_tokenized_has_its_places() -> None:
    intake, call = SlowIntake(), cast(Any, Call())
    info = EngineInfo("m", "m", 259, 1000, 16, 100, 64, "none", "simulated", 0, 0)
    servicer = JserveServicer()
    servicer.serving = Serving(cast(EngineClient, None), intake, info, frozenset({"m"}))
    servicer.refusing = None

    async def work() -> None:
        first = asyncio.create_task(servicer.Generate(ask(2), call))
        await asyncio.sleep(0)
        with pytest.raises(Aborted, match="RESOURCE_EXHAUSTED: 2 requests are under way of 3"):
            await servicer.Generate(ask(2), call)
        intake.go_on.set()
        with pytest.raises(Aborted, match="INVALID_ARGUMENT: the prompt is empty"):
            await first
        assert servicer.under_way == 0

    asyncio.run(work())


def test_an_address_can_be_dialled_as_it_is_printed() -> None:
    assert _address("127.0.0.1", 8475) == "127.0.0.1:8475"
    assert _address("::1", 8475) == "[::1]:8475"
