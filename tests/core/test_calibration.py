"""Calibration of a tiny model on disk: budget, loss, records, reproducibility, export."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from starkv_core.artifacts import read_yaml, write_yaml_atomic
from starkv_core.budget import bytes_per_token
from starkv_core.calibrate import export_run, plan, run_calibration
from starkv_core.calibrate.loop import (
    CalibrationResult,
    _Calibration,
    budget_for,
    calibration_tokens,
    deployed_kl,
    schedule,
)
from starkv_core.calibrate.start import build_start, gate_settings
from starkv_core.calibrate.student import Student
from starkv_core.errors import RunFailure, UserError
from starkv_core.factors import GateSettings, TrainedFactors
from starkv_core.models.load import LoadedModel, load
from starkv_core.progress import SILENT
from starkv_core.rank_map import LayerRanks
from starkv_core.recipe import Recipe, load_recipe, parse_recipe
from starkv_core.run import FACTORS, open_subject, read_ranks, read_trained
from tests.standin import TEXT, save_model
from tests.tolerances import FP32_LOGITS

LENGTH = 32


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 2 layers, 2 key heads of 12, hidden 48, and a text."""
    folder = tmp_path_factory.mktemp("calibration")
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return save_model(folder / "model"), text


@pytest.fixture
def make(on_disk: tuple[Path, Path]) -> Any:
    def made(**changes: Any) -> Recipe:
        model, text = on_disk
        content: dict[str, Any] = {
            "model": {"name": str(model)},
            "budget": {"ratio": 2.0},
            "steps": 6,
            "rank_steps": 3,
            "batch": 2,
            "data": {"source": str(text), "length": LENGTH},
        }
        start = {"sequences": 6, "probes": 1}
        for key, value in changes.items():
            both = isinstance(value, dict) and key in ("data", "model")
            content[key] = {**content[key], **value} if both else value
        content["start"] = {**start, **changes.get("start", {})}
        return parse_recipe(content, where="test")

    return made


def calibrate(recipe: Recipe, out: Path, **options: Any) -> CalibrationResult:
    return run_calibration(recipe, out, device="cpu", **options)


def prepared(recipe: Recipe, run_dir: Path) -> _Calibration:
    """A calibration that stands before its first step."""
    loaded = load(recipe.model.name, device="cpu")
    budget = budget_for(recipe, loaded.spec)
    tokens = calibration_tokens(recipe, loaded.tokenizer)
    run_dir.mkdir()
    made = _Calibration(recipe, run_dir, loaded, budget, tokens, SILENT)
    layers = build_start(loaded, recipe, budget, made.pool[: recipe.start.sequences])
    made.student = Student(loaded, layers, gate_settings(recipe))
    made.frozen, made.shift = False, 0.0
    made.optimizer = made.make_optimizer()
    return made


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def ranks_of(run_dir: Path) -> list[Any]:
    found: list[Any] = read_yaml(run_dir / "ranks.yaml")["layers"]
    return found


