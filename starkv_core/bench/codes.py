"""How the cache of a benchmarked shape is coded: bits by ``--bits``, or a quantised run's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from starkv_core.artifacts import read_manifest
from starkv_core.attention import LatentWeights
from starkv_core.budget import BYTES_PER_NUMBER
from starkv_core.errors import UserError
from starkv_core.quant.artifact import is_quantised, quantised_ranks, read_quantisation
from starkv_core.quant.layer import QuantLayer, layout_of, make_codec, stored_order
from starkv_core.quant.scheme import make_scheme
from starkv_core.quant.steps import GAUSSIAN_STEPS
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.run import FACTORS, read_ranks
from triton_ops.latent_attention import row_width
from triton_ops.latent_codes import TILE, Codec, LayerCodes


@dataclass(frozen=True)
class CodedShape:
    """The quantised form of a shape.

    Attributes:
        ranks: channels that are left.
        codes: of every compressed layer.
        owners: of the same layers int64 ``[R]``: the group of key heads of each stored channel.
        own: whether they are a quantised run's own; else they were made for ``--bits``.
    """

    ranks: RankMap
    codes: Mapping[int, LayerCodes]
    owners: Mapping[int, torch.Tensor]
    own: bool

    @cached_property
    def bits(self) -> float:
        """Mean bits of a channel over all coded layers, codes alone."""
        layouts = [side.layout for c in self.codes.values() for side in (c.keys, c.values)]
        return float(torch.cat([layout.bits() for layout in layouts]).double().mean())


def bits_fault(bits: float) -> str | None:
    """Why a number of bits cannot be made of whole ones, or None."""
    if 2 <= bits <= 4 or bits == 8:
        return None
    what = "a number from 2 to 4 (3.2: a fifth of the channels 4 bits, the rest 3) or 8"
    return f"bits {bits:g}: {what}"


def parse_bits(text: str | None) -> float | None:
    """Bits of a channel as ``--bits`` has them; None stays None.

    Raises:
        UserError: no number, or none that can be made.
    """
    if text is None:
        return None
    try:
        bits = float(text)
    except ValueError:
        bits = math.nan
    if (found := bits_fault(bits)) is not None:
        raise UserError(f"--bits {text!r}: {found.split(': ', 1)[1]}")
    return bits


def coded_shape(ranks: RankMap, bits: float) -> CodedShape:
    """Every compressed layer in ``bits`` a channel, nothing dropped; else as ``starkv quantize``.

    The leading channels of every key head, and of the values of a layer, take the greater width, as
    many as in the paper's scheme; scales are static, sinks and window those of scheme star.
    """
    scheme = make_scheme("star")
    codes: dict[int, LayerCodes] = {}
    owners: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(ranks.layers):
        if layer is not None:
            owners[i], of_keys = _stored(layer.keys, bits)
            _, of_values = _stored((sum(layer.values),), bits)
            keys, values = _codec("key", of_keys), _codec("value", of_values)
            codes[i] = LayerCodes(keys, values, scheme.sinks, scheme.window, scheme.prefill)
    return CodedShape(ranks, codes, owners, own=False)


def step_bytes(codes: LayerCodes, tokens: int) -> int:
    """Bytes that a step reads of a row of one layer: codes, their scales, rows that are not coded.

    The padding of sections and rows is read with them.
    """
    sides = (codes.keys.layout, codes.values.layout)
    exact = min(tokens, codes.sinks + codes.window)
    a_tile = sum(side.tile_bytes + side.scale_bytes for side in sides)
    numbers = sum(row_width(side.channels) for side in sides)
    return (tokens - exact) * a_tile // TILE + exact * numbers * BYTES_PER_NUMBER


def _stored(ranks: Sequence[int], bits: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Owner and bits, int64 ``[R]``, of every channel in stored order.

    Args:
        ranks: channels of each owner.
    """
    low = int(bits)
    counts = []
    for rank in ranks:
        leading = math.ceil(round((bits - low) * rank, 9))
        both = {low + 1: leading, low: rank - leading}
        counts.append({width: count for width, count in both.items() if count})
    return stored_order(counts)


def _codec(side: str, bits: torch.Tensor) -> Codec:
    """The quantiser of latents of unit variance."""
    step = torch.tensor([GAUSSIAN_STEPS[width] for width in bits.tolist()])
    layout = layout_of(side, bits, torch.zeros_like(bits), "static")
    return make_codec(layout, step, torch.ones_like(step), "star")


def scaled(codec: Codec, factor: torch.Tensor | float) -> Codec:
    """The quantiser of latents ``factor`` times as large: float32 ``[R]``, or one for all."""
    return replace(codec, step=codec.step * factor, weight=codec.weight / factor)


def for_random(codes: LayerCodes, value_scale: float = 1.0) -> LayerCodes:
    """The same with steps under which codes drawn at random have unit variance.

    Args:
        value_scale: deviation of the values.
    """

    def levelled(codec: Codec, scale: float) -> Codec:
        # Of whole numbers from 0 to 2^b - 1, each as likely.
        spread = ((4.0 ** codec.layout.bits(codec.step.device).float() - 1) / 12).sqrt()
        return scaled(codec, scale / (codec.step * spread))

    return replace(
        codes, keys=levelled(codes.keys, 1.0), values=levelled(codes.values, value_scale)
    )


def run_codes(run_dir: Path) -> CodedShape | None:
    """The codes that a quantised run has; None where it has none. UserError if damaged."""
    if not is_quantised(read_manifest(run_dir)):
        return None
    layers = run_layers(run_dir)
    ranks = quantised_ranks(layers, len(read_ranks(run_dir).layers))
    codes = {i: layer.codes for i, layer in layers.items()}
    return CodedShape(ranks, codes, {i: x.keys.owner for i, x in layers.items()}, own=True)


def run_layers(run_dir: Path) -> dict[int, QuantLayer]:
    """The layers of a quantised run."""
    manifest = read_manifest(run_dir)
    return read_quantisation(run_dir, manifest, manifest["files"][FACTORS])[0]


def coded_weights(
    weights: LatentWeights, ranks: LayerRanks, codes: LayerCodes, owner: torch.Tensor
) -> LatentWeights:
    """A layer of 16-bit latents with the channels of its keys in stored order, and coded.

    Args:
        ranks: of the layer.
        codes, owner: of :func:`coded_shape`; steps become those of what inputs of unit variance
            give (of keys under a norm they stay).
    """
    order = torch.empty(len(owner), dtype=torch.long)
    start = 0
    for group, rank in enumerate(ranks.keys):
        order[owner == group] = torch.arange(start, start + rank)
        start += rank
    place = order.argsort().to(weights.key_index.device)
    order = order.to(weights.key_down.device)
    codes = codes.to(order.device)
    keys = codes.keys
    if weights.key_eps is None:
        keys = scaled(keys, _norms(weights.key_down[order]))
    return replace(
        weights,
        key_down=weights.key_down[order],
        key_index=place[weights.key_index],  # padding stays 0: channel 0 comes first
        codes=replace(codes, keys=keys, values=scaled(codes.values, _norms(weights.value_down))),
    )


def _norms(down: torch.Tensor) -> torch.Tensor:
    """Float32 ``[R]``: the length of every row."""
    return down.float().norm(dim=-1).clamp_min(torch.finfo(torch.float16).tiny)
