"""Where training starts: statistics, decompositions, and ranks under the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch

from starkv_core.budget import Budget
from starkv_core.calibrate.allocation import (
    best_ranks,
    proportional_ranks,
    uniform_ranks,
    with_floor,
)
from starkv_core.calibrate.distill import distillation_loss
from starkv_core.calibrate.layer_start import LayerStart, approximated
from starkv_core.calibrate.methods.care import greedy_ranks
from starkv_core.calibrate.methods.eigen import error_ranks, key_query_basis, query_moments
from starkv_core.calibrate.methods.palu import fisher_scores
from starkv_core.calibrate.methods.recalkv import calibrate_values, similar_heads
from starkv_core.decompose import (
    Decomposition,
    attended_metric,
    decompose,
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


def group_sizes(start: StartSection, spec: ModelSpec) -> tuple[int, int]:
    """Heads per factorisation of keys and of values.

    Raises:
        UserError: sizes that do not divide the heads, or grouped keys under QK-norm.
    """
    heads = spec.n_kv_heads
    key_group = min(start.key_group or heads, heads)
    value_group = min(start.value_group or heads, heads)
    for name, group in (("key_group", key_group), ("value_group", value_group)):
        if heads % group:
            raise UserError(f"start.{name}: {group} does not divide {heads} heads")
    if spec.qk_norm and key_group != 1:
        raise UserError("start.key_group: keys with a norm per head need head-wise factors (1)")
    return key_group, value_group


def needs_statistics(start: StartSection) -> bool:
    """Whether any option looks at data before training."""
    return start.keys != "weights" or start.values != "weights" or start.center


def decompose_layer(
    loaded: LoadedModel,
    index: int,
    start: StartSection,
    stats: LayerStatistics | None,
    queries: torch.Tensor | None = None,
) -> LayerStart:
    """Decompose keys and values of one layer as the recipe says (docs/design.md section 5).

    Args:
        stats: of the layer; None where nothing looks at data.
        queries: ``[H_kv, D, D]``, their second moments; for keys ``eigen``.
    """
    spec = loaded.spec
    attention: Any = loaded.family.attentions(loaded.model)[index]
    device = attention.k_proj.weight.device
    key_group, value_group = group_sizes(start, spec)
    key_mean = value_mean = key_moment = value_moment = None
    key_share = 0.0 if not start.center else _DISCOUNTED_MEAN if spec.qk_norm else 1.0
    if stats is not None:
        mixed = start.values == "mixed"
        mean_v = stats.mixed_mean if mixed else stats.mean
        if start.keys != "weights":
            key_moment = _prepared(stats.moment, stats.mean, key_share, start.shrinkage)
        if start.values != "weights":
            moment = stats.mixed_moment if mixed else stats.moment
            value_moment = _prepared(moment, mean_v, 1.0 if start.center else 0.0, start.shrinkage)
        if start.center:
            key_mean = None if spec.qk_norm else stats.mean
            value_mean = mean_v

    order = None
    if start.key_order == "cka":
        heads = attention.k_proj.weight.unflatten(0, (spec.n_kv_heads, -1))
        order = similar_heads(heads, key_group)

    def blocks(
        weight: torch.Tensor, groups: list[list[int]], moment: Any, decomposed: Any
    ) -> list[Decomposition]:
        moment = None if moment is None else moment.to(device, torch.float64)
        by_head = weight.unflatten(0, (spec.n_kv_heads, -1))
        return [
            decomposed(by_head[group].flatten(0, 1), moment, group).stored() for group in groups
        ]

    def of_keys(rows: torch.Tensor, moment: Any, group: list[int]) -> Decomposition:
        norm = loaded.family.key_norm(attention)
        # What a query is to a key that has not passed its norm.
        scale = rows.new_ones(spec.head_dim) if norm is None else norm[0].detach()
        scale = scale.double()
        if start.keys == "eigen" and queries is not None:
            seen = queries[group].to(device, torch.float64)
            return key_query_basis(rows, moment, seen * torch.outer(scale, scale))
        if start.keys == "attended" and stats is not None:
            seen = stats.query_moment[group].to(device, torch.float64) * torch.outer(scale, scale)
            metric = torch.block_diag(*map(attended_metric, seen))
            if len(group) > 1:  # one basis for heads that each count keys their own way
                return decompose(rows, moment, metric)
            return decompose(rows, metric=metric, outputs=of_counted_keys(rows, group[0]))
        if start.keys != "query-aware" or stats is None:
            return decompose(rows, moment)
        energy = stats.query_energy[group].to(device, torch.float64) * scale.square()
        return decompose(rows, moment, torch.block_diag(*[query_metric(e) for e in energy]))

    def of_counted_keys(rows: torch.Tensor, head: int) -> torch.Tensor:
        """What :func:`_prepared` is to inputs, for the keys of one head as they count."""
        assert stats is not None
        rows, level = rows.double(), float(stats.key_weight[head])
        found = stats.key_covariance[head].to(device, torch.float64)
        if key_share < 1:
            mean = rows @ stats.mean.to(device, torch.float64)
            found = found + (1.0 - key_share) * level * torch.outer(mean, mean)
        identity = rows @ rows.T
        identity = identity * (found.trace() / identity.trace())
        return (1.0 - start.shrinkage) * found + start.shrinkage * identity

    def of_values(rows: torch.Tensor, moment: Any, group: list[int]) -> Decomposition:
        if not start.output_aware:
            return decompose(rows, moment)
        metric = output_metric(
            attention.o_proj.weight, group, spec.group, spec.head_dim, start.output_damping
        )
        return decompose(rows, moment, metric)

    in_order = list(range(spec.n_kv_heads))
    return LayerStart(
        blocks(attention.k_proj.weight, _split(order or in_order, key_group), key_moment, of_keys),
        blocks(attention.v_proj.weight, _split(in_order, value_group), value_moment, of_values),
        key_mean=key_mean,
        value_mean=value_mean,
        key_order=order,
    )


def _split(heads: Sequence[int], group: int) -> list[list[int]]:
    """Heads in groups of ``group``."""
    return [list(heads[i : i + group]) for i in range(0, len(heads), group)]


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
            loaded,
            tokens,
            layers,
            mixed=recipe.start.values == "mixed",
            attended=recipe.start.keys == "attended",
            progress=progress,
        )
    queries: Mapping[int, torch.Tensor] = {}
    if recipe.start.keys == "eigen":
        queries = query_moments(loaded, tokens, layers, progress)
    starts: dict[int, LayerStart] = {}
    with progress.task("decomposition", len(layers), "layers") as task:
        for i in layers:
            starts[i] = decompose_layer(loaded, i, recipe.start, stats.get(i), queries.get(i))
            task.advance()
    ranks = start_ranks(loaded, recipe, budget, starts, tokens, progress)
    if recipe.start.values == "calibrated":
        starts = calibrate_values(loaded, starts, ranks, tokens, progress)

    settings = gate_settings(recipe)
    made = {}
    for (i, start), (key_ranks, value_ranks) in zip(starts.items(), ranks, strict=True):
        attention: Any = loaded.family.attentions(loaded.model)[i]
        made[i] = TrainedLayer(
            _factors(
                start.keys,
                key_ranks,
                recipe,
                loaded.spec,
                attention.k_proj.bias,
                start.key_mean,
                start.key_order,
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
    return GateSettings(slope, log_units=recipe.method != "paper")


def _factors(
    blocks: list[Decomposition],
    ranks: list[int],
    recipe: Recipe,
    spec: ModelSpec,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    order: tuple[int, ...] | None = None,
) -> TrainedFactors:
    slack = recipe.start.slack
    counts = tuple(
        len(b.sigma) if slack == 0 else min(len(b.sigma), ceil(slack * r) + 1)
        for b, r in zip(blocks, ranks, strict=True)
    )
    bias = None if bias is None else bias.float().cpu()
    return TrainedFactors.start(blocks, counts, spec.n_kv_heads, bias, mean, order)


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
    cause at the ranks of the round before. ``fisher``, ``greedy``, ``error``: those of Palu, CARE
    and EigenAttention (:mod:`starkv_core.calibrate.methods`).
    """
    groups = [blocks for s in starts.values() for blocks in (s.keys, s.values)]

    def filled(weights: list[float]) -> list[list[int]]:
        scores = [
            [d.sigma.double().square() * w for d in blocks]
            for blocks, w in zip(groups, weights, strict=True)
        ]
        return best_ranks(with_floor(scores, budget.numbers, recipe.start.floor), budget.numbers)

    kind = recipe.start.allocation
    sizes = [[len(d.sigma) for d in blocks] for blocks in groups]
    if kind == "uniform":
        ranks = uniform_ranks(sizes, budget.numbers)
    elif kind == "fisher":
        scores = fisher_scores(loaded, list(starts), tokens, progress)
        ranks = proportional_ranks(sizes, [s for pair in scores for s in pair], budget.numbers)
    elif kind == "greedy":
        spectra = [[d.sigma.double().square() for d in blocks] for blocks in groups]
        ranks = greedy_ranks(spectra, budget.numbers)
    elif kind == "error":
        probes = tokens[: recipe.start.probes]
        ranks = error_ranks(loaded, starts, budget.numbers, probes, progress)
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
            for linear, blocks, mean, order in start.sides(attentions[i]):
                block_ranks = ranks[len(found)]
                dropped = sum(
                    float(d.sigma[r:].double().square().sum())
                    for d, r in zip(blocks, block_ranks, strict=True)
                )
                total = 0.0
                with approximated(linear, blocks, block_ranks, mean, order):
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
