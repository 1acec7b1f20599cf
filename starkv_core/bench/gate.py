"""The correctness gate: no time is shown for a backend that computes something else."""

from __future__ import annotations

import math

import torch

# Largest relative error of an attention output against float64, by dtype (issue: scores, outputs).
OUTPUT_LIMIT = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Of the logits of a whole model against another kernel of the same dtype. Random layers magnify
# rounding: over LLaMA-2-7B's 32, in fp16 at 4K to 16K, our kernels with the sequence split
# otherwise, so in another order of sums, differ from themselves by 1.0e-2 to 1.3e-2 and from the
# reference by 1.0e-2 to 2.0e-2. What attends wrongly is off by its own size.
LOGITS_LIMIT = {torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


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
