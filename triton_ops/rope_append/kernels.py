"""Triton kernel that turns queries and stores latents; :mod:`.op` calls it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(
    q_ptr,  # [H, D] of one token
    turned_ptr,  # [H, n, D] from the token on
    cos_ptr,
    sin_ptr,
    slot,
    head,  # [HEADS]
    q_head,
    heads,
    n_new,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
):
    """Queries of some heads of one token, turned for its slot."""
    freq = tl.arange(0, HALF_P)
    real = freq < HALF
    cos = tl.load(cos_ptr + slot * (2 * HALF) + freq, mask=real, other=0.0)[None, :]
    sin = tl.load(sin_ptr + slot * (2 * HALF) + freq, mask=real, other=0.0)[None, :]
    held = (head < heads)[:, None] & real[None, :]
    head = head.to(tl.int64)[:, None]
    q_at = q_ptr + head * q_head + freq[None, :]
    q0 = tl.load(q_at, mask=held, other=0.0).to(tl.float32)
    q1 = tl.load(q_at + HALF, mask=held, other=0.0).to(tl.float32)
    dtype: tl.constexpr = turned_ptr.dtype.element_ty
    out_at = turned_ptr + head * n_new * (2 * HALF) + freq[None, :]
    tl.store(out_at, (q0 * cos - q1 * sin).to(dtype), mask=held)
    tl.store(out_at + HALF, (q1 * cos + q0 * sin).to(dtype), mask=held)


@triton.jit
def _copy(source, target, first, width, N: tl.constexpr):
    lane = first + tl.arange(0, N)
    held = lane < width
    numbers = tl.load(source + lane, mask=held)
    tl.store(target + lane, numbers.to(target.dtype.element_ty), mask=held)


@triton.jit
def rope_append(
    q_ptr,  # [B, H, n, D], numbers of a head side by side
    keys_ptr,  # [B, n, R], numbers of a token side by side
    values_ptr,  # [B, n, r_v], likewise
    x_ptr,  # [B, S, at least R], buffer of key latents
    z_ptr,  # [B, S, at least r_v], buffer of value latents
    cos_ptr,  # [S, D], float32, halves equal
    sin_ptr,
    filled_ptr,  # [1] slots filled, the new tokens included
    turned_ptr,  # [B, H, n, D] without gaps
    q_batch,
    q_head,
    q_token,
    keys_batch,
    keys_token,
    values_batch,
    values_token,
    x_batch,
    x_slot,
    z_batch,
    z_slot,
    heads,
    n_new,
    key_width,
    value_width,
    HALF: tl.constexpr,
    HALF_P: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
):
    """A program has one token, and of it HEADS query heads or N channels of keys or of values."""
    at = tl.program_id(0)
    row = (at // n_new).to(tl.int64)
    token = (at % n_new).to(tl.int64)
    slot = tl.load(filled_ptr).to(tl.int64) - n_new + token
    part = tl.program_id(1)
    head_parts = tl.cdiv(heads, HEADS)
    key_parts = tl.cdiv(key_width, N)
    if part < head_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        q_at = q_ptr + row * q_batch + token * q_token
        out_at = turned_ptr + (row * heads * n_new + token) * (2 * HALF)
        turn(q_at, out_at, cos_ptr, sin_ptr, slot, head, q_head, heads, n_new, HALF, HALF_P)
    elif part < head_parts + key_parts:
        source = keys_ptr + row * keys_batch + token * keys_token
        target = x_ptr + row * x_batch + slot * x_slot
        _copy(source, target, (part - head_parts) * N, key_width, N)
    else:
        source = values_ptr + row * values_batch + token * values_token
        target = z_ptr + row * z_batch + slot * z_slot
        _copy(source, target, (part - head_parts - key_parts) * N, value_width, N)
