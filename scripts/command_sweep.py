"""Run rows of starkv commands, several at a time, and set what they measured side by side.

A plan is a JSON file, `{"rows": [...]}`; a row has a name and its commands, run one after the
other:

    {"name": "star", "commands": ["calibrate --recipe qwen2.5-0.5b --model MODEL --out RUN",
                                  "eval RUN --text WIKI --no-dense"]}

RUN is the row's folder in WORK; MODEL, WIKI and other words in capitals are what `--define` says.
A row may say which curve of scripts/methods_figure.py it is a point of, `"curve": "star, trained"`;
its record says it too, and rows without one are not drawn.
The output is written anew from what lies in WORK: a row an object, with its commands, what
calibration recorded and the figures of `starkv eval --compare`, paired with the row `dense` where
there is one. Rows that are complete are skipped: a sweep that was ended goes on. A row whose
commands have changed since is made anew.

    PYTHONPATH=. python scripts/command_sweep.py plan.json rows.jsonl --work runs --workers 4 \
        --define MODEL=models/qwen --define WIKI=wiki.test.raw
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from starkv_core.artifacts import read_manifest, write_text_atomic
from starkv_core.eval.compare import compare
from starkv_core.provenance import git_commit, hardware, versions
from starkv_core.run import is_run

DONE = "row.json"  # in the row's folder: seconds of its commands, once all have ended well
WORD = re.compile(r"\b[A-Z]{3,}\b")  # in a command, defined for the sweep
TAIL = 1500  # characters of a failed command's output that are shown


def expanded(command: str, words: dict[str, str]) -> list[str]:
    """The command line of a row's command."""
    parts = [
        WORD.sub(lambda found: words.get(found[0], found[0]), part) for part in shlex.split(command)
    ]
    return [sys.executable, "-m", "starkv_cli", *parts]


def started(line: list[str], gpu: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end on a GPU; TimeoutExpired after so long."""
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    return subprocess.run(
        line, env=env, timeout=seconds, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip


class Sweep:
    """Rows under way; ``gpus`` are taken in turn, empty strings where there is none."""

    def __init__(self, work: Path, words: dict[str, str], gpus: list[str], seconds: float) -> None:
        self.work, self.words = work, words
        self.free: queue.Queue[str] = queue.Queue()
        for gpu in gpus:
            self.free.put(gpu)
        self.ends = time.monotonic() + seconds
        self.began = time.monotonic()
        self.lock = threading.Lock()

    def note(self, text: str) -> None:
        with self.lock:
            sys.stderr.write(f"{time.monotonic() - self.began:6.1f} s  {text}\n")
            sys.stderr.flush()

    def run(self, row: dict[str, Any]) -> None:
        """Run a row's commands in its turn; what fails is told and leaves the row incomplete."""
        gpu = self.free.get()
        try:
            self.commands(row, gpu)
        finally:
            self.free.put(gpu)

    def commands(self, row: dict[str, Any], gpu: str) -> None:
        out = self.work / row["name"]
        shutil.rmtree(out, ignore_errors=True)  # of an attempt that was ended
        taken = []
        for command in row["commands"]:
            left, began = self.ends - time.monotonic(), time.monotonic()
            if left <= 0:
                return
            line = expanded(command, self.words | {"RUN": str(out)})
            try:
                done = started(line, gpu, left)
            except subprocess.TimeoutExpired:
                return
            taken.append(time.monotonic() - began)
            if done.returncode:
                self.note(f"{row['name']} failed: {shlex.join(line)}\n{done.stdout[-TAIL:]}")
                return
        out.mkdir(exist_ok=True)
        about = {
            "commands": row["commands"],
            "seconds": taken,
            "commit": git_commit(),
            "versions": versions(),
            "hardware": {key: hardware()[key] for key in ("cores", "gpus")},
        }
        write_text_atomic(out / DONE, json.dumps(about))
        self.note(f"{row['name']}: {', '.join(f'{s:.0f}' for s in taken)} s")


def is_done(row: dict[str, Any], work: Path) -> bool:
    """Whether the row's commands, and no others, have all ended well."""
    path = work / row["name"] / DONE
    if not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8"))["commands"] == row["commands"])


def collected(rows: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """Complete rows in the plan's order, with their figures."""
    made = [row for row in rows if is_done(row, work)]
    told = ("name", "curve")
    records = {row["name"]: {key: row[key] for key in told if key in row} for row in made}
    for name, record in records.items():
        record |= json.loads((work / name / DONE).read_text(encoding="utf-8"))
        if is_run(work / name):
            record["calibration"] = read_manifest(work / name)["calibration"]
    found = (
        compare([str(work / name) for name in records]).to_dict() if records else {"columns": []}
    )
    for column in found["columns"]:
        name = row_of(str(column["label"]), list(records), work)
        if name is not None:
            records[name].setdefault("columns", []).append(column)
    return list(records.values())


def row_of(label: str, names: Sequence[str], work: Path) -> str | None:
    """The row of a column, whose label is `dense`, a row's folder or that, a comma and a cache.

    None for a dense model that only rows of caches have asked. Names may hold commas too.
    """
    if label == "dense":
        return label if label in names else None
    return max((n for n in names if f"{label}, ".startswith(f"{work / n}, ")), key=len)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--workers", type=int, default=1, help="of each GPU")
    parser.add_argument("--gpus", default="", help="ids with commas; default: torch's choice")
    parser.add_argument("--seconds", type=float, default=1e6, help="end after so long, rows or not")
    parser.add_argument("--define", action="append", default=[], metavar="WORD=TEXT")
    given = parser.parse_args()
    rows = json.loads(given.plan.read_text(encoding="utf-8"))["rows"]
    if faults := [word for word in given.define if "=" not in word]:
        parser.error(f"--define {faults[0]}: give WORD=TEXT")
    words = dict(word.split("=", 1) for word in given.define)
    asked = {word for row in rows for command in row["commands"] for word in WORD.findall(command)}
    if missing := sorted(asked - {*words, "RUN"}):
        parser.error(f"the plan needs --define for {', '.join(missing)}")
    given.work.mkdir(parents=True, exist_ok=True)
    gpus = given.gpus.split(",") * given.workers
    sweep = Sweep(given.work, words, gpus, given.seconds)
    left = [row for row in rows if not is_done(row, given.work)]
    with ThreadPoolExecutor(len(gpus)) as pool:
        for ended in as_completed([pool.submit(sweep.run, row) for row in left]):
            ended.result()
    lines = [json.dumps(record) + "\n" for record in collected(rows, given.work)]
    write_text_atomic(given.out, "".join(lines))
    sweep.note(f"{len(lines)} of {len(rows)} rows are in {given.out}")


if __name__ == "__main__":
    main()
