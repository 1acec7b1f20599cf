"""One evaluation: a subject beside its dense baseline, as a report with figures and sources."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_core.artifacts import SCHEMA, write_json_atomic
from starkv_core.budget import mean_bits, paper_rate
from starkv_core.engine import check_context
from starkv_core.errors import UserError
from starkv_core.eval.deployed import CacheBytes
from starkv_core.eval.figures import retrieval_heatmap
from starkv_core.eval.perplexity import (
    MODES,
    Mode,
    PerplexityResult,
    Windows,
    cut_windows,
    perplexity,
)
from starkv_core.eval.retrieval import (
    TASKS as RETRIEVAL,
)
from starkv_core.eval.retrieval import (
    TITLES,
    RetrievalGrid,
    RetrievalResult,
    check_grid,
    make_grid,
    retrieval,
)
from starkv_core.eval.text import BUILTIN, EvalText, is_endless, read_eval_text
from starkv_core.progress import SILENT, Progress
from starkv_core.provenance import git_commit, hardware, versions
from starkv_core.run import dense_of

if TYPE_CHECKING:
    from starkv_core.run import Subject

PERPLEXITY = "perplexity"
TASKS: tuple[str, ...] = (PERPLEXITY, *RETRIEVAL)
BUILTIN_WINDOWS = 32  # unless more are asked for: a minute on two cores
HUB_WINDOWS = 64  # unless more are asked for: a hub data set may be endless


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate.

    Attributes:
        tasks: of :data:`TASKS`.
        text: ``builtin``, a file or a hub data set: windows of perplexity, filler of retrieval.
        config, split, field: of a hub data set; ``field`` of .jsonl and .parquet as well.
        window, windows: tokens in a window; most windows, None for all of a file, 32 of the
            built-in text and 64 of a hub data set.
        modes: of perplexity.
        lengths, depths, prompts: the retrieval grid, and prompts in each of its cells.
        seed: of the prompts.
        batch: windows or prompts at a time.
        dense: whether a compressed subject gets its dense baseline beside it.
    """

    tasks: tuple[str, ...] = TASKS
    text: str = BUILTIN
    config: str | None = None
    split: str = "test"
    field: str = "text"
    window: int = 1024
    windows: int | None = None
    modes: tuple[Mode, ...] = ("prefill",)
    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts: int = 2
    seed: int = 0
    batch: int = 4
    dense: bool = True

    def __post_init__(self) -> None:
        faults = [_unknown("task", task, TASKS) for task in self.tasks if task not in TASKS]
        faults += [_unknown("mode", mode, MODES) for mode in self.modes if mode not in MODES]
        faults += [f"depth {d:g}: must be from 0 to 1" for d in self.depths if not 0 <= d <= 1]
        faults += [
            f"{name}: at least one is needed"
            for name in ("tasks", "modes", "lengths", "depths")
            if not getattr(self, name)
        ]
        faults += [
            f"{name} {getattr(self, name)}: must be 1 or more"
            for name in ("windows", "prompts", "batch")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.window < 2:
            faults.append(f"window {self.window}: at least 2 tokens are needed to predict one")
        if faults:
            raise UserError.many("eval", faults)


@dataclass
class Figures:
    """Results of one subject."""

    perplexity: dict[Mode, PerplexityResult] = field(default_factory=dict)
    retrieval: dict[str, RetrievalResult] = field(default_factory=dict)

    @property
    def cache(self) -> CacheBytes:
        """Bytes of a live cache, from the first result there is."""
        held = [result.cache for result in self.perplexity.values()]
        held += [result.cache for result in self.retrieval.values()]
        return held[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "perplexity": {mode: result.to_dict() for mode, result in self.perplexity.items()},
            "retrieval": {task: result.to_dict() for task, result in self.retrieval.items()},
            "cache": self.cache.to_dict(),
        }


@dataclass(frozen=True)
class Report:
    """An evaluation: ``columns`` holds ``dense``, ``compressed`` or both."""

    document: dict[str, Any]
    columns: dict[str, Figures]

    def rows(self) -> list[list[str]]:
        """The one table: a label, then a figure for each column."""
        figures = list(self.columns.values())
        first = figures[0]
        rows = []
        for mode, result in first.perplexity.items():
            read = "prefill of codes" if mode == "prefill" and self.document["bits"] else mode
            label = f"perplexity ({read}, {result.windows} x {result.window} tokens)"
            rows.append([label, *(f"{f.perplexity[mode].ppl:.2f}" for f in figures)])
        for task, found in first.retrieval.items():
            for length in found.lengths:
                shares = (f.retrieval[task].at_length(length) for f in figures)
                label = f"{TITLES[task]} accuracy, {length} tokens"
                rows.append([label, *(f"{s:.1%}" for s in shares)])
        held = first.cache.tokens
        bytes_label = f"cache bytes per token (measured at {held} tokens)"
        rows.append([bytes_label, *(f"{f.cache.per_token:,.0f}" for f in figures)])
        rows.append(["cache ratio", *(f"{f.cache.ratio:.2f}" for f in figures)])
        if "compressed" in self.columns:
            bits = self.document["bits"]
            rate = "paper rate (compressed layers only{})".format(", in bits" if bits else "")
            only = [(rate, f"{self.document['paper_rate']:.1%}")]
            if bits:
                label = "bits of a stored latent, keys and values (codes only)"
                only.insert(0, (label, f"{bits['keys']:.2f} and {bits['values']:.2f}"))
            for label, shown in only:
                rows.append([label, *(shown if n == "compressed" else "" for n in self.columns)])
        return rows

    def write(self, report: Path, figure: Path) -> list[Path]:
        """Write the JSON report and, with a retrieval grid, its PNG; returns the files written."""
        written = [report]
        write_json_atomic(report, self.document)
        columns = {name: f.retrieval for name, f in self.columns.items()}
        if any(columns.values()):
            retrieval_heatmap(columns, figure, f"retrieval, {self.document['name']}")
            written.append(figure)
        return written


def evaluate(subject: Subject, options: EvalOptions, progress: Progress = SILENT) -> Report:
    """Run ``options`` on ``subject`` and, if it is compressed, on its dense baseline before it.

    Raises:
        UserError: unusable text or grid, or a context past the model's; before any computation.
        RunFailure: a compressed pass that went past its latents, or a figure that is not finite.
    """
    started = time.perf_counter()
    tokenizer = subject.tokenizer
    grids_wanted = [task for task in RETRIEVAL if task in options.tasks]
    windows_wanted = options.windows
    if windows_wanted is None and options.text == BUILTIN:
        windows_wanted = BUILTIN_WINDOWS
    elif windows_wanted is None and is_endless(options.text):
        windows_wanted = HUB_WINDOWS
    text = read_eval_text(
        tokenizer,
        options.text,
        tokens=_tokens_needed(options, windows_wanted),
        config=options.config,
        split=options.split,
        field=options.field,
    )
    windows: Windows | None = None
    if PERPLEXITY in options.tasks:
        windows = cut_windows(tokenizer, text, options.window, windows_wanted)
        check_context(subject, options.window, f"window {options.window}")
    special = set(tokenizer.all_special_ids)
    filler = [token for token in text.ids if token not in special]
    grids = []
    for task in grids_wanted:
        grid = make_grid(
            task,
            tokenizer,
            filler,
            options.lengths,
            options.depths,
            options.prompts,
            options.seed,
        )
        check_grid(subject, grid)
        grids.append(grid)

    columns: dict[str, Figures] = {}
    if not subject.compressed or options.dense:
        columns["dense"] = _figures(dense_of(subject), windows, grids, options, progress)
    if subject.compressed:
        columns["compressed"] = _figures(subject, windows, grids, options, progress)
    return Report(_document(subject, options, text, windows, columns, started), columns)


def _tokens_needed(options: EvalOptions, windows: int | None) -> int | None:
    """Tokens to read at least; None for all there are."""
    if windows is None:
        return None
    filler = 2 * max(options.lengths) if set(options.tasks) & set(RETRIEVAL) else 0
    return max(windows * options.window, filler)


def _figures(
    subject: Subject,
    windows: Windows | None,
    grids: Sequence[RetrievalGrid],
    options: EvalOptions,
    progress: Progress,
) -> Figures:
    found = Figures()
    if windows is not None:
        for mode in options.modes:
            found.perplexity[mode] = perplexity(
                subject, windows, mode=mode, batch=options.batch, progress=progress
            )
    for grid in grids:
        found.retrieval[grid.task] = retrieval(
            subject, grid, batch=options.batch, progress=progress
        )
    return found


def _document(
    subject: Subject,
    options: EvalOptions,
    text: EvalText,
    windows: Windows | None,
    columns: dict[str, Figures],
    started: float,
) -> dict[str, Any]:
    codes = subject.codes
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "eval",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": git_commit(),
        "hardware": hardware(),
        "name": subject.name,
        "run": None if subject.run_dir is None else str(subject.run_dir),
        "model": {
            "name": subject.base.name,
            "fingerprint": subject.base.fingerprint,
            "dtype": str(subject.base.dtype).removeprefix("torch."),
            "device": str(subject.device),
        },
        "backend": subject.backend if subject.compressed else None,
        "options": asdict(options),
        "text": text.to_dict(),
        "windows": None if windows is None else windows.to_dict(),
        "bits": dict(zip(("keys", "values"), mean_bits(codes), strict=True)) if codes else None,
        "paper_rate": (
            None if subject.ranks is None else paper_rate(subject.spec, subject.ranks, codes)
        ),
    }
    document.update({name: figures.to_dict() for name, figures in columns.items()})
    document["seconds"] = round(time.perf_counter() - started, 1)
    return document


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"
