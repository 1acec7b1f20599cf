"""Figures of spectra and rank maps, as the paper draws them. Headless: no display is needed."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from starkv_core.artifacts import write_bytes_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def save_png(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    write_bytes_atomic(path, buffer.getvalue())
