"""The student: factors that train inside the frozen base model, which is also the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from starkv_core.attention import RopeTables
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
        self._tables = RopeTables(loaded.spec.rope)

    def by_layer(self) -> dict[int, TrainedLayer]:
        """Trained-form layers by index."""
        return {int(i): layer for i, layer in self.layers.items()}  # type: ignore[misc]

    def ranks(self) -> RankMap:
        """Rank map that the gates give now."""
        layers = self.by_layer()
        return RankMap(
            tuple(
                layers[i].ranks(self.settings) if i in layers else None
                for i in range(self.loaded.spec.n_layers)
            )
        )

    def numbers(self) -> int:
        """Numbers cached per token in the compressed layers."""
        return sum(layer.total for layer in self.ranks().layers if layer is not None)

    def soft_numbers(self, shift: Shift = 0.0) -> torch.Tensor:
        """The same, counted by how far the gates are open; differentiable."""
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
    """Activation checkpointing of the decoder layers, undone on leaving."""
    if not enabled:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # transformers checkpoints a layer only in training mode; nothing below it may change mode.
    for layer in model.model.layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in model.model.layers:
            layer.training = False
        model.gradient_checkpointing_disable()
