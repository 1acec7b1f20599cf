"""Palu (arXiv 2407.21118): ranks in proportion to the Fisher information of the weights.

Its factors need nothing of their own: whitened decompositions of groups of four heads. A matrix
gets the share of all ranks that its score is of all scores; its groups share them evenly, as in the
paper's runs. What a matrix cannot use goes to the others in proportion; ranks are rounded to row
steps, not to 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from starkv_core.calibrate.student import checkpointed
from starkv_core.models.load import LoadedModel
from starkv_core.progress import SILENT, Progress

_LOSS_SCALE = 1024.0  # float16 alone: gradients of a mean over tokens would underflow


@torch.enable_grad()
def fisher_scores(
    loaded: LoadedModel,
    layers: Sequence[int],
    tokens: torch.Tensor,
    progress: Progress = SILENT,
) -> list[tuple[float, float]]:
    """Scores of the key and value weights of ``layers``: ``mean(sqrt(E[g^2]))``.

    ``g`` is the gradient of the next-token loss of one sequence, ``E`` the mean over sequences, the
    outer mean that over the entries of the matrix.

    Args:
        tokens: int64 ``[N, L]``.
    """
    attentions: Any = loaded.family.attentions(loaded.model)
    weights = [p.weight for i in layers for p in (attentions[i].k_proj, attentions[i].v_proj)]
    wanted = [w.requires_grad for w in weights]
    squares = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
    scale = _LOSS_SCALE if loaded.dtype == torch.float16 else 1.0
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with (
            checkpointed(loaded.model, True),
            progress.task("Fisher scores", len(tokens), "sequences") as task,
        ):
            for row in tokens:
                ids = row[None].to(loaded.device)
                logits = loaded.model(ids, use_cache=False).logits[0, :-1].float()
                loss = scale * F.cross_entropy(logits, ids[0, 1:].to(logits.device))
                for total, g in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                    total += (g.float() / scale).square()
                task.advance()
    finally:
        for weight, before in zip(weights, wanted, strict=True):
            weight.requires_grad_(before)
    found = [float((total / len(tokens)).sqrt().mean()) for total in squares]
    return list(zip(found[::2], found[1::2], strict=True))
