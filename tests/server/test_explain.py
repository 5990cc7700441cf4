"""`jserve explain` and its RPC: what a running server tells of its requests."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from running_server import Server, StartServer
from simulated_engine import make

from jserve.cli import main
from jserve.config import EngineConfig
from jserve.errors import InvalidRequest, NotFound
from jserve.llm import LLM
from jserve.progress import SilentProgress
from jserve.sched.events import EventKind as K
from jserve.server.client import Client
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.server.proto.jserve.v1 import jserve_pb2_grpc as pb_grpc
from jserve.timeline import Timeline
from jserve.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def small(start_server: StartServer) -> Server:
    """Its pool holds one long request and a little more."""
    return start_server("--device-blocks", "40", "--block-size", "4", "--no-prefix-cache")


def kinds_of(timeline: Timeline) -> list[str]:
    return [moment.kind for moment in timeline.moments]


def crowd(client: Client) -> None:
    """Two at once that do not fit together to their ends."""
    with ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(client.generate, name * 40, max_tokens=100, request_id=f"crowd-{name}", timeout_s=30)
            for name in "ab"
        ]
        for call in calls:
            assert call.result().output_tokens == 100


def test_a_preempted_request_tells_by_whom(small: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with small.client() as client:
        crowd(client)
        told = {name: client.history(f"crowd-{name}").timelines[0] for name in "ab"}
    older, younger = sorted(told.values(), key=lambda timeline: K.PREEMPTED in kinds_of(timeline))
    assert kinds_of(older) == [K.ARRIVED, K.ADMITTED, K.FIRST_TOKEN, K.FINISHED]
    assert [kind for kind in kinds_of(younger) if kind != K.FIRST_TOKEN][1:] == [
        K.ADMITTED,
        K.PREEMPTED,
        K.RESUMED,
        K.FINISHED,
    ]
    assert main(["explain", younger.request_id, "--target", small.target]) == 0
    said = capsys.readouterr().out
    assert f"preempted for {older.request_id}" in said
    assert "resumed" in said
    assert "in all: waiting" in said


def test_explain_lists_writes_json_and_traces(
    small: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with small.client() as client:
        answer = client.generate("hello", max_tokens=5, n=2)
    explain = ["explain", "--target", small.target]
    assert main(explain) == 0
    assert f"{answer.request_id}/1" in capsys.readouterr().out
    assert main([*explain, answer.request_id, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [timeline["request_id"] for timeline in said["timelines"]] == [f"{answer.request_id}/{i}" for i in (0, 1)]
    assert sum(step["num_rows"] for step in said["steps"]) >= 10
    trace = tmp_path / "trace.json"
    assert main([*explain, "--trace", str(trace)]) == 0
    assert capsys.readouterr().out.strip() == str(trace)
    assert f"{answer.request_id}/0" in trace.read_text()


def test_an_unknown_request_is_not_found(small: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with small.client() as client, pytest.raises(NotFound, match="'nobody' is not remembered"):
        client.history("nobody")
    with grpc.insecure_channel(small.target) as channel, pytest.raises(grpc.RpcError) as raised:
        pb_grpc.JserveStub(channel).Explain(pb.ExplainRequest(request_id="nobody"), timeout=10)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert main(["explain", "nobody", "--target", small.target]) == 2
    assert capsys.readouterr().err.startswith("jserve: request 'nobody' is not remembered")


def test_explain_without_a_server_or_a_place_to_write_says_so(
    small: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["explain", "a", "--target", "127.0.0.1:1"]) == 2
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert main(["explain", "--target", small.target, "--trace", str(tmp_path / "no" / "trace.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_request_id_is_the_callers_or_drawn(small: Server) -> None:
    with small.client() as client:
        assert client.generate("hello", max_tokens=2, request_id="mine").request_id == "mine"
        one, other = (client.generate("hello", max_tokens=2).request_id for _ in range(2))
        assert one != other
        assert client.history(one).timelines[0].request_id == one
        for bad in ("", "a/b", "a b", "a\n", "x" * 129, "ü"):
            with pytest.raises(InvalidRequest, match="request_id is"):
                client.generate("hello", max_tokens=2, request_id=bad)
    with grpc.insecure_channel(small.target) as channel:
        request = pb.GenerateRequest(text="hello", sampling=pb.SamplingParams(max_tokens=2))
        *_, last = pb_grpc.JserveStub(channel).Generate(request, timeout=10)
    assert len(last.complete.request_id) == 32


def test_a_request_id_in_use_is_refused_and_the_first_one_goes_on(small: Server) -> None:
    with small.client() as client:
        with client.generate("long", max_tokens=80, request_id="same", stream=True) as stream:
            next(stream)
            with pytest.raises(InvalidRequest, match="'same' is in use"):
                client.generate("other", max_tokens=2, request_id="same")
            assert stream.result().output_tokens == 80
        assert client.generate("again", max_tokens=2, request_id="same").output_tokens == 2


def test_a_refused_request_tells_why(small: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with small.client() as client, pytest.raises(InvalidRequest, match="at most 159"):
        client.generate([1] * 500, max_tokens=2, request_id="too-long")
    assert main(["explain", "too-long", "--target", small.target]) == 0
    said = capsys.readouterr().out
    assert "rejected" in said
    assert "the prompt has 500 tokens" in said
    assert "it never joined the queue" in said


def test_events_are_counted(small: Server) -> None:
    with small.client() as client:
        before = client.stats()
        client.generate("hello", max_tokens=2)
        after = client.stats()
    assert after["events_finished"] == before["events_finished"] + 1
    assert after["events_rejected"] == before["events_rejected"]


def test_in_process_too(byte_model: Path, tmp_path: Path) -> None:
    engine = make(EngineConfig(model=str(byte_model)), SilentProgress())
    with LLM.from_engine(engine, Tokenizer.load(byte_model)) as llm:
        answer = llm.generate("hello", max_tokens=3, request_id="mine")
        assert llm.explain(answer.request_id).startswith("request mine, arrived")
        llm.save_trace(tmp_path / "trace.json")
        with pytest.raises(NotFound):
            llm.explain("nobody")
    assert '"mine"' in (tmp_path / "trace.json").read_text()
