"""Where training starts: statistics, decompositions, and ranks under the budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from starkv_core.budget import Budget
from starkv_core.calibrate.allocation import best_ranks, uniform_ranks
from starkv_core.calibrate.distill import distillation_loss
from starkv_core.decompose import (
    Decomposition,
    decompose,
    head_groups,
    output_metric,
    query_metric,
)
from starkv_core.errors import UserError
from starkv_core.factors import GateSettings, TrainedFactors, TrainedLayer
from starkv_core.models.load import LoadedModel
from starkv_core.models.spec import ModelSpec
from starkv_core.progress import SILENT, Progress
from starkv_core.rank_map import LayerRanks
from starkv_core.recipe import Recipe, StartSection
from starkv_core.statistics import LayerStatistics, gather_statistics

# Under QK-norm a bias cannot carry the mean, so most of it is merely discounted (design section 5).
_DISCOUNTED_MEAN = 0.98
_PROBE_ROUNDS = 2


@dataclass(frozen=True)
class LayerStart:
    """Full decompositions of one layer, float32 on the CPU.

    Attributes:
        keys, values: one decomposition per group of heads.
        key_mean, value_mean: input means whose error the bias takes over, or None.
    """

    keys: list[Decomposition]
    values: list[Decomposition]
    key_mean: torch.Tensor | None
    value_mean: torch.Tensor | None


def group_sizes(start: StartSection, spec: ModelSpec) -> tuple[int, int]:
    """Heads per factorisation of keys and of values.

    Raises:
        UserError: sizes that do not divide the heads, or grouped keys under QK-norm.
    """
    key_group = start.key_group
    value_group = start.value_group or spec.n_kv_heads
    for name, group in (("key_group", key_group), ("value_group", value_group)):
        if spec.n_kv_heads % group:
            raise UserError(f"start.{name}: {group} does not divide {spec.n_kv_heads} heads")
    if spec.qk_norm and key_group != 1:
        raise UserError("start.key_group: keys with a norm per head need head-wise factors (1)")
    return key_group, value_group


def needs_statistics(start: StartSection) -> bool:
    """Whether any option looks at data before training."""
    return start.keys != "weights" or start.values != "weights" or start.center


def decompose_layer(
    loaded: LoadedModel, index: int, start: StartSection, stats: LayerStatistics | None
) -> LayerStart:
    """Decompose keys and values of one layer as the recipe says (docs/design.md section 5)."""
    spec = loaded.spec
    attention: Any = loaded.family.attentions(loaded.model)[index]
    device = attention.k_proj.weight.device
    key_group, value_group = group_sizes(start, spec)
    key_mean = value_mean = key_moment = value_moment = None
    if stats is not None:
        mixed = start.values == "mixed"
        mean_v = stats.mixed_mean if mixed else stats.mean
        if start.keys != "weights":
            share = 0.0 if not start.center else _DISCOUNTED_MEAN if spec.qk_norm else 1.0
            key_moment = _prepared(stats.moment, stats.mean, share, start.shrinkage)
        if start.values != "weights":
            moment = stats.mixed_moment if mixed else stats.moment
            value_moment = _prepared(moment, mean_v, 1.0 if start.center else 0.0, start.shrinkage)
        if start.center:
            key_mean = None if spec.qk_norm else stats.mean
            value_mean = mean_v

    def blocks(
        weight: torch.Tensor, group: int, moment: Any, metric_of: Any
    ) -> list[Decomposition]:
        moment = None if moment is None else moment.to(device, torch.float64)
        found = []
        for heads in head_groups(spec.n_kv_heads, group):
            rows = weight[heads.start * spec.head_dim : heads.stop * spec.head_dim]
            d = decompose(rows, moment, metric_of(heads))
            found.append(
                Decomposition(d.up.float().cpu(), d.sigma.float().cpu(), d.down.float().cpu())
            )
        return found

    def key_metric(heads: range) -> torch.Tensor | None:
        if start.keys != "query-aware" or stats is None:
            return None
        energy = stats.query_energy[heads.start : heads.stop].to(device, torch.float64)
        norm = loaded.family.key_norm(attention)
        if norm is not None:
            energy = energy * norm[0].double().square()
        return torch.block_diag(*[query_metric(e) for e in energy])

    def value_metric(heads: range) -> torch.Tensor | None:
        if not start.output_aware:
            return None
        return output_metric(
            attention.o_proj.weight, heads, spec.group, spec.head_dim, start.output_damping
        )

    return LayerStart(
        keys=blocks(attention.k_proj.weight, key_group, key_moment, key_metric),
        values=blocks(attention.v_proj.weight, value_group, value_moment, value_metric),
        key_mean=key_mean,
        value_mean=value_mean,
    )


def _prepared(
    moment: torch.Tensor, mean: torch.Tensor, share: float, shrinkage: float
) -> torch.Tensor:
    """Second moment without ``share`` of its mean, shrunk towards a multiple of the identity.

    Directions that are rare in the calibration text can matter most where they occur (a pass-key):
    the identity's part keeps them from being priced at nothing.
    """
    mean = mean.double()
    centred = moment.double() - share * torch.outer(mean, mean)
    identity = torch.eye(len(mean), dtype=centred.dtype)
    level = centred.diagonal().mean()
    return (1.0 - shrinkage) * centred + shrinkage * level * identity


@torch.no_grad()
def build_start(
    loaded: LoadedModel,
    recipe: Recipe,
    budget: Budget,
    tokens: torch.Tensor,
    progress: Progress = SILENT,
) -> dict[int, TrainedLayer]:
    """Trained-form layers at their start ranks, on the CPU.

    Args:
        tokens: int64 ``[N, L]`` for statistics and sensitivity probes.
    """
    layers = list(budget.compressed)
    stats: Mapping[int, LayerStatistics] = {}
    if needs_statistics(recipe.start):
        stats = gather_statistics(
            loaded, tokens, layers, mixed=recipe.start.values == "mixed", progress=progress
        )
    starts: dict[int, LayerStart] = {}
    with progress.task("decomposition", len(layers), "layers") as task:
        for i in layers:
            starts[i] = decompose_layer(loaded, i, recipe.start, stats.get(i))
            task.advance()
    ranks = start_ranks(loaded, recipe, budget, starts, tokens, progress)

    settings = gate_settings(recipe)
    made = {}
    for (i, start), (key_ranks, value_ranks) in zip(starts.items(), ranks, strict=True):
        attention: Any = loaded.family.attentions(loaded.model)[i]
        made[i] = TrainedLayer(
            _factors(
                start.keys, key_ranks, recipe, loaded.spec, attention.k_proj.bias, start.key_mean
            ),
            _factors(
                start.values,
                value_ranks,
                recipe,
                loaded.spec,
                attention.v_proj.bias,
                start.value_mean,
            ),
            loaded.family.key_norm(attention),
        )
        if recipe.method == "star" or recipe.rank_steps == 0:
            made[i].set_ranks(LayerRanks(tuple(key_ranks), tuple(value_ranks)), settings)
    return made


def gate_settings(recipe: Recipe) -> GateSettings:
    """Slope and units of the gate; where no ranks are learned it is a plain cut."""
    slope = recipe.optim.gate_slope if recipe.rank_steps else 1e9
    return GateSettings(slope, log_units=recipe.method == "star")


def _factors(
    blocks: list[Decomposition],
    ranks: list[int],
    recipe: Recipe,
    spec: ModelSpec,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
) -> TrainedFactors:
    slack = recipe.start.slack
    counts = tuple(
        len(b.sigma) if slack == 0 else min(len(b.sigma), ceil(slack * r) + 1)
        for b, r in zip(blocks, ranks, strict=True)
    )
    bias = None if bias is None else bias.float().cpu()
    return TrainedFactors.start(blocks, counts, spec.n_kv_heads, bias, mean)


def start_ranks(
    loaded: LoadedModel,
    recipe: Recipe,
    budget: Budget,
    starts: Mapping[int, LayerStart],
    tokens: torch.Tensor,
    progress: Progress,
) -> list[tuple[list[int], list[int]]]:
    """Ranks of keys and values per compressed layer, by ``start.allocation``.

    ``uniform``: the same share everywhere. ``common``: one threshold on sigma for all. ``probed``:
    water-filling of ``sensitivity * sigma^2``, from the KL that a layer's keys (or values) alone
    cause at the ranks of the round before.
    """
    groups = [blocks for s in starts.values() for blocks in (s.keys, s.values)]

    def filled(weights: list[float]) -> list[list[int]]:
        scores = [
            [d.sigma.double().square() * w for d in blocks]
            for blocks, w in zip(groups, weights, strict=True)
        ]
        return best_ranks(scores, budget.numbers)

    kind = recipe.start.allocation
    if kind == "uniform":
        sizes = [[len(d.sigma) for d in blocks] for blocks in groups]
        ranks = uniform_ranks(sizes, budget.numbers)
    elif kind == "common":
        ranks = filled([1.0] * len(groups))
    else:
        energy = [float(sum(d.sigma.double().square().sum() for d in blocks)) for blocks in groups]
        ranks = filled([1.0 / e for e in energy])
        for _ in range(_PROBE_ROUNDS):
            found = _sensitivities(
                loaded, starts, ranks, energy, tokens, recipe.start.probes, progress
            )
            ranks = filled(found)
    return [(ranks[2 * i], ranks[2 * i + 1]) for i in range(len(starts))]


def _sensitivities(
    loaded: LoadedModel,
    starts: Mapping[int, LayerStart],
    ranks: list[list[int]],
    energy: list[float],
    tokens: torch.Tensor,
    probes: int,
    progress: Progress,
) -> list[float]:
    """Worth of a unit of ``sigma^2``, for the keys and the values of every layer in turn.

    The square root of the KL per share of energy dropped, over the energy.
    """
    rows = tokens[:probes].to(loaded.device)
    head = loaded.model.get_output_embeddings().weight
    teacher = [loaded.model.model(row[None], use_cache=False)[0] for row in rows]
    attentions: Any = loaded.family.attentions(loaded.model)
    found: list[float] = []
    with progress.task("sensitivity", 2 * len(starts), "probes") as task:
        for i, start in starts.items():
            for linear, blocks, mean in (
                (attentions[i].k_proj, start.keys, start.key_mean),
                (attentions[i].v_proj, start.values, start.value_mean),
            ):
                block_ranks = ranks[len(found)]
                dropped = sum(
                    float(d.sigma[r:].double().square().sum())
                    for d, r in zip(blocks, block_ranks, strict=True)
                )
                total = 0.0
                with _approximated(linear, blocks, block_ranks, mean):
                    for row, target in zip(rows, teacher, strict=True):
                        hidden = loaded.model.model(row[None], use_cache=False)[0]
                        total += float(distillation_loss(hidden, target, head))
                # Where nothing was dropped there is nothing to measure: any small worth will do.
                share = max(dropped / energy[len(found)], 1e-6)
                measured = max(total / len(rows), 1e-8) / share
                # The geometric mean with relative energy: a probe on plain text is blind to uses
                # that are rare in it, such as recall, and would starve the layers that serve them.
                found.append(measured**0.5 / energy[len(found)])
                task.advance()
    return found


@contextmanager
def _approximated(
    linear: Any, blocks: list[Decomposition], ranks: list[int], mean: torch.Tensor | None
) -> Iterator[None]:
    """Put the low-rank approximation in place of one projection's weight, and the weight back."""
    weight, bias = linear.weight.data, linear.bias
    low = torch.cat([d.product(r) for d, r in zip(blocks, ranks, strict=True)])
    try:
        linear.weight.data = low.to(weight)
        if mean is not None:
            owed = (weight - linear.weight.data).float() @ mean.to(weight.device)
            owed = owed if bias is None else owed + bias.float()
            linear.bias = torch.nn.Parameter(owed.to(weight.dtype), requires_grad=False)
        yield
    finally:
        linear.weight.data, linear.bias = weight, bias
