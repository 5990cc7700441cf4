"""The engine: the step loop that joins scheduler, cache and executor. One thread owns it and everything below it.

A request's life here: `add` checks it and puts it in the queue; `step` schedules it, launches it with its batch
mates and, one step later, reads its token; each `EngineOutput` goes back to the front-end; on its last token, or
on `abort`, everything that it held is released. `step` launches batch N+1 before it reads the tokens of batch N, so
that the device never waits for Python.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from jserve.cache.block_keys import root_key
from jserve.cache.cost import restore_strategy
from jserve.cache.kv_cache import BlockTable, KVCache
from jserve.config import EngineConfig, check_budget
from jserve.doors import Clock, EngineInfo, Executor, LaunchedStep, StepResult, SystemClock
from jserve.errors import ConfigError, InvalidRequest, Overloaded
from jserve.meter import Meter
from jserve.request import MAX_STOP_IDS, EngineOutput, EngineRequest
from jserve.sched.admission import Bounds, Load, refusal
from jserve.sched.events import Event, EventKind
from jserve.sched.plan import StepPlan
from jserve.sched.scheduler import Scheduler
from jserve.sched.sequence import Phase, Sequence
from jserve.sched.turns import Turns
from jserve.timeline import History, StepRecord, Timelines

if TYPE_CHECKING:
    from jserve.progress import Progress

COPY_WAIT_S = 0.0005
CLOSE_LIMIT_S = 10.0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot: gauges now, counters since start, medians over the last steps."""

    running: int
    waiting: int
    free_blocks: int
    """Blocks that a request could take now, reusable ones included."""
    cached_blocks: int
    """Blocks held by no request whose KV can still be found."""
    held_blocks: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    prompt_tokens: int
    cached_tokens: int
    preemptions: int
    overrun_tokens: int
    requests_finished: int
    requests_aborted: int
    requests_rejected: int
    host_step_ms_p50: float
    compiles_after_warmup: int
    weight_bytes: int
    pool_bytes: int


