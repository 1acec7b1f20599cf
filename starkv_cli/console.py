"""What the commands print with: results on stdout, progress and messages on stderr.

rich is imported on first use, so that ``--help`` stays quick.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from starkv_core.errors import StarkvError
from starkv_core.progress import Progress, Task

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBars

PLAIN_WIDTH: Final = 120
"""Columns of a table that does not go to a terminal."""

LOG_EVERY: Final = 10.0
"""Seconds between two progress lines where stderr is not a terminal."""


class Interrupted(StarkvError):
    """Ctrl-C; the message says how to go on."""

    exit_code = 130


def stdout() -> Console:
    """Console for results: plain, uncoloured text of a fixed width unless stdout is a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def emit_json(value: Any) -> None:
    """Print one JSON document, the only thing on stdout under ``--json``.

    ValueError for NaN and infinity, which JSON does not have.
    """
    print(json.dumps(value, indent=2, allow_nan=False))  # noqa: T201


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str | None = None,
) -> None:
    """Print a table: the first column to the left, the others, which hold figures, to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: [brackets] are not markup
    stdout().print(table)


def print_text(text: str) -> None:
    """Print a line of a result."""
    print(text)  # noqa: T201


def note(text: str) -> None:
    """Print a message about the run, not a result, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def progress() -> Progress:
    """Progress on stderr: bars with rate and time left, or a line now and then."""
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Bars:
    """Bars of rich; tasks opened inside a task share its display."""

    def __init__(self) -> None:
        self._bars: RichBars | None = None

    @contextmanager
    def task(self, name: str, total: float | None, unit: str = "it") -> Iterator[Task]:
        outermost = self._bars is None
        if self._bars is None:
            self._bars = _make_bars()
            self._bars.start()
        bars = self._bars
        task_id = bars.add_task(name, total=total, unit=unit, rate="", info="")
        try:
            yield _Bar(bars, task_id, unit)
        finally:
            if outermost:
                bars.stop()
                self._bars = None


def _make_bars() -> RichBars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}  {task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[info]}", markup=False),
        console=Console(stderr=True, highlight=False),
    )


class _Bar:
    def __init__(self, bars: RichBars, task_id: Any, unit: str) -> None:
        self._bars = bars
        self._id = task_id
        self._unit = unit

    def advance(self, n: float = 1, **info: float | str) -> None:
        self._bars.advance(self._id, n)
        speed = self._bars.tasks[self._bars.task_ids.index(self._id)].speed
        rate = f"{speed:.3g} {self._unit}/s" if speed else ""
        self._bars.update(self._id, rate=rate, info=_format_info(info))


class _Lines:
    """Plain lines, for logs."""

    @contextmanager
    def task(self, name: str, total: float | None, unit: str = "it") -> Iterator[Task]:
        line = _Line(name, total, unit)
        yield line
        line.finish()


class _Line:
    def __init__(self, name: str, total: float | None, unit: str) -> None:
        self._name = name
        self._total = total
        self._unit = unit
        self._done = 0.0
        self._info: dict[str, float | str] = {}
        self._start = self._said = time.monotonic()

    def advance(self, n: float = 1, **info: float | str) -> None:
        self._done += n
        self._info = info
        now = time.monotonic()
        if now - self._said >= LOG_EVERY and self._done != self._total:
            self._said = now
            self._say(now - self._start)

    def finish(self) -> None:
        self._say(time.monotonic() - self._start, finished=True)

    def _say(self, seconds: float, *, finished: bool = False) -> None:
        done = f"{self._done:g}" + ("" if self._total is None else f"/{self._total:g}")
        parts = [f"{self._name}: {done} {self._unit}"]
        rate = self._done / seconds if seconds > 0 else 0.0
        if rate:
            parts.append(f"{rate:.3g} {self._unit}/s")
        if finished:
            parts.append(f"took {_clock(seconds)}")
        elif rate and self._total is not None:
            parts.append(f"{_clock((self._total - self._done) / rate)} left")
        if self._info:
            parts.append(_format_info(self._info))
        note(", ".join(parts))


def _format_info(info: dict[str, float | str]) -> str:
    return "  ".join(
        f"{name} {value if isinstance(value, str) else format(value, '.4g')}"
        for name, value in info.items()
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
