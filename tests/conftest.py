"""Settings of the whole suite: no network, one thread, no seed or setting of the machine's own."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

# Before torch, triton and the hub's client are imported: they read these once. Processes that tests
# start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="starkv-tests-")  # HOME is shared or read-only
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # sums have one order, whatever the machine and the number of workers

ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
# What widths and colours of printed text depend on.
os.environ["TERM"] = "xterm"
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    """Remove the hub's folder of this process."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """Every fixture draws the same numbers, whichever test asks for it first."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    _seed()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every replay of a captured step: whether there was a capture at all."""
    from starkv_core.decode import CapturedStep

    counted: list[int] = []
    replay = CapturedStep.replay

    def counting(step: CapturedStep) -> torch.Tensor:
        counted.append(1)
        return replay(step)

    monkeypatch.setattr(CapturedStep, "replay", counting)
    return counted
