"""Launches of the Triton kernels: which of them, over what grid, with which tiles."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from triton_ops.latent_attention import kernels
from triton_ops.latent_attention.factors import LatentFactors
from triton_ops.latent_attention.layout import ALIGN, NARROW, PIECE, PIECE_HEADS, power
from triton_ops.latent_attention.rope import RopeTables
from triton_ops.latent_attention.tuning import (
    Tuning,
    mix_splits,
    processors_of,
    splits_of,
)

LOG2_E = 1.4426950408889634
SOFTMAX_COLUMNS = 16  # columns of one program of the softmax


def latent_attention_triton(
    q: torch.Tensor,
    x: torch.Tensor,
    z: torch.Tensor,
    factors: LatentFactors,
    rope: RopeTables,
    filled: torch.Tensor,
    first: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    tuning: Tuning,
) -> torch.Tensor:
    """See :func:`triton_ops.latent_attention.latent_attention`.

    Args:
        q: ``[B, H, Q, D]``, turned for its own slots.
        x, z: ``[B, S, *]`` with rows that begin on 16 bytes; only ``filled`` slots are read.
        filled: int32 ``[1]``, on the device: slots filled, the new tokens included.
        first: int32 ``[B]``: the first slot of each row.
        mask: bool ``[B, Q, S']`` or None, on top of causality and ``first``; hides slots from S'.
        tuning: tile sizes.

    Returns:
        ``[B, H, Q, D]`` in the dtype of q.
    """
    batch, heads, n_query, dim = q.shape
    room = x.shape[1]  # slots there are: sets the grids
    kv_heads = factors.key_up.shape[0]
    columns = heads // kv_heads * n_query
    all_columns = heads * n_query
    device, q = q.device, q.contiguous()
    half = dim // 2
    half_p = power(half)
    x_row = x.stride(1) // ALIGN
    scale = scale * LOG2_E
    processors = tuning.processors or processors_of(device)
    bias = factors.key_bias
    band = factors.band if columns == 1 else None
    segments = all_columns if band is None else band.total
    scores = torch.empty(batch, segments, room, dtype=torch.float32, device=device)
    if band is not None:
        tile = tuning.band["T"]
        at_once = processors * tuning.band_programs
        splits, per = splits_of(room // tile, len(band.pieces) * batch, at_once)
        kernels.band_scores[(len(band.pieces), splits, batch)](
            q,
            x,
            band.rows,
            band.lanes,
            band.pieces,
            *rope.band(tile, room // tile, device),
            filled,
            scores,
            scale,
            x.stride(0),
            x_row,
            room,
            segments,
            per,
            heads,
            HALF=half,
            HALF_P=half_p,
            N=PIECE,
            COLS=PIECE_HEADS,
            BIAS=bias is not None,
            **options_for(tuning.band, half_p <= 64),
        )
    else:
        tile = tuning.rebuilt["T"]
        width = min(64, power(columns, NARROW))
        blocks = -(-columns // width)
        at_once = processors * tuning.rebuilt_programs
        for (k, more), (entries, rows) in factors.buckets.items():
            splits, per = splits_of(room // tile, len(entries) * blocks * batch, at_once)
            kernels.rebuilt_scores[(len(entries), splits * blocks, batch)](
                q,
                x,
                rows,
                q if bias is None else bias,
                entries,
                *rope.rebuilt(tile, room // tile, device),
                filled,
                scores,
                scale,
                x.stride(0),
                x_row,
                room,
                per,
                all_columns,
                columns,
                HALF=half,
                HALF_P=half_p,
                K=k,
                MORE=more,
                BIAS=bias is not None,
                COLS=width,
                **options_for(tuning.rebuilt, half_p <= 64 and width == NARROW),
            )
    tile = tuning.softmax["T"]
    n_tiles = room // tile
    p = torch.empty(batch, all_columns, room, dtype=torch.float16, device=device)
    top = torch.empty(batch, all_columns, n_tiles, dtype=torch.float32, device=device)
    mass = torch.empty_like(top)
    kernels.tile_softmax[(-(-all_columns // SOFTMAX_COLUMNS), n_tiles, batch)](
        filled if band is None else band.segments,
        scores,
        filled,
        filled,
        first,
        filled if mask is None else mask,
        p,
        top,
        mass,
        0 if mask is None else mask.stride(0),
        0 if mask is None else mask.stride(1),
        0 if mask is None else mask.shape[-1],
        room,
        n_tiles,
        segments,
        all_columns,
        columns,
        n_query,
        0,
        COLS=SOFTMAX_COLUMNS,
        MOST=1 if band is None else band.most,
        MASK=mask is not None,
        **tuning.softmax,
    )
    total = torch.empty(batch, all_columns, dtype=torch.float32, device=device)
    kernels.tile_weights[(batch * all_columns,)](
        top, mass, total, filled, n_tiles, 0, T=tile, BLOCK=power(min(n_tiles, 1024)), num_warps=1
    )
    mix = tuning.mix
    value_room = factors.padded_value_up.shape[-1]
    width, parts, splits, per = mix_splits(tuning, batch, all_columns, value_room, room, processors)
    mixed = torch.empty(batch, splits, all_columns, value_room, dtype=torch.float32, device=device)
    kernels.mix_values[(parts, splits, batch)](
        p,
        top,
        z,
        mixed,
        filled,
        z.stride(0),
        z.stride(1) // ALIGN,
        mixed.shape[-1] // ALIGN,
        room,
        n_tiles,
        per,
        all_columns,
        splits,
        SCORE_TILE=tile,
        COLS=width,
        **mix,
    )
    return expanded(mixed, total, factors.padded_value_up, q.dtype, tuning.expand, n_query)


def expanded(
    mixed: torch.Tensor,
    total: torch.Tensor,
    value_up: torch.Tensor,
    dtype: torch.dtype,
    expand: Mapping[str, int],
    n_query: int,
) -> torch.Tensor:
    """Sum the splits, divide by the softmax's denominator, expand through the values' U.

    Args:
        mixed: float32 ``[B, splits, H * Q, room]``.
        total: float32 ``[B, H * Q]``.
        value_up: ``[H_kv, D, room]``, rows on 16 bytes.
        dtype: of the result.
        expand: tile sizes.

    Returns:
        ``[B, H, Q, D]``.
    """
    batch, splits, all_columns, room = mixed.shape
    kv_heads, dim, _ = value_up.shape
    columns, device = all_columns // kv_heads, mixed.device
    summed = torch.empty(batch, all_columns, room, dtype=value_up.dtype, device=device)
    kernels.sum_splits[(all_columns, batch, -(-room // 512))](
        mixed, total, summed, splits, all_columns, room, N=512, num_warps=4
    )
    out = torch.empty(batch, all_columns, dim, dtype=dtype, device=device)
    pairs = min(64, power(batch * columns))
    tiles = dict(expand)
    n = min(tiles.pop("N"), power(dim))
    kernels.expand_values[(kv_heads, -(-dim // n), -(-batch * columns // pairs))](
        summed,
        value_up,
        out,
        batch,
        all_columns,
        columns,
        room // ALIGN,
        DIM=dim,
        ROWS=pairs,
        N=n,
        **tiles,
    )
    return out.view(batch, -1, n_query, dim)


def options_for(options: Mapping[str, int], limited: bool) -> Mapping[str, int]:
    """Of a launch; a limit on registers is for the tiles it was measured with, wider ones spill."""
    return options if limited else {k: v for k, v in options.items() if k != "maxnreg"}
