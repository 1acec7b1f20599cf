"""Plain-torch reference."""

from __future__ import annotations

import torch

from triton_ops.latent_attention import rotate


def rope_append_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_latents: torch.Tensor,
    value_latents: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """See :func:`triton_ops.rope_append.rope_append`; ``slots`` is int64 ``[n]``, of each token."""
    for buffer, rows in ((key_latents, keys), (value_latents, values)):
        buffer[..., : rows.shape[-1]].index_copy_(1, slots, rows.to(buffer.dtype))
    return rotate(q, cos.index_select(0, slots), sin.index_select(0, slots)).contiguous()
