"""Random whole models in a shape, on their device in seconds; a run brings its own weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from starkv_core.artifacts import read_manifest
from starkv_core.bench.codes import coded_weights, for_random, run_layers
from starkv_core.bench.shapes import Shape, meta_model
from starkv_core.factors import FoldedLayer
from starkv_core.models.load import LoadedModel, prepare
from starkv_core.rank_map import LayerRanks
from starkv_core.run import (
    FACTORS,
    Subject,
    dense_of,
    deployed_subject,
    open_subject,
    read_folded,
)

STD = 0.02  # of the weights, as transformers starts these models


def dense_subject(shape: Shape, dtype: torch.dtype, device: torch.device) -> Subject:
    """The dense model: of a named shape with random weights, of a run the one it was made for."""
    if shape.config is None:
        name = str(dtype).removeprefix("torch.")
        found = open_subject(
            shape.name, device=str(device), dtype=name, model=shape.model, quantised=False
        )
        return dense_of(found)
    return Subject(_random_model(shape, dtype, device), store_dtype=dtype)


def compressed_subject(shape: Shape, dense: Subject, backend: str) -> Subject:
    """The compressed model on the weights of ``dense``, with the run's factors or random ones.

    Its latents have 16 bits.
    """
    if shape.config is None:
        sha256 = read_manifest(shape.name)["files"][FACTORS]
        layers = read_folded(Path(shape.name), shape.ranks, sha256)
    else:
        layers = {
            i: _random_layer(shape, ranks, i, dense.base.dtype, dense.device)
            for i, ranks in enumerate(shape.ranks.layers)
            if ranks is not None
        }
    made = deployed_subject(dense.base, shape.ranks, layers, store_dtype=dense.store_dtype)
    return replace(made, backend=backend)


def coded_subject(
    shape: Shape, dense: Subject, backend: str, value_scale: float | None = None
) -> Subject:
    """The quantised model on the weights of ``dense``: a run's own, or 16-bit factors with codes.

    Args:
        value_scale: with it steps are those of codes drawn at random, values being so large; None
            keeps the steps that latents ask for.
    """
    coded = shape.codes
    if coded.own:
        layers = run_layers(Path(shape.name))
        made = deployed_subject(dense.base, coded.ranks, layers, store_dtype=dense.store_dtype)
        weights = dict(made.weights)
    else:
        made = compressed_subject(shape, dense, backend)
        weights = {
            i: coded_weights(made.weights[i], layer, coded.codes[i], coded.owners[i])
            for i, layer in enumerate(shape.ranks.layers)
            if layer is not None
        }
    if value_scale is not None:
        for i, held in weights.items():
            if held.codes is not None:
                weights[i] = replace(held, codes=for_random(held.codes, value_scale))
    return replace(made, weights=weights, backend=backend)


def _random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    model: Any = meta_model(shape.config).to(dtype)
    rotary = model.model.rotary_emb
    model.to_empty(device=device)
    # to_empty leaves nothing of buffers and ties.
    model.model.rotary_emb = type(rotary)(config=shape.config).to(device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, STD, generator=generator)
    return prepare(model, None, shape.name)


def _random_layer(
    shape: Shape, ranks: LayerRanks, seed: int, dtype: torch.dtype, device: torch.device
) -> FoldedLayer:
    """Factors whose latents, keys and values have a mean square near 1."""
    spec = shape.spec
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, scale: float) -> torch.Tensor:
        made = torch.empty(rows, columns, dtype=dtype, device=device)
        return made.normal_(generator=generator).mul_(scale)

    keys, values = sum(ranks.keys), sum(ranks.values)
    bias = (spec.n_kv_heads, spec.head_dim)
    key_scale = (keys / len(ranks.keys)) ** -0.5
    return FoldedLayer(
        ranks=ranks,
        key_up=normal(spec.kv_width // len(ranks.keys), keys, key_scale),
        key_down=normal(keys, spec.hidden, spec.hidden**-0.5),
        # Under a norm on keys there is no bias, and U has orthonormal columns.
        key_bias=None if spec.qk_norm else normal(*bias, 0.5),
        value_up=normal(spec.kv_width // len(ranks.values), values, values**-0.5),
        value_down=normal(values, spec.hidden, spec.hidden**-0.5),
        value_bias=normal(*bias, 0.5),
        heads=spec.n_kv_heads,
        key_eps=1e-6 if spec.qk_norm else None,
    )
