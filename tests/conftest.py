"""Settings of the whole suite: no network, few threads, Triton interpreted without a GPU."""

from __future__ import annotations

import os

# Before torch, triton and the hub's client are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // workers)))


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
