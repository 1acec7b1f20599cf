"""Second moments that the decompositions need, gathered from a running dense model.

Per layer, over all tokens of the calibration sequences (docs/design.md section 5):

- ``E[y]`` and ``E[y y^T]`` of the attention input ``y``;
- the same of the attention-mixed input ``yb_t = sum_s p_ts y_s`` over heads and positions;
- the mean square of the queries before RoPE, per key head;
- what attention makes of errors of keys, per key head (:mod:`.attended`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from starkv_core.attended import Attended
from starkv_core.models.load import LoadedModel
from starkv_core.progress import SILENT, Progress

_ROWS = 256  # query rows of all heads whose attention probabilities are held at once


@dataclass
class LayerStatistics:
    """Statistics of one layer, float32 on the CPU.

    Attributes:
        mean: ``[d]``, E[y].
        moment: ``[d, d]``, E[y y^T].
        mixed_mean, mixed_moment: the same of the attention-mixed input; zeros if not gathered.
        query_energy: ``[H_kv, D]``, mean square of the queries, summed over each group.
        query_moment: ``[H_kv, D, D]``, as of :meth:`.Attended.queries`; empty if not gathered.
        key_covariance, key_weight: ``[H_kv, D, D]`` and ``[H_kv]``, as of :meth:`.Attended.keys`;
            empty if not gathered.
    """

    mean: torch.Tensor
    moment: torch.Tensor
    mixed_mean: torch.Tensor
    mixed_moment: torch.Tensor
    query_energy: torch.Tensor
    query_moment: torch.Tensor
    key_covariance: torch.Tensor
    key_weight: torch.Tensor

    @staticmethod
    def names() -> list[str]:
        """Field names, in order."""
        return [f.name for f in fields(LayerStatistics)]


class _Accumulator:
    """Sums for one layer, on its device, while the model runs.

    Products are formed in float32 and summed in float64: a long sum outgrows what float32 can add
    to it. That takes ``8 d^2`` bytes a layer on its device, and as much again for mixed inputs.
    """

    def __init__(self, loaded: LoadedModel, mixed: bool, attended: bool) -> None:
        self.loaded, self.mixed, self.attended = loaded, mixed, attended
        self.tokens = self.rows = self.mixed_rows = 0
        self.sums: LayerStatistics | None = None

    def __call__(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        y = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.add(attention, y.detach())

    def _start(self, device: torch.device) -> LayerStatistics:
        spec = self.loaded.spec
        d = spec.hidden
        mixed = d if self.mixed else 0
        heads, D = spec.n_kv_heads if self.attended else 0, spec.head_dim
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=device)  # noqa: E731
        return LayerStatistics(
            zeros(d), zeros(d, d), zeros(mixed), zeros(mixed, mixed),
            zeros(spec.n_kv_heads, spec.head_dim),
            zeros(heads, D, D), zeros(heads, D, D), zeros(heads),
        )  # fmt: skip

    def add(self, attention: Any, y: torch.Tensor) -> None:
        """Add ``[B, L, d]`` inputs."""
        spec, family = self.loaded.spec, self.loaded.family
        if self.sums is None:
            self.sums = self._start(y.device)
        sums = self.sums
        flat = y.flatten(0, 1).float()
        self.tokens += len(flat)
        sums.mean += flat.sum(0)
        sums.moment += flat.T @ flat
        q = family.queries(attention, y, spec.head_dim)
        energy = q.float().square().sum((0, 2))
        sums.query_energy += energy.unflatten(0, (spec.n_kv_heads, spec.group)).sum(1)
        if self.mixed or self.attended:
            self._add_attention(attention, y)

    def _add_attention(self, attention: Any, y: torch.Tensor) -> None:
        for row in y:
            seen = Attended(self.loaded, attention, row)
            if self.mixed:
                for slots in torch.arange(len(row), device=y.device).split(_ROWS):
                    self._add_mixed(seen.probabilities(slots).to(y.dtype) @ row)
            if self.attended:
                self._add_attended(seen)

    def _add_mixed(self, mixed: torch.Tensor) -> None:
        assert self.sums is not None
        flat = mixed.flatten(0, 1).float()  # [H * rows, d]
        self.sums.mixed_mean += flat.sum(0)
        self.sums.mixed_moment += flat.T @ flat
        self.mixed_rows += len(flat)

    def _add_attended(self, seen: Attended) -> None:
        assert self.sums is not None
        p = seen.probabilities(seen.rows)
        covariance, weight = seen.keys(p)
        self.sums.query_moment += seen.queries(p)
        self.sums.key_covariance += covariance
        self.sums.key_weight += weight
        self.rows += 1

    def finish(self) -> LayerStatistics:
        """Means over everything added, on the CPU."""
        assert self.sums is not None
        s, n, m, r = self.sums, self.tokens, max(self.mixed_rows, 1), max(self.rows, 1)
        return LayerStatistics(
            (s.mean / n).float().cpu(), (s.moment / n).float().cpu(),
            (s.mixed_mean / m).float().cpu(), (s.mixed_moment / m).float().cpu(),
            (s.query_energy / n).float().cpu(), (s.query_moment / r).float().cpu(),
            (s.key_covariance / r).float().cpu(), (s.key_weight / r).float().cpu(),
        )  # fmt: skip


@contextmanager
def _hooked(
    loaded: LoadedModel, layers: list[int], mixed: bool, attended: bool
) -> Iterator[dict[int, _Accumulator]]:
    attentions = loaded.family.attentions(loaded.model)
    found = {i: _Accumulator(loaded, mixed, attended) for i in layers}
    handles = [
        attentions[i].register_forward_pre_hook(hook, with_kwargs=True) for i, hook in found.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def gather_statistics(
    loaded: LoadedModel,
    tokens: torch.Tensor,
    layers: list[int],
    *,
    mixed: bool = True,
    attended: bool = True,
    progress: Progress = SILENT,
) -> dict[int, LayerStatistics]:
    """Run the dense model over ``tokens`` and gather the statistics of ``layers``.

    Args:
        tokens: int64 ``[N, L]``.
        layers: indices of layers.
        mixed: also gather the attention-mixed moments, which cost H products a layer.
        attended: also gather the queries as attended keys see them, and the keys as they count.

    Returns:
        Statistics by layer index.
    """
    with (
        _hooked(loaded, layers, mixed, attended) as found,
        progress.task("statistics", len(tokens), "sequences") as task,
    ):
        for row in tokens:
            loaded.model.model(row[None].to(loaded.device), use_cache=False)
            task.advance()
    return {i: accumulator.finish() for i, accumulator in found.items()}
