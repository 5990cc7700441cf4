"""Measures what the cost model needs, once for each machine and model: computing a prompt, and copying blocks.

It takes a second or two, on the runner and the copies that will serve, and is kept under the cache folder. What is seen
while serving corrects it later (`cache.cost`).
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

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


def calibrated(config: EngineConfig, runner: Runner, transfer: Transfer, progress: Progress) -> CostModel:
    """The model of this machine and server: from the cache folder, or measured now."""
    place = _place(config, runner)
    if place.is_file():
        try:
            return CostModel.from_dict(json.loads(place.read_text()))
        except (ValueError, ConfigError):
            progress.note(f"{place} is no calibration: measuring again")
    progress.note("measuring what computing and copying KV take here")
    cost = measure(config, runner, transfer)
    with publish_file(place) as file:
        file.write_text(json.dumps(cost.to_dict(), indent=1) + "\n")
    return cost


def measure(config: EngineConfig, runner: Runner, transfer: Transfer) -> CostModel:
    """Runs prompts and copies on the runner, which must not be serving. What that leaves in its pool nobody finds."""
    prefill, decode = _measure_steps(config, runner)
    to_host, to_device = _measure_links(runner, transfer)
    # A disk is measured as it is used, from a guess: one NVMe drive.
    disk = LinkCost(1e9, 1e-4)
    block_tokens = runner.info.block_size
    return CostModel(
        prefill, decode, to_device, to_host, disk, replace(disk), block_tokens, runner.block_bytes, blocks_per_copy=16
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
    named = repr((*about, runner.info.token_budget, config.tp, runner.programs.block_shape()))
    return cache_root() / "calibration" / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.json"
