"""Measures what the cost model needs, once for each machine, model and disk: prompts, decodes of batches, copies.

It takes some seconds, on the runner and the copies that will serve, and is kept under the cache folder. What is seen
while serving corrects it later (`cache.cost`); `jserve calibrate` measures it again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from jserve.cache.block_keys import KEY_BYTES
from jserve.cache.cost import CostModel, DecodeCost, LinkCost, PrefillCost
from jserve.cache.cost_fit import fit_decode, fit_link, fit_prefill
from jserve.config import EngineConfig, cache_root
from jserve.errors import ConfigError
from jserve.progress import Progress
from jserve.publish import publish_file
from jserve.request import EngineRequest, SamplingParams

if TYPE_CHECKING:
    from jserve.cache.transfer import Transfer
    from jserve.engine import Engine
    from jserve.runner import Runner

_TURNS = 3
_MOST_DECODES = 16
_UNTIMED, _TIMED = 2, 6
"""Decode steps of each batch size. After a change of the batch, one step of the old one is still under way."""
_LADDER_TOKENS = 80
"""Answers: enough for the steps of all batch sizes, and for those in which the later prompts are computed."""
_PROMPTS_S = 1.0
"""What the prompts of a batch may take that is measured for its decodes alone."""
_DISK_BLOCKS = 16
_DISK_TICKET = 1 << 62  # far from the hierarchy's own: an operation that hangs may end while it serves
GUESSED_DISK = LinkCost(1e9, 1e-4)
"""One NVMe drive, where no disk could be measured. What is seen while serving corrects it."""


def calibrated(config: EngineConfig, runner: Runner, transfer: Transfer, progress: Progress) -> CostModel:
    """The model of this machine and server: from the cache folder, or measured now."""
    place = _place(config, runner)
    if place.is_file():
        try:
            return CostModel.from_dict(json.loads(place.read_text()))
        except (ValueError, ConfigError):
            progress.note(f"{place} is no calibration: measuring again")
    return calibrate(config, runner, transfer, progress)


def calibrate(config: EngineConfig, runner: Runner, transfer: Transfer, progress: Progress) -> CostModel:
    """Measured now, whatever was before, and kept for the servers to come."""
    progress.note("measuring what computing and copying KV take here")
    cost = measure(config, runner, transfer, progress)
    with publish_file(_place(config, runner)) as file:
        file.write_text(json.dumps(cost.to_dict(), indent=1) + "\n")
    return cost


def measure(config: EngineConfig, runner: Runner, transfer: Transfer, progress: Progress) -> CostModel:
    """Runs prompts and copies on the runner, which must not be serving. What that leaves in its pool nobody finds."""
    prefill, decode = _measure_steps(config, runner)
    to_host, to_device = _measure_links(runner, transfer)
    read, write = replace(GUESSED_DISK), replace(GUESSED_DISK)
    if config.cache.disk_dir is not None:
        try:
            read, write = _measure_disk(runner, transfer, config.cache.load_timeout_s)
        except OSError as error:  # the tier goes on without it, and so do we
            progress.note(f"the disk cannot be measured ({error}): guessing what it takes")
    block_tokens = runner.info.block_size
    return CostModel(
        prefill,
        decode,
        to_device,
        to_host,
        read,
        write,
        block_tokens,
        runner.block_bytes,
        blocks_per_copy=16,
        copies_beside_steps=not runner.copies_directly,
    )


def _measure_steps(config: EngineConfig, runner: Runner) -> tuple[PrefillCost, DecodeCost]:
    """Through an engine of its own, whose cache is thrown away."""
    from jserve.engine import Engine

    alone = replace(config, cache=replace(config.cache, prefix_cache=True, host_gib=0, disk_dir=None))
    return measure_steps(Engine(alone, runner.info, runner))


def measure_steps(engine: Engine) -> tuple[PrefillCost, DecodeCost]:
    """Prompts alone, and decodes of several batch sizes after short and long prompts, by the engine's clock."""
    rng, clock = random.Random(0), engine.clock
    budget = engine.info.token_budget
    room = min(engine.max_total_tokens - 8, 4 * budget)
    prefills: list[tuple[int, int, float]] = []
    for _ in range(_TURNS):
        for num_tokens in sorted({min(room, n) for n in (budget // 8, budget // 2, budget, 4 * budget) if n > 0}):
            started_s = clock.now()
            _start(engine, rng, 1, num_tokens, 1)
            prefills.append((num_tokens, 0, clock.now() - started_s))
            _end(engine)
    prefill = fit_prefill(prefills)
    decodes: list[tuple[int, int, float]] = []
    for context in sorted({max(1, min(n, engine.max_total_tokens - _LADDER_TOKENS)) for n in (budget // 16, budget)}):
        batch = _batch(engine, prefill, context)
        for _ in range(_TURNS - 1):
            decodes += _measure_decodes(engine, rng, batch, context)
    return prefill, fit_decode(decodes)


def _batch(engine: Engine, prefill: PrefillCost, context: int) -> int:
    """A power of two: as many sequences of such contexts as run at once and have their prompts computed quickly."""
    room = engine.info.device_blocks // -(-(context + _LADDER_TOKENS) // engine.info.block_size)
    quick = int(_PROMPTS_S / prefill.seconds(context))
    most = max(1, min(engine.config.sched.max_running, _MOST_DECODES, room, quick))
    return 1 << (most.bit_length() - 1)


def _measure_decodes(engine: Engine, rng: random.Random, batch: int, context: int) -> list[tuple[int, int, float]]:
    """(sequences, tokens of their contexts, seconds of a step) of the batch, of half of it, and so on down to one."""
    found: list[tuple[int, int, float]] = []
    running = _start(engine, rng, batch, context, _LADDER_TOKENS)
    while running:
        for _ in range(_UNTIMED):
            _step(engine, running)
        times_s: list[float] = []
        for _ in range(_TIMED):
            started_s = engine.clock.now()
            rows = _step(engine, running)
            if rows == len(running):
                times_s.append(engine.clock.now() - started_s)
        if times_s:
            found.append((len(running), sum(running.values()), median(times_s)))
        for name in list(running)[len(running) // 2 :]:
            engine.abort(name)
            del running[name]
    _end(engine)
    return found


def _start(engine: Engine, rng: random.Random, batch: int, context: int, max_tokens: int) -> dict[str, int]:
    """So many requests, each with a prompt of its own, once all have their first token: the tokens of each."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    running = {f"calibrate {rng.getrandbits(64)}": context for _ in range(batch)}
    for name in running:
        prompt = [rng.randrange(engine.info.vocab_size) for _ in range(context)]
        engine.add(EngineRequest(request_id=name, token_ids=prompt, sampling=params))
    while min(running.values()) == context and _step(engine, running):
        pass
    return running


def _step(engine: Engine, running: dict[str, int]) -> int:
    """Go on until something was said, and add it to the tokens of those who said it; how many did. 0: all has ended."""
    while engine.has_work:
        if outputs := [output for output in engine.step() if output.request_id in running and output.token_ids]:
            for output in outputs:
                running[output.request_id] += len(output.token_ids)
            return len(outputs)
    return 0


def _end(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def _measure_links(runner: Runner, transfer: Transfer) -> tuple[LinkCost, LinkCost]:
    out: list[tuple[int, int, float]] = []
    back: list[tuple[int, int, float]] = []
    for turn in range(_TURNS + 1):
        for count in sorted({1, min(16, runner.info.device_blocks)}):
            blocks, num_bytes = list(range(count)), count * runner.block_bytes
            transfer.store(1, blocks, blocks)
            out_s = _wait(transfer)
            transfer.load(1, blocks, blocks)
            back_s = _wait(transfer)
            if turn:  # the first of each is slow
                out.append((num_bytes, 1, out_s))
                back.append((num_bytes, 1, back_s))
    return fit_link(_medians(out)), fit_link(_medians(back))


def _measure_disk(runner: Runner, transfer: Transfer, limit_s: float) -> tuple[LinkCost, LinkCost]:
    """Reading and writing, a block an operation, as the hierarchy does. OSError if the disk fails or hangs."""
    keys = [secrets.token_bytes(KEY_BYTES) for _ in range(_DISK_BLOCKS)]
    transfer.store(1, [0], [0])
    _wait(transfer)
    try:
        write_s = [_disk_s(transfer, partial(transfer.write, host_slot=0, key=key), limit_s) for key in keys]
        read_s = [_disk_s(transfer, partial(transfer.read, key=key, host_slot=0), limit_s) for key in keys]
    finally:
        for key in keys:
            transfer.delete(key)
    read, write = (fit_link([(runner.block_bytes, 1, median(times_s))]) for times_s in (read_s, write_s))
    return read, write


def _disk_s(transfer: Transfer, start: Callable[[int], None], limit_s: float) -> float:
    """What one operation takes on the disk."""
    deadline_s = time.perf_counter() + limit_s
    start(_DISK_TICKET)
    while not (ended := transfer.poll()):
        if time.perf_counter() > deadline_s:
            transfer.cancel(_DISK_TICKET)
            raise OSError(f"a block takes longer than {limit_s:g} s")
        time.sleep(1e-5)
    if ended[0].error is not None:
        raise OSError(ended[0].error)
    return ended[0].seconds


def _wait(transfer: Transfer) -> float:
    """Until the one copy that is under way has ended; what it took."""
    while not (ended := transfer.poll()):
        time.sleep(1e-5)
    return ended[0].seconds


def _medians(samples: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    sizes = {sample[:2] for sample in samples}
    return [(*size, median(s for *other, s in samples if tuple(other) == size)) for size in sorted(sizes)]


def _place(config: EngineConfig, runner: Runner) -> Path:
    about = (platform.node(), runner.info.backend, runner.info.model, runner.info.dtype, runner.info.block_size)
    where = runner.programs.block_shape(), config.cache.disk_dir
    named = repr((*about, runner.info.token_budget, config.tp, *where))
    return cache_root() / "calibration" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"
