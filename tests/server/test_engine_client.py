"""The front-end's end of the engine process: nothing that happens to one caller may leave another one waiting."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from running_server import HERE

from jserve.config import EngineConfig
from jserve.engine_loop import TellStats
from jserve.errors import Unavailable
from jserve.request import EngineOutput, EngineRequest, SamplingParams
from jserve.server.engine_client import EngineClient

SIMULATED = "simulated_engine:make"
LONG = SamplingParams(max_tokens=900)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine process finds the simulated engine."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)


def with_engine(work: Callable[[EngineClient], Awaitable[Any]]) -> None:
    """Run `work` with a client whose engine is ready, and end both."""

    async def run() -> None:
        client = await EngineClient.start(EngineConfig(), SIMULATED)
        try:
            await asyncio.wait_for(client.ready(), 60)
            await asyncio.wait_for(work(client), 30)
        finally:
            await client.stop()

    asyncio.run(run())


def request(name: str) -> EngineRequest:
    return EngineRequest(request_id=name, token_ids=[1, 2, 3], sampling=LONG)


def test_an_answer_to_somebody_who_was_cancelled_is_dropped() -> None:
    async def work(client: EngineClient) -> None:
        asked = asyncio.create_task(client.stats())
        await asyncio.sleep(0)
        (ticket,) = client._asked
        asked.cancel()
        client._take(TellStats(ticket, {}))  # before the task has had its turn
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await client.stats())["running"] == 0

    with_engine(work)


def test_a_defect_in_the_front_end_ends_every_stream_and_the_engine() -> None:
    async def work(client: EngineClient) -> None:
        ends: asyncio.Queue[EngineOutput] = asyncio.Queue()

        def broken(output: EngineOutput) -> None:
            raise RuntimeError("a defect")

        client.add(request("innocent"), lambda output: output.finish_reason and ends.put_nowait(output))
        client.add(request("broken"), broken)
        end = await ends.get()
        assert (end.error_kind, end.error) == ("Unavailable", "the front-end failed: RuntimeError: a defect")
        assert str(await client.death) == end.error
        with pytest.raises(Unavailable, match="a defect"):
            await client.stats()

    with_engine(work)


def test_the_name_of_an_aborted_request_is_taken_until_its_last_output_has_come() -> None:
    """Else that would be the first one of the next request of this name."""

    async def work(client: EngineClient) -> None:
        old: list[EngineOutput] = []
        client.add(request("again"), old.append)
        client.abort("again")
        assert client.is_open("again")
        while client.is_open("again"):
            await asyncio.sleep(0.01)
        outputs: asyncio.Queue[EngineOutput] = asyncio.Queue()
        client.add(request("again"), outputs.put_nowait)
        assert (await outputs.get()).finish_reason is None
        assert old == []

    with_engine(work)


async def _is_served(client: EngineClient) -> None:
    assert (await client.stats())["running"] == 0


def test_the_engine_imports_nothing_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise RuntimeError('the wrong msgspec')")
    monkeypatch.chdir(tmp_path)
    with_engine(_is_served)


def test_a_long_tmpdir_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with_engine(_is_served)
