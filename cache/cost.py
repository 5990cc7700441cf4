"""What computing and copying KV will take, and what follows: load a prefix, stage it from disk, or compute it again.

`CostModel` predicts times from a few numbers that are measured at start-up (`cost_fit`) and corrected by every time
that is seen later (`observe`). `restore_strategy` names the functions that choose, from a snapshot of one request, how
much of its prefix comes from which tier; `swap_or_recompute` chooses for a preempted sequence. All of it is
arithmetic: nothing here measures, copies or remembers requests.

A token's KV can only be computed when all KV before it is there. So either a prefix is loaded, up to a split, and then
the rest is computed; or, as in Cake (arXiv 2410.03065), the prompt is computed from its front while the end of what the
tiers have of it is loaded: a gap is left, which is closed from behind, and the computation goes on after it. That takes
the longer of the two times instead of their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jserve.errors import ConfigError

_FORMAT = 2
_STEP = 0.1  # share of the (logarithmic) error that one observation corrects
_MOST_PER_OBSERVATION = math.log(2)  # what one outlier may claim
_MOST_SCALE = 16.0
_GAP_SAVES = 0.2
"""What a gap must save of the time that the best split takes: before and after it, the computation goes in chunks of
its own, smaller than a step could be."""


def _corrected(scale: float, predicted_s: float, observed_s: float) -> float:
    """The correction factor after one more observation: a running geometric mean of observed / predicted, clipped."""
    if predicted_s <= 0 or observed_s <= 0 or observed_s == predicted_s:
        return scale
    error = math.log(observed_s / predicted_s)
    step = _STEP * max(-_MOST_PER_OBSERVATION, min(_MOST_PER_OBSERVATION, error))
    return max(1 / _MOST_SCALE, min(_MOST_SCALE, scale * math.exp(step)))


@dataclass(slots=True)
class PrefillCost:
    """Time to compute the KV of `new` tokens after `cached` ones: `overhead + a·n + b·n·(c + n/2)`.

    `a` is the work of the linear layers, which is per token; `b` that of attention, which is per pair of a query and
    a key that it sees: token i of the n sees c + i keys, c + n/2 on average.
    """

    overhead_s: float
    per_token_s: float
    per_pair_s: float
    scale: float = 1.0

    @classmethod
    def from_flops(
        cls,
        num_params: float,
        num_layers: int,
        query_width: int,
        flops_per_s: float,
        *,
        linear_efficiency: float = 0.6,
        attention_efficiency: float = 0.6,
        overhead_s: float = 0.01,
    ) -> PrefillCost:
        """The roofline, for where nothing has been measured.

        A forward pass takes 2 FLOP per parameter and token; attention 4 per layer, channel of `query_width` (heads x
        head_dim), query and key: 2 for the score and 2 for the value. `flops_per_s`: peak, all devices together.
        """
        return cls(
            overhead_s,
            2 * num_params / (linear_efficiency * flops_per_s),
            4 * num_layers * query_width / (attention_efficiency * flops_per_s),
        )

    def seconds(self, new: float, cached: float = 0) -> float:
        if new <= 0:
            return 0.0
        return self.scale * (self.overhead_s + self.per_token_s * new + self.per_pair_s * new * (cached + new / 2))

    def observe(self, new: int, cached: int, seconds: float) -> None:
        """A prefill took this long."""
        self.scale = _corrected(self.scale, self.seconds(new, cached), seconds)


@dataclass(slots=True)
class DecodeCost:
    """Time of a step that decodes one token each for some sequences: weights once, then each context's KV is read."""

    overhead_s: float
    per_sequence_s: float = 0.0
    per_context_token_s: float = 0.0
    scale: float = 1.0

    def seconds(self, sequences: float, context_tokens: float) -> float:
        """`context_tokens`: of all sequences together."""
        if sequences <= 0:
            return 0.0
        return self.scale * (
            self.overhead_s + self.per_sequence_s * sequences + self.per_context_token_s * context_tokens
        )

    def observe(self, sequences: int, context_tokens: int, seconds: float) -> None:
        """A decode-only step took this long."""
        self.scale = _corrected(self.scale, self.seconds(sequences, context_tokens), seconds)


