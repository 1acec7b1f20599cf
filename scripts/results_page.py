"""Write the tables of a results page anew from the records of quality_rows.

A table stands between `<!-- rows: FILE -->` and `<!-- end -->`; FILE, beside the page, holds one
record a line. Rows are quantised caches; `<!-- runs: FILE -->` takes runs of a sweep in 16 bits.

    python scripts/results_page.py docs/results/quantised.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starkv_core.artifacts import write_text_atomic

COLUMNS = (
    "row", "base", "recovery", "cache ratio", "bytes a token", "bits, keys / values", "over dense",
    "windows", "read", "pass-key", "key-value", "prompts",
)  # fmt: skip
USUAL_LR = 3e-3  # of recovery; rows with another one say so
ORDER = ("dense", "star", "paper", "kivi", "rtn")
RUN_COLUMNS = ("row", "cache ratio", "over dense", "pass-key", "key-value", "set")
_TABLE = re.compile(r"(<!-- (rows|runs): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    page = Path(sys.argv[1])

    def filled(found: re.Match[str]) -> str:
        lines = (page.parent / found[3]).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return found[1] + (table if found[2] == "rows" else runs_table)(records) + found[4]

    write_text_atomic(page, _TABLE.sub(filled, page.read_text(encoding="utf-8")))


def table(records: list[dict[str, Any]]) -> str:
    """Records as a table, by method and cache ratio."""
    return lined(COLUMNS, [cells(record) for record in sorted(records, key=place)])


def runs_table(records: list[dict[str, Any]]) -> str:
    """Runs of a sweep as a table, the best first at each cache ratio asked for."""
    made = [record for record in records if "plan" in record]
    made.sort(key=lambda record: (round(record["ratio"], 1), record["increase"]))
    return lined(RUN_COLUMNS, [run_cells(record) for record in made])


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
        f"{base['ratio']:g}{', attended' * (base.get('keys') == 'attended')}" if base else "",
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


def recovery(base: dict[str, Any]) -> str:
    """Steps and tokens of a step that a run recovered by."""
    steps = base.get("recovery_steps", 0)
    rate = f", lr {base['lr']:g}" if base.get("lr", USUAL_LR) != USUAL_LR else ""
    return f"{steps} x {base['batch']} x {base['length']}{rate}" if steps else ""


if __name__ == "__main__":
    main()
