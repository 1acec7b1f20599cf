"""Figures of several subjects in one table: what can stand in one row, and how it differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starkv_core.eval.confidence import Difference, Figure, difference, figures_of, mean_of, shown
from starkv_core.eval.deployed import CacheBytes
from starkv_core.eval.records import Record, canonical_hash
from starkv_core.eval.retrieval import TITLES
from starkv_core.eval.taskset import PROTOCOL, ZERO_SHOT

CAPTION = (
    "± standard error; in brackets the difference from {}, ± half of its 95% interval: of pairs, "
    "row by row, unless marked unpaired; cache bytes count slots allocated ahead (256 at a time)"
)


@dataclass(frozen=True)
class Row:
    """What a figure is of; only figures of the same row can be compared.

    Attributes:
        task, metric, path: as :class:`.records.Record` has them.
        n: rows of the figure.
        asked: :attr:`.records.Record.asked`.
        window: tokens in a window of perplexity.
    """

    task: str
    metric: str
    path: str
    n: int
    asked: str
    window: int | None = None

    @property
    def label(self) -> str:
        """For tables and figures."""
        tokens = "" if self.window is None else f" x {self.window} tokens"
        title = TITLES.get(self.task, self.task)
        return f"{title}, {self.metric} ({self.path}, n {self.n}{tokens})"


@dataclass
class Column:
    """A run, or a dense model.

    Attributes:
        label: its name.
        run: :func:`.records.run_hash`.
        cache: bytes of its cache.
        figures: by row.
    """

    label: str
    run: str
    cache: CacheBytes
    figures: dict[Row, Figure] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Take the figures of a record, in place of those of the same rows."""
        for name, figure in figures_of(record).items():
            window = record.options.get("window")
            row = Row(record.task, name, record.path, figure.n, record.asked, window)
            self.figures[row] = figure

    def add_means(self, groups: Mapping[str, Sequence[str]]) -> None:
        """Add the mean of every group of tasks, on each path that all of them took once.

        ``zero-shot`` is the mean of the metrics that the paper reports, another group has one for
        every metric that its tasks share.
        """
        for group, members in {**groups, ZERO_SHOT: tuple(PROTOCOL)}.items():
            for path in dict.fromkeys(row.path for row in self.figures):
                self.figures |= dict(self._means(group, members, path))

    def _means(self, group: str, members: Sequence[str], path: str) -> Iterator[tuple[Row, Figure]]:
        by_metric: dict[str, list[Row]] = {}
        for row in self.figures:
            if row.task in members and row.path == path:
                name = row.metric
                if group == ZERO_SHOT:
                    name = "mean" if PROTOCOL[row.task] == row.metric else ""
                by_metric.setdefault(name, []).append(row)
        for name, rows in by_metric.items():
            if not name or sorted(row.task for row in rows) != sorted(members):
                continue
            figure = mean_of([self.figures[row] for row in rows])
            asked = canonical_hash(sorted(row.asked for row in rows))
            label = name if group == ZERO_SHOT else f"mean of {name}"
            yield Row(group, label, path, figure.n, asked), figure


def change(row: Row, column: Column, reference: Column) -> Difference | None:
    """How a figure differs from the reference; None where one is missing or both are one."""
    if column is reference or row not in column.figures or row not in reference.figures:
        return None
    return difference(column.figures[row], reference.figures[row])


def all_rows(columns: Sequence[Column]) -> list[Row]:
    """Rows of any column, in order."""
    return list(dict.fromkeys(row for column in columns for row in column.figures))


def table(columns: Sequence[Column]) -> list[list[str]]:
    """A label, then a figure for each column, missing ones empty; differences from the first."""
    found = []
    for row in all_rows(columns):
        cells = [
            shown(column.figures[row].metric, change(row, column, columns[0]))
            if row in column.figures
            else ""
            for column in columns
        ]
        found.append([row.label, *cells])
    held = {column.cache.tokens for column in columns}
    at = f" (measured at {held.pop()} tokens)" if len(held) == 1 else ""
    found.append([f"cache bytes per token{at}", *(f"{c.cache.per_token:,.0f}" for c in columns)])
    found.append(["cache ratio", *(f"{c.cache.ratio:.2f}" for c in columns)])
    return found


def figures_json(column: Column, reference: Column) -> list[dict[str, Any]]:
    """Figures of a column, with differences, in plain form for JSON."""
    found = []
    for row, figure in column.figures.items():
        delta = change(row, column, reference)
        metric = {name: getattr(figure.metric, name) for name in ("value", "stderr", "better")}
        found.append({**vars(row), **metric, "difference": None if delta is None else vars(delta)})
    return found