# --- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["star", "paper"])
@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    "budget",
    [{"ratio": 1.3}, {"ratio": 2.7}, {"bytes_per_token": 101}, {"fit": "300@50KiB"}],
    ids=str,
)
def test_budget_is_met_exactly(
    make: Any, tmp_path: Path, method: str, steps: int, budget: dict[str, Any]
) -> None:
    """Never above, and within one row step of 16 bytes (docs/design.md section 4)."""
    recipe = make(method=method, steps=steps, rank_steps=steps // 2, budget=budget)
    result = calibrate(recipe, tmp_path / "run")
    dense = 2 * 2 * 24 * 2
    limit = {
        "ratio": dense / budget.get("ratio", 1.0),
        "bytes_per_token": 101,
        "fit": 50 * 1024 / 512,
    }[next(iter(budget))]
    assert result.bytes_per_token <= limit < result.bytes_per_token + 16
    assert result.bytes_per_token == plan(recipe, device="cpu").bytes_per_token_after
    assert result.ratio == dense / result.bytes_per_token
    subject = open_subject(str(tmp_path / "run"), device="cpu")
    assert subject.ranks is not None
    assert bytes_per_token(subject.spec, subject.ranks) == result.bytes_per_token
    with torch.no_grad(), subject.active() as model:
        cache = subject.new_cache()
        model(torch.randint(0, 256, (1, 256)), past_key_values=cache)
    assert cache.nbytes == 256 * result.bytes_per_token


@pytest.mark.parametrize("method", ["star", "paper"])
def test_budget_with_dense_layers_and_groups(make: Any, tmp_path: Path, method: str) -> None:
    start = {"skip_layers": [-1], "value_group": 1, "key_group": 2}
    recipe = make(method=method, steps=2, rank_steps=1, budget={"ratio": 1.5}, start=start)
    result = calibrate(recipe, tmp_path / "run")
    assert result.bytes_per_token == 128
    first, last = ranks_of(tmp_path / "run")
    assert last == "dense"
    assert (len(first["keys"]), len(first["values"])) == (1, 2)


# --- what trains, and what must not --------------------------------------------------------------


def test_base_model_is_untouched(make: Any, tmp_path: Path) -> None:
    made = prepared(make(), tmp_path / "run")
    live = made.loaded.model
    before = {name: t.clone() for name, t in live.state_dict().items()}
    own = {id(m): dict(vars(m)) for m in live.modules()}
    made.train()
    made.finish({"files": {}, "schema": 1}, 0.0, None)
    for name, tensor in live.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for module in live.modules():
        assert "forward" not in vars(module)
        assert vars(module).keys() == own[id(module)].keys()
    assert all(p.grad is None and not p.requires_grad for p in live.parameters())


def test_only_factors_and_thresholds_train_in_fp32(make: Any, tmp_path: Path) -> None:
    """Traps 9 and 10: fp32 masters, and one copy of the base for teacher and student."""
    made = prepared(make(), tmp_path / "run")
    base = {p.data_ptr() for p in made.loaded.model.parameters()}
    trained = [p for group in made.optimizer.param_groups for p in group["params"]]
    names = {name.rpartition(".")[2] for name, _ in made.student.named_parameters()}
    assert names == {"up", "down", "alpha", "bias"}
    assert {id(p) for p in trained} == {id(p) for p in made.student.parameters()}
    assert all(p.dtype == torch.float32 for p in trained)
    assert not base & {p.data_ptr() for p in trained}
    with made.student.active() as model:
        assert model is made.loaded.model
        assert {p.data_ptr() for p in model.parameters()} == base
    start = {name: p.detach().clone() for name, p in made.student.named_parameters()}
    for step in range(2):
        made.step(step)
    moved = {n for n, p in made.student.named_parameters() if not torch.equal(p, start[n])}
    assert moved == start.keys()
    made.freeze()
    at = [alpha.clone() for alpha in made.alphas()]
    made.step(2)
    assert all(torch.equal(a, b) for a, b in zip(at, made.alphas(), strict=True))


# --- the paper's loss ----------------------------------------------------------------------------


def test_papers_gate_and_rank_loss(make: Any, tmp_path: Path) -> None:
    made = prepared(make(method="paper"), tmp_path / "run")
    assert made.recipe.optim.gamma == 0.1
    for f in made.factors():
        sigma, alpha = f.sigma.double(), f.alpha.detach().double()[f.owner]
        wanted = sigma * torch.tanh(50.0 * (sigma - alpha)) * (sigma > alpha)
        found = f.gates(made.student.settings).detach().double()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    by_hand = sum(math.exp(-float(a)) for alpha in made.alphas() for a in alpha)
    assert float(made.rank_loss().detach()) == pytest.approx(by_hand, rel=1e-6)
    made.rank_loss().backward()
    for alpha in made.alphas():
        assert alpha.grad is not None
        torch.testing.assert_close(alpha.grad, -alpha.detach().neg().exp())


def test_papers_thresholds_rise(make: Any, tmp_path: Path) -> None:
    recipe = make(
        method="paper", steps=40, rank_steps=40, optim={"gamma": 1.0}, budget={"ratio": 2.5}
    )
    made = prepared(recipe, tmp_path / "run")
    before = torch.cat([a.detach().clone() for a in made.alphas()])
    full = made.student.numbers()
    for step in range(10):
        made.step(step)
    after = torch.cat([a.detach() for a in made.alphas()])
    assert bool((after > before).all())
    assert made.student.numbers() <= full


def test_papers_rank_phase_ends_once_the_stored_bytes_fit(make: Any, tmp_path: Path) -> None:
    """Rows of latents that fit by themselves may not fit with their padding."""
    recipe = make(method="paper", steps=40, rank_steps=40, budget={"ratio": 2.0})  # 48 numbers
    made = prepared(recipe, tmp_path / "run")
    first, second = made.student.by_layer().values()
    settings = made.student.settings
    second.set_ranks(LayerRanks((7, 1), (9,)), settings)
    for keys, stored, done in (((9, 8), 56, False), ((8, 8), 48, True)):
        first.set_ranks(LayerRanks(keys, (7,)), settings)
        assert made.student.numbers() == stored
        assert made.ranks_are_done(0) is done
    made.freeze()
    settled = made.student.ranks().layers
    assert [layer.total for layer in settled if layer] == [
        layer.stored for layer in settled if layer
    ]
    assert made.student.numbers() == 48


# --- star's multiplier ---------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_multiplier_meets_the_limit(make: Any, tmp_path: Path, step: int) -> None:
    made = prepared(make(steps=6, rank_steps=6), tmp_path / "run")
    everything = sum(sum(f.counts) for f in made.factors())
    fallen = min(1.0, (step + 1) / (0.7 * 6))
    limit = made.budget.numbers + (1 - fallen) * 0.8 * (everything - made.budget.numbers)
    shift = made.multiplier(step)
    found = float(made.student.soft_numbers(shift).detach())
    assert found == pytest.approx(limit, abs=0.01)
    if step == 5:
        assert limit == made.budget.numbers


def test_multiplier_carries_the_gradient_of_the_constraint(make: Any, tmp_path: Path) -> None:
    """d(loss at the limit)/d(alpha), by central differences of the solved problem."""
    made = prepared(make(), tmp_path / "run")
    torch.manual_seed(0)
    weights = [torch.randn(len(f.sigma)) for f in made.factors()]

    def loss() -> torch.Tensor:
        shift = made.multiplier(5)
        gates = [f.gates(made.student.settings, shift) for f in made.factors()]
        return torch.stack([(g * w).sum() for g, w in zip(gates, weights, strict=True)]).sum()

    alphas = made.alphas()
    exact = torch.autograd.grad(loss(), alphas)
    step = 3e-3  # sums of hundreds in float32: over a smaller one their rounding shows
    for alpha, gradient in zip(alphas, exact, strict=True):
        for i in range(len(alpha)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    alpha[i] += sign * step
                values.append(float(loss().detach()))
                with torch.no_grad():
                    alpha[i] -= sign * step
            numeric = (values[0] - values[1]) / (2 * step)
            assert float(gradient[i]) == pytest.approx(numeric, rel=0.03, abs=0.03)
    # Moving all thresholds alike changes nothing: the multiplier takes it back.
    assert float(sum(g.sum() for g in exact)) == pytest.approx(0.0, abs=1e-3)


# --- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["star", "paper"])
def test_metrics(make: Any, tmp_path: Path, method: str) -> None:
    result = calibrate(make(method=method, steps=7, rank_steps=3), tmp_path / "run")
    found = metrics(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(1, 8))
    keys = {"step", "phase", "kl", "bytes_per_token", "shift"}
    assert all(line.keys() == keys for line in found)
    phases = [line["phase"] for line in found]
    assert phases == sorted(phases, key=["ranks", "recovery"].index)
    assert phases[-1] == "recovery"
    for line in found:
        assert math.isfinite(line["kl"]) and line["kl"] >= 0.0
        if line["phase"] == "recovery":
            assert line["bytes_per_token"] == result.bytes_per_token
            assert line["shift"] == 0.0


@pytest.mark.parametrize("method", ["star", "paper"])
def test_recovery_brings_the_loss_down(make: Any, tmp_path: Path, method: str) -> None:
    """Overfit: four sequences again and again, ranks fixed from the start."""
    optim = {"lr": 2e-2, "lr_relative": True, "checkpointing": False}
    recipe = make(
        method=method, steps=25, rank_steps=0, batch=4, data={"sequences": 4}, optim=optim
    )
    calibrate(recipe, tmp_path / "run")
    kl = [line["kl"] for line in metrics(tmp_path / "run")]
    assert kl[-1] < 0.6 * kl[0]


def test_deployed_kl_is_the_full_one(make: Any, tmp_path: Path) -> None:
    recipe = make()
    result = calibrate(recipe, tmp_path / "run")
    subject = open_subject(str(tmp_path / "run"), device="cpu")
    rows = calibration_tokens(recipe, subject.tokenizer)[:4]
    found = []
    for row in rows:
        with torch.no_grad():
            teacher = subject.model(row[None]).logits.double().log_softmax(-1)
            with subject.active() as model:
                student = model(row[None], past_key_values=subject.new_cache()).logits
            student = student.double().log_softmax(-1)
        found.append(float((teacher.exp() * (teacher - student)).sum(-1).mean()))
    assert result.kl == pytest.approx(sum(found) / 4, rel=1e-4)
    assert deployed_kl(subject, rows) == pytest.approx(result.kl, rel=1e-6)
    assert result.kl > 0.0


def test_pieces_of_a_batch_add_up(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that goes through the model in uneven pieces is one batch: loss and gradients."""
    found = []
    for name, tokens in (("whole", 4096), ("pieces", 2 * LENGTH)):
        monkeypatch.setattr("starkv_core.calibrate.loop.MICRO_TOKENS", tokens)
        made = prepared(make(batch=3, optim={"grad_clip": 1e9}), tmp_path / name)
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(
            made.optimizer,
            "step",
            lambda made=made, seen=seen: seen.extend(p.grad for p in made.student.parameters()),
        )
        found.append((made.step(0), seen))
    (loss, whole), (summed, pieces) = found
    assert summed == pytest.approx(loss, rel=1e-5)
    for a, b in zip(whole, pieces, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-9


def test_learning_rate_over_the_steps() -> None:
    """Linear over the warm-up, then half a cosine to zero."""
    found = [schedule(step, 100, 0.05) for step in range(100)]
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5] == 1.0 and found[52] == pytest.approx(0.5, abs=0.01)
    assert found[5:] == sorted(found[5:], reverse=True) and 0.0 < found[-1] < 1e-3


def test_a_loss_that_is_not_finite_fails_the_run(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(student: torch.Tensor, *_: Any) -> torch.Tensor:
        return (student * float("nan")).sum()

    monkeypatch.setattr("starkv_core.calibrate.loop.distillation_loss", broken)
    with pytest.raises(RunFailure, match="the loss is not finite at step 1"):
        calibrate(make(start={"allocation": "common"}), tmp_path / "run")


# --- seeds ---------------------------------------------------------------------------------------


def factors(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / FACTORS)


def same(a: Path, b: Path) -> bool:
    left, right = factors(a), factors(b)
    return left.keys() == right.keys() and all(
        left[n].shape == right[n].shape and torch.equal(left[n], right[n]) for n in left
    )


@pytest.mark.parametrize("method", ["star", "paper"])
def test_seeds(make: Any, tmp_path: Path, method: str) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        calibrate(make(method=method, seed=seed), tmp_path / name)
    assert same(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert ranks_of(tmp_path / "a") == ranks_of(tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


@pytest.mark.parametrize("method", ["star", "paper"])
def test_ranks_that_are_not_learned_are_the_starts(make: Any, tmp_path: Path, method: str) -> None:
    """The paper's method took its own order of components instead of start.allocation."""
    start = {"allocation": "uniform"}
    for name, steps in (("one-shot", 0), ("trained", 2)):
        calibrate(make(method=method, steps=steps, rank_steps=0, start=start), tmp_path / name)
    assert ranks_of(tmp_path / "trained") == ranks_of(tmp_path / "one-shot")


def test_time_of_all_attempts_counts(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, clock, step = make(optim={"checkpoint_every": 2}), [0.0], _Calibration.step

    def slow(self: _Calibration, number: int) -> float:
        clock[0] += 100.0
        if number == 4 and clock[0] == 500.0:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(_Calibration, "step", slow)
    monkeypatch.setattr(
        "starkv_core.calibrate.loop.time", SimpleNamespace(monotonic=lambda: clock[0])
    )
    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe, tmp_path / "run")
    result = calibrate(recipe, tmp_path / "run", resume=True)
    assert result.seconds == 600.0  # 6 steps; the one that was lost is not counted
    assert result.tokens_per_second == result.tokens / 600.0


def test_the_estimate_of_time_survives_a_hiccup(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was several times too long whenever the one product it timed had to wait."""
    found = []
    for slow in (None, 0, 3):
        took = iter([t for n in range(20) for t in (0.0, 5.0 if n == slow else 0.01)])
        clock = SimpleNamespace(perf_counter=lambda took=took: next(took))
        monkeypatch.setattr(sys.modules[plan.__module__], "time", clock)
        found.append(plan(make(), device="cpu").seconds)
    assert found[0] == found[1] == found[2]


# --- editing ranks and exporting -----------------------------------------------------------------


@contextmanager
def edited(run_dir: Path) -> Iterator[list[Any]]:
    content = read_yaml(run_dir / "ranks.yaml")
    yield content["layers"]
    write_yaml_atomic(run_dir / "ranks.yaml", content)


def logits(loaded: LoadedModel, student: Student, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), student.active() as model:
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("method", ["star", "paper"])
def test_edited_ranks_are_exported(make: Any, tmp_path: Path, method: str) -> None:
    run_dir = tmp_path / "run"
    trained_run = calibrate(make(method=method, steps=3, rank_steps=1), run_dir)
    trained_ranks = ranks_of(run_dir)
    with edited(run_dir) as layers:
        layers[0]["keys"][1] -= 1
        layers[0]["keys"][0] += 1
        layers[1]["values"] = 3
    wanted = [dict(layer) for layer in ranks_of(run_dir)]
    with pytest.raises(UserError, match=re.escape(f"starkv calibrate --export {run_dir}")):
        open_subject(str(run_dir), device="cpu")
    files = {p.name for p in run_dir.iterdir()}
    result = export_run(run_dir, device="cpu")
    assert {p.name for p in run_dir.iterdir()} == files
    assert ranks_of(run_dir) == wanted
    # Any ranks will do; rows that they do not fill are padded, and that counts.
    totals = [sum(layer["keys"]) for layer in wanted] + [layer["values"] for layer in wanted]
    assert totals[-1] == 3
    assert result.bytes_per_token == sum(2 * (-(-n // 8) * 8) for n in totals)
    assert result.paper_rate == pytest.approx(1 - sum(totals) / 96)
    assert result.kl is None
    assert "time" not in dict(result.rows())

    # The trained form, cut by hand: thresholds between the components wanted and the others.
    subject = open_subject(str(run_dir), device="cpu")
    loaded = subject.base
    manifest = json.loads((run_dir / "manifest.json").read_text())
    layers_now, settings = read_trained(run_dir, loaded, manifest["files"][FACTORS])
    for i, layer in layers_now.items():
        for kind, f in (("keys", layer.keys), ("values", layer.values)):
            ranks = wanted[i][kind]
            ranks = ranks if isinstance(ranks, list) else [ranks]
            gates = f.gates(settings).detach().split(f.counts)
            for gate, rank in zip(gates, ranks, strict=True):
                assert bool((gate[:rank] > 0).all()) and bool((gate[rank:] == 0).all())
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), subject.active() as model:
        deployed = model(ids, use_cache=False).logits
    trained = logits(loaded, Student(loaded, layers_now, settings), ids)
    torch.testing.assert_close(deployed, trained, rtol=0, atol=FP32_LOGITS)

    # What training did stays on record; a finished run that is resumed shows what is deployed.
    assert manifest["calibration"] == trained_run.to_dict()
    assert set(manifest["export"]) == {"created", "commit", "versions", "ranks_edited", "result"}
    assert manifest["export"]["ranks_edited"] is True
    recipe = load_recipe(run_dir / "recipe.yaml")
    assert calibrate(recipe, run_dir, resume=True) == result
    with edited(run_dir) as layers:
        layers[:] = trained_ranks
    export_run(run_dir, device="cpu")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["export"]["ranks_edited"] is False
    assert manifest["calibration"] == trained_run.to_dict()


def test_one_process_at_a_time(make: Any, tmp_path: Path) -> None:
    """A second one would delete the temporary files of the first and take turns with its state."""
    run_dir = tmp_path / "run"
    calibrate(make(steps=0, rank_steps=0), run_dir)
    holder = (
        "import sys, pathlib, starkv_core.run as run\n"
        "with run.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        unwritten = run_dir / ".manifest.json.1.tmp"
        unwritten.touch()
        for work in (
            lambda: calibrate(load_recipe(run_dir / "recipe.yaml"), run_dir, resume=True),
            lambda: export_run(run_dir, device="cpu"),
        ):
            with pytest.raises(UserError, match="another process is at work on this run"):
                work()
        assert unwritten.exists()
        other.kill()
        other.wait()
    export_run(run_dir, device="cpu")  # the lock died with its holder


@pytest.mark.parametrize("target", ["factors.new.safetensors", "manifest.json", FACTORS])
@pytest.mark.parametrize("again", [True, False])
def test_export_survives_a_kill(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, again: bool
) -> None:
    """Factors and manifest are two files; between them no moment may break the run."""
    run_dir = tmp_path / "run"
    calibrate(make(steps=0, rank_steps=0), run_dir)
    original = (run_dir / "ranks.yaml").read_text()
    with edited(run_dir) as layers:
        layers[0]["keys"][0] -= 1
    replace = os.replace

    def killed(source: Any, destination: Any) -> None:
        if Path(destination).name == target:
            raise KeyboardInterrupt  # the file is written, but not in its place
        replace(source, destination)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            export_run(run_dir, device="cpu")
    if again:
        export_run(run_dir, device="cpu")
    elif target != FACTORS:  # the export has not happened
        (run_dir / "ranks.yaml").write_text(original)
    subject = open_subject(str(run_dir), device="cpu")
    assert subject.ranks == read_ranks(run_dir)
    assert (run_dir / FACTORS).is_file()


def test_a_run_is_opened_with_the_device_map_of_its_recipe(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(steps=0, rank_steps=0, model={"device_map": "sequential"})
    run_calibration(recipe, tmp_path / "run")
    maps = []

    def recorded(*args: Any, device_map: Any = None, **options: Any) -> LoadedModel:
        maps.append(device_map)
        return load(*args, **options)

    monkeypatch.setattr("starkv_core.run.load", recorded)
    monkeypatch.setattr("starkv_core.calibrate.loop.load", recorded)
    open_subject(str(tmp_path / "run"))
    open_subject(str(tmp_path / "run"), device_map="balanced")
    open_subject(recipe.model.name, device_map="balanced")
    export_run(tmp_path / "run")
    assert maps == ["sequential", "balanced", "balanced", "sequential"]
    maps.clear()
    open_subject(str(tmp_path / "run"), device="cpu")
    export_run(tmp_path / "run", device="cpu")
    assert maps == [None, None]


def test_export_of_unchanged_ranks_changes_nothing(make: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    result = calibrate(make(), run_dir)
    old = factors(run_dir)
    again = export_run(run_dir, device="cpu")
    assert again.bytes_per_token == result.bytes_per_token
    new = factors(run_dir)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_layer_can_be_made_dense_and_back(make: Any, tmp_path: Path) -> None:
    """Export keeps the trained form of layers it leaves out, so that an edit can be taken back."""
    run_dir = tmp_path / "run"
    calibrate(make(), run_dir)
    old, text = factors(run_dir), (run_dir / "ranks.yaml").read_text()
    with edited(run_dir) as layers:
        layers[0] = "dense"
    export_run(run_dir, device="cpu")
    subject = open_subject(str(run_dir), device="cpu")
    assert set(subject.weights) == {1}
    (run_dir / "ranks.yaml").write_text(text)
    export_run(run_dir, device="cpu")
    new = factors(run_dir)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("log_units", [True, False])
def test_values_too_close_for_float32_can_be_parted(log_units: bool) -> None:
    """Among thousands of singular values some pair is closer than float32 thresholds are."""
    f = TrainedFactors((6,), 1, 8, 8, False, False)
    f.sigma.copy_(torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 1.0 - 6e-8]))
    settings = GateSettings(20.0, log_units)
    for rank in (6, 5, 3, 2, 4, 1):
        f.set_ranks((rank,), settings)
        assert f.ranks(settings) == (rank,)
    close = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 1.0])
    torch.testing.assert_close(f.sigma, close, rtol=1e-4, atol=0)


def edit_too_high(layers: list[Any]) -> None:
    layers[1]["keys"][0] = 12


def edit_groups(layers: list[Any]) -> None:
    layers[1]["keys"] = [5]


def edit_past_the_heads(layers: list[Any]) -> None:
    layers[1]["keys"][0] = 13


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (edit_too_high, "layer 1: key rank 12 is above the . components .* .start.slack"),
        (edit_groups, "layer 1: 1 key ranks, but training had 2"),
        (edit_past_the_heads, "layer 1: key rank 13 is above 12"),
    ],
)
def test_ranks_that_cannot_be_exported(make: Any, tmp_path: Path, edit: Any, reason: str) -> None:
    run_dir = tmp_path / "run"
    calibrate(make(budget={"ratio": 3.0}), run_dir)
    text = (run_dir / "ranks.yaml").read_text()
    with edited(run_dir) as layers:
        edit(layers)
    held = {p.name: p.read_bytes() for p in run_dir.iterdir() if p.is_file()}
    with pytest.raises(UserError, match=reason) as caught:
        export_run(run_dir, device="cpu")
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in run_dir.iterdir() if p.is_file()} == held
    (run_dir / "ranks.yaml").write_text(text)
    open_subject(str(run_dir), device="cpu")
