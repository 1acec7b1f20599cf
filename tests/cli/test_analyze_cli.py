"""`starkv analyze`: spectra of a model and ranks of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from starkv_cli.main import main
from starkv_core.artifacts import read_safetensors, read_yaml
from tests.cli.conftest import OnDisk


def starkv(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


def test_spectra(on_disk: OnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "spectra"
    args = ["analyze", "spectra", "--model", on_disk.model, "--out", out]
    assert starkv(*args) == 0
    printed = capsys.readouterr()
    assert "keys 90/95/99%" in printed.out
    for name in ("spectra.png", "energy-ranks.png", "errors.png"):
        assert (out / name).is_file()
    tensors, metadata = read_safetensors(out / "spectra.safetensors")
    assert metadata["whitened"] == "false"
    weights, _ = read_safetensors(on_disk.model / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        keys = weights[f"{prefix}.k_proj.weight"].double().view(2, 12, 48)
        values = weights[f"{prefix}.v_proj.weight"].double()
        for name, weight in (("keys", keys), ("values", values)):
            expected = torch.linalg.svdvals(weight)
            found = tensors[f"layers.{layer}.{name}"].double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert starkv(*args) == 2
    assert "already exists" in capsys.readouterr().err


def test_whitened_spectra_in_the_default_folder(
    on_disk: OnDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = ["--text", on_disk.text, "--sequences", 4, "--length", 64]
    for _ in range(2):  # the default folder is written over
        assert (
            starkv("analyze", "spectra", "--model", on_disk.model, "--whiten", *text, "--json") == 0
        )
    found = json.loads(capsys.readouterr().out.split("\n}\n")[0] + "\n}")
    assert found["whitened"] is True
    for layer in found["layers"]:
        for ranks in (layer["key_energy_ranks"], layer["value_energy_ranks"]):
            assert 0 < ranks[0] <= ranks[1] <= ranks[2]
        for name in ("key_errors", "value_errors"):
            # The joint decomposition has every choice the head-wise one has.
            pairs = zip(layer[name]["jd"], layer[name]["hd"], strict=True)
            assert all(jd <= hd + 1e-9 for jd, hd in pairs)
    assert (tmp_path / "runs" / "spectra-model-whitened" / "spectra.safetensors").is_file()


def test_ranks(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "ranks.png"
    assert starkv("analyze", "ranks", run, "--out", figure, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    layers = read_yaml(run / "ranks.yaml")["layers"]
    assert [layer["keys"] for layer in found["layers"]] == [layer["keys"] for layer in layers]
    stored = [layer["bytes_per_token"] for layer in found["layers"]]
    assert sum(stored) == found["bytes_per_token"] <= 96
    assert found["dense_bytes_per_token"] == 192
    assert found["cache_ratio"] == pytest.approx(192 / sum(stored))
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert not (run / "figures").exists()
    assert starkv("analyze", "ranks", run) == 0
    printed = capsys.readouterr()
    assert (run / "figures" / "ranks.png").is_file()
    assert f"cache ratio {found['cache_ratio']:.2f}" in printed.out
    assert starkv("analyze", "ranks", run, "--out", figure) == 2


def test_ranks_wants_a_run(on_disk: OnDisk, capsys: pytest.CaptureFixture[str]) -> None:
    assert starkv("analyze", "ranks", on_disk.model) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_length_past_the_context(on_disk: OnDisk, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["analyze", "spectra", "--model", on_disk.model, "--whiten", "--length", 5000]
    assert starkv(*args) == 2
    err = capsys.readouterr().err
    assert "5000" in err
    assert "1024" in err
