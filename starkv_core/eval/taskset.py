"""Tasks of lm-evaluation-harness by name: found, loaded with their data, checked before any model.

The extra ``eval`` is imported here on first use and only for such tasks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from starkv_core import embedded
from starkv_core.artifacts import MANIFEST, read_manifest
from starkv_core.errors import UserError
from starkv_core.eval.local_data import FILES, TASK_FILES, check_files
from starkv_core.models.load import EMBEDDED_NAME
from starkv_core.provenance import sha256_file

ZERO_SHOT = "zero-shot"
PROTOCOL = {
    "piqa": "acc",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
    "hellaswag": "acc_norm",
}
"""The tasks of ``zero-shot`` and the metric of each that the paper averages."""

_NAMES = re.compile(
    r"""^["']?(?:task|group|tag)["']?:[ \t]*(?:["']?([^\s"'#\[]+)|((?:\n[ \t]*-[ \t]+\S+)+))""",
    re.MULTILINE,
)
_SHOWN = 5  # nearest names of an unknown one
_OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class HarnessTask:
    """One task, its rows loaded.

    Attributes:
        name: as lm-eval has it.
        task: lm-eval's object.
        source: file or data set of its rows.
        data_sha256: of that file; of the rows themselves where there is none.
        config_sha256: of all that its definition says.
        version: of the task.
    """

    name: str
    task: Any
    source: str
    data_sha256: str
    config_sha256: str
    version: Any


@dataclass(frozen=True)
class TaskSet:
    """Tasks to run, and which of them the groups named hold."""

    tasks: tuple[HarnessTask, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)


def load_tasks(
    names: Sequence[str],
    *,
    known: Sequence[str] = (),
    data: Path | None = None,
    include_path: Path | None = None,
    tokenizer: str | None = None,
    lengths: Sequence[int] | None = None,
) -> TaskSet:
    """Find tasks and groups by name, and load their rows.

    Args:
        names: of lm-eval, of ``include_path``, or ``zero-shot``.
        known: other names that could have been meant.
        data: folder with the files of the six zero-shot tasks; None has lm-eval fetch their rows.
        include_path: folder of task files that take precedence.
        tokenizer: folder or hub id, for tasks that size their prompts (RULER).
        lengths: of their prompts in tokens; None is the task's own.

    Raises:
        UserError: lm-eval is missing, unknown names, missing files or packages, rows that only the
            network has, ways of generation that starkv does not have.
    """
    if not names:
        return TaskSet()
    _require_harness(names, known)
    for folder, option in ((data, "--data"), (include_path, "--include-path")):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option} {folder}: no such folder")
    finder = _Finder(data, include_path, tokenizer, lengths)
    expanded = [t for name in names for t in (PROTOCOL if name == ZERO_SHOT else (name,))]
    unknown = [name for name in expanded if not finder.knows(name)]
    if unknown:
        near = [*known, ZERO_SHOT, *finder.names]
        raise UserError.many("--tasks", [_unknown(name, near, known) for name in unknown])
    if data is not None:
        check_files(data, [name for name in expanded if finder.is_local(name)])
    tasks: dict[str, HarnessTask] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        found = [
            one
            for member in (PROTOCOL if name == ZERO_SHOT else (name,))
            for one in finder.load(member)
        ]
        tasks.update({one.name: one for one in found})
        if [one.name for one in found] != [name]:
            groups[name] = tuple(one.name for one in found)
    return TaskSet(tuple(tasks.values()), groups)


