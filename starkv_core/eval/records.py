"""What an evaluation measured: one schema for every task, and a file for each that is finished."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_core.artifacts import MANIFEST, SCHEMA, read_manifest, write_json_atomic
from starkv_core.eval.deployed import CacheBytes
from starkv_core.provenance import source_hash, versions

if TYPE_CHECKING:
    from starkv_core.run import Subject

_PREFIX = "task-"
_HOW = ("backend", "device", "cache")  # how a figure was computed, not what was asked

Rows = str | Sequence[float]
"""A number for each row asked, in order; a string of 0 and 1 where there are no others."""


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: ``acc``, ``ppl``, ...; lm-eval's filter behind a comma where it is not ``none``.
        value: the figure; None where it is infinite.
        stderr: its standard error, None where none is known.
        better: ``higher`` or ``lower``.
        rows: names in :attr:`Record.rows`; the figure is the mean of these, or a function of it.
        slope: derivative of that function there (the delta method).
    """

    name: str
    value: float | None
    stderr: float | None = None
    better: str = "higher"
    rows: tuple[str, ...] = ()
    slope: float = 1.0


@dataclass(frozen=True)
class Record:
    """A finished task.

    Attributes:
        task: its name.
        subject: ``dense`` or ``compressed``.
        path: how answers were made: ``prefill``, ``decode`` or both with a plus.
        n: documents, windows or prompts.
        metrics: its figures.
        data: ``source`` and ``sha256`` of what was asked; of built-in tasks also ``rows_sha256``,
            of the token ids made of it.
        run: :func:`run_hash` of the subject.
        versions: of the packages that the figures depend on, of the code, and of the task.
        options: all else that they depend on.
        rows: what each row scored, for differences on the same rows.
        seconds: it took.
        cut: requests whose context lost tokens to fit the model's.
        cache: bytes of the longest live cache.
    """

    task: str
    subject: str
    path: str
    n: int
    metrics: tuple[Metric, ...]
    data: Mapping[str, str]
    run: str
    versions: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    seconds: float = 0.0
    cut: int = 0
    cache: CacheBytes | None = None

    @property
    def asked(self) -> str:
        """Hash of rows and options: figures of one hash can be compared."""
        options = {k: v for k, v in self.options.items() if k not in _HOW}
        return canonical_hash([_rows_hash(self.data), options])

    def metric(self, name: str) -> Metric:
        """The figure of that name (KeyError)."""
        for one in self.metrics:
            if one.name == name:
                return one
        raise KeyError(name)

    def values(self, metric: Metric) -> tuple[float, ...]:
        """What each row scored; the mean of it is the figure, or a function of it."""
        return tuple(float(value) for name in metric.rows for value in self.rows[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        held = None if self.cache is None else self.cache.to_dict()
        return {**asdict(self), "metrics": [asdict(m) for m in self.metrics], "cache": held}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_dict` (KeyError, TypeError)."""
        known = dict(content)
        known["metrics"] = tuple(
            Metric(**{**metric, "rows": tuple(metric.get("rows", ()))})
            for metric in content["metrics"]
        )
        held = content["cache"]
        if held is not None:
            known["cache"] = CacheBytes(
                **{name: held[name] for name in ("rows", "tokens", "held", "dense")}
            )
        return cls(**known)


def packed(values: Sequence[float]) -> Rows:
    """Values of rows as records hold them."""
    if all(value in (0.0, 1.0) for value in values):
        return "".join("1" if value else "0" for value in values)
    return list(values)


def run_hash(subject: Subject) -> str:
    """Hash of what a subject computes with: base model and tokenizer, factors, codes, dtypes."""
    files: Mapping[str, str] = {}
    if subject.run_dir is not None and (subject.run_dir / MANIFEST).is_file():
        files = read_manifest(subject.run_dir)["files"]
    return canonical_hash(
        {
            "base": [subject.base.fingerprint, subject.base.settings_sha256],
            "dtypes": [str(subject.base.dtype), str(subject.store_dtype)],
            "files": dict(files),
        }
    )


def canonical(value: Any) -> bytes:
    """A value as JSON that equal values share."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def canonical_hash(value: Any) -> str:
    """SHA-256 of :func:`canonical`."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _rows_hash(data: Mapping[str, str]) -> str:
    """Of what was asked, wherever it lies: token ids where the task is made of these."""
    return data.get("rows_sha256", data["sha256"])


@dataclass(frozen=True)
class About:
    """What is known of a record before it is made, and all that its figures depend on.

    Attributes: as :class:`Record` has them, those of subject and machine left out.
    """

    task: str
    data: Mapping[str, str]
    options: Mapping[str, Any]
    versions: Mapping[str, Any] = field(default_factory=dict)

    def of(self, subject: Subject, column: str) -> dict[str, Any]:
        """Fields of the record of ``subject``, called ``column`` in tables."""
        how = {
            "backend": subject.backend if subject.compressed else None,
            "device": subject.device.type,
            "cache": subject.cache_name,
        }
        return {
            "task": self.task,
            "subject": column,
            "data": dict(self.data),
            "run": run_hash(subject),
            "versions": {**versions(), "source": source_hash(), **self.versions},
            "options": {**self.options, **how},
        }


class Kept:
    """Records of finished tasks in a folder; None keeps nothing.

    Attributes:
        reused: tasks that were taken from the folder, for people.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.reused: list[str] = []

    def take(
        self, subject: Subject, column: str, about: About, make: Callable[[], Mapping[str, Any]]
    ) -> Record:
        """The record of the very same task, if one is kept; else it is made, and kept.

        Args:
            subject: what is evaluated.
            column: its name in tables.
            about: the task.
            make: runs it; gives the fields of :class:`Record` that ``about`` does not have.
        """
        known = about.of(subject, column)
        # The same rows may lie elsewhere.
        key = canonical_hash({**known, "data": _rows_hash(about.data)})
        path = self._path(about.task, column, key)
        found = _read(path, key)
        if found is not None:
            self.reused.append(f"{about.task} ({column}, {found.path})")
            return found
        started = time.perf_counter()
        made = make()
        record = Record(**known, **made, seconds=round(time.perf_counter() - started, 1))
        if path is not None:
            content = {"schema": SCHEMA, "kind": "task", "key": key, "record": record.to_dict()}
            write_json_atomic(path, content)
        return record

    def _path(self, task: str, column: str, key: str) -> Path | None:
        if self.folder is None:
            return None
        name = "-".join(re.sub(r"[^\w.]+", "_", part) for part in (task, column))
        return self.folder / f"{_PREFIX}{name}-{key[:12]}.json"


def _read(path: Path | None, key: str) -> Record | None:
    """A record that was kept under ``key``; a damaged file is none."""
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA or content["key"] != key:
            return None
        return Record.from_dict(content["record"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def holds_only_records(folder: Path) -> bool:
    """Whether a folder has records and nothing else: what an interrupted evaluation leaves."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return bool(names) and all(name.startswith(_PREFIX) for name in names)
