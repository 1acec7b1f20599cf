"""Checked entry point of latent attention, one signature for both backends."""

from __future__ import annotations

import torch

from triton_ops.backends import launching_on
from triton_ops.faults import shape_faults
from triton_ops.latent_attention.factors import LatentFactors
from triton_ops.latent_attention.layout import row_width
from triton_ops.latent_attention.reference import latent_attention_reference
from triton_ops.latent_attention.rope import RopeTables
from triton_ops.latent_attention.tuning import Tuning

REFERENCE_TILE = 1024  # tokens whose keys the reference rebuilds at once
SLOTS = 256  # the kernels take buffers of a multiple of so many slots


def latent_attention(
    q: torch.Tensor,
    key_latents: torch.Tensor,
    value_latents: torch.Tensor,
    factors: LatentFactors,
    rope: RopeTables,
    *,
    filled: torch.Tensor,
    scale: float,
    first: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    backend: str = "reference",
) -> torch.Tensor:
    """Attention of the ``Q`` last tokens over the cached latents, without the value bias.

    ``score = scale * q . R_t (U_h x_t + b_h)``, ``out = U_h^v sum_t softmax(score)_t z_t``
    (docs/design.md sections 2 and 6). Token i of Q stands at slot ``filled - Q + i`` and sees the
    slots from ``first`` to its own; what lies beyond ``filled`` is never used.

    Args:
        q: ``[B, H, Q, D]``, turned for its own slots.
        key_latents: ``[B, S, row_width(R)]``, the latents of all key heads side by side. Padding
            within a row must be finite.
        value_latents: ``[B, S, row_width(r_v)]``, shared by all heads.
        factors: of the layer.
        rope: tables of the model.
        filled: int32 ``[1]``, slots filled, the Q tokens included; at most S.
        scale: factor on the scores.
        first: int32 ``[B]``, the first slot of each row (left padding); None is 0, and Triton then
            makes the zeros.
        mask: bool ``[B, 1, Q, S']``, True where a token may attend, on top of the above; slots
            from S' on are hidden.
        backend: ``reference`` or ``triton`` (see :func:`triton_ops.backends.choose_backend`).
            Triton takes S in multiples of 256, rows without gaps, latents and factors of one 16-bit
            dtype.

    Returns:
        ``[B, H, Q, D]`` in the dtype of q; zeros for tokens that may attend to nothing.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, with all of them listed.
    """
    batch, heads, n_query, dim = q.shape
    kv_heads = len(factors.layout.ranks)
    room = key_latents.shape[1]
    value_rank = factors.value_up.shape[-1]
    expected: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]] = {
        "key_latents": (key_latents, (batch, room, row_width(factors.layout.channels))),
        "value_latents": (value_latents, (batch, room, row_width(value_rank))),
        "key_up": (factors.key_up, (kv_heads, dim, factors.key_up.shape[-1])),
        "key_bias": (factors.key_bias, (kv_heads, dim)),
        "value_up": (factors.value_up, (kv_heads, dim, value_rank)),
        "filled": (filled, (1,)),
        "first": (first, (batch,)),
        "mask": (mask, (batch, 1, n_query, 0 if mask is None else mask.shape[-1])),
    }
    wrong = shape_faults(expected)
    if heads % kv_heads:
        wrong.append(f"{heads} query heads do not divide among {kv_heads} key heads")
    if dim != rope.dim:
        wrong.append(f"head dimension {dim}, the tables have {rope.dim}")
    if mask is not None and mask.dtype != torch.bool:
        wrong.append(f"mask {mask.dtype}, expected torch.bool")
    if backend == "triton":
        wrong += _kernel_faults(key_latents, value_latents, factors)
    if wrong:
        raise ValueError("latent_attention: " + "; ".join(wrong))
    if backend == "triton":
        # Imported here: where Triton is missing the reference still runs.
        from triton_ops.latent_attention.launch import latent_attention_triton

        if mask is not None:
            mask = mask[:, 0] if mask.stride(-1) == 1 else mask[:, 0].contiguous()
        if first is None:
            first = torch.zeros(batch, dtype=torch.int32, device=q.device)
        with launching_on(q.device):
            return latent_attention_triton(
                q,
                key_latents,
                value_latents,
                factors,
                rope,
                filled,
                first,
                mask,
                scale,
                Tuning(),
            )
    length = int(filled)
    slot = torch.arange(length, device=q.device)
    allowed = slot < (length - n_query + 1 + torch.arange(n_query, device=q.device))[:, None]
    allowed = allowed.expand(batch, 1, -1, -1)
    if first is not None:
        allowed = allowed & (slot >= first[:, None, None, None])
    if mask is not None:
        beyond = max(0, length - mask.shape[-1])
        allowed = allowed & torch.nn.functional.pad(mask[..., :length], (0, beyond))
    cos, sin = rope.slots(length, q.device)
    return latent_attention_reference(
        q,
        key_latents[:, :length],
        value_latents[:, :length, :value_rank],
        factors.key_index,
        factors.key_up,
        factors.key_bias,
        factors.value_up,
        cos,
        sin,
        allowed,
        scale,
        REFERENCE_TILE,
    ).to(q.dtype)


def _kernel_faults(
    key_latents: torch.Tensor, value_latents: torch.Tensor, factors: LatentFactors
) -> list[str]:
    """What the kernels cannot read, beyond wrong shapes."""
    wrong = []
    room, dtype = key_latents.shape[1], key_latents.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        wrong.append(f"key_latents {dtype}, the triton backend takes 16 bits")
    if room % SLOTS:
        wrong.append(f"{room} slots, the triton backend takes a multiple of {SLOTS}")
    for name, rows in (("key_latents", key_latents), ("value_latents", value_latents)):
        if rows.stride()[1:] != (rows.shape[2], 1):
            wrong.append(f"{name} has rows {rows.stride(1)} apart, expected {rows.shape[2]}")
    others = {
        "value_latents": value_latents,
        "key_up": factors.key_up,
        "key_bias": factors.key_bias,
        "value_up": factors.value_up,
    }
    for name, other in others.items():
        if other is not None and other.dtype != dtype:
            wrong.append(f"{name} {other.dtype}, expected {dtype} as key_latents")
    return wrong
