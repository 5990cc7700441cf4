"""A cost model for people and for programs: what `jserve calibrate` prints."""

from __future__ import annotations

import json

from jserve.cache.cost import CostModel, LinkCost, break_even_tokens
from jserve.calibrate import GUESSED_DISK
from jserve.config import EngineConfig
from jserve.doors import EngineInfo


def as_json(cost: CostModel, info: EngineInfo, config: EngineConfig) -> str:
    """One line: the model's numbers (seconds, bytes), and the lengths from which loading beats computing."""
    about = {"model": info.model, "backend": info.backend, "dtype": info.dtype, "disk_dir": config.cache.disk_dir}
    return json.dumps(about | cost.to_dict() | {"disk_measured": _measured(cost)} | _break_evens(cost, info))


def table(cost: CostModel, info: EngineInfo, config: EngineConfig) -> str:
    """The same as lines of text."""
    prefill, decode = cost.prefill, cost.decode
    disk = (
        "" if _measured(cost) else "  (a guess)" if config.cache.disk_dir else "  (a guess: --disk-dir has it measured)"
    )
    rows = {
        "model": f"{info.model}, {info.dtype}, {info.backend}",
        "block": f"{cost.block_tokens} tokens, {cost.block_bytes / 2**20:.3g} MiB",
        "prefill, a step": _time(prefill.overhead_s),
        "prefill, a token": _time(prefill.per_token_s),
        "prefill, 1000 tokens after 1000": _time(prefill.seconds(1000, 1000)),
        "attention, a query and 1000 keys": _time(1000 * prefill.per_pair_s),
        "decode, a step of one": _time(decode.seconds(1, 0)),
        "decode, each sequence more": _time(decode.per_sequence_s),
        "decode, 1000 tokens of context": _time(1000 * decode.per_context_token_s),
        "device to host": _link(cost.device_to_host),
        "host to device": _link(cost.host_to_device),
        "disk write": _link(cost.disk_write) + disk,
        "disk read": _link(cost.disk_read) + disk,
    }
    for name, tokens in _break_evens(cost, info).items():
        said = f"from {tokens} tokens on" if tokens else f"for no length up to {info.max_model_len} tokens"
        rows[f"{_TITLES[name]} beats computing"] = said + (disk if "disk" in name else "")
    width = max(map(len, rows)) + 2
    return "\n".join(f"{title:<{width}}{said}" for title, said in rows.items())


_TITLES = {"break_even_host_tokens": "loading from host", "break_even_disk_tokens": "loading from disk"}


def _break_evens(cost: CostModel, info: EngineInfo) -> dict[str, int | None]:
    return {
        "break_even_host_tokens": break_even_tokens(cost, info.max_model_len, from_disk=False),
        "break_even_disk_tokens": break_even_tokens(cost, info.max_model_len, from_disk=True),
    }


def _measured(cost: CostModel) -> bool:
    return GUESSED_DISK not in (cost.disk_read, cost.disk_write)


def _link(cost: LinkCost) -> str:
    return f"{cost.bytes_per_s / 1e9:.3g} GB/s, {_time(cost.per_copy_s)} a copy"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
