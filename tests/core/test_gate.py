"""The soft threshold is one function for training, counting and export (traps 4 and 5)."""

import math

import pytest
import torch

from starkv_core.gate import gate, openness, threshold_for_rank


def test_paper_formula_by_hand() -> None:
    sigma = torch.tensor([3.0, 1.02, 1.0, 0.5], dtype=torch.float64)
    found = gate(sigma, torch.tensor(1.0, dtype=torch.float64), 50.0, log_units=False)
    wanted = [3.0 * math.tanh(100.0), 1.02 * math.tanh(1.0), 0.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


def test_log_units_do_not_depend_on_the_scale() -> None:
    sigma = torch.tensor([3.0, 1.1, 1.0, 0.5])
    alpha = torch.tensor(0.0)
    small = gate(sigma, alpha, 20.0, log_units=True)
    large = gate(1000 * sigma, alpha + math.log(1000), 20.0, log_units=True)
    torch.testing.assert_close(large / 1000, small, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("log_units", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_threshold_gives_the_rank(rank: int, log_units: bool) -> None:
    sigma = torch.tensor([9.0, 4.0, 1.0, 0.3, 0.01])
    alpha = threshold_for_rank(sigma, rank, log_units=log_units)
    opened = openness(sigma, torch.tensor(alpha), 50.0, log_units=log_units)
    assert int((opened > 0).sum()) == rank


def test_gradient_reaches_the_threshold() -> None:
    alpha = torch.tensor(0.95, requires_grad=True)
    gate(torch.tensor([1.0]), alpha, 5.0, log_units=False).sum().backward()
    assert alpha.grad is not None and float(alpha.grad) < 0


def test_threshold_lies_midway() -> None:
    """In the gate's units: where it lies decides how far the last gate kept is open."""
    sigma = torch.tensor([9.0, 4.0, 1.0])
    assert threshold_for_rank(sigma, 1, log_units=False) == 6.5
    assert threshold_for_rank(sigma, 2, log_units=False) == 2.5
    assert threshold_for_rank(sigma, 3, log_units=False) == 0.5
    assert threshold_for_rank(sigma, 1, log_units=True) == pytest.approx(math.log(6.0))
    assert threshold_for_rank(sigma, 2, log_units=True) == pytest.approx(math.log(2.0))
    assert threshold_for_rank(sigma, 3, log_units=True) == -1.0
