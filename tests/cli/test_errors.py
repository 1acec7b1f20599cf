"""Errors become one line on stderr and an exit code."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch

from starkv_cli.main import main
from starkv_core.errors import RunFailure, UserError

GPU_OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB of "
    "which 1.10 GiB is free. Including non-PyTorch memory, this process has 22.00 GiB in use."
)


OOM_ADVICE = (
    "lower batch or length, keep optim.checkpointing on, or spread the model over several devices "
    "with model.device_map"
)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    with pytest.raises(SystemExit) as end:
        main(args)
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `starkv calibrate` fail with ``error`` where it reads its recipe."""

    def load_recipe(*_: Any) -> NoReturn:
        raise error

    monkeypatch.setattr("starkv_core.recipe.load_recipe", load_recipe)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad input"), 2, "starkv: bad input"),
        (RunFailure("loss is NaN at step 3"), 1, "starkv: loss is NaN at step 3"),
        (KeyboardInterrupt(), 130, "starkv: interrupted"),
        (
            ValueError("first\nsecond"),
            1,
            "starkv: internal error: ValueError: first second; --debug shows where",
        ),
        (
            torch.OutOfMemoryError(GPU_OOM),
            2,
            "starkv: out of GPU memory: 2.00 GiB more were needed, 1.10 GiB of 23.69 GiB were "
            f"free; {OOM_ADVICE}",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"
            ),
            2,
            f"starkv: out of memory: 4096 bytes more were needed; {OOM_ADVICE}",
        ),
    ],
)
def test_each_kind_of_error(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    raising(monkeypatch, error)
    assert run(capsys, "calibrate", "--recipe", "tiny") == (code, "", line + "\n")


@pytest.mark.parametrize(
    "args",
    [("--debug", "calibrate", "--recipe", "tiny"), ("calibrate", "--recipe", "tiny", "--debug")],
)
def test_debug_shows_the_traceback_wherever_it_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    raising(monkeypatch, ValueError("why"))
    code, out, err = run(capsys, *args)
    assert (code, out) == (1, "")
    assert "Traceback (most recent call last)" in err
    assert "in load_recipe" in err
    assert err.splitlines()[-1] == "starkv: internal error: ValueError: why"


@pytest.mark.parametrize(
    "args",
    [
        ("calibrate", "--no-such-option"),
        ("calibrate", "--recipe"),
        ("no-such-command",),
        ("--no-such-option",),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], args: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    line = err.removesuffix("\n")
    assert line.startswith("starkv: ") and line.endswith(" --help") and "\n" not in line


def test_all_faults_of_a_recipe_reach_the_user(
    capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("budget: {ratio: 0.5}\nstepz: 3\n")
    code, out, err = run(capsys, "calibrate", "--recipe", str(recipe), "--set", "batch=0")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        f"starkv: {recipe}: 3 faults:",
        "  stepz: unknown key; the nearest is steps",
        "  batch: must be at least 1, got 0",
        "  budget.ratio: must be above 1, got 0.5",
    ]
