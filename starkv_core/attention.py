"""Attention over latents: one function for training, prefill and decode.

Positions are cache slots, for queries and keys alike: scores depend on differences only, so left
padding and later turns need nothing more (docs/design.md, traps 2 and 13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from starkv_core.cache import LatentLayer
from starkv_core.models.family import Family
from starkv_core.models.spec import ModelSpec
from starkv_core.packed import PackedLayer
from triton_ops.code_append import code_append
from triton_ops.coded_attention import CodedFactors, coded_attention
from triton_ops.latent_attention import (
    KeyLayout,
    LatentFactors,
    RopeTables,
    expand_heads,
    latent_attention,
    rotate,
    row_width,
)
from triton_ops.latent_codes import LayerCodes
from triton_ops.rope_append import rope_append

DECODE_QUERIES = 16  # up to so many new tokens read the latents; more rebuild keys for SDPA


@dataclass(frozen=True)
class LatentWeights:
    """The matrices of one compressed layer, in the dtype and on the device they are used with.

    Attributes:
        key_down: ``[R, d]``, latents of all key heads side by side; a view of ``down``.
        key_index: int64 ``[H_kv, r]``, the channels of each head, padded with 0.
        key_up: ``[H_kv, D, r]``, zero in padded columns.
        key_bias: ``[H_kv, D]`` or None.
        value_down: ``[r_v, d]``, a view of ``down``.
        value_up: ``[H_kv, D, r_v]``.
        value_bias: ``[H_kv, D]`` or None.
        key_eps: epsilon of the RMSNorm on keys; latents are then normalised before caching.
        key_gram: ``[H_kv, r, r]``, ``U^T U`` before the norm's weight is folded in; None when ``U``
            is orthonormal.
        key_shift: ``[R]``, taken off the latents before they are stored, the biases make up for it
            (means stay outside of what is quantised); None under a norm on keys and where there is
            none.
        value_shift: ``[r_v]``, the same of the values.
        coding: what quantisation makes of keys and values, ``[B, L, R]`` and ``[B, L, r_v]``, to
            measure or train it without a cache; None stores latents as they are.
        codes: how the latents are coded in a cache; None keeps them in 16 bits. Channels of a coded
            head may lie apart, in ascending order.
        down: both in one matrix, so that one product makes keys and values; each is followed by
            rows of zeros up to :func:`row_width`, so that both begin on 16 bytes.
        down_bias: what that product adds: the shifts, negated, in the same rows; None where there
            are none.
    """

    key_down: torch.Tensor
    key_index: torch.Tensor
    key_up: torch.Tensor
    key_bias: torch.Tensor | None
    value_down: torch.Tensor
    value_up: torch.Tensor
    value_bias: torch.Tensor | None
    key_eps: float | None = None
    key_gram: torch.Tensor | None = None
    key_shift: torch.Tensor | None = None
    value_shift: torch.Tensor | None = None
    coding: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    codes: LayerCodes | None = None
    down: torch.Tensor = field(init=False)
    down_bias: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        keys, values = self.key_down, self.value_down
        down = torch.cat([F.pad(t, (0, 0, 0, row_width(len(t)) - len(t))) for t in (keys, values)])
        start = row_width(len(keys))
        object.__setattr__(self, "down", down)
        object.__setattr__(self, "key_down", down[: len(keys)])
        object.__setattr__(self, "value_down", down[start : start + len(values)])
        bias = None
        if self.key_shift is not None or self.value_shift is not None:
            pairs = ((self.key_shift, keys), (self.value_shift, values))
            shifts = [t.new_zeros(len(t)) if shift is None else shift for shift, t in pairs]
            bias = -torch.cat([F.pad(t, (0, row_width(len(t)) - len(t))) for t in shifts])
        object.__setattr__(self, "down_bias", bias)

    @cached_property
    def real_channels(self) -> torch.Tensor:
        """Bool ``[H_kv, r]``: False where ``key_index`` is padding (0 out of its own place)."""
        real = self.key_index != 0
        real[:, 0] = True  # heads of the first group all begin there
        return real

    @cached_property
    def channel_heads(self) -> torch.Tensor:
        """Int64 ``[R]``: the head of each channel (the last one where heads share channels)."""
        real = self.real_channels
        heads = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
        owner = torch.empty(self.key_down.shape[0], dtype=torch.long, device=real.device)
        owner[self.key_index[real]] = heads[real]
        return owner

    @cached_property
    def factors(self) -> LatentFactors:
        """The same as latent attention takes them; made once."""
        ranks = tuple(self.real_channels.sum(-1).tolist())
        layout = KeyLayout(ranks, tuple(self.key_index[:, 0].tolist()))
        return LatentFactors(layout, self.key_up, self.key_bias, self.value_up)

    @cached_property
    def coded_factors(self) -> CodedFactors:
        """The same as attention over codes takes them; made once."""
        if self.codes is None:
            raise RuntimeError("these latents are not coded")
        ranks = tuple(self.real_channels.sum(-1).tolist())
        return CodedFactors(
            self.codes, self.key_index, ranks, self.key_up, self.key_bias, self.value_up
        )


@lru_cache(maxsize=4096)  # asked for in every training forward, always with the same arguments
@torch.inference_mode(False)  # what is kept must serve training too, whoever asks first
def padded_index(
    ranks: tuple[int, ...], heads: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of each head in rows that hold groups of channels side by side.

    Args:
        ranks: channels of each group; a group serves ``heads / len(ranks)`` heads in a row.
        heads: key heads.

    Returns:
        int64 ``[heads, max(ranks)]`` indices, 0 where padded, and the bool mask of real entries.
    """
    widest, start = max(ranks), 0
    rows, masks = [], []
    for rank in ranks:
        lane = torch.arange(widest)
        real = lane < rank
        rows += [torch.where(real, lane + start, 0)] * (heads // len(ranks))
        masks += [real] * (heads // len(ranks))
        start += rank
    return torch.stack(rows).to(device), torch.stack(masks).to(device)


def latents(weights: LatentWeights, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is cached for ``hidden [B, L, d]``: ``[B, L, R]`` for keys, ``[B, L, r]`` for values."""
    both = F.linear(hidden, weights.down, weights.down_bias)
    keys = both[..., : len(weights.key_down)]
    values = both[..., row_width(keys.shape[-1]) :][..., : len(weights.value_down)]
    if weights.key_eps is not None:
        keys = _normalised(weights, keys, weights.key_eps)
    return (keys, values) if weights.coding is None else weights.coding(keys, values)


def _normalised(weights: LatentWeights, keys: torch.Tensor, eps: float) -> torch.Tensor:
    """Latents over the root mean square of their key (docs/design.md section 2, QK-norm)."""
    heads, dim, rank = weights.key_up.shape
    x = keys[..., weights.key_index.reshape(-1)].unflatten(-1, (heads, rank)).float()
    x = x * weights.real_channels
    energy = (
        x.square().sum(-1)
        if weights.key_gram is None
        else torch.einsum("blhr,hrs,blhs->blh", x, weights.key_gram.float(), x)
    )
    scale = torch.rsqrt(energy / dim + eps)
    return (keys * scale[..., weights.channel_heads]).to(keys.dtype)


@lru_cache(maxsize=8)  # all layers of a forward ask for the same
@torch.inference_mode(False)
def _count(slots: int, device: torch.device) -> torch.Tensor:
    """Int32 ``[1]``: slots filled or coded, for the ops that read it on the device."""
    return torch.full((1,), slots, dtype=torch.int32, device=device)


class CompressedAttention:
    """Forward of one attention module with compressed keys and values.

    Args:
        module: the model's attention module; its query and output projections are used.
        family, spec: of the model.
        tables: RoPE tables, shared by all layers.
        index: layer index.
        store_dtype: dtype of latents in a cache that this layer has to make itself.
        backend: of :func:`triton_ops.latent_attention.latent_attention`.
    """

    def __init__(
        self,
        module: Any,
        family: Family,
        spec: ModelSpec,
        tables: RopeTables,
        index: int,
        store_dtype: torch.dtype,
        backend: str = "reference",
    ) -> None:
        self.module, self.family, self.spec = module, family, spec
        self.tables, self.index = tables, index
        self.store_dtype, self.backend = store_dtype, backend

    def __call__(
        self,
        weights: LatentWeights,
        hidden: torch.Tensor,
        mask: torch.Tensor | None,
        cache: Any | None,
    ) -> torch.Tensor:
        """Output of the module, ``[B, L, d]``, for new tokens ``hidden [B, L, d]``.

        Raises:
            TypeError: an additive mask.

        Args:
            mask: None (causal) or bool ``[B, 1, L, slots]``, True where a token may attend.
            cache: transformers cache; its layer becomes a :class:`LatentLayer` if still empty.
        """
        spec = self.spec
        n_new = hidden.shape[1]
        keys, values = latents(weights, hidden)
        q = self.family.queries(self.module, hidden, spec.head_dim)
        scale = self.module.scaling
        layer = None if cache is None else self._layer(cache, weights.codes)
        past, exact = 0 if layer is None else layer.length, None
        decodes = layer is not None and n_new <= DECODE_QUERIES
        if isinstance(layer, PackedLayer) and decodes and past > 0:
            out = self._decode_packed(weights, q, keys, values, layer, mask)
        elif layer is not None and decodes and not isinstance(layer, PackedLayer):
            out = self._decode(weights, q, keys, values, layer, mask)
        else:
            if isinstance(layer, PackedLayer):
                keys, values, exact = layer.append_prompt(keys, values)
            elif layer is not None:
                keys, values = layer.append(keys, values)
            # In the model's own precision, as the base model turns its keys: float32 would double
            # the traffic of a prompt.
            tables = self.tables.slots(past + n_new, hidden.device)
            cos, sin = (table.to(hidden.dtype) for table in tables)
            q = rotate(q, cos[past:], sin[past:])
            if exact is not None:
                cos, sin = cos.repeat(2, 1), sin.repeat(2, 1)
            k = expand_heads(
                keys.to(hidden.dtype), weights.key_index, weights.key_up, weights.key_bias
            )
            k = rotate(k, cos, sin)
            values = values[..., : weights.value_up.shape[-1]].to(hidden.dtype)
            v = torch.einsum("blr,hdr->bhld", values, weights.value_up)
            causal = mask is None and past == 0 and exact is None
            if not causal:
                mask = _allowed(mask, past, n_new, hidden)
                if exact is not None:
                    mask = torch.cat((mask & exact, mask & ~exact), dim=-1)
            shared = spec.group > 1
            if shared and mask is not None:
                # With a mask torch's only kernel for shared heads holds all scores at once.
                k, v = (t.repeat_interleave(spec.group, 1) for t in (k, v))
                shared = False
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared
            )
        out = out.transpose(1, 2)
        if weights.value_bias is not None:
            # The probabilities sum to 1, so the bias passes through attention unchanged.
            out = out.unflatten(2, (-1, spec.group)) + weights.value_bias[:, None, :]
        return self.module.o_proj(out.flatten(2))

    def _decode(
        self,
        weights: LatentWeights,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: LatentLayer,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Append a few tokens and attend with them, straight from the latents.

        Args:
            q: ``[B, H, n, D]`` before RoPE.
            keys, values: latents of the new tokens.
            mask: as :meth:`__call__` has it; in a captured step its row lengths say it all.
        """
        layer.admit(keys, values)
        buffers = layer.buffers()
        filled, first, mask = _seen(layer, mask, q.device)
        tables = self.tables.slots(layer.room, q.device)
        q = rope_append(q, keys, values, *buffers, *tables, filled=filled, backend=self.backend)
        return latent_attention(
            q,
            *buffers,
            weights.factors,
            self.tables,
            filled=filled,
            scale=self.module.scaling,
            first=first,
            mask=mask,
            backend=self.backend,
        )

    def _decode_packed(
        self,
        weights: LatentWeights,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: PackedLayer,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """As :meth:`_decode`, with codes: sinks and window are exact, the rest is what is coded.

        All new tokens see the window as it stands after the last one.
        """
        assert weights.codes is not None
        coded = layer.coded_count()
        layer.admit(keys, values)
        sides = layer.coded_sides()
        filled, first, mask = _seen(layer, mask, q.device)
        q, coded = code_append(
            q,
            keys,
            values,
            *sides,
            weights.codes,
            *self.tables.slots(layer.room, q.device),
            filled=filled,
            coded=coded,
            backend=self.backend,
        )
        return coded_attention(
            q,
            *sides,
            weights.coded_factors,
            self.tables,
            filled=filled,
            coded=coded,
            scale=self.module.scaling,
            first=first,
            mask=mask,
            backend=self.backend,
        )

    def _layer(self, cache: Any, codes: LayerCodes | None) -> LatentLayer:
        """This layer's latents; an empty layer of another kind is replaced."""
        while len(cache.layers) <= self.index:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[self.index]
        fits = type(layer) is (LatentLayer if codes is None else PackedLayer)
        if isinstance(layer, PackedLayer) and codes is not None:
            held = layer.layer_codes
            fits = held.keys.same(codes.keys) and held.values.same(codes.values)
        if not fits:
            if layer.get_seq_length() > 0 or layer.get_max_length() >= 0:
                raise RuntimeError(
                    f"layer {self.index}: this cache holds dense keys, or latents of another form, "
                    "or is of a fixed size; "
                    "start from an empty one (subject.new_cache())"
                )
            layer = cache.layers[self.index] = (
                LatentLayer(self.store_dtype)
                if codes is None
                else PackedLayer(codes, self.store_dtype)
            )
        return layer


def _seen(
    layer: LatentLayer, mask: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Slots filled (int32 ``[1]``), first slot of each row and mask, once a layer admits tokens."""
    if layer.step is not None:
        return layer.step.filled, layer.step.first, None
    if mask is not None:
        mask = checked_mask(mask)[..., : layer.length]
    return _count(layer.length, device), None, mask


def _allowed(mask: torch.Tensor | None, past: int, n_new: int, like: torch.Tensor) -> torch.Tensor:
    """Bool ``[B, heads, n_new, past + n_new]``: where new tokens may attend (None: causal)."""
    if mask is None:
        slot = torch.arange(past + n_new, device=like.device)
        seen = slot[None, :] <= slot[past:, None]
        return seen.expand(like.shape[0], 1, -1, -1)
    return checked_mask(mask)[..., : past + n_new]


def checked_mask(mask: torch.Tensor) -> torch.Tensor:
    """Refuse additive masks: their biases could only be told apart by a synchronisation."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"attention mask of {mask.dtype}: compressed layers take bool masks, True where a "
            "token may attend (for a mask of 0 and -inf: mask == 0; transformers makes bool masks "
            'for attn_implementation="sdpa")'
        )
    return mask
