"""What is benchmarked: a named shape with its recorded rank map, or a run folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from starkv_core.artifacts import read_manifest
from starkv_core.bench.codes import CodedShape, coded_shape, run_codes
from starkv_core.bench.rank_maps import read_entry
from starkv_core.budget import paper_rate
from starkv_core.errors import UserError
from starkv_core.models.family import family_of
from starkv_core.models.load import inspect
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.run import FACTORS, is_run, read_ranks
from triton_ops.latent_attention import KeyLayout, row_width
from triton_ops.latent_codes import LayerCodes

FAR = 1 << 21  # positions of a random model: its speed does not depend on what it knows
SMALL_HEADS, SMALL_DIM, SMALL_LAYERS = 4, 32, 2
SMALL_CONTEXT, SMALL_BATCH = 512, 2
_SMALL_SHARE = 64  # contexts are divided by it


@dataclass(frozen=True)
class Shape:
    """A model to build at random, or that of a run, with the ranks its cache has.

    Attributes:
        name: of the shape or the run folder; ends in ``(scaled down)`` where it is.
        spec: shape of its attention.
        ranks: its rank map.
        parameters: of the whole model.
        config: transformers config of a named shape; None for a run.
        model: where the base model of a run lies now, if it has moved.
        coded: its quantised form, or None.
    """

    name: str
    spec: ModelSpec
    ranks: RankMap
    parameters: int
    config: Any = None
    model: str | None = None
    coded: CodedShape | None = None

    @property
    def removed(self) -> float:
        """The paper's rate: nominal, over latents of the compressed layers."""
        return paper_rate(self.spec, self.ranks)

    @property
    def layer(self) -> int:
        """The compressed layer whose rank is nearest to the mean: what ``attention`` measures."""
        held = {i: x.total for i, x in enumerate(self.ranks.layers) if x is not None}
        mean = sum(held.values()) / len(held)
        return min(held, key=lambda i: abs(held[i] - mean))

    @property
    def layer_ranks(self) -> LayerRanks:
        """Ranks of that layer."""
        ranks = self.ranks.layers[self.layer]
        if ranks is None:
            raise RuntimeError("the nearest to the mean is a compressed layer")
        return ranks

    @property
    def codes(self) -> CodedShape:
        """Its quantised form, where it has one."""
        if self.coded is None:
            raise RuntimeError("this shape is not coded")
        return self.coded

    @property
    def layer_codes(self) -> LayerCodes:
        """How the layer that ``attention`` measures is coded."""
        return self.codes.codes[self.layer]

    @property
    def key_owner(self) -> torch.Tensor:
        """Int64 ``[R]``: the group of key heads of each stored channel of that layer."""
        return self.codes.owners[self.layer]

    def in_bits(self, bits: float) -> Shape:
        """The same with codes of ``bits`` a channel. UserError if it has codes of its own."""
        if self.coded is not None:
            raise UserError(
                f"--bits {bits:g}: {self.name} is quantised and is measured with its own codes; "
                "leave --bits out"
            )
        return replace(self, coded=coded_shape(self.ranks, bits))

    def factor_numbers(self, coded: bool = False) -> int:
        """Numbers in the deployed factors of all layers; heads padded to the widest of theirs."""
        spec, total = self.spec, 0
        for layer in (self.codes.ranks if coded else self.ranks).layers:
            if layer is not None:
                # And the kernels' forms of it: for codes one in float32 too.
                key_up = spec.kv_width * max(layer.keys) * (5 if coded else 2)
                value_up = spec.kv_width * row_width(sum(layer.values)) * 2
                total += layer.total * spec.hidden + key_up + value_up
        return total


def key_layout(spec: ModelSpec, ranks: LayerRanks) -> KeyLayout:
    """Where the channels of a layer's key heads lie; heads of one group share theirs."""
    groups = KeyLayout.side_by_side(ranks.keys)
    each = spec.n_kv_heads // len(ranks.keys)
    return KeyLayout(
        tuple(r for r in groups.ranks for _ in range(each)),
        tuple(s for s in groups.starts for _ in range(each)),
    )


