"""Comparison of reports: which figures meet, differences, intervals, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from starkv_core.errors import UserError
from starkv_core.eval.compare import compare
from starkv_core.eval.confidence import Figure, difference, mean_of, shown
from starkv_core.eval.figures import comparison_figure
from starkv_core.eval.records import Metric, Record
from starkv_core.eval.taskset import PROTOCOL
from tests.eval_reports import report


def record(task: str, subject: str, value: float, run: str, **changes: Any) -> Record:
    content: dict[str, Any] = {
        "path": "prefill",
        "n": 100,
        "metrics": (Metric(PROTOCOL.get(task, "acc"), value, 0.03),),
        "data": {"source": "somewhere", "sha256": "d" * 64},
        "versions": {},
        "options": {"limit": None, "backend": subject},
        **changes,
    }
    return Record(task=task, subject=subject, run=run, **content)


def test_one_table_with_differences_from_the_dense_model(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    held = {"dense": 1000.0, "compressed": 500.0}
    dense = record("piqa", "dense", 0.8, "base")
    report(a, "1", held, [dense, record("piqa", "compressed", 0.7, "ra")])
    report(b, "1", {"compressed": 250.0}, [record("piqa", "compressed", 0.75, "rb")])
    # other rows, another path: never beside the others
    other = record("piqa", "compressed", 0.1, "rb", data={"source": "x", "sha256": "e" * 64})
    decode = record("piqa", "compressed", 0.2, "rb", path="decode")
    report(b, "2", {"compressed": 250.0}, [other, decode])
    found = compare([str(a), str(b)])
    assert [c.label for c in found.columns] == ["dense", str(a), str(b)]
    table = found.rows()
    half = 198.4 * math.hypot(0.03, 0.03)  # Student's t of 99 degrees
    assert table[0] == [
        "piqa, acc (prefill, n 100)",
        "80.0% ± 3.0",
        f"70.0% ± 3.0 (-10.0 ± {half:.1f} unpaired)",
        f"75.0% ± 3.0 (-5.0 ± {half:.1f} unpaired)",
    ]
    assert [row[1:] for row in table[1:3]] == [["", "", "10.0% ± 3.0"], ["", "", "20.0% ± 3.0"]]
    assert table[3] == ["cache bytes per token (measured at 8 tokens)", "1,000", "500", "250"]
    assert table[4] == ["cache ratio", "1.00", "2.00", "4.00"]
    comparison_figure(found.columns, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(found.to_dict()))["reference"] == "dense"


def test_the_latest_figure_of_the_weights_of_now(tmp_path: Path) -> None:
    run = tmp_path / "run"
    held = {"compressed": 500.0}
    report(run, "1", held, [record("piqa", "compressed", 0.1, "before the export")])
    report(run, "2", held, [record("arc_easy", "compressed", 0.2, "after it")])
    report(run, "3", held, [record("arc_easy", "compressed", 0.3, "after it")])
    (column,) = compare([str(run)]).columns
    assert [(row.task, f.metric.value) for row, f in column.figures.items()] == [("arc_easy", 0.3)]


def test_the_papers_mean_where_all_of_its_tasks_are(tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = dict(zip(PROTOCOL, (0.1, 0.2, 0.3, 0.4, 0.5, 0.9), strict=True))
    records = [record(task, "compressed", value, "r") for task, value in values.items()]
    report(run, "1", {"compressed": 500.0}, records[:-1])
    assert not any("zero-shot" in row[0] for row in compare([str(run)]).rows())
    report(run, "2", {"compressed": 500.0}, records[-1:])
    table = dict(compare([str(run)]).rows())  # type: ignore[arg-type]
    assert table["zero-shot, mean (prefill, n 600)"] == "40.0% ± 1.2"


def figure(name: str, value: float | None, stderr: float | None = None) -> Figure:
    return Figure(Metric(name, value, stderr), 10)


def test_means_and_figures_for_people() -> None:
    mean = mean_of([figure("acc", 0.5, 0.03), figure("acc_norm", 0.7, 0.04)]).metric
    assert (mean.value, mean.stderr) == (pytest.approx(0.6), pytest.approx(0.025))
    assert mean_of([figure("acc", 0.5, 0.03), figure("acc", 0.7)]).metric.stderr is None
    assert shown(Metric("ppl", 12.3456)) == "12.35"
    assert shown(Metric("ppl", None)) == "infinite"
    for one, other, text in (
        (figure("ppl", 13.0), figure("ppl", 12.5), "13 (+0.5)"),
        (figure("acc", 0.5), figure("acc", 0.25, 0.1), "50.0% (+25.0)"),
    ):
        assert shown(one.metric, difference(one, other)) == text
    assert difference(figure("ppl", None), figure("ppl", 12.5)) is None


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name the runs"):
        compare([])
    with pytest.raises(UserError, match="no report to compare"):
        compare([str(tmp_path)])
    report(tmp_path, "1", {"compressed": 5.0}, [])
    damaged = tmp_path / "results" / "eval-1.json"
    damaged.write_text(damaged.read_text().replace("[]", '[{"task": "piqa"}]'))
    with pytest.raises(UserError, match="damaged"):
        compare([str(tmp_path)])
    damaged.write_text(damaged.read_text().replace('"schema": 1', '"schema": 7'))
    with pytest.raises(UserError, match="newer starkv"):
        compare([str(tmp_path)])
