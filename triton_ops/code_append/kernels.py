"""Triton kernel that turns queries, stores latents and codes what leaves the window."""

from __future__ import annotations

import triton
import triton.language as tl

from triton_ops.rope_append.kernels import turn

_ROUND = tl.constexpr(1.5 * 2.0**23)  # a float32 of this size has steps of 1: ties go to even


@triton.jit
def _row(exact_ptr, new_ptr, new_token, ring, before, old, channel, held):
    """Float32 of the row that leaves: from the ring, or a new token that does not stay at all."""
    kept = tl.load(exact_ptr + ring + channel, mask=held & old, other=0.0)
    fresh = tl.load(new_ptr + before * new_token + channel, mask=held & ~old, other=0.0)
    return tl.where(old, kept.to(tl.float32), fresh.to(kept.dtype).to(tl.float32))


@triton.jit
def _scale(
    exact_ptr,
    new_ptr,
    new_token,
    ring,
    before,
    old,
    leaves,
    weight_ptr,
    first,
    channels,
    RMS: tl.constexpr,
    N: tl.constexpr,
):
    """Scale of a group, float32 ``[1]`` as fp16 has it; ``measure`` of the reference."""
    sums: tl.constexpr = tl.float64 if RMS else tl.float32
    found = tl.zeros([1], sums)
    for at in range(0, channels, N):
        lane = at + tl.arange(0, N)
        held = (lane < channels) & leaves
        x = _row(exact_ptr, new_ptr, new_token, ring, before, old, first + lane, held)
        x *= tl.load(weight_ptr + first + lane, mask=held, other=0.0)
        if RMS:
            x = x.to(tl.float64)
            found += tl.sum(x * x, 0)
        else:
            found = tl.maximum(found, tl.max(tl.abs(x), 0))
    if RMS:
        found = tl.sqrt(found / (tl.zeros([1], tl.float64) + channels))
    found = tl.minimum(tl.maximum(found.to(tl.float32), 2.0**-24), 65504.0)
    return found.to(tl.float16).to(tl.float32)


@triton.jit
def _put(at, bits, width, shift, held):
    """Set ``width`` bits of each byte from ``shift`` on; the others stay."""
    mask = ((1 << width) - 1) << shift
    found = tl.load(at, mask=held, other=0).to(tl.int32)
    tl.store(at, (found & ~mask | bits << shift).to(tl.uint8), mask=held)


