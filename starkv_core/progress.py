"""How long-running functions report progress, without knowing where it is shown.

Core functions take a :class:`Progress`; the command line passes one that draws on stderr.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol


class Task(Protocol):
    """One running task."""

    def advance(self, n: float = 1, **info: float | str) -> None:
        """Move on by ``n`` units; ``info`` (loss, ratio, ...) is shown beside the bar."""


class Progress(Protocol):
    """Opens tasks."""

    def task(
        self, name: str, total: float | None, unit: str = "it"
    ) -> AbstractContextManager[Task]:
        """A task of ``total`` units (None when unknown), finished when the context ends."""


class _SilentTask:
    def advance(self, n: float = 1, **info: float | str) -> None:
        pass


class _Silent:
    def task(
        self, name: str, total: float | None, unit: str = "it"
    ) -> AbstractContextManager[Task]:
        return nullcontext(_SilentTask())


SILENT: Final[Progress] = _Silent()
