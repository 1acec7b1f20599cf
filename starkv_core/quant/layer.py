"""A quantised layer: folded factors in stored order and the quantisers of its keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional as F

from starkv_core.attention import LatentWeights
from starkv_core.factors import per_head
from starkv_core.quant.basis import Side
from starkv_core.quant.scheme import Scheme
from starkv_core.quant.steps import best_steps
from starkv_core.rank_map import LayerRanks
from triton_ops.latent_codes import Codec, CodeLayout, LayerCodes, Section


@dataclass(frozen=True, eq=False)
class CodedSide:
    """Keys or values of a layer, channels in stored order: sections of equal bits, owners in order.

    Attributes:
        down: ``[R, d]``, in the dtype of the model.
        up: ``[n, R]``, likewise; n = D times the heads that share a channel (for values all).
        bias: float32 ``[H_kv, D]`` or None.
        shift: float32 ``[R]``, taken off the latents, or None.
        owner: int64 ``[R]``, the factorisation (group of heads) of each channel.
        codec: of the latents.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    shift: torch.Tensor | None
    owner: torch.Tensor
    codec: Codec

    @property
    def counts(self) -> list[dict[int, int]]:
        """Channels of every owner by bits: with them the stored order is known."""
        bits = self.codec.layout.bits()
        found: list[dict[int, int]] = [{} for _ in range(int(self.owner.max()) + 1)]
        for owner, width in zip(self.owner.tolist(), bits.tolist(), strict=True):
            found[owner][width] = found[owner].get(width, 0) + 1
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors to save, by name."""
        found = {
            "down": self.down,
            "up": self.up,
            "bias": self.bias,
            "shift": self.shift,
            "step": self.codec.step,
            "weight": self.codec.weight,
        }
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in found.items()
            if tensor is not None
        }


@dataclass(frozen=True, eq=False)
class QuantLayer:
    """One layer as a quantised run deploys it.

    Attributes:
        keys, values: its sides.
        heads: H_kv.
        key_eps: epsilon of a norm on keys, or None.
        scheme: how it is coded.
    """

    keys: CodedSide
    values: CodedSide
    heads: int
    key_eps: float | None
    scheme: Scheme

    @property
    def ranks(self) -> LayerRanks:
        """Channels that are left."""
        keys = tuple(sum(counts.values()) for counts in self.keys.counts)
        return LayerRanks(keys, (self.values.codec.layout.channels,))

    @property
    def codes(self) -> LayerCodes:
        """How its cache is coded."""
        s = self.scheme
        return LayerCodes(self.keys.codec, self.values.codec, s.sinks, s.window, s.prefill)

    def weights(self, dtype: torch.dtype, device: Any = None) -> LatentWeights:
        """What attention reads, in its dtype and on its device."""

        def to(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        index, real = (t.to(self.keys.up.device) for t in self._key_index())
        return LatentWeights(
            key_down=to(self.keys.down),
            key_index=index.to(device=device),
            key_up=to(per_head(self.keys.up, index, real, len(self.keys.counts))),
            key_bias=to(self.keys.bias),
            value_down=to(self.values.down),
            value_up=to(self.values.up.unflatten(0, (self.heads, -1))),
            value_bias=to(self.values.bias),
            key_eps=self.key_eps,
            key_shift=to(self.keys.shift),
            value_shift=to(self.values.shift),
            codes=self.codes.to(device),
        )

    def _key_index(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Channels ``[H, r]`` of each head, padded with 0, and the bool mask of real ones."""
        owners = len(self.keys.counts)
        own = [(self.keys.owner == g).nonzero()[:, 0] for g in range(owners)]
        widest = max(map(len, own))
        index = torch.stack([F.pad(channels, (0, widest - len(channels))) for channels in own])
        real = torch.arange(widest) < torch.tensor([[len(channels)] for channels in own])
        members = self.heads // owners
        return index.repeat_interleave(members, 0), real.repeat_interleave(members, 0)


