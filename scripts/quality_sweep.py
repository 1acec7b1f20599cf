"""Make runs and measure them, several at a time: rows of docs/results/.

A plan is a JSON file: `{"measure": {...}, "rows": [...]}`, where `measure` has the fields of
`Measurement` in quality_rows.py. A row has a `name` and is measured under it if it is `dense`
or a baseline; otherwise it says how its run is made:

    {"name": "star-8", "base": {"recipe": "tiny", "set": ["ratio=2", "steps=0"]},
     "scheme": "star", "ratio": 8, "recover": 300}

Without a `scheme` the base itself is measured, its latents in 16 bits. `bytes_of` in place of
`ratio` names a baseline whose bytes the row is to have; `options` are those of `make_scheme`
(window, sinks, ...). A row whose kernels fail is measured by the reference backend and says so.
Rows that the output file has are skipped: a sweep that was ended goes on. Runs stay in WORK; rows
of equal `base` share one.

    PYTHONPATH=. python scripts/quality_sweep.py plan.json rows.jsonl --work runs --workers 8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from scripts.quality_rows import Measurement, held
from starkv_core.artifacts import read_manifest
from starkv_core.calibrate.loop import run_calibration
from starkv_core.quant.dense import coded_dense
from starkv_core.quant.run import BitBudget, quantize_run
from starkv_core.quant.scheme import make_scheme
from starkv_core.recipe import load_recipe
from starkv_core.run import FACTORS, is_run

_measurement = Measurement()  # of this process; workers set their own


def start_worker(measure: dict[str, Any]) -> None:
    """What a process measures on, kept between rows."""
    global _measurement
    torch.set_num_threads(1)  # processes share the cores
    _measurement = Measurement(**measure)


def base_dir(work: Path, base: dict[str, Any]) -> Path:
    """Where a base run lies, by what it is made from."""
    key = hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()[:12]
    return work / f"base-{key}"


def make_base(base: dict[str, Any], work: Path) -> float:
    """Calibrate a base run unless it is there; seconds taken."""
    began, out = time.monotonic(), base_dir(work, base)
    if not is_run(out) or FACTORS not in read_manifest(out)["files"]:
        changes = [*base["set"], f"model.name={_measurement.model or 'null'}"]
        recipe = load_recipe(base["recipe"], changes)
        run_calibration(recipe, out, resume=is_run(out), device=_measurement.device)
    return time.monotonic() - began


def make_row(row: dict[str, Any], work: Path) -> dict[str, Any]:
    """Quantise a run unless it is there, and measure the row."""
    name, began = row["name"], time.monotonic()
    if "base" not in row:
        return _measurement.row(name)
    if "scheme" not in row:
        return _measurement.row(str(base_dir(work, row["base"]))) | {"name": name, "plan": row}
    out = work / name
    if not is_run(out):
        budget = BitBudget()
        context = int(_measurement.cut.ids.shape[1])
        if "bytes_of" in row:
            beside = held(coded_dense(_measurement.dense, row["bytes_of"]), _measurement.cut)
            budget = BitBudget(bytes_per_token=beside.per_token, context=context)
        elif "ratio" in row:
            budget = BitBudget(ratio=row["ratio"], context=context)
        quantize_run(
            base_dir(work, row["base"]),
            make_scheme(row["scheme"], **row.get("options", {})),
            budget,
            out=out,
            force=True,
            recover_steps=row.get("recover", 0),
            device=_measurement.device,
        )
    about = {"name": name, "made_in_seconds": time.monotonic() - began, "plan": row}
    try:
        return _measurement.row(str(out)) | about
    except Exception as error:
        if _measurement.backend == "reference":
            raise
        fallen = replace(_measurement, backend="reference")
        return fallen.row(str(out)) | about | {"kernels_failed": f"{error!r}"[:2000]}


def tried(task: Callable[[dict[str, Any], Path], Any], item: dict[str, Any], work: Path) -> Any:
    """The task's result, or its traceback as text."""
    try:
        return task(item, work)
    except Exception:
        return traceback.format_exc()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long, rows or not")
    given = parser.parse_args()
    plan = json.loads(given.plan.read_text(encoding="utf-8"))
    text = given.out.read_text(encoding="utf-8") if given.out.is_file() else ""
    done = {json.loads(line)["name"] for line in text.splitlines()}
    rows = [row for row in plan["rows"] if row["name"] not in done]
    bases = {json.dumps(row["base"]): row["base"] for row in rows if "base" in row}
    given.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def note(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - began:6.1f} s  {text}\n")
        sys.stderr.flush()

    context = multiprocessing.get_context("spawn")
    # A process a row: what a failed kernel leaves of its GPU is no other row's concern.
    with context.Pool(given.workers, start_worker, (plan["measure"],), 1) as pool:
        ask = partial(pool.apply_async, tried)
        making = [(base, ask((make_base, base, given.work))) for base in bases.values()]
        waiting = [row for row in rows if "base" in row]
        asked = [(r["name"], ask((make_row, r, given.work))) for r in rows if "base" not in r]
        workers: set[BaseProcess] = set()
        answered = 0
        while making or asked or waiting:
            workers.update(multiprocessing.active_children())
            ended = [worker.exitcode for worker in workers if worker.exitcode is not None]
            time.sleep(0.2)
            if time.monotonic() - began > given.seconds:
                note(f"out of time: {[name for name, _ in asked]} under way or queued")
                return
            for pair in [pair for pair in making if pair[1].ready()]:
                making.remove(pair)
                answered += 1
                note(f"base {pair[0]['set']}: {pair[1].get()}")
            unmade = [json.dumps(base) for base, _ in making]
            for row in [row for row in waiting if json.dumps(row["base"]) not in unmade]:
                waiting.remove(row)
                asked.append((row["name"], ask((make_row, row, given.work))))
            for entry in [entry for entry in asked if entry[1].ready()]:
                asked.remove(entry)
                answered += 1
                found = entry[1].get()
                if isinstance(found, str):
                    note(f"row {entry[0]} failed: {found}")
                    continue
                with open(given.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                note(
                    f"row {entry[0]}: ratio {found['ratio']:.2f}, {found['increase']:+.2%}, "
                    f"{found['retrieval']}, {found['seconds']:.0f} s"
                )
            # A pool makes new workers for dead ones, but what those were at is never answered.
            if any(ended) and len(ended) > answered:
                sys.exit(
                    f"a worker died (exit statuses {sorted(set(ended))}; -9: killed, perhaps for "
                    f"memory); rows measured are in {given.out}, the same command goes on"
                )


if __name__ == "__main__":
    main()
