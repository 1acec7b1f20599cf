"""Write the tables of a results page anew from their records.

A table stands between `<!-- KIND: FILE -->` and `<!-- end -->`; FILE, beside the page, holds one
record a line. `rows` are quantised caches and `runs` runs in 16 bits, both of quality_rows;
`methods` and `tasks` are rows of command_sweep, all their figures and those of the zero-shot tasks.

    python scripts/results_page.py docs/results/quantised.md
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from starkv_core.artifacts import write_text_atomic
from starkv_core.eval.taskset import PROTOCOL

COLUMNS = (
    "row", "base", "recovery", "cache ratio", "bytes a token", "bits, keys / values", "over dense",
    "windows", "read", "pass-key", "key-value", "prompts",
)  # fmt: skip
USUAL_LR = 3e-3  # of recovery; rows with another one say so
ORDER = ("dense", "star", "paper", "kivi", "rtn")
RUN_COLUMNS = ("row", "cache ratio", "over dense", "pass-key", "key-value", "set")
METHOD_COLUMNS = (
    "row", "tokens trained on", "calibration, s", "cache ratio", "perplexity", "over dense",
    "token by token", "over dense", "zero-shot mean", "pass-key", "key-value",
)  # fmt: skip
_TABLE = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page

    def filled(found: re.Match[str]) -> str:
        lines = (page.parent / found[3]).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return found[1] + TABLES[found[2]](records) + found[4]

    write_text_atomic(page, _TABLE.sub(filled, page.read_text(encoding="utf-8")))


def table(records: list[dict[str, Any]]) -> str:
    """Records as a table, by method and cache ratio."""
    return lined(COLUMNS, [cells(record) for record in sorted(records, key=place)])


def runs_table(records: list[dict[str, Any]]) -> str:
    """Runs of a sweep as a table, the best first at each cache ratio asked for."""
    made = [record for record in records if "plan" in record]
    made.sort(key=lambda record: (round(record["ratio"], 1), record["increase"]))
    return lined(RUN_COLUMNS, [run_cells(record) for record in made])


def methods_table(records: list[dict[str, Any]]) -> str:
    """Rows of a sweep of commands, every figure with its paired difference from dense.

    What no row has is no column.
    """
    rows = [method_cells(record) for record in ranked(records)]
    filled = [any(cells) for cells in zip(*rows, strict=True)]
    columns, *rows = [list(compress(cells, filled)) for cells in (METHOD_COLUMNS, *rows)]
    return lined(columns, rows)


def tasks_table(records: list[dict[str, Any]]) -> str:
    """The six zero-shot tasks of the rows that have them."""
    made = [(record["name"], figures(record)) for record in ranked(records)]
    rows = [
        [name, *(shown(found, task, metric) for task, metric in PROTOCOL.items())]
        for name, found in made
        if ("piqa", "acc", "prefill") in found
    ]
    counts = {key[0]: figure["n"] for _, found in made for key, figure in found.items()}
    return lined(("row", *(f"{task} ({counts[task]})" for task in PROTOCOL)), rows)


def ranked(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with figures in order; what a row without adds to the dense model stands there."""
    return sorted((record for record in records if "columns" in record), key=rank)


def rank(record: dict[str, Any]) -> tuple[float, float]:
    """Cache ratio, then how far perplexity is over dense; rows without it come last."""
    more = increase(figures(record))
    ratio = round(record["columns"][0]["cache"]["ratio"], 1)
    return ratio, math.inf if more is None else more


def method_cells(record: dict[str, Any]) -> list[str]:
    """One row of a table of methods."""
    found, made = figures(record), record.get("calibration")
    return [
        record["name"],
        f"{made['tokens']:,}" if made and made["tokens"] else "",
        f"{made['seconds']:.0f}" if made else "",
        f"{record['columns'][0]['cache']['ratio']:.2f}",
        *(text for path in ("prefill", "decode") for text in perplexity(found, path)),
        *(
            shown(found, *key)
            for key in (
                ("zero-shot", "mean"),
                ("passkey", "acc", "decode"),
                ("kv", "acc", "decode"),
            )
        ),
    ]


Figures = dict[tuple[str, str, str], dict[str, Any]]


def figures(record: dict[str, Any]) -> Figures:
    """Figures of a row's own column by task, metric and path."""
    column = record["columns"][0]["figures"]
    return {(figure["task"], figure["metric"], figure["path"]): figure for figure in column}