@dataclass(slots=True)
class LinkCost:
    """Time of copies in one direction: `copies·per_copy + bytes/bandwidth`.

    The fixed part is why small blocks are slow: on PCIe 4 x16 a pinned copy of 128 KiB runs at 17 of 26.7 GB/s.
    """

    bytes_per_s: float
    per_copy_s: float = 0.0
    scale: float = 1.0

    def seconds(self, num_bytes: float, copies: float = 1) -> float:
        return self.scale * (copies * self.per_copy_s + num_bytes / self.bytes_per_s)

    def observe(self, num_bytes: float, copies: float, seconds: float, least_s: float | None = None) -> None:
        """A group of copies took this long from the first's start to the last's end; or, with `least_s`, between that
        and this, which tells nothing as long as the prediction lies between them."""
        predicted_s = self.seconds(num_bytes, copies)
        observed_s = seconds if least_s is None else min(max(predicted_s, least_s), seconds)
        self.scale = _corrected(self.scale, predicted_s, observed_s)


@dataclass(slots=True)
class CostModel:
    """One model on one machine."""

    prefill: PrefillCost
    decode: DecodeCost
    host_to_device: LinkCost
    device_to_host: LinkCost
    disk_read: LinkCost
    disk_write: LinkCost
    block_tokens: int
    block_bytes: int
    blocks_per_copy: int = 1
    """Blocks that one copy between device and host carries, when there are many to carry."""
    copies_beside_steps: bool = True
    """Whether copies between device and host leave the device's time to the steps, as a GPU's copy engines do."""

    def load_s(self, blocks: float) -> float:
        """Host to device."""
        return self.host_to_device.seconds(blocks * self.block_bytes, blocks / self.blocks_per_copy)

    def store_s(self, blocks: float) -> float:
        """Device to host."""
        return self.device_to_host.seconds(blocks * self.block_bytes, blocks / self.blocks_per_copy)

    def stage_s(self, blocks: float) -> float:
        """Disk to host, a block a read."""
        return self.disk_read.seconds(blocks * self.block_bytes, blocks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> CostModel:
        """What `to_dict` gave; ConfigError if it is anything else."""
        parts = {"prefill": PrefillCost, "decode": DecodeCost}
        links = dict.fromkeys(("host_to_device", "device_to_host", "disk_read", "disk_write"), LinkCost)
        try:
            if said["format"] != _FORMAT:
                raise ValueError(f"format {said['format']!r} instead of {_FORMAT}")
            given = {name: value for name, value in said.items() if name != "format"}
            for name, part in (parts | links).items():
                given[name] = part(**_positive(name, given[name]))
            return cls(**given)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"this is no calibration of jserve ({error}): calibrate again") from None


def _positive(name: str, numbers: Mapping[str, Any]) -> dict[str, float]:
    given = {field_name: float(value) for field_name, value in numbers.items()}
    for field_name, value in given.items():
        if not 0 <= value < math.inf or (value == 0 and field_name in ("bytes_per_s", "scale")):
            raise ValueError(f"{name}.{field_name} is {value}")
    return given


# --- what to restore, and from where


