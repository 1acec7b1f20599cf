"""Checked entry point of latent attention."""

from __future__ import annotations

import torch

from triton_ops.latent_attention.reference import latent_attention_reference

BACKENDS = ("reference",)


def latent_attention(
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
    *,
    backend: str = "reference",
    tile: int = 1024,
) -> torch.Tensor:
    """Attention of ``Q`` queries over ``L`` cached latents, without the value bias.

    ``score = scale * q . R_t (U_h x_t + b_h)``, ``out = U_h^v sum_t softmax(score)_t z_t``.

    Args:
        q: ``[B, H, Q, D]``, rotated for its own slots.
        key_latents: ``[B, L, R]``, the latents of all key heads side by side.
        value_latents: ``[B, L, r_v]``, shared by all heads.
        key_index: int64 ``[H_kv, r]``, channels of each head in ``key_latents``, padded.
        key_up: ``[H_kv, D, r]``, zero where ``key_index`` is padding.
        key_bias: ``[H_kv, D]`` or None.
        value_up: ``[H_kv, D, r_v]``.
        cos, sin: ``[L, D]`` for slots 0 to L - 1, in radians' cosine and sine, scaling included.
        allowed: bool ``[B, 1 or H_kv, Q, L]``; True where the query may attend.
        scale: factor on the scores.
        backend: one of :data:`BACKENDS`.
        tile: tokens whose keys are rebuilt at once.

    Returns:
        ``[B, H, Q, D]`` in float32 or wider; zeros for queries that may attend to nothing.

    Raises:
        ValueError: shapes that do not fit, an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: use one of {', '.join(BACKENDS)}")
    batch, heads, n_query, dim = q.shape
    length = key_latents.shape[1]
    kv_heads, rank = key_index.shape
    expected = {
        "key_latents": (key_latents.shape, (batch, length, key_latents.shape[-1])),
        "value_latents": (value_latents.shape, (batch, length, value_up.shape[-1])),
        "key_up": (key_up.shape, (kv_heads, dim, rank)),
        "value_up": (value_up.shape, (kv_heads, dim, value_up.shape[-1])),
        "cos": (cos.shape, (length, dim)),
        "sin": (sin.shape, (length, dim)),
        "allowed": (allowed.shape, (batch, allowed.shape[1], n_query, length)),
    }
    if key_bias is not None:
        expected["key_bias"] = (key_bias.shape, (kv_heads, dim))
    wrong = [
        f"{k} {tuple(got)}, expected {want}"
        for k, (got, want) in expected.items()
        if tuple(got) != want
    ]
    if heads % kv_heads:
        wrong.append(f"{heads} query heads do not divide among {kv_heads} key heads")
    if allowed.shape[1] not in (1, kv_heads):
        wrong.append(f"allowed has {allowed.shape[1]} heads, expected 1 or {kv_heads}")
    if wrong:
        raise ValueError("latent_attention: " + "; ".join(wrong))
    return latent_attention_reference(
        q,
        key_latents,
        value_latents,
        key_index,
        key_up,
        key_bias,
        value_up,
        cos,
        sin,
        allowed,
        scale,
        tile,
    )
