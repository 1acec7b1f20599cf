"""Static steps: the uniform quantiser of least mean-square error for each channel's own spread."""

from __future__ import annotations

import torch

# Distance of levels of the best uniform mid-rise quantiser of a unit Gaussian, by bits (Max 1960).
GAUSSIAN_STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 8: 0.0308}
# Of those, in steps of 4%: from 0.55 (uniform spread) to 2.0 (heavy tails).
_MULTIPLIERS = tuple(1.04**n for n in range(-15, 18))


def best_steps(
    rows: torch.Tensor, bits: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best step of every channel on a sample, and the mean-square error it leaves.

    Args:
        rows: ``[N, R]`` latents, each over the scale of its token.
        bits: 2, 3, 4 or 8.
        device: to search on; None is where the sample lies.

    Returns:
        Two float64 ``[R]``, where the sample lies: steps (positive also where a channel is always
        zero), errors.
    """
    back, rows = rows.device, rows.to(device=device or rows.device, dtype=torch.float32)
    sigma = rows.square().mean(0).sqrt()
    sigma = sigma.clamp_min(float(sigma.max()) * 1e-6 + torch.finfo(torch.float32).tiny)
    zero, top = (2**bits - 1) / 2, 2**bits - 1
    best = torch.full_like(sigma, float("inf"), dtype=torch.float64)
    steps = torch.zeros_like(best)
    for multiplier in _MULTIPLIERS:
        step = sigma * (GAUSSIAN_STEPS[bits] * multiplier)
        codes = (rows / step + zero).round_().clamp_(0, top)
        error = ((codes - zero) * step - rows).square_().mean(0, dtype=torch.float64)
        better = error < best
        best = torch.where(better, error, best)
        steps = torch.where(better, step.double(), steps)
    return steps.to(back), best.to(back)
