"""Tables and progress."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest

from starkv_cli import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"ppl": 1.5, "text": "ä"}
    console.emit_json(value)
    out, err = capsys.readouterr()
    assert json.loads(out) == value
    assert err == ""
    with pytest.raises(ValueError, match="not JSON compliant"):
        console.emit_json(float("nan"))


def test_table_shows_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("Title", ["name", "value"], [("[bold]x[/]", 3), ("y" * 60, "z" * 30)])
    out, err = capsys.readouterr()
    assert err == ""
    assert "[bold]x[/]" in out
    assert "y" * 60 in out and "z" * 30 in out


def test_plain_progress_says_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 10.0, 14.0, 16.0])
    # In the module alone: other threads of the process read the clock, too.
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.progress().task("train", 80, "steps") as task:
        task.advance(8, loss=3.0)
        task.advance(12, loss=2.5)  # ten seconds in: the first line
        task.advance(20, loss=1.25, ratio="2.0")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train: 20/80 steps, 2 steps/s, 0:30 left, loss 2.5",
        "train: 40/80 steps, 2.5 steps/s, took 0:16, loss 1.25  ratio 2.0",
    ]


def test_progress_of_unknown_length(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress().task("read", None, "documents") as task:
        task.advance()
    assert capsys.readouterr().err.startswith("read: 1 documents, ")


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    progress = console.progress()
    with progress.task("outer", 2, "rounds") as outer:
        for _ in range(2):
            with progress.task("inner", 3) as inner:
                for _ in range(3):
                    inner.advance(loss=0.5)
            outer.advance()
    shown = terminal.getvalue()
    assert "outer" in shown and "inner" in shown
    assert "2/2" in shown and "3/3" in shown
    assert "loss 0.5" in shown


def test_a_failing_task_ends_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    progress = console.progress()
    with pytest.raises(KeyboardInterrupt), progress.task("a", 2), progress.task("b", 2):
        raise KeyboardInterrupt
    ended = terminal.getvalue()
    with progress.task("again", 1) as task:
        task.advance()
    assert "again" in terminal.getvalue()[len(ended) :]
