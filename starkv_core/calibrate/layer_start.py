"""One layer as it is decomposed, and a look at what an approximation of it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from starkv_core.decompose import Decomposition
from starkv_core.factors import in_head_order

Side = tuple[Any, list[Decomposition], torch.Tensor | None, tuple[int, ...] | None]


@dataclass(frozen=True)
class LayerStart:
    """Full decompositions of one layer, float32 on the CPU.

    Attributes:
        keys, values: one decomposition per group of heads.
        key_mean, value_mean: input means whose error the bias takes over, or None.
        key_order: key heads group by group; None is their own order.
    """

    keys: list[Decomposition]
    values: list[Decomposition]
    key_mean: torch.Tensor | None
    value_mean: torch.Tensor | None
    key_order: tuple[int, ...] | None = None

    def sides(self, attention: Any) -> tuple[Side, Side]:
        """Keys and values of the layer whose attention this is, as :func:`approximated` has them.

        Returns:
            Projection, decompositions, mean and order of each.
        """
        return (
            (attention.k_proj, self.keys, self.key_mean, self.key_order),
            (attention.v_proj, self.values, self.value_mean, None),
        )


@contextmanager
def approximated(
    linear: Any,
    blocks: list[Decomposition],
    ranks: list[int],
    mean: torch.Tensor | None,
    order: tuple[int, ...] | None = None,
) -> Iterator[None]:
    """Put the low-rank approximation in place of one projection's weight, and the weight back.

    Args:
        linear: the projection.
        blocks, ranks: decompositions of its groups of heads, and how much of each is kept.
        mean: input whose error the bias takes over, or None.
        order: heads group by group; None is their own order.
    """
    weight, bias = linear.weight.data, linear.bias
    low = torch.cat([d.product(r) for d, r in zip(blocks, ranks, strict=True)])
    if order is not None:
        low = in_head_order(low.unflatten(0, (len(order), -1)), torch.tensor(order)).flatten(0, 1)
    try:
        linear.weight.data = low.to(weight)
        if mean is not None:
            owed = (weight - linear.weight.data).float() @ mean.to(weight.device)
            owed = owed if bias is None else owed + bias.float()
            linear.bias = torch.nn.Parameter(owed.to(weight.dtype), requires_grad=False)
        yield
    finally:
        linear.weight.data, linear.bias = weight, bias
