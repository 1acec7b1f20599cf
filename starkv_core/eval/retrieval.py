"""Retrieval accuracy over a grid of lengths and depths, answers decoded through the cache.

The prompts are those of :mod:`.retrieval_tasks` and :mod:`.retrieval_ruler`, and so is what counts
as right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from starkv_core.engine import Sampler, check_context, end_tokens, stream
from starkv_core.errors import UserError
from starkv_core.eval import retrieval_ruler, retrieval_tasks
from starkv_core.eval.deployed import CacheBytes, measure, refuse_not_finite, watched
from starkv_core.eval.retrieval_ruler import make_ruler_prompt
from starkv_core.eval.retrieval_tasks import RetrievalPrompt, make_prompt
from starkv_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from starkv_core.run import Subject

__all__ = ["TASKS", "TITLES", "RetrievalGrid", "RetrievalResult", "make_grid", "retrieval"]

TASKS = (*retrieval_tasks.TASKS, *retrieval_ruler.TASKS)
TITLES = {"passkey": "pass-key", "kv": "key-value", **{t: t for t in retrieval_ruler.TASKS}}
"""The tasks in tables, figures and progress."""


@dataclass(frozen=True)
class RetrievalGrid:
    """Prompts of one task: ``cells[i][j]`` holds those of ``lengths[i]`` and ``depths[j]``."""

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: tuple[tuple[tuple[RetrievalPrompt, ...], ...], ...]

    @property
    def prompts(self) -> int:
        """Prompts in a cell."""
        return len(self.cells[0][0])


@dataclass(frozen=True)
class RetrievalResult:
    """Right answers of one subject.

    Attributes:
        task: of :data:`TASKS`.
        lengths, depths: the grid.
        prompts: prompts in a cell.
        scores: of every prompt, from 0 (wrong) to 1 (right), ``[lengths][depths][prompts]``.
        cache: bytes of the live cache after the first batch at the longest length.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    prompts: int
    scores: tuple[tuple[tuple[float, ...], ...], ...]
    cache: CacheBytes

    @property
    def accuracy(self) -> float:
        """Mean score over the grid."""
        return fmean(self.at_length(length) for length in self.lengths)

    def at_length(self, length: int) -> float:
        """Mean score at one length."""
        return fmean(self.scores_at(length))

    def scores_at(self, length: int) -> list[float]:
        """Scores at one length, those of the first depth first."""
        return [score for cell in self.scores[self.lengths.index(length)] for score in cell]

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "task": self.task,
            "accuracy": self.accuracy,
            "by_length": {str(length): self.at_length(length) for length in self.lengths},
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "prompts": self.prompts,
            "scores": [[list(cell) for cell in row] for row in self.scores],
            "cache": self.cache.to_dict(),
        }


def make_grid(
    task: str,
    tokenizer: Any,
    filler_ids: Sequence[int],
    lengths: Sequence[int],
    depths: Sequence[float],
    prompts: int,
    seed: int,
) -> RetrievalGrid:
    """Prompts for a grid. Those of a cell depend on ``seed`` and the cell, not on the other cells.

    Raises:
        UserError: an unknown task, an empty grid, or what :func:`.retrieval_tasks.make_prompt` and
            :func:`.retrieval_ruler.make_ruler_prompt` refuse.
    """
    if task not in TASKS:
        raise UserError(f"retrieval task {task!r} is unknown; choose from {', '.join(TASKS)}")
    if not lengths or not depths or prompts < 1:
        raise UserError("retrieval: at least one length, one depth and one prompt are needed")
    make = make_prompt if task in retrieval_tasks.TASKS else make_ruler_prompt
    cells = []
    for length in lengths:
        row = []
        for depth in depths:
            rng = random.Random(f"{seed}/{task}/{length}/{depth}")
            row.append(
                tuple(make(task, tokenizer, filler_ids, length, depth, rng) for _ in range(prompts))
            )
        cells.append(tuple(row))
    return RetrievalGrid(task, tuple(lengths), tuple(depths), tuple(cells))


def check_grid(subject: Subject, grid: RetrievalGrid) -> None:
    """Refuse a grid whose longest prompt and answer exceed the model's context (UserError)."""
    for cells in grid.cells:
        for prompt in (prompt for cell in cells for prompt in cell):
            check_context(
                subject,
                prompt.length + prompt.new_tokens,
                f"{TITLES[grid.task]} prompt of {prompt.length} + {prompt.new_tokens} "
                "answer tokens",
            )


def retrieval(
    subject: Subject, grid: RetrievalGrid, *, batch: int = 8, progress: Progress = SILENT
) -> RetrievalResult:
    """Answer every prompt of ``grid`` greedily, ``batch`` at a time; see the module for the rule.

    Raises:
        UserError: a prompt and its answer exceed the model's context; nothing is computed then. Or
            a prediction that is not finite; the first layer where that happens is named.
        RunFailure: the pass did not go through the compressed cache.
    """
    check_grid(subject, grid)
    scores: list[list[list[float]]] = [[[] for _ in grid.depths] for _ in grid.lengths]
    held: list[CacheBytes] = []
    total = len(grid.lengths) * len(grid.depths) * grid.prompts
    asked, scored = 0, 0.0
    with progress.task(f"{TITLES[grid.task]}, {subject.name}", total, "prompt") as task:
        for i, row in enumerate(grid.cells):
            for j, cell in enumerate(row):
                for start in range(0, len(cell), batch):
                    prompts = cell[start : start + batch]
                    found, cache_bytes = _answer(subject, prompts)
                    held.append(cache_bytes)
                    scores[i][j] += found
                    asked, scored = asked + len(prompts), scored + sum(found)
                    task.advance(len(prompts), accuracy=scored / asked)
    return RetrievalResult(
        grid.task,
        grid.lengths,
        grid.depths,
        grid.prompts,
        tuple(tuple(map(tuple, row)) for row in scores),
        max(held, key=lambda cache_bytes: cache_bytes.tokens),
    )


def _answer(subject: Subject, prompts: Sequence[RetrievalPrompt]) -> tuple[list[float], CacheBytes]:
    """Scores of prompts of one length, and what the cache held after them."""
    cache = subject.new_cache()
    steps = stream(
        subject,
        torch.tensor([prompt.input_ids for prompt in prompts]),
        None,
        max(prompt.new_tokens for prompt in prompts),
        sampler=Sampler(),
        cache=cache,
    )
    with watched(subject) as finite:
        rows = torch.stack(list(steps), dim=1).tolist()
    if not finite():
        suspects = [(p.input_ids, row) for p, row in zip(prompts, rows, strict=True)]
        refuse_not_finite(subject, suspects)
    ends = set(end_tokens(subject))
    scores = []
    for row, prompt in zip(rows, prompts, strict=True):
        answer = takewhile(lambda token: token not in ends, row[: prompt.new_tokens])
        scores.append(prompt.score(subject.tokenizer, list(answer)))
    return scores, measure(subject, cache, len(prompts))
