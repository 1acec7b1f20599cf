"""One evaluation: a subject beside its dense baseline, as a report with figures and sources."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_core.artifacts import SCHEMA, write_json_atomic
from starkv_core.baselines import with_cache
from starkv_core.budget import mean_bits, paper_rate
from starkv_core.engine import check_context, check_ids
from starkv_core.errors import UserError
from starkv_core.eval.builtin import (
    PERPLEXITY,
    BuiltinTask,
    grid_of,
    perplexity_task,
    retrieval_task,
)
from starkv_core.eval.deployed import CacheBytes, measure_at
from starkv_core.eval.figures import retrieval_heatmap
from starkv_core.eval.perplexity import MODES, Mode, Windows, cut_windows
from starkv_core.eval.records import Kept, Record
from starkv_core.eval.retrieval import TASKS as RETRIEVAL
from starkv_core.eval.retrieval import check_grid, make_grid
from starkv_core.eval.table import Column, figures_json, table
from starkv_core.eval.taskset import TaskSet
from starkv_core.eval.text import BUILTIN, EvalText, is_endless, read_eval_text
from starkv_core.progress import SILENT, Progress
from starkv_core.provenance import git_commit, hardware, versions
from starkv_core.run import dense_of

if TYPE_CHECKING:
    from starkv_core.run import Subject

TASKS: tuple[str, ...] = (PERPLEXITY, *RETRIEVAL)
DEFAULT_TASKS = (PERPLEXITY, "passkey", "kv")
BUILTIN_WINDOWS = 32  # unless more are asked for: a minute on two cores
HUB_WINDOWS = 64  # unless more are asked for: a hub data set may be endless
LENGTHS = (256, 512, 1024)  # of retrieval, unless others are asked for
BATCH = 4  # windows or prompts, unless asked for
_UNREAD = "for one pass never reads what such a cache keeps"
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
        caches: baselines (:mod:`starkv_core.baselines`) that the subject is evaluated with too.
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
    caches: tuple[str, ...] = ()

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
        if self.caches and PERPLEXITY in self.tasks and "prefill" in self.modes:
            faults.append(f"{', '.join(self.caches)}: perplexity needs --mode token, {_UNREAD}")
        if self.caches and not self.decode_path and self.builtin != self.tasks:
            faults.append(
                f"{', '.join(self.caches)}: tasks of lm-eval need --decode-path, {_UNREAD}"
            )
        if faults:
            raise UserError.many("eval", faults)

    @property
    def builtin(self) -> tuple[str, ...]:
        """Those of :data:`TASKS`."""
        return tuple(task for task in self.tasks if task in TASKS)


@dataclass(frozen=True)
class Report:
    """An evaluation.

    Attributes:
        document: all of it, for JSON.
        columns: of the one table, by name: ``dense``, ``compressed`` or both, and those of caches.
        records: every finished task of every column.
    """

    document: dict[str, Any]
    columns: dict[str, Column]
    records: tuple[Record, ...]

    def rows(self) -> list[list[str]]:
        """The one table: a label, then a figure for each column."""
        rows = table(list(self.columns.values()))
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
        grids = {
            name: {
                record.task: grid
                for record in self.records
                if record.subject == name and (grid := grid_of(record)) is not None
            }
            for name in self.columns
        }
        if any(grids.values()):
            retrieval_heatmap(grids, figure, f"retrieval, {self.document['name']}")
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
        kept: where finished tasks are looked for and put; None keeps nothing.

    Raises:
        UserError: unusable text or grid, or a context past the model's, before any computation.
            Predictions that are not finite.
        RunFailure: a compressed pass that went past its latents.
    """
    started = time.perf_counter()
    tasks, kept = tasks or TaskSet(), kept or Kept(None)
    given = {*TASKS, *tasks.groups, *(task.name for task in tasks.tasks)}
    missing = [f"task {name!r} is not loaded" for name in options.tasks if name not in given]
    if missing:
        raise UserError.many("eval", missing)
    if subject.run_dir is not None and not subject.compressed:
        raise UserError(
            f"{subject.name}: all of its layers are dense, none is compressed; give some of them "
            "ranks (ranks.yaml, then calibrate --export), or evaluate its base model"
        )
    tasks.check_context(subject)
    text, windows, builtin = _material(subject, options)
    subjects = {"compressed": subject} if subject.compressed else {}
    if not subject.compressed or options.dense:
        subjects = {"dense": dense_of(subject), **subjects}
    for cache in options.caches:
        column = f"compressed + {cache}" if subject.compressed else cache
        subjects[column] = with_cache(subject, cache)
    columns: dict[str, Column] = {}
    records: list[Record] = []
    for name, one in subjects.items():
        found = list(_run(one, name, builtin, tasks, options, kept, progress))
        columns[name] = Column(name, found[0].run, _cache(one, found))
        for record in found:
            columns[name].add(record)
        columns[name].add_means(tasks.groups)
        records += found
    document = _document(subject, options, text, windows)
    document["results"] = [record.to_dict() for record in records]
    document["groups"] = {group: list(members) for group, members in tasks.groups.items()}
    reference = next(iter(columns.values()))
    for name, made in columns.items():
        figures = figures_json(made, reference)
        document[name] = {"cache": made.cache.to_dict(), "figures": figures}
    document["seconds"] = round(time.perf_counter() - started, 1)
    return Report(document, columns, tuple(records))


