"""A server over real gRPC, with the production engine on a simulated device: what clients see, what stays."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from byte_model import EOS, byte_tokenizer, write_byte_model
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from running_server import HERE, Server, StartServer, start
from simulated_engine import BYTES, CONTEXT, POISON, STEP_S

from jserve.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded, Unavailable, Unsupported
from jserve.server.client import Client
from jserve.server.proto.jserve.v1 import jserve_pb2 as pb
from jserve.server.proto.jserve.v1 import jserve_pb2_grpc as pb_grpc
from jserve.simulated import expected_tokens

LONG = 600  # tokens: seconds of streaming
HELLO = [{"role": "user", "content": "Hello there, how are you today?"}]


def answer_to(text: str, count: int) -> list[int]:
    """What the simulated model says after a prompt."""
    return expected_tokens(byte_tokenizer().encode(text), count, BYTES)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_models_and_its_text_is_its_tokens(client: Client) -> None:
    result = client.generate("once upon a time", max_tokens=40)
    assert result.token_ids == answer_to("once upon a time", 40)
    assert result.text == byte_tokenizer().decode(result.token_ids)
    assert (result.prompt_tokens, result.output_tokens, result.finish_reason) == (16, 40, "length")
    assert 0 < result.ttft_s <= result.duration_s


def test_token_ids_are_a_prompt_too(client: Client) -> None:
    token_ids = client.tokenize("once upon a time")
    assert client.generate(token_ids, max_tokens=7).token_ids == answer_to("once upon a time", 7)


def test_a_stream_arrives_as_it_is_made(client: Client) -> None:
    started = time.perf_counter()
    with client.generate("stream", max_tokens=200, stream=True) as stream:
        first = next(stream)
        first_s = time.perf_counter() - started
        chunks = [first, *stream]
        result = stream.result()
    assert len(chunks) > 20
    assert first_s < result.duration_s / 4
    assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids


def test_the_second_turn_finds_the_first_ones_history(client: Client) -> None:
    first = client.chat(HELLO, max_tokens=32)
    turn = [*HELLO, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "good"}]
    second = client.chat(turn, max_tokens=4)
    assert first.cached_tokens == 0
    assert second.cached_tokens >= 32
    assert second.prompt_tokens == len(client.tokenize(turn))


def test_requests_of_another_salt_share_nothing(client: Client) -> None:
    prompt = "the same long prompt for two tenants of one server"
    client.generate(prompt, max_tokens=1, cache_salt="a")
    assert client.generate(prompt, max_tokens=1, cache_salt="b").cached_tokens == 0
    assert client.generate(prompt, max_tokens=1, cache_salt="a").cached_tokens > 0


def test_n_continuations_share_the_prompt_and_count_it_once(server: Server, client: Client) -> None:
    before = server.idle_stats()
    prompt = "several answers to one prompt, which is computed only once for all of them."
    result = client.generate(prompt, max_tokens=9, n=4)
    after = server.idle_stats()
    assert [choice.token_ids for choice in result.choices] == [answer_to(prompt, 9)] * 4
    assert (result.prompt_tokens, result.output_tokens) == (len(prompt), 36)
    assert after["prefill_tokens"] - before["prefill_tokens"] < 2 * len(prompt)


def test_a_stop_string_ends_the_text_before_it_and_frees_the_request(server: Server, client: Client) -> None:
    whole = client.generate("where does it stop", max_tokens=60)
    stop = whole.text[20:23]
    cut = client.generate("where does it stop", max_tokens=LONG, stop=["never in it", stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.choices[0].stopped_by) == ("stop", stop)
    assert cut.output_tokens < 60
    server.idle_stats()


def test_a_stop_token_ends_the_output_and_is_not_in_its_text(client: Client) -> None:
    token_ids = answer_to("tokens stop too", 30)
    stop = next(token for i, token in enumerate(token_ids) if i > 5 and token not in token_ids[:i])
    result = client.generate("tokens stop too", max_tokens=30, stop_token_ids=[stop])
    at = token_ids.index(stop)
    assert result.token_ids == token_ids[: at + 1]
    assert result.text == byte_tokenizer().decode(token_ids[:at])
    assert (result.finish_reason, result.choices[0].stopped_by) == ("stop", stop)


def test_model_info_tells_the_limits(client: Client) -> None:
    info = client.model_info()
    assert (info.model, info.max_model_len, info.eos_token_ids) == ("simulated", CONTEXT, (EOS,))
    assert info.has_chat_template


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": -1}, "n is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -5}, "max_tokens is -5"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_p": -0.5}, "top_p is -0.5"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_p": math.inf}, "min_p is inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"logprobs": 1000}, "logprobs is 1000"),
        ({"logit_bias": {100_000: 1.0}}, "logit_bias token id is 100000"),
        ({"stop": [""]}, "stop has an empty string"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids is 100000"),
        ({"stop_token_ids": [-1]}, "the sampling parameters cannot be sent"),
        ({"temprature": 1}, "'temprature' is no sampling parameter"),
    ],
)
def test_a_wrong_sampling_value_is_named(client: Client, sampling: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        client.generate("x", **sampling)


def test_an_empty_prompt_is_refused(client: Client) -> None:
    for prompt in ("", []):
        with pytest.raises(InvalidRequest, match="prompt"):
            client.generate(prompt)


def test_a_prompt_longer_than_the_context_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=f"has {CONTEXT} tokens"):
        client.generate("x" * CONTEXT)
    with pytest.raises(InvalidRequest, match="characters"):  # before it is even tokenized
        client.generate("x" * 10_000_000)


def test_a_prompt_longer_than_the_pool_is_refused(start_server: Server) -> None:
    with start_server("--device-blocks", "4").client() as client:
        with pytest.raises(InvalidRequest, match="pool of 4 blocks"):
            client.generate("x" * 64)
        assert client.generate("x" * 50, max_tokens=100).output_tokens == 14  # as far as the pool goes
        assert client.model_info().max_model_len == 64


def test_a_token_outside_the_vocabulary_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="token id 5000"):
        client.generate([1, 5000])
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        client.generate([1, -1])


def test_unknown_roles_and_empty_conversations_are_refused(server: Server) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.JserveStub(channel)
        for messages, named in (
            ([], "messages is empty"),
            ([pb.ChatMessage(role="wizard", content="hi")], r"messages\[0\].role is 'wizard'"),
            ([pb.ChatMessage(content="hi")], r"messages\[0\].role is ''"),
        ):
            with pytest.raises(grpc.RpcError, match=named) as failed:
                list(stub.Chat(pb.ChatRequest(messages=messages)))
            assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
def test_bytes_that_are_not_utf8_are_an_invalid_argument(server: Server, client: Client, method: str) -> None:
    text_field, bad = (2 << 3) | 2, b"\xff\xfe"
    with grpc.insecure_channel(server.target) as channel:
        path = f"/jserve.v1.Jserve/{method}"
        call = channel.unary_stream(path) if method == "Generate" else channel.unary_unary(path)
        with pytest.raises(grpc.RpcError, match="UTF-8") as failed:
            list(call(bytes([text_field, len(bad)]) + bad))
        assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.generate("alive", max_tokens=1).output_tokens == 1


def test_half_a_unicode_pair_is_refused_before_it_is_sent(client: Client) -> None:
    for ask in (client.generate, client.tokenize):
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            ask("half \ud800")
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        client.chat([{"role": "user", "content": "half \ud800"}])


def test_another_model_is_not_found(server: Server, client: Client, byte_model: Path) -> None:
    with pytest.raises(NotFound, match="'gpt-9' is not served here"):
        client.generate("x", model="gpt-9")
    for name in ("simulated", str(byte_model)):
        assert client.generate("x", model=name, max_tokens=1).output_tokens == 1


def test_without_a_chat_template_chat_says_so_and_generate_works(start_server: Server, tmp_path: Path) -> None:
    model = write_byte_model(tmp_path / "plain", template=None)
    with start_server("--model", str(model)).client() as client:
        with pytest.raises(Unsupported, match="no chat template"):
            client.chat(HELLO)
        assert client.generate("x", max_tokens=3).token_ids == answer_to("x", 3)
        assert not client.model_info().has_chat_template


# --- leaving early ----------------------------------------------------------------------------------------------------


def test_a_cancelled_stream_frees_everything(server: Server, client: Client) -> None:
    before = server.idle_stats()
    with client.generate("cancel me", max_tokens=LONG, n=2, stream=True) as stream:
        for _ in range(5):
            next(stream)
        assert client.stats()["running"] >= 1
    after = server.idle_stats()
    assert after["requests_aborted"] - before["requests_aborted"] in (1, 2)


def test_a_stream_that_nobody_reads_is_cancelled_with_its_object(server: Server, client: Client) -> None:
    before = server.idle_stats()
    stream = client.generate("forgotten", max_tokens=LONG, stream=True)
    del stream
    after = server.idle_stats()
    assert after["requests_finished"] == before["requests_finished"], "it was cancelled, or never came"


def test_the_deadline_of_a_call_ends_its_request(server: Server, client: Client) -> None:
    started = time.perf_counter()
    with pytest.raises(DeadlineExceeded):
        client.generate("too slow", max_tokens=LONG, timeout_s=0.3)
    assert time.perf_counter() - started < LONG * STEP_S
    server.idle_stats()


def test_a_client_that_vanishes_leaves_nothing_behind(server: Server) -> None:
    before = server.idle_stats()
    program = (
        "import os; from jserve.server.client import Client\n"
        f"stream = Client({server.target!r}).generate('gone', max_tokens={LONG}, stream=True)\n"
        "next(stream); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == -signal.SIGKILL
    assert server.idle_stats()["requests_aborted"] == before["requests_aborted"] + 1


def test_a_conversation_may_come_from_standard_input(server: Server, client: Client) -> None:
    command = [sys.executable, "-m", "jserve.cli", "chat", "--target", server.target, "--max-tokens", "8", "--json"]
    done = subprocess.run(command, input="Hi!\n\nAnd?\n", capture_output=True, text=True, timeout=30)
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    turn = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": first["text"]}]
    asked = [*turn, {"role": "user", "content": "And?"}]
    assert second["text"] == client.chat(asked, max_tokens=8).text
    assert done.returncode == 0


def test_ctrl_c_in_the_middle_of_an_answer_ends_it_here_and_there(server: Server) -> None:
    command = [sys.executable, "-m", "jserve.cli", "chat", "--target", server.target, "-m", "talk"]
    chat = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert chat.stdout is not None
    assert chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    _, err = chat.communicate(timeout=10)
    assert chat.returncode == 130
    assert b"Traceback" not in err
    server.idle_stats()


# --- load -------------------------------------------------------------------------------------------------------------


def test_a_flood_is_refused_beyond_the_queue_and_the_server_lives(start_server: Server) -> None:
    server = start_server("--max-running", "8", "--max-waiting", "56")
    codes = asyncio.run(flood(server.target, 10_000))
    assert sum(codes.values()) == 10_000
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert codes[grpc.StatusCode.OK] >= 64
    assert server.idle_stats()["requests_finished"] == codes[grpc.StatusCode.OK]
    with server.client() as client:
        assert client.generate("flood", max_tokens=30).token_ids == answer_to("flood", 30)


async def flood(target: str, count: int) -> Counter[grpc.StatusCode]:
    """How `count` requests, all sent at once, end."""
    request = pb.GenerateRequest(text="flood", sampling=pb.SamplingParams(max_tokens=30))
    async with grpc.aio.insecure_channel(target) as channel:
        calls = [pb_grpc.JserveStub(channel).Generate(request) for _ in range(count)]
        return Counter(await asyncio.wait_for(asyncio.gather(*map(end_of, calls)), 120))


async def end_of(call: Any) -> grpc.StatusCode:
    try:
        async for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code()
    return await call.code()


def test_each_continuation_takes_a_place_of_the_queue(start_server: StartServer) -> None:
    server = start_server("--max-running", "2", "--max-waiting", "2")
    with server.client() as client:
        with client.generate("two of four", max_tokens=LONG, n=2, stream=True) as stream:
            next(stream)
            with pytest.raises(Overloaded, match="2 requests are under way of 4"):
                client.generate("three more", n=3)
            assert client.generate("one more", max_tokens=2).output_tokens == 2
        server.idle_stats()
        with pytest.raises(InvalidRequest, match="n is 5, and 4 continuations are taken at once"):
            client.generate("never", n=5)
        assert len(client.generate("afterwards", n=3, max_tokens=2).choices) == 3


def test_a_message_too_large_to_parse_is_refused_on_both_sides(server: Server, client: Client) -> None:
    huge = "x" * (65 << 20)
    with pytest.raises(InvalidRequest, match=r"has 68157.* bytes, and servers take 67108864"):
        client.generate(huge)
    with grpc.insecure_channel(server.target, [("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError, match="larger than max") as failed:
            list(pb_grpc.JserveStub(channel).Generate(pb.GenerateRequest(text=huge)))
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert client.generate("alive", max_tokens=1).output_tokens == 1


def test_concurrent_streams_do_not_mix(client: Client) -> None:
    prompts = [f"conversation number {i}" for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        results = list(pool.map(lambda prompt: client.generate(prompt, max_tokens=25), prompts))
    assert [result.token_ids for result in results] == [answer_to(prompt, 25) for prompt in prompts]


# --- the server's own life --------------------------------------------------------------------------------------------


def health_of(target: str, service: str = "") -> int:
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def test_health_and_reflection_are_served(server: Server) -> None:
    assert (
        health_of(server.target)
        == health_of(server.target, "jserve.v1.Jserve")
        == health_pb2.HealthCheckResponse.SERVING
    )
    with grpc.insecure_channel(server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert {"jserve.v1.Jserve", "grpc.health.v1.Health"} <= set(database.get_services())
        service = DescriptorPool(database).FindServiceByName("jserve.v1.Jserve")
    assert {method.name for method in service.methods} >= {"Generate", "Chat", "Tokenize", "GetModelInfo"}


def test_while_it_loads_a_server_says_so_and_can_be_stopped(byte_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = [str(HERE / "serve_simulated.py"), "make_slowly"]
    process = start(script, "--port", str(port), "--model", str(byte_model))
    target = f"127.0.0.1:{port}"
    with grpc.insecure_channel(target) as channel:
        grpc.channel_ready_future(channel).result(timeout=30)
    assert health_of(target) == health_pb2.HealthCheckResponse.NOT_SERVING
    with Client(target) as client:
        for ask in (lambda: client.generate("x"), client.model_info, client.stats):
            with pytest.raises(Unavailable, match="the model is loading"):
                ask()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "")


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(start_server: Server) -> None:
    server = start_server()
    with server.client() as client, client.generate("drain", max_tokens=400, stream=True) as stream:
        next(stream)
        server.signal(signal.SIGTERM)
        time.sleep(0.2)
        assert health_of(server.target) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="shutting down"):
            client.generate("late", max_tokens=1)
        assert stream.result().token_ids == answer_to("drain", 400)
    assert server.wait() == 0


def test_a_signal_to_both_processes_drains_like_one_to_the_front_end(start_server: StartServer) -> None:
    server = start_server()
    with server.client() as client, client.generate("drain", max_tokens=400, stream=True) as stream:
        next(stream)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(children_of(server.process.pid)[0], number)
        server.signal(signal.SIGTERM)  # as systemd does
        assert stream.result().token_ids == answer_to("drain", 400)
    assert server.wait() == 0


def test_what_is_not_done_within_the_drain_timeout_is_cancelled(start_server: Server) -> None:
    server = start_server("--drain-timeout", "0.2")
    with server.client() as client, client.generate("drain", max_tokens=CONTEXT, stream=True) as stream:
        next(stream)
        server.signal(signal.SIGINT)
        with pytest.raises(Unavailable, match="shut down"):
            stream.result()
    assert server.wait() == 130


def test_if_the_engine_dies_every_stream_ends_and_the_server_stops(start_server: Server) -> None:
    server = start_server()
    with server.client() as client, client.generate("innocent", max_tokens=LONG, stream=True) as stream:
        next(stream)
        with pytest.raises(Unavailable, match="engine process ended with code 17"):
            client.generate([POISON], max_tokens=2)
        with pytest.raises(Unavailable, match="engine process ended with code 17"):
            stream.result()
    assert server.wait() == 2
    assert server.last_line() == "jserve: the server stops: the engine process ended with code 17"


def test_if_the_front_end_is_killed_the_engine_goes_too(start_server: Server) -> None:
    server = start_server()
    (engine,) = children_of(server.process.pid)
    server.signal(signal.SIGKILL)
    server.wait()
    for _ in range(100):
        if not Path(f"/proc/{engine}").exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"engine process {engine} outlives its parent")


def test_neither_process_is_busy_when_nobody_asks(server: Server) -> None:
    server.idle_stats()
    pids = [server.process.pid, *children_of(server.process.pid)]
    before = [cpu_s(pid) for pid in pids]
    time.sleep(1.0)
    assert all(cpu_s(pid) - start < 0.1 for pid, start in zip(pids, before, strict=True))


def test_a_port_in_use_is_told_at_once(server: Server, tmp_path: Path) -> None:
    port = server.target.rpartition(":")[2]
    command = [sys.executable, "-m", "jserve.cli", "serve", "--port", port, "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    said = f"jserve: cannot listen on {server.target}: the port is in use; choose another --port (0 takes a free one)"
    assert done.stderr == f"{said}, or stop the other server\n"


def test_a_model_without_a_tokenizer_is_named(start_server: Server, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)code 2.*has no tokenizer: looked for tokenizer.json") as failed:
        start_server("--model", str(tmp_path))
    assert "Traceback" not in str(failed.value)


def test_a_full_disk_is_one_line_and_no_traceback(byte_model: Path) -> None:
    process = start(
        [str(HERE / "serve_simulated.py"), "make_on_a_full_disk"], "--port", "0", "--model", str(byte_model)
    )
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    assert err.splitlines()[-1] == "jserve: [Errno 28] No space left on device: '/cache/kernels.so'"
    assert "Traceback" not in err


def test_the_front_end_never_imports_jax() -> None:
    program = (
        "import sys, jserve.cli, jserve.server.frontend, jserve.server.client\n"
        "print([name for name in ('jax', 'flax', 'transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "[]"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
