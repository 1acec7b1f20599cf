"""`starkv bench`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starkv_cli.main import main
from starkv_core.bench.records import KEYS
from tests.cli.conftest import OnDisk

SMALL = ["bench", "--ctx", "4k,16k", "--batch", "1", "--scale-down", "--device", "cpu"]


def starkv(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


def test_scaled_down_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert starkv(*SMALL, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    for backend in ("sdpa-default", "sdpa-flash", "rebuild", "starkv *"):
        assert printed.out.count(f" {backend} ") == 2
    assert "batch 1: ours" in printed.out
    assert "* starkv: latent attention by the reference backend" in printed.out
    assert "they show that it works, nothing more" in printed.err
    names = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert names == [".jsonl", ".md", ".png"]


def test_json_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert starkv(*SMALL, "--json", "--dtype", "bfloat16") == 0
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 8
    assert all(tuple(record) == KEYS for record in records)
    assert {record["ctx"] for record in records} == {64, 256}


def test_a_run_folder_is_a_shape(on_disk: OnDisk, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--suite", "all", "--shape", on_disk.run, "--json"]
    assert starkv("bench", "--ctx", "4k", "--scale-down", "--device", "cpu", *args) == 0
    records = json.loads(capsys.readouterr().out)
    assert [r["fault"] for r in records] == [None] * 8
    assert {r["shape"] for r in records} == {str(on_disk.run)}


def test_a_wrong_backend_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import starkv_core.bench.attention as attention

    real = attention.latent_attention
    monkeypatch.setattr(attention, "latent_attention", lambda *a, **k: 2 * real(*a, **k))
    assert starkv(*SMALL, "--ctx", "4k") == 1
    printed = capsys.readouterr()
    assert "starkv: wrong: relative error 1" in printed.out
    assert printed.err.strip().splitlines()[-1].startswith("starkv: 1 of 4 measurements failed")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--ctx", "32k", "--batch", "16", "--device", "cpu"], "--scale-down"),
        (["--ctx", "many"], "--ctx 'many'"),
        (["--batch", "0"], "batch: whole numbers from 1"),
        (["--memory", "80"], "--memory '80'"),
        (["--memory", "80GiB"], "only the suite decode"),
        (["--suite", "speed"], "suite 'speed'"),
        (["--shape", "gpt-5"], "llama-2-7b"),
        (["--dtype", "float32"], "dtype 'float32'"),
        (["--backend", "cuda", "--scale-down"], "backend 'cuda'"),
        (["--record", "--scale-down"], "--record"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert starkv("bench", *args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
