"""What an eviction method decides: how many tokens stay, and which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Policy(ABC):
    """An eviction method with its budget.

    Attributes:
        keep: up to 1 a share of the tokens seen so far, above it a number of tokens.
        method: its name.
        least: tokens that it cannot do without.
        scored: whether it goes by the attention that tokens received.
        renumbered: whether positions are slots of the cache, or those of the text.
    """

    keep: Fraction
    method: ClassVar[str]
    least: ClassVar[int]
    scored: ClassVar[bool]
    renumbered: ClassVar[bool]

    @property
    def name(self) -> str:
        """As the user gives it, such as ``h2o-0.2`` or ``h2o-256``."""
        whole = self.keep.denominator == 1
        return f"{self.method}-{self.keep if whole else float(self.keep)}"

    def budget(self, seen: int) -> int:
        """Most tokens that stay of a row that has seen ``seen``."""
        wanted = self.keep * seen if self.keep <= 1 else self.keep
        return max(int(wanted), self.least)

    @abstractmethod
    def kept(
        self, place: torch.Tensor, held: torch.Tensor, budget: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Which tokens stay: at most ``budget`` of a row, all where no more are held.

        Args:
            place: int64 ``[B, 1, T]``, the place of each slot among the tokens that its row holds,
                in the order of the text; negative for slots that hold none.
            held: int64 ``[B, 1, 1]``, tokens held.
            budget: int64 ``[B, 1, 1]``, tokens to keep.
            scores: float32 ``[B, G, T]``, the attention received; read by scored methods only.

        Returns:
            Bool ``[B, G, T]`` or ``[B, 1, T]``.
        """
