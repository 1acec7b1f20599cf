"""PTX that turns two words of two packed bytes into fp16 levels, two tokens a byte.

Triton's own casts of bytes take five instructions a code; these take one and a half to two
(docs/kernels.md). The interpreter cannot run them and takes the plain path, with the same results.
"""

from __future__ import annotations

import struct

_SPREAD = """
    prmt.b32 ${out}, {reg}, 0x60606060, 0x5240;
    prmt.b32 ${next}, {reg}, 0x60606060, 0x7361;
    sub.f16x2 ${out}, ${out}, m;
    sub.f16x2 ${next}, ${next}, m;"""


def plane_bits(shift: int, mask: int) -> str:
    """PTX that shifts bytes right by ``shift`` (-1: left by 1) and leaves the bits of ``mask``.

    Registers: $0, $1 first and second bytes; $2 two words.
    """
    first = f"shr.u32 a, $2, {shift};" if shift >= 0 else "shl.b32 a, $2, 1;"
    return f"""{{
    .reg .b32 a, b;
    {first}
    shr.u32 b, $2, {shift + 8};
    and.b32 $0, a, {mask * 0x10001};
    and.b32 $1, b, {mask * 0x10001};
}}"""


def levels(bits: int, middle: float) -> str | None:
    """PTX for codes of ``bits``; None for 8, whose cast is as short.

    Registers: $0, $1 first and second bytes of the first token; $2, $3 of the second; $4 two words;
    for 3 bits $5 those of the top plane; then the shift of the first token (twice, one a word), for
    3 bits that of the top plane. A second token lies a code above the first.
    """
    if bits == 8:
        return None
    half = struct.unpack("<H", struct.pack("<e", 512.0 + middle))[0]

    def spread(out: int, reg: str) -> str:
        return _SPREAD.format(out=out, next=out + 1, reg=reg)

    # Level 2 code: a byte under 0x60 makes the fp16 number 512 + code.
    if bits == 4:
        body = """
    shl.b32 a, $4, 1;
    and.b32 a, a, 0x1e1e1e1e;
    shr.u32 b, $4, 3;
    and.b32 b, b, 0x1e1e1e1e;"""
    elif bits == 2:
        body = """
    add.s32 s, $5, -1;
    shf.r.wrap.b32 a, $4, $4, s;
    shr.u32 b, a, 2;
    and.b32 a, a, 0x06060606;
    and.b32 b, b, 0x06060606;"""
    else:
        body = """
    add.s32 s, $6, -1;
    shf.r.wrap.b32 a, $4, $4, s;
    add.s32 s, $8, -3;
    shf.r.wrap.b32 c, $5, $5, s;
    shr.u32 b, a, 2;
    shr.u32 d, c, 1;
    and.b32 c, c, 0x08080808;
    and.b32 d, d, 0x08080808;
    lop3.b32 a, a, 0x06060606, c, 0xea;
    lop3.b32 b, b, 0x06060606, d, 0xea;"""
    start = f"{{\n    .reg .b32 a, b, c, d, s, m;\n    mov.b32 m, 0x{half:04x}{half:04x};"
    return start + body + spread(0, "a") + spread(2, "b") + "\n}"