def open_shape(name: str, model: str | None = None) -> Shape:
    """A named shape, or the shape of a run folder, quantised or not.

    Args:
        model: where the base model of a run lies now, if it has moved.

    Raises:
        UserError: neither, a run with nothing to measure, or a map that does not fit.
    """
    if is_run(name):
        manifest = read_manifest(name)
        if FACTORS not in manifest["files"]:
            raise UserError(
                f"{name}: calibration has not finished; continue it with "
                f"`starkv calibrate --resume --out {shlex.quote(name)}`"
            )
        base, path = manifest["base_model"], Path(name)
        spec, parameters = inspect(model or base.get("name"), revision=base.get("revision"))
        shape = Shape(name, spec, read_ranks(path), parameters, model=model, coded=run_codes(path))
        if shape.coded is not None:
            shape.coded.ranks.check(spec, name)
    else:
        if model is not None:
            raise UserError(
                f"--model {model}: --shape {name} is no run folder, and has no base model to find"
            )
        entry = read_entry(name)
        shape = _built(name, named_config(name), RankMap.from_dict(entry, name))
    shape.ranks.check(shape.spec, name)
    if all(layer is None for layer in shape.ranks.layers):
        raise UserError(f"{name}: every layer is dense, there is nothing to measure")
    return shape


def named_config(name: str) -> Any:
    """transformers config of a named shape, open to contexts beyond those it was trained for."""
    from transformers import AutoConfig

    parts = dict(read_entry(name)["model"])
    parts["max_position_embeddings"] = FAR
    return AutoConfig.for_model(parts.pop("model_type"), **parts)


def named_spec(name: str) -> ModelSpec:
    """Spec of a named shape."""
    config = named_config(name)
    family = family_of(config, name)
    return family.spec(family.rope(meta_model(config)))


def _built(name: str, config: Any, ranks: RankMap) -> Shape:
    model = meta_model(config)
    family = family_of(config, name)
    spec = family.spec(family.rope(model))
    return Shape(name, spec, ranks, sum(p.numel() for p in model.parameters()), config)


def meta_model(config: Any) -> Any:
    """The model without storage, but for its RoPE, whose frequencies are real."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    rotary: Any = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    return model


def scaled_down(shape: Shape) -> Shape:
    """The same kind of attention with few, narrow heads in two layers, for a CPU.

    A run keeps its model: only contexts and batches shrink.
    """
    if shape.config is None:
        return shape
    old = shape.spec
    kv_heads = max(1, SMALL_HEADS // old.group)
    heads = kv_heads * old.group
    parts = shape.config.to_dict()
    parts |= {
        "hidden_size": heads * SMALL_DIM,
        "intermediate_size": 2 * heads * SMALL_DIM,
        "num_hidden_layers": SMALL_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": SMALL_DIM,
        "vocab_size": 256,
    }
    parts.pop("layer_types", None)
    config = type(shape.config).from_dict(parts)
    kept = [layer for layer in shape.ranks.layers if layer is not None][:SMALL_LAYERS]
    share = SMALL_DIM / old.head_dim
    width = kv_heads * SMALL_DIM / old.kv_width
    ranks = RankMap(
        tuple(
            LayerRanks(
                tuple(max(1, round(k * share)) for k in layer.keys[:kv_heads]),
                (max(1, round(sum(layer.values) * width)),),
            )
            for layer in kept + kept[:1] * (SMALL_LAYERS - len(kept))
        )
    )
    return _built(f"{shape.name} (scaled down)", config, ranks)


def small_contexts(contexts: tuple[int, ...]) -> tuple[int, ...]:
    """Contexts for a scaled-down run."""
    return tuple(dict.fromkeys(min(SMALL_CONTEXT, max(16, c // _SMALL_SHARE)) for c in contexts))


def small_batches(batches: tuple[int, ...]) -> tuple[int, ...]:
    """Batches for a scaled-down run."""
    return tuple(dict.fromkeys(min(SMALL_BATCH, b) for b in batches))