def code_side(
    side: Side,
    name: str,
    bits: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> CodedSide:
    """Put a side into stored order and give it its quantiser.

    Args:
        side: in the basis it is coded in.
        name: ``key`` or ``value``.
        bits: int64 ``[R]``; channels of 0 bits are dropped.
        scheme: of the quantiser.
        dtype: that factors will have.
        device: to search for steps on; None is where the side lies.
    """
    owners = side.owner if name == "key" else torch.zeros_like(side.owner)
    span = int(owners.max()) + 1
    order = ((8 - bits) * span + owners).argsort(stable=True)
    order = order[bits[order] > 0]
    side, bits, owners = side.picked(order).shift_in(dtype), bits[order], owners[order]
    layout = layout_of(name, bits, owners, scheme.scales)
    if scheme.name == "paper":
        step, weight = torch.ones(len(bits)), 1.0 / (2.0 ** (bits - 1) - 1.0)
    else:
        step, weight = _fitted(side.rows, bits, layout.groups, device)
    codec = make_codec(layout, step.float(), weight.float(), scheme.name)
    return CodedSide(
        side.down.to(dtype),
        _columns(side.up, owners, span).to(dtype),
        None if side.bias is None else side.bias.float(),
        None if side.shift is None else side.shift.float(),
        owners,
        codec,
    )


def scale_groups(bits: torch.Tensor, owners: torch.Tensor, scales: str) -> tuple[int, ...]:
    """Channels that share a scale, in stored order; none where scales are static."""
    if scales == "static":
        return ()
    if scales == "row":
        return (len(bits),)
    pairs = zip(bits.tolist(), owners.tolist(), strict=True)
    return tuple(len(list(run)) for _, run in groupby(pairs))


def _fitted(
    rows: torch.Tensor, bits: torch.Tensor, groups: Sequence[int], device: torch.device | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and weights of least error on a sample of latents."""
    weight = 1.0 / rows.double().square().mean(0).sqrt().clamp_min(1e-12)
    scaled = rows / token_scales(rows, weight, groups)
    step = torch.zeros(len(bits), dtype=torch.float64)
    for width in sorted(set(bits.tolist())):
        mine = bits == width
        step[mine] = best_steps(scaled[:, mine], width, device)[0]
    return step, weight


def token_scales(
    rows: torch.Tensor, weight: torch.Tensor, groups: Sequence[int]
) -> torch.Tensor | float:
    """Scale of every token and channel, ``[N, R]``; 1 where scales are static."""
    if not groups:
        return 1.0
    parts = (rows * weight).float().split(list(groups), -1)
    each = [p.square().mean(-1, keepdim=True).sqrt().expand_as(p) for p in parts]
    return torch.cat(each, -1).clamp_min(1e-12)


def _columns(up: torch.Tensor, owners: torch.Tensor, groups: int) -> torch.Tensor:
    """``[H, D, R]``, zero where a channel is not of the head, as ``[n, R]`` of its heads alone."""
    lanes = up.unflatten(0, (groups, -1)).flatten(1, 2)
    return lanes[owners, :, torch.arange(len(owners))].T


def stored_order(counts: Sequence[Mapping[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Owner and bits, int64 ``[R]``, of every channel in stored order; ``counts`` of CodedSide."""
    widths = sorted({width for one in counts for width in one}, reverse=True)
    runs = [(w, g, one[w]) for w in widths for g, one in enumerate(counts) if w in one]
    each = torch.tensor([count for _, _, count in runs])
    owner = torch.tensor([g for _, g, _ in runs]).repeat_interleave(each)
    bits = torch.tensor([w for w, _, _ in runs]).repeat_interleave(each)
    return owner, bits


def layout_of(side: str, bits: torch.Tensor, owner: torch.Tensor, scales: str) -> CodeLayout:
    """Layout of channels in stored order."""
    sections = tuple(Section(b, len(list(run))) for b, run in groupby(bits.tolist()))
    return CodeLayout(side, sections, scale_groups(bits, owner, scales))  # type: ignore[arg-type]


def make_codec(layout: CodeLayout, step: torch.Tensor, weight: torch.Tensor, name: str) -> Codec:
    """The quantiser of a scheme from its static part."""
    if name == "paper":
        return Codec(layout, step, weight, "absmax", "tread")
    return Codec(layout, step, weight, "rms", "rise")