@dataclass(frozen=True, slots=True)
class Reach:
    """What is known of one waiting request. Each tier reaches at least as far as the one above it.

    `host_blocks` counts the leading blocks that are on the device or the host, and so on: a chain that is [0, 2) on the
    device, [2, 5) on the host and [5, 9) on disk has reaches 2, 5 and 9.
    """

    prompt_tokens: int
    device_blocks: int
    host_blocks: int
    disk_blocks: int
    waiting: int = 0
    """Requests ahead of it in the queue."""
    hidden_s: float = 0.0
    """Time until it can be dispatched at the earliest, which hides reads from disk."""
    staging_room_blocks: int = 1 << 60
    """Host blocks that staging may still take."""
    others: int = 0
    """Requests that wait for the device while this one is computed on it."""
    disk_wait_s: float = 0.0
    """Time until the disk has read what was promised before."""
    readers: int = 0
    """Requests that wait for the disk while it is read for this one."""

    def __post_init__(self) -> None:
        if not 0 <= self.device_blocks <= self.host_blocks <= self.disk_blocks:
            raise ValueError(f"reaches must grow from tier to tier: {self}")


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to do for one request: load, stage, and compute the rest; or load, and compute up to and after the gap."""

    load_host_blocks: int
    """Blocks to copy from host to device, from the device's reach on."""
    stage_disk_blocks: int
    """Blocks to read from disk to host now, from the host's reach on."""
    deferred_disk_blocks: int
    """Blocks that would be read too if staging had room: ask again when it has, while the request still waits."""
    gap: tuple[int, int]
    """From block, to block: what is brought from host and disk while that before it is computed; (0, 0) if nothing is.
    With a gap, nothing is staged or deferred."""
    recompute_tokens: int
    """Tokens of the prompt to compute: those that no tier has, and those that are not worth loading."""
    ttft_s: float
    """Predicted, from now."""
    why: str

    @property
    def reason(self) -> str:
        """In a line, for people."""
        start, end = self.gap
        gap = f", bring {end - start} more blocks beside it" if end else ""
        return (
            f"{self.why}: load {self.load_host_blocks} and stage {self.stage_disk_blocks} blocks, compute "
            f"{self.recompute_tokens} tokens{gap} in {self.ttft_s:.4g} s"
        )


Strategy = Callable[[CostModel, Reach], RestorePlan]


