"""Perplexity and retrieval against cache ratio, from the records of command_sweep.

Rows that name a `curve` are drawn, and rows of one curve joined in the order of their ratios;
of two at nearly one ratio the one of lower perplexity counts. Perplexity is that of one pass; rows
without it, caches on the dense model, are hollow marks for their perplexity token by token. Either
is over dense on the same windows, read the same way. What is below 0.2% or above 400% is drawn
there, at the edge. Marks of curves at one ratio stand side by side, 0.012 of a ratio apart.

    PYTHONPATH=. python scripts/methods_figure.py docs/results/embedded-methods.jsonl \\
        docs/results/embedded-methods.png --title "embedded model"
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from scripts.quantised_figure import Curves, arguments, curves, panels, read_records
from scripts.results_page import figures, increase
from starkv_core.figures import save_png

RETRIEVAL = ("passkey", "kv")
LEAST, MOST = 0.2, 400.0  # percent: a row beyond breaks the model, and the others need the room
HOLLOW = {"color": "black", "markerfacecolor": "none", "linestyle": "none", "markersize": 7}
APART = 0.012  # of a ratio, between curves
LEGEND_ROWS = 3
NOTE = (
    "hollow: caches on the dense model, token by token; others of one ratio stand side by side, "
    "up to 0.05 apart from it"
)


def main() -> None:
    given = arguments(__doc__).parse_args()
    found = drawn(read_records(given.records))
    if not found:
        raise SystemExit(f"{given.records}: no row has a curve; name them in the sweep's plan")
    figure = Figure(figsize=(11.0, 6.0), layout="constrained")
    halves = [round(2 * row["ratio"]) for rows in found.values() for row in rows]
    ratios = [half / 2 for half in range(min(halves), max(halves) + 1)]
    styles = [style(rows) for rows in found.values()]
    left, _ = panels(figure, side_by_side(found), styles, ratios, LEAST, MOST)
    handles, names = left.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=math.ceil(len(names) / LEGEND_ROWS),
        fontsize=8, title=NOTE, title_fontsize=8,
    )  # fmt: skip
    figure.suptitle(given.title, fontsize=11)
    save_png(figure, given.figure)


def drawn(records: list[dict[str, Any]]) -> Curves:
    """Curves in the order of their first rows, behind them by name those read token by token."""
    made = [point(record) for record in records if "curve" in record]
    return curves(sorted(made, key=lambda row: row["method"] if row["token by token"] else ""))


def point(record: dict[str, Any]) -> dict[str, Any]:
    """What is drawn of a row; a row with a curve and no figures is told and ends the script."""
    found = figures(record) if "columns" in record else {}
    more = increase(found)
    asked = [found.get((task, "acc", "decode")) for task in RETRIEVAL]
    if more is None or None in asked:
        raise SystemExit(
            f"row {record['name']} has a curve but not perplexity beside a row `dense`, pass-key "
            "and key-value; measure them or take its curve away"
        )
    return {
        "name": record["name"],
        "method": record["curve"],
        "ratio": record["columns"][0]["cache"]["ratio"],
        "increase": more,
        "retrieval": {figure["task"]: figure["value"] for figure in asked if figure},
        "token by token": ("perplexity", "ppl", "prefill") not in found,
    }


def side_by_side(found: Curves) -> Curves:
    """Curves moved along the axis of ratios, symmetrically; hollow marks stay where they are."""
    solid = [name for name, rows in found.items() if not rows[0]["token by token"]]
    moved = {name: APART * (n - (len(solid) - 1) / 2) for n, name in enumerate(solid)}
    return {
        name: [row | {"ratio": row["ratio"] + moved.get(name, 0.0)} for row in rows]
        for name, rows in found.items()
    }


def style(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Matplotlib's style of a curve; one row has no line, in the legend neither."""
    if rows[0]["token by token"]:
        return HOLLOW
    return {"linestyle": "-" if len(rows) > 1 else "none"}


if __name__ == "__main__":
    main()
