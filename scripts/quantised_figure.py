"""Perplexity and retrieval against whole-cache ratio, from the records of quality_rows.

Runs of a method make a curve, through the lowest perplexity of each ratio; baselines are points.

    python scripts/quantised_figure.py docs/results/quantised.jsonl docs/results/quantised.png \\
        --title "embedded model" --aims 8 3 16 10
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from starkv_core.figures import save_png

MARKS = "osD^vP*X"
TICKS = (0.1, 0.2, 0.4, 1, 2, 4, 10, 20, 40, 100, 200, 400)
RATIOS = (2, 4, 6, 8, 12, 16, 20)  # marked on the axis
LEAST = 0.05  # percent: what lies below is shown there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--title", required=True)
    parser.add_argument("--aims", type=float, nargs="*", default=(), help="ratio, percent, ...")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.records.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mark, (name, points) in zip(MARKS, curves(rows).items(), strict=False):
        ratios = [row["ratio"] for row in points]
        more = [max(100 * row["increase"], LEAST) for row in points]
        least = [100 * min(row["retrieval"].values()) for row in points]
        line = "-" if "scheme" in points[0] else "none"
        for ax, heights in ((left, more), (right, least)):
            ax.plot(ratios, heights, marker=mark, label=name, linewidth=1.5, linestyle=line)
    aim = {"marker": "_", "markersize": 16, "color": "black", "linestyle": "none"}
    if given.aims:
        left.plot(given.aims[::2], given.aims[1::2], label="aim, at most", **aim)
    left.set_yscale("log")
    left.set_yticks(TICKS)
    left.set_ylim(0.8 * LEAST, 1.5 * max(100 * row["increase"] for row in rows))
    left.yaxis.set_minor_locator(NullLocator())
    left.set_ylabel("perplexity over dense (same windows)")
    right.set_ylabel("answers right, pass-key or key-value, whichever is worse")
    for ax in (left, right):
        ax.set_xlabel("cache ratio, whole cache at 2048 tokens")
        ax.set_xticks([ratio for ratio in RATIOS if ratio < 1.2 * max(r["ratio"] for r in rows)])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
        ax.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(given.title, fontsize=11)
    save_png(figure, given.figure)


def curves(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of every method by ratio; of nearly equal ratios the one of lowest perplexity."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -float(row["increase"])):
        if row["name"] != "dense":
            found.setdefault(row["method"], {})[round(5 * row["ratio"])] = row
    return {name: [at[ratio] for ratio in sorted(at)] for name, at in sorted(found.items())}


if __name__ == "__main__":
    main()
