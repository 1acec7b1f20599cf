"""Plain-torch reference: scales, codes and their packed form, one function a formula.

Codes are bit-exact across backends: all steps are single float32 operations in the order written
(a correctly rounded division, rounding to nearest even), and sums run in float64, which leaves
nothing to their order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional as F

from triton_ops.latent_codes.layout import LANES, TILE, CodeLayout, Plane, Side, lanes, slots, tiles

SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive numbers of fp16: a scale is never 0 or infinite


def measure(
    x: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, counts: torch.Tensor, kind: str
) -> torch.Tensor:
    """Scale of every token and group: ``rms`` or ``absmax`` of ``x * weight``.

    Args:
        x: ``[..., R]`` as stored.
        weight: float32 ``[R]``.
        index: int64 ``[K, widest]``, the channels of each group, then R.
        counts: float64 ``[K]``, how many they are.

    Returns:
        Fp16 ``[..., K]``, rounded from float32.
    """
    if not len(index):
        return x.new_zeros(*x.shape[:-1], 0, dtype=torch.float16)
    weighted = x.float() * weight
    # All groups at once, however many: they are filled up with zeros, which change no result.
    parts = weighted[..., None, :] if len(index) == 1 else F.pad(weighted, (0, 1))[..., index]
    if kind == "rms":
        scales = (parts.double().square_().sum(-1) / counts).sqrt().float()
    else:
        scales = parts.abs().amax(-1)
    return scales.clamp(SMALLEST, LARGEST).half()


def encode(
    x: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor | None,
    zero: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
) -> torch.Tensor:
    """``clamp(round(x * (1 / s_c) / g + zero), least, most)``, uint8 ``[..., R]``.

    Args:
        x: ``[..., R]`` as stored.
        inverse: float32 ``[R]``, ``1 / s_c``.
        scales: float32 ``[..., R]`` or ``[..., 1]``, g; None is 1.
        zero, least, most: float32 ``[R]``.
    """
    levels = x.float() * inverse
    if scales is not None:
        levels /= scales
    return levels.add_(zero).round_().clamp_(least, most).to(torch.uint8)


def decode(
    codes: torch.Tensor, step: torch.Tensor, scales: torch.Tensor | None, zero: torch.Tensor
) -> torch.Tensor:
    """``(code - zero) * s_c * g``, float32 ``[..., R]``; arguments as :func:`encode` has them."""
    numbers = (codes.float() - zero).mul_(step)
    return numbers if scales is None else numbers.mul_(scales)


def pack(codes: torch.Tensor, start: int, buffer: torch.Tensor, layout: CodeLayout) -> None:
    """Write codes uint8 ``[B, L, R]`` of slots from ``start`` on; all other bits stay.

    Args:
        buffer: uint8 ``[B, tiles, tile_bytes]`` with rows without gaps.

    Raises:
        ValueError: shapes that do not fit.
    """
    stop = start + codes.shape[1]
    _check(codes.shape[0], codes.shape[2], start, stop, buffer, layout)
    first, last = start // TILE, tiles(stop)
    before = start - first * TILE
    whole = F.pad(codes, (0, 0, before, last * TILE - stop))
    by_lane = lanes(layout.side, whole.unflatten(1, (last - first, TILE)))
    others = _others(layout.side, before, codes.shape[1], buffer.device)
    for plane in layout.planes:
        part = by_lane[..., plane.first : plane.first + plane.channels]
        held = _view(buffer, plane, layout)[:, first:last]
        held &= others[plane.width]
        held |= _bytes(part, plane.low, plane.width)


def _bytes(codes: torch.Tensor, low: int, width: int) -> torch.Tensor:
    """Bytes ``[B, tiles, width, LANES, C]`` of ``width`` bits from bit ``low`` of codes by lane.

    Tokens of a byte are neighbours in n, so neighbours join until bytes are full.
    """
    bits = codes >> low if low else codes
    bits = bits & (2**width - 1)
    while bits.shape[2] > width:
        bits = bits[:, :, 0::2].add(bits[:, :, 1::2], alpha=2 ** (8 // bits.shape[2] * width))
    return bits.flatten(3, -2)


@lru_cache(maxsize=16)  # all layers store a prompt in the same slots
@torch.inference_mode(False)
def _others(side: Side, before: int, length: int, device: torch.device) -> dict[int, torch.Tensor]:
    """Where bits of other slots lie than of ``length`` in a row, ``before`` slots into a tile.

    Returns:
        By width of the plane: uint8 ``[1, tiles, width, LANES, 1]``.
    """
    slot = torch.arange(tiles(before + length) * TILE, device=device)
    others = (slot < before) | (slot >= before + length)
    by_lane = lanes(side, others.to(torch.uint8).neg_().view(1, -1, TILE, 1))
    return {width: _bytes(by_lane, 0, width) for width in (1, 2, 4, 8)}


def unpack(buffer: torch.Tensor, layout: CodeLayout, start: int, stop: int) -> torch.Tensor:
    """Codes uint8 ``[B, L, R]`` of slots ``start .. stop - 1``; the inverse of :func:`pack`."""
    _check(buffer.shape[0], layout.channels, start, stop, buffer, layout)
    first, last = start // TILE, tiles(stop)
    codes = buffer.new_zeros(buffer.shape[0], last - first, 8, LANES, layout.channels)
    for plane in layout.planes:
        shifts = torch.arange(0, 8, plane.width, dtype=torch.uint8, device=buffer.device)
        held = _view(buffer, plane, layout)[:, first:last, :, None]
        bits = (held >> shifts[:, None, None] & (2**plane.width - 1)).flatten(2, 3)
        # Bits of other planes are 0 there: to add is to set.
        codes[..., plane.first : plane.first + plane.channels].add_(bits, alpha=2**plane.low)
    return slots(layout.side, codes).flatten(1, 2)[:, start - first * TILE : stop - first * TILE]


def _view(buffer: torch.Tensor, plane: Plane, layout: CodeLayout) -> torch.Tensor:
    """Bytes of a plane as ``[B, tiles, byte row, j, channel]``, padding left out."""
    size = plane.width * LANES * plane.stored
    part = buffer[..., plane.offset : plane.offset + size]
    if layout.side == "key":
        return part.unflatten(-1, (plane.width, LANES, plane.stored))[..., : plane.channels]
    return part.unflatten(-1, (plane.width, plane.stored, LANES)).transpose(-1, -2)


def _check(
    batch: int, channels: int, start: int, stop: int, buffer: torch.Tensor, layout: CodeLayout
) -> None:
    wrong = []
    if buffer.dtype != torch.uint8 or buffer.shape[::2] != (batch, layout.tile_bytes):
        wrong.append(
            f"buffer {list(buffer.shape)} {buffer.dtype}, expected [{batch}, tiles, "
            f"{layout.tile_bytes}] torch.uint8"
        )
    if channels != layout.channels:
        wrong.append(f"{channels} channels, expected {layout.channels}")
    if not 0 <= start <= stop <= buffer.shape[1] * TILE:
        wrong.append(f"slots {start} to {stop}, the buffer has {buffer.shape[1] * TILE}")
    if wrong:
        raise ValueError("latent codes: " + "; ".join(wrong))