class Engine:
    """See the module's story. `add`, `abort`, `step` and `stats` are called from one thread."""

    def __init__(
        self,
        config: EngineConfig,
        info: EngineInfo,
        executor: Executor,
        clock: Clock | None = None,
        cache: KVCache | None = None,
    ) -> None:
        check_budget(info.token_budget, info.block_size)
        self.config = config
        self.info = info
        self.executor = executor
        self.clock = clock or SystemClock()
        self.cache = cache or KVCache(info.device_blocks, info.block_size, reuse=config.cache.prefix_cache)
        self.scheduler = Scheduler(
            self.cache,
            max_running=config.sched.max_running,
            token_budget=info.token_budget,
            order=config.sched.order,
            turns=Turns(config.sched.turn_tokens, config.sched.ahead_s),
            promote_tokens=config.sched.promote_tokens,
            victim=config.sched.victim,
            preempt=config.sched.preempt,
            chunk=config.sched.chunk,
            slo_ttft_s=config.sched.slo_ttft_s,
            slo_tpot_s=config.sched.slo_tpot_s,
            tenant_weights=config.sched.weights(),
        )
        self._bounds = Bounds(config.sched.max_open, config.sched.max_waiting_tokens)
        self._meter = Meter()
        self._tenants: Counter[str] = Counter()
        """Requests open, by tenant."""
        self._ended_blocks = 0
        self._sequences: dict[str, Sequence] = {}
        self._roots: dict[str, bytes] = {}
        self._launched: tuple[StepPlan, LaunchedStep, float, float] | None = None
        """With when it was planned, and how long that took."""
        self._alone_since_s: float | None = None
        """When the last step was launched, if nothing was under way then."""
        self._aborted: list[EngineOutput] = []
        self.timelines = Timelines()
        self._finished = self._aborts = self._rejects = 0

    @classmethod
    def from_config(cls, config: EngineConfig, progress: Progress | None = None) -> Engine:
        """Load the model, size the pool, compile every program. Raises ConfigError or ModelError."""
        from jserve.progress import SilentProgress
        from jserve.runner import Runner
        from jserve.tiers import build_cache

        restore_strategy(config.cache.restore)  # a wrong name is told before the model is loaded
        if config.sched.preempt != "recompute" and not config.cache.host_gib:
            raise ConfigError(
                f"sched.preempt is {config.sched.preempt!r}, and there is no host tier to swap to: "
                "give cache.host_gib some GiB, or use recompute"
            )
        runner = Runner.from_config(config, progress)
        return cls(config, runner.info, runner, cache=build_cache(config, runner, progress or SilentProgress()))

    # --- intake -------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises InvalidRequest if it can never run, Overloaded if the queue is full."""
        try:
            sequence = self._sequence(request)
        except (InvalidRequest, Overloaded) as error:
            self._rejects += 1
            if request.request_id not in self._sequences:
                rejected = Event(EventKind.REJECTED, request.request_id, detail=str(error))
                self.timelines.record([rejected], self.clock.now())
            raise
        self._sequences[request.request_id] = sequence
        self._tenants[sequence.terms.tenant] += 1
        now_s = self.clock.now()
        self.cache.poll(now_s)  # it may have slept for long
        self.scheduler.add(sequence)
        self._note_events(now_s)

    def _sequence(self, request: EngineRequest) -> Sequence:
        prompt, limit = request.token_ids, self.max_total_tokens
        if request.request_id in self._sequences:
            raise InvalidRequest(f"request id {request.request_id!r} is in use: choose another, or leave it out")
        if not prompt:
            raise InvalidRequest("the prompt has no tokens: give at least one")
        if len(prompt) >= limit:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, and this server takes at most {limit - 1} (context of "
                f"{self.info.max_model_len}, KV pool of {self.info.device_blocks} blocks of {self.info.block_size}): "
                "shorten it, or serve with a larger --max-model-len or --device-blocks"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.info.vocab_size:
            wrong = next(t for t in prompt if not 0 <= t < self.info.vocab_size)
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary: use 0 to {self.info.vocab_size - 1}")
        if len(request.stop_token_ids) > MAX_STOP_IDS:
            raise InvalidRequest(f"{len(request.stop_token_ids)} token ids end the request: use at most {MAX_STOP_IDS}")
        request.sampling.check(self.info.vocab_size)
        request.terms.check()
        request.terms.check_deadline(request.deadline_s)
        room = limit - len(prompt)
        sequence = Sequence(
            request_id=request.request_id,
            tokens=list(prompt),
            sampling=request.sampling,
            stop_token_ids=frozenset(request.stop_token_ids),
            table=BlockTable(self._root(request.cache_salt)),
            max_tokens_total=len(prompt) + min(request.sampling.max_tokens or room, room),
            num_prompt=len(prompt),
            terms=request.terms,
            arrival_s=self.clock.now(),
            prefill_s=self._prefill_s(len(prompt)),
        )
        self._check_load(sequence, request.deadline_s)
        return sequence

    def _prefill_s(self, tokens: int) -> float:
        """By the cache's cost model, or else as quickly as prompts went lately."""
        predicted = self.cache.prefill_s(tokens)
        return tokens * self._meter.prefill_token_s if predicted is None else predicted

    def _check_load(self, sequence: Sequence, deadline_s: float | None) -> None:
        """Raise Overloaded if it would not be served, or not in time."""
        tenant, limits = sequence.terms.tenant, (sequence.terms.slo_ttft_s, deadline_s)
        limit_s = min((limit for limit in limits if limit is not None), default=None)
        load = Load(
            requests=len(self._sequences),
            running=self.config.sched.max_running,
            waiting_tokens=self.scheduler.waiting_tokens,
            tokens=sequence.num_prompt,
            tenant_requests=self._tenants[tenant],
            share=self.scheduler.shares.share(tenant, self._tenants),
            prefill_s=sequence.prefill_s,
            freed_blocks_per_s=self._meter.freed_blocks_per_s,
            limit_s=limit_s if self.config.sched.admission == "predict" else None,
        )
        if load.limit_s is None and refusal(load, self._bounds) is None:
            return
        queued_prefill_s, missing_blocks = self.scheduler.work_before(sequence)
        load = replace(load, queued_prefill_s=queued_prefill_s, missing_blocks=missing_blocks)
        if (refused := refusal(load, self._bounds)) is not None:
            raise Overloaded(
                refused.reason, retry_after_s=refused.retry_after_s, predicted_ttft_s=refused.predicted_ttft_s
            )

    @property
    def max_total_tokens(self) -> int:
        """Prompt plus output of one request: the model's context, or the whole pool if that is smaller."""
        return min(self.info.max_model_len, self.info.device_blocks * self.info.block_size)

    def _root(self, salt: str) -> bytes:
        root = self._roots.get(salt)
        if root is None:
            if len(self._roots) >= 65536:  # a salt per request must not grow this for ever
                self._roots.clear()
            root = self._roots[salt] = root_key(self.info.fingerprint, salt)
        return root

    def abort(self, request_id: str) -> None:
        """End a request wherever it is and free what it holds. Its last output comes with the next step."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        self._leave(sequence)
        self.scheduler.abort(sequence)
        self._note_events(self.clock.now())
        self._aborts += 1
        self._aborted.append(_last_output(sequence, [], None))

    def _leave(self, sequence: Sequence) -> None:
        """Its tenant has one less."""
        tenant = sequence.terms.tenant
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]

    # --- the loop -----------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a call of `step` would do anything."""
        return self.scheduler.has_work or self._launched is not None or bool(self._aborted) or self.cache.busy

    def step(self, max_steps: int = 1) -> list[EngineOutput]:
        """One iteration: launch the next batch, then read the one before. Returns what is new, maybe nothing.

        `max_steps`: see `Scheduler.schedule`; above 1 only an executor takes it that says so.
        """
        outputs, self._aborted = self._aborted, []
        previous = self._launched
        start_s = self.clock.now()
        with self.executor.phase("stage"):
            self.cache.poll(start_s)
        self._launched = self._launch(max_steps)
        with self.executor.phase("stage"):
            self.cache.write_through(self._launched[0].steps if self._launched is not None else 1)
        if previous is not None:
            outputs += self._commit(*previous)
            self._observe(previous[0])
        self._alone_since_s = start_s if previous is None else None
        idle = previous is None and self._launched is None
        if self._launched is not None and not self.config.runner.overlap:
            outputs += self._commit(*self._launched)
            self._launched = None
        if idle and not outputs:
            self.clock.wait(COPY_WAIT_S)  # only copies are under way
        return outputs

    def _launch(self, max_steps: int) -> tuple[StepPlan, LaunchedStep, float, float] | None:
        start_s = self.clock.now()
        with self.executor.phase("schedule"):
            plan = self.scheduler.schedule(max_steps)
        self._note_events(start_s)
        if plan is None:
            return None
        schedule_s = self.clock.now() - start_s
        return plan, self.executor.launch(plan), start_s, schedule_s

    def _commit(
        self, plan: StepPlan, launched: LaunchedStep, launched_s: float, schedule_s: float
    ) -> list[EngineOutput]:
        with self.executor.phase("wait"):
            result = launched.read()
        start_s = self.clock.now()
        with self.executor.phase("commit"):
            outputs = self._outputs(plan, result, start_s)
            self._note_events(start_s)
        end_s = self.clock.now()
        ended_blocks = self.scheduler.stats.ended_blocks
        prefill = len(plan.rows) > plan.num_decodes
        freed_blocks, self._ended_blocks = ended_blocks - self._ended_blocks, ended_blocks
        self._meter.step(launched_s, end_s, plan.num_tokens, prefill, freed_blocks, plan.steps)
        self.scheduler.pace(end_s, self._meter.step_s)
        self.timelines.steps.append(
            StepRecord(
                launched_s=launched_s,
                committed_s=end_s,
                num_tokens=plan.num_tokens,
                num_rows=len(plan.rows),
                num_decodes=plan.num_decodes,
                running=self.scheduler.num_running,
                waiting=self.scheduler.num_waiting,
                free_blocks=self.cache.pool.num_free,
                schedule_s=schedule_s,
                pack_s=launched.pack_s,
                commit_s=end_s - start_s,
                steps=plan.steps,
            )
        )
        return outputs

    def _note_events(self, now_s: float) -> None:
        """Give the time to what the scheduler has told since the last call."""
        if self.scheduler.events:
            self.timelines.record(self.scheduler.events.take(), now_s)

    def _outputs(self, plan: StepPlan, result: StepResult, now_s: float) -> list[EngineOutput]:
        outputs = []
        for news in self.scheduler.commit(plan, result.tokens, now_s):
            sequence = news.sequence
            logprobs = None
            if result.logprobs is not None and (entry := result.logprobs[news.row]) is not None:
                logprobs = [entry]
            if sequence.phase is Phase.FINISHED:
                del self._sequences[sequence.request_id]
                self._leave(sequence)
                self._finished += 1
                outputs.append(_last_output(sequence, news.tokens, logprobs))
            else:
                outputs.append(
                    EngineOutput(
                        request_id=sequence.request_id,
                        token_ids=news.tokens,
                        logprobs=logprobs,
                        prompt_tokens=sequence.num_prompt,
                        cached_tokens=sequence.num_cached,
                    )
                )
        return outputs

    def _observe(self, plan: StepPlan) -> None:
        """Tell the cache's cost model what a prompt took that had the device to itself."""
        if self._alone_since_s is not None and len(plan.rows) == 1 and plan.num_tokens > 1:
            (row,) = plan.rows
            self.cache.observe_prefill(row.count, row.start, self.clock.now() - self._alone_since_s)

    # --- what it tells ------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        pool, counters = self.cache.pool, self.scheduler.stats
        return EngineStats(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_reclaimable,
            held_blocks=pool.num_blocks - pool.num_free,
            steps=counters.steps,
            prefill_tokens=counters.prefill_tokens,
            decode_tokens=counters.decode_tokens,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            preemptions=counters.preemptions,
            overrun_tokens=counters.overrun_tokens,
            requests_finished=self._finished,
            requests_aborted=self._aborts,
            requests_rejected=self._rejects,
            host_step_ms_p50=1e3 * median([r.host_s for r in steps]) if (steps := self.timelines.steps) else 0.0,
            compiles_after_warmup=self.executor.compiles_after_warmup,
            weight_bytes=self.info.weight_bytes,
            pool_bytes=self.info.pool_bytes,
        )

    def step_records(self) -> list[StepRecord]:
        """The last steps, oldest first."""
        return list(self.timelines.steps)

    def history(self, request_id: str | None = None) -> History:
        """What has happened to a request, or to all that are remembered. Raises NotFound."""
        return self.timelines.tell(request_id, self.clock.now())

    def close(self) -> None:
        """End every request and give the device back."""
        for request_id in list(self._sequences):
            self.abort(request_id)
        self.cache.drain()
        end_s = self.clock.now() + CLOSE_LIMIT_S  # for what is still to be written to disk
        while self.has_work and self.clock.now() < end_s:
            self.step()
        self.cache.close()
        self.executor.close()


def _last_output(sequence: Sequence, token_ids: list[int], logprobs: Any) -> EngineOutput:
    return EngineOutput(
        request_id=sequence.request_id,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        prompt_tokens=sequence.num_prompt,
        cached_tokens=max(sequence.num_cached, 0),
    )
