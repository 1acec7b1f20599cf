"""Sizes as people write them: 32k tokens, 80GiB, 32k@8GiB."""

from __future__ import annotations

import re

_TOKENS = re.compile(r"(\d+)([kKmM]?)")
_BYTES = re.compile(r"(\d+(?:\.\d+)?) *([KMGT])(i?)B")


def tokens_of(text: str) -> int | None:
    """A count such as 4096, 32k or 1m (k is 1024, m its square); None if it is none."""
    match = _TOKENS.fullmatch(text)
    return match and int(match[1]) * 1024 ** ("", "k", "m").index(match[2].lower())


def bytes_of(text: str) -> int | None:
    """Bytes of a size such as 80GiB (1024s) or 80GB (1000s); None if it is none."""
    match = _BYTES.fullmatch(text)
    if match is None:
        return None
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** (1 + "KMGT".index(match[2])))


def fit_of(text: str) -> tuple[int, int]:
    """Tokens and bytes of a text such as ``32k@8GiB``; ValueError says what was expected."""
    tokens, _, memory = text.replace(" ", "").partition("@")
    count, size = tokens_of(tokens), bytes_of(memory)
    if count is None or size is None:
        raise ValueError("must be TOKENS@MEMORY such as 32k@8GiB")
    if count == 0 or size == 0:
        raise ValueError("must be above zero on both sides")
    return count, size
