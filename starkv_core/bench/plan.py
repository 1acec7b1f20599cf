"""Memory that a case needs, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from starkv_core.bench.shapes import key_layout
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import LayerRanks
from triton_ops.coded_attention import CodedFactors
from triton_ops.coded_attention import workspace_bytes as coded_workspace_bytes
from triton_ops.latent_attention import workspace_bytes
from triton_ops.latent_codes import LayerCodes

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


def coded_work(
    spec: ModelSpec, codes: LayerCodes, owner: torch.Tensor, batch: int, tokens: int
) -> int:
    """Bytes that attention of one new token over codes allocates in a layer whose keys have a bias.

    Args:
        owner: int64 ``[R]``, the group of key heads of each stored channel.
        tokens: that the cache has room for.
    """
    return coded_workspace_bytes(
        codes,
        _segments(codes, owner, spec.n_kv_heads, spec.group),
        batch=batch,
        heads=spec.n_heads,
        dim=spec.head_dim,
        tokens=tokens,
    )


@lru_cache(maxsize=256)  # plans ask for the layers of a model again and again
@torch.inference_mode(False)
def _segments(codes: LayerCodes, owner: torch.Tensor, heads: int, group: int) -> int:
    """Rows of scores that a row of the batch takes: parts of heads that kernels score apart."""
    groups = int(owner.max()) + 1
    own = [(owner == h * groups // heads).nonzero()[:, 0] for h in range(heads)]
    ranks = tuple(map(len, own))
    index = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
    # Of the least head dimension: where channels lie does not depend on it.
    up, bias = torch.zeros(heads, 2, max(ranks)), torch.zeros(heads, 2)
    factors = CodedFactors(codes, index, ranks, up, bias, up[..., :1])
    if group == 1 and not factors.shared:
        return factors.band[2]
    return factors.rebuilt[2] * group


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
