"""Plain-torch reference: where the rows of new tokens go, and which tokens are coded."""

from __future__ import annotations

import torch

from triton_ops.coded_attention import Coded
from triton_ops.latent_codes import TILE, Codec, pack


def coded_after(coded: int, filled: int, window: int) -> int:
    """Slots below are coded (but for sinks) once ``filled`` are filled and ``coded`` were coded."""
    return max(coded, filled - window)


def ring_rows(slots: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Where ``slots`` of the window lie in the exact rows: a ring after the sinks."""
    return sinks + slots % max(window, 1)


def write_codes(side: Coded, codec: Codec, start: int, rows: torch.Tensor) -> None:
    """Quantise ``rows [B, L, R]``, as stored, into the slots from ``start`` on."""
    codes, scales = codec.quantise(rows)
    pack(codes, start, side.codes, codec.layout)
    if not codec.layout.scales:
        return
    slots = torch.arange(start, start + rows.shape[1], device=rows.device)
    side.scales[:, slots // TILE, :, slots % TILE] = scales.transpose(0, 1)


def store_rows(
    side: Coded, codec: Codec, rows: torch.Tensor, past: int, coded: int, sinks: int, window: int
) -> None:
    """Store the latents of new tokens; code what is then older than the window.

    Args:
        side: buffers of the keys (or the values), written in place, with room for the tokens.
        rows: ``[B, L, R]`` of slots from ``past`` on.
        past: slots filled before.
        coded: slots below were coded (but for sinks).
    """
    stop = past + rows.shape[1]
    after = coded_after(coded, stop, window)
    start, end = max(coded, sinks), min(max(after, sinks), stop)
    rows = rows.to(side.exact.dtype)
    inner = side.exact[..., : rows.shape[-1]]

    def ring(first: int, last: int) -> torch.Tensor:
        return ring_rows(torch.arange(first, last, device=rows.device), sinks, window)

    if end > start:
        leaving = rows[:, max(start - past, 0) : max(end - past, 0)]
        if start < past:
            leaving = torch.cat((inner[:, ring(start, min(end, past))], leaving), dim=1)
        write_codes(side, codec, start, leaving)
    if past < sinks:
        inner[:, past : min(stop, sinks)] = rows[:, : sinks - past]
    first = max(end, past, sinks)
    if first < stop:
        inner[:, ring(first, stop)] = rows[:, first - past :]
