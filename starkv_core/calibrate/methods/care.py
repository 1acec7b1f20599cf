"""CARE (arXiv 2603.17946): factors of ``W C^(1/2)``, ranks handed out greedily.

With the covariance C (a tenth of its mean on the diagonal added, as in the authors' code) this is a
whitened decomposition, over all heads of a layer, of keys and of values. Ranks are CARE-E's, by the
score of the authors' code: keys and values get half of the budget each, every layer at least half
and at most twice its even share, and the next step goes where it takes off the largest share of the
energy still left out, more so in early layers, less so where the rank is high already. CARE-U, even
ranks, is ``allocation: uniform``; near half of the full rank it does better, for the share of
what is left tends to 1 and a layer once ahead is filled up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from starkv_core.budget import ROW_STEP
from starkv_core.calibrate.allocation import take_best
from triton_ops.latent_attention import row_width


def greedy_ranks(groups: Sequence[Sequence[torch.Tensor]], numbers: int) -> list[list[int]]:
    """Ranks by relative residual reduction.

    The next step of layer l goes by ``sum_step sigma^2 / sum_left sigma^2``, times
    ``sqrt((L - l) / mean)`` for the layers that its error passes through, over
    ``sqrt(rank / least rank)``.

    Args:
        groups: keys and values of each layer in turn; of each its blocks; of each block ``sigma^2``
            in descending order.
        numbers: as of :func:`starkv_core.calibrate.allocation.best_ranks`.

    Returns:
        Ranks for each group, as of :func:`starkv_core.calibrate.allocation.best_ranks`.
    """
    floors = [sum(row_width(len(blocks)) for blocks in groups[side::2]) for side in (0, 1)]
    half = numbers // 2 // ROW_STEP * ROW_STEP
    keys = min(max(half, floors[0]), numbers - floors[1])
    sides = [_side(groups[0::2], keys), _side(groups[1::2], numbers - keys)]
    return [ranks for pair in zip(*sides, strict=True) for ranks in pair]


def _side(groups: Sequence[Sequence[torch.Tensor]], numbers: int) -> list[list[int]]:
    """Ranks of the keys, or of the values, of all layers."""
    # Spectra in full rows, padded with what costs a row no more but adds nothing.
    spectra = []
    for blocks in groups:
        energy = torch.cat([block.double().cpu() for block in blocks]).sort(descending=True).values
        spectra.append(F.pad(energy, (0, row_width(len(energy)) - len(energy))))
    share = numbers / len(groups)
    firsts = [row_width(len(blocks)) for blocks in groups]
    least = [
        min(max(first, int(share / 2) // ROW_STEP * ROW_STEP), len(energy))
        for first, energy in zip(firsts, spectra, strict=True)
    ]
    most = [min(int(2 * share) // ROW_STEP * ROW_STEP, len(energy)) for energy in spectra]
    depth = [((len(groups) - n) / (0.5 * (len(groups) + 1))) ** 0.5 for n in range(len(groups))]
    widths = list(least if sum(least) <= numbers else firsts)
    for bounds in (most, [len(energy) for energy in spectra]):
        # The second round gives away what the upper bounds have left over.
        while sum(widths) + ROW_STEP <= numbers:
            scores = {
                n: _gain(spectra[n], widths[n]) * depth[n] / (widths[n] / least[n]) ** 0.5
                for n, bound in enumerate(bounds)
                if widths[n] + ROW_STEP <= bound
            }
            if not scores:
                break
            widths[max(scores, key=scores.__getitem__)] += ROW_STEP
    return [take_best(blocks, width) for blocks, width in zip(groups, widths, strict=True)]


def _gain(energy: torch.Tensor, width: int) -> float:
    """Share of the energy beyond ``width`` that the next row step takes off."""
    left = float(energy[width:].sum())
    return float(energy[width : width + ROW_STEP].sum()) / left if left > 0 else 0.0