@triton.jit
def _append_side(
    new_ptr,  # [n, R] of a row of the batch
    exact_ptr,  # [sinks + window, at least R]
    code_ptr,  # uint8 [tiles, tile_bytes]
    scale_ptr,  # fp16 [tiles, groups, 512] if SCALED
    inverse_ptr,  # float32 [R]
    weight_ptr,  # float32 [R] if SCALED
    program_ptr,  # the table's programs, from this one on
    block_ptr,
    past,
    n_new,
    coded,
    sinks,
    window,
    new_token,
    exact_row,
    tile_bytes,
    groups,
    KEY: tl.constexpr,
    SCALED: tl.constexpr,
    RMS: tl.constexpr,
    TREAD: tl.constexpr,
    N: tl.constexpr,
):
    """New tokens in turn: what the window drops for each is coded, its own row takes the place.

    All that a token overwrites has been read by this very program.
    """
    block = tl.load(program_ptr)
    blocks = tl.load(program_ptr + 1)
    group = tl.load(program_ptr + 2)
    group_first = tl.load(program_ptr + 3)
    group_channels = tl.load(program_ptr + 4)
    lane = tl.arange(0, N)
    for i in range(n_new):
        slot = past + i + tl.zeros([1], tl.int64)  # masks are made of it
        leaving = slot - window
        leaves = leaving >= tl.maximum(coded, sinks)
        before = leaving - past
        old = before < 0
        ring = (sinks + slot % tl.maximum(window, 1)) * exact_row
        stored = tl.where(slot < sinks, slot * exact_row, ring)
        stays = (slot < sinks) | (slot >= past + n_new - window)
        tile = leaving // 512
        t = (leaving % 512).to(tl.int32)
        if KEY:
            u = t % 128
            n = 2 * (t // 128) + (u < 64).to(tl.int32)
            j = tl.where(u < 64, 63 - u, u - 64)
        else:
            n = t // 64
            j = 2 * (t % 32) + t % 64 // 32
        g = tl.full([1], 1.0, tl.float32)
        if SCALED:
            g = _scale(
                exact_ptr,
                new_ptr,
                new_token,
                ring,
                before,
                old,
                leaves,
                weight_ptr,
                group_first,
                group_channels,
                RMS,
                N,
            )
            g_at = scale_ptr + (tile * groups + group) * 512 + t
            tl.store(g_at, g.to(tl.float16), mask=leaves)
        for number in range(block, block + blocks):
            at = block_ptr + number * 8
            channel = tl.load(at) + lane
            real = lane < tl.load(at + 1)
            bits = tl.load(at + 2)
            width = tl.load(at + 4)
            top = tl.load(at + 5)
            padded = tl.load(at + 6)
            held = real & leaves
            x = _row(exact_ptr, new_ptr, new_token, ring, before, old, channel, held)
            x *= tl.load(inverse_ptr + channel, mask=held, other=0.0)
            if SCALED:
                x = tl.div_rn(x, g)
            count = (1 << bits).to(tl.float32)
            if TREAD:
                level = tl.maximum(x + count * 0.5, 1.0)
            else:
                level = tl.maximum(x + (count - 1.0) * 0.5, 0.0)
            level = tl.minimum(level, count - 1.0)
            code = ((level + _ROUND) - _ROUND).to(tl.int32)
            c = channel - tl.load(at + 7)
            if KEY:
                c_at = code_ptr + tile * tile_bytes + j * padded + c
            else:
                c_at = code_ptr + tile * tile_bytes + c * 64 + j
            step = n * width
            low_at = c_at + (tl.load(at + 3) + step // 8 * padded) * 64
            _put(low_at, code & ((1 << width) - 1), width, step % 8, held)
            if top > 0:
                _put(c_at + top * 64, code >> 2, 1, n, held)
            fresh = tl.load(new_ptr + i * new_token + channel, mask=real, other=0.0)
            kept = fresh.to(exact_ptr.dtype.element_ty)
            tl.store(exact_ptr + stored + channel, kept, mask=real & stays)


@triton.jit
def code_append(
    q_ptr,  # [B, H, n, D], numbers of a head side by side
    turned_ptr,  # [B, H, n, D] without gaps
    cos_ptr,  # [S, D], float32, halves equal
    sin_ptr,
    filled_ptr,  # [1] slots filled, the new tokens included
    coded_ptr,  # [1] slots coded before
    after_ptr,  # [1] slots coded after
    keys_ptr,  # [B, n, R], numbers of a token side by side
    values_ptr,  # [B, n, r_v], likewise
    key_exact_ptr,  # [B, sinks + window, row_width]
    value_exact_ptr,
    key_codes_ptr,  # uint8 [B, tiles, tile_bytes]
    value_codes_ptr,
    key_scales_ptr,  # fp16 [B, tiles, groups, 512]
    value_scales_ptr,
    key_inverse_ptr,  # float32 [R], 1 / s_c
    value_inverse_ptr,
    key_weight_ptr,  # float32 [R]
    value_weight_ptr,
    key_programs_ptr,  # AppendTable
    value_programs_ptr,
    key_blocks_ptr,
    value_blocks_ptr,
    q_batch,
    q_head,
    q_token,
    keys_batch,
    keys_token,
    values_batch,
    values_token,
    key_exact_batch,
    key_exact_row,
    value_exact_batch,
    value_exact_row,
    key_code_batch,
    key_tile_bytes,
    value_code_batch,
    value_tile_bytes,
    key_groups,
    value_groups,
    key_scale_batch,
    value_scale_batch,
    heads,
    n_new,
    sinks,
    window,
    key_programs,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_RMS: tl.constexpr,
    VALUE_RMS: tl.constexpr,
    KEY_TREAD: tl.constexpr,
    VALUE_TREAD: tl.constexpr,
    KEY_SCALED: tl.constexpr,
    VALUE_SCALED: tl.constexpr,
    N: tl.constexpr,
):
    """A program has HEADS query heads of one token, or a program of a table and all tokens."""
    at = tl.program_id(0)
    row = (at // n_new).to(tl.int64)
    token = (at % n_new).to(tl.int64)
    past = tl.load(filled_ptr).to(tl.int64) - n_new
    coded = tl.load(coded_ptr).to(tl.int64)
    part = tl.program_id(1)
    head_parts = tl.cdiv(heads, HEADS)
    if part < head_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        q_at = q_ptr + row * q_batch + token * q_token
        out_at = turned_ptr + (row * heads * n_new + token) * (2 * HALF)
        turn(q_at, out_at, cos_ptr, sin_ptr, past + token, head, q_head, heads, n_new, HALF, HALF_P)
        if at + part == 0:
            after = tl.maximum(coded, past + n_new - window)
            tl.store(after_ptr, after.to(tl.int32))
    elif token == 0:
        program = part - head_parts
        if program < key_programs:
            _append_side(
                keys_ptr + row * keys_batch,
                key_exact_ptr + row * key_exact_batch,
                key_codes_ptr + row * key_code_batch,
                key_scales_ptr + row * key_scale_batch,
                key_inverse_ptr,
                key_weight_ptr,
                key_programs_ptr + program * 5,
                key_blocks_ptr,
                past,
                n_new,
                coded,
                sinks,
                window,
                keys_token,
                key_exact_row,
                key_tile_bytes,
                key_groups,
                True,
                KEY_SCALED,
                KEY_RMS,
                KEY_TREAD,
                N,
            )
        else:
            _append_side(
                values_ptr + row * values_batch,
                value_exact_ptr + row * value_exact_batch,
                value_codes_ptr + row * value_code_batch,
                value_scales_ptr + row * value_scale_batch,
                value_inverse_ptr,
                value_weight_ptr,
                value_programs_ptr + (program - key_programs) * 5,
                value_blocks_ptr,
                past,
                n_new,
                coded,
                sinks,
                window,
                values_token,
                value_exact_row,
                value_tile_bytes,
                value_groups,
                False,
                VALUE_SCALED,
                VALUE_RMS,
                VALUE_TREAD,
                N,
            )