@dataclass(slots=True)
class _Outlook:
    """The time to first token as a function of the split, or of the gap, in blocks.

    The disk part is read once the disk is free, during the time that the queue takes anyway (`hidden_s`); what is left
    of the reading, the copies from host to device and the computation follow. So for host reach h and device reach d

        load(x)    = max(0, disk_wait + (x - h)·t_disk - hidden, if x > h) + (x - d)·t_link
        compute(x) = prefill(prompt - x·block, x·block)

    and the time to first token is hidden + load(x) + compute(x).

    With a gap from s to e, what is in front of s is there, loaded or computed, and then

        bring(s)  = max((e - s)·t_link, what is left of reading + t_link)   (blocks are copied on as they come)
        before(s) = prefill((s - front)·block, front·block)

    take their time beside each other; compute(e) follows. `front` is h, if the host's part is loaded first; or d, if it
    is part of what is computed or brought.
    """

    model: CostModel
    reach: Reach
    _disk_s: float = field(init=False)
    _link_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._disk_s = self.model.stage_s(1)
        self._link_s = self.model.load_s(1)

    def read_s(self, blocks: int, beside_s: float = 0.0) -> float:
        """What is left of reading so many blocks when the request is admitted, and so much later."""
        if not blocks:
            return 0.0
        reach = self.reach
        return max(0.0, reach.disk_wait_s + blocks * self._disk_s - reach.hidden_s - beside_s)

    def compute_s(self, split: int) -> float:
        cached = split * self.model.block_tokens
        return self.model.prefill.seconds(max(1, self.reach.prompt_tokens - cached), cached)

    def ttft_s(self, split: int) -> float:
        return self._sum_s(split, 0, 0)

    def delay_s(self, split: int) -> float:
        """What all together wait: the request itself, and those beside it for the device's and the disk's time that it
        takes."""
        return self._sum_s(split, self.reach.others, self.reach.readers)

    def _sum_s(self, split: int, others: int, readers: int) -> float:
        """Written out, for it is most of what a decision takes."""
        reach = self.reach
        staged = split - reach.host_blocks
        sum_s = reach.hidden_s + (split - reach.device_blocks) * self._link_s + (1 + others) * self.compute_s(split)
        if staged > 0:
            read_s = staged * self._disk_s
            sum_s += max(0.0, reach.disk_wait_s + read_s - reach.hidden_s) + readers * read_s
        return sum_s

    def others_read_s(self, blocks: int) -> float:
        """What those who wait for the disk wait together for so many blocks, if any."""
        return self.reach.readers * max(0, blocks) * self._disk_s

    def best_split(self, most: int) -> int:
        """The split up to `most` blocks with the least delay; of equal ones the longest load.

        compute(x) is concave and falls, load(x) is linear but for a step after the host's reach, where the disk is
        not free, and a corner where the disk part is no longer hidden. So the sum is least at an end or a corner.
        """
        reach = self.reach
        hidden = reach.host_blocks
        if self._disk_s > 0:
            hidden += math.floor(min(max(0.0, reach.hidden_s - reach.disk_wait_s) / self._disk_s, most))
        corners = {reach.device_blocks, reach.host_blocks, reach.host_blocks + 1, hidden, hidden + 1, most}
        return min((x for x in corners if x <= most), key=lambda x: (self.delay_s(x), -x))

    def bring_s(self, front: int, start: int, end: int) -> float:
        """From when what is in front is there, until the gap is closed."""
        reach, link_s = self.reach, self._link_s
        read_s = self.read_s(max(0, end - max(start, reach.host_blocks)), (front - reach.device_blocks) * link_s)
        return max((end - start) * link_s, read_s + link_s)

    def gap_times_s(self, front: int, start: int, end: int) -> tuple[float, float]:
        """Time to first token, and what of it the device computes."""
        reach, block = self.reach, self.model.block_tokens
        front_s = (front - reach.device_blocks) * self._link_s
        before_s = self.model.prefill.seconds((start - front) * block, front * block)
        after_s = self.compute_s(end)
        beside_s = max(before_s, self.bring_s(front, start, end))
        return reach.hidden_s + front_s + beside_s + after_s, before_s + after_s

    def best_gap(self, room: int, instead_of: int) -> tuple[int, int, int] | None:
        """Front, start and end of the gap with the least delay, if it saves enough of what this split takes.

        It ends where the tiers' reach does, or the room: the later a block, the longer it takes to be computed.
        """
        reach = self.reach
        device, host, disk = reach.device_blocks, reach.host_blocks, reach.disk_blocks
        best, below_s = None, self.delay_s(instead_of)
        below_s -= _GAP_SAVES * (below_s - reach.hidden_s)
        for front, end in ((device, min(disk, host + room)), (host, disk)):
            low, high = front + 1, min(host, end - 1) if front < host else end - 1
            low = max(low, end - room) if front == host else low
            if low > high:
                continue
            alone_s = reach.hidden_s + (front - device) * self._link_s + (1 + reach.others) * self.compute_s(end)
            if alone_s + self.bring_s(front, high, end) >= below_s:
                continue  # even if what is in front of it took no time
            start = self._best_start(front, low, high, end)
            before_s = self.model.prefill.seconds(
                (start - front) * self.model.block_tokens, front * self.model.block_tokens
            )
            beside_s = max(before_s, self.bring_s(front, start, end)) + reach.others * before_s
            delay_s = alone_s + beside_s + self.others_read_s(end - max(start, host))
            if delay_s < below_s:
                best, below_s = (front, start, end), delay_s
        return best

    def _best_start(self, front: int, low: int, high: int, end: int) -> int:
        """Of a gap that starts between `low` and `high`: the start with the least delay.

        before(s) is convex and rises, bring(s) is the maximum of falling lines. So the delay is convex in s, and the
        sign of its slope tells on which side the least is.
        """
        prefill, block = self.model.prefill, self.model.block_tokens
        host, others = self.reach.host_blocks, self.reach.others
        disk_s, link_s = self._disk_s, self._link_s
        lead_s = self.reach.hidden_s + (front - self.reach.device_blocks) * link_s - link_s
        lead_s -= self.reach.disk_wait_s if end > host else 0.0
        linear = prefill.scale * block * (prefill.per_token_s + prefill.per_pair_s * block * front)
        square, fixed = prefill.scale * prefill.per_pair_s * block * block / 2, prefill.scale * prefill.overhead_s
        while low < high:
            middle = (low + high) // 2
            count = middle - front
            before_s = fixed + (linear + square * count) * count
            more_s = linear + square * (2 * count + 1)  # for one block more
            unread = end - (middle if middle > host else host)
            brought_s = (end - middle) * link_s
            now_s = max(before_s, brought_s, link_s, unread * disk_s - lead_s)
            later_s = max(before_s + more_s, brought_s - link_s, link_s, (unread - (middle >= host)) * disk_s - lead_s)
            spared_s = self.reach.readers * disk_s if middle >= host else 0.0
            if now_s <= later_s + others * more_s - spared_s:
                high = middle
            else:
                low = middle + 1
        return low


