"""Records of measurements: one JSON object a line, appended, and read back to compare.

The baselines of a case are the records of the same run, suite, shape, context, batch and dtype; at
equal memory the batches differ, and the memory takes their place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from starkv_core.artifacts import read_text
from starkv_core.errors import UserError

Record = dict[str, Any]

KEYS: Final = (
    "run",
    "suite",
    "shape",
    "rank_map",
    "ctx",
    "batch",
    "memory",
    "backend",
    "dtype",
    "bits",
    "removed",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "runs",
    "bytes",
    "floor_ms",
    "cache_bytes",
    "planned_bytes",
    "peak_bytes",
    "tokens_per_s",
    "cache_ratio",
    "cache_parts",
    "gate_error",
    "fault",
    "note",
    "bandwidth",
    "gpu",
    "torch",
    "triton",
    "transformers",
    "starkv",
    "commit",
    "date",
)
"""Keys of every record, in order; what does not apply is null.

Times in milliseconds, ``bandwidth`` in bytes a second, ``removed`` the paper's rate (0 for dense
caches; the bits of codes not counted), ``bits`` of a number in the cache (of codes the mean, codes
alone), ``fault`` the reason where there is no time, ``memory`` the limit in bytes at equal memory,
``rank_map`` a hash of the ranks: maps of one shape and rate may differ. Of decode, from the live
cache: ``cache_ratio``, bytes of a dense 16-bit cache of ``ctx`` tokens, nothing allocated ahead,
over those of the whole cache; ``cache_parts``, of codes alone, its bytes by what they are for.
"""

_LATER: Final = ("rank_map", "cache_ratio", "cache_parts")
"""Keys that records did not have at first; null where they lack."""

OURS: Final = "starkv"
CODED: Final = "starkv-coded"
BASELINES: Final = ("sdpa-default", "sdpa-flash", "rebuild", "static-graph")


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append records to a .jsonl file in one write, so that no reader sees half a line.

    Raises:
        UserError: the file cannot be written.
        ValueError: NaN or infinity, which JSON does not have.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, lines.encode("utf-8"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_records(folder: Path) -> list[Record]:
    """All records of the .jsonl files of a folder, by file name, in the order they were written.

    Raises:
        UserError: a line that is not a record, with file and line.
    """
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(read_text(path).splitlines(), 1):
            try:
                record = json.loads(line)
                missing = [key for key in KEYS if key not in record and key not in _LATER]
            except (json.JSONDecodeError, TypeError):
                missing = ["JSON"]
            if missing:
                raise UserError(f"{path}, line {number}: not a record (lacks {missing[0]})")
            found.append({key: record.get(key) for key in KEYS})
    return found


def case_of(record: Record) -> tuple[Any, ...]:
    """What two records share that may be compared."""
    size = ("memory", record["memory"]) if record["memory"] else ("batch", record["batch"])
    return (*series_of(record)[:4], record["ctx"], *size)


def series_of(record: Record) -> tuple[Any, ...]:
    """What the records of one curve over the context share."""
    size = ("memory", record["memory"]) if record["memory"] else ("batch", record["batch"])
    return (record["run"], record["suite"], record["shape"], record["dtype"], *size)


def speed(record: Record) -> float | None:
    """What is compared: tokens a second of decode, steps a second elsewhere; None: no time."""
    if record["ms_p50"] is None:
        return None
    return float(record["tokens_per_s"] or 1e3 / record["ms_p50"])


def speedup(record: Record, other: Record) -> float | None:
    """How many times faster ``record`` is than ``other``; None where one of them has no time."""
    mine, theirs = speed(record), speed(other)
    return mine / theirs if mine and theirs else None


def baselines(record: Record, records: Sequence[Record]) -> dict[str, float]:
    """Speed-up of a record over each baseline of its case; of codes over our 16-bit latents too."""
    others = {r["backend"]: r for r in records if case_of(r) == case_of(record)}
    found = {}
    for name in (*BASELINES, OURS) if record["backend"] == CODED else BASELINES:
        if name in others and name != record["backend"]:
            factor = speedup(record, others[name])
            if factor is not None:
                found[name] = factor
    return found


def broken(records: Sequence[Record]) -> list[Record]:
    """Records without a time for another reason than memory."""
    return [r for r in records if r["fault"] and not r["fault"].startswith("does not fit")]


def crossovers(records: Sequence[Record]) -> list[str]:
    """For every curve, from which context on ours is the faster, a line for each baseline."""
    lines = []
    for backend in (OURS, CODED):
        for series in dict.fromkeys(series_of(r) for r in records if r["backend"] == backend):
            own = [r for r in records if series_of(r) == series and r["backend"] == backend]
            gains: dict[str, dict[int, float]] = {}
            for record in own:
                for name, factor in baselines(record, records).items():
                    gains.setdefault(name, {})[record["ctx"]] = factor
            _, suite, shape, _, size, value = series
            what = f"batch {value}" if size == "batch" else f"{value / 2**30:g} GiB"
            who = "ours" if backend == OURS else f"ours in {own[0]['bits']:.3g} bits"
            lines += [
                f"{suite}, {shape}, {what}: {_verdict(who, found)} against {name}"
                for name, found in gains.items()
            ]
    return lines


def crossover(gains: dict[int, float]) -> int | None:
    """The smallest context from which every speed-up measured is above 1; None if there is none."""
    start = None
    for ctx in sorted(gains, reverse=True):
        if gains[ctx] <= 1.0:
            break
        start = ctx
    return start


def _verdict(who: str, gains: dict[int, float]) -> str:
    start = crossover(gains)
    if start is None:
        return f"{who} does not win up to {tokens(max(gains))}"
    if start == min(gains):
        return f"{who} wins at every context measured, from {tokens(start)}"
    below = max(ctx for ctx in gains if ctx < start)
    return f"{who} wins from {tokens(start)} (not yet at {tokens(below)})"


def tokens(count: int) -> str:
    """A context for people: 32K, 1M, 500."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{name}"
    return str(count)
