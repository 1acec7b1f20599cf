"""Memory that a case needs, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from starkv_core.bench.shapes import key_layout
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import LayerRanks
from triton_ops.latent_attention import workspace_bytes

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


def latent_work(spec: ModelSpec, ranks: LayerRanks, batch: int, room: int) -> int:
    """Bytes that latent attention of one new token allocates in a layer whose keys have a bias."""
    return workspace_bytes(
        key_layout(spec, ranks),
        True,
        sum(ranks.values),
        batch=batch,
        heads=spec.n_heads,
        dim=spec.head_dim,
        room=room,
    )


def slot_tables(spec: ModelSpec, room: int) -> int:
    """Bytes of RoPE's cosines and sines by slot, float32."""
    return 2 * 4 * spec.head_dim * room


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.3g} GiB"


def room_on(device: torch.device) -> int:
    """Bytes that a case may take on a device."""
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - _KEPT_FREE)
    return 4 << 30


def largest_batch(need_of: Callable[[int], Need], room: int) -> int | None:
    """The largest batch whose need fits into ``room``; None when not even one row does."""
    batch = 0
    while need_of(batch + 1).total <= room:
        batch += 1
    return batch or None
