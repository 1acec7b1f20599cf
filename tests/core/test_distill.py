"""The chunked KL and its gradient against float64 over the whole vocabulary at once."""

from __future__ import annotations

import pytest
import torch

from starkv_core.calibrate import distill
from starkv_core.calibrate.distill import distillation_loss
from tests.tolerances import FP64_OP

ROWS, WIDTH, VOCAB = 23, 12, 101


def whole(
    student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean KL and its gradient in ``student``, float64, by autograd of the definition."""
    s = student.detach().double().reshape(-1, WIDTH).requires_grad_()
    p = torch.softmax(teacher.double().reshape(-1, WIDTH) @ head.double().T, -1)
    q = torch.softmax(s @ head.double().T, -1)
    loss = (p * (p / q).log()).sum() / len(s)
    (grad,) = torch.autograd.grad(loss, s)
    return loss.detach(), grad.view(student.shape)


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    teacher = torch.randn(*shape, WIDTH)
    student = teacher + 0.5 * torch.randn(*shape, WIDTH)
    return student.requires_grad_(), teacher, torch.randn(VOCAB, WIDTH)


@pytest.mark.parametrize("rows", [1, 7, 22, 23, 1024])
@pytest.mark.parametrize("columns", [1, 10, 100, 101, 32768])
def test_any_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    monkeypatch.setattr(distill, "ROWS", rows)
    monkeypatch.setattr(distill, "COLUMNS", columns)
    student, teacher, head = inputs(ROWS)
    loss = distillation_loss(student, teacher, head)
    (3.0 * loss).backward()
    wanted, grad = whole(student, teacher, head)
    assert student.grad is not None
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=FP64_OP * 10)
    error = (student.grad.double() - 3.0 * grad).norm() / grad.norm()
    assert float(error) < FP64_OP * 10


def test_leading_shapes_and_what_gets_a_gradient() -> None:
    student, teacher, head = inputs(3, 5)
    teacher.requires_grad_()
    head.requires_grad_()
    loss = distillation_loss(student, teacher, head)
    loss.backward()
    wanted, grad = whole(student, teacher, head)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, grad.float())
    torch.testing.assert_close(loss, wanted.float())
    assert teacher.grad is None
    assert head.grad is None


def test_zero_at_the_teacher_and_no_gradient_needed() -> None:
    student, teacher, head = inputs(9)
    same = teacher.clone().requires_grad_()
    loss = distillation_loss(same, teacher, head)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-6)
    assert same.grad is not None
    assert float(same.grad.abs().max()) < 1e-6
    with torch.no_grad():
        assert float(distillation_loss(student, teacher, head)) > 0.0


def test_extreme_logits_stay_finite() -> None:
    """Logits in the hundreds, as deep models have them: no overflow, no 0 times infinity."""
    student, teacher, head = inputs(ROWS)
    loud = (100.0 * student.detach()).requires_grad_()
    loss = distillation_loss(loud, 100.0 * teacher, head)
    loss.backward()
    assert loud.grad is not None
    assert bool(loss.isfinite()) and bool(loud.grad.isfinite().all())
