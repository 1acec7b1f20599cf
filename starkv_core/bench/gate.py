"""The correctness gate: no time is shown for a backend that computes something else."""

from __future__ import annotations

import math

import torch

# Largest relative error of an attention output against float64, by dtype (issue: scores, outputs).
OUTPUT_LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Of the logits of a whole model against another kernel of the same dtype: both round in every
# layer. Over 32 small random layers the dense kernels differ by 1e-3 and 9e-3.
LOGITS_LIMIT = {torch.float16: 1.5e-2, torch.bfloat16: 4e-2}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """``|got - want| / |want|`` over all numbers; infinity for NaN and for other shapes."""
    if got.shape != want.shape:
        return math.inf
    want = want.double()
    norm = float(want.norm())
    error = float((got.double() - want).norm()) / norm if norm > 0 else math.inf
    return error if math.isfinite(error) else math.inf


def fault(error: float, limit: float) -> str | None:
    """Why a backend with this error is refused, or None."""
    if error <= limit:  # false for NaN
        return None
    return f"wrong: relative error {error:.2g} is above {limit:g}; no time is shown"


def token_fault(tokens: torch.Tensor, logits: torch.Tensor, limit: float) -> str | None:
    """Whether ``tokens [B]`` can be the greedy choice of ``logits [B, V]``, give or take rounding.

    Near ties may fall either way, so what counts is how far below the largest a choice lies.
    """
    logits = logits.double()
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    behind = (logits.amax(-1) - chosen) / logits.std(-1)
    worst = float(behind.max())
    if worst <= 10 * limit:
        return None
    return f"wrong: the step chose a token {worst:.2g} standard deviations below the best"
