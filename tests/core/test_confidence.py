"""Intervals against tables, closed forms and simulation."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest
import torch

from starkv_core.eval.confidence import (
    Figure,
    difference,
    mean_of,
    shown,
    standard_error,
    student_95,
)
from starkv_core.eval.records import Metric


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_students_t_as_tables_have_it(freedom: int, table: float) -> None:
    assert student_95(freedom) == pytest.approx(table, abs=5e-4)


def test_students_t_of_many_goes_on_smoothly() -> None:
    assert student_95(201) == pytest.approx(student_95(200), abs=2e-4)
    assert student_95(10**6) == pytest.approx(1.96, abs=1e-3)


def ppl(nlls: list[float]) -> Figure:
    value = math.exp(fmean(nlls))
    error = standard_error(nlls)
    assert error is not None
    return Figure(
        Metric("ppl", value, value * error, "lower", ("nll",), value),
        len(nlls),
        ((value, tuple(nlls)),),
    )


def accuracy(right: str) -> Figure:
    values = tuple(map(float, right))
    metric = Metric("acc", fmean(values), standard_error(values), rows=("acc",))
    return Figure(metric, len(values), ((1.0, values),))


def test_the_delta_method_is_the_gradient_of_the_difference() -> None:
    """Weights of the rows of both runs against autograd through the exponentials."""
    draw = random.Random(0)
    ours = [draw.gauss(3.0, 0.4) for _ in range(20)]
    theirs = [value + draw.gauss(0.05, 0.02) for value in ours]
    rows = torch.tensor([ours, theirs], dtype=torch.float64, requires_grad=True)
    values = rows.mean(-1).exp()
    (values[0] - values[1]).backward()
    assert rows.grad is not None
    influence = (rows.grad * rows.detach()).sum(0) * 20
    found = difference(ppl(ours), ppl(theirs))
    assert found is not None and found.paired
    assert found.value == pytest.approx(float((values[0] - values[1]).detach()))
    expected = student_95(19) * float(influence.std()) / math.sqrt(20)
    assert found.half == pytest.approx(expected)
    one, other = ppl(ours).metric, ppl(theirs).metric
    assert found.half < 0.2 * 1.96 * math.hypot(one.stderr or 0, other.stderr or 0)


def test_pairs_cover_the_truth_as_often_as_they_say() -> None:
    """400 draws of 15 windows: the interval holds the true difference in about 95% of them."""
    draw = random.Random(1)
    true = math.exp(3.0) - math.exp(2.95)
    held = 0
    for _ in range(400):
        common = [draw.gauss(0.0, 0.1) for _ in range(15)]
        ours, theirs = (
            [mean + shift + draw.gauss(0.0, 0.03) for shift in common] for mean in (3.0, 2.95)
        )
        found = difference(ppl(ours), ppl(theirs))
        assert found is not None and found.half is not None
        held += abs(found.value - true) <= found.half
    assert 0.92 <= held / 400 <= 0.98


def test_right_and_wrong_rows_are_paired() -> None:
    ours, theirs = "1111111100" * 10, "1111111001" * 10
    found = difference(accuracy(ours), accuracy(theirs))
    assert found is not None and found.paired
    assert found.value == 0.0
    # Agresti and Min (2005): 10 gained, 10 lost, half a row more each, two rows more in all
    assert found.half == pytest.approx(1.959964 * math.sqrt(21 / 102 / 102))
    same = difference(accuracy("1" * 30), accuracy("1" * 30))
    assert same is not None and same.half is not None
    assert 0.04 < same.half < 0.08  # nothing seen in 30 rows is not nothing
    assert shown(accuracy(ours).metric, found) == f"80.0% ± 4.0 (+0.0 ± {100 * found.half:.1f})"


def test_shares_between_are_paired_as_they_are() -> None:
    ours, theirs = [0.25, 0.5, 1.0, 0.75], [0.5, 0.5, 0.75, 0.0]
    one, other = (
        Figure(Metric("acc", fmean(v), standard_error(v)), 4, ((1.0, tuple(v)),))
        for v in (ours, theirs)
    )
    found = difference(one, other)
    deltas = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert found is not None
    assert found.half == pytest.approx(student_95(3) * stdev(deltas) / 2)


def test_without_the_rows_they_are_independent_and_said_so() -> None:
    one = Figure(Metric("acc", 0.5, 0.05), 100)
    found = difference(one, accuracy("1" * 60 + "0" * 40))
    assert found is not None and not found.paired and found.half is not None
    assert shown(one.metric, found).endswith(f"(-10.0 ± {100 * found.half:.1f} unpaired)")
    alone = difference(accuracy("1"), accuracy("0"))
    assert alone is not None and alone.half is None


def test_a_mean_of_tasks_is_paired_task_by_task() -> None:
    draw = random.Random(2)
    sizes = (50, 80)
    drawn = [["".join(draw.choice("01") for _ in range(n)) for n in sizes] for _ in range(2)]
    tasks = [[accuracy(rows) for rows in run] for run in drawn]
    found = difference(*(mean_of(run) for run in tasks))
    assert found is not None and found.paired and found.half is not None
    halves = [difference(a, b) for a, b in zip(*tasks, strict=True)]
    known = [h.half for h in halves if h is not None and h.half is not None]
    assert found.half == pytest.approx(math.hypot(*known) / 2)


def test_a_mean_of_tasks_is_as_sure_as_the_task_that_decides_it() -> None:
    """A task of 3 rows that scatter beside one of 101 that hardly do: 2 degrees, not 102."""
    draw = random.Random(3)
    few, many = [0.1, 0.5, 0.3], [draw.gauss(0.5, 1e-3) for _ in range(101)]
    means = []
    for rows in ([few, many], [[0.2] * 3, [0.5] * 101]):
        figures = [
            Figure(Metric("f1", fmean(v), standard_error(v)), len(v), ((1.0, tuple(v)),))
            for v in rows
        ]
        means.append(mean_of(figures))
    found = difference(*means)
    assert found is not None
    error = math.hypot(stdev(few) / math.sqrt(3), stdev(many) / math.sqrt(101)) / 2
    assert found.half == pytest.approx(4.303 * error, rel=1e-3)


def test_a_mean_that_is_to_fall_is_no_share() -> None:
    bits = Figure(Metric("bits_per_byte", 0.9, 0.1, "lower"), 20)
    assert shown(mean_of([bits, bits]).metric) == "0.9 ± 0.071"


def test_digits_end_where_the_interval_does() -> None:
    ours, theirs = ([value + shift for value in (3.0, 3.2, 2.9, 3.1)] for shift in (0.011, 0.0))
    found = difference(ppl(ours), ppl(theirs))
    assert found is not None and found.half is not None
    assert 0.01 < found.half < 0.1
    text = f"({found.value:+.3f} ± {found.half:.3f})"
    assert shown(ppl(ours).metric, found).endswith(text)
