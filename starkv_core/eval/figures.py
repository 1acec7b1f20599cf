"""The heat map of a retrieval grid: lengths across, depths down, one panel a task and subject."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from starkv_core.eval.retrieval import TITLES, RetrievalResult
from starkv_core.figures import save_png


def retrieval_heatmap(
    columns: Mapping[str, Mapping[str, RetrievalResult]], path: Path, title: str
) -> None:
    """Write a PNG of retrieval accuracy.

    Args:
        columns: results by subject (``dense``, ``compressed``) and task; panels go side by side.
        path: file to write.
        title: on top of the figure.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for results in columns.values() for task in results))
    shown = next(result for results in columns.values() for result in results.values())
    width = 1.6 + len(columns) * max(2.4, 0.62 * len(shown.lengths) + 0.8)
    height = 1.0 + len(tasks) * max(2.0, 0.42 * len(shown.depths) + 1.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(len(tasks), len(columns), squeeze=False, sharex=True, sharey=True)
    for i, task in enumerate(tasks):
        for j, (subject, results) in enumerate(columns.items()):
            ax = axes[i][j]
            result = results[task]
            shares = [[fmean(row[k]) for row in result.scores] for k in range(len(result.depths))]
            image = ax.imshow(shares, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
            for y, row in enumerate(shares):
                for x, share in enumerate(row):
                    ink = "white" if share < 0.6 else "black"
                    ax.text(
                        x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=ink
                    )
            ax.set_title(f"{TITLES[task]}, {subject}: {100 * result.accuracy:.1f}%", fontsize=10)
            ax.set_xticks(range(len(result.lengths)), [str(n) for n in result.lengths])
            ax.set_yticks(range(len(result.depths)), [f"{100 * d:g}%" for d in result.depths])
            ax.tick_params(length=0, labelsize=8)
            if i == len(tasks) - 1:
                ax.set_xlabel("prompt length, tokens", fontsize=9)
            if j == 0:
                ax.set_ylabel("depth of the needle", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, ticks=[0.0, 0.25, 0.5, 0.75, 1.0])
    bar.ax.set_yticklabels(["0%", "25%", "50%", "75%", "100%"], fontsize=8)
    bar.set_label(f"right answers, prompts a cell: {shown.prompts}", fontsize=9)
    save_png(figure, path)
