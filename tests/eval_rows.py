"""A few rows of our own for the six zero-shot tasks, as the files of such a folder hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starkv_core.eval.local_data import FILES


def _question(stem: str, choices: list[str], gold: int, field: str = "question") -> dict[str, Any]:
    context = stem if field == "question_stem" else f"Question: {stem}\nAnswer:"
    return {field: stem, "context": context, "choices": choices, "gold": gold}


def _goal(goal: str, sol1: str, sol2: str, label: int) -> dict[str, Any]:
    return {
        "goal": goal,
        "sol1": sol1,
        "sol2": sol2,
        "label": label,
        "context": f"Question: {goal}\nAnswer:",
        "choices": [sol1, sol2],
        "gold": label,
    }


def _sentence(sentence: str, option1: str, option2: str, answer: str) -> dict[str, Any]:
    before, after = sentence.split("_")
    return {
        "sentence": sentence,
        "option1": option1,
        "option2": option2,
        "answer": answer,
        "contexts": [before + option1, before + option2],
        "continuation": after.strip(),
        "gold": int(answer) - 1,
    }


def _story(label: str, a: str, b: str, endings: list[str], gold: int) -> dict[str, Any]:
    raw = {"activity_label": label, "ctx_a": a, "ctx_b": b, "endings": endings, "label": str(gold)}
    context = f"{label}: {a} {b.capitalize()}"
    return {"raw": raw, "context": context, "choices": endings, "gold": gold}


ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        _goal("How do you dry a wet towel?", "Hang it in the sun.", "Put it in the pond.", 0),
        _goal("dresser", "replace the drawer with a pin ", "finish, oak with a pin ", 1),
        _goal("Keep {braces} and a 12% rise", "with care", "with ünïcode", 1),
    ],
    "arc_easy": [
        _question("What does a dog do?", ["It barks.", "It flies away.", "It melts."], 0),
        _question("How many legs has a dog?", ["4", "2", "17", "none at all"], 0),
    ],
    "arc_challenge": [
        _question("Which is warm?", ["ice", "the sun at noon", "snow", "the moon", "rain"], 1),
        _question("What falls?", ["a stone let go", "smoke"], 0),
    ],
    "openbookqa": [
        _question("In the morning the sun", ["sets", "rises in the east"], 1, "question_stem"),
        _question("Fog is around:", ["a marsh", "a desert", "an oven"], 0, "question_stem"),
    ],
    "hellaswag": [
        _story("Rowing", "A man sits in a boat.", "he", ["rows on.", "eats the oar."], 0),
        _story("Baking", "Dough lies on a table.", "the cook", ["sings.", "kneads it."], 1),
    ],
    "winogrande": [
        _sentence("Ann taught Bea to row, so _ was the teacher.", "Ann", "Bea", "1"),
        _sentence("The cup fell off the shelf because the _ was narrow.", "cup", "shelf", "2"),
    ],
}


def write_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Write a file for each task; returns the rows."""
    for task, rows in ROWS.items():
        lines = [
            json.dumps({"task": task, "idx": i, **row}, ensure_ascii=False)
            for i, row in enumerate(rows)
        ]
        (folder / FILES[task]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ROWS
