"""Plain-torch reference: keys are rebuilt a tile at a time, values are summed as latents."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE in the half-split layout.

    Args:
        x: ``[..., L, D]``.
        cos, sin: ``[L, D]``, the two halves equal.

    Returns:
        Rotated ``x`` in its dtype; the product is formed in the wider of the two dtypes.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def expand_heads(
    latents: torch.Tensor, index: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Keys (or values) of every head from rows of concatenated latents: ``U_h x_h + b_h``.

    Args:
        latents: ``[B, L, R]``.
        index: int64 ``[H, r]``: the channels of each head; padding repeats any channel.
        up: ``[H, D, r]``, zero in padded columns.
        bias: ``[H, D]`` or None.

    Returns:
        ``[B, H, L, D]``.
    """
    heads, rank = index.shape
    picked = latents[..., index.reshape(-1)].unflatten(-1, (heads, rank))
    out = torch.einsum("blhr,hdr->bhld", picked, up)
    return out if bias is None else out + bias[:, None, :]


def latent_attention_reference(
    q: torch.Tensor,
    key_latents: torch.Tensor,
    value_latents: torch.Tensor,
    key_index: torch.Tensor,
    key_up: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_up: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
    tile: int,
) -> torch.Tensor:
    """See :func:`triton_ops.latent_attention.latent_attention`; accumulates in float32 or wider.

    Returns ``[B, H, Q, D]`` in that dtype. The tile bounds the memory for rebuilt keys; the softmax
    runs online over tiles.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, n_query, dim = q.shape
    kv_heads = key_up.shape[0]
    length = key_latents.shape[1]
    q = q.to(wide).view(batch, kv_heads, heads // kv_heads, n_query, dim)
    bias = None if key_bias is None else key_bias.to(wide)

    top = q.new_full((*q.shape[:-1], 1), float("-inf"))
    mass = torch.zeros_like(top)
    mixed = q.new_zeros((*q.shape[:-1], value_latents.shape[-1]))
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        keys = expand_heads(key_latents[:, start:stop].to(wide), key_index, key_up.to(wide), bias)
        keys = rotate(keys, cos[start:stop].to(wide), sin[start:stop].to(wide))
        scores = torch.einsum("bhgqd,bhld->bhgql", q, keys) * scale
        seen = allowed[..., start:stop].unsqueeze(2)
        scores = scores.masked_fill(~seen, float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        # A row that has seen nothing yet has top = -inf; exp(-inf - 0) is the 0 it needs.
        safe = new_top.masked_fill(new_top == float("-inf"), 0.0)
        p = torch.exp(scores - safe)
        shrink = torch.exp(top - safe)
        mass = mass * shrink + p.sum(-1, keepdim=True)
        mixed = mixed * shrink + torch.einsum(
            "bhgql,blr->bhgqr", p, value_latents[:, start:stop].to(wide)
        )
        top = new_top
    # Rows that may attend to nothing (padding) give zeros, not NaN.
    mixed = mixed / mass.clamp_min(torch.finfo(wide).tiny)
    out = torch.einsum("bhgqr,hdr->bhgqd", mixed, value_up.to(wide))
    return out.reshape(batch, heads, n_query, dim)
