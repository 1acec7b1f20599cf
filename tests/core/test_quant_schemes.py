"""Schemes, rotations, steps and allocation against references written out longhand."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from starkv_core.errors import UserError
from starkv_core.quant.allocate import (
    BLOCK,
    Option,
    allocate,
    floor,
    key_options,
    value_options,
)
from starkv_core.quant.basis import leading
from starkv_core.quant.rotation import cosines, hadamard, rotation
from starkv_core.quant.scheme import Scheme, make_scheme
from starkv_core.quant.steps import best_steps

# --- schemes ---------------------------------------------------------------------------------


def test_the_papers_scheme_is_the_papers() -> None:
    paper = make_scheme("paper")
    assert (paper.widths, paper.window, paper.sinks) == ((4, 3), 0, 0)
    assert (paper.scales, paper.rotation) == ("block", "hadamard")


@pytest.mark.parametrize(
    ("channels", "wanted"), [(1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (19, 4), (20, 4), (1434, 287)]
)
def test_a_fifth_of_the_channels_leads_rounded_up(channels: int, wanted: int) -> None:
    assert leading(channels) == wanted == -(-channels // 5)


def test_schemes_survive_their_plain_form() -> None:
    for scheme in (
        make_scheme(),
        make_scheme("paper"),
        make_scheme(widths=[3, 2], window=0, sinks=0, scales="row", prefill="coded"),
    ):
        assert Scheme.from_dict(scheme.to_dict(), "here") == scheme


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "papper"}, ["papper", "nearest is paper"]),
        ({"name": "STAR"}, ["STAR", "star"]),
        ({"widths": [4, 5]}, ["5 bits cannot be packed", "2, 3, 4 or 8"]),
        ({"widths": [0]}, ["0 bits cannot be packed"]),
        ({"widths": []}, ["none given"]),
        ({"window": -1}, ["window -1"]),
        ({"sinks": -2}, ["sinks -2"]),
        ({"scales": "block"}, ["block", "static or row"]),
        ({"prefill": "codes"}, ["codes", "exact or coded"]),
        ({"name": "paper", "window": 8}, ["paper", "window"]),
        ({"name": "paper", "widths": [4]}, ["paper", "widths"]),
    ],
)
def test_bad_schemes_are_refused_in_one_line(
    arguments: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        make_scheme(**{"name": "star", **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"name": "stars"}, {"widths": 4}, {"scales": "tile"}, {"more": 1}, {"window": True}]
)
def test_a_malformed_scheme_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="malformed"):
        Scheme.from_dict({**make_scheme().to_dict(), **change}, "quant.yaml")


# --- rotations -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 33), 44, 45, 48, 52, 60, 76, 92, 103, 128, 287])
def test_rotations_of_any_size_are_orthogonal_and_flat(size: int) -> None:
    turn = rotation(size)
    assert turn.dtype == torch.float64
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    # Cosines alone reach sqrt(2 / n); a Hadamard matrix is exactly flat.
    assert float(turn.abs().max()) <= math.sqrt(2.0 / size) + 1e-12
    if hadamard(size) is not None:
        assert torch.allclose(turn.abs(), torch.full_like(turn, 1 / math.sqrt(size)))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 1152])
def test_hadamard_where_one_is_known(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert set(found.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


def test_no_hadamard_of_impossible_sizes() -> None:
    assert all(hadamard(n) is None for n in range(3, 100) if n % 4)
    with pytest.raises(ValueError, match="size 0"):
        rotation(0)


def test_cosines_are_those_of_the_definition() -> None:
    n = 7
    table = [
        [
            math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * k * (2 * i + 1) / (2 * n))
            for i in range(n)
        ]
        for k in range(n)
    ]
    assert torch.allclose(cosines(n), torch.tensor(table, dtype=torch.float64))


# --- steps -----------------------------------------------------------------------------------


def _error(row: list[float], step: float, bits: int) -> float:
    """Mean-square error of a mid-rise quantiser, number by number."""
    total, half = 0.0, 2 ** (bits - 1)
    for x in row:
        level = min(max(math.floor(x / step), -half), half - 1) + 0.5
        total += (x - level * step) ** 2
    return total / len(row)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["gaussian", "laplace", "uniform"])
def test_steps_are_the_best_by_search(bits: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    u = torch.rand(1500, generator=generator, dtype=torch.float64)
    rows = {
        "gaussian": torch.randn(1500, generator=generator, dtype=torch.float64) * 3.0,
        "laplace": -(u - 0.5).sign() * torch.log1p(-2 * (u - 0.5).abs()) * 0.2,
        "uniform": (u - 0.5) * 50.0,
    }[kind].clamp(-1e3, 1e3)
    steps, errors = best_steps(rows[:, None], bits)
    row, sigma = rows.tolist(), float(rows.square().mean().sqrt())
    best = min(_error(row, sigma * (0.02 * n), bits) for n in range(5, 100))
    assert _error(row, float(steps[0]), bits) == pytest.approx(float(errors[0]), rel=1e-3)
    assert float(errors[0]) <= best * 1.03


@pytest.mark.parametrize(("bits", "wanted"), [(2, 0.1188), (3, 0.03744), (4, 0.01154)])
def test_errors_of_a_gaussian_are_those_in_the_literature(bits: int, wanted: float) -> None:
    rows = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    assert float(best_steps(rows, bits)[1][0]) == pytest.approx(wanted, rel=0.03)


def test_a_channel_that_is_always_zero_gets_a_step_all_the_same() -> None:
    rows = torch.cat((torch.randn(64, 1), torch.zeros(64, 1)), 1)
    steps, errors = best_steps(rows, 4)
    assert bool((steps > 0).all() & steps.isfinite().all() & errors.isfinite().all())


# --- allocation ------------------------------------------------------------------------------


def _random_groups(seed: int, convex: bool) -> list[list[Option]]:
    """Groups of options; convex ones save less a byte with every step."""
    rng = random.Random(seed)
    groups = []
    for _ in range(rng.randint(2, 5)):
        count = rng.randint(1, 4)
        sizes = sorted(rng.sample(range(1, 12), count))
        costs = sorted((rng.uniform(0, 10) for _ in range(count)), reverse=True)
        if convex:
            gain = sorted((rng.uniform(0.1, 4) for _ in range(count)), reverse=True)
            costs = [20.0]
            for i in range(1, count):
                costs.append(costs[-1] - gain[i] * (sizes[i] - sizes[i - 1]))
        groups.append(
            [Option((n,), s, c) for n, (s, c) in enumerate(zip(sizes, costs, strict=True))]
        )
    return groups


@pytest.mark.parametrize("seed", range(40))
def test_allocation_against_every_choice_there_is(seed: int) -> None:
    groups = _random_groups(seed, convex=seed % 2 == 0)
    least = floor(groups)
    assert least == sum(min(o.nbytes for o in g) for g in groups)
    for limit in (least, least + 3, least + 9, least + 1000):
        chosen = allocate(groups, limit)
        used, cost = sum(o.nbytes for o in chosen), sum(o.cost for o in chosen)
        assert used <= limit
        choices = [c for c in itertools.product(*groups) if sum(o.nbytes for o in c) <= limit]
        best = min(sum(o.cost for o in c) for c in choices)
        # Nothing that is left pays for a cheaper option of any group.
        for n, group in enumerate(groups):
            for option in group:
                fits = used - chosen[n].nbytes + option.nbytes <= limit
                assert not fits or option.cost >= chosen[n].cost
        # Greedy is the best there is up to the step that no longer fitted.
        steps = [max(o.cost for o in g) - min(o.cost for o in g) for g in groups]
        assert best <= cost <= best + max(steps) + 1e-9
    assert allocate(groups, least + 1000) == [min(g, key=lambda o: o.cost) for g in groups]
    with pytest.raises(ValueError, match="floor"):
        allocate(groups, least - 1)


def test_reverse_water_filling_gives_the_textbooks_bits() -> None:
    """Blocks whose variances differ by 4 a bit: rates differ by one bit, the smallest get none."""
    widths = (4, 3, 2)
    variances = [4.0**3, 4.0**2, 4.0, 1e-6]
    worth = torch.tensor(variances, dtype=torch.float64).repeat_interleave(BLOCK)
    costs = {b: worth * 4.0**-b for b in (0, *widths)}
    groups = value_options(costs, widths, 512, 0)
    chosen = allocate(groups, (4 + 3 + 2) * BLOCK * 512 // 8)
    assert [o.bits[0] for o in chosen] == [4, 3, 2, 0]


@pytest.mark.parametrize(("channels", "kept"), [(40, 0), (40, 72), (5, 8), (16, 0)])
def test_options_count_their_bytes_and_costs(channels: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(channels)
    worth = torch.rand(channels, generator=generator, dtype=torch.float64)
    widths = (8, 4, 3, 2)
    costs = {b: worth * 4.0**-b for b in (0, *widths)}
    blocks = -(-channels // BLOCK)

    def stored(bits: tuple[int, ...], padded: bool) -> tuple[int, float]:
        """Bytes at 512 slots and cost, channel by channel."""
        per_channel = [bits[c // BLOCK] for c in range(channels)]
        coded = sum(b * 512 // 8 for b in per_channel)
        if padded:
            coded = sum(b * 512 // 8 * BLOCK for b in bits)
        left = sum(b > 0 for b in per_channel)
        rows = -(-left // 8) * 8 * kept
        cost = sum(float(w) * 4.0**-b for w, b in zip(worth, per_channel, strict=True))
        return coded + rows, cost

    options = key_options(costs, widths, 512, kept)
    assert len({o.bits for o in options}) == len(options)
    for option in options:
        assert len(option.bits) == blocks and option.bits[0] > 0
        assert list(option.bits) == sorted(option.bits, reverse=True)
        assert len({b for b in option.bits if b}) <= 2
        nbytes, cost = stored(option.bits, padded=True)
        assert option.nbytes == nbytes
        assert option.cost == pytest.approx(cost)
    every = [
        bits
        for bits in itertools.product((0, *widths), repeat=blocks)
        if bits[0] and list(bits) == sorted(bits, reverse=True) and len(set(bits) - {0}) <= 2
    ]
    assert {o.bits for o in options} == set(every)

    groups = value_options(costs, widths, 512, kept)
    assert len(groups) == blocks
    assert [0 in [o.bits[0] for o in g] for g in groups] == [False] + [True] * (blocks - 1)
    for pick in itertools.islice(itertools.product(*groups), 0, None, 7):
        bits = tuple(o.bits[0] for o in pick)
        nbytes, cost = stored(bits, padded=False)
        assert sum(o.nbytes for o in pick) == nbytes
        assert sum(o.cost for o in pick) == pytest.approx(cost)
