"""Bytes of a cache: predicted here, measured in :mod:`starkv_core.cache`; a test holds them equal.

Everything stored counts (docs/design.md section 4): latents or their codes and scales, padding,
slots allocated ahead, sinks and recent windows, layers left dense, sliding windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from starkv_core.errors import UserError
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import RankMap
from triton_ops.latent_attention import row_width
from triton_ops.latent_codes import CodeLayout, LayerCodes, tiles

BYTES_PER_NUMBER = 2  # latents and dense layers alike are stored in 16 bits
ROW_STEP = row_width(1)  # numbers by which a row of latents grows
GROWTH = 256  # slots by which a cache layer grows; those not yet filled count as stored


def slots(tokens: int) -> int:
    """Slots a growing cache layer holds for ``tokens`` tokens."""
    return -(-tokens // GROWTH) * GROWTH


def numbers_per_token(spec: ModelSpec, ranks: RankMap) -> int:
    """Numbers stored per token over ALL layers, padding of rows included."""
    dense = 2 * spec.kv_width
    return sum(dense if layer is None else layer.stored for layer in ranks.layers)


def bytes_per_token(spec: ModelSpec, ranks: RankMap) -> int:
    """Bytes stored per token over all layers, a sliding window counted as of full length."""
    return numbers_per_token(spec, ranks) * BYTES_PER_NUMBER


def packed_bytes(
    keys: CodeLayout,
    values: CodeLayout,
    sinks: int,
    window: int,
    tokens: int,
    *,
    itemsize: int = BYTES_PER_NUMBER,
) -> int:
    """Bytes that the packed cache of one layer holds for a row of ``tokens`` tokens.

    Args:
        keys, values: layouts of the codes.
        sinks, window: tokens that stay exact; both are held in full from the first token on.
        itemsize: bytes per number of theirs.
    """
    a_tile = sum(side.tile_bytes + side.scale_bytes for side in (keys, values))
    exact = sum(row_width(side.channels) for side in (keys, values)) * itemsize
    return tiles(tokens) * a_tile + (sinks + window) * exact


def predict_bytes(
    spec: ModelSpec,
    ranks: RankMap,
    tokens: int,
    batch: int = 1,
    *,
    itemsize: int = BYTES_PER_NUMBER,
    codes: Mapping[int, LayerCodes] | None = None,
) -> int:
    """Bytes that a cache of ``tokens`` tokens a row holds, allocated slots included.

    Args:
        itemsize: bytes per stored number that is not a code or a scale.
        codes: how the latents of which layers are coded.
    """
    total = packed = 0
    for i, layer in enumerate(ranks.layers):
        if codes is not None and i in codes:
            c = codes[i]
            packed += packed_bytes(
                c.keys.layout, c.values.layout, c.sinks, c.window, tokens, itemsize=itemsize
            )
        elif layer is not None:
            total += layer.stored * slots(tokens)
        elif i in spec.windows:
            total += 2 * spec.kv_width * min(tokens, spec.windows[i] - 1)
        else:
            total += 2 * spec.kv_width * slots(tokens)
    return (total * itemsize + packed) * batch


def cache_ratio(spec: ModelSpec, ranks: RankMap) -> float:
    """Dense bytes over stored bytes per token, all layers counted."""
    return spec.dense_bytes_per_token / bytes_per_token(spec, ranks)


def paper_rate(
    spec: ModelSpec, ranks: RankMap, codes: Mapping[int, LayerCodes] | None = None
) -> float:
    """The paper's rate: share of bits removed in the compressed layers alone.

    Neither padding, scales, sinks nor windows are counted; a dense number has 16 bits.

    Args:
        codes: how the latents of which layers are coded; the rest have 16 bits.
    """
    coded, kept, layers = codes or {}, 0.0, 0
    for i, layer in enumerate(ranks.layers):
        if layer is not None:
            layers += 1
            kept += layer.total if i not in coded else _code_bits(coded[i]) / 16
    return 1.0 - kept / (layers * 2 * spec.kv_width) if layers else 0.0


def _code_bits(codes: LayerCodes) -> int:
    """Bits of a token's codes, keys and values."""
    return sum(int(side.layout.bits().sum()) for side in (codes.keys, codes.values))


