"""Ranks under a budget against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from starkv_core.calibrate.allocation import take_best, uniform_ranks


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


def test_more_than_there_is_takes_everything() -> None:
    assert take_best(blocks(0, [3, 5, 4]), 99) == [3, 5, 4]


def test_ties_are_settled_the_same_way_every_time() -> None:
    scores = [torch.ones(4), torch.ones(4), torch.ones(4)]
    assert take_best(scores, 7) == [4, 2, 1]


def test_a_block_of_one_component_and_negative_levels() -> None:
    """Levels above a threshold can all be negative, and a block can have no spare component."""
    scores = [torch.tensor([-9.0]), torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-5.0, -6.0])]
    assert take_best(scores, 5) == [1, 3, 1]


@pytest.mark.parametrize("sizes", [[4, 4, 4], [16, 16, 16, 16, 64], [1, 7, 30], [5]])
def test_uniform_shares(sizes: list[int]) -> None:
    for numbers in range(len(sizes), sum(sizes) + 1):
        ranks = uniform_ranks(sizes, numbers)
        assert sum(ranks) == numbers
        for rank, size in zip(ranks, sizes, strict=True):
            assert 1 <= rank <= size
            # Within one step of the exact share, but for the floor of one rank a block.
            lift = sum(max(0.0, 1.0 - numbers * s / sum(sizes)) for s in sizes)
            assert abs(rank - numbers * size / sum(sizes)) <= 1.0 + lift


def test_uniform_stops_at_full_rank() -> None:
    assert uniform_ranks([4, 8], 40) == [4, 8]
