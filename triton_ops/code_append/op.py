"""Checked entry point, one signature for both backends."""

from __future__ import annotations

import torch

from triton_ops.backends import launching_on
from triton_ops.code_append.reference import coded_after, store_rows
from triton_ops.coded_attention import Coded
from triton_ops.faults import dtype_faults, gap_faults, shape_faults, stride_faults
from triton_ops.latent_attention import rotate
from triton_ops.latent_codes import TILE, LayerCodes

_HEADS = 1024  # numbers of queries of one program


def code_append(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: Coded,
    value_side: Coded,
    codes: LayerCodes,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    filled: torch.Tensor,
    coded: torch.Tensor,
    backend: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the queries of ``n`` new tokens by RoPE, store their latents, code what grows old.

    Token i of n stands at slot ``filled - n + i``; its latents go to the sinks or to the window's
    ring, and the token that leaves the window for it is coded, bit for bit as
    :class:`triton_ops.latent_codes.Codec` codes it. Nothing else of the buffers changes.

    Args:
        q: ``[B, H, n, D]`` before RoPE.
        keys: ``[B, n, R]``, key latents of the new tokens.
        values: ``[B, n, r_v]``, their value latents.
        key_side, value_side: what the layer stores, with room for the tokens; written in place.
        codes: how.
        cos, sin: float32 ``[S', D]`` by slot, halves equal, of all slots that there is room for.
        filled: int32 ``[1]``, slots filled, the n tokens included; within the room, which is not
            checked.
        coded: int32 ``[1]``, slots below were coded when last that was counted: this may lie behind
            by what leaving the window has added since. At most ``filled - n``.
        backend: ``reference`` or ``triton`` (see :func:`triton_ops.backends.choose_backend`).
            Triton takes any strides of q, keys and values but in the last dimension.

    Returns:
        The turned queries, contiguous ``[B, H, n, D]`` in the dtype of q; int32 ``[1]``, slots
        coded now.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, with all of them listed.
    """
    _check(q, keys, values, key_side, value_side, codes, cos, sin, filled, coded, backend)
    n_new, dim = q.shape[2], q.shape[3]
    if backend != "triton":
        stop = int(filled)
        past = stop - n_new
        before = coded_after(int(coded), past, codes.window)
        sides = ((key_side, codes.keys, keys), (value_side, codes.values, values))
        for side, codec, rows in sides:
            store_rows(side, codec, rows, past, before, codes.sinks, codes.window)
        turned = rotate(q, cos[past:stop], sin[past:stop]).contiguous()
        after = coded_after(before, stop, codes.window)
        return turned, torch.full_like(coded, after)
    # Imported here: where Triton is missing the reference still runs.
    import triton

    from triton_ops.code_append import kernels
    from triton_ops.code_append.tables import BLOCK, append_table

    turned, after_coded = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty_like(coded),
    )
    half_p = triton.next_power_of_2(dim // 2)
    at_once = max(1, _HEADS // half_p)
    of_keys, of_values = append_table(codes.keys), append_table(codes.values)
    parts = -(-q.shape[1] // at_once) + len(of_keys.programs) + len(of_values.programs)
    with launching_on(q.device):
        kernels.code_append[(len(q) * n_new, parts)](
            q,
            turned,
            cos,
            sin,
            filled,
            coded,
            after_coded,
            keys,
            values,
            key_side.exact,
            value_side.exact,
            key_side.codes,
            value_side.codes,
            key_side.scales,
            value_side.scales,
            codes.keys.inverse,
            codes.values.inverse,
            codes.keys.weight,
            codes.values.weight,
            of_keys.programs,
            of_values.programs,
            of_keys.blocks,
            of_values.blocks,
            *q.stride()[:3],
            *keys.stride()[:2],
            *values.stride()[:2],
            *key_side.exact.stride()[:2],
            *value_side.exact.stride()[:2],
            *key_side.codes.stride()[:2],
            *value_side.codes.stride()[:2],
            codes.keys.layout.scales,
            codes.values.layout.scales,
            key_side.scales.stride(0),
            value_side.scales.stride(0),
            q.shape[1],
            n_new,
            codes.sinks,
            codes.window,
            len(of_keys.programs),
            HALF=dim // 2,
            HALF_P=half_p,
            HEADS=at_once,
            KEY_RMS=codes.keys.measure == "rms",
            VALUE_RMS=codes.values.measure == "rms",
            KEY_TREAD=codes.keys.zero == "tread",
            VALUE_TREAD=codes.values.zero == "tread",
            KEY_SCALED=codes.keys.layout.scales > 0,
            VALUE_SCALED=codes.values.layout.scales > 0,
            N=BLOCK,
            num_warps=4,
            # Rounded after each operation, as the reference is: the two agree bit for bit.
            enable_fp_fusion=False,
        )
    return turned, after_coded


def _check(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_side: Coded,
    value_side: Coded,
    codes: LayerCodes,
    cos: torch.Tensor,
    sin: torch.Tensor,
    filled: torch.Tensor,
    coded: torch.Tensor,
    backend: str,
) -> None:
    batch, _, n_new, dim = q.shape
    tiles, rows = key_side.codes.shape[1], codes.sinks + codes.window
    room = tiles * TILE
    wrong = key_side.faults("keys", codes.keys, batch, tiles, rows)
    wrong += value_side.faults("values", codes.values, batch, tiles, rows)
    expected = {
        "keys": (keys, (batch, n_new, codes.keys.layout.channels)),
        "values": (values, (batch, n_new, codes.values.layout.channels)),
        "cos": (cos, (max(room, len(cos)), dim)),
        "sin": (sin, (max(room, len(sin)), dim)),
        "filled": (filled, (1,)),
        "coded": (coded, (1,)),
    }
    wrong += shape_faults(expected)
    if dim % 2:
        wrong.append(f"head dimension {dim}, RoPE takes an even one")
    wrong += dtype_faults(
        {
            "cos": (cos, torch.float32),
            "sin": (sin, torch.float32),
            "filled": (filled, torch.int32),
            "coded": (coded, torch.int32),
        }
    )
    if backend == "triton":
        wrong += stride_faults({"q": q, "keys": keys, "values": values})
        wrong += gap_faults({"cos": cos, "sin": sin})
    if wrong:
        raise ValueError("code_append: " + "; ".join(wrong))
