"""Triton kernels of attention over packed codes; :mod:`.launch` calls them.

What they leave is what the kernels of latent attention leave (docs/kernels.md), and the softmax,
the weights of tiles and what follows the sums are those kernels. Codes lie as
``triton_ops/latent_codes/layout.py`` says: tiles of 512 slots, each of four *parts* of 128.
"""

from __future__ import annotations

import triton
import triton.language as tl

from triton_ops.coded_attention.ptx import plane_bits
from triton_ops.latent_attention.kernels import LIFT


@triton.jit
def _largest(x):
    return tl.max(tl.max(tl.abs(x), 1), 0)


@triton.jit
def _level(bits, middle):
    """``code - middle`` in fp16 of twice the code: it lies in the mantissa of 512.

    A number from 512 to 1023 has steps of 1/2 in fp16, so ``512 + middle`` is exact.
    """
    made = (bits | 0x6000).to(tl.uint16).to(tl.float16, bitcast=True)
    return made - tl.full([1, 1], 512.0 + middle, tl.float16)


@triton.jit
def _unpacked(low, other, top, low_shift, top_shift, middle, BITS: tl.constexpr, PTX: tl.constexpr):
    """Four tensors of levels from words of two bytes: first and second byte of the first token, the
    same of the second. ``PTX`` takes two words at a time; the interpreter has no such thing.
    """
    if PTX is None or BITS == 8:
        width: tl.constexpr = 2 if BITS == 3 else BITS
        mask: tl.constexpr = 2 * (2**width - 1)
        word = (low.to(tl.int32) & 0xFFFF) << 1
        if BITS == 8:
            second = (other.to(tl.int32) & 0xFFFF) << 1
        else:
            second = word >> width
        x_0 = word >> low_shift & mask
        x_1 = word >> low_shift >> 8 & mask
        y_0 = second >> low_shift & mask
        y_1 = second >> low_shift >> 8 & mask
        if BITS == 3:
            third = (top.to(tl.int32) & 0xFFFF) << 3 >> top_shift
            x_0 |= third & 8
            x_1 |= third >> 8 & 8
            y_0 |= third >> 1 & 8
            y_1 |= third >> 9 & 8
        x_0 = _level(x_0, middle)
        x_1 = _level(x_1, middle)
        y_0 = _level(y_0, middle)
        y_1 = _level(y_1, middle)
    elif BITS == 4:
        x_0, x_1, y_0, y_1 = tl.inline_asm_elementwise(
            PTX,
            "=r,=r,=r,=r,r",
            [low],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            True,
            2,
        )
    elif BITS == 2:
        x_0, x_1, y_0, y_1 = tl.inline_asm_elementwise(
            PTX,
            "=r,=r,=r,=r,r,r,r",
            [low, low_shift],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            True,
            2,
        )
    else:
        x_0, x_1, y_0, y_1 = tl.inline_asm_elementwise(
            PTX,
            "=r,=r,=r,=r,r,r,r,r,r,r",
            [low, top, low_shift, top_shift],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            True,
            2,
        )
    return x_0, x_1, y_0, y_1


@triton.jit
def _beside(x, y, N: tl.constexpr, K: tl.constexpr):
    """``[N, K / 2]`` twice as ``[N, K]``; registers stay where they are."""
    return tl.reshape(tl.permute(tl.join(x, y), 0, 2, 1), [N, K])


@triton.jit
def _part(part, BITS: tl.constexpr):
    """Of a part's first 64 tokens (n even): byte row, shift there, shift in the plane of the third
    bit; and the byte row of the others, which in a byte stand above the first.
    """
    if BITS == 8:
        row, shift, other = 2 * part, part * 0, 2 * part + 1
    elif BITS == 4:
        row, shift, other = part, part * 0, part
    else:
        row, shift, other = part // 2, 4 * (part % 2), part // 2
    return row, shift, 2 * part, other


@triton.jit
def _words(at, held, BITS: tl.constexpr, row, other, row_words, top_words):
    """Words of the low plane for both tokens, and of the plane of the third bit."""
    low = tl.load(at + row * row_words, mask=held, other=0)
    second = low
    top = low
    if BITS == 8:
        second = tl.load(at + other * row_words, mask=held, other=0)
    if BITS == 3:
        top = tl.load(at + top_words, mask=held, other=0)
    return low, second, top


