"""Reports of several runs in one table, and quality against bytes in one figure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starkv_core.artifacts import check_schema, read_json
from starkv_core.errors import UserError
from starkv_core.eval.deployed import CacheBytes
from starkv_core.eval.records import Record
from starkv_core.eval.table import Column, figures_json, table

_DENSE = "dense"
_COMPRESSED = "compressed"


@dataclass(frozen=True)
class Comparison:
    """Columns side by side; differences are from the first, a dense model if there is one."""

    columns: list[Column]

    def rows(self) -> list[list[str]]:
        """The one table: a label, then a figure for each column; missing ones are empty."""
        return table(self.columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "reference": self.columns[0].label,
            "columns": [
                {
                    "label": column.label,
                    "run": column.run,
                    "cache": column.cache.to_dict(),
                    "figures": figures_json(column, self.columns[0]),
                }
                for column in self.columns
            ],
        }


def compare(sources: Sequence[str]) -> Comparison:
    """Read the reports of runs (or of folders that ``--out`` named); of each figure the latest.

    Raises:
        UserError: nothing to read, or a report of a newer schema.
    """
    if not sources:
        raise UserError("--compare: name the runs to compare, or folders that eval --out made")
    dense: dict[str, Column] = {}
    runs: list[Column] = []
    groups: dict[str, list[str]] = {}
    for source in dict.fromkeys(sources):
        for name, column in _columns(Path(source), groups).items():
            if name != _DENSE:
                runs.append(column)
            elif column.run in dense:
                dense[column.run].figures |= column.figures
            else:
                dense[column.run] = column
    if len(dense) == 1:
        next(iter(dense.values())).label = _DENSE
    columns = [*dense.values(), *runs]
    for column in columns:
        column.add_means(groups)
    return Comparison(columns)


def _columns(source: Path, groups: dict[str, list[str]]) -> dict[str, Column]:
    """Columns of the reports of one source, those of its weights as they are now.

    Groups of tasks that a report names are put into ``groups``.
    """
    found: dict[str, Column] = {}
    for path, document in _reports(source):
        try:
            groups |= document["groups"]
            for record in map(Record.from_dict, document["results"]):
                name, held = record.subject, document[record.subject]["cache"]
                if name not in found or found[name].run != record.run:
                    label = str(source) if name == _COMPRESSED else f"{source}, {name}"
                    cache = CacheBytes(*(held[k] for k in ("rows", "tokens", "held", "dense")))
                    found[name] = Column(label, record.run, cache)
                found[name].add(record)
        except (KeyError, TypeError):
            raise UserError(f"{path}: damaged, or not a report of starkv eval") from None
    return found


def _reports(source: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Reports of a source, the oldest first."""
    files = [*source.glob("results/eval-*.json"), *source.glob("eval.json")]
    documents = []
    for path in files:
        document = read_json(path)
        if isinstance(document, dict) and document.get("kind") == "eval":
            check_schema(document.get("schema"), str(path))
            if "results" in document:
                documents.append((path, document))
    if not documents:
        raise UserError(
            f"{source}: no report to compare; make one with: starkv eval {shlex.quote(str(source))}"
        )
    return sorted(documents, key=lambda report: str(report[1].get("created")))