def _require_harness(names: Sequence[str], known: Sequence[str]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        lines = [_unknown(name, known, known) for name in names]
        lines.append("for tasks of lm-evaluation-harness install it: pip install 'starkv[eval]'")
        raise UserError.many("--tasks", lines)


def _unknown(name: str, near: Iterable[str], known: Sequence[str]) -> str:
    close = get_close_matches(name, sorted(set(near)), n=_SHOWN)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return f"unknown task {name!r}{hint} (built in: {', '.join(known)})"


def tokenizer_of(subject: str | None, model: str | None = None) -> str:
    """Folder or hub id of the tokenizer of a run, a model or (None) the embedded model."""
    name = subject
    if subject is not None and (Path(subject) / MANIFEST).is_file():
        name = model or read_manifest(subject)["base_model"].get("name")
    return str(embedded.MODEL_DIR) if name in (None, EMBEDDED_NAME) else str(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's notes; what it prints on stdout goes to stderr."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)


class _Finder:
    """Where a name is defined, without reading all of lm-eval's definitions if that can be."""

    def __init__(
        self,
        data: Path | None,
        include_path: Path | None,
        tokenizer: str | None,
        lengths: Sequence[int] | None,
    ) -> None:
        self.data, self.include_path = data, include_path
        self._metadata: dict[str, Any] = {}
        if data is not None:
            self._metadata["data"] = str(data)
        if tokenizer is not None:
            self._metadata["tokenizer"] = tokenizer
        if lengths is not None:
            self._metadata["max_seq_lengths"] = list(lengths)
        self._own = {} if include_path is None else dict(_scan(include_path))
        self._all: dict[str, Path] | None = None
        self._managers: dict[tuple[Path | None, bool], Any] = {}

    @property
    def names(self) -> dict[str, Path]:
        """Names by the file that has them, those of ``include_path`` first."""
        if self._all is None:
            import lm_eval.tasks

            self._all = {**dict(_scan(Path(lm_eval.tasks.__file__).parent)), **self._own}
        return self._all

    def is_local(self, name: str) -> bool:
        """Whether the rows of a task come from ``data``."""
        return self.data is not None and name in FILES and name not in self._own

    def knows(self, name: str) -> bool:
        """Whether there is such a task or group."""
        return self.is_local(name) or name in self._own or name in self.names

    def load(self, name: str) -> Iterator[HarnessTask]:
        """The tasks that a name stands for."""
        try:
            with quiet():
                loaded = self._manager(name).load([name])["tasks"]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"task {name}: {_why(name, error)}") from error
        for task_name, task in loaded.items():
            yield self._prepared(task_name, task)

    def _manager(self, name: str) -> Any:
        """Definitions enough for ``name``: its folder if that has all it refers to, else all."""
        near = TASK_FILES if self.is_local(name) else self.names[name].parent
        found = self._read(near, defaults=False)
        if _complete(found.task_index, name):
            return found
        return self._read(self.include_path, defaults=True)

    def _read(self, folder: Path | None, *, defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        key = folder, defaults
        if key not in self._managers:
            self._managers[key] = TaskManager(
                include_path=folder, include_defaults=defaults, metadata=self._metadata
            )
        return self._managers[key]

    def _prepared(self, name: str, task: Any) -> HarnessTask:
        from starkv_core.eval.harness import generation

        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name}: runs code that the model writes; starkv does not do that"
            )
        if task.get_config("output_type") == "generate_until":
            try:
                generation(task.get_config("generation_kwargs") or {})
            except UserError as error:
                raise UserError(f"task {name}: {error}") from None
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's default
        definition = {k: v for k, v in task.dump_config().items() if k != "metadata"}
        if self.is_local(name) and self.data is not None:
            path = self.data / FILES[name]
            source, digest = str(path), sha256_file(path)
        else:
            source, digest = str(task.get_config("dataset_path") or name), _rows_sha256(task)
        return HarnessTask(
            name,
            task,
            source,
            digest,
            hashlib.sha256(_canonical(definition)).hexdigest(),
            task.VERSION,
        )


def _scan(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names of tasks, groups and tags with their files; some are no names in the end."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".pyc", ".md", ".json", ".jsonl") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for one, several in _NAMES.findall(text):
            for name in [one] if one else re.findall(r"-[ \t]+[\"']?([^\s\"']+)", several):
                yield name, path


def _complete(index: Any, name: str) -> bool:
    """Whether an index of tasks has a name and all that it refers to."""
    entry = index.get(name)
    if entry is None or entry.tags and entry.cfg is None:
        return False  # files of a tag may lie anywhere
    members = (entry.cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(isinstance(member, str) and _complete(index, member) for member in members)


def _why(name: str, error: Exception) -> str:
    """Why a task could not be loaded, and what to do."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({said}); pip install 'starkv[eval]'"
    flags = [name for name in _OFFLINE if os.environ.get(name, "0").upper() in ("1", "TRUE", "ON")]
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "requests"):
        offline = f"{flags[0]} is set" if flags else "is the network within reach?"
        folder = f"; --data takes a folder with {FILES[name]}" if name in FILES else ""
        return f"its rows are not here and the hub gave none ({offline}): {said}{folder}"
    return f"cannot be loaded: {said}"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()


def _rows_sha256(task: Any) -> str:
    digest = hashlib.sha256()
    for row in task.eval_docs:
        digest.update(_canonical(row))
    return digest.hexdigest()
