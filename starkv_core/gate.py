"""The soft threshold: one function for training, counting and export (docs/design.md, trap 4)."""

from __future__ import annotations

import torch


def gate(
    sigma: torch.Tensor, alpha: torch.Tensor, slope: float, *, log_units: bool
) -> torch.Tensor:
    """Gated singular values ``Th(sigma; alpha)``; shape of ``sigma``, differentiable in ``alpha``.

    ``Th = sigma * tanh(slope * excess)`` where ``excess > 0``, else 0, with

    - ``excess = sigma - alpha`` in the paper's absolute units (STAR-KV, gate equation), or
    - ``excess = ln(sigma) - alpha`` in log units, which do not depend on the weights' scale.

    Args:
        sigma: ``[..., r]`` singular values, not negative.
        alpha: ``[..., 1]`` or broadcastable thresholds.
        slope: ``s``; 50 in the paper.
        log_units: which of the two.
    """
    return sigma * openness(sigma, alpha, slope, log_units=log_units)


def openness(
    sigma: torch.Tensor, alpha: torch.Tensor, slope: float, *, log_units: bool
) -> torch.Tensor:
    """How far each component's gate is open, in [0, 1): ``Th(sigma; alpha) / sigma``.

    Its sum is a soft rank; the number of entries above 0 is the rank.
    """
    return opened(excess(sigma, alpha, log_units=log_units), slope)


def excess(sigma: torch.Tensor, alpha: torch.Tensor, *, log_units: bool) -> torch.Tensor:
    """How far each component lies above its threshold, in the gate's units."""
    level = sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log() if log_units else sigma
    return level - alpha


def opened(above: torch.Tensor, slope: float) -> torch.Tensor:
    """Openness of gates whose components lie ``above`` their thresholds: ``tanh(slope * above)``,
    0 below them.
    """
    return torch.tanh(slope * above).clamp_min(0.0)


def threshold_for_rank(sigma: torch.Tensor, rank: int, *, log_units: bool) -> float:
    """The threshold at which exactly the ``rank`` largest of ``sigma`` pass the gate.

    It lies midway (in the gate's units) between the last kept and the first dropped value; with
    nothing dropped, 1 below the last in log units, else at half of it.

    Args:
        sigma: ``[n]`` in descending order.
        rank: 1 to n.
    """
    level = sigma.double().clamp_min(torch.finfo(torch.float64).tiny)
    level = level.log() if log_units else level
    last = float(level[rank - 1])
    if rank < len(level):
        return 0.5 * (last + float(level[rank]))
    return last - 1.0 if log_units else 0.5 * last
