"""Second moments gathered from a running model."""

from __future__ import annotations

import torch

from starkv_core.statistics import LayerStatistics, gather_statistics
from tests import models


def test_sums_do_not_drift() -> None:
    """The same sequence many times has the statistics of one; float32 sums would round them off."""
    loaded = models.model()
    row = models.ids(1, 24)
    once = gather_statistics(loaded, row, [0, 2])
    often = gather_statistics(loaded, row.expand(60, -1), [0, 2])
    for i in (0, 2):
        for name in LayerStatistics.names():
            found = getattr(often[i], name)
            assert found.dtype == torch.float32
            assert torch.equal(found, getattr(once[i], name)), name
