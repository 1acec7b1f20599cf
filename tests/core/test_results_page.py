"""Tables and curves of results pages from their records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from scripts import methods_figure, quality_sweep, quantised_figure, results_page
from starkv_core.artifacts import write_text_atomic
from starkv_core.eval.taskset import PROTOCOL


def record(name: str, method: str, ratio: float, increase: float, **rest: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": method,
        "ratio": ratio,
        "bytes_per_token": 8192 / ratio,
        "increase": increase,
        "retrieval": {"passkey": 1.0, "kv": 0.9333},
        "retrieval_prompts": 45,
        "windows": 16,
        "read": "one pass, coded as decode reads",
        **rest,
    }


def run(name: str, ratio: float, increase: float, *changes: str) -> dict[str, Any]:
    plan = {"base": {"recipe": "tiny", "set": list(changes)}}
    return record(name, "star", ratio, increase, plan=plan)


RUN: dict[str, Any] = {
    "scheme": {"name": "star"},
    "base": {"ratio": 2.5, "recovery_steps": 20, "batch": 2, "length": 1024},
    "bits": {"keys": 2.531, "values": 2.5},
    "backend": "triton",
}
OTHER = {"keys": "attended", "floor": 0.75, "key_group": 2, "lr": 1e-3}
RECORDS = [
    record("kivi-2", "kivi", 4.0, 0.02, read="token by token"),
    record("b", "star, trained", 16.05, 0.0706, **RUN),
    record("a", "star, trained", 8.0, 0.026, **RUN | {"base": {**RUN["base"], **OTHER}}),
    record("c", "star, trained", 16.0, 0.0726, **RUN),
    record("dense", "dense", 1.0, 0.0),
]


def test_tables_stand_where_the_page_names_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    write_text_atomic(page, "above\n<!-- rows: r.jsonl -->\nold\n<!-- end -->\nbelow\n")
    lines = [str(r).replace("'", '"') for r in RECORDS]
    write_text_atomic(tmp_path / "r.jsonl", "\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["results_page.py", str(page)])
    results_page.main()
    once = page.read_text(encoding="utf-8")
    results_page.main()
    assert page.read_text(encoding="utf-8") == once
    found = once.splitlines()
    assert found[:2] == ["above", "<!-- rows: r.jsonl -->"]
    assert found[-2:] == ["<!-- end -->", "below"] and "old" not in once
    assert found[4:-2] == [
        "| `dense` |  |  | 1.00 | 8192 |  |  | 16 | one pass | 100% | 93% | 45 |",
        "| `star` | 2.5, attended, floor, keys in groups of 2 | 20 x 2 x 1024, lr 0.001 | 8.00 "
        "| 1024 | 2.53 / 2.50 | +2.6% | 16 | one pass (kernels) | 100% | 93% | 45 |",
        "| `star` | 2.5 | 20 x 2 x 1024 | 16.05 | 510 | 2.53 / 2.50 | +7.1% | 16 "
        "| one pass (kernels) | 100% | 93% | 45 |",
        "| `star` | 2.5 | 20 x 2 x 1024 | 16.00 | 512 | 2.53 / 2.50 | +7.3% | 16 "
        "| one pass (kernels) | 100% | 93% | 45 |",
        "| `kivi-2` |  |  | 4.00 | 2048 | 2 / 2 | +2.0% | 16 | token by token | 100% | 93% | 45 |",
    ]


def test_runs_are_sorted_at_each_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    write_text_atomic(page, "<!-- runs: r.jsonl -->\n<!-- end -->\n")
    made = [
        record("dense", "dense", 1.0, 0.0),
        run("even ranks, ratio 4", 4.004, 0.08, "ratio=4", "steps=0", "start.allocation=uniform"),
        run("star, ratio 4", 4.0, 0.07, "ratio=4", "steps=0"),
        run("star, joint keys, ratio 2", 2.0, 0.09, "ratio=2", "steps=0", "start.key_group=0"),
    ]
    write_text_atomic(tmp_path / "r.jsonl", "".join(json.dumps(r) + "\n" for r in made))
    monkeypatch.setattr(sys, "argv", ["results_page.py", str(page)])
    results_page.main()
    assert page.read_text(encoding="utf-8").splitlines()[3:-1] == [
        "| star, joint keys | 2.00 | +9.00% | 100% | 93% | `start.key_group=0` |",
        "| star | 4.00 | +7.00% | 100% | 93% |  |",
        "| even ranks | 4.00 | +8.00% | 100% | 93% | `start.allocation=uniform` |",
    ]


def _figure(task: str, metric: str, value: float, apart: float | None, **rest: Any) -> Any:
    difference = None if apart is None else {"value": apart, "half": 0.02, "paired": True}
    about = {"path": "prefill", "n": 500, "difference": difference}
    return {"task": task, "metric": metric, "value": value, **about, **rest}


def test_methods_come_by_ratio_and_perplexity_with_differences_from_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(name: str, ppl: float, apart: float | None, **rest: Any) -> dict[str, Any]:
        figures = [
            _figure("perplexity", "ppl", ppl, apart),
            _figure("passkey", "acc", 0.9, None if apart is None else -0.1, path="decode"),
            *(_figure(task, metric, 0.5, None) for task, metric in PROTOCOL.items()),
        ]
        cache = {"ratio": 1.0 if apart is None else 2.0}
        return {"name": name, "columns": [{"cache": cache, "figures": figures}], **rest}

    kivi = _figure("perplexity", "ppl", 22.0, None, path="decode")
    made = [
        {"name": "kivi-2", "columns": [{"cache": {"ratio": 4.0}, "figures": [kivi]}]},
        row("palu", 25.0, 5.0, calibration={"tokens": 0, "seconds": 8.6}),
        row("star", 21.0, 1.0, calibration={"tokens": 983040, "seconds": 118.1}),
        row("dense", 20.0, None),
        {"name": "dense-token", "commands": []},  # its figures stand in the row of the dense model
    ]
    page = tmp_path / "page.md"
    marks = [f"<!-- {kind}: r.jsonl -->\n<!-- end -->\n" for kind in ("methods", "tasks")]
    write_text_atomic(page, "".join(marks))
    write_text_atomic(tmp_path / "r.jsonl", "".join(json.dumps(r) + "\n" for r in made))
    monkeypatch.setattr(sys, "argv", ["results_page.py", str(page)])
    results_page.main()
    methods, tasks = page.read_text(encoding="utf-8").split("<!-- end -->\n")[:2]
    assert methods.splitlines()[3:] == [
        "| dense |  |  | 1.00 | 20.00 |  |  | 90.0 |",
        "| star | 983,040 | 118 | 2.00 | 21.00 | +5.0% ± 0.1% |  | 90.0 (-10.0 ± 2.0) |",
        "| palu |  | 9 | 2.00 | 25.00 | +25.0% ± 0.1% |  | 90.0 (-10.0 ± 2.0) |",
        "| kivi-2 |  |  | 4.00 |  |  | 22.00 |  |",
    ]
    assert [line.split(" |")[0] for line in tasks.splitlines()[3:]] == [
        "| dense",
        "| star",
        "| palu",
    ]
    assert "| openbookqa (500) |" in tasks.splitlines()[1]


def test_a_curve_goes_through_the_best_row_of_a_ratio() -> None:
    found = quantised_figure.curves(RECORDS)
    assert {name: [row["name"] for row in rows] for name, rows in found.items()} == {
        "kivi": ["kivi-2"],
        "star, trained": ["a", "b"],
    }


def _drawn(name: str, curve: str | None, ratio: float, *figures: Any, kv: float = 1.0) -> Any:
    shares = [_figure(t, "acc", v, 0.0, path="decode") for t, v in (("passkey", 0.9), ("kv", kv))]
    column = {"cache": {"ratio": ratio}, "figures": [*figures, *shares]}
    return {"name": name, "columns": [column]} | ({"curve": curve} if curve else {})


def _ppl(value: float, apart: float, path: str = "prefill") -> Any:
    return _figure("perplexity", "ppl", value, apart, path=path)


METHODS = [
    _drawn("kivi-2", "kivi-2", 4.0, _ppl(30.0, 5.0, "decode")),  # dense has 25 token by token
    _drawn("h2o", "h2o", 2.0, _ppl(25.25, 0.25, "decode"), kv=0.2),
    _drawn("star-4", "star", 4.0, _ppl(28.0, 8.0), _ppl(26.0, 1.0, "decode"), kv=0.6),
    _drawn("paper", "paper", 2.5, _ppl(140.0, 120.0)),
    _drawn("star-2", "star", 2.0, _ppl(21.0, 1.0)),
    _drawn("star-2, worse", "star", 2.01, _ppl(22.0, 2.0)),
    _drawn("star-2, seed 1", None, 2.0, _ppl(20.5, 0.5)),
    {"name": "dense", "columns": [{"cache": {"ratio": 1.0}, "figures": []}]},
]


def test_curves_of_methods_have_their_increase_over_dense_read_the_same_way() -> None:
    found = methods_figure.drawn(METHODS)
    assert list(found) == ["star", "paper", "h2o", "kivi-2"]  # token by token behind, by name
    points = {
        name: [(row["ratio"], row["increase"], row["token by token"]) for row in rows]
        for name, rows in found.items()
    }
    assert points == {
        "star": [(2.0, 0.05, False), (4.0, 0.4, False)],
        "paper": [(2.5, 6.0, False)],
        "h2o": [(2.0, 0.01, True)],
        "kivi-2": [(4.0, 0.2, True)],
    }
    assert [row["retrieval"] for row in found["star"]] == [
        {"passkey": 0.9, "kv": 1.0},
        {"passkey": 0.9, "kv": 0.6},
    ]


def test_marks_beyond_the_limits_are_at_the_edge_and_worse_retrieval_is_drawn() -> None:
    found = methods_figure.drawn(METHODS)
    styles = [methods_figure.style(rows) for rows in found.values()]
    panels = quantised_figure.panels(Figure(), found, styles, [2, 4], 2.0, 400.0)
    more, right = (
        {line.get_label(): list(map(tuple, line.get_xydata())) for line in panel.lines}
        for panel in panels
    )
    assert more == {
        "star": [(2.0, pytest.approx(5.0)), (4.0, pytest.approx(40.0))],
        "paper": [(2.5, 400.0)],
        "h2o": [(2.0, 2.0)],
        "kivi-2": [(4.0, pytest.approx(20.0))],
    }
    assert right == {
        "star": [(2.0, 90.0), (4.0, 60.0)],
        "paper": [(2.5, 90.0)],
        "h2o": [(2.0, 20.0)],
        "kivi-2": [(4.0, 90.0)],
    }
    assert [line.get_linestyle() for line in panels[0].lines] == ["-", "None", "None", "None"]


def test_curves_stand_side_by_side_and_caches_where_they_are() -> None:
    apart = methods_figure.APART
    moved = methods_figure.side_by_side(methods_figure.drawn(METHODS))
    assert {name: [row["ratio"] for row in rows] for name, rows in moved.items()} == {
        "star": [2.0 - apart / 2, 4.0 - apart / 2],
        "paper": [2.5 + apart / 2],
        "h2o": [2.0],
        "kivi-2": [4.0],
    }


@pytest.mark.parametrize(
    "row",
    [
        {"name": "bare", "curve": "star", "commands": []},  # its figures stand in another row
        _drawn("bare", "star", 2.0),
        _drawn("bare", "star", 2.0, _figure("perplexity", "ppl", 21.0, None)),  # no row `dense`
    ],
)
def test_a_row_with_a_curve_and_nothing_to_draw_is_told(row: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="row bare has a curve but not perplexity"):
        methods_figure.drawn([row])


def test_the_figure_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text_atomic(tmp_path / "r.jsonl", "".join(json.dumps(r) + "\n" for r in METHODS))
    saved: list[tuple[Figure, Path]] = []
    monkeypatch.setattr(methods_figure, "save_png", lambda *given: saved.append(given))
    files = [str(tmp_path / name) for name in ("r.jsonl", "r.png")]
    monkeypatch.setattr(sys, "argv", ["methods_figure.py", *files, "--title", "a model"])
    methods_figure.main()
    ((figure, path),) = saved
    assert path == tmp_path / "r.png" and figure.get_suptitle() == "a model"
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["star", "paper", "h2o", "kivi-2"]
    left, right = figure.axes
    for ax in (left, right):  # marks are at ratios 2 to 4, less and more what curves are moved by
        assert list(ax.get_xticks()) == [2.0, 2.5, 3.0, 3.5, 4.0]
    labels = [left.yaxis.get_major_formatter()(tick) for tick in left.get_yticks()]
    assert labels[:2] == ["0.1%", "≤0.2%"] and labels[-1] == "≥400%"
    low, high = left.get_ylim()
    assert 0.1 < low < 0.2 and high > 400

    write_text_atomic(tmp_path / "r.jsonl", json.dumps(METHODS[-1]) + "\n")
    with pytest.raises(SystemExit, match="r.jsonl: no row has a curve"):
        methods_figure.main()


def test_a_sweep_whose_worker_dies_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for ever for what that worker was at; here none can even start."""
    plan = {"measure": {"no such field": 1}, "rows": [{"name": "dense"}]}
    write_text_atomic(tmp_path / "plan.json", json.dumps(plan))
    files = [str(tmp_path / name) for name in ("plan.json", "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", ["sweep", *files, "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match=r"a worker died .exit statuses \[1\];"):
        quality_sweep.main()
