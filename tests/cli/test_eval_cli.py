"""`starkv eval`: the table, the report, the figure, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from starkv_cli.main import main
from tests.cli.conftest import OnDisk

SMALL = [
    "--window",
    "256",
    "--windows",
    "2",
    "--lengths",
    "400",
    "--depths",
    "0,1",
    "--prompts",
    "1",
]


def starkv(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


def record(report: dict[str, Any], task: str, subject: str, path: str | None = None) -> Any:
    """The only record of a task."""
    (found,) = (
        one
        for one in report["results"]
        if (one["task"], one["subject"]) == (task, subject) and path in (None, one["path"])
    )
    return found


def test_run_beside_its_dense_model(
    on_disk: OnDisk, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    done = starkv("eval", run, *SMALL, "--text", on_disk.text, "--out", out)
    printed = capsys.readouterr()
    assert done == 0, printed.err
    table = {
        cells[0]: cells[1:]
        for line in printed.out.splitlines()
        if (cells := [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")])[1:]
    }
    assert table[""] == ["dense", "compressed"]
    report = json.loads((out / "eval.json").read_text())
    dense, compressed = (record(report, "perplexity", c) for c in ("dense", "compressed"))
    cells = table["perplexity, ppl (prefill, n 2 x 256 tokens)"]
    for cell, found in zip(cells, (dense, compressed), strict=True):
        assert cell.startswith(f"{found['metrics'][0]['value']:.4g} ± ")
    change = compressed["metrics"][0]["value"] - dense["metrics"][0]["value"]
    shown = re.search(r"\(([+-]\d+\.?(\d*)) ± ", cells[1])
    assert shown is not None
    assert float(shown[1]) == pytest.approx(change, rel=0, abs=0.501 * 10 ** -len(shown[2]))
    assert "(" not in cells[0] and "unpaired" not in printed.out.split("╰")[0].split("└")[0]
    assert dense["rows"]["nll"] != compressed["rows"]["nll"]
    assert dense["n"] == compressed["n"] == 2
    # 2 layers, keys and values, 2 heads of 12 numbers, 2 bytes
    assert table["cache bytes per token (measured at 256 tokens)"] == ["192", "96"]
    assert table["cache ratio"] == ["1.00", "2.00"]
    assert table["paper rate (compressed layers only)"] == ["", "50.0%"]
    for task in ("pass-key", "key-value"):
        assert {f"{task}, acc{of} (decode, n 2)" for of in ("", " at 400 tokens")} <= table.keys()
    assert (out / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    assert report["text"]["sha256"] == hashlib.sha256(on_disk.text.read_bytes()).hexdigest()
    assert report["model"]["name"] == str(on_disk.model)
    assert report["schema"] == 1
    assert report["versions"]["torch"]


def test_modes_agree_on_the_deployed_path(
    on_disk: OnDisk, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--tasks", "perplexity", "--window", "64", "--windows", "3", "--mode", "both"]
    assert starkv("eval", run, *args, "--text", on_disk.text, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    one, other = (
        record(report, "perplexity", "compressed", path) for path in ("prefill", "decode")
    )
    # Both read the same 16-bit latents; they differ by the order of float32 sums.
    assert one["rows"]["nll"] == pytest.approx(other["rows"]["nll"], rel=1e-4)


def test_results_of_one_second_do_not_replace_each_other(
    on_disk: OnDisk, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import starkv_cli.commands.eval as command

    class Frozen(command.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2030, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(command, "datetime", Frozen)
    args = ["--tasks", "perplexity", "--window", 32, "--windows", 1, "--no-dense"]
    for _ in range(3):
        assert starkv("eval", run, *args, "--text", on_disk.text) == 0
    names = {path.name for path in run.glob("results/eval-*")}
    assert names == {f"eval-20300102T030405Z{tail}.json" for tail in ("", "-2", "-3")}


def test_results_land_in_the_run(
    on_disk: OnDisk, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = starkv("eval", run, *SMALL, "--tasks", "passkey", "--text", on_disk.text, "--no-dense")
    printed = capsys.readouterr()
    assert done == 0, printed.err
    figure, report = sorted(run.rglob("eval-*"))
    assert (figure.parent.name, report.parent.name) == ("figures", "results")
    assert (figure.suffix, report.suffix) == (".png", ".json")
    assert report.stem == figure.stem
    assert str(report) in printed.err
    found = json.loads(report.read_text())
    assert "dense" not in found
    assert [one["task"] for one in found["results"]] == ["passkey"]
    assert "compressed" in printed.out
    assert "dense" not in printed.out


def test_plain_model_writes_nothing_and_json_is_alone_on_stdout(
    on_disk: OnDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert starkv("eval", on_disk.model, *SMALL, "--text", on_disk.text, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert "compressed" not in report
    assert report["paper_rate"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_place_named_twice_is_asked_once(
    on_disk: OnDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it is written: prompts of equal depths are equal, and would count as two rows."""
    args = ["--tasks", "passkey", "--lengths", "400,0400", "--depths", "0,0.0,1", "--prompts", "1"]
    assert starkv("eval", on_disk.model, *args, "--text", on_disk.text, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["n"] == 2
    assert (found["options"]["lengths"], found["options"]["depths"]) == ([400], [0.0, 1.0])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--tasks", "perplxity,kw"], ["perplxity", "did you mean perplexity", "'kw'", "kv"]),
        (["--tasks", ""], ["tasks"]),
        (["--mode", "tokens"], ["--mode 'tokens'", "prefill, token or both"]),
        (["--data", "no/such"], ["--data no/such", "no such folder"]),
        (["--lengths", "256,many"], ["--lengths", "256,many"]),
        (["--depths", "0,1.5"], ["1.5", "0 to 1"]),
        (["--prompts", "0", "--batch", "0"], ["prompts 0", "batch 0"]),
        (["--window", "1", "--windows", "0"], ["window 1: at least 2", "windows 0", "1 or more"]),
        (["--window", "2000"], ["2000", "1024"]),
        (["--tasks", "passkey", "--lengths", "2000"], ["2000", "1024"]),
        (["--text", "not/here/at-all.txt"], ["not/here/at-all.txt", "no such file"]),
        (["--text", "wiki.test.raw"], ["wiki.test.raw", "no such file"]),
        (["--out", "."], ["already exists"]),
    ],
)
def test_bad_options(
    on_disk: OnDisk, args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["eval", on_disk.model]
    if "--text" not in args:
        base += ["--text", on_disk.text]
    assert starkv(*base, *args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(word in printed.err for word in words), printed.err


@pytest.mark.parametrize("content", [b"", b"\n\n", b"caf\xe9"])
def test_unusable_text(
    on_disk: OnDisk, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.raw"
    path.write_bytes(content)
    assert starkv("eval", on_disk.model, "--text", path) == 2
    assert ("UTF-8" if content.startswith(b"caf") else "empty") in capsys.readouterr().err


def test_runs_side_by_side(
    on_disk: OnDisk, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "both"
    args = ["--tasks", "perplexity", "--window", 64, "--windows", 2, "--text", on_disk.text]
    assert starkv("eval", run, *args, "--out", first) == 0
    assert starkv("eval", on_disk.model, *args, "--out", second) == 0
    capsys.readouterr()
    assert starkv("eval", "--compare", first, second, "--out", out, "--json") == 0
    columns = json.loads(capsys.readouterr().out)["columns"]
    # one dense model, whichever report has it
    assert [column["label"] for column in columns] == ["dense", str(first)]
    values = [column["figures"][0]["value"] for column in columns]
    report = json.loads((first / "eval.json").read_text())
    assert values == [
        record(report, "perplexity", name)["metrics"][0]["value"]
        for name in ("dense", "compressed")
    ]
    assert columns[1]["figures"][0]["difference"]["paired"]
    assert {path.name for path in out.iterdir()} == {"compare.png", "compare.json"}
    assert starkv("eval", "--compare", first) == 0
    assert "perplexity, ppl (prefill, n 2 x 64 tokens)" in capsys.readouterr().out
    for refused, words in (
        (["eval", first, second], "--compare"),
        (["eval", "--compare"], "name the runs"),
        (["eval", "--compare", tmp_path / "none"], "no report"),
        (["eval", "--compare", first, "--out", out], "already exists"),
    ):
        assert starkv(*refused) == 2
        assert words in capsys.readouterr().err
