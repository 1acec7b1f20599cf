"""The calibration: ranks under the budget, the exact budget, recovery (docs/design.md section 2).

1. Ranks: factors and thresholds train together. ``star`` holds the soft ranks to a falling limit
   by shifting all thresholds by the multiplier that meets it; ``paper`` adds
   ``gamma * sum exp(-alpha)``.
2. Exact budget: the components furthest above their thresholds stay, in rows that are full, as many
   as the budget allows, never more.
3. Recovery: thresholds are frozen and the factors train on by distillation alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from starkv_core.artifacts import (
    check_disk_space,
    find_run_dir,
    new_manifest,
    new_run_dir,
    read_manifest,
    refuse_existing,
    write_manifest,
    write_text_atomic,
    write_yaml_atomic,
)
from starkv_core.budget import (
    Budget,
    bytes_per_token,
    cache_ratio,
    paper_rate,
    resolve_budget,
)
from starkv_core.calibrate.allocation import best_ranks
from starkv_core.calibrate.distill import distillation_loss
from starkv_core.calibrate.start import build_start, gate_settings, group_sizes
from starkv_core.calibrate.state import load_start, load_state, save_start, save_state
from starkv_core.calibrate.student import Student, checkpointed
from starkv_core.data.corpus import check_source, documents
from starkv_core.data.packing import pack, plant
from starkv_core.errors import RunFailure, UserError
from starkv_core.factors import TrainedFactors, TrainedLayer
from starkv_core.gate import opened
from starkv_core.models.load import LoadedModel, load, vocabulary_sha256
from starkv_core.models.spec import ModelSpec
from starkv_core.progress import SILENT, Progress
from starkv_core.provenance import git_commit, versions
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.recipe import Recipe, load_recipe
from starkv_core.run import (
    FACTORS,
    RANKS,
    RECIPE,
    Subject,
    check_base,
    commit_factors,
    deployed_subject,
    device_map_of,
    locked,
    read_ranks,
    read_trained,
    settle_factors,
    write_factors,
    write_ranks,
)

METRICS = "metrics.jsonl"
CALIBRATION = "calibration"  # folder of resumable state
CHECK_SEQUENCES = 4  # kept out of training, to measure the exported model on
LOSS_SCALE = 1024.0  # float16 alone: activations' gradients, a mean over tokens, would underflow
MICRO_TOKENS = 4096  # tokens that go through the model at once
_DISK_BYTES = 28  # a trained number: its start, the state and, while that is replaced, the next one
_DISK_ONE_SHOT = 8  # the same without training: trained and folded form
_SQUEEZE = 0.7  # share of the rank steps after which the limit has come down to the budget
_SLACK_START = 0.8  # where it starts, between the budget (0) and all stored components (1)


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration (or an export) made.

    Attributes:
        run_dir: the run folder.
        method: recipe method.
        bytes_per_token, dense_bytes_per_token: of the whole cache, all layers.
        ratio: dense over stored.
        paper_rate: share removed in compressed layers alone, the paper's figure.
        kl: mean KL of the deployed model to the base model on text kept out of training, in nats;
            None after an export.
        seconds: statistics and decomposition included; tokens trained on; tokens_per_second: while
            training. All over every attempt of a resumed run, but for work that was lost; an export
            has no seconds and no tokens.
        peak_memory: bytes, over all GPUs used, of the last attempt.
    """

    run_dir: str
    method: str
    bytes_per_token: int
    dense_bytes_per_token: int
    ratio: float
    paper_rate: float
    kl: float | None
    seconds: float | None
    tokens: int
    tokens_per_second: float | None
    peak_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """For a table of two columns."""
        rows = [
            ("method", self.method),
            (
                "cache bytes per token",
                f"{self.bytes_per_token} (dense {self.dense_bytes_per_token})",
            ),
            ("cache ratio", f"{self.ratio:.3f}"),
            ("paper rate (compressed layers alone)", f"{self.paper_rate:.1%}"),
        ]
        if self.kl is not None:
            rows.append(("KL to the base model, deployed", f"{self.kl:.4f} nats per token"))
        if self.tokens_per_second is not None:
            rows.append(
                ("training", f"{self.tokens} tokens, {self.tokens_per_second:.0f} per second")
            )
        if self.peak_memory is not None:
            rows.append(("peak GPU memory", f"{self.peak_memory / 2**30:.2f} GiB"))
        if self.seconds is not None:
            rows.append(("time", f"{self.seconds:.1f} s"))
        return rows


