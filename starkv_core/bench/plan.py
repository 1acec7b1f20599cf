"""Memory that a case needs, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

_KEPT_FREE = 512 << 20  # for the driver, graphs and libraries


@dataclass(frozen=True)
class Need:
    """Bytes by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())

    def fault(self, room: int) -> str | None:
        """Why this does not fit into ``room`` bytes, or None."""
        if self.total <= room:
            return None
        largest = max(self.parts, key=lambda name: self.parts[name])
        return (
            f"does not fit: {gib(self.total)} needed ({largest} {gib(self.parts[largest])}), "
            f"{gib(room)} there"
        )


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.3g} GiB"


def room_on(device: torch.device) -> int:
    """Bytes that a case may take on a device."""
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - _KEPT_FREE)
    return 4 << 30


def batches() -> Iterable[int]:
    """Batches tried at equal memory: 1, 2, 4, then multiples of 8."""
    yield from (1, 2, 4)
    yield from range(8, 4097, 8)


def largest_batch(need_of: Callable[[int], Need], room: int) -> int | None:
    """The largest batch whose need fits into ``room``; None when not even one row does."""
    best = None
    for batch in batches():
        if need_of(batch).total > room:
            break
        best = batch
    return best
