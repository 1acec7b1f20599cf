"""What errors of codes cost: measured for every channel, weighed for every layer.

In the basis of :mod:`starkv_core.quant.basis` errors of a side's channels add up with weight 1.
What a unit of them does to the output differs from side to side, and is measured: the KL to the
model without codes while the keys, or the values, of one layer alone are coded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from starkv_core.attention import LatentWeights
from starkv_core.calibrate.distill import distillation_loss
from starkv_core.progress import SILENT, Progress
from starkv_core.quant.basis import Side
from starkv_core.quant.layer import CodedSide, QuantLayer, code_side
from starkv_core.quant.scheme import Scheme
from starkv_core.quant.steps import best_steps
from starkv_core.surgery import WeightsOf, compressed
from triton_ops.latent_codes import Codec

if TYPE_CHECKING:
    from starkv_core.run import Subject

_PROBE_BITS = 3  # fine enough for the KL to grow as the errors do, coarse enough to stand out
Pair = tuple[torch.Tensor, torch.Tensor]


def coding_costs(
    side: Side, widths: Sequence[int], device: torch.device | None = None
) -> dict[int, torch.Tensor]:
    """Cost of every channel's errors by bits, 0 for a dropped one; float64 ``[R]`` each.

    Args:
        device: to search for steps on; None is where the side lies.
    """
    energy = side.rows.double().square().mean(0).clamp_min(1e-24)
    share = {bits: best_steps(side.rows, bits, device)[1] / energy for bits in widths}
    return {0: side.worth, **{bits: side.worth * part for bits, part in share.items()}}


def seen(codec: Codec, x: torch.Tensor, sinks: int, store: torch.dtype) -> torch.Tensor:
    """Latents ``[B, L, R]`` of whole rows as they read once coded; the first ``sinks`` are not."""
    coded = codec.seen(x.to(store)).to(x.dtype)
    return torch.cat((x[:, :sinks], coded[:, sinks:]), dim=1)


@torch.no_grad()
def sensitivities(
    subject: Subject,
    sides: Mapping[int, tuple[Side, Side]],
    scheme: Scheme,
    rows: torch.Tensor,
    progress: Progress = SILENT,
) -> dict[int, tuple[float, float]]:
    """Weight of a unit of cost, for keys and values of every layer.

    The geometric mean of the KL per unit of cost and of what makes all sides' latents equally
    dear, as in the allocation of ranks: a probe on plain text is blind to uses that are rare in it
    (docs/design.md section 5).

    Args:
        subject: with latents in 16 bits.
        sides: in the basis that they are to be coded in.
        rows: int64 ``[N, L]``.
    """
    dtype, store = subject.base.dtype, subject.store_dtype

    def probed(side: Side, name: str) -> CodedSide:
        bits = torch.full((side.channels,), _PROBE_BITS)
        return code_side(side, name, bits, scheme, dtype, subject.device)

    plain: dict[int, LatentWeights] = {}
    for i, (keys, values) in sides.items():
        layer = QuantLayer(
            probed(keys, "key"),
            probed(values, "value"),
            subject.spec.n_kv_heads,
            subject.weights[i].key_eps,
            scheme,
        )
        plain[i] = layer.weights(dtype, subject.weights[i].key_down.device)
    rows = rows.to(subject.device)
    head = subject.model.get_output_embeddings().weight

    def states(weights: Mapping[int, LatentWeights]) -> list[torch.Tensor]:
        with compressed(subject.base, {i: _always(w) for i, w in weights.items()}) as model:
            return [model.model(row[None], use_cache=False)[0] for row in rows]

    exact = states(plain)
    found: dict[int, tuple[float, float]] = {}
    with progress.task("sensitivity", 2 * len(sides), "probes") as task:
        for i, pair in sides.items():
            weighed = []
            for number, side in enumerate(pair):
                coded = replace(plain[i], coding=_one_side(plain[i], number, scheme.sinks, store))
                kl = sum(
                    float(distillation_loss(a, b, head))
                    for a, b in zip(states({**plain, i: coded}), exact, strict=True)
                ) / len(rows)
                cost = float(coding_costs(side, [_PROBE_BITS], subject.device)[_PROBE_BITS].sum())
                weighed.append((max(kl, 1e-9) / cost / float(side.worth.sum())) ** 0.5)
                task.advance()
            found[i] = (weighed[0], weighed[1])
    return found


def _one_side(
    weights: LatentWeights, number: int, sinks: int, store: torch.dtype
) -> Callable[[torch.Tensor, torch.Tensor], Pair]:
    """Codes the keys (0) or the values (1) alone."""
    codes = weights.codes
    assert codes is not None

    def coding(keys: torch.Tensor, values: torch.Tensor) -> Pair:
        if number == 0:
            return seen(codes.keys, keys, sinks, store), values
        return keys, seen(codes.values, values, sinks, store)

    return coding


def _always(weights: LatentWeights) -> WeightsOf:
    return lambda: weights
