"""The production engine over the simulated executor: what the server tests serve where the model does not matter.

Its tokens are bytes, drawn by a hash of everything before them, so that no two prompts have the same answer.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

from jserve.config import EngineConfig
from jserve.doors import EngineInfo
from jserve.engine import Engine
from jserve.progress import Progress
from jserve.sched.plan import StepPlan
from jserve.simulated import SimulatedClock, SimulatedExecutor, SimulatedStep

BYTES = 256
VOCAB = BYTES + 3  # with the special tokens of the tests' tokenizer, which the simulated model never says
CONTEXT = 1000
STEP_S = 0.002
POISON = 255
"""A prompt of this token alone kills the engine process in the middle of a step."""


class PacedExecutor(SimulatedExecutor):
    """Takes real time, so that a stream can be left in the middle."""

    def launch(self, plan: StepPlan) -> SimulatedStep:
        time.sleep(STEP_S)
        if any(row.sequence.tokens == [POISON] for row in plan.rows):
            os._exit(17)
        return super().launch(plan)


def make(config: EngineConfig, progress: Progress) -> Engine:
    del progress
    clock, blocks, size = SimulatedClock(), config.cache.device_blocks or 1000, config.cache.block_size or 16
    executor = PacedExecutor(clock, blocks, size, BYTES)
    budget = config.sched.token_budget or 512
    info = EngineInfo("simulated", "simulated", VOCAB, CONTEXT, size, blocks, budget, "none", "simulated", 0, 0)
    return Engine(config, info, executor, clock)


def make_on_a_full_disk(config: EngineConfig, progress: Progress) -> Engine:
    raise OSError(errno.ENOSPC, "No space left on device", "/cache/kernels.so")


def make_slowly(config: EngineConfig, progress: Progress) -> Engine:
    """Loads for longer than any test waits."""
    time.sleep(120)
    return make(config, progress)


def make_with_a_compiler(config: EngineConfig, progress: Progress) -> Engine:
    """Waits for a child process, as while a kernel is compiled."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    print("compiler", child.pid, file=sys.stderr, flush=True)
    child.wait()
    return make(config, progress)


def make_with_a_bar(config: EngineConfig, progress: Progress) -> Engine:
    with progress.track("loading", total=1):
        return make_slowly(config, progress)