def mean_bits(codes: Mapping[int, LayerCodes]) -> tuple[float, float]:
    """Mean bits of a channel of keys and of values over all coded layers, codes alone."""
    keys, values = (
        torch.cat([getattr(c, side).layout.bits() for c in codes.values()])
        for side in ("keys", "values")
    )
    return float(keys.double().mean()), float(values.double().mean())


@dataclass(frozen=True)
class Budget:
    """A limit on stored numbers per token over the compressed layers.

    Attributes:
        numbers: most numbers per token that the compressed layers may store together, padding of
            rows included; whole row steps.
        compressed: indices of the layers that share them.
    """

    numbers: int
    compressed: tuple[int, ...]


def resolve_budget(
    spec: ModelSpec,
    *,
    ratio: float | None = None,
    bytes_limit: float | None = None,
    fit: tuple[int, int] | None = None,
    fit_batch: int = 1,
    skip_layers: tuple[int, ...] = (),
    blocks: tuple[int, int] | None = None,
) -> Budget:
    """Turn a user's budget into numbers per token for the compressed layers.

    Args:
        ratio: whole-cache ratio to the dense 16-bit cache.
        bytes_limit: bytes per token over all layers.
        fit: ``(tokens, bytes)``: this context in this much memory, for ``fit_batch`` rows.
        skip_layers: layers to leave dense, negative ones counted from the end.
        blocks: factorisations of a layer's keys and of its values; None is one per key head and
            one for all values.

    Raises:
        UserError: the budget cannot be met, with the floor, or does not shrink anything.
    """
    skipped = set()
    for index in skip_layers:
        if not -spec.n_layers <= index < spec.n_layers:
            raise UserError(
                f"start.skip_layers: layer {index} does not exist (the model has {spec.n_layers})"
            )
        skipped.add(index % spec.n_layers)
    compressed = tuple(
        i for i in range(spec.n_layers) if i not in skipped and i not in spec.dense_reasons
    )
    if not compressed:
        reasons = "; ".join(sorted(set(spec.dense_reasons.values()))) or "all layers are skipped"
        raise UserError(f"no layer is left to compress: {reasons}")

    dense = spec.dense_bytes_per_token
    if ratio is not None:
        limit, asked = dense / ratio, f"ratio {ratio:g}"
    elif bytes_limit is not None:
        limit, asked = float(bytes_limit), f"{bytes_limit:g} bytes per token"
    elif fit is not None:
        tokens, memory = fit
        # Windows hold fewer slots than the full length at which they are counted per token.
        spared = sum(
            2 * spec.kv_width * (slots(tokens) - min(tokens, window - 1))
            for window in spec.windows.values()
        )
        limit = (memory / fit_batch + spared * BYTES_PER_NUMBER) / slots(tokens)
        asked = f"{tokens} tokens x {fit_batch} in {memory / 2**20:.4g} MiB"
    else:
        raise UserError("budget: give one of ratio, bytes_per_token, fit")

    kept_dense = (spec.n_layers - len(compressed)) * 2 * spec.kv_width
    numbers = int(limit / BYTES_PER_NUMBER + 1e-9) - kept_dense
    if numbers >= len(compressed) * 2 * spec.kv_width:
        raise UserError(
            f"budget: {asked} shrinks nothing: the dense cache takes {dense} bytes per token; "
            "lower the budget"
        )
    floor = len(compressed) * sum(map(row_width, blocks or (spec.n_kv_heads, 1)))
    if numbers < floor:
        least = (floor + kept_dense) * BYTES_PER_NUMBER
        left = spec.n_layers - len(compressed)
        staying = f", {left} layer{' stays' if left == 1 else 's stay'} dense" if left else ""
        raise UserError(
            f"budget: {asked} is below the floor: every factorisation keeps a rank of 1, "
            f"rows are padded to {ROW_STEP * BYTES_PER_NUMBER} bytes{staying}, which takes {least} "
            f"bytes per token (ratio {dense / least:.2f}); raise the budget"
        )
    return Budget(numbers // ROW_STEP * ROW_STEP, compressed)