@triton.jit
def coded_band_scores(
    q_ptr,  # [B, H, D], turned for its own slot
    code_ptr,  # words of two bytes [B, tiles, tile_bytes / 2] from the section's first on
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
    start = tl.multiple_of(tl.load(start_ptr + piece), 16)
    coded = tl.load(coded_ptr)
    # Even lanes first, then odd ones: the first and the second bytes of words.
    lane = tl.arange(0, N) % (N // 2) * 2 + tl.arange(0, N) // (N // 2)
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
    role_0 = tl.load(role_ptr + piece * N + 2 * tl.arange(0, N // 2))
    role_1 = tl.load(role_ptr + piece * N + 2 * tl.arange(0, N // 2) + 1)
    pick_0 = (role_0[:, None] == col[None, :]).to(tl.float16)
    pick_1 = (role_1[:, None] == col[None, :]).to(tl.float16)
    pick_bias = (role[:, None] == col[None, :] + COLS).to(tl.float16)
    j = tl.arange(0, 64)
    cos = tl.load(cos_ptr + j[:, None] * HALF_P + freq[None, :])
    sin = tl.load(sin_ptr + j[:, None] * HALF_P + freq[None, :])
    word = tl.arange(0, N // 2)
    row_step = stored_16 * 8
    tile_words = tile_bytes_64 * 32
    held = (start // 2 + word < row_step)[None, :]
    c_base = code_ptr + row * (code_batch // 2) + start // 2
    c_lane = j[:, None] * row_step + word[None, :]
    segment = tl.load(segment_ptr + piece * COLS + col)
    s_col = scores_ptr + (row * segments + segment)[None, :] * p_room
    g_col = scale_ptr + row * scale_batch + tl.load(group_ptr + piece * COLS + col)[None, :] * 512
    live = (segment >= 0)[None, :]
    sums: tl.constexpr = tl.float16 if HALF_P == 64 else tl.float32
    first = (split * per_program).to(tl.int64)
    parts = tl.minimum(tl.cdiv(coded, 128), first + per_program) - first
    for step in tl.range(0, parts, num_stages=STAGES):
        number = first + step
        tile = number // 4
        part = (number % 4).to(tl.int32)
        row_0, shift, third, row_1 = _part(part, BITS)
        c_at = c_base + tile * tile_words + c_lane
        low, second, top = _words(c_at, held, BITS, row_0, row_1, 64 * row_step, top_plane_64 * 32)
        cos_mid = tl.load(cos_mid_ptr + number * HALF_P + freq)[:, None]
        sin_mid = tl.load(sin_mid_ptr + number * HALF_P + freq)[:, None]
        even = tl.dot(cos, a * cos_mid + b * sin_mid, out_dtype=sums)
        odd = tl.dot(sin, b * cos_mid - a * sin_mid, out_dtype=sums)
        after = (even + odd).to(tl.float16)
        before = (even - odd).to(tl.float16)
        x_0, x_1, y_0, y_1 = _unpacked(low, second, top, shift, third, middle, BITS, PTX)
        after_0, after_1 = tl.split(tl.permute(tl.reshape(after, [64, 2, N // 2]), 0, 2, 1))
        before_0, before_1 = tl.split(tl.permute(tl.reshape(before, [64, 2, N // 2]), 0, 2, 1))
        s_after = tl.dot(x_0 * after_0, pick_0)
        s_after = tl.dot(x_1 * after_1, pick_1, s_after)
        s_before = tl.dot(y_0 * before_0, pick_0)
        s_before = tl.dot(y_1 * before_1, pick_1, s_before)
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
    code_ptr,  # words of two bytes [B, tiles, tile_bytes / 2] from the section's first on
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
    word = tl.arange(0, K // 2)
    # Even channels, then odd ones: the first and then the second bytes of words.
    lane = tl.arange(0, K) % (K // 2) * 2 + tl.arange(0, K) // (K // 2)
    both = tl.arange(0, 2 * HALF_P)
    place = both // HALF_P * HALF + both % HALF_P
    solid = (both % HALF_P < HALF)[None, :]
    u_at = up_ptr + (entry * K + lane)[:, None] * (2 * HALF) + place[None, :]
    u = tl.load(u_at, mask=solid, other=0.0).to(tl.float16)
    b_at = bias_ptr + entry * (2 * HALF) + freq
    b0 = tl.load(b_at, mask=real, other=0.0).to(tl.float16)[None, :]
    b1 = tl.load(b_at + HALF, mask=real, other=0.0).to(tl.float16)[None, :]
    row_step = stored_16 * 8
    tile_words = tile_bytes_64 * 32
    held = (start // 2 + word < row_step)[None, :]
    c_base = code_ptr + row * (code_batch // 2) + start // 2
    c_lane = j[:, None] * row_step + word[None, :]
    g_base = scale_ptr + row * scale_batch + group * 512
    s_col = scores_ptr + ((row * segments + segment) * columns + col)[None, :] * p_room
    first = (split * per_program).to(tl.int64)
    parts = tl.minimum(tl.cdiv(coded, 128), first + per_program) - first
    for step in tl.range(0, parts, num_stages=STAGES):
        number = first + step
        tile = number // 4
        part = (number % 4).to(tl.int32)
        row_0, shift, third, row_1 = _part(part, BITS)
        c_at = c_base + tile * tile_words + c_lane
        low, second, top = _words(c_at, held, BITS, row_0, row_1, 64 * row_step, top_plane_64 * 32)
        cos_mid = tl.load(cos_mid_ptr + number * HALF_P + freq).to(tl.float32)[:, None]
        sin_mid = tl.load(sin_mid_ptr + number * HALF_P + freq).to(tl.float32)[:, None]
        q0_here = (q0 * cos_mid + q1 * sin_mid).to(tl.float16)
        q1_here = (q1 * cos_mid - q0 * sin_mid).to(tl.float16)
        slot = number * 128
        g_at = g_base + tile * (groups * 512) + part * 128

        x_0, x_1, y_0, y_1 = _unpacked(low, second, top, shift, third, middle, BITS, PTX)
        k = tl.dot(_beside(x_0, x_1, 64, K), u, out_dtype=tl.float16)
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

        k = tl.dot(_beside(y_0, y_1, 64, K), u, out_dtype=tl.float16)
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
    mask_slots,
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
    x = tl.load(x_at, mask=held[:, None], other=0.0).to(up_ptr.dtype.element_ty)
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
        seen = tl.load(m_at, mask=seen & (slot < mask_slots)[:, None], other=0) != 0
    scores = tl.where(seen, scores * (scale * unit), float("-inf"))
    top = tl.max(scores, 0)
    p = tl.exp2(scores - (tl.where(top == float("-inf"), 0.0, top) - LIFT)[None, :])
    own = row * all_columns + head * columns + col
    p_at = p_ptr + own[None, :] * p_room + entry[:, None]
    tl.store(p_at, p.to(tl.float16), mask=live[None, :])
    tl.store(top_ptr + own * n_tiles + tile, top, mask=live)
    tl.store(mass_ptr + own * n_tiles + tile, tl.sum(p, 0), mask=live)


_bits_ptx = triton.constexpr_function(plane_bits)


@triton.jit
def _bits(words, SHIFT: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr):
    """Bits of 64 slots from words ``[N, 32]``, as fp16 ``[N, 64]`` below the normal numbers.

    A code's bits are the mantissa of such a number: nothing has to be added or taken off.
    """
    if PTX:
        x_0, x_1 = tl.inline_asm_elementwise(
            _bits_ptx(SHIFT, MASK),
            "=r,=r,r",
            [words],
            (tl.float16, tl.float16),
            True,
            2,
        )
    else:
        bits = (words.to(tl.int32) & 0xFFFF) << 1 >> 1 + SHIFT
        x_0 = (bits & MASK).to(tl.uint16).to(tl.float16, bitcast=True)
        x_1 = (bits >> 8 & MASK).to(tl.uint16).to(tl.float16, bitcast=True)
    return _beside(x_0, x_1, N, 64)


@triton.jit
def _codes_64(
    words,
    top,
    NUMBER: tl.constexpr,  # of the 64 slots within the 512 of a byte of the top plane
    BITS: tl.constexpr,
    MIDDLE_2: tl.constexpr,
    N: tl.constexpr,
    PTX: tl.constexpr,
):
    """Codes of 64 slots in units of fp16's smallest number, or twice the codes less MIDDLE_2."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    TWICE: tl.constexpr = 1 if MIDDLE_2 else 0  # the middle may end in a half
    x = _bits(words, NUMBER * LOW % 8 - TWICE, (2**LOW - 1) << TWICE, N, PTX)
    if BITS == 3:
        place = tl.full([1, 1], 2.0 ** (2 + TWICE - NUMBER), tl.float16)
        x += _bits(top, 0, 1 << NUMBER, N, PTX) * place
    if MIDDLE_2:
        x -= tl.full([1, 1], MIDDLE_2 * 2.0**-24, tl.float16)
    return x


@triton.jit
def mix_codes(
    p_ptr,  # [B, columns, p_room]
    weight_ptr,  # [B, columns, tiles] from the first tile of codes on
    mass_ptr,  # likewise
    code_ptr,  # words of two bytes [B, tiles, tile_bytes / 2] from the section's first on
    scale_ptr,  # fp16 [B, tiles, groups, 512] from the section's group on, if SCALED
    step_ptr,  # float32 [channels] of the section
    mixed_ptr,  # [B, all splits, columns, room] from the section's first channel on, float32
    coded_ptr,
    middle,  # code that stands for 0
    code_batch,
    tile_bytes_64,
    top_plane_64,  # bytes to the plane of the third bit, over 64
    scale_batch,
    groups,
    room,
    p_room,
    n_tiles,
    per_program,  # tiles of 512 slots
    columns,
    channels,
    covered,  # channels to write: padding of a row becomes 0
    first_split,
    all_splits,
    N: tl.constexpr,
    COLS: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE_2: tl.constexpr,  # twice middle if SCALED, else 0
    K: tl.constexpr,  # slots of a product: 64, or 128 where a row of bytes has them
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sum_t weight * p * z_t`` from one section, over one split of the sequence.

    p goes into the product as the softmax left it; weights, of tiles of 256 slots, fall on the sums
    of such a tile, and what stands for 0 on the mass of p, which is all it takes.
    """
    blocks = tl.cdiv(columns, COLS)
    block = tl.program_id(0) % blocks
    channel = tl.program_id(0) // blocks * N + tl.arange(0, N)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    coded = tl.load(coded_ptr)
    cols = block * COLS + tl.arange(0, COLS)
    live = (cols < columns)[:, None]
    zeros = tl.zeros([COLS], tl.int64)
    j = tl.arange(0, 32)
    p_base = p_ptr + (row * columns + cols).to(tl.int64)[:, None] * p_room
    w_at = (row * columns + cols) * n_tiles
    c_base = code_ptr + row * (code_batch // 2)
    c_lane = channel[:, None] * 32 + j[None, :]
    held = (channel < channels)[:, None]
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    ROWS: tl.constexpr = LOW // 2  # of bytes of the low plane in 256 slots
    PER: tl.constexpr = 4 // ROWS  # times 64 slots in a row of bytes
    PAIRS: tl.constexpr = K == 128 and PER > 1  # whether a product takes two of them
    # The bits of a byte of the top plane are of 512 slots, and shifts have to be known.
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    mixed = tl.zeros([N, COLS], tl.float32)
    mass = tl.zeros([COLS], tl.float32)
    first = (2 * split * per_program).to(tl.int64)
    units = tl.minimum(tl.cdiv(coded, 256), first + 2 * per_program)
    for unit in tl.range(first, units, HALVES, num_stages=STAGES):
        c_at = c_base + unit // 2 * (tile_bytes_64 * 32) + c_lane
        row_at = c_at + unit % 2 * (ROWS * 32 * channels)
        g_at = scale_ptr + row * scale_batch + unit // 2 * (groups * 512)
        if BITS == 3:
            top = tl.load(c_at + top_plane_64 * 32, mask=held, other=0)
        for half in tl.static_range(HALVES):
            told = (cols < columns) & (unit + half + zeros < units)
            weight = tl.load(weight_ptr + w_at + unit + half, mask=told, other=0.0)
            if not SCALED:
                mass += weight * tl.load(mass_ptr + w_at + unit + half, mask=told, other=0.0)
            part = tl.zeros([N, COLS], tl.float32)
            for r in tl.static_range(ROWS):
                words = tl.load(row_at + (half * ROWS + r) * (32 * channels), mask=held, other=0)
                if BITS != 3:
                    top = words
                for m in tl.static_range(0, PER, 2 if PAIRS else 1):
                    slot = (unit + half) * 256 + (r * PER + m) * 64
                    x = _codes_64(words, top, half * 4 + m, BITS, MIDDLE_2, N, PTX)
                    if PAIRS:
                        y = _codes_64(words, top, half * 4 + m + 1, BITS, MIDDLE_2, N, PTX)
                        x = _beside(x, y, N, 128)
                    spot = tl.arange(0, 128 if PAIRS else 64)
                    # The softmax writes whole tiles of 256 slots, and no others.
                    p = tl.load(p_base + slot + spot[None, :], mask=told[:, None], other=0.0)
                    if SCALED:
                        p = _scaled(p, g_at + slot % 512 + spot)
                    part = tl.dot(x, tl.trans(p), part)
            mixed += part * weight[None, :]
    step_of = tl.load(step_ptr + channel, mask=channel < channels, other=0.0)
    mixed *= 2.0 ** (23 + LIFT) if SCALED else 2.0**24
    mixed -= middle * mass[None, :]
    mixed = tl.trans(mixed * step_of[:, None])
    at = (row * all_splits + first_split + split) * columns + cols
    m_at = mixed_ptr + at.to(tl.int64)[:, None] * room + channel[None, :]
    tl.store(m_at, mixed, mask=live & (channel < covered)[None, :])


@triton.jit
def _scaled(p, g_at):
    """p times the scales of its slots; as a scale may be large, p loses its lift."""
    return (p.to(tl.float32) * (tl.load(g_at).to(tl.float32) * 2.0**-LIFT)[None, :]).to(tl.float16)
