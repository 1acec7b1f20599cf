"""The matrices of one layer that latent attention reads, and the forms the kernels need them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from triton_ops.latent_attention.layout import KeyLayout, row_width


@dataclass(frozen=True)
class Band:
    """What scores without rebuilt keys need (docs/kernels.md).

    Attributes:
        pieces: int32 ``[pieces, 5]`` of :meth:`KeyLayout.pieces`.
        owner: int32 ``[R]``, the head of each channel.
        segments: int32 ``[H, 2]``: first segment of each head, and how many it has.
        rows: ``[R, D]``, the columns of every head's U as rows.
        total: segments of all heads.
        most: segments of the head that has most.
    """

    pieces: torch.Tensor
    owner: torch.Tensor
    segments: torch.Tensor
    rows: torch.Tensor
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
        pieces = self.layout.pieces()
        if pieces is None:
            return None
        ranks, device = self.layout.ranks, self.key_up.device
        owner = [h for h, r in enumerate(ranks) for _ in range(r)]
        firsts: dict[int, int] = {}
        counts = [0] * len(ranks)
        for piece in pieces:
            for head in range(piece.head, owner[piece.end - 1] + 1):
                firsts.setdefault(head, piece.segment + head - piece.head)
                counts[head] += 1

        def table(rows: object) -> torch.Tensor:
            return torch.tensor(rows, dtype=torch.int32, device=device)

        return Band(
            pieces=table(pieces),
            owner=table(owner),
            segments=table([[firsts[h], counts[h]] for h in range(len(ranks))]),
            rows=torch.cat([self.key_up[h, :, :r].T for h, r in enumerate(ranks)]).contiguous(),
            total=sum(counts),
            most=max(counts),
        )
