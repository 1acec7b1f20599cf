"""The compressed cache: a transformers ``Cache`` that stores latents and nothing else.

Three kinds of layer stand in one cache: :class:`LatentLayer` for compressed layers (or its
quantised form in :mod:`starkv_core.packed`), :class:`DenseLayer` for layers kept dense,
:class:`WindowLayer` for sliding windows. All store 16-bit numbers whatever the model computes in,
grow in place by blocks, and move every stored row alike on beam reorder, batch selection and crop
(docs/design.md, traps 11 and 14).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from starkv_core.budget import slots
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import RankMap
from triton_ops.latent_attention import row_width
from triton_ops.latent_codes import LayerCodes


@dataclass(frozen=True)
class Step:
    """Where a captured decode step writes and reads: tensors, so that a replay sees them move.

    Attributes:
        slot: int64 ``[1]``, the slot of the new token.
        filled: int32 ``[1]``, slots filled with it.
        first: int32 ``[B]``, the first slot of each row, or None where nothing is padded.
    """

    slot: torch.Tensor
    filled: torch.Tensor
    first: torch.Tensor | None


class RowwiseLayer(CacheLayerMixin):
    """A layer whose rows of the batch move together: beams, repeats and selections."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes row ``beam_idx[i]``."""
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``."""
        self._rows(lambda t: t[indices.to(t.device)])

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``change`` to every tensor that has a row for each of the batch."""
        raise NotImplementedError


