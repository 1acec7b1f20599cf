"""Launches of the kernels over packed codes."""

from __future__ import annotations

import torch

from triton_ops.coded_attention import kernels
from triton_ops.coded_attention.op import Coded
from triton_ops.coded_attention.ptx import levels
from triton_ops.coded_attention.tables import BandTable, CodedFactors, Span
from triton_ops.coded_attention.tuning import EXACT, PART, SCORES, Tuning, mix_splits
from triton_ops.latent_attention import kernels as common
from triton_ops.latent_attention.launch import LOG2_E, SOFTMAX_COLUMNS, expanded, options_for
from triton_ops.latent_attention.layout import ALIGN, NARROW, PIECE, PIECE_HEADS, power
from triton_ops.latent_attention.rope import RopeTables
from triton_ops.latent_attention.tuning import processors_of, splits_of
from triton_ops.latent_codes import TILE

_EXPAND = {"N": 32, "K": 256, "STAGES": 3, "num_warps": 4}
_MIX_EXACT = {"T": EXACT, "N": 128, "STAGES": 2, "num_warps": 4}


def coded_attention_triton(
    q: torch.Tensor,
    keys: Coded,
    values: Coded,
    factors: CodedFactors,
    rope: RopeTables,
    filled: torch.Tensor,
    coded: torch.Tensor,
    first: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    tuning: Tuning,
) -> torch.Tensor:
    """See :func:`triton_ops.coded_attention.coded_attention`.

    Args:
        first: int32 ``[B]``: the first slot of each row.
        mask: bool ``[B, Q, S]`` or None.
    """
    batch, heads, n_query, dim = q.shape
    kv_heads = factors.key_up.shape[0]
    columns, all_columns = heads // kv_heads * n_query, heads * n_query
    room = keys.codes.shape[1] * TILE
    device, q = q.device, q.contiguous()
    half, half_p = dim // 2, power(dim // 2)
    scale = scale * LOG2_E
    processors = tuning.processors or processors_of(device)
    band = columns == 1 and not factors.shared
    tables, segment_of, segments, most = factors.band if band else factors.rebuilt
    lines = segments if band else segments * columns
    scores = torch.empty(batch, lines, room, dtype=torch.float32, device=device)
    turns = rope.band(PART, room // PART, device)
    for table in tables:
        span, count = table.span, len(table.rows)
        width = PIECE_HEADS if isinstance(table, BandTable) else min(64, power(columns, NARROW))
        blocks = 1 if band else -(-columns // width)
        programs = tuning.band_programs if band else tuning.rebuilt_programs
        splits, per = splits_of(room // PART, count * blocks * batch, processors * programs)
        stored = (
            scale,
            span.middle,
            keys.codes.stride(0),
            keys.codes.stride(1) // 64,
            span.stored // 16,
            span.top_plane // 64,
            keys.scales.stride(0),
            keys.scales.shape[2],
            room,
            segments,
            per,
        )
        common_options = {
            "HALF": half,
            "HALF_P": half_p,
            "COLS": width,
            "BITS": span.bits,
            "SCALED": bool(keys.scales.shape[2]),
            "PTX": _ptx(span, device),
        }
        codes = keys.codes[..., span.offset :].view(torch.int16)
        if isinstance(table, BandTable):
            kernels.coded_band_scores[(count, splits, batch)](
                q,
                codes,
                keys.scales,
                table.rows,
                table.roles,
                table.heads,
                table.starts,
                table.segments,
                table.groups,
                *turns,
                coded,
                scores,
                *stored,
                heads,
                N=PIECE,
                BIAS=table.biased,
                **common_options,
                **options_for(tuning.band, half_p <= 64),
            )
        else:
            kernels.coded_rebuilt_scores[(count, splits * blocks, batch)](
                q,
                codes,
                keys.scales,
                table.rows,
                table.bias,
                table.entries,
                *turns,
                coded,
                scores,
                *stored,
                all_columns,
                columns,
                K=table.width,
                **common_options,
                **options_for(tuning.rebuilt, half_p <= 64 and width == NARROW),
            )
    rows = keys.exact.shape[1]
    before = -(-rows // EXACT)  # tiles of rows that are not coded stand before those of codes
    n_tiles = before + room // SCORES
    p = torch.empty(batch, all_columns, room, dtype=torch.float16, device=device)
    top = torch.empty(batch, all_columns, n_tiles, dtype=torch.float32, device=device)
    mass = torch.empty_like(top)
    of_mask = (0, 0, 0) if mask is None else (*mask.stride()[:2], mask.shape[-1])
    common.tile_softmax[(-(-all_columns // SOFTMAX_COLUMNS), room // SCORES, batch)](
        segment_of,
        scores,
        filled,
        coded,
        first,
        filled if mask is None else mask,
        p,
        top[..., before:],
        mass[..., before:],
        *of_mask,
        room,
        n_tiles,
        segments,
        all_columns,
        columns,
        n_query,
        factors.codes.sinks,
        COLS=SOFTMAX_COLUMNS,
        MOST=most,
        MASK=mask is not None,
        T=SCORES,
        num_warps=4,
    )
    exact_p = torch.empty(batch, all_columns, before * EXACT, dtype=torch.float16, device=device)
    if rows:
        index, up = factors.exact
        width = min(64, power(columns, NARROW))
        kernels.exact_scores[(kv_heads, before * -(-columns // width), batch)](
            q,
            keys.exact,
            index,
            up,
            q if factors.key_bias is None else factors.key_bias,
            *rope.slots(room, device),
            filled,
            coded,
            first,
            filled if mask is None else mask,
            exact_p,
            top,
            mass,
            scale,
            keys.exact.stride(0),
            keys.exact.stride(1),
            exact_p.shape[-1],
            n_tiles,
            all_columns,
            columns,
            n_query,
            factors.codes.sinks,
            factors.codes.window,
            *of_mask,
            HALF=half,
            HALF_P=half_p,
            K=up.shape[1],
            COLS=width,
            BIAS=factors.key_bias is not None,
            MASK=mask is not None,
            num_warps=4,
        )
    total = torch.empty(batch, all_columns, dtype=torch.float32, device=device)
    common.tile_weights[(batch * all_columns,)](
        top,
        mass,
        total,
        coded,
        n_tiles,
        before,
        T=SCORES,
        BLOCK=power(min(n_tiles, 1024)),
        num_warps=1,
    )
    up = factors.padded_value_up
    value_room, width = up.shape[-1], min(64, power(all_columns))
    blocks = -(-all_columns // width)
    sections = factors.codes.values.layout.sections
    splits, per = mix_splits(tuning, sections, batch, all_columns, room // TILE, processors)
    of_exact = 1 if rows else 0
    mixed = torch.empty(
        batch, of_exact + splits, all_columns, value_room, dtype=torch.float32, device=device
    )
    if rows:
        common.mix_values[(-(-value_room // _MIX_EXACT["N"]) * blocks, 1, batch)](
            exact_p,
            top,
            values.exact,
            mixed,
            factors.exact_rows,
            values.exact.stride(0),
            values.exact.stride(1) // ALIGN,
            value_room // ALIGN,
            exact_p.shape[-1],
            n_tiles,
            before,
            all_columns,
            of_exact + splits,
            SCORE_TILE=EXACT,
            COLS=width,
            **_MIX_EXACT,
        )
    for span, group in zip(factors.value_spans, factors.value_groups, strict=True):
        mix = tuning.mix_of(span.bits)
        last = span.first + span.channels == factors.value_up.shape[-1]
        covered = value_room - span.first if last else span.channels  # padding becomes 0
        scaled = bool(values.scales.shape[2])
        kernels.mix_codes[(-(-covered // mix["N"]) * blocks, splits, batch)](
            p,
            top[..., before:],
            mass[..., before:],
            values.codes[..., span.offset :].view(torch.int16),
            values.scales[:, :, group:],
            factors.codes.values.step[span.first :],
            mixed[..., span.first :],
            coded,
            0.0 if scaled else span.middle,
            values.codes.stride(0),
            values.codes.stride(1) // 64,
            span.top_plane // 64,
            values.scales.stride(0),
            values.scales.shape[2],
            value_room,
            room,
            n_tiles,
            per,
            all_columns,
            span.channels,
            covered,
            of_exact,
            of_exact + splits,
            COLS=width,
            BITS=span.bits,
            MIDDLE_2=int(2 * span.middle) if scaled else 0,
            SCALED=scaled,
            PTX=device.type == "cuda",
            **mix,
        )
    return expanded(mixed, total, up, q.dtype, _EXPAND, n_query)


def _ptx(span: Span, device: torch.device) -> str | None:
    return levels(span.bits, span.middle) if device.type == "cuda" else None
