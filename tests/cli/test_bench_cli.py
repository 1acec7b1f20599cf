"""`starkv bench`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

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


def test_codes_are_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--ctx", "4k", "--suite", "decode", "--bits", "3.2"]
    assert starkv(*SMALL, *args) == 0
    printed = capsys.readouterr().out
    assert " starkv-coded " in printed
    assert "ours in 3.24 bits" in printed
    assert "times smaller than dense: codes " in printed


def test_a_quantised_run_brings_its_own_codes(
    on_disk: OnDisk,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its base model may have moved."""
    monkeypatch.setattr("starkv_core.quant.run._CHECK_TOKENS", 24)
    run, args = tmp_path / "q", ["--device", "cpu", "--force"]
    budget = ["--ratio", 5, "--context", 1024, "--window", 8, "--scales", "row"]
    assert starkv("quantize", on_disk.run, *budget, "--out", run, *args) == 0
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["base_model"]["name"] = str(tmp_path / "gone")
    (run / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    bench = ["bench", "--shape", run, "--ctx", "4k", "--scale-down", "--device", "cpu"]
    assert starkv(*bench) == 2
    assert "gone" in capsys.readouterr().err
    moved = ["--model", on_disk.model]
    assert starkv(*bench, *moved, "--bits", "4") == 2
    assert "measured with its own codes" in capsys.readouterr().err
    assert starkv(*bench, *moved, "--suite", "all", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    coded = [r for r in records if r["backend"] == "starkv-coded"]
    assert [r["suite"] for r in coded] == ["attention", "decode", "prefill"]
    assert [r["fault"] for r in records] == [None] * len(records)
    counts = yaml.safe_load((run / "quant.yaml").read_text())["layers"]
    sides = [side for layer in counts for side in (*layer["keys"], layer["values"])]
    channels = sum(sum(side.values()) for side in sides)
    bits = sum(width * count for side in sides for width, count in side.items()) / channels
    assert {r["bits"] for r in coded} == {round(bits, 4)}


def test_folders_are_looked_at_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "starkv_core.bench.suite.run_bench", lambda *a: pytest.fail("measured all the same")
    )
    (tmp_path / "README.md").write_text("my notes\n")
    assert starkv(*SMALL, "--out", tmp_path) == 2
    assert (tmp_path / "README.md").read_text() == "my notes\n"
    (tmp_path / "README.md").unlink()
    (tmp_path / "data.jsonl").write_text("{}\n")
    assert starkv(*SMALL, "--out", tmp_path) == 2
    assert "data.jsonl, line 1: not a record" in capsys.readouterr().err


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
        (["--bits", "5"], "--bits '5'"),
        (["--bits", "many"], "--bits 'many'"),
        (["--suite", "decode", "--memory", "80GiB", "--scale-down"], "scaled-down runs have sizes"),
        (["--model", "elsewhere"], "--shape llama-2-7b is no run folder"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert starkv("bench", "--device", "cuda") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "starkv: device 'cuda': no GPU that torch can use; bench measures NVIDIA GPUs; "
        "--scale-down --device cpu shows that it works"
    ]
