"""What computing and copying KV will take, and what follows: load a prefix, stage it from disk, or compute it again.

`CostModel` predicts times from a few numbers that are measured at start-up (`cost_fit`) and corrected by every time
that is seen later (`observe`). `restore_strategy` names the functions that choose, from a snapshot of one request, how
much of its prefix comes from which tier; `swap_or_recompute` chooses for a preempted sequence. All of it is
arithmetic: nothing here measures, copies or remembers requests.

A strategy chooses one number, the split: blocks before it are loaded, tokens from it on are computed. The loaded part
is always a prefix, because a token's KV can only be computed when all KV before it is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jserve.errors import ConfigError

_FORMAT = 1
_STEP = 0.1  # share of the (logarithmic) error that one observation corrects
_MOST_PER_OBSERVATION = math.log(2)  # what one outlier may claim
_MOST_SCALE = 16.0


def _corrected(scale: float, predicted_s: float, observed_s: float) -> float:
    """The correction factor after one more observation: a running geometric mean of observed / predicted, clipped."""
    if predicted_s <= 0 or observed_s <= 0:
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

    def __post_init__(self) -> None:
        if not 0 <= self.device_blocks <= self.host_blocks <= self.disk_blocks:
            raise ValueError(f"reaches must grow from tier to tier: {self}")


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to do for one request: load, stage, and compute the rest."""

    load_host_blocks: int
    """Blocks to copy from host to device, from the device's reach on."""
    stage_disk_blocks: int
    """Blocks to read from disk to host now, from the host's reach on."""
    deferred_disk_blocks: int
    """Blocks that would be read too if staging had room: ask again when it has, while the request still waits."""
    recompute_tokens: int
    """Tokens of the prompt to compute: those that no tier has, and those that are not worth loading."""
    ttft_s: float
    """Predicted, from now."""
    recompute_ttft_s: float
    """Predicted, had nothing been loaded."""
    load_ttft_s: float
    """Predicted, had all been loaded that any tier has."""
    why: str

    @property
    def reason(self) -> str:
        """In a line, for people."""
        return (
            f"{self.why}: load {self.load_host_blocks} and stage {self.stage_disk_blocks} blocks, compute "
            f"{self.recompute_tokens} tokens in {self.ttft_s:.4g} s ({self.recompute_ttft_s:.4g} s if nothing is "
            f"loaded, {self.load_ttft_s:.4g} s if all is)"
        )


Strategy = Callable[[CostModel, Reach], RestorePlan]


@dataclass(slots=True)
class _Outlook:
    """The time to first token as a function of the split, in blocks.

    A block of the disk part is read during the time that the queue takes anyway (`hidden_s`); what is left of the
    reading, the copies from host to device and the computation follow. So for host reach h and device reach d

        load(x)    = max(0, (x - h)·t_disk - hidden) + (x - d)·t_link
        compute(x) = prefill(prompt - x·block, x·block)

    and the time to first token is hidden + load(x) + compute(x); or hidden + max(load(x), compute(x)), where the
    engine computes a layer while the next layer's KV is being copied (PipeSwitch; FlashGen §3.2.2).
    """

    model: CostModel
    reach: Reach
    layerwise: bool
    _disk_s: float = field(init=False)
    _link_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._disk_s = self.model.stage_s(1)
        self._link_s = self.model.load_s(1)

    def load_s(self, split: int) -> float:
        staged = max(0, split - self.reach.host_blocks)
        read_s = max(0.0, staged * self._disk_s - self.reach.hidden_s)
        return read_s + (split - self.reach.device_blocks) * self._link_s

    def compute_s(self, split: int) -> float:
        cached = split * self.model.block_tokens
        return self.model.prefill.seconds(max(1, self.reach.prompt_tokens - cached), cached)

    def ttft_s(self, split: int) -> float:
        return self.delay_s(split, others=0)

    def delay_s(self, split: int, others: int) -> float:
        """What all together wait: the request itself, and those beside it for the device's time that it takes."""
        load_s, compute_s = self.load_s(split), self.compute_s(split)
        alone_s = max(load_s, compute_s) if self.layerwise else load_s + compute_s
        return self.reach.hidden_s + alone_s + others * compute_s

    def best_split(self, most: int) -> int:
        """The split up to `most` blocks with the least delay; of equal ones the longest load.

        compute(x) is concave and falls, load(x) is linear but for two corners: at the host's reach, and where the
        disk part is no longer hidden. So the sum is least at an end or a corner, and the maximum (a falling against
        a rising function) where the two meet.
        """
        reach = self.reach
        hidden = reach.host_blocks
        if self._disk_s > 0:
            hidden += math.floor(min(reach.hidden_s / self._disk_s, most))
        corners = {reach.device_blocks, reach.host_blocks, hidden, hidden + 1, most}
        if self.layerwise:
            meeting = self._meeting(reach.device_blocks, most)
            corners |= {max(reach.device_blocks, meeting - 1), meeting}
        return min((x for x in corners if x <= most), key=lambda x: (self.delay_s(x, reach.others), -x))

    def _meeting(self, low: int, high: int) -> int:
        """The first split at which loading takes as long as computing; `high` if none."""
        while low < high:
            middle = (low + high) // 2
            if self.load_s(middle) >= self.compute_s(middle):
                high = middle
            else:
                low = middle + 1
        return low


