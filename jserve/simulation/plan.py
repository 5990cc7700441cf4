"""`jserve plan`: whether a model fits, what its KV memory holds, and what to expect, before anything is rented."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jserve.cache.cost import CostModel, break_even_bytes_per_s
from jserve.errors import ConfigError
from jserve.progress import Progress
from jserve.simulation.command import add_system_flags, described
from jserve.simulation.playing import Span
from jserve.simulation.profiles import hardware, model_shape
from jserve.simulation.simulator import System, simulate
from jserve.simulation.summary import kv_utilisation, summarise
from jserve.simulation.workload import Workload, chat_session, closed_loop, contents

CLIENTS = (1, 5, 10, 20, 40, 80, 160)
HOPELESS_S = 10.0
"""Of P95 TTFT: more load is not tried."""
COARSE_BLOCK = 64
"""For the simulations, unless a block size is given: quicker, and nearly the same."""


@dataclass(frozen=True)
class Chat:
    """The conversations to plan for, in means."""

    turns: float
    prompt_tokens: float
    """What a user says, without the history."""
    output_tokens: float

    @property
    def history_tokens(self) -> float:
        """Before a turn, in the mean over turns of chats with geometric numbers of turns."""
        return (self.turns - 1) * (self.prompt_tokens + self.output_tokens)


@dataclass(frozen=True)
class Load:
    """Predicted with so many clients."""

    clients: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    kv_used: float


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_system_flags(parser)
    parser.add_argument("--policy", default="jserve", metavar="NAME", help="as for simulate (default: jserve)")
    parser.add_argument("--turns", type=float, default=7.0, metavar="N", help="of a conversation, mean (7, ShareGPT's)")
    parser.add_argument("--prompt", type=float, default=100.0, metavar="N", help="tokens of a user's turn, mean (100)")
    parser.add_argument("--output", type=float, default=335.0, metavar="N", help="tokens of an answer, mean (335)")
    parser.add_argument("--slo-ttft", type=float, default=2.0, metavar="S", help="P95 TTFT to stay below, seconds (2)")
    parser.add_argument(
        "--slo-tpot", type=float, default=0.2, metavar="S", help="P99 TPOT to stay below, seconds (0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the conversations (default 0)")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TTFT and TPOT against load")


def run(args: argparse.Namespace, progress: Progress) -> str:
    """The command: its tables, or its JSON. ConfigError if the model does not fit."""
    chat = Chat(args.turns, args.prompt, args.output)
    if not (chat.turns >= 1 and chat.prompt_tokens >= 1 and chat.output_tokens >= 1):
        raise ConfigError(f"a chat of {chat}: use at least 1 turn, and 1 token of each")
    of = described(args, args.policy)
    facts = _facts(args, of, chat)
    coarse = argparse.Namespace(**vars(args) | {"block_size": args.block_size or COARSE_BLOCK})
    loads = _loads(described(coarse, args.policy), chat, args.seed, progress)
    best = [load for load in loads if load.ttft_p95_s <= args.slo_ttft and load.tpot_p99_s <= args.slo_tpot]
    facts["goodput_requests_per_s"] = max((load.requests_per_s for load in best), default=0.0)
    facts["goodput_clients"] = max((load.clients for load in best), default=0)
    if args.plot is not None:
        _draw(loads, f"{of.model} on {of.hardware} (simulated)", args.plot)
        progress.note(f"drawn {args.plot}")
    if args.json:
        about = {"simulated": True, "model": of.model, "hardware": of.hardware, "chat": asdict(chat)}
        return json.dumps(about | facts | {"loads": [asdict(load) for load in loads]})
    return _table(args, of, chat, facts, loads)


def _facts(args: argparse.Namespace, of: System, chat: Chat) -> dict[str, float]:
    """What follows from the numbers alone."""
    cost, per_token = of.cost, of.kv_bytes_per_token
    cache = of.config.cache
    session = chat.history_tokens + chat.prompt_tokens + chat.output_tokens
    tokens = {
        "device": of.device_blocks * cost.block_tokens,
        "host": cache.host_gib * 2**30 / per_token,
        "disk": cache.disk_gib * 2**30 / per_token if cache.disk_dir is not None else 0.0,
    }
    facts: dict[str, float] = {
        "weight_bytes": of.weight_bytes,
        "device_memory_bytes": args.tp * hardware(args.gpu).memory_bytes,
        "kv_bytes_per_token": per_token,
    }
    for tier, count in tokens.items():
        facts[f"{tier}_tokens"] = count
        facts[f"{tier}_sessions"] = count / session
    history, new = chat.history_tokens, chat.prompt_tokens
    facts["ttft_recompute_s"] = cost.prefill.seconds(history + new)
    facts["ttft_device_s"] = max(cost.prefill.seconds(new, history), cost.decode.overhead_s)
    blocks = history / cost.block_tokens
    facts["ttft_host_s"] = facts["ttft_device_s"] + cost.load_s(blocks)
    facts["ttft_disk_s"] = facts["ttft_host_s"] + cost.stage_s(blocks)
    facts["tpot_alone_s"] = cost.decode.seconds(1, history + new)
    fits = tokens["device"] / (history + new + chat.output_tokens)
    facts["tpot_full_s"] = cost.decode.seconds(fits, tokens["device"])
    facts["break_even_bytes_per_s"] = break_even_bytes_per_s(cost.prefill, max(1, round(history)), per_token)
    facts["host_bytes_per_s"] = _bandwidth(cost, blocks, disk=False)
    facts["disk_bytes_per_s"] = _bandwidth(cost, blocks, disk=True)
    return facts


def _bandwidth(cost: CostModel, blocks: float, *, disk: bool) -> float:
    seconds = cost.stage_s(blocks) if disk else cost.load_s(blocks)
    return blocks * cost.block_bytes / seconds if seconds else 0.0


def _loads(of: System, chat: Chat, seed: int, progress: Progress) -> list[Load]:
    """Simulated, with more and more clients until none of what more would bring can be served in time."""
    longest = of.max_model_len
    loads: list[Load] = []
    for clients in CLIENTS:
        work = closed_loop(replace(_chats(chat, longest, seed), name=f"{clients} clients"), clients)
        done = simulate(of, work, span=Span(warm_up_turns=3, calls=100 + 3 * clients), progress=progress)
        got = summarise(done.played)
        loads.append(
            Load(
                clients,
                got.requests_per_s,
                got.output_tokens_per_s,
                got.ttft_p50_s,
                got.ttft_p95_s,
                got.tpot_p50_s,
                got.tpot_p99_s,
                kv_utilisation(done),
            )
        )
        if got.ttft_p95_s > HOPELESS_S:
            break
    return loads


def _chats(chat: Chat, max_tokens: int, seed: int) -> Workload:
    """Geometric numbers of turns, exponential lengths; a chat ends where the context does."""
    rng, fresh = random.Random(seed), contents()
    sessions = []
    for n in range(2000):
        lengths: list[tuple[int, int]] = []
        used = 0
        while True:
            turn = (1 + int(rng.expovariate(1 / chat.prompt_tokens)), 1 + int(rng.expovariate(1 / chat.output_tokens)))
            used += sum(turn)
            if used > max_tokens:
                break
            lengths.append(turn)
            if rng.random() < 1 / chat.turns:
                break
        if lengths:
            sessions.append(chat_session(str(n), lengths, fresh))
    return Workload("chats", tuple(sessions))


def _table(args: argparse.Namespace, of: System, chat: Chat, facts: dict[str, float], loads: list[Load]) -> str:
    gpu, model = hardware(args.gpu), model_shape(args.model)
    gb, ms = 1e-9, 1e3
    lines = [
        f"{of.model} on {of.hardware}: it fits (all times are predicted or simulated)",
        "",
        f"weights                 {gb * facts['weight_bytes']:.1f} of {gb * facts['device_memory_bytes']:.1f} GB",
        f"KV                      {facts['kv_bytes_per_token'] / 1e3:.1f} kB a token, {model.layers} layers",
    ]
    for tier in ("device", "host", "disk"):
        tokens, sessions = facts[f"{tier}_tokens"], facts[f"{tier}_sessions"]
        lines.append(
            f"{tier + ' holds':<24}{tokens:,.0f} tokens, {sessions:,.1f} conversations" if tokens else f"no {tier} tier"
        )
    history = f"a turn of {chat.prompt_tokens:.0f} tokens after {chat.history_tokens:.0f}"
    lines += [
        "",
        f"TTFT of {history}, with nobody else:",
        f"  history on the device  {ms * facts['ttft_device_s']:.0f} ms",
        f"  on the host            {ms * facts['ttft_host_s']:.0f} ms",
        f"  on disk                {ms * facts['ttft_disk_s']:.0f} ms",
        f"  computed again         {ms * facts['ttft_recompute_s']:.0f} ms",
        f"TPOT                    {ms * facts['tpot_alone_s']:.1f} ms alone, "
        f"{ms * facts['tpot_full_s']:.1f} ms with the device full",
        f"loading beats computing from {gb * facts['break_even_bytes_per_s']:.2f} GB/s on: the host has "
        f"{gb * facts['host_bytes_per_s']:.1f}, the disk {gb * facts['disk_bytes_per_s']:.1f}",
        "",
        "clients  requests/s  tokens/s  TTFT p50  TTFT p95  TPOT p50  TPOT p99  KV used",
    ]
    for load in loads:
        cells = (
            f"{load.clients:>7}",
            f"{load.requests_per_s:>10.3g}",
            f"{load.output_tokens_per_s:>8.4g}",
            f"{load.ttft_p50_s:>7.3g}s",
            f"{load.ttft_p95_s:>7.3g}s",
            f"{ms * load.tpot_p50_s:>6.1f}ms",
            f"{ms * load.tpot_p99_s:>6.1f}ms",
            f"{100 * load.kv_used:>5.0f} %",
        )
        lines.append("  ".join(cells))
    served = f"{facts['goodput_requests_per_s']:.3g} requests/s ({facts['goodput_clients']:.0f} clients)"
    lines += ["", f"with P95 TTFT <= {args.slo_ttft:g} s and P99 TPOT <= {args.slo_tpot:g} s: {served}"]
    lines += ["", f"numbers of {gpu.title} and where they come from: jserve/simulation/hardware.toml"]
    return "\n".join(lines)


def _draw(loads: list[Load], title: str, path: Path) -> None:
    from jserve.simulation.plots import new_figure

    figure, ((ttft, tpot),) = new_figure(1, 2, (10, 4))
    rates = [load.requests_per_s for load in loads]
    ttft.plot(rates, [load.ttft_p50_s for load in loads], marker="o", label="p50")
    ttft.plot(rates, [load.ttft_p95_s for load in loads], marker="o", label="p95")
    tpot.plot(rates, [1e3 * load.tpot_p50_s for load in loads], marker="o", label="p50")
    tpot.plot(rates, [1e3 * load.tpot_p99_s for load in loads], marker="o", label="p99")
    ttft.set(xlabel="requests/s", ylabel="TTFT, s", yscale="log")
    tpot.set(xlabel="requests/s", ylabel="TPOT, ms")
    for axis in (ttft, tpot):
        axis.legend()
        axis.grid(True, alpha=0.2)
    figure.suptitle(title)
    figure.savefig(path)
