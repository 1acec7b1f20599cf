"""The cache layer of a quantised layer: packed codes, their scales, sinks and a recent window.

Every token is coded once, when it leaves the window; nothing coded is kept in 16 bits as well
(docs/design.md sections 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from starkv_core.cache import LatentLayer
from triton_ops.code_append import coded_after, ring_rows, store_rows
from triton_ops.coded_attention import Coded
from triton_ops.latent_attention import row_width
from triton_ops.latent_codes import TILE, Codec, LayerCodes, tiles, unpack

Pair = tuple[torch.Tensor, torch.Tensor]


class CodedRows:
    """Codes and scales of the keys (or the values) of one layer, by slot.

    Attributes:
        codec: their quantiser.
        codes: uint8 ``[B, tiles, tile_bytes]`` (``triton_ops/latent_codes/layout.py``).
        scales: fp16 ``[B, tiles, K, TILE]``.
    """

    def __init__(self, codec: Codec, batch: int, room: int, device: torch.device) -> None:
        self.codec, layout = codec, codec.layout
        self.codes = torch.zeros(batch, room, layout.tile_bytes, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(
            batch, room, layout.scales, TILE, dtype=torch.float16, device=device
        )

    def grow(self, room: int) -> None:
        """Make room for ``room`` tiles."""
        more = room - self.codes.shape[1]
        self.change(lambda t: torch.cat((t, t.new_zeros(t.shape[0], more, *t.shape[2:])), dim=1))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Float32 ``[B, stop - start, R]``: what the slots' codes stand for."""
        slots = torch.arange(start, stop, device=self.codes.device)
        scales = self.scales[:, slots // TILE, :, slots % TILE].transpose(0, 1)
        codes = unpack(self.codes, self.codec.layout, start, stop)
        return self.codec.dequantise(codes, scales)

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply the same to codes and scales."""
        self.codes, self.scales = change(self.codes), change(self.scales)


class PackedLayer(LatentLayer):
    """Latents of one compressed layer, of which only sinks and window are in 16 bits.

    Slots ``[sinks, coded)`` are codes; slots below ``sinks`` and from ``coded`` on are exact. With
    left padding the sinks are the first slots all the same.

    Attributes:
        layer_codes: how the layer is coded.
        coded: slots below are coded (but for sinks).
        keys, values: ``[B, sinks + window, row_width]``, zero-padded rows in 16 bits: the sinks,
            then the window as a ring, slot ``s`` at ``s % window``.
        key_rows, value_rows: what is coded; None before the first token.
    """

    def __init__(self, layer_codes: LayerCodes, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.layer_codes = layer_codes
        self.coded = 0
        self._count: tuple[int, torch.Tensor] | None = None
        self.key_rows: CodedRows | None = None
        self.value_rows: CodedRows | None = None

    @property
    def room(self) -> int:
        """Slots allocated."""
        return 0 if self.key_rows is None else self.key_rows.codes.shape[1] * TILE

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        coded = [t for _, rows in self._sides() for t in (rows.codes, rows.scales)]
        return super().tensors() + coded

    def reserve(
        self, batch: int, tokens: int, widths: tuple[int, int], device: torch.device
    ) -> None:
        """Make room for ``tokens`` tokens, in whole tiles; what is held stays."""
        room, codes = tiles(tokens), self.layer_codes
        if not self.is_initialized:
            self.device = device
            exact = codes.sinks + codes.window
            self.keys, self.values = (
                torch.zeros(
                    batch, exact, row_width(c.layout.channels), dtype=self.dtype, device=device
                )
                for c in (codes.keys, codes.values)
            )
            self.key_rows, self.value_rows = (
                CodedRows(c, batch, room, device) for c in (codes.keys, codes.values)
            )
            self.is_initialized = True
        elif room * TILE > self.room:
            for _, rows in self._sides():
                rows.grow(room)

    def store(self, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        """Take in ``[B, L, R]`` and ``[B, L, r_v]``; code what is then older than the window."""
        past, coded, codes = self.length, self.coded, self.layer_codes
        self.admit(key_rows, value_rows)
        sides = zip(self.coded_sides(), (codes.keys, codes.values), strict=True)
        for (side, codec), rows in zip(sides, (key_rows, value_rows), strict=True):
            store_rows(side, codec, rows, past, coded, codes.sinks, codes.window)

    def admit(self, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        """As other layers do; what leaves the window for these rows counts as coded."""
        super().admit(key_rows, value_rows)
        if self.step is None:
            self.coded = coded_after(self.coded, self.length, self.layer_codes.window)

    def fill(self, tokens: int) -> None:
        """As other layers do; what has then left the window counts as coded."""
        super().fill(tokens)
        self.coded = coded_after(min(self.coded, tokens), tokens, self.layer_codes.window)

    def overwritten(self) -> list[torch.Tensor]:
        """The exact rows that the next token takes the place of."""
        codes, slot = self.layer_codes, self.length
        row = slot if slot < codes.sinks else codes.sinks + slot % max(codes.window, 1)
        return [t[:, row : row + 1] for t in self.buffers()]

    def append(self, key_rows: torch.Tensor, value_rows: torch.Tensor) -> Pair:
        """Store; returns float32 latents of all filled slots, those of the new tokens exact."""
        new = [rows.to(self.dtype).float() for rows in (key_rows, value_rows)]
        if self.length:
            new = [torch.cat(t, dim=1) for t in zip(self.latents(0, self.length), new, strict=True)]
        self.store(key_rows, value_rows)
        return new[0], new[1]

    def append_prompt(
        self, key_rows: torch.Tensor, value_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Store; returns what a prompt attends to.

        Returns:
            Latents as :meth:`append` has them, and None; where a prompt is to see what decode will
            see, all of them twice, exact and then as coded, and bool ``[L, length]``: True where
            the new token of a row sees the exact one.
        """
        before, past = self.coded, self.length
        keys, values = self.append(key_rows, value_rows)
        codes = self.layer_codes
        if codes.prefill == "exact":
            return keys, values, None
        twins = [
            torch.cat((rows, rows[:, :before], codec.seen(rows[:, before:])), dim=1)
            for rows, codec in ((keys, codes.keys), (values, codes.values))
        ]
        slot = torch.arange(self.length, device=keys.device)
        recent = slot > slot[past:, None] - codes.window
        return twins[0], twins[1], recent | (slot < max(codes.sinks, before))

    def latents(self, start: int, stop: int) -> Pair:
        """Float32 latents ``[B, stop - start, R]`` and ``[B, ..., r_v]`` as attention sees them."""
        sinks = self.layer_codes.sinks
        from_codes = min(max(start, sinks), stop)
        from_ring = min(max(from_codes, self.coded), stop)
        ring = self._ring(from_ring, stop)
        found = [
            torch.cat(
                (
                    exact[:, start:from_codes, : rows.codec.layout.channels].float(),
                    rows.read(from_codes, from_ring),
                    exact[:, ring, : rows.codec.layout.channels].float(),
                ),
                dim=1,
            )
            for exact, rows in self._sides()
        ]
        return found[0], found[1]

    def coded_count(self) -> torch.Tensor:
        """Int32 ``[1]``, :attr:`coded`: one tensor as long as that does not change, for graphs."""
        if self._count is None or self._count[0] != self.coded:
            count = torch.tensor([self.coded], dtype=torch.int32, device=self.device)
            self._count = self.coded, count
        return self._count[1]

    def coded_sides(self) -> tuple[Coded, Coded]:
        """Keys and values as attention over codes takes them."""
        keys, values = (Coded(r.codes, r.scales, exact) for exact, r in self._sides())
        return keys, values

    def reset(self) -> None:
        """Forget everything, buffers included."""
        super().reset()
        self.key_rows = self.value_rows = None
        self.coded, self._count = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """As other layers do. What is coded stays so: after it, the window may have to refill."""
        super().crop(tokens_to_remove)
        self.coded = min(self.coded, self.length)

    def _sides(self) -> list[tuple[torch.Tensor, CodedRows]]:
        """Exact and coded rows of keys and of values; nothing before the first token."""
        if self.key_rows is None or self.value_rows is None:
            return []
        keys, values = self.buffers()
        return [(keys, self.key_rows), (values, self.value_rows)]

    def _ring(self, start: int, stop: int) -> torch.Tensor:
        """Where slots of the window lie in the exact rows."""
        slots = torch.arange(start, stop, device=self.device)
        return ring_rows(slots, self.layer_codes.sinks, self.layer_codes.window)

    def _rows(self, change: Any) -> None:
        super()._rows(change)
        for _, rows in self._sides():
            rows.change(change)
