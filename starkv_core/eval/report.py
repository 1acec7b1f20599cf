"""One evaluation: a subject beside its dense baseline, as a report with figures and sources."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_core.artifacts import SCHEMA, write_json_atomic
from starkv_core.budget import mean_bits, paper_rate
from starkv_core.engine import check_context
from starkv_core.errors import UserError
from starkv_core.eval.deployed import CacheBytes, measure_at
from starkv_core.eval.figures import retrieval_heatmap
from starkv_core.eval.perplexity import (
    MODES,
    Mode,
    PerplexityResult,
    Windows,
    cut_windows,
    perplexity,
)
from starkv_core.eval.records import Kept, Metric, Record, mean_of, run_hash, shown
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
from starkv_core.eval.taskset import PROTOCOL, ZERO_SHOT, TaskSet
from starkv_core.eval.text import BUILTIN, EvalText, is_endless, read_eval_text
from starkv_core.progress import SILENT, Progress
from starkv_core.provenance import git_commit, hardware, versions
from starkv_core.run import dense_of

if TYPE_CHECKING:
    from starkv_core.run import Subject

PERPLEXITY = "perplexity"
TASKS: tuple[str, ...] = (PERPLEXITY, *RETRIEVAL)
DEFAULT_TASKS = (PERPLEXITY, "passkey", "kv")
BUILTIN_WINDOWS = 32  # unless more are asked for: a minute on two cores
HUB_WINDOWS = 64  # unless more are asked for: a hub data set may be endless
LENGTHS = (256, 512, 1024)  # of retrieval, unless others are asked for
BATCH = 4  # windows or prompts, unless asked for
_PROBE = 1024  # tokens in a cache whose bytes no other result tells


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate.

    Attributes:
        tasks: of :data:`TASKS`, or of a :class:`.taskset.TaskSet`.
        text: ``builtin``, a file or a hub data set: windows of perplexity, filler of retrieval.
        config, split, field: of a hub data set; ``field`` of .jsonl and .parquet as well.
        window, windows: tokens in a window; most windows, None for all of a file, 32 of the
            built-in text and 64 of a hub data set.
        modes: of perplexity.
        lengths, depths, prompts: the retrieval grid, and prompts in each of its cells.
        seed: of the prompts.
        batch: windows, prompts or requests at a time; None is 4, and what fits for requests.
        dense: whether a compressed subject gets its dense baseline beside it.
        limit: rows of each task of lm-eval; None takes all.
        decode_path: whether log-likelihoods are made token by token through the cache.
        add_bos: whether the tokenizer puts its special tokens around the texts of these tasks.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    text: str = BUILTIN
    config: str | None = None
    split: str = "test"
    field: str = "text"
    window: int = 1024
    windows: int | None = None
    modes: tuple[Mode, ...] = ("prefill",)
    lengths: tuple[int, ...] = LENGTHS
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts: int = 2
    seed: int = 0
    batch: int | None = None
    dense: bool = True
    limit: int | None = None
    decode_path: bool = False
    add_bos: bool = False

    def __post_init__(self) -> None:
        known = ", ".join(MODES)
        faults = [
            f"unknown mode {mode!r} (known: {known})" for mode in self.modes if mode not in MODES
        ]
        faults += [f"depth {d:g}: must be from 0 to 1" for d in self.depths if not 0 <= d <= 1]
        faults += [
            f"{name}: at least one is needed"
            for name in ("tasks", "modes", "lengths", "depths")
            if not getattr(self, name)
        ]
        faults += [
            f"{name} {getattr(self, name)}: must be 1 or more"
            for name in ("windows", "prompts", "batch", "limit")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.window < 2:
            faults.append(f"window {self.window}: at least 2 tokens are needed to predict one")
        if faults:
            raise UserError.many("eval", faults)

    @property
    def builtin(self) -> tuple[str, ...]:
        """Those of :data:`TASKS`."""
        return tuple(task for task in self.tasks if task in TASKS)


@dataclass
class Figures:
    """Results of one subject: built-in tasks, those of lm-eval, bytes of a cache of its own."""

    perplexity: dict[Mode, PerplexityResult] = field(default_factory=dict)
    retrieval: dict[str, RetrievalResult] = field(default_factory=dict)
    tasks: dict[str, Record] = field(default_factory=dict)
    probe: CacheBytes | None = None

    @property
    def cache(self) -> CacheBytes:
        """Bytes of a live cache, from the first result there is, but for short requests."""
        held = [result.cache for result in self.perplexity.values()]
        held += [result.cache for result in self.retrieval.values()]
        held += [] if self.probe is None else [self.probe]
        return held[0]

    def means(self, groups: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Metric]]:
        """Mean of every group over its tasks: the paper's for zero-shot, else of what all have."""
        for group, members in groups.items():
            records = [self.tasks[member] for member in members]
            if group == ZERO_SHOT:
                yield group, mean_of([r.metric(PROTOCOL[r.task]) for r in records])
                continue
            shared = [m.name for m in records[0].metrics]
            for record in records[1:]:
                names = {m.name for m in record.metrics}
                shared = [name for name in shared if name in names]
            for name in shared:
                yield f"{group}, {name}", mean_of([record.metric(name) for record in records])

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "perplexity": {mode: result.to_dict() for mode, result in self.perplexity.items()},
            "retrieval": {task: result.to_dict() for task, result in self.retrieval.items()},
            "cache": self.cache.to_dict(),
        }


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        document: all of it, for JSON.
        columns: ``dense``, ``compressed`` or both.
        groups: tasks of lm-eval in groups named by the user.
        reused: tasks and subjects whose figures an earlier evaluation had kept.
    """

    document: dict[str, Any]
    columns: dict[str, Figures]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reused: tuple[str, ...] = ()

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
        for task, record in first.tasks.items():
            for metric in record.metrics:
                label = f"{task}, {metric.name} ({record.path}, n {record.n})"
                rows.append([label, *(shown(f.tasks[task].metric(metric.name)) for f in figures)])
        for means in zip(*(f.means(self.groups) for f in figures), strict=True):
            rows.append([f"{means[0][0]}, mean", *(shown(metric) for _, metric in means)])
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
            for label, figure in only:
                rows.append([label, *(figure if n == "compressed" else "" for n in self.columns)])
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


def evaluate(
    subject: Subject,
    options: EvalOptions,
    progress: Progress = SILENT,
    tasks: TaskSet | None = None,
    kept: Kept | None = None,
) -> Report:
    """Run ``options`` on ``subject`` and, if it is compressed, on its dense baseline before it.

    Args:
        subject: what to evaluate.
        options: how.
        progress: of every task.
        tasks: those of ``options.tasks`` that are not built in.
        kept: where finished tasks of lm-eval are looked for and put; None keeps nothing.

    Raises:
        UserError: unusable text or grid, or a context past the model's; before any computation.
        RunFailure: a compressed pass that went past its latents, or a figure that is not finite.
    """
    started = time.perf_counter()
    tasks, kept = tasks or TaskSet(), kept or Kept(None)
    given = {*TASKS, *tasks.groups, *(task.name for task in tasks.tasks)}
    missing = [f"task {name!r} is not loaded" for name in options.tasks if name not in given]
    if missing:
        raise UserError.many("eval", missing)
    text, windows, grids = _material(subject, options)
    columns: dict[str, Figures] = {}
    reused: list[str] = []
    subjects = {"compressed": subject} if subject.compressed else {}
    if not subject.compressed or options.dense:
        subjects = {"dense": dense_of(subject), **subjects}
    for name, one in subjects.items():
        figures = _figures(one, windows, grids, options, progress)
        _run_tasks(one, name, figures, options, tasks, kept, reused, progress)
        columns[name] = figures
    document = _document(subject, options, text, windows, columns, started)
    document["results"] = [
        record.to_dict()
        for name, one in subjects.items()
        for record in _records(name, one, columns[name], text)
    ]
    document["means"] = {
        name: {label: asdict(metric) for label, metric in figures.means(tasks.groups)}
        for name, figures in columns.items()
    }
    return Report(document, columns, tasks.groups, tuple(reused))


def _material(
    subject: Subject, options: EvalOptions
) -> tuple[EvalText | None, Windows | None, list[RetrievalGrid]]:
    """Text, windows and prompts of the built-in tasks, all checked."""
    if not options.builtin:
        return None, None, []
    tokenizer = subject.tokenizer
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
    for task in RETRIEVAL:
        if task not in options.tasks:
            continue
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
    return text, windows, grids


def _run_tasks(
    subject: Subject,
    column: str,
    figures: Figures,
    options: EvalOptions,
    tasks: TaskSet,
    kept: Kept,
    reused: list[str],
    progress: Progress,
) -> None:
    """Run lm-eval's tasks; note in ``reused`` those that were kept."""
    if not tasks.tasks:
        return
    from starkv_core.eval.harness import run_task  # the extra `eval`

    for task in tasks.tasks:
        record, old = run_task(
            subject,
            column,
            task,
            kept=kept,
            path="decode" if options.decode_path else "prefill",
            batch=options.batch,
            add_bos=options.add_bos,
            limit=options.limit,
            progress=progress,
        )
        figures.tasks[task.name] = record
        if old:
            reused.append(f"{task.name} ({column})")
    if not figures.perplexity and not figures.retrieval:
        figures.probe = measure_at(subject, min(_PROBE, subject.max_positions))


