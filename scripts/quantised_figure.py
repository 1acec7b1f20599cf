"""Perplexity and retrieval against whole-cache ratio, from the records of quality_rows.

Runs of a method make a curve, through the lowest perplexity of each ratio; baselines are points.

    python scripts/quantised_figure.py docs/results/quantised.jsonl docs/results/quantised.png \\
        --title "embedded model" --aims 8 3 16 10
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from starkv_core.figures import save_png

MARKS = "osD^vP*X"
TICKS = (0.1, 0.2, 0.4, 1, 2, 4, 10, 20, 40, 100, 200, 400)
RATIOS = (2, 4, 6, 8, 12, 16, 20)  # marked on the axis
LEAST = 0.05  # percent: what lies below is shown there

Curves = dict[str, list[dict[str, Any]]]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--aims", type=float, nargs="*", default=(), help="ratio, percent, ...")
    given = parser.parse_args()
    found = dict(sorted(curves(read_records(given.records)).items()))
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    styles = [{"linestyle": "-" if "scheme" in run[0] else "none"} for run in found.values()]
    left, _ = panels(figure, found, styles, RATIOS, LEAST)
    aim: dict[str, Any] = {"marker": "_", "markersize": 16, "color": "black", "linestyle": "none"}
    if given.aims:
        left.plot(given.aims[::2], given.aims[1::2], label="aim, at most", **aim)
    left.legend(fontsize=8)
    figure.suptitle(given.title, fontsize=11)
    save_png(figure, given.figure)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What a script of one figure is given: records, the file to write, a title."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path)
    parser.add_argument("figure", type=Path)
    parser.add_argument("--title", required=True)
    return parser


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a sweep, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curves(rows: list[dict[str, Any]]) -> Curves:
    """Rows of every method by ratio; of nearly equal ratios the one of lowest perplexity.

    Methods are in the order of their first rows, and the dense model is none.
    """
    made = [row for row in rows if row["name"] != "dense"]
    found: dict[str, dict[int, dict[str, Any]]] = {row["method"]: {} for row in made}
    for row in sorted(made, key=lambda row: -float(row["increase"])):
        found[row["method"]][round(5 * row["ratio"])] = row
    return {name: [at[ratio] for ratio in sorted(at)] for name, at in found.items()}


def panels(
    figure: Figure,
    drawn: Curves,
    styles: Sequence[dict[str, Any]],
    ratios: Sequence[float],
    least: float,
    most: float = math.inf,
) -> tuple[Axes, Axes]:
    """Draw curves into two panels, perplexity and retrieval, and return these.

    Their rows have a ``ratio``, the ``increase`` of perplexity over dense and shares of right
    answers of each task of ``retrieval``; ``styles`` are matplotlib's, one a curve. ``ratios`` are
    marked on the axis, up to the rows' largest. Increases below ``least`` or above ``most`` percent
    are drawn there.
    """
    left, right = figure.subplots(1, 2)
    for mark, (name, rows), style in zip(cycle(MARKS), drawn.items(), styles, strict=False):
        at = [row["ratio"] for row in rows]
        more = [min(max(100 * row["increase"], least), most) for row in rows]
        right_answers = [100 * min(row["retrieval"].values()) for row in rows]
        for ax, heights in ((left, more), (right, right_answers)):
            ax.plot(at, heights, marker=mark, label=name, linewidth=1.5, **style)
    shown = [row for rows in drawn.values() for row in rows]
    left.set_yscale("log")
    left.set_yticks(TICKS)
    left.set_ylim(0.8 * least, 1.5 * min(100 * max(row["increase"] for row in shown), most))
    left.yaxis.set_minor_locator(NullLocator())
    left.set_ylabel("perplexity over dense (same windows)")
    right.set_ylabel("answers right, pass-key or key-value, whichever is worse")
    edges = {least: "≤", most: "≥"}
    for ax, marked in ((left, edges), (right, {})):
        ax.set_xlabel("cache ratio, whole cache at 2048 tokens")
        ax.set_xticks([ratio for ratio in ratios if ratio < 1.2 * max(r["ratio"] for r in shown)])
        ax.yaxis.set_major_formatter(FuncFormatter(partial(percent, marked)))
        ax.grid(alpha=0.3)
    return left, right


def percent(marked: dict[float, str], value: float, _: object) -> str:
    """Label of a tick; some values have a mark before them."""
    return f"{marked.get(value, '')}{value:g}%"


if __name__ == "__main__":
    main()
