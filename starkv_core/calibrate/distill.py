"""Distillation loss: KL from the teacher's to the student's next-token distribution.

Logits are never held whole: the loss and its gradient with respect to the student's last hidden
states are formed in one go, in chunks over the sequence and over the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

ROWS = 1024  # positions whose logits are held at once
COLUMNS = 32768  # vocabulary entries held at once


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
    ) -> torch.Tensor:
        need_grad = student.requires_grad
        grad = torch.zeros_like(student) if need_grad else None
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        pieces = head.split(COLUMNS)
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            s, t = student[rows], teacher[rows]
            norm_s, norm_t = _log_norm(s, pieces), _log_norm(t, pieces)
            slope = torch.zeros_like(s, dtype=torch.float32)
            for piece in pieces:
                log_s = (s @ piece.T).float() - norm_s
                log_t = (t @ piece.T).float() - norm_t
                p_t = log_t.exp()
                total += (p_t * (log_t - log_s)).sum()
                if grad is not None:
                    slope += (log_s.exp() - p_t).to(piece.dtype) @ piece
            if grad is not None:
                grad[rows] = slope.to(grad.dtype)
        ctx.grad = grad
        ctx.count = len(student)
        return total / len(student)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.grad * (upstream[0] / ctx.count).to(ctx.grad.dtype), None, None


def _log_norm(hidden: torch.Tensor, pieces: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Log of the softmax's denominator, ``[rows, 1]``, float32, over all pieces of the head."""
    parts = [torch.logsumexp((hidden @ p.T).float(), -1, keepdim=True) for p in pieces]
    return torch.logsumexp(torch.cat(parts, -1), -1, keepdim=True)


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> torch.Tensor:
    """Mean ``KL(teacher || student)`` over positions, in nats (docs/design.md section 2).

    Args:
        student, teacher: last hidden states after the final norm, ``[..., d]``.
        head: ``[vocab, d]``, weight of the language-model head; frozen.

    Returns:
        float32 scalar on the head's device, differentiable in ``student``.
    """
    width = student.shape[-1]
    # With a device_map a tied head may lie on another GPU than the last layer.
    student, teacher = (h.reshape(-1, width).to(head.device) for h in (student, teacher))
    loss: torch.Tensor = _ChunkedKL.apply(student, teacher.detach(), head.detach())
    return loss
