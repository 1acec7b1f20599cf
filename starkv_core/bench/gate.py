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


def greedy_fault(tokens: torch.Tensor, logits: torch.Tensor) -> str | None:
    """Whether ``tokens [B]`` are not the likeliest by the logits ``[B, V]`` they came from."""
    chosen = logits.gather(-1, tokens[:, None])[:, 0]
    if bool((chosen == logits.amax(-1)).all()):
        return None
    return "wrong: the step chose another token than the likeliest; no time is shown"


def rows_checked(batch: int) -> list[int]:
    """Rows that the reference computes: the ends and the middle."""
    return sorted({0, batch // 2, batch - 1})
