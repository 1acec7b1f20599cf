"""Sizes as people write them: 32k tokens, 80GiB."""

from __future__ import annotations

import re

from starkv_core.errors import UserError

_TOKENS = re.compile(r"(\d+)([kKmM]?)")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]i?B)")
_SHIFT = {"": 0, "k": 10, "m": 20}


def parse_counts(option: str, text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas, k and m meaning 1024 and 1024 squared; None stays None.

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    found = []
    for part in (part.strip() for part in text.split(",")):
        match = _TOKENS.fullmatch(part)
        if match is None:
            raise UserError(f"--{option} {text!r}: numbers such as 4096, 32k or 1m, with commas")
        found.append(int(match[1]) << _SHIFT[match[2].lower()])
    return tuple(dict.fromkeys(found))


def parse_memory(text: str | None) -> int | None:
    """Bytes of a size such as 80GiB (1024s) or 80GB (1000s); None stays None.

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise UserError(f"--memory {text!r}: a size such as 80GiB is expected")
    base = 1024 if "i" in match[2] else 1000
    return int(float(match[1]) * base ** (1 + "KMGT".index(match[2][0])))
