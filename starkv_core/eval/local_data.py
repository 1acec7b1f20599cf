"""Rows of the task files in ``tasks/``: JSON lines in a folder named by ``--data``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starkv_core.artifacts import read_text
from starkv_core.errors import UserError

TASK_FILES = Path(__file__).with_name("tasks")
FILES = {
    "piqa": "piqa.validation.jsonl",
    "winogrande": "winogrande.validation.jsonl",
    "arc_easy": "arc_easy.test.jsonl",
    "arc_challenge": "arc_challenge.test.jsonl",
    "openbookqa": "openbookqa.test.jsonl",
    "hellaswag": "hellaswag.validation.jsonl",
}
"""The file of each task."""


def check_files(data: Path, files: dict[str, str]) -> None:
    """Refuse a folder without the ``files`` of tasks, by task.

    Raises:
        UserError: all that are missing.
    """
    missing = [f"{file} (task {t})" for t, file in files.items() if not (data / file).is_file()]
    if missing:
        raise UserError.many(f"--data {data}: no such file", missing)


def rows(*, data: str, file: str, **_: Any) -> dict[str, Any]:
    """What lm-eval's ``custom_dataset`` returns: the rows of a file as the split ``test``.

    Raises:
        UserError: a row that is not JSON or lacks a field; no rows.
    """
    return json_rows(
        Path(data) / file, _fault, lambda row: {name: row[name] for name in _fields(row)}
    )


def json_rows(
    path: Path, fault: Callable[[Any], str | None], made: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """JSON lines as the split ``test``.

    Args:
        fault: what is wrong with a row, or None.
        made: what is kept of a row without a fault.

    Raises:
        UserError: a line that is not JSON or has a fault; no rows.
    """
    from datasets import Dataset

    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise UserError(f"{path}, line {number}: not JSON") from None
            wrong = fault(row)
            if wrong:
                raise UserError(f"{path}, line {number}: {wrong}")
            found.append(made(row))
    if not found:
        raise UserError(f"{path}: empty; it holds no rows")
    return {"test": Dataset.from_list(found)}


def _fields(row: Mapping[str, Any]) -> tuple[str, ...]:
    if "contexts" in row:
        return ("contexts", "continuation", "gold")
    return ("context", "choices", "gold")


def _fault(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "not an object"
    missing = [name for name in _fields(row) if name not in row]
    if missing:
        return f"{', '.join(missing)} missing"
    texts, options, gold = (row[name] for name in _fields(row))
    if isinstance(options, list):
        texts, options = options, texts
    if not (isinstance(texts, list) and isinstance(options, str)):
        return "a list of choices (or contexts) and one text are expected"
    if not all(isinstance(t, str) and t for t in (*texts, options)):
        return "empty texts, or no texts"
    if not isinstance(gold, int) or not 0 <= gold < len(texts):
        return f"gold {gold!r} is none of {len(texts)} choices"
    return None
