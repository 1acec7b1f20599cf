"""The matrices of one layer that latent attention reads, and the forms the kernels need them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from triton_ops.latent_attention.layout import ALIGN, WINDOW, KeyLayout, power, row_width


@dataclass(frozen=True)
class Band:
    """What scores without rebuilt keys need (docs/kernels.md).

    Attributes:
        windows: int32 ``[windows, 3]`` of :attr:`KeyLayout.windows`.
        heads: int32 ``[H, 3]``: first channel, rank, channels to write.
        pick: ``[row, 16]``, 1 where a channel belongs to a column of its window.
        rows: ``[R, D]``, the columns of every head's U as rows.
        width: side of a tile that holds the widest head.
    """

    windows: torch.Tensor
    heads: torch.Tensor
    pick: torch.Tensor
    rows: torch.Tensor
    width: int


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
        windows = self.layout.windows
        if windows is None:
            return None
        ranks, device = self.layout.ranks, self.key_up.device
        channels = self.layout.channels
        wrote = [*ranks[:-1], ranks[-1] + row_width(channels) - channels]  # the padding becomes 0
        owner = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks))
        pick = torch.zeros(row_width(channels), WINDOW)
        pick[torch.arange(channels), owner % WINDOW] = 1
        heads = list(zip(self.layout.starts, ranks, wrote, strict=True))
        return Band(
            windows=torch.tensor(windows, dtype=torch.int32, device=device),
            heads=torch.tensor(heads, dtype=torch.int32, device=device),
            pick=pick.to(self.key_up),
            rows=torch.cat([self.key_up[h, :, :r].T for h, r in enumerate(ranks)]).contiguous(),
            width=power(max(ranks) + ALIGN - 1),
        )
