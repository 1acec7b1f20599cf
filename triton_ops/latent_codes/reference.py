"""Plain-torch reference: scales, codes and their packed form, one function a formula.

Codes are bit-exact across backends: all steps are single float32 operations in the order written
(a correctly rounded division, rounding to nearest even), and sums run in float64, which leaves
nothing to their order.
"""

from __future__ import annotations

import torch

from triton_ops.latent_codes.layout import LANES, TILE, CodeLayout, Plane

SMALLEST, LARGEST = 2.0**-24, 65504.0  # positive numbers of fp16: a scale is never 0 or infinite


def measure(
    x: torch.Tensor, weight: torch.Tensor, groups: tuple[int, ...], kind: str
) -> torch.Tensor:
    """Scale of every token and group: ``rms`` or ``absmax`` of ``x * weight``.

    Args:
        x: ``[..., R]`` as stored.
        weight: float32 ``[R]``.
        groups: channels that share a scale.

    Returns:
        Fp16 ``[..., K]``, rounded from float32.
    """
    if not groups:
        return x.new_zeros(*x.shape[:-1], 0, dtype=torch.float16)
    found = []
    for part in (x.float() * weight).split(groups, dim=-1):
        if kind == "rms":
            found.append(part.double().square().mean(-1).sqrt())
        else:
            found.append(part.abs().amax(-1).double())
    scales = torch.stack(found, dim=-1).float()
    return scales.clamp(SMALLEST, LARGEST).half()


def encode(
    x: torch.Tensor,
    inverse: torch.Tensor,
    scales: torch.Tensor,
    groups: tuple[int, ...],
    zero: torch.Tensor,
    least: torch.Tensor,
    most: torch.Tensor,
) -> torch.Tensor:
    """``clamp(round(x * (1 / s_c) / g + zero), least, most)``, uint8 ``[..., R]``.

    Args:
        x: ``[..., R]`` as stored.
        inverse: float32 ``[R]``, ``1 / s_c``.
        scales: fp16 ``[..., K]``, g.
        zero, least, most: float32 ``[R]``.
    """
    levels = x.float() * inverse / _per_channel(scales, groups) + zero
    return torch.minimum(torch.maximum(levels.round(), least), most).to(torch.uint8)


def decode(
    codes: torch.Tensor,
    step: torch.Tensor,
    scales: torch.Tensor,
    groups: tuple[int, ...],
    zero: torch.Tensor,
) -> torch.Tensor:
    """``(code - zero) * s_c * g``, float32 ``[..., R]``; arguments as :func:`encode` has them."""
    return (codes.float() - zero) * step * _per_channel(scales, groups)


def _per_channel(scales: torch.Tensor, groups: tuple[int, ...]) -> torch.Tensor:
    """Float32 scales ``[..., K]`` of groups as ``[..., R]``; 1 where there is none."""
    if not groups:
        return torch.ones((), device=scales.device)
    if len(groups) == 1:
        return scales.float()
    counts = torch.tensor(groups, device=scales.device)
    return scales.float().repeat_interleave(counts, dim=-1, output_size=sum(groups))


def pack(codes: torch.Tensor, start: int, buffer: torch.Tensor, layout: CodeLayout) -> None:
    """Write codes uint8 ``[B, L, R]`` of slots from ``start`` on; all other bits stay.

    Args:
        buffer: uint8 ``[B, tiles, tile_bytes]`` with rows without gaps.

    Raises:
        ValueError: shapes that do not fit.
    """
    length = codes.shape[1]
    _check(codes.shape[0], codes.shape[2], start, start + length, buffer, layout)
    tile, n, j = layout.place(torch.arange(start, start + length, device=codes.device))
    for plane in layout.planes:
        view = _view(buffer, plane, layout)
        bits = codes[..., plane.first : plane.first + plane.channels] >> plane.low
        bits = bits & (2**plane.width - 1)
        # Tokens of one n never share a byte.
        for number in range(8) if length > 1 else n.tolist():
            own = (n == number).nonzero()[:, 0]
            row, shift = divmod(number * plane.width, 8)
            place = tile[own], row, j[own]
            kept = view[:, place[0], place[1], place[2]] & ~((2**plane.width - 1) << shift) % 256
            view[:, place[0], place[1], place[2]] = kept | bits[:, own] << shift


def unpack(buffer: torch.Tensor, layout: CodeLayout, start: int, stop: int) -> torch.Tensor:
    """Codes uint8 ``[B, L, R]`` of slots ``start .. stop - 1``; the inverse of :func:`pack`."""
    _check(buffer.shape[0], layout.channels, start, stop, buffer, layout)
    codes = buffer.new_zeros(buffer.shape[0], stop - start, layout.channels)
    tile, n, j = layout.place(torch.arange(start, stop, device=buffer.device))
    for plane in layout.planes:
        bits = n * plane.width
        held = _view(buffer, plane, layout)[:, tile, bits // 8, j]
        held = held >> (bits % 8).to(torch.uint8)[:, None] & (2**plane.width - 1)
        codes[..., plane.first : plane.first + plane.channels] |= held << plane.low
    return codes


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
