"""Triton kernels of attention over packed codes; :mod:`.launch` calls them.

What they leave is what the kernels of latent attention leave (docs/kernels.md), and the softmax, the
weights of tiles and what follows the sums are those kernels. Codes lie as
``triton_ops/latent_codes/layout.py`` says: tiles of 512 slots, each of four *parts* of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _largest(x):
    return tl.max(tl.max(tl.abs(x), 1), 0)


@triton.jit
def _levels(low, low_shift, top, top_shift, middle, BITS: tl.constexpr):
    """``code - middle`` in fp16: the bits set in the mantissa of 512, which is then subtracted.

    A number from 512 to 1023 has steps of 1/2 in fp16, so ``512 + middle`` is exact.
    """
    low = low.to(tl.uint16)
    if BITS == 8:
        bits = low << 1
    elif BITS == 3:
        third = top.to(tl.uint16) << 3 >> top_shift.to(tl.uint16)
        bits = ((low << 1 >> low_shift.to(tl.uint16)) & 6) | (third & 8)
    else:
        bits = (low << 1 >> low_shift.to(tl.uint16)) & (2 * (2**BITS - 1))
    return (bits | 0x6000).to(tl.float16, bitcast=True) - tl.full([1, 1], 512.0 + middle, tl.float16)


@triton.jit
def _both(low, other, top, shift_0, shift_1, third_0, third_1, middle, BITS: tl.constexpr, PTX: tl.constexpr):
    """``code - middle`` of both tokens of each byte; by four bytes at a time where PTX says how."""
    if PTX is None or BITS == 8:
        x_0 = _levels(low, shift_0, top, third_0, middle, BITS)
        x_1 = _levels(other, shift_1, top, third_1, middle, BITS)
    elif BITS == 4:
        x_0, x_1 = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [low], (tl.float16, tl.float16), True, 4
        )
    elif BITS == 2:
        x_0, x_1 = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r,r,r,r,r", [low, shift_0], (tl.float16, tl.float16), True, 4
        )
    else:
        x_0, x_1 = tl.inline_asm_elementwise(
            PTX,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [low, top, shift_0, third_0],
            (tl.float16, tl.float16),
            True,
            4,
        )
    return x_0, x_1


@triton.jit
def _part(part, BITS: tl.constexpr):
    """Byte rows and shifts of a part: of its first 64 tokens (n even) and of the others.

    Of the plane of the low bits: row of n, row of n + 1, shift of n, of n + 1; of the plane of the
    third bit: shift of n, of n + 1 (its row is 0).
    """
    if BITS == 8:
        row, other, shift, after = 2 * part, 2 * part + 1, part * 0, part * 0
    elif BITS == 4:
        row, other, shift, after = part, part, part * 0, part * 0 + 4
    else:
        row, other, shift, after = part // 2, part // 2, 4 * (part % 2), 4 * (part % 2) + 2
    return row, other, shift, after, 2 * part, 2 * part + 1


@triton.jit
def coded_band_scores(
    q_ptr,  # [B, H, D], turned for its own slot
    code_ptr,  # uint8 [B, tiles, tile_bytes] from the section's first byte on
    scale_ptr,  # fp16 [B, tiles, groups, 512] if SCALED
    up_ptr,  # [pieces, N, D], columns of U times their step, or key biases
    role_ptr,  # [pieces, N]: column of a channel's head; of a key bias COLS more; -1
    head_ptr,  # [pieces, N]: head of the lane
    start_ptr,  # [pieces]: channel of the section to load from, a multiple of 16
    segment_ptr,  # [pieces, COLS]: segment of each column, -1 for none
    group_ptr,  # [pieces, COLS]: scale group of each column
    cos_ptr,  # tables as band_scores has them
    sin_ptr,
    cos_mid_ptr,
    sin_mid_ptr,
    coded_ptr,  # [1] slots coded
    scores_ptr,  # [B, segments, p_room], float32
    scale,  # of scores, times log2(e)
    middle,  # code that stands for 0
    code_batch,
    tile_bytes_64,
    stored_16,  # channels of the section with padding, over 16
    top_plane_64,  # bytes to the plane of the third bit, over 64
    scale_batch,
    groups,
    p_room,
    segments,
    per_program,
    heads,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    N: tl.constexpr,
    COLS: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of one query token, one query head per key head: band_scores on codes.

    The two tokens that share a byte lie symmetric around a part's centre, as the even and the odd
    sum need them.
    """
    piece = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    stored = stored_16 * 16
    start = tl.multiple_of(tl.load(start_ptr + piece), 16)
    coded = tl.load(coded_ptr)
    lane = tl.arange(0, N)
    role = tl.load(role_ptr + piece * N + lane)
    head = tl.load(head_ptr + piece * N + lane)
    freq = tl.arange(0, HALF_P)
    both = (freq < HALF)[:, None] & (role >= 0)[None, :]
    u_at = up_ptr + (piece * N + lane)[None, :] * (2 * HALF) + freq[:, None]
    q_at = q_ptr + (row * heads + head)[None, :] * (2 * HALF) + freq[:, None]
    u0 = tl.load(u_at, mask=both, other=0.0).to(tl.float32)
    u1 = tl.load(u_at + HALF, mask=both, other=0.0).to(tl.float32)
    q0 = tl.load(q_at, mask=both, other=0.0).to(tl.float32)
    q1 = tl.load(q_at + HALF, mask=both, other=0.0).to(tl.float32)
    a = q0 * u0 + q1 * u1
    b = q1 * u0 - q0 * u1
    unit = tl.maximum(tl.maximum(_largest(a), _largest(b)), 1e-20)
    a = (a / unit).to(tl.float16)
    b = (b / unit).to(tl.float16)

    col = tl.arange(0, COLS)
    pick = (role[:, None] == col[None, :]).to(tl.float16)
    pick_bias = (role[:, None] == col[None, :] + COLS).to(tl.float16)
    j = tl.arange(0, 64)
    cos = tl.load(cos_ptr + j[:, None] * HALF_P + freq[None, :])
    sin = tl.load(sin_ptr + j[:, None] * HALF_P + freq[None, :])
    held = (start + lane < stored)[None, :]
    c_base = code_ptr + row * code_batch + start
    c_lane = j[:, None] * stored + lane[None, :]
    segment = tl.load(segment_ptr + piece * COLS + col)
    s_col = scores_ptr + (row * segments + segment)[None, :] * p_room
    g_col = scale_ptr + row * scale_batch + tl.load(group_ptr + piece * COLS + col)[None, :] * 512
    live = (segment >= 0)[None, :]
    sums: tl.constexpr = tl.float16 if HALF_P > 32 else tl.float32
    first = (split * per_program).to(tl.int64)
    parts = tl.minimum(tl.cdiv(coded, 128), first + per_program) - first
    for step in tl.range(0, parts, num_stages=STAGES):
        number = first + step
        tile = number // 4
        part = (number % 4).to(tl.int32)
        row_0, row_1, shift_0, shift_1, third_0, third_1 = _part(part, BITS)
        c_at = c_base + tile * (tile_bytes_64 * 64)
        low = tl.load(c_at + row_0 * (64 * stored) + c_lane, mask=held, other=0)
        other = low
        top = low
        if BITS == 8:
            other = tl.load(c_at + row_1 * (64 * stored) + c_lane, mask=held, other=0)
        if BITS == 3:
            top = tl.load(c_at + top_plane_64 * 64 + c_lane, mask=held, other=0)
        cos_mid = tl.load(cos_mid_ptr + number * HALF_P + freq)[:, None]
        sin_mid = tl.load(sin_mid_ptr + number * HALF_P + freq)[:, None]
        even = tl.dot(cos, a * cos_mid + b * sin_mid, out_dtype=sums)
        odd = tl.dot(sin, b * cos_mid - a * sin_mid, out_dtype=sums)
        after = (even + odd).to(tl.float16)
        before = (even - odd).to(tl.float16)
        x_after, x_before = _both(
            low, other, top, shift_0, shift_1, third_0, third_1, middle, BITS, PTX
        )
        s_after = tl.dot(x_after * after, pick)
        s_before = tl.dot(x_before * before, pick)
        slot = number * 128
        if SCALED:
            g_at = g_col + tile * (groups * 512) + part * 128
            s_after *= tl.load(g_at + 64 + j[:, None], mask=live, other=0.0).to(tl.float32)
            s_before *= tl.load(g_at + 63 - j[:, None], mask=live, other=0.0).to(tl.float32)
        if BIAS:
            s_after = tl.dot(after, pick_bias, s_after)
            s_before = tl.dot(before, pick_bias, s_before)
        tl.store(s_col + slot + 64 + j[:, None], s_after * (scale * unit), mask=live)
        tl.store(s_col + slot + 63 - j[:, None], s_before * (scale * unit), mask=live)


