"""Triton kernels of latent attention; :mod:`.launch` calls them, docs/kernels.md explains them.

Scores are made by :func:`band_scores` or :func:`rebuilt_scores`. A tile of them at a time,
:func:`tile_softmax` leaves ``p = exp2(score - top + LIFT)`` in fp16,
``top`` and ``mass = sum p`` per query; :func:`tile_weights` turns the tops into weights of tiles,
:func:`mix_values` sums ``weight * p * z`` over splits of the sequence, :func:`sum_splits` adds the
splits up and :func:`expand_values` applies U. Offsets that grow with the context are 64-bit. A
query column is a (head, query token) pair, ``head * Q + token``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# p is at most 2^LIFT: times a tile's weight it stays in fp16 down to 2^-(24 + LIFT) of the largest,
# 27 nats, where p up to 1 would lose what lies 17 below a sink. Dividing by the mass, which has the
# same factor, takes it out again. Sums are float32.
LIFT = tl.constexpr(15.0)


@triton.jit
def _largest(x):
    return tl.max(tl.max(tl.abs(x), 1), 0)


@triton.jit
def band_scores(
    q_ptr,  # [B, H, D], turned for its own slot
    x_ptr,  # [B, S, x_row], latents of all key heads; padding within a row is finite
    up_ptr,  # [pieces, N, D], the column of U, or the key bias, of each lane
    lane_ptr,  # [pieces, N], see Band.lanes
    piece_ptr,  # [pieces, 4]: channel to load from, first head, heads, first segment
    cos_ptr,  # [T / 2, HALF_P] of j + 1/2, fp16
    sin_ptr,
    cos_mid_ptr,  # [tiles, HALF_P] of the tiles' centres, times RoPE's factor, fp16
    sin_mid_ptr,
    filled_ptr,  # [1] slots filled
    scores_ptr,  # [B, segments, p_room], float32
    scale,  # of scores, times log2(e)
    x_batch,
    x_row_8,  # row stride over 8: rows begin on 16 bytes
    p_room,
    segments,
    per_program,
    heads,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    COLS: tl.constexpr,
    BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of one query token, one query head per key head, without rebuilt keys.

    With slot ``t = c + j``, ``z_t = sum_i cos(j th_i) A'_i + sin(j th_i) B'_i`` where A', B' are
    A, B of docs/design.md section 6 turned by the tile's centre c. Slots ``c + j`` and ``c - j``
    share the even and the odd sum, which halves the work. A program has one piece of at most N
    lanes and COLS heads; a head cut in two leaves a segment in each of its pieces. A key bias is
    a lane whose latent is 1.
    """
    x_row = x_row_8 * 8
    piece = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    start = tl.multiple_of(tl.load(piece_ptr + piece * 4), 8)
    head = tl.load(piece_ptr + piece * 4 + 1)
    count = tl.load(piece_ptr + piece * 4 + 2)
    segment = tl.load(piece_ptr + piece * 4 + 3)
    filled = tl.load(filled_ptr)
    lane = tl.arange(0, N)
    role = tl.load(lane_ptr + piece * N + lane)
    freq = tl.arange(0, HALF_P)
    both = (freq < HALF)[:, None] & (role >= 0)[None, :]
    u_at = up_ptr + (piece * N + lane)[None, :] * (2 * HALF) + freq[:, None]
    q_at = q_ptr + (row * heads + head + role % COLS)[None, :] * (2 * HALF) + freq[:, None]
    u0 = tl.load(u_at, mask=both, other=0.0).to(tl.float32)
    u1 = tl.load(u_at + HALF, mask=both, other=0.0).to(tl.float32)
    q0 = tl.load(q_at, mask=both, other=0.0).to(tl.float32)
    q1 = tl.load(q_at + HALF, mask=both, other=0.0).to(tl.float32)
    a = q0 * u0 + q1 * u1
    b = q1 * u0 - q0 * u1
    # In units of the largest, so that fp16 holds them whatever the query's size.
    unit = tl.maximum(tl.maximum(_largest(a), _largest(b)), 1e-20)
    a = (a / unit).to(tl.float16)
    b = (b / unit).to(tl.float16)

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    col = tl.arange(0, COLS)
    pick = (role[:, None] == col[None, :]).to(dtype)
    pick_bias = (role[:, None] == col[None, :] + COLS).to(tl.float16)
    j = tl.arange(0, T // 2)
    cos = tl.load(cos_ptr + j[:, None] * HALF_P + freq[None, :])
    sin = tl.load(sin_ptr + j[:, None] * HALF_P + freq[None, :])
    # In fp16 where tables are wide: half the registers, so that three programs run at once.
    sums: tl.constexpr = tl.float16 if HALF_P == 64 else tl.float32
    stored = (start + lane < x_row)[None, :]  # groups of 8, so that loads stay 16 bytes wide
    x_base = x_ptr + row * x_batch + start
    x_after_lane = (T // 2 + j)[:, None] * x_row + lane[None, :]
    x_before_lane = (T // 2 - 1 - j)[:, None] * x_row + lane[None, :]
    s_base = scores_ptr + (row * segments + segment) * p_room
    s_after_lane = col[None, :] * p_room + (T // 2 + j)[:, None]
    s_before_lane = col[None, :] * p_room + (T // 2 - 1 - j)[:, None]
    live = (col < count)[None, :]
    low = (split * per_program).to(tl.int64)
    tiles = tl.minimum(tl.cdiv(filled, T), low + per_program) - low
    for step in tl.range(0, tiles, num_stages=STAGES):
        tile = low + step
        x_at = x_base + tile * T * x_row
        x_after = tl.load(x_at + x_after_lane, mask=stored, other=0.0)
        x_before = tl.load(x_at + x_before_lane, mask=stored, other=0.0)
        cos_mid = tl.load(cos_mid_ptr + tile * HALF_P + freq)[:, None]
        sin_mid = tl.load(sin_mid_ptr + tile * HALF_P + freq)[:, None]
        even = tl.dot(cos, a * cos_mid + b * sin_mid, out_dtype=sums)
        odd = tl.dot(sin, b * cos_mid - a * sin_mid, out_dtype=sums)
        after = even + odd
        before = even - odd
        s_after = tl.dot(x_after * after.to(dtype), pick)
        s_before = tl.dot(x_before * before.to(dtype), pick)
        if BIAS:
            s_after = tl.dot(after.to(tl.float16), pick_bias, s_after)
            s_before = tl.dot(before.to(tl.float16), pick_bias, s_before)
        s_at = s_base + tile * T
        tl.store(s_at + s_after_lane, s_after * (scale * unit), mask=live)
        tl.store(s_at + s_before_lane, s_before * (scale * unit), mask=live)


@triton.jit
def tile_softmax(
    segment_ptr,  # [H_kv, 2] if MOST > 1: first segment, segments
    scores_ptr,  # [B, segments, columns, p_room], float32; without a table a segment a key head
    filled_ptr,  # [1] slots filled
    end_ptr,  # [1] slots from here on are left out, at most those filled
    first_ptr,  # [B] first slot of each row
    mask_ptr,  # [B, Q, slots] if MASK
    p_ptr,  # [B, all columns, p_room]
    top_ptr,  # [B, all columns, tiles], as mass: from the tile of slot 0 on
    mass_ptr,
    mask_batch,
    mask_query,
    mask_slots,  # that the mask has; those beyond are hidden
    p_room,
    n_tiles,
    segments,
    all_columns,
    columns,  # of a key head, that stand in each of its segments
    n_query,
    begin,  # slots before are left out
    T: tl.constexpr,
    COLS: tl.constexpr,
    MOST: tl.constexpr,  # segments of a column
    MASK: tl.constexpr,
):
    """Adds up a tile's segments and masks; leaves p, top and mass."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tile = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    filled = tl.load(filled_ptr)
    end = tl.load(end_ptr)
    if tile * T < end:
        live = cols < all_columns
        slots = tile * T + tl.arange(0, T)
        # Query i of n sees the slots filled before it and its own.
        limit = filled - n_query + 1 + cols % n_query
        here = (slots >= tl.maximum(tl.load(first_ptr + row), begin)) & (slots < end)
        here = here[None, :]
        seen = (slots[None, :] < limit[:, None]) & here & live[:, None]
        if MASK:
            m_at = mask_ptr + row * mask_batch + (cols % n_query)[:, None] * mask_query
            told = seen & (slots < mask_slots)[None, :]
            seen = tl.load(m_at + slots[None, :], mask=told, other=0) != 0
        # Unmasked along the slots, which would make the loads narrow: what is unseen is dropped.
        if MOST == 1:
            at = scores_ptr + (row * all_columns + cols)[:, None] * p_room + slots[None, :]
            scores = tl.load(at, mask=live[:, None], other=0.0)
        else:
            head = cols // columns
            own = tl.load(segment_ptr + head * 2, mask=live, other=0)
            many = tl.load(segment_ptr + head * 2 + 1, mask=live, other=0)
            scores = tl.zeros([COLS, T], tl.float32)
            for piece in tl.static_range(MOST):
                line = (row * segments + own + piece) * columns + cols % columns
                at = scores_ptr + line[:, None] * p_room + slots[None, :]
                scores += tl.load(at, mask=(piece < many)[:, None], other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.max(scores, 1)
        p = tl.exp2(scores - (tl.where(top == float("-inf"), 0.0, top) - LIFT)[:, None])
        p = p.to(tl.float16)
        p_at = p_ptr + (row * all_columns + cols).to(tl.int64)[:, None] * p_room + slots[None, :]
        tl.store(p_at, p, mask=live[:, None])
        at = (row * all_columns + cols) * n_tiles + tile
        tl.store(top_ptr + at, top, mask=live)
        # The mass of what is stored: that is what the values are mixed by.
        tl.store(mass_ptr + at, tl.sum(p.to(tl.float32), 1), mask=live)


@triton.jit
def rebuilt_scores(
    q_ptr,  # [B, H_kv * columns, D], turned for its own slot
    x_ptr,  # [B, S, x_row]; padding within a row is finite
    up_ptr,  # [entries, K + MORE, D], row c the column of U of the entry's channel c, else 0
    bias_ptr,  # [H_kv, D] if BIAS
    entry_ptr,  # [entries, 2]: head, first channel to load (a multiple of 8)
    cos_ptr,  # [T, HALF_P] of j, fp16
    sin_ptr,
    cos_at_ptr,  # [tiles, HALF_P] of the tiles' first slots, times RoPE's factor, float32
    sin_at_ptr,
    filled_ptr,
    scores_ptr,  # [B, H_kv * columns, p_room], float32
    scale,
    x_batch,
    x_row_8,
    p_room,
    per_program,
    all_columns,
    columns,  # query columns of one key head: G * Q
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    MORE: tl.constexpr,
    BIAS: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of all queries of one key head; keys are rebuilt in registers.

    Keys turn by their offset within the tile, the queries back by the tile's first slot. A head's
    channels are K and MORE side by side, so that ranks need not fill a power of two.
    """
    x_row = x_row_8 * 8
    entry = tl.program_id(0)
    blocks = tl.cdiv(columns, COLS)
    block = tl.program_id(1) % blocks
    split = tl.program_id(1) // blocks
    row = tl.program_id(2).to(tl.int64)
    head = tl.load(entry_ptr + entry * 2)
    start = tl.multiple_of(tl.load(entry_ptr + entry * 2 + 1), 8)
    filled = tl.load(filled_ptr)
    freq = tl.arange(0, HALF_P)
    real = freq < HALF
    col = block * COLS + tl.arange(0, COLS)
    live = col < columns

    q_at = q_ptr + (row * all_columns + head * columns + col)[None, :] * (2 * HALF) + freq[:, None]
    held = real[:, None] & live[None, :]
    q0 = tl.load(q_at, mask=held, other=0.0).to(tl.float32)
    q1 = tl.load(q_at + HALF, mask=held, other=0.0).to(tl.float32)
    # In units of the largest, so that fp16 holds them whatever the query's size.
    unit = tl.maximum(tl.maximum(_largest(q0), _largest(q1)), 1e-20)
    q0 = q0 / unit
    q1 = q1 / unit
    j = tl.arange(0, T)
    cos = tl.load(cos_ptr + j[:, None] * HALF_P + freq[None, :])
    sin = tl.load(sin_ptr + j[:, None] * HALF_P + freq[None, :])
    channel = start + tl.arange(0, K)
    stored = (channel < x_row)[None, :]  # groups of 8, so that loads stay 16 bytes wide
    both = tl.arange(0, 2 * HALF_P)
    place = both // HALF_P * HALF + both % HALF_P
    u_base = up_ptr + entry * (K + MORE) * (2 * HALF) + place[None, :]
    solid = (both % HALF_P < HALF)[None, :]
    u = tl.load(u_base + tl.arange(0, K)[:, None] * (2 * HALF), mask=solid, other=0.0)
    x_base = x_ptr + row * x_batch + start
    x_lane = j[:, None] * x_row + tl.arange(0, K)[None, :]
    if MORE:
        more = tl.arange(0, MORE)
        more_stored = (start + K + more < x_row)[None, :]
        u_more = tl.load(u_base + (K + more)[:, None] * (2 * HALF), mask=solid, other=0.0)
        more_lane = j[:, None] * x_row + (K + more)[None, :]
    # bf16 products have no sums in fp16, which take half the registers.
    sums: tl.constexpr = tl.float16 if x_ptr.dtype.element_ty == tl.float16 else tl.float32
    b_at = bias_ptr + head * (2 * HALF) + freq
    b0 = tl.load(b_at, mask=real & BIAS, other=0.0).to(sums)[None, :]
    b1 = tl.load(b_at + HALF, mask=real & BIAS, other=0.0).to(sums)[None, :]
    s_base = scores_ptr + (row * all_columns + head * columns + block * COLS) * p_room
    s_lane = tl.arange(0, COLS)[None, :] * p_room + j[:, None]
    low = (split * per_program).to(tl.int64)
    tiles = tl.minimum(tl.cdiv(filled, T), low + per_program) - low
    for step in tl.range(0, tiles, num_stages=STAGES):
        tile = low + step
        x_at = x_base + tile * T * x_row
        x = tl.load(x_at + x_lane, mask=stored, other=0.0)
        cos_at = tl.load(cos_at_ptr + tile * HALF_P + freq)[:, None]
        sin_at = tl.load(sin_at_ptr + tile * HALF_P + freq)[:, None]
        q0_here = (q0 * cos_at + q1 * sin_at).to(tl.float16)
        q1_here = (q1 * cos_at - q0 * sin_at).to(tl.float16)
        k = tl.dot(x, u, out_dtype=sums)
        if MORE:
            x_more = tl.load(x_at + more_lane, mask=more_stored, other=0.0)
            k = tl.dot(x_more, u_more, k, out_dtype=sums)
        # One product for both halves reads x from shared memory once; the split moves nothing.
        k0, k1 = tl.split(tl.permute(tl.reshape(k, [T, 2, HALF_P]), 0, 2, 1))
        k0 = (k0 + b0).to(tl.float16)
        k1 = (k1 + b1).to(tl.float16)
        scores = tl.dot(k0 * cos - k1 * sin, q0_here)
        scores = tl.dot(k1 * cos + k0 * sin, q1_here, scores)
        tl.store(s_base + tile * T + s_lane, scores * (scale * unit), mask=live[None, :])


@triton.jit
def tile_weights(
    top_ptr,  # [B * columns, tiles]; becomes exp2(top - largest)
    mass_ptr,
    total_ptr,  # [B * columns]
    end_ptr,  # [1] slots in tiles of T
    n_tiles,
    before,  # tiles that stand before that of slot 0
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of tiles relative to the largest score, and the denominator, times 2^LIFT as p is."""
    row = tl.program_id(0).to(tl.int64)
    used = before + tl.cdiv(tl.load(end_ptr), T)
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, used, BLOCK):
        at = row * n_tiles + start + lane
        largest = tl.maximum(
            largest, tl.load(top_ptr + at, mask=start + lane < used, other=float("-inf"))
        )
    peak = tl.max(largest, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, used, BLOCK):
        at = row * n_tiles + start + lane
        here = start + lane < used
        weight = tl.exp2(tl.load(top_ptr + at, mask=here, other=float("-inf")) - peak)
        total += weight * tl.load(mass_ptr + at, mask=here, other=0.0)
        tl.store(top_ptr + at, weight, mask=here)
    tl.store(total_ptr + row, tl.sum(total, 0))


@triton.jit
def mix_values(
    p_ptr,  # [B, columns, p_room]
    weight_ptr,  # [B, columns, tiles]
    z_ptr,  # [B, S, z_row]
    mixed_ptr,  # [B, all splits, columns, room], float32
    filled_ptr,
    z_batch,
    z_row_8,
    room_8,
    p_room,
    n_tiles,
    per_program,
    columns,
    all_splits,  # of which these are the first
    SCORE_TILE: tl.constexpr,
    T: tl.constexpr,
    N: tl.constexpr,
    COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sum_t weight * p * z_t`` over one split of the sequence, for a block of channels."""
    z_row = z_row_8 * 8
    room = room_8 * 8
    blocks = tl.cdiv(columns, COLS)
    block = tl.program_id(0) % blocks
    channel = tl.program_id(0) // blocks * N + tl.arange(0, N)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    filled = tl.load(filled_ptr)
    cols = block * COLS + tl.arange(0, COLS)
    live = cols < columns
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    p_base = p_ptr + (row * columns + cols).to(tl.int64)[:, None] * p_room
    w_base = weight_ptr + (row * columns + cols) * n_tiles
    z_base = z_ptr + row * z_batch + channel[None, :]
    j = tl.arange(0, T)
    mixed = tl.zeros([N, COLS], tl.float32)
    last = tl.minimum(tl.cdiv(filled, T), (split + 1) * per_program)
    for tile in tl.range(split * per_program, last, num_stages=STAGES):
        slots = tile * T + j
        z = tl.load(
            z_base + slots.to(tl.int64)[:, None] * z_row,
            mask=(slots < filled)[:, None] & (channel < room)[None, :],
            other=0.0,
        )
        p = tl.load(p_base + slots[None, :], mask=live[:, None], other=0.0)
        weight = tl.load(w_base + tile * T // SCORE_TILE, mask=live, other=0.0)
        p = (p * weight[:, None]).to(dtype)
        mixed = tl.dot(tl.trans(z), tl.trans(p), mixed)
    mixed = tl.trans(mixed)
    line = (row * all_splits + split) * columns + cols
    at = line.to(tl.int64)[:, None] * room + channel[None, :]
    tl.store(mixed_ptr + at, mixed, mask=live[:, None] & (channel < room)[None, :])


@triton.jit
def sum_splits(
    mixed_ptr,  # [B, splits, columns, room], float32
    total_ptr,  # [B, columns]
    out_ptr,  # [B, columns, room]
    splits,
    columns,
    room,
    N: tl.constexpr,
):
    """Sum the splits of one query column and divide by the softmax's denominator."""
    col = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * N + tl.arange(0, N)
    here = channel < room
    at = mixed_ptr + (row * splits * columns + col) * room + channel
    out = tl.zeros([N], tl.float32)
    for _ in range(splits):
        out += tl.load(at, mask=here, other=0.0)
        at += columns * room
    total = tl.load(total_ptr + row * columns + col)
    out = out * tl.where(total > 0, 1.0 / total, 0.0)  # queries that may attend to nothing give 0
    tl.store(
        out_ptr + (row * columns + col) * room + channel,
        out.to(out_ptr.dtype.element_ty),
        mask=here,
    )


@triton.jit
def expand_values(
    mixed_ptr,  # [B, all columns, room]
    up_ptr,  # [H_kv, D, room]
    out_ptr,  # [B, all columns, D]
    batch,
    all_columns,
    columns,  # of one key head
    room_8,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``U_h mixed`` for one head's columns of several rows of the batch."""
    room = room_8 * 8
    head = tl.program_id(0)
    dim = tl.program_id(1) * N + tl.arange(0, N)
    pair = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row = pair // columns
    col = head * columns + pair % columns
    live = row < batch
    lane = tl.arange(0, K)
    out = tl.zeros([ROWS, N], tl.float32)
    m_at = mixed_ptr + ((row.to(tl.int64) * all_columns + col) * room)[:, None] + lane[None, :]
    u_at = up_ptr + ((head.to(tl.int64) * DIM + dim) * room)[None, :] + lane[:, None]
    for start in tl.range(0, room, K, num_stages=STAGES):
        here = start + lane < room
        mixed = tl.load(m_at + start, mask=live[:, None] & here[None, :], other=0.0)
        up = tl.load(u_at + start, mask=here[:, None] & (dim < DIM)[None, :], other=0.0)
        out = tl.dot(mixed, up, out)
    at = ((row.to(tl.int64) * all_columns + col) * DIM)[:, None] + dim[None, :]
    tl.store(
        out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live[:, None] & (dim < DIM)[None, :]
    )
