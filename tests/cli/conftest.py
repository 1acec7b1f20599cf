"""A tiny model, a text and a run of it on disk, for commands that load them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``on_disk``, made once for all files that one process runs."""
    from tests.standin import TEXT, save_model, save_run

    folder = tmp_path_factory.mktemp("on-disk")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    save_run(folder / "run", save_model(folder / "model"), folder / "text.txt")
    return folder


@pytest.fixture
def on_disk(shared: Path) -> Iterator[OnDisk]:
    """Model of 1024 positions, one token per byte; the run has cache ratio 2.

    For reading only: a test that wrote there would change what others find. ``run`` is for writing.
    """
    before = _state(shared)
    yield OnDisk(shared / "model", shared / "text.txt", shared / "run")
    assert _state(shared) == before, "a test wrote into what all share; let it take the fixture run"


def _state(folder: Path) -> dict[Path, tuple[int, int]]:
    """Time of change and size of all that is in a folder."""
    return {path: ((s := path.stat()).st_mtime_ns, s.st_size) for path in folder.rglob("*")}


@pytest.fixture
def run(on_disk: OnDisk, tmp_path: Path) -> Path:
    """A copy of the finished run of a test's own."""
    return Path(shutil.copytree(on_disk.run, tmp_path / "run"))
