"""What the quantiser must know of a compressed model: how its latents are spread, what errors cost.

All in the basis of the run's factors; gathered while the compressed model reads calibration text.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from starkv_core.attention import latents
from starkv_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from starkv_core.run import Subject

SAMPLES = 4096  # rows of latents kept for the choice of steps


@dataclass(frozen=True)
class LatentStatistics:
    """Latents of one layer over the text, on the CPU.

    Attributes:
        key_mean, value_mean: float64 ``[R]`` and ``[r_v]``.
        key_moment, value_moment: float64 ``[R, R]`` and ``[r_v, r_v]``, ``E[x x^T]``.
        key_rows, value_rows: float32 ``[N, R]`` and ``[N, r_v]``, a sample in even distances.
        query_energy: float64 ``[H_kv, D]``, mean square of the queries before RoPE, summed over
            each group of query heads.
    """

    key_mean: torch.Tensor
    key_moment: torch.Tensor
    key_rows: torch.Tensor
    value_mean: torch.Tensor
    value_moment: torch.Tensor
    value_rows: torch.Tensor
    query_energy: torch.Tensor


class _Gatherer:
    """Sums for one layer while the model runs; products in float32 or wider, sums in float64."""

    def __init__(self, subject: Subject, index: int, skip: int, every: int) -> None:
        self.subject, self.index, self.skip, self.every = subject, index, skip, every
        self.count = 0
        self.sums: list[torch.Tensor] = []
        self.rows: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        y = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        subject = self.subject
        y = y.detach()[:, self.skip :]
        found: list[torch.Tensor] = []
        for side, x in enumerate(latents(subject.weights[self.index], y)):
            flat = x.flatten(0, 1).float()
            found += [flat.double().sum(0), (flat.T @ flat).double()]
            first = -self.count % self.every
            self.rows[side].append(flat[first :: self.every].cpu())
        spec = subject.spec
        q = subject.base.family.queries(attention, y, spec.head_dim)
        energy = q.double().square().sum((0, 2))
        found.append(energy.unflatten(0, (spec.n_kv_heads, spec.group)).sum(1))
        self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.sums else found
        self.count += y.shape[0] * y.shape[1]

    def finish(self) -> LatentStatistics:
        means = [(s / self.count).cpu() for s in self.sums]
        keys, values = (torch.cat(rows) for rows in self.rows)
        return LatentStatistics(means[0], means[1], keys, means[2], means[3], values, means[4])


@torch.no_grad()
def measure_latents(
    subject: Subject, tokens: torch.Tensor, *, skip: int = 0, progress: Progress = SILENT
) -> dict[int, LatentStatistics]:
    """Run a compressed model over a text and gather the statistics of its latents.

    Args:
        subject: compressed, in 16-bit latents.
        tokens: int64 ``[N, L]``.
        skip: first tokens of each row to leave out (sinks, which stay in 16 bits).

    Returns:
        Statistics by layer index.
    """
    count, length = tokens.shape
    every = max(1, count * (length - skip) // SAMPLES)
    gatherers = {i: _Gatherer(subject, i, skip, every) for i in subject.weights}
    attentions: Any = subject.base.family.attentions(subject.model)
    with ExitStack() as held:
        for i, gatherer in gatherers.items():
            handle = attentions[i].register_forward_pre_hook(gatherer, with_kwargs=True)
            held.callback(handle.remove)
        model = held.enter_context(subject.active())
        task = held.enter_context(progress.task("latents", count, "sequences"))
        for row in tokens:
            model.model(row[None].to(subject.device), use_cache=False)
            task.advance()
    return {i: gatherer.finish() for i, gatherer in gatherers.items()}