class _GrowingLayer(RowwiseLayer):
    """Two buffers ``[B, slots, width]`` of which the first ``length`` slots are filled.

    While ``step`` is set, tokens are written at its slot, nothing grows and all slots are returned.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    keys: torch.Tensor | None
    values: torch.Tensor | None
    is_initialized: bool

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.length = 0
        self.step: Step | None = None

    @property
    def room(self) -> int:
        """Slots allocated."""
        return 0 if self.keys is None else self.keys.shape[1]

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots of keys and values, filled or not."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [] if self.keys is None else list(self.buffers())

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the first rows ``[B, L, width]``."""
        widths = (key_states.shape[-1], value_states.shape[-1])
        self.reserve(key_states.shape[0], key_states.shape[1], widths, key_states.device)

    def reserve(
        self, batch: int, tokens: int, widths: tuple[int, int], device: torch.device
    ) -> None:
        """Make room for ``tokens`` tokens of numbers ``widths``; what is held stays."""
        room = slots(tokens)
        if not self.is_initialized:
            self.device = device
            self.keys, self.values = (
                # Zeros: kernels read the padding of rows, and what is not filled must be finite.
                torch.zeros(batch, room, self._width(width), dtype=self.dtype, device=device)
                for width in widths
            )
            self.is_initialized = True
        elif room > self.room:
            self.keys, self.values = (self._grown(buffer, room) for buffer in self.buffers())

    def _width(self, numbers: int) -> int:
        """Numbers of a stored row."""
        return numbers

    def _grown(self, buffer: torch.Tensor, room: int) -> torch.Tensor:
        bigger = buffer.new_zeros(buffer.shape[0], room, buffer.shape[-1])
        bigger[:, : self.length] = buffer[:, : self.length]
        return bigger

    def admit(self, key_rows: torch.Tensor, value_rows: torch.Tensor) -> None:
        """Make room for ``[B, L, width]`` rows and count them as filled; the caller writes them.

        While ``step`` is set there is room, and the count is the step's.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_rows, value_rows)
        if self.step is None:
            stop = self.length + key_rows.shape[1]
            self.reserve(key_rows.shape[0], stop, (0, 0), key_rows.device)
            self.length = stop

    def fill(self, tokens: int) -> None:
        """Declare that the first ``tokens`` slots are filled."""
        self.length = tokens

    def overwritten(self) -> list[torch.Tensor]:
        """Views of what the next token takes the place of: nothing, where all tokens stay."""
        return []

    def append(
        self, key_rows: torch.Tensor, value_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, L, width]`` rows in place; returns views of all filled slots."""
        start = self.length
        self.admit(key_rows, value_rows)
        keys, values = self.buffers()
        for buffer, rows in ((keys, key_rows), (values, value_rows)):
            buffer = buffer[..., : rows.shape[-1]]
            if self.step is None:
                buffer[:, start : self.length] = rows
            else:
                buffer.index_copy_(1, self.step.slot, rows.to(self.dtype))
        if self.step is not None:
            return keys, values
        return keys[:, : self.length], values[:, : self.length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """Filled slots."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next ``query_length`` tokens attend to."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything, buffers included."""
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` tokens from the end (a negative number or 0).

        What a positive number does is up to the installed transformers, as it is for the windows of
        the same cache: ValueError, or in older versions the length to keep.
        """
        like = DynamicLayer()
        like.keys = like.values = torch.empty(1, 1, self.length, 1, device="meta")
        like.is_initialized = True
        like.crop(tokens_to_remove)
        self.length = like.keys.shape[-2]

    def _rows(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)


def steps(layer: CacheLayerMixin) -> bool:
    """Whether a layer can be written at a slot that a tensor names."""
    return isinstance(layer, _GrowingLayer)


class LatentLayer(_GrowingLayer):
    """Latents of one compressed layer: keys ``[B, L, R]`` of all heads, values ``[B, L, r_v]``.

    Rows are padded with zeros to begin on 16 bytes; the padding counts as stored.
    """

    def _width(self, numbers: int) -> int:
        return row_width(numbers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse dense keys: only compressed attention may fill this layer."""
        raise RuntimeError(
            "this cache layer holds latents, but dense attention tried to fill it: run the model "
            "inside `with subject.active():`"
        )


class DenseLayer(_GrowingLayer):
    """Keys and values ``[B, H_kv, L, D]`` of a layer left dense, stored as rows of ``H_kv * D``."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, H_kv, L, D]``; returns all, in the dtype of the new states."""
        heads, dim = key_states.shape[1], key_states.shape[-1]
        keys, values = self.append(
            key_states.transpose(1, 2).flatten(2), value_states.transpose(1, 2).flatten(2)
        )
        return (
            keys.to(key_states.dtype).unflatten(-1, (heads, dim)).transpose(1, 2),
            values.to(value_states.dtype).unflatten(-1, (heads, dim)).transpose(1, 2),
        )


class WindowLayer(DynamicSlidingWindowLayer):
    """transformers' sliding window, stored in 16 bits."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sliding_window: int, dtype: torch.dtype) -> None:
        super().__init__(sliding_window)
        self.store_dtype = dtype

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [self.keys, self.values] if self.is_initialized else []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and return the window, in the dtype of the new states."""
        keys, values = super().update(
            key_states.to(self.store_dtype), value_states.to(self.store_dtype), *args, **kwargs
        )
        # The base class keeps a view, which would hold every token ever seen.
        self.keys, self.values = self.keys.clone(), self.values.clone()
        return keys.to(key_states.dtype), values.to(value_states.dtype)


class LatentCache(Cache):
    """Cache of a compressed (or, with no rank map, a dense) model for ``generate`` and ``forward``.

    Args:
        spec: the model.
        ranks: which layers hold latents; None for all dense.
        dtype: 16-bit dtype of what is stored; float32 is accepted for tests of exactness.
        codes: how the latents of which layers are coded; None stores them in ``dtype``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        ranks: RankMap | None = None,
        dtype: torch.dtype = torch.bfloat16,
        codes: Mapping[int, LayerCodes] | None = None,
    ) -> None:
        from starkv_core.packed import PackedLayer  # builds on this module

        self.spec, self.ranks = spec, ranks
        layers: list[CacheLayerMixin] = []
        for i in range(spec.n_layers):
            if codes is not None and i in codes:
                layers.append(PackedLayer(codes[i], dtype))
            elif ranks is not None and ranks.layers[i] is not None:
                layers.append(LatentLayer(dtype))
            elif i in spec.windows:
                layers.append(WindowLayer(spec.windows[i], dtype))
            else:
                layers.append(DenseLayer(dtype))
        super().__init__(layers=layers)

    def reserve(self, batch: int, tokens: int, device: torch.device) -> None:
        """Make room for ``tokens`` tokens in every layer at once; what is held stays."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, _GrowingLayer):
                ranks = None if self.ranks is None else self.ranks.layers[i]
                dense = (self.spec.kv_width, self.spec.kv_width)
                widths = dense if ranks is None else (sum(ranks.keys), sum(ranks.values))
                layer.reserve(batch, tokens, widths, device)

    def fill(self, tokens: int) -> None:
        """Declare that the first ``tokens`` slots of every layer are filled."""
        for layer in self.layers:
            layer.fill(tokens)

    def overwritten(self) -> list[torch.Tensor]:
        """Views of all that the next token takes the place of."""
        return [t for layer in self.layers for t in layer.overwritten()]

    def set_step(self, step: Step | None) -> None:
        """Write the tokens to come at the slot that ``step`` names; None ends that."""
        for layer in self.layers:
            layer.step = step

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held now, slots allocated ahead included."""
        held = (t for layer in self.layers for t in layer.tensors())
        return sum(t.untyped_storage().nbytes() for t in held)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of a dense 16-bit cache of as many tokens and rows, nothing allocated ahead."""
        rows = next((layer.keys.shape[0] for layer in self.layers if layer.keys is not None), 0)
        tokens, windows = self.get_seq_length(), self.spec.windows
        held = sum(
            min(tokens, windows[i] - 1) if i in windows else tokens
            for i in range(self.spec.n_layers)
        )
        return rows * held * 2 * self.spec.kv_width * 2

    def latent_tokens(self) -> list[int]:
        """Tokens held by each compressed layer; empty when there is none."""
        return [layer.length for layer in self.layers if isinstance(layer, LatentLayer)]
