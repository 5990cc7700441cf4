"""`python -m bench.roofline RESULT.json PLOT.png`: the cases of a bench.kernels result under the machine's roofs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(config: Mapping[str, Any], path: Path) -> str | None:
    """Draw the `config` of a bench.kernels result; returns why it could not, or None."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed: pip install 'jserve[bench]'"
    matplotlib.use("agg")
    from matplotlib import pyplot

    bandwidth, rate = config["copy_bytes_per_s"], config["matmul_flops_per_s"]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    edge = rate / bandwidth
    reach = [0.1, edge, max(1e4, 10 * edge)]
    axes.plot(reach, [min(x * bandwidth, rate) / 1e12 for x in reach], "k-", label="copy and product, measured")
    for name in sorted({case["by"] for case in config["cases"]}):
        cases = [case for case in config["cases"] if case["by"] == name]
        marker, size = ("o", 36) if name.startswith("jserve_") else ("x", 24)
        x, y = ([case[of] for case in cases] for of in ("flop_per_byte", "tflop_per_s"))
        axes.scatter(x, y, size, marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s")
    axes.set_title(f"Paged attention, {config['backend']}, {config['sizes']} sizes")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return None


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m bench.roofline RESULT.json PLOT.png", file=sys.stderr)
        return 2
    problem = draw(json.loads(Path(sys.argv[1]).read_text())["config"], Path(sys.argv[2]))
    if problem:
        print(f"bench.roofline: {problem}", file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
