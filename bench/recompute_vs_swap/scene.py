"""The scene in which one request gives way on an engine, and comes back one way or the other.

A first request runs; a second one that needs the whole pool waits for it, and a third that fits beside the first
overtakes it (FlashGen's order). When the first has ended, the third must give back all of its blocks, and the second
writes over every one of them. When that has ended, the third comes back, alone on the device: what counts is the time
from there to its next token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from jserve.engine import Engine
from jserve.errors import JserveError
from jserve.request import EngineRequest, SamplingParams

FIRST, HEAD, LATE = "first", "head", "late"
MARGIN_BLOCKS = 8
"""Beyond what the late one's prompt takes: for the first one, and for what both say."""
STEPS_AT_MOST = 10_000


@dataclass(frozen=True)
class Return:
    """One request that gave way."""

    tokens: int
    """With KV when it did."""
    back_s: float
    """From the first moment when there was room for it until its next token."""
    how: str
    """What the engine says that it did."""
    said: list[int]


def pool_blocks(tokens: int, block_size: int) -> int:
    """For a late request with a prompt of so many tokens."""
    return -(-tokens // block_size) + MARGIN_BLOCKS


def give_way(engine: Engine, prompt: list[int]) -> Return:
    """See the module. JserveError if the engine does not do what the scene asks of it."""
    scene, size = _Scene(engine), engine.info.block_size
    whole = engine.cache.num_blocks * size
    scene.add(FIRST, prompt[:size], 2 * size)
    scene.play(lambda: bool(scene.said[FIRST]))
    scene.add(HEAD, [(token + 1) % engine.info.vocab_size for token in _repeated(prompt, whole - 2)], 2)
    scene.add(LATE, prompt, 4 * size)
    scene.play(lambda: HEAD in scene.ended)
    before = len(scene.said[LATE])
    start_s = time.perf_counter()
    scene.play(lambda: len(scene.said[LATE]) > before)
    back_s = time.perf_counter() - start_s
    scene.play(lambda: LATE in scene.ended)
    moments = {moment.kind: moment for moment in engine.history(LATE).timelines[0].moments}
    head_end_s = engine.history(HEAD).timelines[0].moments[-1].time_s
    if not {"preempted", "resumed"} <= moments.keys() or moments["resumed"].time_s < head_end_s or not before:
        raise JserveError("the late request did not give way, or came back before there was room: use longer lengths")
    return Return(len(prompt) + before - 1, back_s, moments["preempted"].detail.partition(",")[0], scene.said[LATE])


def _repeated(prompt: list[int], count: int) -> list[int]:
    return (prompt * (count // len(prompt) + 1))[:count]


class _Scene:
    """Requests on an engine, and what they have said."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.said: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        self.said[name] = []
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._engine.add(EngineRequest(request_id=name, token_ids=prompt, sampling=sampling, cache_salt=name))

    def play(self, until: Callable[[], bool]) -> None:
        for _ in range(STEPS_AT_MOST):
            if until():
                return
            if not self._engine.has_work:
                break
            for output in self._engine.step():
                self.said[output.request_id] += output.token_ids
                self.ended |= {output.request_id} if output.finish_reason else set()
        raise JserveError("nothing came of it: nobody gave way, or it never came back")
