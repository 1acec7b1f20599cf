"""Where the channels of key heads lie in a row, and how the kernels cut the row up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

ALIGN = 8  # 16-bit numbers in the 16 bytes that one load moves: rows are padded to it
PIECE = 64  # lanes of a piece: channels, and one for the key bias of each head that ends in it
NARROW = 8  # columns of the narrowest product, which needs no shared memory
PIECE_HEADS = NARROW  # heads of a piece


def row_width(channels: int) -> int:
    """Numbers of a stored row that holds ``channels``: rows begin on 16 bytes."""
    return -(-channels // ALIGN) * ALIGN


def power(n: int, least: int = 16) -> int:
    """The power of two from ``n``, at least ``least``: the side of a Triton tile."""
    return max(least, 1 << (n - 1).bit_length())


def two_powers(n: int) -> tuple[int, int]:
    """The least sum from ``n`` of two powers of two from 16, the second smaller or 0."""
    whole = power(n)
    half = whole // 2
    if half < 32 or n > half + half // 2:
        return whole, 0
    return half, power(n - half)


class Piece(NamedTuple):
    """Channels ``first`` to ``end - 1`` of a row, loaded from ``load`` on.

    Each of the ``heads`` from ``head`` on has a segment of scores, from ``segment`` on. The lanes
    after the channels take the key biases of the first ``biases`` of them.
    """

    load: int
    first: int
    end: int
    head: int
    heads: int
    segment: int
    biases: int


@dataclass(frozen=True)
class KeyLayout:
    """Channels of every key head in a row of key latents.

    Attributes:
        ranks: channels of each head.
        starts: first channel of each head; heads of one group share theirs.
    """

    ranks: tuple[int, ...]
    starts: tuple[int, ...]

    @staticmethod
    def side_by_side(ranks: tuple[int, ...]) -> KeyLayout:
        """Every head its own channels, in order."""
        return KeyLayout(ranks, (0, *accumulate(ranks[:-1])))

    @property
    def channels(self) -> int:
        """R: channels of a row, padding left out."""
        return max(s + r for s, r in zip(self.starts, self.ranks, strict=True))

    def pieces(self, bias: bool) -> list[Piece] | None:
        """The row cut for scores without rebuilt keys; None when heads share channels.

        Args:
            bias: each head takes a lane more, in the piece that has its last channel.
        """
        if self != KeyLayout.side_by_side(self.ranks):
            return None
        ends = list(accumulate(self.ranks))
        found: list[Piece] = []
        channel, head, segment = 0, 0, 0
        while channel < self.channels:
            load = channel // ALIGN * ALIGN
            end, stop = channel, head  # heads before `stop` have their last channel before `end`
            while stop < len(ends) and stop < head + PIECE_HEADS:
                lanes = load + PIECE - bias * (stop - head)
                if ends[stop] + bias > lanes:
                    end = max(end, min(ends[stop] - 1, lanes) if bias else lanes)
                    break
                end, stop = ends[stop], stop + 1
            heads = stop - head + (end > (ends[stop - 1] if stop else 0))
            found.append(Piece(load, channel, end, head, heads, segment, (stop - head) * bias))
            segment += heads
            channel, head = end, stop
        return found

    def buckets(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Heads by the channels a product takes: ``{(K, MORE): [(head, first channel to load)]}``.

        Loads begin on 16 bytes and so may take in channels of the head before.
        """
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for head, (start, rank) in enumerate(zip(self.starts, self.ranks, strict=True)):
            first = start // ALIGN * ALIGN
            found.setdefault(two_powers(start + rank - first), []).append((head, first))
        return dict(sorted(found.items()))
