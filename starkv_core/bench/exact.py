"""Random inputs, and attention over them in float64, a tile of the cache at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def normal(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0
) -> Tensor:
    """Normal numbers of deviation ``scale``."""
    generator = torch.Generator(device).manual_seed(seed)
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.normal_(generator=generator).mul_(scale)


def attend(q: Tensor, tiles: Iterator[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """Float64 attention of one row's queries (online softmax).

    Args:
        q: ``[H_kv, G, D]``.
        tiles: keys ``[H_kv, T, D]`` with values ``[H_kv, T, D]``, or ``[T, r]`` of all heads.

    Returns:
        ``[H_kv, G, D]`` or ``[H_kv, G, r]``.
    """
    top = q.new_full((*q.shape[:2], 1), -torch.inf)
    mass, mixed = torch.zeros_like(top), q.new_zeros(())
    for keys, values in tiles:
        scores = q @ keys.mT * scale
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        p, shrink = torch.exp(scores - new_top), torch.exp(top - new_top)
        part = p @ values if values.ndim == 3 else (p.flatten(0, 1) @ values).view(*p.shape[:2], -1)
        mass, mixed, top = mass * shrink + p.sum(-1, keepdim=True), mixed * shrink + part, new_top
    return mixed / mass
