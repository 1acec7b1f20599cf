"""Runs `starkv calibrate` in children that kill themselves (SIGKILL) at a given moment.

A process of its own, single-threaded and forked before any computation, so that torch is imported
once and every child computes alike. Usage: killed_runs.py FOLDER RECIPE; prints the exit status of
every attempt as JSON. The moments are those of MOMENTS.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported late by training: once here, not in every child
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import starkv_core.calibrate.loop as loop
import starkv_core.calibrate.start as start
from starkv_cli.main import main
from starkv_core import artifacts


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner: Any, name: str, count: int) -> None:
    """Die instead of the ``count``-th call of a function."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            die()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def while_writing(target: str, count: int) -> None:
    """Die when the temporary file of ``target`` is written but not yet in its place."""
    original = os.replace
    calls = [0]

    def counted(source: Any, destination: Any) -> None:
        calls[0] += Path(destination).name == target
        if calls[0] == count and Path(destination).name == target:
            die()
        original(source, destination)

    artifacts.os.replace = counted  # type: ignore[attr-defined]


def in_the_middle_of_a_line(step: int) -> None:
    """Die with half a line of metrics on disk."""
    original = loop._Calibration.record

    def record(self: Any, now: int, loss: float, ranks: Any) -> None:
        if now + 1 == step:
            with open(self.run_dir / loop.METRICS, "a", encoding="utf-8") as file:
                file.write('{"step": ' + str(step))
            die()
        original(self, now, loss, ranks)

    loop._Calibration.record = record  # type: ignore[method-assign]


# 8 steps, the first 4 learn ranks, a state every 3 steps.
MOMENTS: dict[str, Callable[[], None]] = {
    "making the folder": lambda: before_call(loop, "write_manifest", 1),
    "statistics": lambda: before_call(start, "decompose_layer", 2),
    "writing the start": lambda: while_writing("start.safetensors", 1),
    "before the first state": lambda: before_call(loop._Calibration, "step", 3),
    "right after a state": lambda: before_call(loop._Calibration, "step", 4),
    "between states": lambda: before_call(loop._Calibration, "step", 6),
    "in recovery": lambda: before_call(loop._Calibration, "step", 8),
    "writing a state": lambda: while_writing("state.safetensors", 2),
    "metrics": lambda: in_the_middle_of_a_line(5),
    "writing the factors": lambda: while_writing("factors.new.safetensors", 1),
    "before the manifest": lambda: before_call(loop, "commit_factors", 1),
    "writing the manifest": lambda: while_writing("manifest.json", 2),
    "after the manifest": lambda: while_writing("factors.safetensors", 1),
}


def attempt(arguments: list[str], moment: str | None) -> int:
    """Exit status of a command in a child; negative is the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            if moment is not None:
                MOMENTS[moment]()
            main(arguments)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder: Path, recipe: str) -> dict[str, list[int]]:
    whole = ["calibrate", "--recipe", recipe, "--device", "cpu"]
    found = {"": [attempt([*whole, "--out", str(folder / "whole")], None)]}
    for moment in MOMENTS:
        out = str(folder / moment.replace(" ", "-"))
        found[moment] = [attempt([*whole, "--out", out], moment)]
        again = ["calibrate", "--resume", "--out", out, "--device", "cpu"]
        if not Path(out).exists():
            again = [*whole, "--out", out]
        found[moment].append(attempt(again, None))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2])), file=sys.stdout)  # noqa: T201
