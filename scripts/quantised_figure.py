"""Perplexity against whole-cache ratio, one curve a method, from the records of quantised_quality.

python scripts/quantised_figure.py docs/results/quantised.jsonl docs/results/quantised.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from starkv_core.figures import save_png

MARKS = "osD^vP*X"
TICKS = (0.1, 0.2, 0.4, 1, 2, 4, 10, 20, 40, 100, 200, 400)
LEAST = 0.1  # percent: what lies below is shown there


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["method"] != "dense":
            points = curves.setdefault(record["method"], [])
            points.append((record["ratio"], max(100 * record["increase"], LEAST)))
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    ax = figure.subplots()
    for mark, (name, points) in zip(MARKS, curves.items(), strict=False):
        ax.plot(*zip(*sorted(points), strict=True), marker=mark, label=name, linewidth=1.5)
    for ratio, aim in ((8, 3), (16, 10)):
        ax.plot(ratio, aim, marker="_", markersize=16, color="black", linestyle="none")
    ax.plot([], [], marker="_", markersize=12, color="black", linestyle="none", label="aim")
    ax.set_yscale("log")
    ax.set_xticks([2, 4, 6, 8, 12, 16, 20])
    most = max(increase for points in curves.values() for _, increase in points)
    ax.set_yticks(TICKS)
    ax.set_ylim(0.8 * LEAST, 1.5 * most)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("cache ratio, whole cache at 2048 tokens")
    ax.set_ylabel("perplexity over dense (same windows)")
    ax.set_title("embedded model, built-in held-out text, windows of 2048", fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_png(figure, target)


if __name__ == "__main__":
    main()
