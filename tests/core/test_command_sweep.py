"""Sweeps of commands: words and folders, what fails, what goes on, what is collected."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import command_sweep
from starkv_core.eval.records import Metric, Record
from tests.eval_reports import report

PLAN = {
    "rows": [
        {"name": "dense", "commands": ["eval MODEL --out RUN"]},
        {"name": "star", "commands": ["calibrate --model MODEL --out RUN", "eval RUN"]},
        {"name": "bad", "commands": ["eval RUN --no-such-option"]},
    ]
}


def _report(folder: Path, subject: str, value: float) -> None:
    """What ``starkv eval`` leaves in a run of ``subject``."""
    record = Record(
        task="perplexity",
        subject=subject,
        path="prefill",
        n=4,
        metrics=(Metric("ppl", value, better="lower"),),
        data={"source": "text", "sha256": "d" * 64},
        run=folder.name,
        versions={},
        options={"window": 8},
    )
    report(folder, "1", {subject: 100.0}, [record])


def test_rows_are_run_once_and_collected_in_the_plans_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[list[str]] = []

    def started(line: list[str], *_: Any) -> subprocess.CompletedProcess[str]:
        assert line[:3] == [sys.executable, "-m", "starkv_cli"]
        lines.append(line[3:])
        folder = tmp_path / "work" / ("dense" if "--out" in line and "eval" in line else "star")
        if "--no-such-option" in line:
            return subprocess.CompletedProcess(line, 2, "no such option", None)
        if line[3] == "eval":
            dense = folder.name == "dense"
            _report(folder, "dense" if dense else "compressed", 20.0 if dense else 21.0)
        return subprocess.CompletedProcess(line, 0, "", None)

    monkeypatch.setattr(command_sweep, "started", started)
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    plan, out, work = (str(tmp_path / name) for name in ("plan.json", "rows.jsonl", "work"))
    monkeypatch.setattr(
        sys, "argv", ["sweep", plan, out, "--work", work, "--define", "MODEL=my model"]
    )
    command_sweep.main()
    assert lines[:3] == [
        ["eval", "my model", "--out", f"{work}/dense"],
        ["calibrate", "--model", "my model", "--out", f"{work}/star"],
        ["eval", f"{work}/star"],
    ]
    assert "bad failed" in (told := capsys.readouterr().err) and "no such option" in told
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    assert [row["name"] for row in rows] == ["dense", "star"]
    assert rows[1]["commands"] == PLAN["rows"][1]["commands"]
    (figure,) = rows[1]["columns"][0]["figures"]
    assert figure["value"] == 21.0 and figure["difference"]["value"] == 1.0

    lines.clear()
    command_sweep.main()  # only what is missing
    assert lines == [["eval", f"{work}/bad", "--no-such-option"]]
    assert [json.loads(line)["name"] for line in Path(out).read_text().splitlines()] == [
        "dense",
        "star",
    ]

    lines.clear()
    changed = {"name": "star", "commands": ["calibrate --seed 1 --out RUN", "eval RUN"]}
    (tmp_path / "plan.json").write_text(json.dumps({"rows": [PLAN["rows"][0], changed]}))
    command_sweep.main()  # what a row was made by before is no row of this plan
    assert lines == [
        ["calibrate", "--seed", "1", "--out", f"{work}/star"],
        ["eval", f"{work}/star"],
    ]


def test_a_curve_goes_into_the_record_and_makes_no_row_anew(tmp_path: Path) -> None:
    for name, value in (("star", 21.0), ("care", 25.0)):
        _report(tmp_path / name, "compressed", value)
        (tmp_path / name / command_sweep.DONE).write_text('{"commands": ["eval RUN"]}')
    named = {"name": "star", "curve": "star, trained", "commands": ["eval RUN"]}
    other = {"name": "care", "commands": ["eval RUN"]}
    star, care = command_sweep.collected([named, other], tmp_path)
    assert star["curve"] == "star, trained" and star["columns"][0]["figures"][0]["value"] == 21.0
    assert "curve" not in care


def test_rows_whose_names_begin_alike_keep_their_own_figures(tmp_path: Path) -> None:
    values = {"paper, ratio 2.5": 25.0, "paper": 24.0, "star's start, paper's training": 23.0}
    for name, value in values.items():
        _report(tmp_path / name, "compressed", value)
        (tmp_path / name / command_sweep.DONE).write_text('{"commands": []}')
    _report(tmp_path / "kivi", "kivi-2", 30.0)
    (tmp_path / "kivi" / command_sweep.DONE).write_text('{"commands": []}')
    _report(tmp_path / "again", "dense", 20.0)  # no row of the plan is the dense model itself
    (tmp_path / "again" / command_sweep.DONE).write_text('{"commands": []}')
    names = [*values, "kivi", "again"]
    rows = command_sweep.collected([{"name": name, "commands": []} for name in names], tmp_path)
    found = {
        row["name"]: [figure["value"] for column in row["columns"] for figure in column["figures"]]
        for row in rows
        if "columns" in row
    }
    assert found == {name: [value] for name, value in values.items()} | {"kivi": [30.0]}


@pytest.mark.parametrize(
    ("defined", "said"),
    [
        (["--define", "MODEL"], "--define MODEL: give WORD=TEXT"),
        ([], "the plan needs --define for MODEL"),
    ],
)
def test_words_are_checked_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    defined: list[str],
    said: str,
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN), encoding="utf-8")
    work = tmp_path / "work"
    line = ["sweep", str(plan), str(tmp_path / "rows.jsonl"), "--work", str(work), *defined]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        command_sweep.main()
    assert ended.value.code == 2 and not work.exists()
    assert capsys.readouterr().err.endswith(f"{said}\n")
