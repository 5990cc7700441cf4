"""Measures what the cost model needs, once for each machine, model and disk: computing a prompt, and copying blocks.

It takes a second or two, on the runner and the copies that will serve, and is kept under the cache folder. What is seen
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
    from jserve.runner import Runner

_TURNS = 3
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

    engine = Engine(
        replace(config, cache=replace(config.cache, prefix_cache=True, host_gib=0, disk_dir=None)), runner.info, runner
    )
    rng = random.Random(0)
    budget, room = runner.info.token_budget, min(engine.max_total_tokens - 8, 4 * runner.info.token_budget)
    prefills: list[tuple[int, int, float]] = []
    decodes: list[tuple[int, int, float]] = []
    for turn in range(_TURNS):
        for num_tokens in sorted({min(room, n) for n in (budget // 8, budget // 2, budget, 4 * budget) if n > 0}):
            prompt = [rng.randrange(runner.info.vocab_size) for _ in range(num_tokens)]
            params = SamplingParams(max_tokens=4, ignore_eos=True)
            name = f"calibrate {turn} {num_tokens}"
            engine.add(EngineRequest(request_id=name, token_ids=prompt, sampling=params))
            times_s: list[float] = []
            start_s = time.perf_counter()
            while engine.has_work:
                for _ in engine.step():
                    times_s.append(time.perf_counter() - start_s)
            prefills.append((num_tokens, 0, times_s[0]))
            decodes.append((1, num_tokens, (times_s[-1] - times_s[0]) / (len(times_s) - 1)))
    return fit_prefill(prefills), fit_decode(decodes)


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
