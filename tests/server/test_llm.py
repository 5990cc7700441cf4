"""`LLM`: the engine in this process, on its own thread, with the same answers as the server's."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from byte_model import byte_tokenizer
from simulated_engine import BYTES, CONTEXT, POISON, make

from jserve.config import EngineConfig
from jserve.errors import ConfigError, InvalidRequest, Overloaded, Unavailable
from jserve.llm import LLM
from jserve.progress import SilentProgress
from jserve.settings import engine_config
from jserve.simulated import expected_tokens

HELLO = [{"role": "user", "content": "Hello there, how are you today?"}]
LONG = 600


@pytest.fixture
def llm() -> Iterator[LLM]:
    with new_llm() as llm:
        yield llm


def new_llm(config: EngineConfig | None = None) -> LLM:
    return LLM.from_engine(make(config or EngineConfig(), SilentProgress()), byte_tokenizer())


def answer_to(text: str, count: int) -> list[int]:
    return expected_tokens(byte_tokenizer().encode(text), count, BYTES)


def until_idle(llm: LLM) -> dict[str, float]:
    for _ in range(200):
        stats = llm.stats()
        if stats["running"] == stats["waiting"] == stats["held_blocks"] == 0:
            return stats
        time.sleep(0.02)
    raise AssertionError(f"the engine still holds something: {stats}")


def test_an_answer_has_its_text_and_its_numbers(llm: LLM) -> None:
    result = llm.chat(HELLO, max_tokens=20)
    assert result.text == llm.tokenizer.decode(result.token_ids)
    assert (result.prompt_tokens, result.output_tokens) == (len(llm.tokenizer.encode_chat(HELLO)), 20)
    assert (result.finish_reason, result.cached_tokens) == ("length", 0)
    assert 0 < result.ttft_s <= result.duration_s


def test_a_second_turn_reuses_the_first(llm: LLM) -> None:
    llm.chat(HELLO, max_tokens=4)
    turn = [*HELLO, {"role": "assistant", "content": "fine"}, {"role": "user", "content": "good"}]
    assert llm.chat(turn, max_tokens=4).cached_tokens >= 32


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    with llm.generate("in pieces", max_tokens=30, stream=True) as stream:
        text = "".join(chunk.text for chunk in stream)
        result = stream.result()
    assert text == result.text
    assert result.token_ids == answer_to("in pieces", 30)


def test_threads_are_batched_and_do_not_mix(llm: LLM) -> None:
    prompts = [f"thread number {i}" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda prompt: llm.generate(prompt, max_tokens=25), prompts))
    assert [result.token_ids for result in results] == [answer_to(prompt, 25) for prompt in prompts]
    assert llm.stats()["steps"] < 16 * 25 / 2


def test_leaving_a_stream_frees_it_however_it_is_left(llm: LLM) -> None:
    with llm.generate("left", max_tokens=LONG, stream=True) as stream:
        next(stream)
    with pytest.raises(Unavailable, match="closed before its end"):
        stream.result()
    until_idle(llm)
    stream = llm.generate("dropped unread", max_tokens=LONG, n=2, stream=True)
    del stream
    gc.collect()
    assert until_idle(llm)["requests_aborted"] == 2


def test_an_llm_lives_as_long_as_its_stream_and_no_longer() -> None:
    before = threading.active_count()
    stream = new_llm().generate("whose llm has no name", max_tokens=20, stream=True)
    gc.collect()
    assert len(stream.result().token_ids) == 20
    del stream
    gc.collect()
    assert threading.active_count() == before


def test_more_continuations_than_can_be_open_are_refused_before_they_start() -> None:
    with new_llm(engine_config(max_running=2, max_waiting=2)) as llm:
        with pytest.raises(InvalidRequest, match="n is 5, and 4 continuations are taken at once"):
            llm.generate("x", n=5)
        assert llm.stats()["steps"] == 0
        assert len(llm.generate("x", n=3, max_tokens=2).choices) == 3


def test_wrong_requests_are_refused_and_the_rest_goes_on(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="n is 0"):
        llm.generate("x", n=0)
    with pytest.raises(InvalidRequest, match="no sampling parameter"):
        llm.generate("x", temprature=1)
    with pytest.raises(InvalidRequest, match=f"has {CONTEXT} tokens"):
        llm.generate("x" * CONTEXT)
    with pytest.raises(InvalidRequest, match="no tokens"):
        llm.generate([])
    assert llm.generate("x", max_tokens=2).output_tokens == 2


@pytest.mark.parametrize("wrong", ["a", None, 1.5, True, -1, 2**40, 259])
def test_what_is_no_token_id_is_named_and_the_rest_goes_on(llm: LLM, wrong: object) -> None:
    with pytest.raises(InvalidRequest, match=f"token id {wrong!r} is none of this model's: .* 0 to 258"):
        llm.generate([1] * 9 + [wrong])
    assert llm.generate("x", max_tokens=2).output_tokens == 2


@pytest.mark.parametrize("wrong", [None, 5, "half \ud800"])
def test_a_salt_that_is_no_text_is_named_and_the_rest_goes_on(llm: LLM, wrong: object) -> None:
    with pytest.raises(InvalidRequest, match=r"cache_salt is .*: use text"):
        llm.generate("x", cache_salt=wrong)
    assert llm.generate("x", max_tokens=2).output_tokens == 2


def test_a_salt_as_long_as_a_book_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="cache_salt has 1025 characters: use at most 1024"):
        llm.generate("x", cache_salt="s" * 1025)


def test_more_token_ids_than_the_context_are_refused_before_each_is_looked_at(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=f"has {10**12} tokens, and the context only {CONTEXT}"):
        llm.generate(range(10**12))


def test_a_full_queue_is_overloaded() -> None:
    with new_llm(engine_config(max_running=1, token_budget=64, max_waiting=1)) as llm:
        streams = [llm.generate(f"{i}", max_tokens=LONG, stream=True) for i in range(1)]
        next(streams[0])
        streams.append(llm.generate("waits", max_tokens=LONG, stream=True))
        with pytest.raises(Overloaded, match="1 requests are waiting"):
            llm.generate("one too many")
        for stream in streams:
            stream.close()


def test_a_closed_llm_says_so(llm: LLM) -> None:
    stream = llm.generate("cut off", max_tokens=LONG, stream=True)
    next(stream)
    llm.close()
    with pytest.raises(Unavailable, match=r"LLM is closed|ended the request"):
        stream.result()
    for ask in (lambda: llm.generate("late"), llm.stats):
        with pytest.raises(Unavailable, match="LLM is closed"):
            ask()


def test_if_the_engine_fails_whoever_waits_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os._exit", _fail)
    llm = new_llm()
    with ThreadPoolExecutor(1) as pool:
        innocent = pool.submit(llm.generate, "innocent", max_tokens=LONG)
        with pytest.raises(Unavailable, match="the engine failed: RuntimeError: device lost"):
            llm.generate([POISON], max_tokens=2)
        with pytest.raises(Unavailable, match="the engine failed"):
            innocent.result(timeout=10)
    with pytest.raises(Unavailable, match="the engine failed"):
        llm.generate("later")


def _fail(code: int) -> None:
    raise RuntimeError("device lost")


def test_the_engine_thread_sleeps_when_nobody_asks(llm: LLM) -> None:
    llm.generate("x", max_tokens=2)
    until_idle(llm)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    assert any(thread.name == "jserve-engine" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_modl_len": 5}, "no setting 'max_modl_len': did you mean 'max_model_len'"),
        ({"zzz": 5}, "no setting 'zzz': use one of model"),
        ({"dtype": "int3"}, "dtype is 'int3': use one of auto"),
        ({"block_size": "16"}, "block_size is '16': use a value of type int"),
        ({"tp": True}, "tp is True"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_loaded(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LLM("/nowhere", **settings)
