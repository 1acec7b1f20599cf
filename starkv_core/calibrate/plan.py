"""What a calibration would do, before it does anything: ``starkv calibrate --dry-run``."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from starkv_core.budget import BYTES_PER_NUMBER
from starkv_core.calibrate.distill import COLUMNS, ROWS
from starkv_core.calibrate.loop import (
    MICRO_TOKENS,
    budget_for,
    trained_numbers,
    training_sequences,
)
from starkv_core.data.corpus import check_source
from starkv_core.models.load import EMBEDDED_NAME, inspect, pick_device
from starkv_core.models.spec import ModelSpec
from starkv_core.recipe import Recipe

_STATE_BYTES = 16  # a trained number: float32 master, gradient and two moments of AdamW
# Share of a large product's rate that a training step reaches: of two measurements a fifth too
# little (the embedded model on two CPU cores) and a quarter too much (LLaMA-2-7B on one H200 GPU).
_EFFICIENCY = 0.35
_PRODUCTS = 9  # timed; their median counts, for some may be cold or have to wait


@dataclass(frozen=True)
class Plan:
    """Plan of a calibration.

    Attributes:
        model, method: names.
        layers, compressed_layers: how many; dense: reasons for layers left dense.
        parameters: of the base model; trained: estimate of the numbers that train.
        bytes_per_token_before, bytes_per_token_after: of the whole cache.
        ratio: between them.
        steps, rank_steps, tokens, sequences: of training.
        memory: estimate in bytes, weights included; seconds: estimate on this machine.
        device: that the estimate of time is for.
    """

    model: str
    method: str
    layers: int
    compressed_layers: int
    dense: dict[int, str]
    parameters: int
    trained: int
    bytes_per_token_before: int
    bytes_per_token_after: int
    ratio: float
    steps: int
    rank_steps: int
    tokens: int
    sequences: int
    memory: int
    seconds: float
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """For a table of two columns."""
        left = "; ".join(f"layer {i}: {why}" for i, why in self.dense.items()) or "none"
        return [
            ("model", f"{self.model}, {self.parameters / 1e6:.1f} M parameters"),
            ("method", self.method),
            ("layers compressed", f"{self.compressed_layers} of {self.layers}"),
            ("layers that must stay dense", left),
            ("cache bytes per token, before", str(self.bytes_per_token_before)),
            ("cache bytes per token, after", f"at most {self.bytes_per_token_after}"),
            ("cache ratio", f"{self.ratio:.3f}"),
            ("trained numbers", f"about {self.trained / 1e6:.1f} M"),
            ("steps", f"{self.steps}, of which {self.rank_steps} learn ranks"),
            ("tokens", f"{self.tokens} from {self.sequences} sequences"),
            ("memory, estimated", f"{self.memory / 2**30:.2f} GiB"),
            ("time, estimated", f"{self.seconds / 60:.1f} min on {self.device}"),
        ]


def plan(recipe: Recipe, *, device: str | None = None) -> Plan:
    """Plan a calibration from the model's config alone; no weights and no data are read.

    A text that is missing, empty or not UTF-8 is told, one that is too short is not.

    Raises:
        UserError: whatever :func:`starkv_core.calibrate.run_calibration` would refuse of these.
    """
    check_source(recipe.data.source)
    m = recipe.model
    spec, parameters = inspect(m.name, revision=m.revision)
    budget = budget_for(recipe, spec)
    kept_dense = (spec.n_layers - len(budget.compressed)) * 2 * spec.kv_width
    after = (budget.numbers + kept_dense) * BYTES_PER_NUMBER
    trained = trained_numbers(recipe, spec, budget)
    tokens = recipe.steps * recipe.batch * recipe.data.length
    target = pick_device(device)
    in_full = m.dtype == "float32" or (target.type == "cpu" and m.dtype == "auto")
    item = 4 if in_full else 2
    return Plan(
        model=m.name or EMBEDDED_NAME,
        method=recipe.method,
        layers=spec.n_layers,
        compressed_layers=len(budget.compressed),
        dense=dict(spec.dense_reasons),
        parameters=parameters,
        trained=trained,
        bytes_per_token_before=spec.dense_bytes_per_token,
        bytes_per_token_after=after,
        ratio=spec.dense_bytes_per_token / after,
        steps=recipe.steps,
        rank_steps=recipe.rank_steps,
        tokens=tokens,
        sequences=training_sequences(recipe),
        memory=_memory(recipe, spec, parameters, trained, item),
        seconds=_seconds(recipe, parameters, tokens, target, item),
        device=str(target),
    )


def _memory(recipe: Recipe, spec: ModelSpec, parameters: int, trained: int, item: int) -> int:
    # Tokens that go through the model at once: whole sequences, in pieces of a batch.
    live = min(recipe.batch * recipe.data.length, max(MICRO_TOKENS, recipe.data.length))
    checkpoints = spec.n_layers * live * spec.hidden * item
    # An estimate of what a layer keeps for its backward pass, in rows of hidden size: 10 around
    # attention and norms, and 4 of the MLP's width, which is some 3 to 3.5 times as much.
    inside = 24 * live * spec.hidden * item
    if not recipe.optim.checkpointing:
        checkpoints, inside = 0, spec.n_layers * inside
    # The loss, a piece of the logits at a time, in float32: log-probabilities of both models,
    # their exponentials and what is formed between them, six in all.
    logits = 6 * ROWS * COLUMNS * 4
    return parameters * item + trained * _STATE_BYTES + checkpoints + inside + logits


def _seconds(
    recipe: Recipe, parameters: int, tokens: int, device: torch.device, item: int
) -> float:
    """Work over a rate measured now with a few products."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.float32 if item == 4 else torch.bfloat16
    a = torch.randn(size, size, device=device, dtype=dtype)
    took = []
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        (a @ a).sum().item()
        took.append(time.perf_counter() - began)
    rate = 2 * size**3 / median(took) * _EFFICIENCY
    # Teacher 1, student 1 forward and 1 backward (frozen weights need no gradient), 1 more where
    # activations are recomputed.
    passes = 3 + (1 if recipe.optim.checkpointing else 0)
    statistics = recipe.start.sequences * recipe.data.length
    return 2 * parameters * (passes * tokens + 3 * statistics) / rate
