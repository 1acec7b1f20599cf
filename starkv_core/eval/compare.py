"""Reports of several runs in one table, and quality against bytes in one figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starkv_core.artifacts import check_schema, read_json
from starkv_core.errors import UserError
from starkv_core.eval.records import Metric, Record, canonical_hash, mean_of, shown
from starkv_core.eval.taskset import PROTOCOL, ZERO_SHOT

_DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """What a figure is of; only figures of the same row can be compared.

    Attributes:
        task, metric, path, n: as :class:`.records.Record` has them.
        asked: hash of rows and options.
    """

    task: str
    metric: str
    path: str
    n: int
    asked: str

    @property
    def label(self) -> str:
        """For tables and figures."""
        return f"{self.task}, {self.metric} ({self.path}, n {self.n})"


@dataclass
class Column:
    """A run, or a dense model.

    Attributes:
        label: its name.
        run: :func:`.records.run_hash`.
        bytes_per_token, ratio: of its cache.
        figures: by row.
    """

    label: str
    run: str
    bytes_per_token: float
    ratio: float
    figures: dict[Row, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Columns side by side; differences are from the first, a dense model if there is one."""

    columns: list[Column]

    def rows(self) -> list[list[str]]:
        """The one table: a label, then a figure for each column; missing ones are empty."""
        first = self.columns[0]
        table = []
        for row in self._rows():
            cells = []
            for column in self.columns:
                metric, reference = column.figures.get(row), first.figures.get(row)
                cell = "" if metric is None else shown(metric)
                if metric is not None and reference is not None and column is not first:
                    cell += f" ({shown(metric, reference)})"
                cells.append(cell)
            table.append([row.label, *cells])
        table.append(
            ["cache bytes per token", *(f"{c.bytes_per_token:,.0f}" for c in self.columns)]
        )
        table.append(["cache ratio", *(f"{c.ratio:.2f}" for c in self.columns)])
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "reference": self.columns[0].label,
            "columns": [
                {
                    "label": column.label,
                    "run": column.run,
                    "bytes_per_token": column.bytes_per_token,
                    "ratio": column.ratio,
                    "figures": [
                        {**vars(row), **vars(metric)} for row, metric in column.figures.items()
                    ],
                }
                for column in self.columns
            ],
        }

    def figure(self, path: Path) -> None:
        """Write a PNG: the main figure of each task that two columns share, against cache bytes."""
        from matplotlib.figure import Figure

        from starkv_core.figures import save_png

        first: dict[str, str] = {}
        for row in self._rows():
            first.setdefault(row.task, PROTOCOL.get(row.task, row.metric))
        shared = [
            row
            for row in self._rows()
            if row.metric == first[row.task] and sum(row in c.figures for c in self.columns) > 1
        ]
        if not shared:
            raise UserError("--compare: no task is in two of the reports with the same rows")
        across = min(3, len(shared))
        down = -(-len(shared) // across)
        figure = Figure(figsize=(4.2 * across, 3.2 * down), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        for ax in axes[len(shared) :]:
            ax.set_axis_off()
        for ax, row in zip(axes, shared, strict=False):
            for column in self.columns:
                metric = column.figures.get(row)
                if metric is None or metric.value is None:
                    continue
                ax.errorbar(
                    column.bytes_per_token, metric.value, yerr=metric.stderr, fmt="o", capsize=3
                )
                ax.annotate(
                    Path(column.label).name,
                    (column.bytes_per_token, metric.value),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
            ax.set_title(row.label, fontsize=9)
            ax.set_xlabel("cache bytes per token", fontsize=8)
            ax.margins(x=0.25, y=0.25)
        save_png(figure, path)

    def _rows(self) -> list[Row]:
        return list(dict.fromkeys(row for column in self.columns for row in column.figures))


def compare(sources: Sequence[str]) -> Comparison:
    """Read the reports of runs (or of folders that ``--out`` named); of each figure the latest.

    Raises:
        UserError: nothing to read, or a report of a newer schema.
    """
    if not sources:
        raise UserError("--compare: name the runs to compare, or folders that eval --out made")
    dense: dict[str, Column] = {}
    runs: list[Column] = []
    for source in sources:
        columns = _columns(Path(source))
        for name, column in columns.items():
            if name != _DENSE:
                runs.append(column)
            elif column.run in dense:
                dense[column.run].figures |= column.figures
            else:
                dense[column.run] = column
    if len(dense) == 1:
        next(iter(dense.values())).label = _DENSE
    return Comparison([*dense.values(), *runs])


def _columns(source: Path) -> dict[str, Column]:
    """Columns of the reports of one source, those of its weights as they are now."""
    found: dict[str, Column] = {}
    for path, document in _reports(source):
        for content in document["results"]:
            try:
                record = Record.from_dict(content)
                name, held = record.subject, document[record.subject]["cache"]
            except (KeyError, TypeError):
                raise UserError(f"{path}: damaged, or not a report of starkv eval") from None
            label = str(source) if name != _DENSE else f"{_DENSE}, {source}"
            if name not in found or found[name].run != record.run:
                found[name] = Column(label, record.run, held["per_token"], held["ratio"])
            found[name].figures |= dict(_figures(record))
    for column in found.values():
        column.figures |= dict(_zero_shot(column))
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
        raise UserError(f"{source}: no report to compare; make one with: starkv eval {source}")
    return sorted(documents, key=lambda report: str(report[1].get("created")))


def _figures(record: Record) -> Iterator[tuple[Row, Metric]]:
    backend_free = {k: v for k, v in record.options.items() if k != "backend"}
    asked = canonical_hash([record.data["sha256"], backend_free])
    for metric in record.metrics:
        yield Row(record.task, metric.name, record.path, record.n, asked), metric


def _zero_shot(column: Column) -> Iterator[tuple[Row, Metric]]:
    """The paper's mean for each path on which all of its tasks were run once."""
    for path in ("prefill", "decode"):
        rows = [r for r in column.figures if r.path == path and PROTOCOL.get(r.task) == r.metric]
        if sorted(row.task for row in rows) == sorted(PROTOCOL):
            asked = canonical_hash(sorted(row.asked for row in rows))
            mean = mean_of([column.figures[row] for row in rows])
            yield Row(ZERO_SHOT, mean.name, path, sum(row.n for row in rows), asked), mean
