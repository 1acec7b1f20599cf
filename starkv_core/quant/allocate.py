"""Bits under a byte budget: reverse water-filling of measured errors (docs/design.md section 5).

What is chosen for is a *group*: all keys of a layer, or a block of 16 value channels. Each has
options of known bytes and known cost; the budget goes, step by step, to whatever saves most cost a
byte, along the lower convex hull of every group, and what is left to any option that still fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from triton_ops.latent_attention import row_width

BLOCK = 16  # channels that get their bits together: sections of keys are padded to it


@dataclass(frozen=True)
class Option:
    """One way to code a group.

    Attributes:
        bits: of its blocks of :data:`BLOCK` channels, in order.
        nbytes: what it takes.
        cost: what its errors cost.
    """

    bits: tuple[int, ...]
    nbytes: int
    cost: float


def allocate(groups: Sequence[Sequence[Option]], limit: int) -> list[Option]:
    """One option for each group: least cost, never more than ``limit`` bytes in all.

    Nothing that is left could still pay for another option of less cost.

    Raises:
        ValueError: not even the smallest options fit; ask :func:`floor` first.
    """
    hulls = [_hull(options) for options in groups]
    taken = [0] * len(groups)
    spare = limit - floor(groups)
    if spare < 0:
        raise ValueError(f"limit {limit} is below the floor {floor(groups)}")
    queue: list[tuple[float, int]] = []

    def offer(group: int) -> None:
        hull, at = hulls[group], taken[group]
        if at + 1 < len(hull):
            now, then = hull[at], hull[at + 1]
            heapq.heappush(queue, (-(now.cost - then.cost) / (then.nbytes - now.nbytes), group))

    for group in range(len(groups)):
        offer(group)
    while queue:
        _, group = heapq.heappop(queue)
        step = hulls[group][taken[group] + 1].nbytes - hulls[group][taken[group]].nbytes
        if step <= spare:
            spare -= step
            taken[group] += 1
            offer(group)
    chosen = [hull[at] for hull, at in zip(hulls, taken, strict=True)]
    return _filled(groups, chosen, spare)


def floor(groups: Sequence[Sequence[Option]]) -> int:
    """Bytes of the smallest options."""
    return sum(min(o.nbytes for o in options) for options in groups)


def _filled(groups: Sequence[Sequence[Option]], chosen: list[Option], spare: int) -> list[Option]:
    """Spend what is left on whatever saves most, until nothing that saves anything fits."""
    fronts = [_front(options) for options in groups]
    while True:
        best, saved = None, 0.0
        for group, (options, now) in enumerate(zip(fronts, chosen, strict=True)):
            for option in options:
                if option.nbytes - now.nbytes <= spare and now.cost - option.cost > saved:
                    best, saved = (group, option), now.cost - option.cost
        if best is None:
            return chosen
        group, option = best
        spare -= option.nbytes - chosen[group].nbytes
        chosen = [*chosen[:group], option, *chosen[group + 1 :]]


def _front(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in both bytes and cost, smallest first."""
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.cost)):
        if not front or option.cost < front[-1].cost:
            front.append(option)
    return front


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull, from the smallest option to the one of least cost."""
    hull: list[Option] = []
    for option in _front(options):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """Cost saved a byte from ``a`` to the bigger ``b``."""
    return (a.cost - b.cost) / (b.nbytes - a.nbytes)


def key_options(
    costs: dict[int, torch.Tensor],
    widths: Sequence[int],
    slots: int,
    kept_bytes: int,
    least: int = 1,
) -> list[Option]:
    """Options of the keys of a layer: leading blocks in one width, the next in another, rest out.

    Two widths a layer at most, so that every head's channels lie in two sections at most.

    Args:
        costs: float64 ``[R]`` of every channel in its final order, by bits, 0 (dropped) included.
        widths: bits to use, descending.
        slots: that codes are allocated for.
        kept_bytes: what a channel takes in sinks and window; their rows are padded.
        least: leading channels that must stay.
    """
    sums = {bits: _block_sums(cost) for bits, cost in costs.items()}
    blocks = len(sums[0]) - 1
    channels = [min(n * BLOCK, len(costs[0])) for n in range(blocks + 1)]

    def option(first: int, high: int, rest: int, low: int) -> Option:
        end = first + rest
        bits = (high,) * first + (low,) * rest + (0,) * (blocks - end)
        cost = sums[high][first] + sums[low][end] - sums[low][first]
        cost += sums[0][blocks] - sums[0][end]
        coded = (first * high + rest * low) * BLOCK * slots // 8
        return Option(bits, coded + row_width(channels[end]) * kept_bytes, float(cost))

    found = []
    for first in range(1, blocks + 1):
        for i, high in enumerate(widths):
            found.append(option(first, high, 0, high))
            for low in widths[i + 1 :]:
                found += [option(first, high, n, low) for n in range(1, blocks - first + 1)]
    needed = -(-least // BLOCK)
    return [o for o in found if 0 not in o.bits[:needed]]


def value_options(
    costs: dict[int, torch.Tensor], widths: Sequence[int], slots: int, kept_bytes: int
) -> list[list[Option]]:
    """Options of every block of value channels; the first block cannot be dropped.

    Args: as of :func:`key_options`.
    """
    count = len(costs[0])
    groups = []
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        part = {bits: float(cost[start : start + size].sum()) for bits, cost in costs.items()}
        options = [
            Option((bits,), size * bits * slots // 8 + row_width(size) * kept_bytes, part[bits])
            for bits in widths
        ]
        groups.append(options if start == 0 else [Option((0,), 0, part[0]), *options])
    return groups


def _block_sums(cost: torch.Tensor) -> list[float]:
    """Cost of the leading 0, 1, 2, ... blocks."""
    sums = [float(block.sum()) for block in cost.double().split(BLOCK)]
    total = [0.0]
    for value in sums:
        total.append(total[-1] + value)
    return total
