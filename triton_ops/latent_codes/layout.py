"""Where the codes of a token lie: tiles of slots, sections of channels, planes of bits.

Opaque to all but this folder. A tile holds :data:`TILE` slots; a section holds channels of equal
bits; a plane holds 1, 2, 4 or 8 of their bits. Token ``t`` of a tile is ``(n, j)``, with ``n`` the
place within a byte (and which byte row), ``j`` the place within a row of :data:`LANES`:

    keys    u = t % 128:  u >= 64: n = 2 (t // 128),     j = u - 64
                          u <  64: n = 2 (t // 128) + 1, j = 63 - u
    values  n = t // 64,  j = 2 (t % 32) + t % 64 // 32

so that keys come in pairs symmetric around the centre of 128 slots, and the first bytes of words of
two are values of 32 slots in a row. In a plane of ``w`` bits token
``(n, j)`` has bits ``n w % 8`` up of byte row ``n w // 8``. Bytes of a plane are ``[w, LANES,
channels]`` for keys, whose sections are padded to :data:`PAD` channels, and ``[w, channels,
LANES]`` for values. 3 bits are a plane of the low two and one of the top bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

TILE = 512  # slots
LANES = 64  # tokens of a tile that share (n): columns of a byte row
PAD = 16  # channels to which sections of keys are padded
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}  # widths of the planes of b bits, low bits first

Side = Literal["key", "value"]


@dataclass(frozen=True)
class Section:
    """Channels of equal bits, side by side.

    Attributes:
        bits: 2, 3, 4 or 8.
        channels: at least 1.
    """

    bits: int
    channels: int


@dataclass(frozen=True)
class Plane:
    """Some bits of a section: ``width`` of them from bit ``low`` of a code, at byte ``offset``.

    Attributes:
        first, channels: of the row.
        stored: channels with padding.
    """

    offset: int
    width: int
    low: int
    first: int
    channels: int
    stored: int


@dataclass(frozen=True)
class CodeLayout:
    """Codes and scales of the keys (or the values) of one layer.

    Attributes:
        side: ``key`` or ``value``.
        sections: of the row, in its order.
        groups: channels that share a scale, in the row's order; ``(R,)`` is one scale a token,
            ``()`` is none.

    Raises:
        ValueError: bits that cannot be packed, empty sections, groups that do not cover the row.
    """

    side: Side
    sections: tuple[Section, ...]
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        wrong = [
            f"section {s.bits} bits x {s.channels}: bits are 2, 3, 4 or 8, channels from 1"
            for s in self.sections
            if s.bits not in PLANES or s.channels < 1
        ]
        if self.side not in ("key", "value"):
            wrong.append(f"side {self.side!r}: key or value")
        if not self.sections:
            wrong.append("no section")
        if self.groups and (sum(self.groups) != self.channels or min(self.groups) < 1):
            wrong.append(f"scale groups {self.groups} do not cover {self.channels} channels")
        if wrong:
            raise ValueError("code layout: " + "; ".join(wrong))

    @property
    def channels(self) -> int:
        """R: channels of a row, padding left out."""
        return sum(s.channels for s in self.sections)

    @property
    def scales(self) -> int:
        """Scales per token."""
        return len(self.groups)

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """In the order in which they lie in a tile."""
        found, offset, first = [], 0, 0
        for section in self.sections:
            pad = PAD if self.side == "key" else 1
            stored, low = -(-section.channels // pad) * pad, 0
            for width in PLANES[section.bits]:
                found.append(Plane(offset, width, low, first, section.channels, stored))
                offset, low = offset + width * LANES * stored, low + width
            first += section.channels
        return tuple(found)

    @property
    def tile_bytes(self) -> int:
        """Bytes of the codes of a tile, padding included."""
        last = self.planes[-1]
        return last.offset + last.width * LANES * last.stored

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a tile, 16 bits each."""
        return 2 * TILE * self.scales

    def bits(self, device: torch.device | None = None) -> torch.Tensor:
        """Int64 ``[R]``: bits of each channel."""
        counts = torch.tensor([s.channels for s in self.sections], device=device)
        each = torch.tensor([s.bits for s in self.sections], device=device)
        return each.repeat_interleave(counts)


def lanes(side: Side, rows: torch.Tensor) -> torch.Tensor:
    """Slots of tiles, ``[B, tiles, TILE, C]``, by ``(n, j)``: ``[B, tiles, 8, ..., C]``.

    j is one dimension of :data:`LANES`, or two of 32 and 2.
    """
    if side == "value":
        return rows.unflatten(2, (8, 2, 32)).transpose(3, 4)
    earlier, later = rows.unflatten(2, (4, 2, LANES)).unbind(3)
    return torch.stack((later, earlier.flip(3)), dim=3).flatten(2, 3)


def slots(side: Side, by_lane: torch.Tensor) -> torch.Tensor:
    """``[B, tiles, 8, LANES, C]`` by ``(n, j)`` in the order of slots; undoes :func:`lanes`."""
    if side == "value":
        return by_lane.unflatten(3, (32, 2)).transpose(3, 4).flatten(2, 4)
    later, earlier = by_lane.unflatten(2, (4, 2)).unbind(3)
    return torch.stack((earlier.flip(3), later), dim=3).flatten(2, 4)


def tiles(tokens: int) -> int:
    """Tiles that hold ``tokens`` slots."""
    return -(-tokens // TILE)
