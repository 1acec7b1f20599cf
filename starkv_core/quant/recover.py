"""Recovery: the folded factors train on while what they store is coded as it will be.

Codes are rounded in the forward pass and taken for the identity in the backward pass
(straight-through); the frozen base model is the teacher, as in calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from starkv_core.attention import LatentWeights
from starkv_core.calibrate.distill import distillation_loss
from starkv_core.calibrate.loop import LOSS_SCALE, MICRO_TOKENS, rms, schedule
from starkv_core.calibrate.student import checkpointed
from starkv_core.errors import RunFailure
from starkv_core.factors import per_head
from starkv_core.progress import SILENT, Progress
from starkv_core.quant.costs import seen
from starkv_core.quant.layer import CodedSide, QuantLayer
from starkv_core.recipe import Recipe
from starkv_core.surgery import WeightsOf, compressed

if TYPE_CHECKING:
    from starkv_core.run import Subject

_TRAINED = ("down", "up", "bias")  # shifts and steps stay: codes keep their meaning
_SIDES = ("keys", "values")


class _Coded(nn.Module):
    """Masters in float32 of one quantised layer.

    Args:
        layer: where they start.
        dtype, device: of the model.
    """

    def __init__(self, layer: QuantLayer, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype
        # What does not train is on the device once: copies in every forward would each wait for it.
        self.start = layer.weights(dtype, device)
        self.real = self.start.real_channels
        for side in _SIDES:
            for name in _TRAINED:
                tensor = getattr(getattr(layer, side), name)
                master = None if tensor is None else nn.Parameter(tensor.float().to(device))
                self.register_parameter(f"{side}_{name}", master)

    def weights(self) -> LatentWeights:
        """What attention reads, differentiable in the masters."""

        def to(name: str) -> Any:
            master = getattr(self, name)
            return None if master is None else master.to(self.dtype)

        masters: Any = self.keys_up
        owners = len(self.layer.keys.counts)
        up = per_head(masters, self.start.key_index, self.real, owners)
        return replace(
            self.start,
            key_down=to("keys_down"),
            key_up=up.to(self.dtype),
            key_bias=to("keys_bias"),
            value_down=to("values_down"),
            value_up=to("values_up").unflatten(0, (self.layer.heads, -1)),
            value_bias=to("values_bias"),
        )

    def deployed(self) -> QuantLayer:
        """The layer as it is saved."""

        def side(name: str) -> CodedSide:
            down, up, bias = (getattr(self, f"{name}_{key}") for key in _TRAINED)
            return replace(
                getattr(self.layer, name),
                down=down.detach().to("cpu", self.dtype),
                up=up.detach().to("cpu", self.dtype),
                bias=None if bias is None else bias.detach().cpu(),
            )

        return replace(self.layer, keys=side("keys"), values=side("values"))


def recover(
    subject: Subject,
    layers: Mapping[int, QuantLayer],
    recipe: Recipe,
    pool: torch.Tensor,
    steps: int,
    progress: Progress = SILENT,
) -> tuple[dict[int, QuantLayer], list[float]]:
    """Train quantised layers for ``steps`` steps of the recipe's batch, at its learning rate.

    Args:
        subject: the run with latents in 16 bits; its base model is the teacher.
        pool: int64 ``[N, L]``, text to train on.

    Returns:
        The trained layers, and the mean KL to the base model before every step.

    Raises:
        RunFailure: the loss is not finite.
    """
    loaded, store = subject.base, subject.store_dtype
    attentions: Any = loaded.family.attentions(loaded.model)
    coded = {
        i: _Coded(layer, loaded.dtype, attentions[i].q_proj.weight.device)
        for i, layer in layers.items()
    }
    o = recipe.optim
    groups = []
    for module in coded.values():
        for side in _SIDES:
            up, down = getattr(module, f"{side}_up"), getattr(module, f"{side}_down")
            sizes = {"up": rms(up), "down": rms(down)}
            sizes["bias"] = float(up.detach().square().sum(1).mean().sqrt())
            for name, size in sizes.items():
                master = getattr(module, f"{side}_{name}")
                if master is not None:
                    rate = o.lr * size if o.lr_relative else o.lr
                    groups.append({"params": [master], "base_lr": rate, "lr": rate})
    parameters = [p for module in coded.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), weight_decay=0.0)
    head = loaded.model.get_output_embeddings().weight
    tables = loaded.spec.rope.growing()
    magnified = LOSS_SCALE if loaded.dtype == torch.float16 else 1.0
    found: list[float] = []
    with (
        checkpointed(loaded.model, o.checkpointing),
        progress.task("recovery", steps, "steps") as task,
    ):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * schedule(step, steps, o.warmup)
            rows = _batch(pool, step, recipe)
            total = 0.0
            for piece in rows.split(max(1, MICRO_TOKENS // rows.shape[1])):
                piece = piece.to(loaded.device)
                with torch.no_grad():
                    teacher = loaded.model.model(piece, use_cache=False)[0]
                weights = {i: _weights_of(m, store) for i, m in coded.items()}
                with compressed(loaded, weights, tables=tables) as model:
                    student = model.model(piece, use_cache=False)[0]
                    loss = distillation_loss(student, teacher, head) * (len(piece) / len(rows))
                    (loss * magnified).backward()
                total += float(loss.detach())
            if magnified != 1.0:
                for p in parameters:
                    if p.grad is not None:
                        p.grad.div_(magnified)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, o.grad_clip))
            if not math.isfinite(total + norm):
                raise RunFailure(
                    f"recovery: loss or gradient is not finite at step {step + 1}; nothing was "
                    "written; quantise without --recover-steps, or with more bits"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found.append(total)
            task.advance(1, kl=total)
    return {i: module.deployed() for i, module in coded.items()}, found


def _batch(pool: torch.Tensor, step: int, recipe: Recipe) -> torch.Tensor:
    """Rows of a step: the pool in an order that depends on the seed and the pass alone."""
    picked = []
    for n in range(step * recipe.batch, (step + 1) * recipe.batch):
        turn, place = divmod(n, len(pool))
        generator = torch.Generator().manual_seed(recipe.seed * 1000003 + turn)
        picked.append(int(torch.randperm(len(pool), generator=generator)[place]))
    return pool[picked]


def _weights_of(module: _Coded, store: torch.dtype) -> WeightsOf:
    sinks = module.layer.scheme.sinks

    def weights() -> LatentWeights:
        live = module.weights()
        return replace(live, coding=_straight_through(live, sinks, store))

    return weights


def _straight_through(
    weights: LatentWeights, sinks: int, store: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    codes = weights.codes
    assert codes is not None

    def coding(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = []
        for codec, x in ((codes.keys, keys), (codes.values, values)):
            fixed = x.detach()
            found.append(x + (seen(codec, fixed, sinks, store) - fixed))
        return found[0], found[1]

    return coding
