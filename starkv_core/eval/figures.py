"""The heat map of a retrieval grid, and quality against cache bytes of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from starkv_core.errors import UserError
from starkv_core.eval.confidence import is_share
from starkv_core.eval.retrieval import TITLES, RetrievalResult
from starkv_core.eval.table import Column, Row, all_rows, change
from starkv_core.eval.taskset import PROTOCOL
from starkv_core.figures import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACROSS = 3  # panels
_COLOURS = 10  # of the cycle; then markers change
_MARKERS = "osD^vP"


def retrieval_heatmap(
    columns: Mapping[str, Mapping[str, RetrievalResult]], path: Path, title: str
) -> None:
    """Write a PNG of retrieval accuracy.

    Args:
        columns: results by subject (``dense``, ``compressed``) and task; whichever are more, tasks
            or subjects, go side by side, the others below each other.
        path: file to write.
        title: on top of the figure.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for results in columns.values() for task in results))
    shown = next(result for results in columns.values() for result in results.values())
    wide = len(tasks) > len(columns)
    down, across = (len(columns), len(tasks)) if wide else (len(tasks), len(columns))
    width = 1.6 + across * max(2.4, 0.62 * len(shown.lengths) + 0.8)
    height = 1.0 + down * max(2.2, 0.42 * len(shown.depths) + 1.2)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for i, task in enumerate(tasks):
        for j, (subject, results) in enumerate(columns.items()):
            y_panel, x_panel = (j, i) if wide else (i, j)
            ax = axes[y_panel][x_panel]
            result = results[task]
            shares = [[fmean(row[k]) for row in result.scores] for k in range(len(result.depths))]
            image = ax.imshow(shares, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    ink = "white" if share < 0.6 else "black"
                    ax.text(
                        x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink
                    )
            ax.set_title(f"{TITLES[task]}\n{subject}: {100 * result.accuracy:.1f}%", fontsize=10)
            ax.set_xticks(range(len(result.lengths)), [str(n) for n in result.lengths])
            ax.set_yticks(range(len(result.depths)), [f"{100 * d:g}%" for d in result.depths])
            ax.tick_params(length=0, labelsize=8)
            if y_panel == down - 1:
                ax.set_xlabel("prompt length, tokens", fontsize=9)
            if x_panel == 0:
                ax.set_ylabel("depth of the needle", fontsize=9)
    marks = [0.0, 0.25, 0.5, 0.75, 1.0]
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=18 * down, ticks=marks)
    bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"], fontsize=8)
    bar.set_label(f"right answers, prompts a cell: {shown.prompts}", fontsize=9)
    save_png(figure, path)


def comparison_figure(columns: Sequence[Column], path: Path) -> None:
    """Write a PNG: the main figure of each task that two columns share, against cache bytes.

    The first column is a dashed line through its point. Bars are 95% intervals of the difference
    from it, where that is known.

    Raises:
        UserError: no task is in two columns.
    """
    from matplotlib.figure import Figure

    rows = _main_rows(columns)
    if not rows:
        raise UserError("--compare: no task is in two of the reports with the same rows")
    across = min(_ACROSS, len(rows))
    down = -(-len(rows) // across)
    figure = Figure(figsize=(1.0 + 4.0 * across, 0.7 + 3.1 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    for ax, row in zip(axes, rows, strict=False):
        _panel(ax, row, columns)
    drawn = {
        label: handle
        for ax in axes[: len(rows)]
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    named = [c for c in columns if c.label in drawn]
    figure.legend(
        [drawn[c.label] for c in named],
        [f"{c.label} (ratio {c.cache.ratio:.2f})" for c in named],
        title=f"dashed: {columns[0].label}; bars: 95% intervals of the difference from it",
        title_fontsize=8,
        loc="outside lower center",
        ncols=min(2 * across, len(named)),
        fontsize=8,
        frameon=False,
    )
    save_png(figure, path)


def _main_rows(columns: Sequence[Column]) -> list[Row]:
    """The first metric of each task, or the one that the paper averages, if two columns have it."""
    first: dict[str, str] = {}
    for row in all_rows(columns):
        first.setdefault(row.task, PROTOCOL.get(row.task, row.metric))
    return [
        row
        for row in all_rows(columns)
        if row.metric == first[row.task] and sum(row in c.figures for c in columns) > 1
    ]


def _panel(ax: Axes, row: Row, columns: Sequence[Column]) -> None:
    reference = columns[0]
    share = all(is_share(c.figures[row].metric) for c in columns if row in c.figures)
    for i, column in enumerate(columns):
        figure = column.figures.get(row)
        if figure is None or figure.metric.value is None:
            continue
        value = figure.metric.value
        delta = change(row, column, reference)
        half = 0.0 if delta is None or delta.half is None else delta.half
        down, up = (min(half, value), min(half, 1.0 - value)) if share else (half, half)
        if column is reference:
            ax.axhline(value, color="0.4", linestyle="--", linewidth=1, zorder=1)
        ax.errorbar(
            column.cache.per_token,
            value,
            yerr=[[down], [up]] if half else None,
            color="0.25" if column is reference else f"C{i % _COLOURS}",
            marker="*" if column is reference else _MARKERS[i // _COLOURS % len(_MARKERS)],
            markersize=9 if column is reference else 6,
            linestyle="none",
            capsize=3,
            label=column.label,
            zorder=3,
        )
    _bytes_axis(ax, [c.cache.per_token for c in columns if row in c.figures])
    better = next(c.figures[row].metric.better for c in columns if row in c.figures)
    ax.set_title(row.label, fontsize=9)
    ax.set_ylabel(f"{row.metric} ({better} is better)", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25)
    ax.margins(x=0.12, y=0.15)
    if share:
        ax.set_ylim(-0.04, 1.04)
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def _bytes_axis(ax: Axes, held: Sequence[float]) -> None:
    """Powers of two where the caches are of different orders."""
    from matplotlib.ticker import LogLocator, NullLocator

    if max(held) > 2 * min(held):
        ax.set_xscale("log", base=2)
        between = (1.0, 1.5) if max(held) < 8 * min(held) else (1.0,)
        ax.xaxis.set_major_locator(LogLocator(2, between))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("cache bytes per token, whole cache", fontsize=8)
