"""Checked entry point, one signature for both backends."""

from __future__ import annotations

import torch

from triton_ops.backends import launching_on
from triton_ops.faults import dtype_faults, gap_faults, shape_faults, stride_faults
from triton_ops.rope_append.reference import rope_append_reference

_PROGRAM = 1024  # numbers of one program: a few for every thread, and programs enough at batch 1


def rope_append(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_latents: torch.Tensor,
    value_latents: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    filled: torch.Tensor,
    backend: str = "reference",
) -> torch.Tensor:
    """Turn the queries of ``n`` new tokens by RoPE, and store their latents at their slots.

    Token i of n stands at slot ``filled - n + i``. Nothing of the buffers changes but the first
    ``R`` and ``r_v`` numbers of those slots. Queries are turned in float32 and then rounded.

    Args:
        q: ``[B, H, n, D]`` before RoPE.
        keys: ``[B, n, R]``, key latents of the new tokens.
        values: ``[B, n, r_v]``, their value latents.
        key_latents: ``[B, S, *]``, rows of at least R numbers; written in place.
        value_latents: ``[B, S, *]``, rows of at least r_v numbers; written in place.
        cos, sin: float32 ``[S', D]`` by slot, halves equal; S' is at least S.
        filled: int32 ``[1]``, slots filled, the n tokens included; n to S, which is not checked.
        backend: ``reference`` or ``triton`` (see :func:`triton_ops.backends.choose_backend`).
            Triton takes any strides but in the last dimension, and tables without gaps.

    Returns:
        The turned queries, contiguous ``[B, H, n, D]`` in the dtype of q.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, with all of them listed.
    """
    batch, heads, n_new, dim = q.shape
    room = key_latents.shape[1]
    key_width, value_width = keys.shape[-1], values.shape[-1]
    expected: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
        "keys": (keys, (batch, n_new, key_width)),
        "values": (values, (batch, n_new, value_width)),
        "key_latents": (key_latents, (batch, room, max(key_width, key_latents.shape[-1]))),
        "value_latents": (value_latents, (batch, room, max(value_width, value_latents.shape[-1]))),
        "cos": (cos, (max(room, len(cos)), dim)),
        "sin": (sin, (max(room, len(sin)), dim)),
        "filled": (filled, (1,)),
    }
    wrong = shape_faults(expected)
    if dim % 2:
        wrong.append(f"head dimension {dim}, RoPE takes an even one")
    if backend == "triton":
        wrong += stride_faults({"q": q} | {name: got for name, (got, _) in expected.items()})
        wrong += dtype_faults(
            {
                "cos": (cos, torch.float32),
                "sin": (sin, torch.float32),
                "filled": (filled, torch.int32),
            }
        )
        wrong += gap_faults({"cos": cos, "sin": sin})
    if wrong:
        raise ValueError("rope_append: " + "; ".join(wrong))
    if backend != "triton":
        slots = filled.long() - n_new + torch.arange(n_new, device=filled.device)
        return rope_append_reference(q, keys, values, key_latents, value_latents, cos, sin, slots)
    # Imported here: where Triton is missing the reference still runs.
    import triton

    from triton_ops.rope_append import kernels

    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    half_p = triton.next_power_of_2(dim // 2)
    at_once = max(1, _PROGRAM // half_p)
    parts = -(-heads // at_once) + -(-key_width // _PROGRAM) + -(-value_width // _PROGRAM)
    with launching_on(q.device):
        kernels.rope_append[(batch * n_new, parts)](
            q,
            keys,
            values,
            key_latents,
            value_latents,
            cos,
            sin,
            filled,
            turned,
            *q.stride()[:3],
            *keys.stride()[:2],
            *values.stride()[:2],
            *key_latents.stride()[:2],
            *value_latents.stride()[:2],
            heads,
            n_new,
            key_width,
            value_width,
            HALF=dim // 2,
            HALF_P=half_p,
            HEADS=at_once,
            N=_PROGRAM,
            num_warps=4,
            # Rounded after each product, as the reference is: the two agree bit for bit.
            enable_fp_fusion=False,
        )
    return turned
