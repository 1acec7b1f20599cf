"""The matrices of one layer that latent attention reads, and the forms the kernels need them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from triton_ops.latent_attention.layout import PIECE, PIECE_HEADS, KeyLayout, row_width


@dataclass(frozen=True)
class Band:
    """What scores without rebuilt keys need (docs/kernels.md).

    Attributes:
        pieces: int32 ``[pieces, 4]``: channel to load from, first head, heads, first segment.
        lanes: int32 ``[pieces, N]``: the head of a channel, counted from the piece's first; of a
            key bias PIECE_HEADS more; -1 for lanes of neither.
        rows: ``[pieces, N, D]``, the column of U or the key bias of each lane.
        segments: int32 ``[H, 2]``: first segment of each head, and how many it has.
        total: segments of all heads.
        most: segments of the head that has most.
    """

    pieces: torch.Tensor
    lanes: torch.Tensor
    rows: torch.Tensor
    segments: torch.Tensor
    total: int
    most: int


@dataclass(frozen=True)
class LatentFactors:
    """Factors of one layer, in the dtype and on the device of the latents.

    Attributes:
        layout: where each key head's channels lie in a row.
        key_up: ``[H_kv, D, r]``, zero from a head's rank on.
        key_bias: ``[H_kv, D]`` or None.
        value_up: ``[H_kv, D, r_v]``.
    """

    layout: KeyLayout
    key_up: torch.Tensor
    key_bias: torch.Tensor | None
    value_up: torch.Tensor

    @cached_property
    @torch.inference_mode(False)
    def key_index(self) -> torch.Tensor:
        """Int64 ``[H_kv, r]``: the channels of each head, any where ``key_up`` is zero."""
        lane = torch.arange(self.key_up.shape[-1])
        starts = torch.tensor(self.layout.starts)[:, None]
        ranks = torch.tensor(self.layout.ranks)[:, None]
        return torch.where(lane < ranks, starts + lane, 0).to(self.key_up.device)

    @cached_property
    @torch.inference_mode(False)
    def padded_value_up(self) -> torch.Tensor:
        """``value_up`` with rows that begin on 16 bytes."""
        pad = row_width(self.value_up.shape[-1]) - self.value_up.shape[-1]
        return torch.nn.functional.pad(self.value_up, (0, pad)).contiguous()

    @cached_property
    @torch.inference_mode(False)
    def buckets(self) -> Mapping[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
        """For rebuilt keys: by (K, MORE), the heads and their rows of U.

        Int32 ``[entries, 2]`` as :meth:`KeyLayout.buckets` has them, and ``[entries, K + MORE, D]``
        that goes with the channels loaded, zero for those of another head.
        """
        made = {}
        for (k, more), entries in self.layout.buckets().items():
            rows = self.key_up.new_zeros(len(entries), k + more, self.key_up.shape[1])
            for row, (head, first) in zip(rows, entries, strict=True):
                shift, rank = self.layout.starts[head] - first, self.layout.ranks[head]
                row[shift : shift + rank] = self.key_up[head, :, :rank].T
            index = torch.tensor(entries, dtype=torch.int32, device=self.key_up.device)
            made[k, more] = index, rows
        return made

    @cached_property
    @torch.inference_mode(False)
    def band(self) -> Band | None:
        """For scores without rebuilt keys; None when heads share channels."""
        pieces = self.layout.pieces(self.key_bias is not None)
        if pieces is None:
            return None
        ranks, starts, up = self.layout.ranks, self.layout.starts, self.key_up
        owner = [h for h, r in enumerate(ranks) for _ in range(r)]
        lanes = torch.full((len(pieces), PIECE), -1, dtype=torch.int32)
        rows = up.new_zeros(len(pieces), PIECE, up.shape[1])
        firsts: dict[int, int] = {}
        counts = [0] * len(ranks)
        for i, piece in enumerate(pieces):
            for head in range(piece.head, piece.head + piece.heads):
                firsts.setdefault(head, piece.segment + head - piece.head)
                counts[head] += 1
            for channel in range(piece.first, piece.end):
                head = owner[channel]
                lanes[i, channel - piece.load] = head - piece.head
                rows[i, channel - piece.load] = up[head, :, channel - starts[head]]
            if self.key_bias is not None:
                after = piece.end - piece.load
                biased = slice(after, after + piece.biases)
                lanes[i, biased] = torch.arange(piece.biases, dtype=torch.int32) + PIECE_HEADS
                rows[i, biased] = self.key_bias[piece.head : piece.head + piece.biases]

        def table(made: object) -> torch.Tensor:
            return torch.tensor(made, dtype=torch.int32, device=up.device)

        return Band(
            pieces=table([[p.load, p.head, p.heads, p.segment] for p in pieces]),
            lanes=lanes.to(up.device),
            rows=rows,
            segments=table([[firsts[h], counts[h]] for h in range(len(ranks))]),
            total=sum(counts),
            most=max(counts),
        )