def load_for(recipe: Recipe, device: str | None = None, model: str | None = None) -> LoadedModel:
    """The recipe's base model, or ``model`` in its place; ``device`` rules out its map."""
    m = recipe.model
    return load(
        model or m.name,
        dtype=m.dtype,
        device=device,
        device_map=device_map_of(recipe, device),
        revision=m.revision,
    )


def budget_for(recipe: Recipe, spec: ModelSpec) -> Budget:
    """The recipe's budget for a model; also checks what else depends on the model's shape.

    Raises:
        UserError: impossible budget, sequence too long, groups that do not divide the heads.
    """
    if recipe.data.length > spec.max_positions:
        raise UserError(
            f"data.length: {recipe.data.length} tokens, but the model's context is "
            f"{spec.max_positions}; lower data.length"
        )
    b = recipe.budget
    key_group, value_group = group_sizes(recipe.start, spec)
    return resolve_budget(
        spec,
        ratio=b.ratio,
        bytes_limit=b.bytes_per_token,
        fit=None if b.fit is None else (b.fit_tokens, b.fit_bytes),
        fit_batch=b.batch,
        skip_layers=recipe.start.skip_layers,
        blocks=(spec.n_kv_heads // key_group, spec.n_kv_heads // value_group),
    )


def training_sequences(recipe: Recipe, steps: int | None = None) -> int:
    """Distinct sequences that training draws from, in the recipe's steps or as many as given."""
    used = (recipe.steps if steps is None else steps) * recipe.batch
    return min(used, recipe.data.sequences) if recipe.data.sequences else used


def trained_numbers(recipe: Recipe, spec: ModelSpec, budget: Budget) -> int:
    """Estimate of the numbers in factors: ``d`` per component below, and its rows above."""
    layers = len(budget.compressed)
    full = layers * (spec.n_kv_heads * spec.key_rank + spec.value_rank)
    slack = recipe.start.slack
    spare = int(slack * budget.numbers) + layers * (spec.n_kv_heads + 1)
    kept = full if slack == 0 else min(full, spare)
    # Joint value factors have the most rows; counting half of the components as values is close.
    rows = 0.5 * spec.head_dim * group_sizes(recipe.start, spec)[0] + 0.5 * spec.kv_width
    return int(kept * (spec.hidden + rows))


def calibration_tokens(recipe: Recipe, tokenizer: Any, steps: int | None = None) -> torch.Tensor:
    """int64 ``[N, L]``: those kept out of training, then those for statistics and training.

    Args:
        steps: if these take more than the recipe's, there are as many more as the text gives.
    """
    d = recipe.data
    least, count = (
        CHECK_SEQUENCES + max(recipe.start.sequences, training_sequences(recipe, n))
        for n in (None, steps)
    )
    docs = documents(d.source, d.config, d.split, d.field)
    rows = pack(tokenizer, docs, d.length, max(count, least), recipe.seed, least)
    planted = plant(tokenizer, rows[CHECK_SEQUENCES:], d.recall, recipe.seed)
    return torch.cat((rows[:CHECK_SEQUENCES], planted))


def run_calibration(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    model: str | None = None,
    progress: Progress = SILENT,
) -> CalibrationResult:
    """Calibrate a model as a recipe says and write a run folder.

    Args:
        recipe: resolved recipe; with ``resume`` the one the run was started with.
        out: run folder; must not exist, or with ``resume`` be an interrupted (or finished) run.
        resume: go on from the last saved state.
        device: where to compute; None is the recipe's device_map, or a GPU where there is one.
        model: with ``resume``, where the base model lies now, if it has moved.
        progress: where progress is shown.

    Raises:
        UserError: anything wrong with recipe, model, budget, data or folder, before training.
        RunFailure: the loss is not finite.
    """
    run_dir = Path(out)
    with ExitStack() as held:
        if resume:
            find_run_dir(run_dir)
            held.enter_context(locked(run_dir))
            for leftover in run_dir.rglob(".*.tmp"):  # of a write that was killed
                leftover.unlink()
            if recipe.to_dict() != load_recipe(run_dir / RECIPE).to_dict():
                raise UserError(
                    f"{run_dir}: was started with another recipe than the one given; "
                    "leave --recipe and --set out to resume it, or give another --out"
                )
            manifest = read_manifest(run_dir)
        else:
            refuse_existing(run_dir)
        if not resume or FACTORS not in manifest["files"]:
            check_source(recipe.data.source)

        loaded = load_for(recipe, device, model)
        if resume:
            check_base(run_dir, manifest["base_model"], loaded)
            if FACTORS in manifest["files"]:
                settle_factors(run_dir, manifest)
                shutil.rmtree(run_dir / CALIBRATION, ignore_errors=True)  # killed before it could
                exported = "export" in manifest
                shown = manifest["export"]["result"] if exported else manifest["calibration"]
                return CalibrationResult(**shown)
        budget = budget_for(recipe, loaded.spec)
        tokens = calibration_tokens(recipe, loaded.tokenizer)
        token_hash = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        if resume:
            if manifest.get("tokens_sha256") != token_hash:
                raise UserError(
                    f"{run_dir}: {recipe.data.source} gives other tokens than the run was started "
                    f"on (sha256 {manifest.get('tokens_sha256')}, got {token_hash}); bring that "
                    "text and tokenizer back, or calibrate anew"
                )
        else:
            numbers = trained_numbers(recipe, loaded.spec, budget)
            check_disk_space(run_dir, numbers * (_DISK_BYTES if recipe.steps else _DISK_ONE_SHOT))
            base = {
                "name": None if recipe.model.name is None else str(recipe.model.name),
                "revision": recipe.model.revision,
                "fingerprint": loaded.fingerprint,
                "vocabulary": vocabulary_sha256(loaded.tokenizer),
                "dtype": str(loaded.dtype).removeprefix("torch."),
            }
            with new_run_dir(run_dir) as folder:
                write_yaml_atomic(folder / RECIPE, recipe.to_dict())
                manifest = new_manifest(base, recipe.seed) | {"tokens_sha256": token_hash}
                manifest = write_manifest(folder, manifest, [RECIPE])
            held.enter_context(locked(run_dir))
        return _Calibration(recipe, run_dir, loaded, budget, tokens, progress).run(manifest)


class _Calibration:
    def __init__(
        self,
        recipe: Recipe,
        run_dir: Path,
        loaded: LoadedModel,
        budget: Budget,
        tokens: torch.Tensor,
        progress: Progress,
    ) -> None:
        self.recipe, self.run_dir, self.loaded = recipe, run_dir, loaded
        self.budget, self.progress = budget, progress
        self.began = time.monotonic()  # moved back by what earlier attempts took
        self.check = tokens[:CHECK_SEQUENCES]
        self.pool = tokens[CHECK_SEQUENCES:]
        self.head = loaded.model.get_output_embeddings().weight

    def run(self, manifest: dict[str, Any]) -> CalibrationResult:
        for device in self.gpus():
            torch.cuda.reset_peak_memory_stats(device)
        layers = load_start(self.run_dir, self.loaded)
        if layers is None:
            rows = self.pool[: self.recipe.start.sequences]
            layers = build_start(self.loaded, self.recipe, self.budget, rows, self.progress)
            if self.recipe.steps:
                save_start(self.run_dir, layers)
        self.student = Student(self.loaded, layers, gate_settings(self.recipe))
        rate = self.train() if self.recipe.steps else None
        return self.finish(manifest, time.monotonic() - self.began, rate)

    def gpus(self) -> list[torch.device]:
        """GPUs that hold the model."""
        found = {p.device for p in self.loaded.model.parameters() if p.device.type == "cuda"}
        return sorted(found, key=str)

    # -- training ------------------------------------------------------------------------------

    def train(self) -> float:
        """Phases 1 to 3 from wherever the saved state stands; tokens per second over all of it."""
        recipe = self.recipe
        self.frozen = recipe.rank_steps == 0
        self.shift = 0.0
        self.optimizer = self.make_optimizer()
        done = 0
        state = load_state(self.run_dir, self.student, self.optimizer)
        if state is not None:
            done, self.frozen = state["step"], state["frozen"]
        self.truncate_metrics(done)
        for alpha in self.alphas():
            alpha.requires_grad_(not self.frozen)
        began = time.monotonic()
        if state is not None:
            self.began -= state["seconds"]
            began -= state["training_seconds"]
        with (
            checkpointed(self.loaded.model, recipe.optim.checkpointing),
            self.progress.task("calibration", recipe.steps, "steps") as task,
        ):
            task.advance(done)
            for step in range(done, recipe.steps):
                loss = self.step(step)
                if not self.frozen and self.ranks_are_done(step):
                    self.freeze()
                ranks = self.student.ranks(self.shift)
                self.record(step, loss, ranks)
                if (step + 1) % recipe.optim.checkpoint_every == 0 or step + 1 == recipe.steps:
                    now = time.monotonic()
                    scalars = {
                        "step": step + 1,
                        "frozen": self.frozen,
                        "seconds": now - self.began,
                        "training_seconds": now - began,
                    }
                    save_state(self.run_dir, self.student, self.optimizer, scalars)
                task.advance(
                    1, kl=loss, ratio=cache_ratio(self.loaded.spec, ranks), phase=self.phase
                )
        tokens = recipe.steps * recipe.batch * recipe.data.length
        return tokens / max(time.monotonic() - began, 1e-9)

    def factors(self) -> Iterator[TrainedFactors]:
        for layer in self.student.by_layer().values():
            yield from (layer.keys, layer.values)

    def alphas(self) -> list[torch.nn.Parameter]:
        return [f.alpha for f in self.factors()]

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW over factors and thresholds; ``lr_relative`` scales by each tensor's own size."""
        o = self.recipe.optim
        groups: list[dict[str, Any]] = []
        for f in self.factors():
            sizes = {"up": rms(f.up), "down": rms(f.down)}
            if f.bias is not None:
                # A bias may start at zero; its scale is that of the outputs it is added to.
                sizes["bias"] = float((f.up * f.sigma).detach().square().sum(1).mean().sqrt())
            for name, size in sizes.items():
                lr = o.lr * size if o.lr_relative else o.lr
                decay = 0.0 if name == "bias" else o.weight_decay
                groups.append({"params": [getattr(f, name)], "base_lr": lr, "weight_decay": decay})
        groups.append({"params": self.alphas(), "base_lr": o.threshold_lr, "weight_decay": 0.0})
        fused = self.loaded.device.type == "cuda"
        return torch.optim.AdamW(
            groups, lr=o.lr, betas=(o.beta1, o.beta2), fused=fused, foreach=None if fused else False
        )

    def step(self, step: int) -> float:
        """One optimiser step; returns the mean KL before it."""
        recipe = self.recipe
        scale = schedule(step, recipe.steps, recipe.optim.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
        shift: torch.Tensor | float = self.shift
        if not self.frozen and recipe.method == "star":
            shift = self.multiplier(step)
            self.shift = float(shift.detach())
        rows = self.batch(step)
        size = max(1, MICRO_TOKENS // recipe.data.length)
        pieces = rows.split(size)
        magnified = LOSS_SCALE if self.loaded.dtype == torch.float16 else 1.0
        total = 0.0
        for n, piece in enumerate(pieces):
            piece = piece.to(self.loaded.device)
            with torch.no_grad():
                teacher = self.loaded.model.model(piece, use_cache=False)[0]
            with self.student.active(shift) as model:
                student = model.model(piece, use_cache=False)[0]
                kl = distillation_loss(student, teacher, self.head) * (len(piece) / len(rows))
                loss = kl
                if n == 0 and not self.frozen and recipe.method == "paper":
                    loss = kl + recipe.optim.gamma * self.rank_loss()
                # The graph of the multiplier is shared by all pieces of the batch.
                (loss * magnified).backward(retain_graph=n + 1 < len(pieces))
            total += float(kl.detach())
        if not math.isfinite(total):
            raise self.diverged("the loss", step)
        if magnified != 1.0:
            for parameter in self.student.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(magnified)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), recipe.optim.grad_clip)
        if not math.isfinite(float(norm)):
            raise self.diverged("a gradient", step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def diverged(self, what: str, step: int) -> RunFailure:
        return RunFailure(
            f"{what} is not finite at step {step + 1}; lower optim.lr and run "
            f"`starkv calibrate` anew (the last good state is in {self.run_dir})"
        )

    def batch(self, step: int) -> torch.Tensor:
        """Rows of a step: the pool in an order that depends on the seed and the pass alone."""
        count = training_sequences(self.recipe)
        picked = []
        for n in range(step * self.recipe.batch, (step + 1) * self.recipe.batch):
            generator = torch.Generator().manual_seed(self.recipe.seed * 1000003 + n // count)
            picked.append(int(torch.randperm(count, generator=generator)[n % count]))
        return self.pool[picked]

    def rank_loss(self) -> torch.Tensor:
        """The paper's ``sum exp(-alpha)`` over key heads and layers."""
        return torch.stack([a.neg().exp().sum().to(self.head.device) for a in self.alphas()]).sum()

    def multiplier(self, step: int) -> torch.Tensor:
        """The shift of all thresholds at which the soft ranks meet this step's limit.

        It is the exact multiplier of the byte constraint, and carries its gradient: moving one
        threshold up lets all others down.
        """
        everything = sum(sum(f.counts) for f in self.factors())
        fallen = min(1.0, (step + 1) / max(1.0, _SQUEEZE * self.recipe.rank_steps))
        over = (1.0 - fallen) * _SLACK_START * max(0, everything - self.budget.numbers)
        limit = self.budget.numbers + over
        settings = self.student.settings
        levels = torch.cat([torch.cat(f.levels(settings)).cpu() for f in self.factors()])
        low, high = -30.0, 30.0
        for _ in range(50):
            mid = 0.5 * (low + high)
            soft = opened(levels - mid, settings.slope).sum()
            low, high = (mid, high) if float(soft) > limit else (low, mid)
        at = torch.tensor(0.5 * (low + high), device=self.loaded.device)
        alphas = self.alphas()
        slopes = torch.autograd.grad(self.student.soft_numbers(at), alphas)
        steepness = sum(float(s.sum()) for s in slopes)
        if steepness == 0.0:
            return at
        for slope, alpha in zip(slopes, alphas, strict=True):
            moved = (slope * (alpha - alpha.detach())).sum() / steepness
            at = at - moved.to(at.device)
        return at

    def ranks_are_done(self, step: int) -> bool:
        """Whether phase 1 ends after this step; the paper's ends early once the budget is met."""
        if step + 1 >= self.recipe.rank_steps:
            return True
        return self.recipe.method == "paper" and self.student.numbers() <= self.budget.numbers

    @torch.no_grad()
    def freeze(self) -> None:
        """Phase 2: settle the ranks on the budget exactly and freeze the thresholds."""
        settings = self.student.settings
        found = list(self.factors())
        for f in found:
            f.alpha.add_(self.shift)
        self.shift = 0.0
        ranks = iter(best_ranks([f.levels(settings) for f in found], self.budget.numbers))
        for layer in self.student.by_layer().values():
            layer.set_ranks(LayerRanks(tuple(next(ranks)), tuple(next(ranks))), settings)
        self.frozen = True
        for alpha in self.alphas():
            alpha.requires_grad_(False)

    # -- records -------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        return "recovery" if self.frozen else "ranks"

    def record(self, step: int, loss: float, ranks: RankMap) -> None:
        line = {
            "step": step + 1,
            "phase": self.phase,
            "kl": loss,
            "bytes_per_token": bytes_per_token(self.loaded.spec, ranks),
            "shift": self.shift,
        }
        with open(self.run_dir / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def truncate_metrics(self, done: int) -> None:
        """Drop records of steps that a resumed run will take again."""
        path = self.run_dir / METRICS
        if path.is_file():
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= done:
                        kept.append(line + "\n")
                except (ValueError, KeyError):
                    break  # cut off in the middle by a kill
            write_text_atomic(path, "".join(kept))

    # -- export --------------------------------------------------------------------------------

    def finish(
        self, manifest: dict[str, Any], seconds: float, rate: float | None
    ) -> CalibrationResult:
        peak = sum(torch.cuda.max_memory_allocated(device) for device in self.gpus()) or None
        ranks = self.student.ranks()
        write_ranks(self.run_dir, ranks)
        subject = export(self.run_dir, self.student)
        result = _result(
            subject,
            self.recipe.method,
            kl=deployed_kl(subject, self.check),
            seconds=seconds,
            tokens=self.recipe.steps * self.recipe.batch * self.recipe.data.length,
            tokens_per_second=rate,
            peak_memory=peak,
        )
        records = {"calibration": result.to_dict(), "trained_ranks": _ranks_hash(ranks)}
        commit_factors(self.run_dir, manifest | records)
        shutil.rmtree(self.run_dir / CALIBRATION, ignore_errors=True)
        return result


def export(
    run_dir: Path, student: Student, trained: Mapping[int, TrainedLayer] | None = None
) -> Subject:
    """Fold a student and write the factors, to be committed; returns the deployed model.

    Args:
        trained: trained form to keep; by default that of the student's own layers.
    """
    loaded = student.loaded
    layers = student.by_layer()
    folded = {i: layer.fold(student.settings) for i, layer in layers.items()}
    ranks = student.ranks()
    write_factors(run_dir, ranks, folded, trained or layers, student.settings, loaded.dtype)
    return deployed_subject(loaded, ranks, folded, run_dir)


def export_run(
    run_dir: str | Path, device: str | None = None, model: str | None = None
) -> CalibrationResult:
    """Fold the factors again for an edited ``ranks.yaml``, without training.

    Args:
        device: where to compute; None is the recipe's device_map, or a GPU where there is one.
        model: where the base model of the run lies now, if it has moved.

    Raises:
        UserError: no finished run, or ranks that the stored components cannot give.
    """
    run_dir = Path(run_dir)
    read_manifest(run_dir)  # a run at all?
    with locked(run_dir):
        return _export_run(run_dir, device, model)


def _export_run(run_dir: Path, device: str | None, model: str | None) -> CalibrationResult:
    manifest = read_manifest(run_dir)
    if FACTORS not in manifest["files"]:
        raise UserError(f"{run_dir}: calibration has not finished; there is nothing to export")
    settle_factors(run_dir, manifest)
    ranks = read_ranks(run_dir)
    recipe = load_recipe(run_dir / RECIPE)
    loaded = load_for(recipe, device, model)
    check_base(run_dir, manifest["base_model"], loaded)
    ranks.check(loaded.spec, f"{run_dir}/{RANKS}")
    layers, settings = read_trained(run_dir, loaded, manifest["files"][FACTORS])
    faults = list(_export_faults(ranks, layers))
    if faults:
        raise UserError.many(f"{run_dir}/{RANKS}: cannot be exported", faults)
    kept = {}
    for i, layer_ranks in enumerate(ranks.layers):
        if layer_ranks is not None:
            kept[i] = layers[i]
            kept[i].set_ranks(layer_ranks, settings)
    # Layers made dense keep their trained form in the file: the edit can be taken back.
    subject = export(run_dir, Student(loaded, kept, settings), layers)
    result = _result(
        subject,
        recipe.method,
        kl=None,
        seconds=None,
        tokens=0,
        tokens_per_second=None,
        peak_memory=None,
    )
    exported = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "ranks_edited": _ranks_hash(ranks) != manifest.get("trained_ranks"),
        "result": result.to_dict(),
    }
    commit_factors(run_dir, manifest | {"export": exported})
    return result


def _export_faults(ranks: RankMap, layers: Mapping[int, TrainedLayer]) -> Iterator[str]:
    for i, wanted in enumerate(ranks.layers):
        if wanted is None:
            continue
        if i not in layers:
            yield f"layer {i} was left dense in training and has no factors"
            continue
        pairs = (("key", layers[i].keys, wanted.keys), ("value", layers[i].values, wanted.values))
        for name, factors, asked in pairs:
            if len(asked) != factors.blocks:
                yield f"layer {i}: {len(asked)} {name} ranks, but training had {factors.blocks}"
                continue
            for rank, stored in zip(asked, factors.counts, strict=True):
                if rank > stored:
                    yield (
                        f"layer {i}: {name} rank {rank} is above the {stored} components that "
                        "training kept (start.slack)"
                    )


@torch.inference_mode()
def deployed_kl(subject: Subject, rows: torch.Tensor) -> float:
    """Mean KL of the deployed model to its base model over ``rows [N, L]``, through its cache."""
    head = subject.model.get_output_embeddings().weight
    total = 0.0
    for row in rows:
        ids = row[None].to(subject.device)
        teacher = subject.model.model(ids, use_cache=False)[0]
        with subject.active() as model:
            hidden = model.model(ids, past_key_values=subject.new_cache(), use_cache=True)[0]
        total += float(distillation_loss(hidden, teacher, head))
    return total / len(rows)


def _result(subject: Subject, method: str, **rest: Any) -> CalibrationResult:
    if subject.ranks is None:
        raise ValueError("a dense model is no result")
    return CalibrationResult(
        run_dir=str(subject.run_dir),
        method=method,
        bytes_per_token=bytes_per_token(subject.spec, subject.ranks),
        dense_bytes_per_token=subject.spec.dense_bytes_per_token,
        ratio=cache_ratio(subject.spec, subject.ranks),
        paper_rate=paper_rate(subject.spec, subject.ranks),
        **rest,
    )


def _ranks_hash(ranks: RankMap) -> str:
    """Checksum of a rank map, whatever the layout of its file."""
    return hashlib.sha256(json.dumps(ranks.to_dict()).encode()).hexdigest()


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())
