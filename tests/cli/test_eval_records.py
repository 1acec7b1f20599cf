"""Records of `starkv eval`: one schema for every kind of task, kept, and taken from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from starkv_cli.main import main
from starkv_core.eval import builtin
from starkv_core.eval.report import TASKS
from starkv_core.run import Subject
from tests.cli.conftest import OnDisk
from tests.eval_rows import write_rows

OPTIONS = ["--mode", "both", "--window", 48, "--windows", 3, "--lengths", 700, "--depths", "0,1"]
OPTIONS += ["--prompts", 1]
LINEAR = {"rope_type": "linear", "factor": 2.0}


def starkv(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


def no_forward(*args: object) -> None:
    raise AssertionError("a model ran")


def test_every_kind_of_task_says_all_that_its_figures_depend_on(
    on_disk: OnDisk,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (starkv[eval])")
    write_rows(tmp_path)
    tasks = ",".join([*TASKS, "arc_easy", "winogrande"])
    args = ["eval", run, "--tasks", tasks, "--data", tmp_path, "--text", on_disk.text, *OPTIONS]
    assert starkv(*args, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert "kept from before" not in printed.err
    records = report["results"]
    kinds = [(r["subject"], r["task"], r["path"]) for r in records]
    assert len(set(kinds)) == len(kinds)
    expected = [("perplexity", "prefill"), *((task, "decode") for task in TASKS)]
    expected += [("arc_easy", "prefill"), ("winogrande", "prefill")]
    for subject in ("dense", "compressed"):
        assert sorted(kind[1:] for kind in kinds if kind[0] == subject) == sorted(expected)
        assert len({r["run"] for r in records if r["subject"] == subject}) == 1
    assert len({record["run"] for record in records}) == 2
    for record in records:
        check(record)
    assert len(list(run.glob("results/task-*.json"))) == len(records)

    # the same again takes every figure from there, and no model runs
    with monkeypatch.context() as patch:
        patch.setattr(Subject, "active", no_forward)
        assert starkv(*args, "--json") == 0
    printed = capsys.readouterr()
    again = json.loads(printed.out)
    assert again["results"] == records
    assert again["dense"] == report["dense"] and again["compressed"] == report["compressed"]
    (said,) = (line for line in printed.err.splitlines() if line.startswith("kept from before"))
    assert all(f"{task} ({subject}, {path})" in said for subject, task, path in kinds)


def check(record: dict[str, Any]) -> None:
    """A record has the schema's fields, and figures that follow from its rows."""
    assert set(record) == {
        *("task", "subject", "path", "n", "metrics", "data", "run", "versions", "options"),
        *("rows", "seconds", "cut", "cache"),
    }
    assert record["n"] > 1
    assert len(record["run"]) == 64
    hashes = {name: value for name, value in record["data"].items() if name != "source"}
    assert "sha256" in hashes and all(len(value) == 64 for value in hashes.values())
    assert record["data"]["source"]
    assert {"starkv", "python", "torch", "transformers", "source"} <= set(record["versions"])
    assert {"backend", "device", "cache"} <= set(record["options"])
    assert (record["options"]["backend"] is None) == (record["subject"] == "dense")
    assert record["cache"]["held"] > 0
    assert record["metrics"]
    for metric in record["metrics"]:
        assert metric["value"] is not None and metric["stderr"] is not None
        values = [float(value) for name in metric["rows"] for value in record["rows"][name]]
        error = stdev(values) / len(values) ** 0.5
        # lm-eval counts documents as this does
        assert metric["stderr"] == pytest.approx(metric["slope"] * error)
        if metric["name"].startswith("acc"):
            assert metric["value"] == pytest.approx(fmean(values))
            assert len(values) == record["n"]


def test_an_interrupted_evaluation_goes_on_at_the_next_task(
    on_disk: OnDisk, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["eval", run, "--tasks", "perplexity,passkey,kv", "--text", on_disk.text, *OPTIONS]
    args += ["--mode", "prefill", "--no-dense"]
    asked: list[str] = []
    whole = builtin.retrieval

    def interrupted(subject: Any, grid: Any, **rest: Any) -> Any:
        asked.append(grid.task)
        if asked == ["passkey", "kv"]:
            raise KeyboardInterrupt
        return whole(subject, grid, **rest)

    monkeypatch.setattr(builtin, "retrieval", interrupted)
    assert starkv(*args) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not list(run.glob("results/eval-*"))
    assert starkv(*args) == 0
    assert asked == ["passkey", "kv", "kv"]
    said = capsys.readouterr().err
    assert "perplexity (compressed, prefill), passkey (compressed, decode)\n" in said


@pytest.mark.parametrize(
    "changed",
    [
        ["--window", 47],
        ["--windows", 2],
        ["--depths", "0,0.5"],
        ["--prompts", 2],
        ["--seed", 1],
        ["--lengths", 699],
        ["--dtype", "bfloat16"],
        ["--text"],
    ],
    ids=lambda changed: str(changed[0]),
)
def test_a_figure_of_anything_else_is_made_anew(
    changed: Sequence[object], on_disk: OnDisk, run: Path, tmp_path: Path
) -> None:
    task = "perplexity" if changed[0] in ("--window", "--windows") else "passkey"
    args = ["eval", run, "--tasks", task, "--no-dense", "--text", on_disk.text, *OPTIONS]
    args += ["--mode", "prefill"]
    assert starkv(*args) == 0
    if changed == ["--text"]:
        text = Path(shutil.copy(on_disk.text, tmp_path / "text.txt"))
        assert starkv(*args, "--text", text) == 0
        assert len(list(run.glob("results/task-*"))) == 1  # the same rows, elsewhere
        text.write_text(text.read_text()[1:])
        changed = ["--text", text]
    assert starkv(*args, *changed) == 0
    assert len(list(run.glob("results/task-*"))) == 2


def test_a_figure_of_other_settings_of_the_same_weights_is_made_anew(
    on_disk: OnDisk, run: Path, tmp_path: Path
) -> None:
    """What a config says of RoPE changes no weight, how a tokenizer cuts text no vocabulary."""
    model = Path(shutil.copytree(on_disk.model, tmp_path / "model"))
    args = ["eval", run, "--model", model, "--tasks", "passkey", "--no-dense"]
    args += ["--text", on_disk.text, *OPTIONS, "--mode", "prefill"]
    assert starkv(*args) == starkv(*args) == 0
    assert len(list(run.glob("results/task-*"))) == 1
    changes: list[tuple[str, Callable[[Any], object]]] = [
        ("config.json", lambda c: c.update(rope_parameters={**LINEAR, "rope_theta": 1e4})),
        ("tokenizer.json", lambda t: t.update(normalizer={"type": "NFC"})),
        ("generation_config.json", lambda g: g.update(eos_token_id=[3])),
    ]
    for made, (name, change) in enumerate(changes, 2):
        content = json.loads((model / name).read_text())
        change(content)
        (model / name).write_text(json.dumps(content))
        assert starkv(*args) == 0
        assert len(list(run.glob("results/task-*"))) == made, name
