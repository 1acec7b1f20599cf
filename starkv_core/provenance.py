"""Where a result comes from: versions, commit, hardware, checksums."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from starkv_core import __version__


def versions() -> dict[str, str | None]:
    """Versions of python, starkv and the packages that results depend on; None if not installed."""
    found: dict[str, str | None] = {
        "starkv": __version__,
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


@cache
def source_hash() -> str:
    """Hash of the code of this package: a figure kept by other code is made anew."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in ("starkv_core", "triton_ops"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, ``+dirty`` if tracked files differ.

    None for an installed wheel, or without git. The ``.git`` must lie beside the package: a virtual
    environment inside some other repository does not count.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+dirty" if dirty else commit


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Platform, processor, cores, and the visible GPUs with their memory in bytes."""
    import torch  # heavy: only when a result is written

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            gpus.append({"name": device.name, "memory_bytes": device.total_memory})
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpus,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
