"""`starkv quantize` end to end, and bad input: one line, exit 2, nothing overwritten."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import starkv_core.quant.run as quant_run
from starkv_cli.main import main

if TYPE_CHECKING:
    from tests.cli.conftest import OnDisk


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_run, "_CHECK_TOKENS", 24)


def run_cli(capsys: Any, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["quantize", *map(str, args)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_tables_and_the_next_step(on_disk: OnDisk, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "q"
    code, stdout, stderr = run_cli(
        capsys, on_disk.run, "--ratio", 5, "--context", 1024, "--window", 8, "--out", out,
        "--device", "cpu", "--force",
    )  # fmt: skip
    assert code == 0, stderr
    for words in ("bytes per token, predicted", "bytes per token, measured", "cache ratio",
                  "mean bits", "KL to 16-bit latents", "bits, keys", "bits, values"):  # fmt: skip
        assert words in stdout
    assert f"next: starkv eval {shlex.quote(str(out))}\n" in stderr
    assert {"quant.yaml", "quant.safetensors"} <= {p.name for p in out.iterdir()}


def test_an_unused_budget_is_said(on_disk: OnDisk, tmp_path: Path, capsys: Any) -> None:
    args = [on_disk.run, "--context", 1024, "--window", 8, "--device", "cpu", "--force"]
    for ratio, unused in ((1.5, True), (5, False)):
        code, _, stderr = run_cli(capsys, *args, "--ratio", ratio, "--out", tmp_path / f"q{ratio}")
        assert code == 0, stderr
        assert ("budget is not used up" in stderr) == unused


def test_evaluations_say_the_bits(on_disk: OnDisk, tmp_path: Path, capsys: Any) -> None:
    out, report = tmp_path / "q", tmp_path / "report"
    code, _, stderr = run_cli(
        capsys, on_disk.run, "--scheme", "paper", "--out", out, "--device", "cpu", "--force"
    )
    assert code == 0, stderr
    args = ["--tasks", "perplexity", "--window", 32, "--windows", 1, "--text", on_disk.text]
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(out), *map(str, args), "--out", str(report)])
    printed = capsys.readouterr()
    assert ended.value.code in (0, None), printed.err
    found = json.loads((report / "eval.json").read_text())

    layers = yaml.safe_load((out / "quant.yaml").read_text())["layers"]
    sides = {
        "keys": [counts for layer in layers for counts in layer["keys"]],
        "values": [layer["values"] for layer in layers],
    }
    bits = {k: sum(b * n for c in v for b, n in c.items()) for k, v in sides.items()}
    for name, counts in sides.items():
        channels = sum(n for c in counts for n in c.values())
        assert found["bits"][name] == pytest.approx(bits[name] / channels)
    width = json.loads((on_disk.model / "config.json").read_text())
    numbers = 2 * width["num_key_value_heads"] * width["head_dim"] * len(layers)
    assert found["paper_rate"] == pytest.approx(1 - sum(bits.values()) / (16 * numbers))
    for words in (
        "bits of a stored latent",
        f"{found['bits']['keys']:.2f}",
        "paper rate",
        "in bits",
    ):
        assert words in printed.out

    with pytest.raises(SystemExit):
        main(["analyze", "ranks", str(out), "--model", str(on_disk.model)])
    assert "before quantisation" in capsys.readouterr().err


def test_json_is_one_document(on_disk: OnDisk, tmp_path: Path, capsys: Any) -> None:
    code, stdout, _ = run_cli(
        capsys, on_disk.run, "--scheme", "paper", "--out", tmp_path / "q", "--device", "cpu",
        "--json", "--force",
    )  # fmt: skip
    assert code == 0
    document = json.loads(stdout)
    assert document["scheme"]["name"] == "paper"
    assert document["predicted_bytes"] == document["measured_bytes"]
    assert 3.0 < document["bits"] < 4.0


def test_a_broken_result_exits_with_1(
    on_disk: OnDisk, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_run, "KL_LIMIT", 1e-9)
    before = listing(on_disk.run)
    code, stdout, stderr = run_cli(capsys, on_disk.run, "--device", "cpu", "--bits", 3)
    assert (code, stdout) == (1, "")
    assert "limit 1e-09" in stderr and "--force" in stderr
    assert listing(on_disk.run) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--widths", "4,5"], ["5 bits cannot be packed"]),
        (["--widths", "four"], ["--widths", "'four'"]),
        (["--bits", 9], ["bits 9", "at most 8"]),
        (["--ratio", 500], ["below the floor of", "raise the budget"]),
        (["--fit", "512@lots"], ["--fit", "512@lots", "TOKENS@MEMORY"]),
        (["--fit", "1k@1KB"], ["below the floor of"]),
        (["--ratio", 4, "--bits", 3], ["--bits and --ratio", "several"]),
        (["--scheme", "stra"], ["'stra'", "nearest is star"]),
        (["--scheme", "paper", "--ratio", 8], ["paper", "--ratio"]),
        (["--scheme", "paper", "--window", 8], ["paper", "window"]),
        (["--window", 1024], ["window 1024", "context of 1024"]),
        (["--context", 100000], ["context 100000", "1024"]),
        (["--recover-steps", -5], ["recover-steps -5"]),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else None,
)
def test_bad_options(
    on_disk: OnDisk, tmp_path: Path, capsys: Any, args: list[object], words: list[str]
) -> None:
    before = listing(on_disk.run)
    out = tmp_path / "q"
    code, stdout, stderr = run_cli(capsys, on_disk.run, *args, "--out", out, "--device", "cpu")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("starkv: ") and stderr.count("\n") == 1
    for word in words:
        assert word in stderr
    assert listing(on_disk.run) == before and not out.exists()


def test_a_run_that_is_none_or_quantised_already(
    on_disk: OnDisk, tmp_path: Path, capsys: Any
) -> None:
    code, _, stderr = run_cli(capsys, tmp_path, "--device", "cpu")
    assert code == 2 and "not a run folder" in stderr
    out = tmp_path / "q"
    shutil.copytree(on_disk.run, out)
    assert run_cli(capsys, out, "--device", "cpu", "--force")[0] == 0
    before = listing(out)
    for more in ([], ["--out", tmp_path / "other"], ["--force"]):
        code, _, stderr = run_cli(capsys, out, "--device", "cpu", *more)
        assert code == 2 and "already quantised" in stderr
    code, _, stderr = run_cli(capsys, on_disk.run, "--device", "cpu", "--out", out)
    assert code == 2 and "already exists" in stderr
    assert listing(out) == before and not (tmp_path / "other").exists()
    text = (out / "quant.yaml").read_text()
    (out / "quant.yaml").write_text(text.replace("schema: 1", "schema: 9", 1))
    with pytest.raises(SystemExit) as ended:
        main(["chat", str(out), "--prompt", "x", "--device", "cpu"])
    stderr = capsys.readouterr().err
    assert ended.value.code == 2 and "newer starkv" in stderr
