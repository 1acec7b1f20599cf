"""Standard errors, and differences of figures with intervals: on the same rows in pairs.

A figure is a mean over rows, a function of one, or a mean of such figures; to first order (the
delta method) it moves with its rows as a weighted sum of means, its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import stdev, variance

from starkv_core.eval.records import Metric, Record

_MANY = 200  # degrees of freedom from which a series is exact to 1e-4


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values: ``s / sqrt(n)``, with n - 1 in s; None for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True)
class Figure:
    """A metric and what it is made of.

    Attributes:
        metric: the figure.
        n: rows.
        parts: a weight and the values of each mean; none where they are not known.
    """

    metric: Metric
    n: int
    parts: tuple[tuple[float, tuple[float, ...]], ...] = ()


def figures_of(record: Record) -> dict[str, Figure]:
    """Figures of a record by their metric's name."""
    found = {}
    for metric in record.metrics:
        values = record.values(metric)
        parts = ((metric.slope, values),) if values else ()
        found[metric.name] = Figure(metric, len(values) or record.n, parts)
    return found


def mean_of(figures: Sequence[Figure]) -> Figure:
    """Unweighted mean of figures of different tasks, as the paper averages."""
    metrics, k = [figure.metric for figure in figures], len(figures)
    values = [m.value for m in metrics if m.value is not None]
    errors = [m.stderr for m in metrics if m.stderr is not None]
    metric = Metric(
        "mean",
        sum(values) / k if len(values) == k else None,
        math.hypot(*errors) / k if len(errors) == k else None,
        metrics[0].better,
    )
    parts = tuple((weight / k, values) for f in figures for weight, values in f.parts)
    known = all(figure.parts for figure in figures)
    return Figure(metric, sum(f.n for f in figures), parts if known else ())


@dataclass(frozen=True)
class Difference:
    """Of two figures.

    Attributes:
        value: the first less the second.
        half: half of its 95% interval; None where errors are not known.
        paired: whether rows were compared one by one, or the two taken as independent, which is
            too wide where they answer the same rows.
    """

    value: float
    half: float | None
    paired: bool


def difference(figure: Figure, reference: Figure) -> Difference | None:
    """``figure`` less ``reference``, figures of the same rows; None where one is infinite."""
    one, other = figure.metric, reference.metric
    if one.value is None or other.value is None:
        return None
    value = one.value - other.value
    sizes = [len(values) for _, values in figure.parts]
    if sizes and min(sizes) > 1 and sizes == [len(values) for _, values in reference.parts]:
        parts = zip(figure.parts, reference.parts, strict=True)
        variances, freedoms = zip(*(_paired(*mine, *theirs) for mine, theirs in parts), strict=True)
        half = student_95(_freedom(variances, freedoms)) * math.sqrt(sum(variances))
        return Difference(value, half, True)
    if one.stderr is None or other.stderr is None or figure.n < 2:
        return Difference(value, None, False)
    half = student_95(figure.n - 1) * math.hypot(one.stderr, other.stderr)
    return Difference(value, half, False)


def _paired(
    weight: float, values: Sequence[float], other_weight: float, others: Sequence[float]
) -> tuple[float, int]:
    """Variance of the difference of two weighted means of the same rows, and degrees of freedom."""
    if weight == other_weight and {*values, *others} <= {0.0, 1.0}:
        return weight**2 * _variance_of_shares(values, others), 0
    pairs = zip(values, others, strict=True)
    deltas = [weight * a - other_weight * b for a, b in pairs]
    return variance(deltas) / len(deltas), len(deltas) - 1


def _freedom(variances: Sequence[float], freedoms: Sequence[int]) -> int:
    """Degrees of freedom of a sum of variances (Welch and Satterthwaite); 0 where all is known."""
    spread = sum(v**2 / f for v, f in zip(variances, freedoms, strict=True) if f)
    return max(1, math.floor(sum(variances) ** 2 / spread + 1e-9)) if spread else 0


def _variance_of_shares(right: Sequence[float], others: Sequence[float]) -> float:
    """Variance of the difference of two shares of the same rows, each row right (1) or wrong (0).

    Agresti and Min (2005): half a row more in each of the four cells, for a run that errs nowhere
    the other does not is still not known to be the same.
    """
    n = len(right) + 2
    gained = sum(a > b for a, b in zip(right, others, strict=True)) + 0.5
    lost = sum(a < b for a, b in zip(right, others, strict=True)) + 0.5
    return ((gained + lost) / n - ((gained - lost) / n) ** 2) / n


@cache
def student_95(freedom: int) -> float:
    """Half of the interval that holds 95% of Student's t; of the normal with 0 degrees.

    Shares have no variance to estimate beside their mean, and so no degrees.
    """
    z = 1.959963985
    if freedom == 0:
        return z
    if freedom > _MANY:
        return z + (z**3 + z) / (4 * freedom)
    low, high = z, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _student_share(middle, freedom) < 0.95:
            low = middle
        else:
            high = middle
    return high


def _student_share(t: float, freedom: int) -> float:
    """Probability of (-t, t): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def shown(metric: Metric, change: Difference | None = None) -> str:
    """A figure for people: shares in percent, its standard error, the change in brackets."""
    if metric.value is None:
        return "infinite"
    share = is_share(metric)
    scale, digits, unit = (100.0, ".1f", "%") if share else (1.0, ".4g", "")
    text = f"{scale * metric.value:{digits}}{unit}"
    if metric.stderr is not None:
        text += f" ± {100 * metric.stderr:.1f}" if share else f" ± {metric.stderr:.2g}"
    if change is None:
        return text
    if change.half is None:
        return f"{text} ({scale * change.value:{'+.1f' if share else '+.3g'}})"
    places = 1 if share else max(0, 1 - math.floor(math.log10(change.half or 0.1)))
    behind = "" if change.paired else " unpaired"
    return f"{text} ({scale * change.value:+.{places}f} ± {scale * change.half:.{places}f}{behind})"


def is_share(metric: Metric) -> bool:
    """Whether a figure is a share of rows, from 0 to 1."""
    named = metric.name.startswith(("acc", "exact_match", "mean")) and metric.better == "higher"
    return named and metric.value is not None and 0 <= metric.value <= 1
