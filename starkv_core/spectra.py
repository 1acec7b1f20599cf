"""Spectra of key and value weights, and what each kind of decomposition loses.

The paper's figures 5 to 7 (STAR-KV, arXiv 2606.08382) show these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from starkv_core.decompose import Decomposition, decompose, head_groups
from starkv_core.models.load import LoadedModel
from starkv_core.progress import SILENT, Progress
from starkv_core.statistics import gather_statistics

LEVELS = (0.90, 0.95, 0.99)
BUDGETS = (0.25, 0.5)  # shares of the full cached width at which errors are compared


@dataclass(frozen=True)
class LayerSpectra:
    """Spectra of one layer.

    Attributes:
        index: layer.
        keys: ``[H_kv, min(D, d)]`` singular values per key head.
        values: ``[min(H_kv * D, d)]`` joint singular values.
        key_energy_ranks: mean over heads of the rank that holds 90, 95, 99% of the energy.
        value_energy_ranks: the same of the joint values.
        key_errors, value_errors: by ``hd`` and ``jd``, relative squared error at each of
            :data:`BUDGETS`: both kinds cache as many numbers per token.
    """

    index: int
    keys: torch.Tensor
    values: torch.Tensor
    key_energy_ranks: tuple[float, ...]
    value_energy_ranks: tuple[float, ...]
    key_errors: dict[str, tuple[float, ...]]
    value_errors: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class SpectraReport:
    """Spectra of a model; ``whitened`` by the inputs' second moment or of the bare weights."""

    model: str
    whitened: bool
    layers: list[LayerSpectra]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Spectra to save, float32."""
        found = {}
        for layer in self.layers:
            found[f"layers.{layer.index}.keys"] = layer.keys.float()
            found[f"layers.{layer.index}.values"] = layer.values.float()
        return found


def energy_rank(sigma: torch.Tensor, level: float) -> int:
    """Smallest rank that holds a share ``level`` of the energy ``sum sigma^2``."""
    energy = sigma.double().square().cumsum(0)
    return int((energy < level * energy[-1] * (1 - 1e-12)).sum()) + 1


def analyze_spectra(
    loaded: LoadedModel, tokens: torch.Tensor | None = None, progress: Progress = SILENT
) -> SpectraReport:
    """Spectra of every layer.

    Args:
        tokens: int64 ``[N, L]``; given, weights are whitened by the inputs' second moment on them.
    """
    spec = loaded.spec
    layers = list(range(spec.n_layers))
    moments: dict[int, torch.Tensor] = {}
    if tokens is not None:
        stats = gather_statistics(
            loaded, tokens, layers, mixed=False, attended=False, progress=progress
        )
        moments = {i: s.moment for i, s in stats.items()}
    found = []
    attentions: Any = loaded.family.attentions(loaded.model)
    with progress.task("spectra", len(layers), "layers") as task:
        for i in layers:
            found.append(
                _layer(
                    loaded,
                    i,
                    attentions[i].k_proj.weight,
                    attentions[i].v_proj.weight,
                    moments.get(i),
                )
            )
            task.advance()
    return SpectraReport(loaded.name, tokens is not None, found)


def _layer(
    loaded: LoadedModel,
    index: int,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    moment: torch.Tensor | None,
) -> LayerSpectra:
    spec = loaded.spec
    moment = None if moment is None else moment.to(key_weight.device)

    def blocks(weight: torch.Tensor, group: int) -> list[Decomposition]:
        rows = weight.detach().split(spec.head_dim * group)
        return [
            decompose(r, moment)
            for r, _ in zip(rows, head_groups(spec.n_kv_heads, group), strict=True)
        ]

    kinds = {"hd": 1, "jd": spec.n_kv_heads}
    keys = {kind: blocks(key_weight, group) for kind, group in kinds.items()}
    values = {kind: blocks(value_weight, group) for kind, group in kinds.items()}
    joint = values["jd"][0].sigma
    return LayerSpectra(
        index=index,
        keys=torch.stack([b.sigma for b in keys["hd"]]).cpu(),
        values=joint.cpu(),
        key_energy_ranks=tuple(
            sum(energy_rank(b.sigma, level) for b in keys["hd"]) / len(keys["hd"])
            for level in LEVELS
        ),
        value_energy_ranks=tuple(float(energy_rank(joint, level)) for level in LEVELS),
        key_errors={k: _errors(b, spec.kv_width) for k, b in keys.items()},
        value_errors={k: _errors(b, spec.kv_width) for k, b in values.items()},
    )


def _errors(blocks: list[Decomposition], width: int) -> tuple[float, ...]:
    """Relative squared error when the blocks share each budget evenly."""
    total = sum(float(b.sigma.square().sum()) for b in blocks)
    found = []
    for share in BUDGETS:
        rank = int(share * width) // len(blocks)
        found.append(sum(float(b.sigma[rank:].square().sum()) for b in blocks) / total)
    return tuple(found)
