"""Figures of spectra and rank maps, after the paper's 5 to 7, 10 and 11. No display is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_core.artifacts import write_bytes_atomic
from starkv_core.budget import bytes_per_token
from starkv_core.rank_map import RankMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from starkv_core.models.spec import ModelSpec
    from starkv_core.spectra import SpectraReport

DPI = 150
_SMALL = 8
_MOST_LABELS = 24  # ticks on an axis
_MOST_NAMED = 11  # layers in a legend, besides the first
_MOST_DIGITS = 16  # columns of a heat map that still have room for numbers


def save_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    write_bytes_atomic(path, buffer.getvalue())


def spectra_figures(report: SpectraReport, folder: Path) -> list[Path]:
    """Write the figures of ``report`` into ``folder``; returns the files."""
    kind = "whitened weights" if report.whitened else "weights"
    title = f"{Path(report.model).name}, {kind}"
    files = [folder / f"{name}.png" for name in ("spectra", "energy-ranks", "errors")]
    _spectra(report, title, files[0])
    _energy_ranks(report, title, files[1])
    _errors(report, title, files[2])
    return files


def _spectra(report: SpectraReport, title: str, path: Path) -> None:
    """Singular values over the largest, a line a layer: keys as the mean over heads."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(f"singular values: {title}", fontsize=11)
    panels = figure.subplots(1, 2, sharey=True)
    last = len(report.layers) - 1
    colors = colormaps["viridis"].resampled(last + 1)
    # Of many layers not all are named; those between have the colours between.
    named = {round(n * last / _MOST_NAMED) for n in range(_MOST_NAMED + 1)}
    for n, layer in enumerate(report.layers):
        label = str(layer.index) if n in named else None
        keys = layer.keys / layer.keys[:, :1].clamp(min=1e-30)
        lines = (keys.mean(dim=0), layer.values / layer.values[:1].clamp(min=1e-30))
        for ax, line in zip(panels, lines, strict=True):
            shares = [100.0 * (i + 1) / len(line) for i in range(len(line))]
            ax.plot(shares, line.tolist(), color=colors(n), linewidth=1.0, label=label)
    names = ("keys, head-wise (HD), mean over heads", "values, joint (JD)")
    for ax, name in zip(panels, names, strict=True):
        ax.set_title(name, fontsize=10)
        ax.set_yscale("log")
        ax.set_ylim(1e-3, 1.3)
        ax.set_xlim(0, 100)
        ax.set_xlabel("component, % of full rank", fontsize=9)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=_SMALL)
    panels[0].set_ylabel("singular value / largest", fontsize=9)
    _legend_outside(figure, panels[0], "outside right center", title="layer")
    save_png(figure, path)


def _energy_ranks(report: SpectraReport, title: str, path: Path) -> None:
    """Ranks that hold 95% of the energy: keys a cell a head, values a bar a layer."""
    from matplotlib.figure import Figure

    from starkv_core.spectra import LEVELS, energy_rank

    level = LEVELS[1]
    keys = [[energy_rank(head, level) for head in layer.keys] for layer in report.layers]
    values = [layer.value_energy_ranks for layer in report.layers]
    full = report.layers[0].keys.shape[1]
    figure = Figure(figsize=_map_size(len(keys[0]), len(keys)), layout="constrained")
    figure.suptitle(f"ranks by energy: {title}", fontsize=11)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2], sharey=True)
    image = _heat(left, keys, len(keys[0]), full)
    left.set_title(f"keys, {level:.0%} of the energy, of {full}", fontsize=10)
    left.set_xlabel("key head", fontsize=9)
    left.set_ylabel("layer", fontsize=9)
    _colorbar(figure, image, [left], "keys, share of full rank")
    rows = range(len(values))
    for k, shade in reversed(list(enumerate(("#1f4e79", "#5b9bd5", "#bdd7ee")))):
        right.barh(rows, [v[k] for v in values], color=shade, label=f"{LEVELS[k]:.0%}")
    width = len(report.layers[0].values)
    right.axvline(width, color="black", linewidth=1, linestyle="--", label="full rank")
    right.set_title(f"values, joint, of {len(report.layers[0].values)}", fontsize=10)
    right.set_xlabel("rank", fontsize=9)
    right.tick_params(labelsize=_SMALL)
    _legend_outside(figure, right, "outside right center", title="values,\nenergy", turned=True)
    save_png(figure, path)


