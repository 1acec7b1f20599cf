"""Attention over a cache that drops tokens, for dense layers and for layers of latents.

Plain torch: it serves to evaluate the methods, not to be fast.
"""

from __future__ import annotations

from typing import Any

import torch

from starkv_core.attention import LatentWeights, checked_mask, latents
from starkv_core.eviction.cache import EvictingLayer
from starkv_core.models.family import Family
from starkv_core.models.spec import ModelSpec
from triton_ops.latent_attention import RopeTables, expand_heads, rotate

_SCORES = 2**25  # attention scores in memory at once: 128 MiB of float32


class EvictingAttention:
    """Forward of one attention module over an :class:`EvictingLayer`.

    Args:
        module: the model's attention module.
        family, spec: of the model.
        tables: RoPE tables, shared by all layers.
        index: layer index.
        weights: of a compressed layer; None for a dense one.
    """

    def __init__(
        self,
        module: Any,
        family: Family,
        spec: ModelSpec,
        tables: RopeTables,
        index: int,
        weights: LatentWeights | None,
    ) -> None:
        self.module, self.family, self.spec = module, family, spec
        self.tables, self.index, self.weights = tables, index, weights

    def __call__(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cache: Any | None
    ) -> torch.Tensor:
        """Output of the module, ``[B, L, d]``, for new tokens ``hidden [B, L, d]``.

        Args:
            mask: None (causal) or bool ``[B, 1, L, slots]`` of a batch padded on the left.
            cache: one of ``subject.new_cache()``.

        Raises:
            RuntimeError: another cache, or none.
            TypeError, ValueError: an additive mask, or one with padding elsewhere.
        """
        layer = None if cache is None else cache.layers[self.index]
        if not isinstance(layer, EvictingLayer):
            raise RuntimeError(
                f"layer {self.index}: this model drops tokens from a cache of its own; pass "
                "past_key_values=subject.new_cache()"
            )
        new, past = hidden.shape[1], layer.length
        seen = tokens_seen(mask, layer.seen if past else torch.zeros(len(hidden)).long(), new)
        q = self.family.queries(self.module, hidden, self.spec.head_dim)
        layer.admit(*self._entries(hidden, layer), seen)
        k, v = self._read(layer, hidden.dtype)
        held = k.shape[2]
        at = slice(held - new, held) if layer.policy.renumbered else slice(past, past + new)
        cos, sin = self._turns(layer.length, hidden)
        q = rotate(q, cos[at], sin[at])
        slots = torch.arange(held, device=hidden.device)
        causal = slots <= slots[held - new :, None]
        allowed = causal & (layer.place() >= 0)[:, None]
        out, received = attend(q, k, v, allowed, self.module.scaling)
        layer.evict(received)
        out = out.to(hidden.dtype).transpose(1, 2)
        if self.weights is not None and self.weights.value_bias is not None:
            out = out.unflatten(2, (-1, self.spec.group)) + self.weights.value_bias[:, None, :]
        return self.module.o_proj(out.flatten(2))

    def _turns(self, length: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin ``[length, D]`` in the model's own precision."""
        cos, sin = self.tables.slots(length, hidden.device)
        return cos.to(hidden.dtype), sin.to(hidden.dtype)

    def _entries(
        self, hidden: torch.Tensor, layer: EvictingLayer
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is stored of new tokens: latents ``[B, 1, L, R]``, or ``[B, H_kv, L, D]``.

        Keys of a dense layer are turned now if the text's positions hold.
        """
        if self.weights is not None:
            keys, values = latents(self.weights, hidden)
            return keys[:, None], values[:, None]
        keys = self.family.keys(self.module, hidden, self.spec.head_dim)
        values = self.module.v_proj(hidden).unflatten(-1, (-1, self.spec.head_dim))
        if not layer.policy.renumbered:
            cos, sin = self._turns(layer.length + hidden.shape[1], hidden)
            keys = rotate(keys, cos[layer.length :], sin[layer.length :])
        return keys, values.transpose(1, 2)

    def _read(self, layer: EvictingLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, turned, and values of all heads, ``[B, H_kv, T, D]``."""
        keys, values = (t.to(dtype) for t in layer.rows())
        if self.weights is not None:
            w = self.weights
            keys = expand_heads(keys[:, 0], w.key_index, w.key_up, w.key_bias)
            values = torch.einsum("blr,hdr->bhld", values[:, 0], w.value_up)
        cos, sin = self._turns(layer.length, keys)
        if layer.policy.renumbered:
            return rotate(keys, cos[: keys.shape[2]], sin[: keys.shape[2]]), values
        if layer.placed:
            at = layer.positions.long()  # [B, 1, T]: heads share them
            return rotate(keys, cos[at], sin[at]), values
        return keys, values


def tokens_seen(mask: torch.Tensor | None, before: torch.Tensor, new: int) -> torch.Tensor:
    """Tokens of each row after ``new`` slots more, padding not counted: int64 ``[B]`` on the CPU.

    Args:
        mask: bool ``[B, 1, new, slots]``, True where a token may attend; None without padding.
        before: tokens of each row so far.

    Raises:
        ValueError: padding that is not on the left.
    """
    if mask is None:
        return before + new
    last = checked_mask(mask)[:, 0, -1]
    if bool((last[:, 1:] < last[:, :-1]).any()):
        raise ValueError("attention_mask: padding must be on the left where tokens are dropped")
    return last.sum(-1).cpu().expand(len(before))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and what every key received of it.

    Args:
        q: ``[B, H, L, D]``, turned.
        k, v: ``[B, H_kv, T, D]``, keys turned.
        allowed: bool ``[B, L, T]``. A query that may attend to nothing (padding) gives 0.
        scale: of the scores.

    Returns:
        ``[B, H, L, D]`` and the probabilities summed over queries and over the heads of a group,
        ``[B, H_kv, T]``, both float32 (float64 for float64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.to(wide) for t in (q, k, v))
    heads = k.shape[1]
    received = k.new_zeros(k.shape[:3])
    outs = []
    piece = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for part, seen in zip(q.split(piece, 2), allowed.split(piece, 1), strict=True):
        scores = part.unflatten(1, (heads, -1)).flatten(2, 3) @ k.transpose(2, 3) * scale
        scores = scores.unflatten(2, (-1, part.shape[2]))  # [B, H_kv, group, L, T]
        hidden = ~seen[:, None, None]
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
        received += probs.sum((2, 3))
        outs.append((probs.flatten(2, 3) @ v).unflatten(2, (-1, part.shape[2])).flatten(1, 2))
    return torch.cat(outs, 2), received
