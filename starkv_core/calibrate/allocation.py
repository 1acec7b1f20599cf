"""Ranks under a budget: the best components, in rows that are full (docs/design.md section 4).

At 16 bits every component costs the same two bytes a token, so under a byte budget the best ranks
are the best components, whatever their layer. But rows begin on 16 bytes and padding counts: the
keys of a layer, and its values, take whole row steps of 8 numbers. So the budget is handed out in
steps, and what is in a step is free: no row has room left while components are left to fill it.

A *group* is what shares a row: the blocks of a layer's keys, or those of its values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from starkv_core.budget import ROW_STEP
from triton_ops.latent_attention import row_width


def best_ranks(groups: Sequence[Sequence[torch.Tensor]], numbers: int) -> list[list[int]]:
    """Ranks of the most worth under a budget on stored numbers, at least one in every block.

    The worth of a row step is the sum over its components of how far their scores lie above the
    lowest score of all, so that a last step of fewer than 8 components is not worth more for it.

    Args:
        groups: for each group its blocks, for each block its components' scores, finite and in
            descending order.
        numbers: most numbers a token to store in all, padding included; not below the floor of
            :func:`starkv_core.budget.resolve_budget`.

    Returns:
        Ranks for each group. The rows they take are never above ``numbers``, and less than a row
        step below it unless everything is kept.
    """
    lowest = min(float(scores.min()) for blocks in groups for scores in blocks)
    worths = []
    for blocks in groups:
        spare = torch.cat([scores[1:].double().cpu() for scores in blocks]) - lowest
        spare = spare.sort(descending=True).values[row_width(len(blocks)) - len(blocks) :]
        worths.append([float(step.sum()) for step in spare.split(ROW_STEP) if len(step)])
    sizes = [[len(scores) for scores in blocks] for blocks in groups]
    totals = _totals(sizes, worths, numbers)
    return [take_best(blocks, total) for blocks, total in zip(groups, totals, strict=True)]


def with_floor(
    groups: Sequence[Sequence[torch.Tensor]], numbers: int, share: float
) -> list[list[torch.Tensor]]:
    """Scores for :func:`best_ranks` by which every block keeps a share of its even rank first.

    Args:
        groups, numbers: as of :func:`best_ranks`.
        share: 0 to 1, of the ranks that the same share of every full rank would give.
    """
    full = sum(len(scores) for blocks in groups for scores in blocks)
    # One such component is worth more than a step without any.
    above = ROW_STEP * max(float(scores.max()) for blocks in groups for scores in blocks)
    return [
        [
            torch.cat((scores[:kept] + above, scores[kept:]))
            for scores in blocks
            for kept in [int(share * numbers * len(scores) / full)]
        ]
        for blocks in groups
    ]


def uniform_ranks(sizes: Sequence[Sequence[int]], numbers: int) -> list[list[int]]:
    """Shares of every group's full rank that are as even as row steps allow; so within groups.

    Args:
        sizes: for each group the full rank of each block.
        numbers: as of :func:`best_ranks`.

    Returns:
        Ranks for each group, as of :func:`best_ranks`.
    """
    return proportional_ranks(sizes, [float(sum(blocks)) for blocks in sizes], numbers)


def proportional_ranks(
    sizes: Sequence[Sequence[int]], weights: Sequence[float], numbers: int
) -> list[list[int]]:
    """Ranks in proportion to a weight of each group, as close as row steps and full ranks allow.

    Args:
        sizes: for each group the full rank of each block; blocks of a group get even shares.
        weights: of each group, positive.
        numbers: as of :func:`best_ranks`.

    Returns:
        Ranks for each group, as of :func:`best_ranks`. What a group that is kept in full leaves
        over goes to the others in their proportion.
    """
    worths = []
    for blocks, weight in zip(sizes, weights, strict=True):
        first, full = row_width(len(blocks)), sum(blocks)
        # What a group has for its weight after a step: the lowest is served first.
        worths.append([-(n + ROW_STEP) / weight for n in range(first, full, ROW_STEP)])
    totals = _totals(sizes, worths, numbers)
    return [_even(blocks, total) for blocks, total in zip(sizes, totals, strict=True)]


def take_best(scores: Sequence[torch.Tensor], numbers: int) -> list[int]:
    """Ranks that keep the ``numbers`` best components, at least one in every block.

    Args:
        scores: for each block its components' worth, in descending order.
        numbers: how many to keep in all.

    Returns:
        A rank for each block; they sum to ``numbers`` (or to everything there is, if that is less).
    """
    ranks = [1] * len(scores)
    spare = torch.cat([s[1:].double().cpu() for s in scores])
    owner = torch.repeat_interleave(
        torch.arange(len(scores)), torch.tensor([len(s) - 1 for s in scores])
    )
    room = min(max(numbers - len(scores), 0), len(spare))
    # Stable, so that ties go to earlier blocks on every machine.
    best = torch.sort(spare, descending=True, stable=True).indices[:room]
    for block, count in enumerate(torch.bincount(owner[best], minlength=len(scores)).tolist()):
        ranks[block] += count
    return ranks


def _totals(
    sizes: Sequence[Sequence[int]], worths: Sequence[Sequence[float]], numbers: int
) -> list[int]:
    """How many components each group keeps: its first row, then the steps worth most.

    Args:
        sizes: for each group the full rank of each block.
        worths: for each group the worth of its steps after the first row, in descending order.
        numbers: most numbers to store in all.
    """
    first = [row_width(len(blocks)) for blocks in sizes]
    steps = (numbers - sum(first)) // ROW_STEP
    # For `take_best` a group's first row is the one component that every block keeps.
    scores = [torch.tensor([0.0, *worth], dtype=torch.float64) for worth in worths]
    taken = take_best(scores, len(sizes) + steps)
    return [
        min(start + ROW_STEP * (count - 1), sum(blocks))
        for start, count, blocks in zip(first, taken, sizes, strict=True)
    ]


def _even(sizes: Sequence[int], total: int) -> list[int]:
    """The same share of every block's full rank, remainders to the blocks that lost most.

    Args:
        sizes: full rank of each block.
        total: how many components to keep in all, from one a block to all there are.
    """
    exact = [total * size / sum(sizes) for size in sizes]
    ranks = [max(1, int(e)) for e in exact]
    order = sorted(range(len(sizes)), key=lambda i: ranks[i] - exact[i])
    for i in order:
        if sum(ranks) >= total:
            break
        ranks[i] = min(ranks[i] + 1, sizes[i])
    while sum(ranks) > total:
        # Only where the floor of one rank a block pushed the sum over.
        largest = max(range(len(ranks)), key=lambda i: ranks[i])
        ranks[largest] -= 1
    return ranks
