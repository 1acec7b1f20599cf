"""Ranks under a budget: water-filling at the start, the exact budget after learning.

With 16-bit latents every rank of every block costs the same two bytes a token, so under a byte
budget the best ranks are the best components, whatever their layer (docs/design.md section 5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


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


def uniform_ranks(sizes: Sequence[int], numbers: int) -> list[int]:
    """The same share of every block's full rank, remainders to the blocks that lost most.

    Args:
        sizes: full rank of each block.
        numbers: how many components to keep in all.
    """
    share = min(1.0, numbers / sum(sizes))
    exact = [share * size for size in sizes]
    ranks = [max(1, int(e)) for e in exact]
    order = sorted(range(len(sizes)), key=lambda i: ranks[i] - exact[i])
    for i in order:
        if sum(ranks) >= numbers:
            break
        ranks[i] = min(ranks[i] + 1, sizes[i])
    while sum(ranks) > numbers:
        # Only where the floor of one rank a block pushed the sum over.
        largest = max(range(len(ranks)), key=lambda i: ranks[i])
        ranks[largest] -= 1
    return ranks