def _plan(outlook: _Outlook, split: int, wanted: int, why: str) -> RestorePlan:
    """`split`: in blocks, with the room there is; `wanted`: the same with endless room."""
    reach = outlook.reach
    return RestorePlan(
        min(split, reach.host_blocks) - reach.device_blocks,
        max(0, split - reach.host_blocks),
        max(0, wanted - max(split, reach.host_blocks)),
        (0, 0),
        max(1, reach.prompt_tokens - split * outlook.model.block_tokens),
        outlook.ttft_s(split),
        why,
    )


def _gap_plan(outlook: _Outlook, front: int, start: int, end: int) -> RestorePlan:
    reach, block = outlook.reach, outlook.model.block_tokens
    return RestorePlan(
        front - reach.device_blocks,
        0,
        0,
        (start, end),
        (start - front) * block + reach.prompt_tokens - end * block,
        outlook.gap_times_s(front, start, end)[0],
        "least time",
    )


def _with_room(outlook: _Outlook, wanted: int, why: str) -> RestorePlan:
    """For the fixed rules: stage as much of `wanted` as there is room for."""
    return _plan(outlook, min(wanted, outlook.reach.host_blocks + outlook.reach.staging_room_blocks), wanted, why)


def by_cost(model: CostModel, reach: Reach) -> RestorePlan:
    """Whatever gives the first token soonest."""
    outlook = _Outlook(model, reach)
    wanted, room = outlook.best_split(reach.disk_blocks), reach.staging_room_blocks
    most = reach.host_blocks + room
    split = wanted if wanted <= most else outlook.best_split(most)
    gap = outlook.best_gap(room, instead_of=split)
    if gap is not None:
        return _gap_plan(outlook, *gap)
    if most < reach.disk_blocks and (wider := outlook.best_gap(reach.disk_blocks, instead_of=wanted)) is not None:
        wanted = max(wanted, reach.host_blocks + wider[2] - max(wider[1], reach.host_blocks))
    return _plan(outlook, split, wanted, "least time")


def by_flashgen(model: CostModel, reach: Reach) -> RestorePlan:
    """FlashGen §3.3: the host always; the disk if a request ahead hides the read, that is if at least one waits."""
    if reach.waiting < 1:
        return _with_room(_Outlook(model, reach), reach.host_blocks, "nobody waits ahead")
    return _with_room(_Outlook(model, reach), reach.disk_blocks, f"{reach.waiting} wait ahead")


def by_threshold(model: CostModel, reach: Reach, *, tokens: int) -> RestorePlan:
    """FlashGen's rule, and only for long reads: the authors' public code asks for 2048 tokens that only disk has."""
    on_disk = (reach.disk_blocks - reach.host_blocks) * model.block_tokens
    if on_disk < tokens:
        why = f"{on_disk} tokens on disk are fewer than {tokens}"
        return _with_room(_Outlook(model, reach), reach.host_blocks, why)
    return by_flashgen(model, reach)


def always_load(model: CostModel, reach: Reach) -> RestorePlan:
    """Every block that any tier has."""
    return _with_room(_Outlook(model, reach), reach.disk_blocks, "always load")


def never_load(model: CostModel, reach: Reach) -> RestorePlan:
    """Only what is on the device."""
    return _with_room(_Outlook(model, reach), reach.device_blocks, "never load")