def _errors(report: SpectraReport, title: str, path: Path) -> None:
    """Squared error of HD and JD for as many cached numbers, keys and values."""
    from matplotlib.figure import Figure

    from starkv_core.spectra import BUDGETS

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(f"error at equal budget: {title}", fontsize=11)
    layers = [layer.index for layer in report.layers]
    panels = figure.subplots(1, 2)
    for ax, name in zip(panels, ("key", "value"), strict=True):
        for kind, color in (("hd", "#c55a11"), ("jd", "#1f4e79")):
            for b, (budget, style) in enumerate(zip(BUDGETS, ("-", "--"), strict=True)):
                errors = [100.0 * getattr(x, f"{name}_errors")[kind][b] for x in report.layers]
                label = f"{kind.upper()}, {budget:.0%} of the width"
                ax.plot(layers, errors, style, color=color, marker="o", markersize=3, label=label)
        ax.set_title(f"{name}s", fontsize=10)
        ax.set_xlabel("layer", fontsize=9)
        ax.set_ylabel("relative squared error, %", fontsize=9)
        ax.set_ylim(bottom=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.tick_params(labelsize=_SMALL)
    _legend_outside(figure, panels[0], "outside lower center", columns=4)
    save_png(figure, path)


def bytes_per_layer(spec: ModelSpec, ranks: RankMap) -> list[int]:
    """Bytes cached per token in each layer."""
    return [bytes_per_token(spec, RankMap((layer,))) for layer in ranks.layers]


def rank_map_figure(spec: ModelSpec, ranks: RankMap, title: str, path: Path) -> None:
    """Write the rank map, a cell a key head or group of values, and the bytes of each layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    keys = [() if layer is None else layer.keys for layer in ranks.layers]
    values = [() if layer is None else layer.values for layer in ranks.layers]
    heads, groups = max(1, *map(len, keys)), max(1, *map(len, values))
    # A group of heads has at most as many times the rank of one.
    key_full = min(spec.kv_width // heads, spec.hidden)
    value_full = min(spec.kv_width // groups, spec.hidden)
    shares = [rank / key_full for row in keys for rank in row]
    shares += [rank / value_full for row in values for rank in row]
    top = max(shares, default=1.0)
    width, height = _map_size(heads, len(keys))
    figure = Figure(figsize=(width + 1.5, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    key_ax, value_ax, byte_ax = figure.subplots(
        1, 3, width_ratios=[3, max(0.6, 3 * groups / heads), 1.8], sharey=True
    )
    image = _heat(key_ax, keys, heads, key_full, top)
    _heat(value_ax, values, groups, value_full, top)
    key_ax.set_title(f"keys: rank of {key_full}", fontsize=10)
    key_ax.set_xlabel("key head" if heads == spec.n_kv_heads else "group of heads", fontsize=9)
    key_ax.set_ylabel("layer", fontsize=9)
    value_ax.set_title(f"values: of {value_full}", fontsize=10)
    value_ax.set_xlabel("all heads" if groups == 1 else "group of heads", fontsize=9)
    if groups == 1:
        value_ax.set_xticks([])
    _colorbar(figure, image, [key_ax, value_ax], "share of full rank")
    stored = bytes_per_layer(spec, ranks)
    colors = ["#7f7f7f" if layer is None else "#5b9bd5" for layer in ranks.layers]
    byte_ax.barh(range(len(stored)), stored, color=colors)
    byte_ax.axvline(
        bytes_per_token(spec, RankMap((None,))), color="black", linewidth=1, linestyle="--"
    )
    byte_ax.set_title("bytes per token", fontsize=10)
    byte_ax.set_xlabel("dashed: dense", fontsize=9)
    byte_ax.xaxis.set_major_locator(MaxNLocator(4))
    byte_ax.tick_params(labelsize=_SMALL)
    save_png(figure, path)


def _map_size(columns: int, rows: int) -> tuple[float, float]:
    """Width and height in inches of a figure with a heat map of so many cells."""
    return 5.5 + min(6.0, 0.22 * columns), 1.6 + min(8.0, max(2.0, 0.26 * rows))


def _heat(ax: Any, rows: Sequence[Sequence[int]], columns: int, full: int, top: float = 1.0) -> Any:
    """Heat map of ranks as shares of ``full``, up to ``top``; an empty row is a dense layer."""
    shares = [[rank / full for rank in row] or [math.nan] * columns for row in rows]
    ax.set_facecolor("#d9d9d9")
    image = ax.imshow(shares, vmin=0.0, vmax=top, cmap="viridis", aspect="auto")
    for y, row in enumerate(rows):
        if not row:
            ax.text((columns - 1) / 2, y, "dense", ha="center", va="center", fontsize=7)
        elif columns <= _MOST_DIGITS:
            for x, rank in enumerate(row):
                ink = "white" if rank / full < 0.6 * top else "black"
                ax.text(x, y, str(rank), ha="center", va="center", fontsize=7, color=ink)
    ax.set_xticks(_ticks(columns))
    ax.set_yticks(_ticks(len(rows)))
    ax.tick_params(length=0, labelsize=_SMALL)
    return image


def _ticks(count: int) -> range:
    return range(0, count, max(1, math.ceil(count / _MOST_LABELS)))


def _legend_outside(
    figure: Figure,
    ax: Any,
    place: str,
    *,
    title: str | None = None,
    columns: int = 1,
    turned: bool = False,
) -> None:
    """Legend of the curves or bars of ``ax`` beside the panels, where it covers no data."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles[::-1] if turned else handles,
        labels[::-1] if turned else labels,
        loc=place,
        ncols=columns,
        fontsize=_SMALL,
        title=title,
        title_fontsize=_SMALL,
    )


def _colorbar(figure: Figure, image: Any, axes: list[Any], label: str) -> None:
    # On the left: on the right its label would read as that of the next panel.
    bar = figure.colorbar(image, ax=axes, location="left")
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=_SMALL)
