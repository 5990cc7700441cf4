"""The poster's figures 2 to 6 from the study's JSON: what was published beside what is simulated, and both beside what
the real engine did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.recompute_vs_swap.poster import published
from jserve.errors import Unsupported

Curves = Mapping[str, Sequence[float]]
Fill = Callable[[Any], None]
"""Draws into a figure."""

COLORS = {
    "recompute": "tab:blue",
    "swap": "tab:orange",
    "swap_pageable": "tab:red",
    "auto": "tab:green",
    "swap_one_way": "tab:brown",
    "auto_one_way": "tab:green",
    "copy_in": "tab:olive",
    "copy_out": "tab:gray",
    "copy_in_pageable": "tab:pink",
    "copy_out_pageable": "tab:purple",
}
WAYS = ("recompute", "swap", "auto")
ONE_WAY = ("recompute", "swap_one_way", "auto_one_way")
SAID = "Lines and bars are simulated, with the fit to the poster's A100. Circles and dots were published."


def draw(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """Into SVG files of that directory. Raises Unsupported without matplotlib."""
    sweeps = document["config"]["sweeps"]
    figures: dict[str, Fill] = {
        "figure2-block-size": lambda figure: _block_size(figure, sweeps["block_size"]),
        "figure3-evicted-tokens": lambda figure: _evicted_tokens(figure, sweeps["evicted_tokens"]),
        "figure4-sequence-length": lambda figure: _bars(figure, [sweeps["requests_and_length"]]),
        "figure5-kv-memory": lambda figure: _bars(figure, [sweeps["kv_memory_zipf"], sweeps["kv_memory_sharegpt"]]),
        "figure6-over-time": lambda figure: _over_time(
            figure, f"simulated: {_published_memory()}", document["config"]["over_time"]
        ),
        "models": lambda figure: _bars(figure, [sweeps["models"]]),
        "mixed-lengths": lambda figure: _bars(figure, [sweeps["mixed"]]),
    }
    if served := [sweep for name, sweep in sweeps.items() if name.startswith("served_")]:
        figures["as-served"] = lambda figure: _shares(figure, served)
    return _save(figures, "recompute_vs_swap", SAID, directory)


def draw_real(document: Mapping[str, Any], beside: Mapping[str, Any], directory: Path) -> list[Path]:
    """The same of the real engine, each figure beside the A100's of the simulated document `beside`."""
    said, a100 = document["config"], beside["config"]["sweeps"]
    sweeps = said["sweeps"]
    memory = [sweeps[name] for name in ("kv_memory_zipf", "kv_memory_sharegpt") if name in sweeps]
    figures: dict[str, Fill] = {
        "figure2-block-size": lambda figure: _lines_beside(figure, sweeps["block_size"], a100["block_size"]),
        "figure3-evicted-tokens": lambda figure: _lines_beside(
            figure, sweeps["evicted_tokens"], a100["evicted_tokens"]
        ),
        "figure4-sequence-length": lambda figure: _bars(
            figure, [sweeps["requests_and_length"], a100["requests_and_length"]], measured=1
        ),
        "figure5-kv-memory": lambda figure: _bars(figure, [*memory, a100["kv_memory_zipf"]], measured=len(memory)),
        "figure6-over-time": lambda figure: _over_time(
            figure, f"{said['model']}: Zipf lengths, {sweeps['kv_memory_zipf']['x'][0]} tokens of KV", said["over_time"]
        ),
    }
    told = f"Left: {said['model']}, {said['backend']}, measured. {SAID}"
    return _save(figures, "recompute_vs_swap-real", told, directory)


