"""Which channels a program codes, and where their codes lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch

from triton_ops.coded_attention.tables import scale_group, spans
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
    blocks: list[list[int]] = []
    owners: list[int] = []
    for span in spans(layout, codec.levels[0].cpu()):
        top = (span.offset + span.top_plane) // LANES if span.top_plane else 0
        where = [span.offset // LANES, span.planes[0].width, top, span.stored, span.first]
        start, end = span.first, span.first + span.channels
        while start < end:
            group = scale_group(layout, start)
            stop = min(end, start + BLOCK, edges[group + 1])
            blocks.append([start, stop - start, span.bits, *where])
            owners.append(group)
            start = stop
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
