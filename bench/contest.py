"""What a comparison has measured: the runs of each system, who dropped out and why, and the numbers that follow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from bench import report
from bench.closed_loop import Run, percentile
from bench.servers import Server
from bench.systems import System


@dataclass
class Contest:
    """What has been measured so far, and who is still in."""

    systems: list[System]
    """jserve first."""
    runs: dict[tuple[str, int, int], Run] = field(default_factory=dict)
    """By system, users and round."""
    others_cores: list[float] = field(default_factory=list)
    """Of each run: the cores that processes outside the contest took meanwhile."""
    servers: dict[str, Server] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def drop(self, system: System, reason: Exception) -> None:
        """It is out, and the reason is told."""
        self.missing[system.name] = str(reason)
        self.runs = {key: run for key, run in self.runs.items() if key[0] != system.name}
        self.systems.remove(system)
        if server := self.servers.pop(system.name, None):
            server.stop()

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop()
        self.servers.clear()

    def metrics(self, concurrency: Sequence[int], repeats: int) -> dict[str, float]:
        """Each system's own numbers, and ours over each peer's, round by round; medians of the rounds."""
        ours, *peers = [system.name for system in self.systems]
        metrics = {"others_cores_p50": percentile(self.others_cores, 50), "others_cores_max": max(self.others_cores)}
        for users in concurrency:
            runs = {name: [self.runs[name, users, r] for r in range(repeats)] for name in (ours, *peers)}
            for name, measure in MEASURES.items():
                values = {system: list(map(measure, own)) for system, own in runs.items()}
                metrics |= {f"{s}_{name}_c{users}": statistics.median(v) for s, v in values.items()}
                for peer in peers:
                    ratio = statistics.median(a / b for a, b in zip(values[ours], values[peer], strict=True))
                    metrics[f"{RATIOS[name].format(peer)}_c{users}"] = ratio
        return metrics | {f"{SAME_TEXT}{peer}": share for peer in peers if (share := self._same_text(peer)) is not None}

    def _same_text(self, peer: str) -> float | None:
        """Of the turns that got the same prompt from both, the share that got the same reply."""
        equal: list[bool] = []
        for (name, users, round_), run in self.runs.items():
            if name == peer:
                replies = {(turn.dialogue, str(turn.messages)): turn.text for turn in run.turns}
                for turn in self.runs[self.systems[0].name, users, round_].turns:
                    reply = replies.get((turn.dialogue, str(turn.messages)))
                    equal += [reply == turn.text] if reply is not None else []
        return sum(equal) / len(equal) if equal else None

    def show(self, concurrency: Sequence[int], repeats: int, console: Console) -> None:
        """A table for each measure, and who is missing."""
        metrics = self.metrics(concurrency, repeats)
        for measure, title in TITLES.items():
            rows = []
            for system in self.systems:
                ratios = [metrics.get(f"{RATIOS[measure].format(system.name)}_c{users}") for users in concurrency]
                own = [f"{metrics[f'{system.name}_{measure}_c{users}']:.3g}" for users in concurrency]
                cells = [n if r is None else f"{n} [{r:.2f}]" for n, r in zip(own, ratios, strict=True)]
                rows.append([system.name, *(escape(cell) for cell in cells)])
            columns = ["", *(f"{users} users" for users in concurrency)]
            console.print(report.table(f"{title} {escape('[ours over theirs]')}", columns, rows))
        for name, share in metrics.items():
            if name.startswith(SAME_TEXT):
                report.note(console, f"{name.removeprefix(SAME_TEXT)}: {share:.0%} of its replies equal ours")
        report.note(console, f"processes outside took {metrics['others_cores_p50']:.2f} cores (median)")
        for name, reason in self.missing.items():
            report.note(console, f"missing: {name}: {reason}")


MEASURES: dict[str, Callable[[Run], float]] = {
    "output_tokens_per_s": lambda run: run.output_tokens_per_s,
    "ttft_later_p50_s": lambda run: percentile([turn.ttft_s for turn in run.measured(later=True)], 50),
    "tpot_p50_s": lambda run: percentile([turn.tpot_s for turn in run.measured()], 50),
}
RATIOS = {"output_tokens_per_s": "{}_ratio", "ttft_later_p50_s": "ttft_later_{}_ratio", "tpot_p50_s": "tpot_{}_ratio"}
"""How the ratio of a measure is called."""
TITLES = {
    "output_tokens_per_s": "output tokens/s",
    "ttft_later_p50_s": "TTFT of later turns, p50, s",
    "tpot_p50_s": "time per output token, p50, s",
}
SAME_TEXT = "same_text_"
