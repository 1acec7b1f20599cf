"""The student: factors that train inside the frozen base model, which is also the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from starkv_core.factors import GateSettings, Shift, TrainedLayer
from starkv_core.models.load import LoadedModel
from starkv_core.rank_map import RankMap
from starkv_core.surgery import compressed


class Student(nn.Module):
    """Trained-form layers of a model, each on the device of its attention.

    Args:
        loaded: the base model; not a submodule, its weights stay frozen.
        layers: trained form by layer index.
        settings: of the gates.
    """

    def __init__(
        self, loaded: LoadedModel, layers: Mapping[int, TrainedLayer], settings: GateSettings
    ) -> None:
        super().__init__()
        self.loaded = loaded
        self.settings = settings
        attentions: Any = loaded.family.attentions(loaded.model)
        self.layers = nn.ModuleDict(
            {str(i): layer.to(attentions[i].q_proj.weight.device) for i, layer in layers.items()}
        )
        self._tables = loaded.spec.rope.growing()

    def by_layer(self) -> dict[int, TrainedLayer]:
        """Trained-form layers by index."""
        return {int(i): layer for i, layer in self.layers.items()}  # type: ignore[misc]

    def ranks(self, shift: float = 0.0) -> RankMap:
        """Rank map that the gates give now, thresholds shifted."""
        layers = self.by_layer()
        return RankMap(
            tuple(
                layers[i].ranks(self.settings, shift) if i in layers else None
                for i in range(self.loaded.spec.n_layers)
            )
        )

    def numbers(self, shift: float = 0.0) -> int:
        """Numbers stored per token in the compressed layers, padding of rows included."""
        return sum(layer.stored for layer in self.ranks(shift).layers if layer is not None)

    def soft_numbers(self, shift: Shift = 0.0) -> torch.Tensor:
        """Latents per token, counted by how far the gates are open; differentiable.

        Nominal, without padding: where the ranks settle, rows are full.
        """
        first = self.loaded.device
        parts = [
            factors.soft_rank(self.settings, _on(shift, factors.alpha)).to(first)
            for layer in self.by_layer().values()
            for factors in (layer.keys, layer.values)
        ]
        return torch.stack(parts).sum()

    @contextmanager
    def active(self, shift: Shift = 0.0) -> Iterator[Any]:
        """The base model with the student's factors in place, differentiable in them."""
        dtype = self.loaded.dtype
        live = {
            i: (lambda f=layer: f.weights(self.settings, dtype, _on(shift, f.keys.alpha)))
            for i, layer in self.by_layer().items()
        }
        with compressed(self.loaded, live, tables=self._tables) as model:
            yield model


def _on(shift: Shift, like: torch.Tensor) -> Shift:
    return shift.to(like.device) if isinstance(shift, torch.Tensor) else shift


@contextmanager
def checkpointed(model: Any, enabled: bool) -> Iterator[None]:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    layers = list(model.model.layers) if enabled else []
    own = [vars(layer).get("forward") for layer in layers]

    def recomputed(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return call

    try:
        for layer in layers:
            layer.forward = recomputed(layer.forward)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward
