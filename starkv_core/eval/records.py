"""What an evaluation measured: one schema for every task, and a file for each that is finished."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_core.artifacts import MANIFEST, SCHEMA, read_manifest, write_json_atomic
from starkv_core.eval.deployed import CacheBytes

if TYPE_CHECKING:
    from starkv_core.run import Subject

_PREFIX = "task-"
_NORMAL_95 = 1.96  # standard errors on either side of a mean that hold 95%


@dataclass(frozen=True)
class Metric:
    """One figure of a task.

    Attributes:
        name: ``acc``, ``ppl``, ...; lm-eval's filter behind a comma where it is not ``none``.
        value: the figure; None where it is infinite.
        stderr: its standard error, None where none is known.
        better: ``higher`` or ``lower``.
    """

    name: str
    value: float | None
    stderr: float | None = None
    better: str = "higher"


@dataclass(frozen=True)
class Record:
    """A finished task.

    Attributes:
        task: its name.
        subject: ``dense`` or ``compressed``.
        path: how answers were made: ``prefill``, ``decode`` or both with a plus.
        n: documents, windows or prompts.
        metrics: its figures.
        data: ``source`` and ``sha256`` of what was asked.
        run: :func:`run_hash` of the subject.
        versions: of the packages that the figures depend on, and of the task.
        options: all else that they depend on.
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
    seconds: float = 0.0
    cut: int = 0
    cache: CacheBytes | None = None

    def metric(self, name: str) -> Metric:
        """The figure of that name (KeyError)."""
        for one in self.metrics:
            if one.name == name:
                return one
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        held = None if self.cache is None else self.cache.to_dict()
        return {**asdict(self), "metrics": [asdict(m) for m in self.metrics], "cache": held}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_dict` (KeyError, TypeError)."""
        known = dict(content)
        known["metrics"] = tuple(Metric(**metric) for metric in content["metrics"])
        held = content["cache"]
        if held is not None:
            known["cache"] = CacheBytes(
                **{name: held[name] for name in ("rows", "tokens", "held", "dense")}
            )
        return cls(**known)


def run_hash(subject: Subject) -> str:
    """Hash of the weights that a subject computes with: base model, factors, codes, dtypes."""
    files: Mapping[str, str] = {}
    if subject.run_dir is not None and (subject.run_dir / MANIFEST).is_file():
        files = read_manifest(subject.run_dir)["files"]
    return canonical_hash(
        {
            "base": subject.base.fingerprint,
            "dtypes": [str(subject.base.dtype), str(subject.store_dtype)],
            "files": dict(files),
        }
    )


def canonical_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class Kept:
    """Records of finished tasks in a folder; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def path(self, task: str, subject: str, key: str) -> Path | None:
        """File of a record."""
        if self.folder is None:
            return None
        name = re.sub(r"[^\w.-]+", "_", task)
        return self.folder / f"{_PREFIX}{name}-{subject}-{key[:12]}.json"

    def find(self, task: str, subject: str, key: str) -> Record | None:
        """The record kept under ``key``, if there is one; a damaged file is none."""
        path = self.path(task, subject, key)
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA or content["key"] != key:
                return None
            return Record.from_dict(content["record"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def keep(self, record: Record, key: str) -> None:
        """Write a record under ``key``, whole or not at all."""
        path = self.path(record.task, record.subject, key)
        if path is not None:
            content = {"schema": SCHEMA, "kind": "task", "key": key, "record": record.to_dict()}
            write_json_atomic(path, content)


def holds_only_records(folder: Path) -> bool:
    """Whether a folder has records and nothing else: what an interrupted evaluation leaves."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return bool(names) and all(name.startswith(_PREFIX) for name in names)


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """Unweighted mean of figures of different tasks, as the paper averages."""
    values = [m.value for m in metrics if m.value is not None]
    errors = [m.stderr for m in metrics if m.stderr is not None]
    whole = len(errors) == len(metrics)
    return Metric(
        "mean",
        sum(values) / len(metrics) if len(values) == len(metrics) else None,
        math.sqrt(sum(e * e for e in errors)) / len(metrics) if whole else None,
        metrics[0].better,
    )


def shown(metric: Metric, reference: Metric | None = None) -> str:
    """A figure for people: shares in percent, with the standard error behind.

    With a reference, the difference from it instead, and behind it half of its 95% interval. That
    takes the two as independent; they answer the same rows, so it is rather too wide.
    """
    if metric.value is None or reference is not None and reference.value is None:
        return "infinite" if metric.value is None else ""
    share = metric.name.startswith(("acc", "exact_match", "mean")) and 0 <= metric.value <= 1
    scale, digits, unit = (100.0, ".1f", "%") if share else (1.0, ".4g", "")
    if reference is None or reference.value is None:
        error = metric.stderr
        text = f"{scale * metric.value:{digits}}{unit}"
    else:
        error = None
        if metric.stderr is not None and reference.stderr is not None:
            error = _NORMAL_95 * math.hypot(metric.stderr, reference.stderr)
        text = f"{scale * (metric.value - reference.value):+{digits}}"
    if error is None:
        return text
    return f"{text} ± {scale * error:{'.1f' if share else '.2g'}}"
