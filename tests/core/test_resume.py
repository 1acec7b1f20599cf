"""`kill -9` at any moment, then `--resume`: the result of an uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import starkv_core.calibrate.loop as loop
from starkv_core.artifacts import read_manifest, write_yaml_atomic
from starkv_core.calibrate import run_calibration
from starkv_core.errors import UserError
from starkv_core.recipe import load_recipe
from tests.core.killed_runs import MOMENTS
from tests.standin import TEXT, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["star", "paper"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run and one for every moment, killed there and resumed."""
    folder = tmp_path_factory.mktemp(f"killed-{request.param}")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    recipe = {
        "method": request.param,
        "model": {"name": str(save_model(folder / "model"))},
        "budget": {"ratio": 2.0},
        "steps": 8,
        "rank_steps": 4,
        "batch": 1,
        "data": {"source": str(folder / "text.txt"), "length": 24},
        "start": {"sequences": 2, "probes": 1},
        "optim": {"checkpoint_every": 3},
    }
    write_yaml_atomic(folder / "recipe.yaml", recipe)
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.killed_runs", str(folder), str(folder / "recipe.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == {"": [0], **{moment: [-9, 0] for moment in MOMENTS}}, done.stderr
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_equals_uninterrupted(runs: Path, moment: str) -> None:
    whole, resumed = runs / "whole", runs / moment.replace(" ", "-")
    for name in ("recipe.yaml", "metrics.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    # The comment of ranks.yaml names its folder; the rest is the same.
    left, right = (
        [line for line in (run / "ranks.yaml").read_text().splitlines() if line[0] != "#"]
        for run in (whole, resumed)
    )
    assert left == right
    a, b = (load_file(run / "factors.safetensors") for run in (whole, resumed))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert tensor.numpy().tobytes() == b[name].numpy().tobytes(), name
    one, other = (read_manifest(run)["calibration"] for run in (whole, resumed))
    for key in ("kl", "ratio", "bytes_per_token"):
        assert one[key] == other[key]
    # Nothing of the interrupted attempt is left.
    assert {p.name for p in whole.iterdir()} == {p.name for p in resumed.iterdir()}


def test_a_finished_run_is_not_trained_again(runs: Path) -> None:
    run = runs / "whole"
    before = {p: p.stat().st_mtime_ns for p in run.iterdir()}
    recipe = load_recipe(run / "recipe.yaml")
    result = run_calibration(recipe, run, resume=True, device="cpu")
    assert result.to_dict() == read_manifest(run)["calibration"]
    assert {p: p.stat().st_mtime_ns for p in run.iterdir()} == before


@pytest.mark.parametrize("gone", [True, False])
def test_a_finished_run_needs_no_text(runs: Path, gone: bool) -> None:
    run, text = runs / "whole", runs / "text.txt"
    if gone:
        text.unlink()
    else:
        text.write_text("other words " * 2000, encoding="utf-8")
    try:
        result = run_calibration(load_recipe(run / "recipe.yaml"), run, resume=True, device="cpu")
    finally:
        text.write_text(TEXT, encoding="utf-8")
    assert result.to_dict() == read_manifest(run)["calibration"]


def test_another_text_cannot_resume(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would go on, and the text held out to measure it would have been trained on."""
    recipe = load_recipe(runs / "recipe.yaml", [f"data.source={tmp_path / 'text.txt'}"])
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT, encoding="utf-8")
    with monkeypatch.context() as broken:
        broken.setattr(loop._Calibration, "step", None)
        with pytest.raises(TypeError):
            run_calibration(recipe, run, device="cpu")
    assert len(read_manifest(run)["tokens_sha256"]) == 64
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    text.write_text(TEXT.replace("fox", "dog"), encoding="utf-8")
    with pytest.raises(UserError, match="gives other tokens than the run was started") as caught:
        run_calibration(recipe, run, resume=True, device="cpu")
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    text.write_text(TEXT, encoding="utf-8")
    run_calibration(recipe, run, resume=True, device="cpu")


def test_another_recipe_cannot_resume(runs: Path) -> None:
    recipe = load_recipe(runs / "whole" / "recipe.yaml", ["steps=9"])
    with pytest.raises(UserError, match="was started with another recipe"):
        run_calibration(recipe, runs / "whole", resume=True, device="cpu")
