"""Options of the bench that are sizes."""

from __future__ import annotations

from starkv_core.errors import UserError
from starkv_core.sizes import bytes_of, tokens_of


def parse_counts(option: str, text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas, k and m meaning 1024 and 1024 squared; None stays None.

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    found = []
    for part in (part.strip() for part in text.split(",")):
        count = tokens_of(part)
        if count is None:
            raise UserError(f"--{option} {text!r}: numbers such as 4096, 32k or 1m, with commas")
        found.append(count)
    return tuple(dict.fromkeys(found))


def parse_memory(text: str | None) -> int | None:
    """Bytes of a size such as 80GiB (1024s) or 80GB (1000s); None stays None.

    Raises:
        UserError: something else.
    """
    if text is None:
        return None
    size = bytes_of(text.strip())
    if size is None:
        raise UserError(f"--memory {text!r}: a size such as 80GiB is expected")
    return size