def _plan(outlook: _Outlook, split: int, wanted: int, why: str) -> RestorePlan:
    """`split`: in blocks, with the room there is; `wanted`: the same with endless room."""
    reach = outlook.reach
    ttft_s, recompute_s, load_s = (outlook.ttft_s(x) for x in (split, reach.device_blocks, reach.disk_blocks))
    return RestorePlan(
        min(split, reach.host_blocks) - reach.device_blocks,
        max(0, split - reach.host_blocks),
        max(0, wanted - max(split, reach.host_blocks)),
        max(1, reach.prompt_tokens - split * outlook.model.block_tokens),
        ttft_s,
        recompute_s,
        load_s,
        why,
    )


def _with_room(outlook: _Outlook, wanted: int, why: str) -> RestorePlan:
    """For the fixed rules: stage as much of `wanted` as there is room for."""
    return _plan(outlook, min(wanted, outlook.reach.host_blocks + outlook.reach.staging_room_blocks), wanted, why)


def by_cost(model: CostModel, reach: Reach, *, layerwise: bool = False) -> RestorePlan:
    """Whatever gives the first token soonest."""
    outlook = _Outlook(model, reach, layerwise)
    wanted = outlook.best_split(reach.disk_blocks)
    most = reach.host_blocks + reach.staging_room_blocks
    return _plan(outlook, wanted if wanted <= most else outlook.best_split(most), wanted, "least time")


def by_flashgen(model: CostModel, reach: Reach, *, layerwise: bool = False) -> RestorePlan:
    """FlashGen §3.3: the host always; the disk if a request ahead hides the read, that is if at least one waits."""
    if reach.waiting < 1:
        return _with_room(_Outlook(model, reach, layerwise), reach.host_blocks, "nobody waits ahead")
    return _with_room(_Outlook(model, reach, layerwise), reach.disk_blocks, f"{reach.waiting} wait ahead")


def by_threshold(model: CostModel, reach: Reach, *, tokens: int, layerwise: bool = False) -> RestorePlan:
    """FlashGen's rule, and only for long reads: the authors' public code asks for 2048 tokens that only disk has."""
    on_disk = (reach.disk_blocks - reach.host_blocks) * model.block_tokens
    if on_disk < tokens:
        why = f"{on_disk} tokens on disk are fewer than {tokens}"
        return _with_room(_Outlook(model, reach, layerwise), reach.host_blocks, why)
    return by_flashgen(model, reach, layerwise=layerwise)


def always_load(model: CostModel, reach: Reach, *, layerwise: bool = False) -> RestorePlan:
    """Every block that any tier has."""
    return _with_room(_Outlook(model, reach, layerwise), reach.disk_blocks, "always load")


def never_load(model: CostModel, reach: Reach, *, layerwise: bool = False) -> RestorePlan:
    """Only what is on the device."""
    return _with_room(_Outlook(model, reach, layerwise), reach.device_blocks, "never load")


def restore_strategy(name: str, *, layerwise: bool = False) -> Strategy:
    """The strategy of this name: cost, flashgen, threshold:N, always or never; ConfigError for another.

    `layerwise`: whether the engine computes one layer while it copies the next layer's KV.
    """
    chosen: dict[str, Callable[..., RestorePlan]] = {
        "cost": by_cost,
        "flashgen": by_flashgen,
        "always": always_load,
        "never": never_load,
    }
    kind, colon, number = name.partition(":")
    if kind == "threshold" and number.isdecimal():
        tokens = int(number)
        return lambda model, reach: by_threshold(model, reach, tokens=tokens, layerwise=layerwise)
    if colon or kind not in chosen:
        raise ConfigError(f"there is no restore strategy {name!r}: use one of {', '.join(chosen)}, or threshold:TOKENS")
    choose = chosen[kind]
    return lambda model, reach: choose(model, reach, layerwise=layerwise)


# --- preemption


@dataclass(frozen=True, slots=True)
class SwapDecision:
    """How a preempted sequence will come back."""

    swap: bool
    swap_s: float
    recompute_s: float
    reason: str


def swap_or_recompute(
    model: CostModel, tokens: int, written_tokens: int = 0, host_room_blocks: int | None = None
) -> SwapDecision:
    """Whether a sequence with the KV of `tokens` on the device is cheaper to copy out and back, or to compute again.

    `written_tokens` have been written through to the host, so that they are copied one way only. A last block that is
    not full is computed again in either case. `host_room_blocks`: free blocks of the host; None if there is no limit.
    This is the comparison of "Uncover the Overhead and Resource Usage for Handling KV Cache Overflow in LLM
    Inference" (SC'24 poster), where both directions were always copied.
    """
    blocks = tokens // model.block_tokens
    out = max(0, blocks - written_tokens // model.block_tokens)
    tail = tokens - blocks * model.block_tokens
    swap_s = (model.store_s(out) if out else 0.0) + (model.load_s(blocks) if blocks else 0.0)
    swap_s += model.prefill.seconds(tail, tokens - tail)
    recompute_s = model.prefill.seconds(tokens)
    if host_room_blocks is not None and out > host_room_blocks:
        why = f"recompute: {out} blocks have no place on the host, where {host_room_blocks} are free"
        return SwapDecision(False, swap_s, recompute_s, why)
    swap = swap_s <= recompute_s
    why = f"{'swap' if swap else 'recompute'}: swap takes {swap_s:.4g} s ({out} blocks out, {blocks} back), "
    return SwapDecision(swap, swap_s, recompute_s, why + f"recompute {recompute_s:.4g} s")


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
