"""LongBench (arXiv 2308.14508) from a folder of its own files; all but the rows is lm-eval's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starkv_core.eval.local_data import json_rows

_PREFIX = "longbench_"


def is_longbench(task: str) -> bool:
    """Whether a task of lm-eval is one of LongBench; true of groups within it as well."""
    return task.startswith(_PREFIX)


def file_of(task: str) -> str:
    """The file of a task, as LongBench names it: ``hotpotqa.jsonl`` of ``longbench_hotpotqa``."""
    return f"{task.removeprefix(_PREFIX)}.jsonl"


def rows(*, data: str, file: str, **_: Any) -> dict[str, Any]:
    """What lm-eval's ``custom_dataset`` returns: the rows of a file as the split ``test``.

    A row has ``input``, ``context``, ``answers`` (a list) and ``all_classes`` (a list or null);
    LongBench's other fields are not needed. lm-eval reads ``input`` as ``question``.

    Raises:
        UserError: a row that is not JSON or lacks a field; no rows.
    """
    return json_rows(Path(data) / file, _fault, _made)


def _made(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": row["input"],
        "context": row["context"],
        "answers": row["answers"],
        "all_classes": row.get("all_classes") or [],
    }


def _fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "not an object"
    missing = [name for name in ("input", "context", "answers") if name not in row]
    if missing:
        return f"{', '.join(missing)} missing"
    if not all(isinstance(row[name], str) for name in ("input", "context")):
        return "input and context must be texts"
    for name in ("answers", "all_classes"):
        texts = row.get(name) or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"{name} must be a list of texts"
    return None if row["answers"] else "no answers"


def without_middle(ids: Sequence[int], room: int) -> list[int]:
    """A prompt of ``room`` tokens at most: its two ends, as LongBench's own script cuts.

    That script decodes what is left and tokenises it anew; here the ids stay.
    """
    if len(ids) <= room:
        return list(ids)
    head = room // 2
    return [*ids[:head], *ids[len(ids) - (room - head) :]]
