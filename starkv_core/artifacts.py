"""Files of a run folder: written atomically, read with suspicion, never pickled.

A writer fills a temporary file in the target's folder, syncs it and renames it over the target, so
that a reader (or a ``kill -9``) sees either the old file or the new one, whole.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from starkv_core.errors import UserError
from starkv_core.provenance import git_commit, sha256_file, versions

if TYPE_CHECKING:
    import torch

SCHEMA: Final = 1
"""Version of the run folder's layout. A change that old readers cannot follow adds one."""

MANIFEST: Final = "manifest.json"


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no disk space left to write {path}; free some and run again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder is synced; some platforms cannot open one.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data``; the folder is made if missing. UserError when the disk is full."""
    with _replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON. ValueError for NaN and infinity, which JSON does not have."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_yaml_atomic(path: str | os.PathLike[str], value: Any, *, comment: str = "") -> None:
    """Write YAML in the order of the mapping, short lists on one line, ``comment`` lines on top."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    body = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=100)
    write_text_atomic(path, head + body)


def save_safetensors_atomic(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors (any device and strides) and metadata. UserError when the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_disk_space(target.parent, sum(t.numel() * t.element_size() for t in ready.values()))
    with _replacing(target) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would leave a file that only its owner reads
        try:
            save_file(ready, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise UserError(f"{target}: cannot be written ({_one_line(error)})") from error
        temporary.chmod(mode)


def check_disk_space(folder: str | os.PathLike[str], needed: int) -> None:
    """UserError if under ``needed`` bytes are free for ``folder`` (which need not exist yet)."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"no disk space: {folder} needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB "
            "are free; free some or write elsewhere"
        )


# --- reading -------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike[str]) -> str:
    """UTF-8 text of a file, without a byte-order mark.

    UserError if it is missing, unreadable or not UTF-8 (with the offset of the first bad byte).
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses repeated keys and reads ``2e-5`` as the number it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # the base class refuses what cannot be a key
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 as PyYAML has it wants a dot in the mantissa and a sign in the exponent.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Value of a YAML text; ``where`` names it in the UserError raised for bad syntax."""
    try:
        return yaml.load(text, _StrictLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise UserError(f"{place}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {_one_line(error)}") from None


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Value of a YAML file. UserError if missing, not UTF-8 or malformed (with line and column)."""
    return parse_yaml(read_text(path), str(path))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Value of a JSON file. UserError if missing, not UTF-8 or malformed (with line and column)."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None


Expected = tuple[Sequence[int] | None, "torch.dtype | None"]


def read_safetensors(
    path: str | os.PathLike[str],
    expected: Mapping[str, Expected] | None = None,
    *,
    sha256: str | None = None,
    prefix: str = "",
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a file that is checked before it is believed.

    ``expected`` maps every name the file must hold, and no other, to ``(shape, dtype)``, each None
    when free; ``sha256`` is the checksum the manifest recorded; only tensors whose name starts with
    ``prefix`` are read. UserError for a missing, truncated
    or altered file; with all offenders, for wrong names, shapes or dtypes, NaN and infinity.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if sha256 is not None and sha256_file(path) != sha256:
        raise UserError(
            f"{path}: altered or damaged: its checksum is not the one in {MANIFEST}; "
            "restore the file or calibrate anew"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or not safetensors ({_one_line(error)})") from None
    faults = list(_tensor_faults(tensors, expected))
    if faults:
        raise UserError.many(f"{path} cannot be used", faults)
    return tensors, metadata


def _tensor_faults(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, Expected] | None
) -> Iterator[str]:
    for name in sorted((expected or {}).keys() - tensors.keys()):
        yield f"{name} is missing"
    for name, tensor in sorted(tensors.items()):
        if expected is not None:
            if name not in expected:
                yield f"{name} does not belong here"
                continue
            shape, dtype = expected[name]
            if shape is not None and tuple(tensor.shape) != tuple(shape):
                yield f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
            if dtype is not None and tensor.dtype != dtype:
                yield f"{name} has dtype {tensor.dtype}, expected {dtype}"
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield f"{name} holds NaN or infinity"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# --- run folders ---------------------------------------------------------------------------------


def check_schema(found: object, what: str) -> None:
    """UserError unless ``found`` is a schema number that this version reads."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{what}: schema is {found!r}, expected {SCHEMA}")
    if found > SCHEMA:
        raise UserError(
            f"{what}: written by a newer starkv (schema {found}, this one reads up to {SCHEMA}); "
            "update starkv"
        )


def refuse_existing(out: str | os.PathLike[str]) -> None:
    """UserError if there is something at ``out``: nothing is ever overwritten."""
    if os.path.lexists(out):
        raise UserError(f"{out} already exists; continue it with --resume, or give another --out")


def find_run_dir(out: str | os.PathLike[str]) -> Path:
    """The run folder ``out`` to resume. UserError if there is none."""
    path = Path(out)
    if not path.is_dir():
        raise UserError(f"{path}: no run to resume there; leave out --resume to start it")
    return path


@contextmanager
def new_run_dir(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that becomes the run folder ``out`` once the block has succeeded.

    So a kill leaves a run that can be resumed, or none. UserError if ``out`` exists or cannot be
    made.
    """
    path = Path(out).absolute()
    refuse_existing(out)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); give another --out") from error
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def new_manifest(base_model: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Manifest of a new run.

    ``base_model`` holds name, revision, fingerprint and dtype; ``files`` starts empty.
    """
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "commit": git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": dict(base_model),
        "seed": seed,
        "files": {},
    }


def write_manifest(
    run_dir: str | os.PathLike[str], manifest: Mapping[str, Any], files: Sequence[str] = ()
) -> dict[str, Any]:
    """Write ``manifest`` with fresh checksums of ``files`` into ``run_dir``, and return it."""
    folder = Path(run_dir)
    checksums = {**manifest["files"], **{name: sha256_file(folder / name) for name in files}}
    written = {**manifest, "files": checksums}
    write_json_atomic(folder / MANIFEST, written)
    return written


def read_manifest(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Manifest of a run folder. UserError if it is missing, malformed or of a newer schema."""
    path = Path(run_dir) / MANIFEST
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder (no {MANIFEST} in it)")
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise UserError(f"{path}: not a manifest")
    check_schema(manifest.get("schema"), str(path))
    malformed = [
        f"{key} is missing or malformed"
        for key, kind in (("base_model", dict), ("seed", int), ("files", dict))
        if not isinstance(manifest.get(key), kind)
    ]
    if malformed:
        raise UserError.many(str(path), malformed)
    return manifest
