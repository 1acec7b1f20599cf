"""Requests of uneven length in batches of similar length; as many at once as memory holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_GPU_TOKENS = 2**16  # padding included; a 7B model takes about 50 GB for so many
_CPU_TOKENS = 2**10  # larger batches are no faster there


class Batches:
    """Cuts requests into batches, the longest first, so that what cannot fit shows at once.

    Args:
        rows: requests in a batch; None sizes batches by their tokens, and takes half as many
            wherever the GPU runs out of memory.
        device: where they run.
    """

    def __init__(self, rows: int | None, device: torch.device) -> None:
        self.rows = rows
        self.tokens = _GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS

    def run(
        self,
        items: Sequence[_Item],
        length: Callable[[_Item], int],
        work: Callable[[list[_Item]], Sequence[_Result]],
        alike: Callable[[_Item], Hashable] = lambda item: None,
    ) -> list[_Result]:
        """Results of ``work`` on all items, in their order.

        Args:
            items: what to work on.
            length: of an item, in tokens.
            work: takes a batch, gives a result for each of its items.
            alike: items of a batch are equal in this.

        Raises:
            torch.cuda.OutOfMemoryError: a batch of the given size does not fit, or one request.
        """
        groups: dict[Hashable, list[int]] = {}
        for i in sorted(range(len(items)), key=lambda i: -length(items[i])):
            groups.setdefault(alike(items[i]), []).append(i)
        found: dict[int, _Result] = {}
        for members in groups.values():
            while members:
                longest = max(1, length(items[members[0]]))
                part = members[: self.rows or max(1, self.tokens // longest)]
                try:
                    results = work([items[i] for i in part])
                except torch.cuda.OutOfMemoryError:
                    if self.rows is not None or len(part) == 1:
                        raise
                    results = None
                if results is None:  # outside of the handler: its traceback holds on to tensors
                    self.tokens = len(part) // 2 * longest
                    torch.cuda.empty_cache()
                    continue
                found.update(zip(part, results, strict=True))
                members = members[len(part) :]
        return [found[i] for i in range(len(items))]
