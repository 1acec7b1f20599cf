"""Which channels a program codes, and where their codes lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch

from triton_ops.latent_codes import Codec
from triton_ops.latent_codes.layout import LANES

BLOCK = 128  # channels that a program codes at once


@dataclass(frozen=True, eq=False)
class AppendTable:
    """One side of a layer, cut into programs.

    A program has blocks of channels of one scale group, and a group has one program: it alone
    reads the group's row before it is overwritten. Without scales every block has its own.

    Attributes:
        programs: int32 ``[P, 5]``: first block, how many, scale group, its first channel, its
            channels.
        blocks: int32 ``[E, 8]``: first channel of the row, channels, bits, offset of the low plane
            over 64, its width, offset of the top plane over 64 (0: none), channels of the section
            with padding, first channel of the section.
    """

    programs: torch.Tensor
    blocks: torch.Tensor


_TABLES: WeakKeyDictionary[Codec, AppendTable] = WeakKeyDictionary()


def append_table(codec: Codec) -> AppendTable:
    """The table of a quantiser, on its device; made once."""
    if codec not in _TABLES:
        _TABLES[codec] = _made(codec)
    return _TABLES[codec]


def _made(codec: Codec) -> AppendTable:
    layout = codec.layout
    groups = list(layout.groups) or [layout.channels]
    edges = list(accumulate(groups, initial=0))
    planes: dict[int, list[tuple[int, int, int]]] = {}
    for plane in layout.planes:
        planes.setdefault(plane.first, []).append((plane.offset, plane.width, plane.stored))
    blocks: list[list[int]] = []
    owners: list[int] = []
    first = 0
    for section in layout.sections:
        low, *more = planes[first]
        top = more[0][0] // LANES if more else 0
        start, end = first, first + section.channels
        while start < end:
            group = sum(edge <= start for edge in edges[1:])
            stop = min(end, start + BLOCK, edges[group + 1])
            where = [low[0] // LANES, low[1], top, low[2], first]
            blocks.append([start, stop - start, section.bits, *where])
            owners.append(group)
            start = stop
        first = end
    if layout.groups:
        programs = [
            [owners.index(g), owners.count(g), g, edges[g], groups[g]] for g in range(len(groups))
        ]
    else:
        programs = [[i, 1, 0, 0, 0] for i in range(len(blocks))]
    device = codec.step.device
    return AppendTable(
        torch.tensor(programs, dtype=torch.int32, device=device),
        torch.tensor(blocks, dtype=torch.int32, device=device),
    )