def _material(
    subject: Subject, options: EvalOptions
) -> tuple[EvalText | None, Windows | None, list[BuiltinTask]]:
    """Text, windows and built-in tasks, all checked."""
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
    check_ids(subject, text.ids)
    windows: Windows | None = None
    tasks = []
    if PERPLEXITY in options.tasks:
        windows = cut_windows(tokenizer, text, options.window, windows_wanted)
        check_context(subject, options.window, f"window {options.window}")
        tasks += [perplexity_task(text, windows, mode) for mode in options.modes]
    special = set(tokenizer.all_special_ids)
    filler = [token for token in text.ids if token not in special]
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
        tasks.append(retrieval_task(text, grid, options.seed))
    return text, windows, tasks


def _run(
    subject: Subject,
    column: str,
    builtin: Sequence[BuiltinTask],
    tasks: TaskSet,
    options: EvalOptions,
    kept: Kept,
    progress: Progress,
) -> Iterator[Record]:
    """Every task on one subject."""
    for task in builtin:
        make = partial(task.run, subject, options.batch or BATCH, progress)
        yield kept.take(subject, column, task.about, make)
    if not tasks.tasks:
        return
    from starkv_core.eval.harness import run_task  # the extra `eval`

    for harness_task in tasks.tasks:
        yield run_task(
            subject,
            column,
            harness_task,
            kept=kept,
            path="decode" if options.decode_path else "prefill",
            batch=options.batch,
            add_bos=options.add_bos,
            limit=options.limit,
            progress=progress,
        )


def _cache(subject: Subject, records: Sequence[Record]) -> CacheBytes:
    """Bytes of a live cache, from the first built-in task, or else from a pass of their own.

    Requests of other tasks may be short, and slots ahead would weigh too much.
    """
    held = (r.cache for r in records if r.task in TASKS and r.cache is not None)
    return next(held, None) or measure_at(subject, min(_PROBE, subject.max_positions))


def _tokens_needed(options: EvalOptions, windows: int | None) -> int | None:
    """Tokens to read at least; None for all there are."""
    if windows is None:
        return None
    filler = 2 * max(options.lengths) if set(options.tasks) & set(RETRIEVAL) else 0
    return max(windows * options.window, filler)


def _document(
    subject: Subject, options: EvalOptions, text: EvalText | None, windows: Windows | None
) -> dict[str, Any]:
    codes = subject.codes
    return {
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
