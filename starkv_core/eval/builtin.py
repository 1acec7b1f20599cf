"""The built-in tasks: their text, windows and prompts, and records of what they measure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from starkv_core.eval.confidence import standard_error
from starkv_core.eval.perplexity import Mode, Windows, perplexity
from starkv_core.eval.records import About, Metric, Record, packed
from starkv_core.eval.retrieval import RetrievalGrid, RetrievalResult, retrieval
from starkv_core.eval.text import EvalText
from starkv_core.progress import Progress

if TYPE_CHECKING:
    from starkv_core.run import Subject

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class BuiltinTask:
    """A task whose rows are at hand.

    Attributes:
        about: what its figures depend on.
        run: makes the rest of a record of a subject, some rows at a time.
    """

    about: About
    run: Callable[[Subject, int, Progress], Mapping[str, Any]]


def perplexity_task(text: EvalText, windows: Windows, mode: Mode) -> BuiltinTask:
    """Perplexity and bits per byte in one mode.

    Standard errors are over windows, taken as independent: ``s / sqrt(n)`` of their nll times the
    derivative of the figure by the mean nll: ``ppl`` of ``ppl = exp(nll)``, a constant of bits.
    """
    options = {"mode": mode, "window": windows.ids.shape[1]}
    about = About(PERPLEXITY, _data(text, _ids_sha256(windows.ids)), options)

    def run(subject: Subject, batch: int, progress: Progress) -> dict[str, Any]:
        found = perplexity(subject, windows, mode=mode, batch=batch, progress=progress)
        error = standard_error(found.nlls)
        figures = (
            ("ppl", found.ppl, found.ppl),
            ("bits_per_byte", found.bits_per_byte, found.bits_per_nat),
        )
        return {
            "path": "prefill" if mode == "prefill" else "decode",
            "n": found.windows,
            "metrics": tuple(
                Metric(
                    name, value, None if error is None else slope * error, "lower", ("nll",), slope
                )
                if math.isfinite(value)
                else Metric(name, None, None, "lower")
                for name, value, slope in figures
            ),
            "rows": {"nll": packed(found.nlls)},
            "cache": found.cache,
        }

    return BuiltinTask(about, run)


def retrieval_task(text: EvalText, grid: RetrievalGrid, seed: int) -> BuiltinTask:
    """Accuracy over a grid, whole and by length."""
    options = {
        "lengths": list(grid.lengths),
        "depths": list(grid.depths),
        "prompts": grid.prompts,
        "seed": seed,
    }
    about = About(grid.task, _data(text, _grid_sha256(grid)), options)

    def run(subject: Subject, batch: int, progress: Progress) -> dict[str, Any]:
        found = retrieval(subject, grid, batch=batch, progress=progress)
        by_length = {str(length): found.scores_at(length) for length in grid.lengths}
        whole = [score for scores in by_length.values() for score in scores]
        metrics = [Metric("acc", found.accuracy, standard_error(whole), rows=tuple(by_length))]
        metrics += [
            Metric(
                f"acc at {name} tokens",
                sum(scores) / len(scores),
                standard_error(scores),
                rows=(name,),
            )
            for name, scores in by_length.items()
        ]
        return {
            "path": "decode",
            "n": len(whole),
            "metrics": tuple(metrics),
            "rows": {name: packed(scores) for name, scores in by_length.items()},
            "cache": found.cache,
        }

    return BuiltinTask(about, run)


def grid_of(record: Record) -> RetrievalResult | None:
    """The grid of a record of retrieval; None of another task."""
    if not {"lengths", "depths", "prompts"} <= record.options.keys() or record.cache is None:
        return None
    lengths, depths, prompts = (record.options[k] for k in ("lengths", "depths", "prompts"))
    scores = tuple(
        tuple(
            tuple(map(float, record.rows[str(length)][j * prompts : (j + 1) * prompts]))
            for j in range(len(depths))
        )
        for length in lengths
    )
    return RetrievalResult(
        record.task, tuple(lengths), tuple(depths), prompts, scores, record.cache
    )


def _data(text: EvalText, rows_sha256: str) -> dict[str, str]:
    return {"source": text.source, "sha256": text.sha256, "rows_sha256": rows_sha256}


def _ids_sha256(ids: Tensor) -> str:
    """Of int64 token ids ``[n, W]``."""
    shape = json.dumps(list(ids.shape)).encode()
    return hashlib.sha256(shape + ids.numpy().astype("<i8").tobytes()).hexdigest()


def _grid_sha256(grid: RetrievalGrid) -> str:
    """Of all that the prompts of a grid are and ask for."""
    digest = hashlib.sha256()
    for prompt in _prompts(grid):
        rest = {name: value for name, value in vars(prompt).items() if name != "input_ids"}
        digest.update(json.dumps(rest, sort_keys=True).encode())
        digest.update(np.asarray(prompt.input_ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def _prompts(grid: RetrievalGrid) -> Iterator[Any]:
    return (prompt for row in grid.cells for cell in row for prompt in cell)
