"""`LLM`: the same engine as the server's, in this process, for notebooks and scripts.

The engine runs on a thread of its own; calls from any thread queue up there and are batched.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from jserve.cache_plot import CacheHistory, CachePlot, draw
from jserve.chat_template import Message
from jserve.config import EngineConfig
from jserve.console import RichProgress
from jserve.engine_loop import (
    CACHE_STAT,
    Abort,
    Add,
    AskHistory,
    AskStats,
    Command,
    EngineLoop,
    Event,
    Outputs,
    Stop,
    TellHistory,
    TellStats,
    failure,
    stats_of,
)
from jserve.errors import NotFound, Unavailable
from jserve.explain import explained, save_trace
from jserve.generation import Deliver, Generation, Intake
from jserve.progress import Progress
from jserve.pull import resolve_model
from jserve.request import EngineOutput, EngineRequest, SamplingParams, Terms
from jserve.result import Chunk, Result, ResultStream, Usage
from jserve.settings import engine_config
from jserve.timeline import History
from jserve.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jserve.doors import EngineInfo
    from jserve.engine import Engine


class LLM:
    """A model ready to talk.

    Settings are those of `jserve.config.EngineConfig`, by the name of the leaf: `LLM(max_model_len=2048, tp=2)`.
    Sampling parameters are the fields of `SamplingParams`, by name; without any, decoding is greedy. Loading shows its
    progress on stderr; `jserve.progress.SilentProgress()` keeps it quiet.
    """

    def __init__(self, model: str | None = None, *, progress: Progress | None = None, **settings: Any) -> None:
        self._load(engine_config(model=model, **settings), progress)

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> LLM:
        """From a whole configuration, as the command line has one."""
        llm = cls.__new__(cls)
        llm._load(config, progress)
        return llm

    @classmethod
    def from_engine(cls, engine: Engine, tokenizer: Tokenizer) -> LLM:
        """Over an engine that is already there; it belongs to the LLM from now on."""
        llm = cls.__new__(cls)
        llm._attach(engine, tokenizer)
        return llm

    def _load(self, config: EngineConfig, progress: Progress | None) -> None:
        from jserve.engine import Engine

        progress = progress or RichProgress()
        path = resolve_model(config.model, progress)
        tokenizer = Tokenizer.load(path)
        self._attach(Engine.from_config(dataclasses.replace(config, model=str(path)), progress), tokenizer)

    def _attach(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.config = engine.config
        self._thread = _EngineThread(engine)
        weakref.finalize(self, self._thread.close)  # also where nobody calls close(): at the latest when Python ends
        self.info: EngineInfo = engine.info
        self._intake = Intake(tokenizer, self.info.vocab_size, self.info.max_model_len, self.config.sched.max_open)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._intake.tokenizer

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        cache_salt: str = "",
        request_id: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> ResultStream: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        cache_salt: str = "",
        request_id: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result: ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        cache_salt: str = "",
        request_id: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result | ResultStream:
        """The assistant's next message. `request_id`: what `explain` shall know it by."""
        return self._run(self._intake.of_messages(messages), stream, cache_salt, request_id, terms, sampling)

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        cache_salt: str = "",
        request_id: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> ResultStream: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        cache_salt: str = "",
        request_id: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        cache_salt: str = "",
        request_id: str | None = None,
        terms: Terms | None = None,
        **sampling: Any,
    ) -> Result | ResultStream:
        """What follows a text, or token ids. `request_id`: what `explain` shall know it by."""
        token_ids = self._intake.of_text(prompt) if isinstance(prompt, str) else self._intake.of_token_ids(prompt)
        return self._run(token_ids, stream, cache_salt, request_id, terms, sampling)

    def stats(self) -> dict[str, float]:
        """The engine's counters, by the names of EngineStats."""
        return self._thread.stats()

    def cache_stats(self) -> dict[str, float]:
        """The KV cache alone, tier by tier: blocks, hits in tokens, copies, evictions, faults."""
        stats = self._thread.stats()
        return {name.removeprefix(CACHE_STAT): x for name, x in stats.items() if name.startswith(CACHE_STAT)}

    def plot_cache(self) -> CachePlot:
        """How full the cache's tiers were since start, and where prompts were found: a picture, for a notebook or
        `.save("cache.png")`. Raises Unsupported without matplotlib (extra `notebook`)."""
        history = self._thread.cache_history
        return draw([*history.samples, history.sample(self._thread.stats())])

    def history(self, request_id: str | None = None) -> History:
        """What has happened to a request, or to all that are remembered, and the steps of that time.

        Raises NotFound for a request that is not remembered.
        """
        return self._thread.history(request_id)

    def explain(self, request_id: str) -> str:
        """The same of one request as text: `print(llm.explain(answer.request_id))`."""
        return explained(self.history(request_id))

    def save_trace(self, path: str | Path, request_id: str | None = None) -> None:
        """The same as a file for ui.perfetto.dev or chrome://tracing: a track for each request, one for the steps."""
        save_trace(self.history(request_id), path)

    def close(self) -> None:
        """Cancel what runs and give the device back."""
        self._thread.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        prompt: list[int],
        stream: bool,
        cache_salt: str,
        request_id: str | None,
        terms: Terms | None,
        sampling: dict[str, Any],
    ) -> Result | ResultStream:
        outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
        params = SamplingParams.of(sampling)
        generation = self._intake.generation(self._thread, outputs.put, prompt, params, cache_salt, request_id, terms)
        generation.start()
        answer = ResultStream(self._events(generation, outputs), generation.close, generation.request_id)
        if stream:
            return answer
        with answer:  # an interrupt cancels it
            return answer.result()

    def _events(self, generation: Generation, outputs: queue.SimpleQueue[EngineOutput]) -> Iterator[Chunk | Usage]:
        """Of this object, so that it lives as long as a stream of its."""
        try:
            while not generation.done:
                news = [outputs.get()]
                while not outputs.empty():
                    news.append(outputs.get())
                yield from generation.feed(news)
            yield generation.usage
        finally:
            generation.close()


