"""What came of one backend in one case."""

from __future__ import annotations

from dataclasses import dataclass

from starkv_core.bench.timing import Timing


@dataclass(frozen=True)
class Measured:
    """A time, or the fault in its place.

    Attributes:
        timing: None where the backend failed.
        error: relative error found by the gate; None where an earlier case passed it.
        fault: why there is no time.
        peak: most bytes of GPU memory while it ran.
        note: what a reader of the time must know.
        cache: bytes of the cache it ran on, from its tensors; None where nothing is kept.
        parts: the same by what they are for, of caches that hold codes.
    """

    timing: Timing | None
    error: float | None = None
    fault: str | None = None
    peak: int | None = None
    note: str | None = None
    cache: int | None = None
    parts: dict[str, int] | None = None
