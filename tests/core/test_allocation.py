"""Ranks under a budget against brute force: components one by one, and in full rows."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from starkv_core.calibrate.allocation import best_ranks, take_best, uniform_ranks, with_floor


def blocks(seed: int, sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=generator).sort(descending=True).values for n in sizes]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("numbers", range(3, 13))
def test_best_of_all_rank_maps(seed: int, numbers: int) -> None:
    scores = blocks(seed, [3, 5, 4])
    kept = take_best(scores, numbers)
    assert sum(kept) == numbers
    assert min(kept) >= 1

    def worth(ranks: tuple[int, ...] | list[int]) -> float:
        return float(sum(s[:r].double().sum() for s, r in zip(scores, ranks, strict=True)))

    every = [r for r in product(range(1, 4), range(1, 6), range(1, 5)) if sum(r) == numbers]
    assert worth(kept) == pytest.approx(max(map(worth, every)))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75])
def test_floor_is_kept_and_the_rest_goes_by_worth(share: float) -> None:
    """Scores of very different heights: without a floor the low groups keep next to nothing."""
    groups = [[s * 10.0**-i for s in blocks(i, [16, 16])] for i in range(6)]
    numbers = 96
    ranks = best_ranks(with_floor(groups, numbers, share), numbers)
    even = numbers * 16 // (6 * 32)
    assert all(r >= int(share * even) for group in ranks for r in group)
    assert sum(map(sum, ranks)) == numbers
    # Rows of 8: three quarters of the even 16 are two rows in every group, which leaves nothing.
    assert ranks[0] == ([16, 16] if share < 0.75 else [8, 8])
    assert (ranks == best_ranks(groups, numbers)) == (share == 0)


def test_more_than_there_is_takes_everything() -> None:
    assert take_best(blocks(0, [3, 5, 4]), 99) == [3, 5, 4]


def test_ties_are_settled_the_same_way_every_time() -> None:
    scores = [torch.ones(4), torch.ones(4), torch.ones(4)]
    assert take_best(scores, 7) == [4, 2, 1]


def test_a_block_of_one_component_and_negative_levels() -> None:
    """Levels above a threshold can all be negative, and a block can have no spare component."""
    scores = [torch.tensor([-9.0]), torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-5.0, -6.0])]
    assert take_best(scores, 5) == [1, 3, 1]


def rows(totals: list[int]) -> int:
    """Numbers stored for groups of these totals: each begins on 16 bytes."""
    return sum(-(-n // 8) * 8 for n in totals)


def random_groups(seed: int) -> list[list[torch.Tensor]]:
    """Groups of 1 to 5 or of 32 blocks, full ranks that rows do and do not divide, any scores."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    groups = []
    for _ in range(draw(1, 7)):
        count = 32 if draw(0, 6) == 0 else draw(1, 5)
        size = 8 * draw(1, 4) if draw(0, 1) else draw(1, 30)
        found = [torch.randn(size, generator=generator) * 10 ** draw(-3, 3) for _ in range(count)]
        groups.append([s.sort(descending=True).values for s in found])
    return groups