class _EngineThread:
    """An `EnginePort`: runs the engine's loop on a thread of its own, which hands out the outputs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._open: dict[str, Deliver | None] = {}
        """By request, who gets its outputs; None once it is aborted: until its last one comes its name is taken."""
        self._opening = threading.Lock()
        self._asked: dict[int, Future[Any]] = {}
        self._tickets = itertools.count()
        self.cache_history = CacheHistory()
        self._end: Unavailable | None = None
        self._thread = threading.Thread(target=self._run, name="jserve-engine", daemon=True)
        self._thread.start()

    def is_open(self, request_id: str) -> bool:
        return request_id in self._open

    def add(self, request: EngineRequest, deliver: Deliver) -> None:
        self._open[request.request_id] = deliver
        self._commands.put(Add(request))
        self._release_if_ended()

    def abort(self, request_id: str) -> None:
        with self._opening:
            if self._open.get(request_id) is None:
                return
            self._open[request_id] = None
        self._commands.put(Abort(request_id))

    def stats(self) -> dict[str, float]:
        told: dict[str, float] = self._ask(AskStats)
        return told

    def history(self, request_id: str | None) -> History:
        told: History = self._ask(lambda ticket: AskHistory(ticket, request_id))
        return told

    def _ask(self, question: Callable[[int], Command]) -> Any:
        ticket = next(self._tickets)
        answer: Future[Any] = Future()
        self._asked[ticket] = answer
        self._commands.put(question(ticket))
        self._release_if_ended()
        return answer.result()

    def close(self) -> None:
        self._commands.put(Stop())
        if threading.current_thread() is not self._thread:  # as it is where the garbage collector runs there
            self._thread.join()

    def _run(self) -> None:
        try:
            EngineLoop(self._engine, self._receive, self._send).run()
            self._end = Unavailable("this LLM is closed: make another one")
        except Exception as error:  # a defect, or a device that is gone: whoever waits must hear of it
            self._end = Unavailable(f"the engine failed: {type(error).__name__}: {error}")
        self._release_if_ended()

    def _receive(self, block: bool) -> Iterable[Command]:
        if block:
            yield self._commands.get()
        while not self._commands.empty():
            yield self._commands.get()

    def _send(self, event: Event) -> None:
        match event:
            case Outputs(outputs):
                for output in outputs:
                    ended = output.finish_reason is not None
                    with self._opening:
                        deliver = (
                            self._open.pop(output.request_id, None) if ended else self._open.get(output.request_id)
                        )
                    if deliver is not None:
                        deliver(output)
                if self.cache_history.is_due:
                    self.cache_history.add(stats_of(self._engine))
            case TellStats(ticket, stats):
                self._asked.pop(ticket).set_result(stats)
            case TellHistory(ticket, None, problem):
                self._asked.pop(ticket).set_exception(NotFound(problem))
            case TellHistory(ticket, history, _):
                self._asked.pop(ticket).set_result(history)

    def _release_if_ended(self) -> None:
        """After the end nobody may wait for it, not even who came just then."""
        if self._end is None:
            return
        for request_id in list(self._open):
            if (deliver := self._open.pop(request_id, None)) is not None:
                deliver(failure(request_id, self._end))
        for ticket in list(self._asked):
            if (answer := self._asked.pop(ticket, None)) is not None:
                answer.set_exception(self._end)
