"""Tasks of lm-evaluation-harness by name: found, loaded with their data, checked before any model.

The extra ``eval`` is imported here on first use and only for such tasks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starkv_core import embedded
from starkv_core.artifacts import MANIFEST, read_manifest
from starkv_core.engine import check_context
from starkv_core.errors import UserError
from starkv_core.eval import longbench, ruler
from starkv_core.eval.local_data import FILES, TASK_FILES, check_files
from starkv_core.eval.records import canonical, canonical_hash
from starkv_core.eval.retrieval import TITLES
from starkv_core.models.load import EMBEDDED_NAME
from starkv_core.provenance import sha256_file

if TYPE_CHECKING:
    from starkv_core.run import Subject

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
_GROUPS = f"{ZERO_SHOT}, longbench, ruler"  # that options of eval are made for
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
        lengths: of its prompts in tokens, where it was made for lengths (RULER).
        middle: whether prompts past the model's context lose their middle, not their beginning.
    """

    name: str
    task: Any
    source: str
    data_sha256: str
    config_sha256: str
    version: Any
    lengths: tuple[int, ...] = ()
    middle: bool = False


@dataclass(frozen=True)
class TaskSet:
    """Tasks to run, and which of them the groups named hold."""

    tasks: tuple[HarnessTask, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def check_context(self, subject: Subject) -> None:
        """Refuse prompts made for lengths past the model's context (UserError)."""
        for task in self.tasks:
            for length in task.lengths:
                what = f"task {task.name}, prompts of {length} tokens (--lengths)"
                check_context(subject, length, what)


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
        data: folder with files of the six zero-shot tasks and of LongBench; None has lm-eval fetch
            their rows.
        include_path: folder of task files that take precedence.
        tokenizer: folder or hub id, for tasks that size their prompts (RULER).
        lengths: of their prompts in tokens; None is the task's own.

    Raises:
        UserError: lm-eval is missing, unknown names, missing files or packages, rows that only the
            network has, ways of generation that starkv does not have.
    """
    for folder, option in ((data, "--data"), (include_path, "--include-path")):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option} {folder}: no such folder")
    if not names:
        return TaskSet()
    _require_harness(names, known)
    finder = _Finder(data, include_path, tokenizer, lengths)
    expanded = [t for name in names for t in (PROTOCOL if name == ZERO_SHOT else (name,))]
    unknown = [name for name in expanded if not finder.knows(name)]
    if unknown:
        near = [*known, ZERO_SHOT, *finder.names]
        raise UserError.many("--tasks", [_unknown(name, near, known) for name in unknown])
    if data is not None:
        check_files(data, finder.files(expanded))
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
    titled = [task for task, title in TITLES.items() if name == title]
    close = titled or get_close_matches(name, sorted(set(near)), n=_SHOWN)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    others = f"with lm-eval: {_GROUPS} and its own"
    return f"unknown task {name!r}{hint} (built in: {', '.join(known)}; {others})"


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
        self._lengths = ruler.DEFAULT_LENGTHS if lengths is None else tuple(lengths)
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

    def knows(self, name: str) -> bool:
        """Whether there is such a task or group."""
        return self._zero_shot(name) or name in self._own or name in self.names

    def files(self, names: Iterable[str]) -> dict[str, str]:
        """The files in ``data`` that tasks and groups take their rows from, by task."""
        found = {}
        for name in names:
            members = [name]
            if not self._zero_shot(name) and name.startswith("longbench"):
                members = _leaves(self._manager(name).task_index, name)
            for member in members:
                file = self._file(member)
                if file is not None:
                    found[member] = file
        return found

    def _zero_shot(self, name: str) -> bool:
        """Whether a task is one of the package's own."""
        return self.data is not None and name in FILES and name not in self._own

    def _file(self, task: str) -> str | None:
        """The file in ``data`` that has the rows of a task."""
        if self._zero_shot(task):
            return FILES[task]
        if self.data is not None and longbench.is_longbench(task) and task not in self._own:
            return longbench.file_of(task)
        return None

    def load(self, name: str) -> Iterator[HarnessTask]:
        """The tasks that a name stands for."""
        try:
            with quiet():
                manager = self._manager(name)
        except Exception as error:
            raise UserError(f"task {name}: {_why(name, error)}") from error
        leaves = [] if name in self._own else _leaves(manager.task_index, name)
        parts = leaves if any(map(self._special, leaves)) else [name]
        found: dict[str, dict[str, Any]] = {}
        faults: dict[str, str] = {}
        # Those first that fail without a network; making the prompts of the others takes a while.
        for part in sorted(parts, key=ruler.needs_nothing):
            if faults and ruler.needs_nothing(part):
                continue
            try:
                with quiet():
                    found[part] = self._load(manager, part)
            except UserError as error:
                faults[part] = str(error)
            except Exception as error:
                faults[part] = _why(part, error)
        if faults:
            lines = [f"task {part}: {fault}" for part, fault in faults.items()]
            raise UserError("\n".join([*lines, *ruler.instead(faults)]))
        for part in parts:
            yield from (self._prepared(*item) for item in found[part].items())

    def _special(self, task: str) -> bool:
        """Whether lm-eval does not get a task's rows all by itself."""
        return task in ruler.NEEDS or longbench.is_longbench(task) and self._file(task) is not None

    def _load(self, manager: Any, name: str) -> dict[str, Any]:
        """lm-eval's objects of a task or group, by name of the task."""
        if not self._special(name):
            return dict(manager.load([name])["tasks"])
        path = manager.task_index[name].yaml_path
        if name in ruler.NEEDS:
            with ruler.making(name, path, offline=bool(_offline())):
                ruler.check_lengths(name, self._metadata.get("tokenizer", ""), self._lengths)
                return dict(manager.load([name])["tasks"])
        from lm_eval.tasks._yaml_loader import load_yaml

        # lm-eval's own definition, functions included; only the rows come from elsewhere.
        definition = load_yaml(path)
        definition["custom_dataset"] = longbench.rows
        definition["dataset_kwargs"] = {"file": longbench.file_of(name)}
        return dict(manager.load([definition])["tasks"])

    def _manager(self, name: str) -> Any:
        """Definitions enough for ``name``: its folder if that has all it refers to, else all."""
        near = TASK_FILES if self._zero_shot(name) else self.names[name].parent
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
                with quiet():
                    generation(task.get_config("generation_kwargs") or {})
            except UserError as error:
                raise UserError(f"task {name}: {error}") from None
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's default
        definition = {k: v for k, v in task.dump_config().items() if k != "metadata"}
        if name in self._own and self.include_path is not None:
            # A definition has the functions that it names; these may call others beside it.
            code = sorted(self.include_path.rglob("*.py"))
            definition["code"] = [sha256_file(path) for path in code]
        if name in ruler.NEEDS:
            ruler.mix_lengths(task)
        file = self._file(name)
        if file is not None and self.data is not None:
            path = self.data / file
            source, digest = str(path), sha256_file(path)
        else:
            source, digest = str(task.get_config("dataset_path") or name), _rows_sha256(task)
        return HarnessTask(
            name,
            task,
            source,
            digest,
            canonical_hash(definition),
            task.VERSION,
            self._lengths if name in ruler.NEEDS else (),
            longbench.is_longbench(name),
        )


def _scan(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names of tasks, groups and tags with their files; some are no names in the end."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".pyc", ".md", ".json", ".jsonl") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for one, several in _NAMES.findall(text):
            for name in [one] if one else re.findall(r"-[ \t]+[\"']?([^\s\"']+)", several):
                if not name.endswith(":"):  # a key: of a task with settings of its own
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


def _leaves(index: Any, name: str) -> list[str]:
    """The tasks that a name stands for, where all are given by name; else none."""
    entry = index.get(name)
    if entry is None:
        return []
    members = (entry.cfg or {}).get("task", sorted(entry.tags))
    if isinstance(members, str):
        return [name]
    if not all(isinstance(member, str) for member in members):
        return []
    return [leaf for member in members for leaf in _leaves(index, member)]


def _offline() -> list[str]:
    """The variables that forbid the network."""
    return [name for name in _OFFLINE if os.environ.get(name, "0").upper() in ("1", "TRUE", "ON")]


def _why(name: str, error: Exception) -> str:
    """Why a task could not be loaded, and what to do."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    said = said.replace("`max_seq_lengths`", "--lengths")
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({said}); pip install 'starkv[eval]'"
    flags = _offline()
    offline = f"{flags[0]} is set" if flags else "is the network within reach?"
    unreachable = isinstance(error, OSError)
    if unreachable or type(error).__module__.split(".")[0] in ("httpx", "requests"):
        if ruler.NEEDS.get(name):
            return f"needs {ruler.NEEDS[name]}, which could not be had ({offline})"
        folder = f"; --data takes a folder with {FILES[name]}" if name in FILES else ""
        if longbench.is_longbench(name):
            folder = f"; --data takes a folder with {longbench.file_of(name)}"
        return f"its rows are not here and the hub gave none ({offline}): {said}{folder}"
    return f"cannot be loaded: {said}"


def _rows_sha256(task: Any) -> str:
    digest = hashlib.sha256()
    for row in task.eval_docs:
        digest.update(canonical(row))
    return digest.hexdigest()