@triton.jit
def coded_rebuilt_scores(
    q_ptr,  # [B, H_kv * columns, D], turned for its own slot
    code_ptr,  # uint8 [B, tiles, tile_bytes] from the section's first byte on
    scale_ptr,  # fp16 [B, tiles, groups, 512] if SCALED
    up_ptr,  # [entries, K, D], columns of U times their step, zero for other heads' channels
    bias_ptr,  # [entries, D]: the key bias, zero but in one section of each head
    entry_ptr,  # [entries, 4]: head, first channel to load, segment, scale group
    cos_ptr,  # tables as band_scores has them
    sin_ptr,
    cos_mid_ptr,
    sin_mid_ptr,
    coded_ptr,
    scores_ptr,  # [B, segments, columns, p_room], float32
    scale,
    middle,
    code_batch,
    tile_bytes_64,
    stored_16,
    top_plane_64,
    scale_batch,
    groups,
    p_room,
    segments,
    per_program,
    all_columns,
    columns,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    K: tl.constexpr,
    COLS: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of all queries of one key head from its channels of one section; keys are rebuilt.

    Keys turn by their offset from a part's centre, queries back by the centre.
    """
    entry = tl.program_id(0)
    blocks = tl.cdiv(columns, COLS)
    block = tl.program_id(1) % blocks
    split = tl.program_id(1) // blocks
    row = tl.program_id(2).to(tl.int64)
    stored = stored_16 * 16
    head = tl.load(entry_ptr + entry * 4)
    start = tl.multiple_of(tl.load(entry_ptr + entry * 4 + 1), 16)
    segment = tl.load(entry_ptr + entry * 4 + 2)
    group = tl.load(entry_ptr + entry * 4 + 3)
    coded = tl.load(coded_ptr)
    freq = tl.arange(0, HALF_P)
    real = freq < HALF
    col = block * COLS + tl.arange(0, COLS)
    live = (col < columns)[None, :]
    q_at = q_ptr + (row * all_columns + head * columns + col)[None, :] * (2 * HALF) + freq[:, None]
    q0 = tl.load(q_at, mask=real[:, None] & live, other=0.0).to(tl.float32)
    q1 = tl.load(q_at + HALF, mask=real[:, None] & live, other=0.0).to(tl.float32)
    q_unit = tl.maximum(tl.maximum(_largest(q0), _largest(q1)), 1e-20)
    q0 = q0 / q_unit
    q1 = q1 / q_unit
    j = tl.arange(0, 64)
    cos = tl.load(cos_ptr + j[:, None] * HALF_P + freq[None, :])
    sin = tl.load(sin_ptr + j[:, None] * HALF_P + freq[None, :])
    lane = tl.arange(0, K)
    both = tl.arange(0, 2 * HALF_P)
    place = both // HALF_P * HALF + both % HALF_P
    solid = (both % HALF_P < HALF)[None, :]
    u_at = up_ptr + (entry * K + lane)[:, None] * (2 * HALF) + place[None, :]
    u = tl.load(u_at, mask=solid, other=0.0).to(tl.float16)
    b_at = bias_ptr + entry * (2 * HALF) + freq
    b0 = tl.load(b_at, mask=real, other=0.0).to(tl.float16)[None, :]
    b1 = tl.load(b_at + HALF, mask=real, other=0.0).to(tl.float16)[None, :]
    held = (start + lane < stored)[None, :]
    c_base = code_ptr + row * code_batch + start
    c_lane = j[:, None] * stored + lane[None, :]
    g_base = scale_ptr + row * scale_batch + group * 512
    s_col = scores_ptr + ((row * segments + segment) * columns + col)[None, :] * p_room
    first = (split * per_program).to(tl.int64)
    parts = tl.minimum(tl.cdiv(coded, 128), first + per_program) - first
    for step in tl.range(0, parts, num_stages=STAGES):
        number = first + step
        tile = number // 4
        part = (number % 4).to(tl.int32)
        row_0, row_1, shift_0, shift_1, third_0, third_1 = _part(part, BITS)
        c_at = c_base + tile * (tile_bytes_64 * 64)
        low = tl.load(c_at + row_0 * (64 * stored) + c_lane, mask=held, other=0)
        other = low
        top = low
        if BITS == 8:
            other = tl.load(c_at + row_1 * (64 * stored) + c_lane, mask=held, other=0)
        if BITS == 3:
            top = tl.load(c_at + top_plane_64 * 64 + c_lane, mask=held, other=0)
        cos_mid = tl.load(cos_mid_ptr + number * HALF_P + freq).to(tl.float32)[:, None]
        sin_mid = tl.load(sin_mid_ptr + number * HALF_P + freq).to(tl.float32)[:, None]
        q0_here = (q0 * cos_mid + q1 * sin_mid).to(tl.float16)
        q1_here = (q1 * cos_mid - q0 * sin_mid).to(tl.float16)
        slot = number * 128
        g_at = g_base + tile * (groups * 512) + part * 128

        x_0, x_1 = _both(low, other, top, shift_0, shift_1, third_0, third_1, middle, BITS, PTX)
        k = tl.dot(x_0, u, out_dtype=tl.float16)
        k0, k1 = tl.split(tl.permute(tl.reshape(k, [64, 2, HALF_P]), 0, 2, 1))
        if SCALED:
            g = tl.load(g_at + 64 + j)[:, None]
            k0 *= g
            k1 *= g
        k0 += b0
        k1 += b1
        s = tl.dot(k0 * cos - k1 * sin, q0_here)
        s = tl.dot(k1 * cos + k0 * sin, q1_here, s)
        tl.store(s_col + slot + 64 + j[:, None], s * (scale * q_unit), mask=live)

        k = tl.dot(x_1, u, out_dtype=tl.float16)
        k0, k1 = tl.split(tl.permute(tl.reshape(k, [64, 2, HALF_P]), 0, 2, 1))
        if SCALED:
            g = tl.load(g_at + 63 - j)[:, None]
            k0 *= g
            k1 *= g
        k0 += b0
        k1 += b1
        s = tl.dot(k0 * cos + k1 * sin, q0_here)
        s = tl.dot(k1 * cos - k0 * sin, q1_here, s)
        tl.store(s_col + slot + 63 - j[:, None], s * (scale * q_unit), mask=live)


@triton.jit
def exact_scores(
    q_ptr,  # [B, H_kv * columns, D], turned for its own slot
    x_ptr,  # [B, sinks + window, x_row]: sinks, then the window as a ring
    index_ptr,  # int32 [H_kv, K]: channels of a head, any where its U is zero
    up_ptr,  # [H_kv, K, D]
    bias_ptr,  # [H_kv, D] if BIAS
    cos_ptr,  # [S, D] by slot, float32, RoPE's factor included
    sin_ptr,
    filled_ptr,
    coded_ptr,
    first_ptr,
    mask_ptr,  # [B, Q, slots] if MASK
    p_ptr,  # [B, all columns, p_room]
    top_ptr,  # [B, all columns, tiles]
    mass_ptr,
    scale,
    x_batch,
    x_row,
    p_room,
    n_tiles,
    all_columns,
    columns,
    n_query,
    sinks,
    window,
    mask_batch,
    mask_query,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    K: tl.constexpr,
    COLS: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Scores and softmax of one tile of 64 rows that are not coded, for one key head."""
    head = tl.program_id(0)
    blocks = tl.cdiv(columns, COLS)
    block = tl.program_id(1) % blocks
    tile = tl.program_id(1) // blocks
    row = tl.program_id(2).to(tl.int64)
    filled = tl.load(filled_ptr)
    coded = tl.load(coded_ptr)
    entry = tile * 64 + tl.arange(0, 64)
    # The ring's entry r holds the last slot that is r modulo the window.
    back = filled - 1 - (entry - sinks)
    recent = filled - 1 - tl.maximum(back, 0) % tl.maximum(window, 1)
    ring = entry >= sinks
    slot = tl.where(ring, recent, entry)
    least = tl.where(ring, tl.maximum(coded, sinks), 0)
    held = (entry < sinks + window) & (slot < filled) & (slot >= least) & (~ring | (back >= 0))
    freq = tl.arange(0, HALF_P)
    real = freq < HALF
    col = block * COLS + tl.arange(0, COLS)
    live = col < columns
    q_at = q_ptr + (row * all_columns + head * columns + col)[None, :] * (2 * HALF) + freq[:, None]
    solid = real[:, None] & live[None, :]
    q0 = tl.load(q_at, mask=solid, other=0.0).to(tl.float32)
    q1 = tl.load(q_at + HALF, mask=solid, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.maximum(_largest(q0), _largest(q1)), 1e-20)
    q0 = (q0 / unit).to(tl.float16)
    q1 = (q1 / unit).to(tl.float16)
    lane = tl.arange(0, K)
    channel = tl.load(index_ptr + head * K + lane)
    x_at = x_ptr + row * x_batch + entry[:, None].to(tl.int64) * x_row + channel[None, :]
    x = tl.load(x_at, mask=held[:, None], other=0.0)
    u_at = up_ptr + (head * K + lane)[:, None] * (2 * HALF) + freq[None, :]
    u0 = tl.load(u_at, mask=real[None, :], other=0.0)
    u1 = tl.load(u_at + HALF, mask=real[None, :], other=0.0)
    k0 = tl.dot(x, u0)
    k1 = tl.dot(x, u1)
    if BIAS:
        b_at = bias_ptr + head * (2 * HALF) + freq
        k0 += tl.load(b_at, mask=real, other=0.0).to(tl.float32)[None, :]
        k1 += tl.load(b_at + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
    t_at = slot[:, None].to(tl.int64) * (2 * HALF) + freq[None, :]
    turn = held[:, None] & real[None, :]
    cos = tl.load(cos_ptr + t_at, mask=turn, other=0.0)
    sin = tl.load(sin_ptr + t_at, mask=turn, other=0.0)
    scores = tl.dot((k0 * cos - k1 * sin).to(tl.float16), q0)
    scores = tl.dot((k1 * cos + k0 * sin).to(tl.float16), q1, scores)
    query = col % n_query
    seen = (slot[:, None] < (filled - n_query + 1 + query)[None, :]) & live[None, :]
    seen &= (held & (slot >= tl.load(first_ptr + row)))[:, None]
    if MASK:
        m_at = mask_ptr + row * mask_batch + query[None, :] * mask_query + slot[:, None]
        seen &= tl.load(m_at, mask=seen, other=0) != 0
    scores = tl.where(seen, scores * (scale * unit), float("-inf"))
    top = tl.max(scores, 0)
    p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[None, :])
    own = row * all_columns + head * columns + col
    p_at = p_ptr + own[None, :] * p_room + entry[:, None]
    tl.store(p_at, p.to(tl.float16), mask=live[None, :])
    tl.store(top_ptr + own * n_tiles + tile, top, mask=live)
    tl.store(mass_ptr + own * n_tiles + tile, tl.sum(p, 0), mask=live)


@triton.jit
def mix_codes(
    p_ptr,  # [B, columns, p_room]
    weight_ptr,  # [B, columns, tiles] from the first tile of codes on
    code_ptr,  # uint8 [B, tiles, tile_bytes] from the section's first byte on
    scale_ptr,  # fp16 [B, tiles, groups, 512] from the section's group on, if SCALED
    step_ptr,  # float32 [channels] of the section
    mixed_ptr,  # [B, all splits, columns, room] from the section's first channel on, float32
    coded_ptr,
    middle,
    code_batch,
    tile_bytes_64,
    top_plane_64,
    scale_batch,
    groups,
    room,
    p_room,
    n_tiles,
    per_program,
    columns,
    channels,
    covered,  # channels to write: padding of a row becomes 0
    first_split,
    all_splits,
    SCORE_TILE: tl.constexpr,
    N: tl.constexpr,
    COLS: tl.constexpr,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sum_t weight * p * z_t`` from the codes of one section, over one split of the sequence."""
    blocks = tl.cdiv(columns, COLS)
    block = tl.program_id(0) % blocks
    channel = tl.program_id(0) // blocks * N + tl.arange(0, N)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    coded = tl.load(coded_ptr)
    cols = block * COLS + tl.arange(0, COLS)
    live = (cols < columns)[:, None]
    j = tl.arange(0, 64)
    p_base = p_ptr + (row * columns + cols).to(tl.int64)[:, None] * p_room + j[None, :]
    w_base = weight_ptr + (row * columns + cols) * n_tiles
    c_base = code_ptr + row * code_batch
    c_lane = channel[:, None] * 64 + j[None, :]
    held = (channel < channels)[:, None]
    mixed = tl.zeros([N, COLS], tl.float32)
    first = (split * per_program).to(tl.int64)
    parts = tl.minimum(tl.cdiv(coded, 128), first + per_program) - first
    for step in tl.range(0, parts, num_stages=STAGES):
        number = first + step
        tile = number // 4
        part = (number % 4).to(tl.int32)
        row_0, row_1, shift_0, shift_1, third_0, third_1 = _part(part, BITS)
        c_at = c_base + tile * (tile_bytes_64 * 64)
        low = tl.load(c_at + row_0 * (64 * channels) + c_lane, mask=held, other=0)
        other = low
        top = low
        if BITS == 8:
            other = tl.load(c_at + row_1 * (64 * channels) + c_lane, mask=held, other=0)
        if BITS == 3:
            top = tl.load(c_at + top_plane_64 * 64 + c_lane, mask=held, other=0)
        weight = tl.load(w_base + number * 128 // SCORE_TILE, mask=cols < columns, other=0.0)
        p_0 = tl.load(p_base + number * 128, mask=live, other=0.0) * weight[:, None]
        p_1 = tl.load(p_base + number * 128 + 64, mask=live, other=0.0) * weight[:, None]
        if SCALED:
            g_at = scale_ptr + row * scale_batch + tile * (groups * 512) + part * 128 + j
            p_0 *= tl.load(g_at).to(tl.float32)[None, :]
            p_1 *= tl.load(g_at + 64).to(tl.float32)[None, :]
        z_0, z_1 = _both(low, other, top, shift_0, shift_1, third_0, third_1, middle, BITS, PTX)
        mixed = tl.dot(z_0, tl.trans(p_0.to(tl.float16)), mixed)
        mixed = tl.dot(z_1, tl.trans(p_1.to(tl.float16)), mixed)
    step_of = tl.load(step_ptr + channel, mask=channel < channels, other=0.0)
    mixed = tl.trans(mixed * step_of[:, None])
    at = (row * all_splits + first_split + split) * columns + cols
    m_at = mixed_ptr + at.to(tl.int64)[:, None] * room + channel[None, :]
    tl.store(m_at, mixed, mask=live & (channel < covered)[None, :])