def _save(figures: Mapping[str, Fill], prefix: str, said: str, directory: Path) -> list[Path]:
    try:
        import matplotlib
        from matplotlib.figure import Figure  # of its own: no display, and no state of pyplot's
    except ImportError:
        raise Unsupported("figures need matplotlib, which is missing: pip install 'jserve[bench]'") from None
    paths = []
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "jserve", "font.size": 9, "svg.fonttype": "none"}):
        for name, fill in figures.items():
            figure = Figure(figsize=(10, 4), layout="constrained")
            fill(figure)
            figure.supxlabel(said, fontsize=7)
            paths.append(directory / f"{prefix}-{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _lines_beside(figure: Any, measured: Mapping[str, Any], a100: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    pageable = ("copy_in_pageable", "copy_out_pageable")
    _lines(left, measured, (*WAYS, "copy_in", "copy_out", *(name for name in pageable if name in measured["curves"])))
    _lines(right, a100, ONE_WAY)
    left.set_title(measured["title"], fontsize=9)
    right.set_title(f"{a100['title']}, written through", fontsize=9)
    for axes, sweep in ((left, measured), (right, a100)):
        _log_x(axes, sweep)
        axes.set_yscale("log")


def _block_size(figure: Any, sweep: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    _lines(left, sweep, (*WAYS, "swap_pageable"))
    left.set_title(sweep["title"])
    _lines(right, sweep, ONE_WAY)
    right.set_title("the same with write-through: in only")
    for axes in (left, right):
        _log_x(axes, sweep)
        axes.set_ylim(0, None)


def _evicted_tokens(figure: Any, sweep: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    _lines(left, sweep, WAYS)
    left.set_title(sweep["title"])
    _lines(right, sweep, ONE_WAY)
    right.set_title("the same with write-through: in only")
    for axes in (left, right):
        _log_x(axes, sweep)
        axes.set_yscale("log")


def _log_x(axes: Any, sweep: Mapping[str, Any]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sweep["x"], [str(x) for x in sweep["x"]])
    axes.minorticks_off()
    axes.set_xlabel(sweep["x_label"])


def _lines(axes: Any, sweep: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        chooses = name.startswith("auto")
        style = {"linestyle": ":", "linewidth": 3} if chooses else {}
        axes.plot(sweep["x"], sweep["curves"][name], color=COLORS[name], label=_label(name), **style)
        there = sweep["curves"].get(f"{name}_published")
        if there and not chooses:
            axes.plot(sweep["x"], there, "o", color=COLORS[name], label=f"{_label(name)}, published", fillstyle="none")
    axes.set_ylabel("seconds")
    axes.legend(fontsize="small")
    axes.grid(True, alpha=0.2)


def _bars(figure: Any, sweeps: Sequence[Mapping[str, Any]], measured: int = 0) -> None:
    """A group for each x: recompute, swap, auto, with the published value as a dot on its bar. The first `measured` are
    times of the real engine.
    """
    for n, (axes, sweep) in enumerate(zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True)):
        places = range(len(sweep["x"]))
        for i, name in enumerate(WAYS):
            x = [place + (i - 1) * 0.27 for place in places]
            axes.bar(x, sweep["curves"][name], 0.25, color=COLORS[name], label=_label(name), alpha=0.8)
            if there := sweep["curves"].get(f"{name}_published"):
                label = "published" if name == "recompute" else None
                axes.plot(x, there, "o", color="black", markersize=4, label=label)
        axes.set(
            xlabel=sweep["x_label"], ylabel="seconds of overhead" if n >= measured else "seconds to the last token"
        )
        axes.set_title(sweep["title"].partition(":")[0], fontsize=9 if len(sweeps) < 3 else 7)
        axes.set_xticks(places, [str(x) for x in sweep["x"]], rotation=60 if len(places) > 8 else 0)
        axes.legend(fontsize="small")
        axes.grid(True, axis="y", alpha=0.2)


def _shares(figure: Any, sweeps: Sequence[Mapping[str, Any]]) -> None:
    """Times to the last token as shares of recompute's."""
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        places = range(len(sweep["x"]))
        for name in ("swap", "auto", "swap_one_way", "auto_one_way"):
            ways = zip(sweep["curves"][name], sweep["curves"]["recompute"], strict=True)
            style = "s--" if name.endswith("one_way") else "o-"
            color = COLORS[name.removesuffix("_one_way")]
            axes.plot(places, [time / recompute for time, recompute in ways], style, color=color, label=_label(name))
        axes.axhline(1.0, color=COLORS["recompute"], label="recompute")
        axes.set(xlabel=sweep["x_label"], ylabel="time to the last token, over recompute's")
        axes.set_title(sweep["title"].partition(",")[0], fontsize=9)
        axes.set_xticks(places, [str(x) for x in sweep["x"]])
        axes.legend(fontsize="small")
        axes.grid(True, alpha=0.2)


def _published_memory() -> str:
    return f"Zipf lengths, {published()['over_time']['kv_gb']} GB for KV"


def _over_time(figure: Any, title: str, runs: Mapping[str, Curves]) -> None:
    """How full the device is and how fast it goes, in the runs of this title and as published."""
    rows = figure.subplots(2, 2, sharex="col", sharey="row")
    there = {name: published()["over_time"][name] for name in ("recompute", "swap")}
    for column, (said, series) in enumerate(((title, runs), (f"published: {_published_memory()}", there))):
        for way, curves in series.items():
            rows[0][column].plot(curves["time_s"], curves["kv_usage_percent"], color=COLORS[way], label=_label(way))
            rows[1][column].plot(curves["time_s"], curves["tokens_per_s"], color=COLORS[way], label=_label(way))
        rows[0][column].set_title(said)
        rows[1][column].set(xlabel="seconds", yscale="log")
        for axes in (rows[0][column], rows[1][column]):
            axes.grid(True, alpha=0.2)
            axes.legend(fontsize="small")
    rows[0][0].set_ylabel("KV in use, %")
    rows[1][0].set_ylabel("tokens/s")


def _label(name: str) -> str:
    return name.replace("_", " ")