def restore_strategy(name: str) -> Strategy:
    """The strategy of this name: cost, flashgen, threshold:N, always or never; ConfigError for another."""
    chosen: dict[str, Strategy] = {
        "cost": by_cost,
        "flashgen": by_flashgen,
        "always": always_load,
        "never": never_load,
    }
    kind, colon, number = name.partition(":")
    if kind == "threshold" and number.isdecimal():
        tokens = int(number)
        return lambda model, reach: by_threshold(model, reach, tokens=tokens)
    if colon or kind not in chosen:
        raise ConfigError(f"there is no restore strategy {name!r}: use one of {', '.join(chosen)}, or threshold:TOKENS")
    return chosen[kind]


# --- preemption


@dataclass(frozen=True, slots=True)
class SwapDecision:
    """How a preempted sequence will come back."""

    swap: bool
    swap_s: float
    recompute_s: float
    reason: str


def swap_or_recompute(
    model: CostModel, tokens: int, written_tokens: int = 0, host_room_blocks: int | None = None, others: int = 0
) -> SwapDecision:
    """Whether a sequence with the KV of `tokens` on the device is cheaper to copy out and back, or to compute again.

    `written_tokens` have been written through to the host, so that they are copied one way only. A last block that is
    not full is computed again in either case. `host_room_blocks`: free blocks of the host; None if there is no limit.
    This is the comparison of "Uncover the Overhead and Resource Usage for Handling KV Cache Overflow in LLM
    Inference" (SC'24 poster), where both directions were always copied, and everybody waited for either.

    `others`: requests that run meanwhile. What is compared is the wait of all together: computing takes the device from
    each of them, in steps that they take anyway; copying does so only where it is not done beside the steps.
    """
    blocks = tokens // model.block_tokens
    out = max(0, blocks - written_tokens // model.block_tokens)
    tail = tokens - blocks * model.block_tokens
    copy_s = (model.store_s(out) if out else 0.0) + (model.load_s(blocks) if blocks else 0.0)
    tail_s, recompute_s = model.prefill.seconds(tail, tokens - tail), model.prefill.seconds(tokens)
    swap_s = copy_s + tail_s
    if host_room_blocks is not None and out > host_room_blocks:
        why = f"recompute: {out} blocks have no place on the host, where {host_room_blocks} are free"
        return SwapDecision(False, swap_s, recompute_s, why)
    step_s = model.prefill.scale * model.prefill.overhead_s
    taken_s = max(0.0, tail_s - step_s) + (0.0 if model.copies_beside_steps else copy_s)
    swap = swap_s + others * taken_s <= recompute_s + others * max(0.0, recompute_s - step_s)
    why = f"{'swap' if swap else 'recompute'}: swap takes {swap_s:.4g} s ({out} blocks out, {blocks} back), "
    why += f"recompute {recompute_s:.4g} s" + (f", which {others} others wait for" if others else "")
    return SwapDecision(swap, swap_s, recompute_s, why)


def break_even_tokens(model: CostModel, most_tokens: int, *, from_disk: bool) -> int | None:
    """The shortest history, in whole blocks, that is sooner loaded than computed; None if none up to `most_tokens` is.

    One new token is computed in either case, so that the fixed part of a step counts on both sides. Every longer
    history is sooner loaded too: loading is linear in the length, and computing is convex.
    """
    for blocks in range(1, most_tokens // model.block_tokens + 1):
        tokens = blocks * model.block_tokens
        load_s = model.load_s(blocks) + (model.stage_s(blocks) if from_disk else 0.0)
        if load_s + model.prefill.seconds(1, tokens) < model.prefill.seconds(tokens + 1):
            return tokens
    return None


def break_even_bytes_per_s(prefill: PrefillCost, tokens: int, kv_bytes_per_token: float, fixed_s: float = 0.0) -> float:
    """The bandwidth from which loading the KV of `tokens` is quicker than computing it.

    c·kv/B + fixed < prefill(c, 0), solved for B. Where the linear layers dominate it is about kv·F/(2·parameters)
    for F effective FLOP/s, whatever c. Infinite where computing is quicker than the fixed part alone.
    """
    spare_s = prefill.seconds(tokens) - fixed_s
    return tokens * kv_bytes_per_token / spare_s if spare_s > 0 else math.inf
