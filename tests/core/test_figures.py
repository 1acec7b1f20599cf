"""Figures are drawn without a display, for every shape of grid and map, and show the numbers."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import matplotlib.axes
import pytest

from starkv_core.eval.deployed import CacheBytes
from starkv_core.eval.figures import retrieval_heatmap
from starkv_core.eval.retrieval import TASKS, RetrievalResult
from starkv_core.figures import bytes_per_layer, rank_map_figure, save_png, spectra_figures
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.spectra import analyze_spectra
from tests import models


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text put into a cell, in order."""
    found: list[str] = []
    plain = matplotlib.axes.Axes.text

    def text(self: Any, x: float, y: float, s: str, *args: Any, **options: Any) -> Any:
        found.append(s)
        return plain(self, x, y, s, *args, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "text", text)
    monkeypatch.delenv("DISPLAY", raising=False)
    return found


def check_png(path: Path) -> None:
    """A whole PNG of a sensible size that is not one flat colour."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 300 < width < 4000
    assert 200 < height < 3000
    assert data.endswith(b"IEND" + struct.pack(">I", zlib.crc32(b"IEND")))
    assert len(data) > 10_000


def result(task: str, right: list[list[int]], prompts: int) -> RetrievalResult:
    lengths = tuple(100 * (i + 1) for i in range(len(right)))
    depths = tuple(i / max(1, len(right[0]) - 1) for i in range(len(right[0])))
    cells = tuple(
        tuple((1.0,) * count + (0.0,) * (prompts - count) for count in row) for row in right
    )
    return RetrievalResult(task, lengths, depths, prompts, cells, CacheBytes(1, 1, 1, 1))


def test_retrieval_heatmap_has_depths_down_and_lengths_across(
    tmp_path: Path, drawn: list[str]
) -> None:
    columns = {
        "dense": {"passkey": result("passkey", [[4, 3, 2], [1, 0, 4]], 4)},
        "compressed": {"passkey": result("passkey", [[0, 0, 0], [0, 0, 1]], 4)},
    }
    retrieval_heatmap(columns, tmp_path / "grid.png", "title")
    check_png(tmp_path / "grid.png")
    assert drawn == ["100", "25", "75", "0", "50", "100", "0", "0", "0", "0", "0", "25"]


def test_retrieval_heatmap_of_one_cell_and_of_two_tasks(tmp_path: Path) -> None:
    one = {"dense": {"kv": result("kv", [[1]], 1)}}
    retrieval_heatmap(one, tmp_path / "one.png", "title")
    both = {"passkey": result("passkey", [[1] * 11] * 7, 1), "kv": result("kv", [[0] * 11] * 7, 1)}
    retrieval_heatmap({"compressed": both}, tmp_path / "two.png", "title")
    for name in ("one", "two"):
        check_png(tmp_path / f"{name}.png")


def test_panels_of_five_tasks_do_not_touch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def keep(figure: Any, path: Path) -> None:
        save_png(figure, path)
        kept.append(figure)

    monkeypatch.setattr("starkv_core.eval.figures.save_png", keep)
    columns = {
        name: {task: result(task, [[1] * 5] * 3, 2) for task in TASKS}
        for name in ("dense", "compressed")
    }
    retrieval_heatmap(columns, tmp_path / "five.png", "title")
    check_png(tmp_path / "five.png")
    panels = kept[0].axes[:-1]  # the last is the bar
    assert len(panels) == 10
    renderer = kept[0].canvas.get_renderer()
    boxes = [ax.title.get_window_extent(renderer) for ax in panels]
    boxes += [ax.get_window_extent(renderer) for ax in panels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_spectra_figures(tmp_path: Path, drawn: list[str]) -> None:
    loaded = models.model("qwen2")
    report = analyze_spectra(loaded)
    files = spectra_figures(report, tmp_path)
    assert {path.name for path in files} == {"spectra.png", "energy-ranks.png", "errors.png"}
    for path in files:
        check_png(path)
    # One number a key head; its mean over heads is what the report says.
    numbers = list(map(int, drawn))
    heads = loaded.spec.n_kv_heads
    assert len(numbers) == heads * loaded.spec.n_layers
    for i, layer in enumerate(report.layers):
        mean = sum(numbers[i * heads : (i + 1) * heads]) / heads
        assert mean == pytest.approx(layer.key_energy_ranks[1])


def test_legends_and_colour_bars_stand_beside_the_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr(
        "starkv_core.figures.save_png", lambda figure, path: shown.update({path.stem: figure})
    )
    report = analyze_spectra(models.model("qwen2"))
    spectra_figures(report, tmp_path)
    labels = {
        name: [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        for name, figure in shown.items()
    }
    assert labels["spectra"] == [str(layer.index) for layer in report.layers]
    assert labels["energy-ranks"] == ["90%", "95%", "99%", "full rank"]
    assert len(labels["errors"]) == 4
    for figure in shown.values():
        figure.draw_without_rendering()
        panels = [ax.get_window_extent() for ax in figure.axes]
        for legend in figure.legends:
            assert not any(legend.get_window_extent().overlaps(panel) for panel in panels)
    # The label of a colour bar between two panels would read as that of the second.
    keys, _, bar = shown["energy-ranks"].axes
    assert bar.get_position().x1 < keys.get_position().x0


def test_rank_map_shows_every_rank_and_dense_layers(tmp_path: Path, drawn: list[str]) -> None:
    spec = models.model("qwen2").spec
    ranks = RankMap((LayerRanks((3, 7), (11,)), None, LayerRanks((1, 16), (32,))))
    rank_map_figure(spec, ranks, "title", tmp_path / "ranks.png")
    check_png(tmp_path / "ranks.png")
    assert drawn == ["3", "7", "dense", "1", "16", "11", "dense", "32"]
    # Rows of latents fill up to 8 numbers: keys of 10 take 16, values of 11 take 16; keys of 17
    # take 24, values of 32 take 32. Dense: keys and values of 2 heads of 16. 2 bytes a number.
    stored = [16 + 16, 2 * 2 * 16, 24 + 32]
    assert bytes_per_layer(spec, ranks) == [2 * numbers for numbers in stored]


@pytest.mark.parametrize(
    "layers",
    [
        (LayerRanks((5,), (3, 4)),) * 3,  # grouped: one block of keys, two of values
        (None, None, None),
    ],
)
def test_rank_maps_of_other_shapes(layers: Any, tmp_path: Path) -> None:
    spec = models.model("qwen2").spec
    rank_map_figure(spec, RankMap(layers), "title", tmp_path / "ranks.png")
    check_png(tmp_path / "ranks.png")