def perplexity(found: Figures, path: str) -> tuple[str, str]:
    """Perplexity, and how much it is over dense in percent, with half of the 95% interval."""
    figure = found.get(("perplexity", "ppl", path))
    if figure is None:
        return "", ""
    value, apart = figure["value"], figure["difference"]
    if apart is None:
        return f"{value:.2f}", ""
    half = "" if apart["half"] is None else f" ± {over_dense(figure, 'half'):.1%}"
    return f"{value:.2f}", f"{over_dense(figure):+.1%}{half}"


def over_dense(figure: dict[str, Any], part: str = "value") -> float:
    """A figure's difference from dense, or half of its interval, as a share of dense."""
    apart = figure["difference"]
    return float(apart[part] / (figure["value"] - apart["value"]))


def increase(found: Figures) -> float | None:
    """Share that perplexity is over dense on the same windows: of one pass, else token by token."""
    for path in ("prefill", "decode"):
        figure = found.get(("perplexity", "ppl", path))
        if figure is not None and figure["difference"] is not None:
            return over_dense(figure)
    return None


def shown(found: Figures, task: str, metric: str, path: str = "prefill") -> str:
    """A share of right answers in percent; a difference from dense in points behind it."""
    figure = found.get((task, metric, path))
    if figure is None:
        return ""
    apart = figure["difference"]
    behind = f" ({100 * apart['value']:+.1f} ± {100 * apart['half']:.1f})" if apart else ""
    return f"{100 * figure['value']:.1f}{behind}"


def lined(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run_cells(record: dict[str, Any]) -> list[str]:
    """One row of a table of runs; what its recipe sets but for the ratio comes last."""
    recalled = record["retrieval"]
    changes = [s for s in record["plan"]["base"]["set"] if not s.startswith(("ratio=", "steps=0"))]
    return [
        record["name"].rpartition(", ratio")[0],
        f"{record['ratio']:.2f}",
        f"{record['increase']:+.2%}",
        f"{recalled['passkey']:.0%}",
        f"{recalled['kv']:.0%}",
        " ".join(f"`{change}`" for change in changes),
    ]


def place(record: dict[str, Any]) -> tuple[int, int, int, float]:
    """Where a record stands: its method, ratio (to a fifth), steps of recovery and increase."""
    steps = record.get("base", {}).get("recovery_steps", 0)
    return ORDER.index(family(record)), round(5 * record["ratio"]), steps, record["increase"]


def family(record: dict[str, Any]) -> str:
    """Scheme of a run, or the baseline without its bits."""
    return str(record["scheme"]["name"] if "scheme" in record else record["method"])


def cells(record: dict[str, Any]) -> list[str]:
    """One row of the table."""
    base, bits, recalled = (record.get(k, {}) for k in ("base", "bits", "retrieval"))
    width = re.fullmatch(r"(?:kivi|rtn)-(\d)", record["name"])
    kernels = " (kernels)" if record.get("backend") == "triton" else ""
    shown = f"{bits['keys']:.2f} / {bits['values']:.2f}" if bits else ""
    return [
        f"`{family(record)}`" if bits else f"`{record['name']}`",
        start(base) if base else "",
        recovery(base),
        f"{record['ratio']:.2f}",
        f"{record['bytes_per_token']:.0f}",
        f"{width[1]} / {width[1]}" if width else shown,
        "" if record["name"] == "dense" else f"{record['increase']:+.1%}",
        str(record["windows"]),
        record["read"].split(",")[0] + kernels,
        f"{recalled['passkey']:.0%}",
        f"{recalled['kv']:.0%}",
        str(record["retrieval_prompts"]),
    ]


def start(base: dict[str, Any]) -> str:
    """Cache ratio of a base run, and what its start has of today's default."""
    parts = [f"{base['ratio']:g}"]
    if base.get("keys") == "attended":
        parts.append("attended")
    if base.get("floor"):
        parts.append("floor")
    if (group := base.get("key_group", 1)) != 1:
        parts.append(f"keys in groups of {group}" if group else "joint keys")
    return ", ".join(parts)


def recovery(base: dict[str, Any]) -> str:
    """Steps and tokens of a step that a run recovered by."""
    steps = base.get("recovery_steps", 0)
    rate = f", lr {base['lr']:g}" if base.get("lr", USUAL_LR) != USUAL_LR else ""
    return f"{steps} x {base['batch']} x {base['length']}{rate}" if steps else ""


TABLES = {"rows": table, "runs": runs_table, "methods": methods_table, "tasks": tasks_table}


if __name__ == "__main__":
    main()