def budgets(groups: list[list[torch.Tensor]]) -> range:
    """Numbers from the floor to a little more than everything, few of them whole rows."""
    floor = rows([len(blocks) for blocks in groups])
    everything = rows([sum(map(len, blocks)) for blocks in groups])
    return range(floor, everything + 20, max(5, (everything - floor) // 9))


def check(found: list[list[int]], sizes: list[list[int]], numbers: int) -> None:
    """What every allocation must hold, whatever the scores."""
    for ranks, blocks in zip(found, sizes, strict=True):
        assert all(1 <= rank <= size for rank, size in zip(ranks, blocks, strict=True))
        assert sum(ranks) % 8 == 0 or ranks == blocks, "room in a row while components are left"
    stored = rows([sum(ranks) for ranks in found])
    assert stored <= numbers
    assert numbers - stored < 8 or found == sizes


@pytest.mark.parametrize("seed", range(25))
def test_rows_are_full_and_the_budget_is_met(seed: int) -> None:
    groups = random_groups(seed)
    sizes = [[len(s) for s in blocks] for blocks in groups]
    for numbers in budgets(groups):
        found = best_ranks(groups, numbers)
        check(found, sizes, numbers)
        check(uniform_ranks(sizes, numbers), sizes, numbers)
        # Within a group no component is better than one that is kept.
        for blocks, ranks in zip(groups, found, strict=True):
            kept = [float(s[r - 1]) for s, r in zip(blocks, ranks, strict=True) if r > 1]
            left = [float(s[r]) for s, r in zip(blocks, ranks, strict=True) if r < len(s)]
            assert not kept or not left or min(kept) >= max(left)


TINY = [
    [[3, 5, 4], [20]],
    [[11], [6, 6], [9]],
    [[1], [2, 2], [17]],
    [[8, 8], [24], [3]],
    [[2] * 9, [19], [12]],  # a first row of 16 numbers
]


@pytest.mark.parametrize("shift", [0.0, -7.0])
@pytest.mark.parametrize("sizes", TINY, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_full_rows_are_worth_more(seed: int, sizes: list[list[int]], shift: float) -> None:
    """Against every choice of rows; levels above thresholds can all be negative."""
    groups = [[s + shift for s in blocks(seed + i, group)] for i, group in enumerate(sizes)]
    lowest = min(float(s.min()) for group in groups for s in group)

    def worth(found: list[list[int]]) -> float:
        every = zip(groups, found, strict=True)
        kept = [s[:r] for group, ranks in every for s, r in zip(group, ranks, strict=True)]
        return sum(float((s.double() - lowest).sum()) for s in kept)

    choices = []
    for group in groups:
        least, full = -(-len(group) // 8) * 8, sum(map(len, group))
        choices.append(sorted({min(n, full) for n in range(least, full + 8, 8)}))
    for numbers in budgets(groups):
        allowed = [totals for totals in product(*choices) if rows(list(totals)) <= numbers]
        best = max(
            worth([take_best(g, n) for g, n in zip(groups, totals, strict=True)])
            for totals in allowed
        )
        assert worth(best_ranks(groups, numbers)) == pytest.approx(best)


def test_a_row_of_components_by_hand() -> None:
    """The second row of the second group is worth more than that of the first."""
    few = [torch.tensor([9.0] * 8 + [3.0] * 8)]
    many = [torch.tensor([9.0] * 8 + [4.0] * 8)]
    assert best_ranks([few, many], 31) == [[8], [16]]
    assert best_ranks([few, many], 32) == [[16], [16]]
    # A last row of one good component costs as much as one of eight and is worth less.
    short = [torch.tensor([9.0] * 8 + [5.0])]
    long = [torch.cat([many[0], torch.zeros(8)])]
    assert best_ranks([short, long], 24) == [[8], [16]]
    assert best_ranks([short, long], 39) == [[9], [16]]


def test_equal_rows_go_to_earlier_groups() -> None:
    scores = [torch.ones(24)]
    assert best_ranks([scores, scores, scores], 48) == [[24], [16], [8]]
    assert uniform_ranks([[24], [24], [24]], 40) == [[16], [16], [8]]


@pytest.mark.parametrize(
    "sizes",
    [[[16] * 4, [64]], [[128] * 8, [1024]] * 3, [[12, 12], [24]] * 2, [[40], [80], [160]]],
    ids=str,
)
def test_uniform_shares(sizes: list[list[int]]) -> None:
    floor, everything = rows([len(blocks) for blocks in sizes]), sum(map(sum, sizes))
    for numbers in range(floor, everything + 1, max(8, (everything - floor) // 40)):
        found = uniform_ranks(sizes, numbers)
        pairs = list(zip(found, sizes, strict=True))
        # No step went to a group while another would have had a lower share with it.
        grown = [sum(r) / sum(s) for r, s in pairs if sum(r) > rows([len(s)])]
        for r, s in pairs:
            if grown and sum(r) < sum(s):
                assert max(grown) <= (sum(r) + 8) / sum(s) + 1e-9
        for ranks, blocks in zip(found, sizes, strict=True):
            for rank, size in zip(ranks, blocks, strict=True):
                assert abs(rank - sum(ranks) * size / sum(blocks)) < 1.0


def test_uniform_within_uneven_blocks() -> None:
    assert uniform_ranks([[1, 7, 30]], 24) == [[1, 4, 19]]
    assert uniform_ranks([[1, 1, 1, 1, 30]], 8) == [[1, 1, 1, 1, 4]]


def test_uniform_stops_at_full_rank() -> None:
    assert uniform_ranks([[4, 8], [3]], 40) == [[4, 8], [3]]
