"""Cosines and sines of a model's RoPE, by slot for plain torch and by tile for the kernels."""

from __future__ import annotations

import torch

from triton_ops.latent_attention.layout import power

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def turns(
    positions: torch.Tensor, inv_freq: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 cos and sin ``[n, D / 2]`` of float64 ``positions``, times ``factor``."""
    angles = torch.outer(positions, inv_freq.double())
    return angles.cos() * factor, angles.sin() * factor


def by_slot(
    start: int, stop: int, inv_freq: torch.Tensor, factor: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 cos and sin ``[stop - start, D]`` of slots, halves equal."""
    made = turns(torch.arange(start, stop, dtype=torch.float64), inv_freq, factor)
    cos, sin = (torch.cat((t, t), dim=-1).to(device, torch.float32) for t in made)
    return cos, sin


class RopeTables:
    """Tables of one model, made once and grown as the context grows.

    Angles are formed in float64, so that far positions keep float32 accuracy.

    Args:
        inv_freq: ``[D / 2]``, radians per token.
        factor: RoPE's factor on cos and sin (yarn's attention factor; 1 elsewhere).
    """

    def __init__(self, inv_freq: torch.Tensor, factor: float = 1.0) -> None:
        self._inv_freq, self._factor = inv_freq.double().cpu(), factor
        self._by_slot: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._by_tile: dict[tuple[str, int, torch.device], Four] = {}

    @property
    def dim(self) -> int:
        """D."""
        return 2 * len(self._inv_freq)

    def held(self) -> tuple[torch.Tensor, ...]:
        """All tables there are now. Growth replaces them: who reads old ones later keeps these."""
        fours = (t for four in self._by_tile.values() for t in four)
        return (*(t for two in self._by_slot.values() for t in two), *fours)

    @torch.inference_mode(False)  # what is kept must serve training too
    def slots(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 cos and sin ``[length, D]`` for slots 0 to ``length - 1``, halves equal."""
        held = self._by_slot.get(device)
        if held is None or len(held[0]) < length:
            grown = max(length, 256 if held is None else 2 * len(held[0]))
            held = self._by_slot[device] = by_slot(0, grown, self._inv_freq, self._factor, device)
        return held[0][:length], held[1][:length]

    def band(self, tile: int, tiles: int, device: torch.device) -> Four:
        """Fp16 cos, sin ``[tile / 2, P]`` of ``j + 1/2``; of the tiles' centres ``[tiles, P]``.

        P is the power of two from D / 2, at least 16; what is beyond D / 2 is 0.
        """
        offsets = torch.arange(tile // 2, dtype=torch.float64) + 0.5
        return self._tiles("band", tile, tiles, device, offsets, (tile - 1) / 2, torch.float16)

    def rebuilt(self, tile: int, tiles: int, device: torch.device) -> Four:
        """Fp16 cos, sin ``[tile, P]`` of ``j``; float32 of tiles' first slots ``[tiles, P]``."""
        offsets = torch.arange(tile, dtype=torch.float64)
        return self._tiles("rebuilt", tile, tiles, device, offsets, 0.0, torch.float32)

    @torch.inference_mode(False)
    def _tiles(
        self,
        kind: str,
        tile: int,
        tiles: int,
        device: torch.device,
        offsets: torch.Tensor,
        shift: float,
        dtype: torch.dtype,
    ) -> Four:
        held = self._by_tile.get((kind, tile, device))
        if held is None or len(held[2]) < tiles:
            grown = tiles if held is None else max(tiles, 2 * len(held[2]))
            places = torch.arange(grown, dtype=torch.float64) * tile + shift
            cos, sin = (t.to(device, torch.float16) for t in self._padded(offsets, 1.0))
            cos_at, sin_at = (t.to(device, dtype) for t in self._padded(places, self._factor))
            held = self._by_tile[kind, tile, device] = cos, sin, cos_at, sin_at
        return held

    def _padded(self, positions: torch.Tensor, factor: float) -> tuple[torch.Tensor, ...]:
        half = len(self._inv_freq)
        made = turns(positions, self._inv_freq, factor)
        return tuple(torch.nn.functional.pad(t, (0, power(half) - half)) for t in made)
