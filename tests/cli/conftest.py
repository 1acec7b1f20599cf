"""A tiny model, a text and a run of it on disk, for commands that load them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class OnDisk:
    """Paths of what the commands read."""

    model: Path
    text: Path
    run: Path


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> OnDisk:
    """Model of 1024 positions, one token per byte; the run has cache ratio 2."""
    from tests.standin import TEXT, save_model, save_run

    folder = tmp_path_factory.mktemp("on-disk")
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    model = save_model(folder / "model")
    return OnDisk(model, text, save_run(folder / "run", model, text))