def _records(
    column: str, subject: Subject, figures: Figures, text: EvalText | None
) -> Iterator[Record]:
    """All figures of a subject in the one schema."""
    if text is not None:
        data = {"source": text.source, "sha256": text.sha256}
        run, made = run_hash(subject), versions()
        for mode, result in figures.perplexity.items():
            path = "prefill" if mode == "prefill" else "decode"
            ppl = result.ppl if math.isfinite(result.ppl) else None
            metrics = (
                Metric("ppl", ppl, better="lower"),
                Metric("bits_per_byte", result.bits_per_byte, better="lower"),
            )
            options: dict[str, Any] = {"window": result.window}
            yield Record(
                PERPLEXITY,
                column,
                path,
                result.windows,
                metrics,
                data,
                run,
                made,
                options,
                cache=result.cache,
            )
        for task, grid in figures.retrieval.items():
            n = grid.prompts * len(grid.lengths) * len(grid.depths)
            acc = grid.accuracy
            error = math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else None
            options = {"lengths": list(grid.lengths), "depths": list(grid.depths)}
            metric = Metric("acc", acc, error)
            yield Record(
                task, column, "decode", n, (metric,), data, run, made, options, cache=grid.cache
            )
    yield from figures.tasks.values()


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
                subject, windows, mode=mode, batch=options.batch or BATCH, progress=progress
            )
    for grid in grids:
        found.retrieval[grid.task] = retrieval(
            subject, grid, batch=options.batch or BATCH, progress=progress
        )
    return found


def _document(
    subject: Subject,
    options: EvalOptions,
    text: EvalText | None,
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
        "text": None if text is None else text.to_dict(),
        "windows": None if windows is None else windows.to_dict(),
        "bits": dict(zip(("keys", "values"), mean_bits(codes), strict=True)) if codes else None,
        "paper_rate": (
            None if subject.ranks is None else paper_rate(subject.spec, subject.ranks, codes)
        ),
    }
    document.update({name: figures.to_dict() for name, figures in columns.items()})
    document["seconds"] = round(time.perf_counter() - started, 1)
    return document
