"""Factors: the trained form of a compressed layer, and the folded form that is deployed.

Trained form (``U diag(Th(sigma; alpha)) V`` with spare components) and folded form come from one
piece of code, :meth:`TrainedLayer._factored`, so that what was trained is what is deployed
(docs/design.md, traps 3 to 5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from starkv_core.attention import LatentWeights, padded_index
from starkv_core.decompose import Decomposition
from starkv_core.errors import UserError
from starkv_core.gate import excess, gate, openness, threshold_for_rank
from starkv_core.models.load import LoadedModel
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import LayerRanks

Shift = torch.Tensor | float
_APART = 1e-5  # least relative distance of the last component kept from the first dropped


@dataclass(frozen=True)
class GateSettings:
    """Slope and units of the soft threshold (see :mod:`starkv_core.gate`)."""

    slope: float
    log_units: bool


class TrainedFactors(nn.Module):
    """Gated factors of one projection (keys or values): one block per group of heads.

    Parameters are float32 masters: ``up [n, N]`` and ``down [N, d]`` hold the components of all
    blocks side by side, ``counts`` of each, with ``n`` = D times the heads of a group;
    ``alpha [blocks]``. ``bias [H_kv * D]`` is that of the projection plus what cut-off components
    owed to the mean input. ``mean_response [N]`` is what each component answers to the mean input:
    the part that closed gates hold back goes into the bias, so that the mean's error is zero at any
    rank. ``order`` int64 ``[heads]`` lists the heads block by block; None is their own order.

    Args:
        counts: components of each block.
        heads: key/value heads in all.
        rows: n.
        width: d.
        bias: whether there is a bias.
        centred: whether there is a mean response.
        ordered: whether there is an order.
    """

    def __init__(
        self,
        counts: tuple[int, ...],
        heads: int,
        rows: int,
        width: int,
        bias: bool,
        centred: bool,
        ordered: bool = False,
    ) -> None:
        super().__init__()
        total = sum(counts)
        self.counts, self.heads = counts, heads
        self.head_dim = rows * len(counts) // heads
        self.up = nn.Parameter(torch.zeros(rows, total))
        self.down = nn.Parameter(torch.zeros(total, width))
        self.alpha = nn.Parameter(torch.zeros(len(counts)))
        self.bias = nn.Parameter(torch.zeros(heads * self.head_dim)) if bias else None
        self.sigma: torch.Tensor
        self.owner: torch.Tensor
        self.mean_response: torch.Tensor | None
        self.register_buffer("sigma", torch.zeros(total))
        self.register_buffer("mean_response", torch.zeros(total) if centred else None)
        self.order: torch.Tensor | None
        self.register_buffer("order", torch.arange(heads) if ordered else None)
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.register_buffer("owner", owner, persistent=False)

    @staticmethod
    def start(
        blocks: list[Decomposition],
        counts: tuple[int, ...],
        heads: int,
        bias: torch.Tensor | None,
        mean: torch.Tensor | None,
        order: tuple[int, ...] | None = None,
    ) -> TrainedFactors:
        """Factors as decomposed, cut to ``counts`` components a block.

        Args:
            blocks: one decomposition per group of heads.
            counts: components to keep of each.
            heads: key/value heads in all.
            bias: ``[heads * D]`` of the projection, or None.
            mean: ``[d]`` input whose error is to be zero, or None.
            order: heads block by block; None is their own order.
        """
        rows, width = blocks[0].up.shape[0], blocks[0].down.shape[1]
        made = TrainedFactors(
            counts,
            heads,
            rows,
            width,
            bias is not None or mean is not None,
            mean is not None,
            order is not None,
        )
        if made.order is not None:
            made.order.copy_(torch.tensor(order))
        kept = [b.truncated(n) for b, n in zip(blocks, counts, strict=True)]
        with torch.no_grad():
            made.up.copy_(torch.cat([b.up for b in kept], 1))
            made.down.copy_(torch.cat([b.down for b in kept], 0))
            made.sigma.copy_(torch.cat([b.sigma for b in kept]))
            if made.bias is not None and bias is not None:
                made.bias.copy_(bias)
            if made.bias is not None and made.mean_response is not None and mean is not None:
                responses = [b.down @ mean.to(b.down) for b in blocks]
                made.mean_response.copy_(
                    torch.cat([r[:n] for r, n in zip(responses, counts, strict=True)])
                )
                owed = [
                    (b.up[:, n:] * b.sigma[n:]) @ r[n:]
                    for b, r, n in zip(blocks, responses, counts, strict=True)
                ]
                made.bias.add_(made._by_head(torch.cat(owed)).flatten().to(made.bias))
        return made

    @property
    def blocks(self) -> int:
        """Groups of heads."""
        return len(self.counts)

    def levels(self, settings: GateSettings) -> list[torch.Tensor]:
        """How far each component lies above its threshold, in the gate's units, block by block."""
        alpha = self.alpha.detach()[self.owner]
        return list(excess(self.sigma, alpha, log_units=settings.log_units).split(self.counts))

    def gates(self, settings: GateSettings, shift: Shift = 0.0) -> torch.Tensor:
        """``Th(sigma; alpha + shift)`` of every component, ``[N]``."""
        return gate(
            self.sigma,
            (self.alpha + shift)[self.owner],
            settings.slope,
            log_units=settings.log_units,
        )

    def soft_rank(self, settings: GateSettings, shift: Shift = 0.0) -> torch.Tensor:
        """Sum of the gates' openness, a differentiable rank, over all blocks."""
        return openness(
            self.sigma,
            (self.alpha + shift)[self.owner],
            settings.slope,
            log_units=settings.log_units,
        ).sum()

    def ranks(self, settings: GateSettings, shift: float = 0.0) -> tuple[int, ...]:
        """Components that pass the gate, per block."""
        opened = (self.gates(settings, shift) > 0).cpu().split(self.counts)
        return tuple(int(block.sum()) for block in opened)

    @torch.no_grad()
    def set_ranks(self, ranks: tuple[int, ...], settings: GateSettings) -> None:
        """Move the thresholds of those blocks whose rank is not yet the given one.

        Raises:
            UserError: a rank above the stored components, or above the rank of the weights.
        """
        sigmas = self.sigma.split(self.counts)
        for i, (now, wanted) in enumerate(zip(self.ranks(settings), ranks, strict=True)):
            if wanted > self.counts[i]:
                raise UserError(
                    f"rank {wanted} is asked for, but only {self.counts[i]} components were kept "
                    "in training (start.slack); lower the rank or calibrate with more slack"
                )
            if now != wanted:
                # Values that float32 cannot hold apart would leave or stay together.
                sigmas[i][wanted:].clamp_(max=float(sigmas[i][wanted - 1]) * (1 - _APART))
                self.alpha[i] = threshold_for_rank(sigmas[i], wanted, log_units=settings.log_units)
        if self.ranks(settings) != tuple(ranks):
            raise UserError(
                f"ranks {ranks} cannot be reached: the weights have rank {self.ranks(settings)}"
            )

    def live_bias(self, gates: torch.Tensor) -> torch.Tensor | None:
        """``[heads, D]``: the bias plus what closed or part-closed components owe to the mean."""
        if self.bias is None:
            return None
        bias: torch.Tensor = self.bias
        if self.mean_response is not None:
            owed = self.up * ((self.sigma - gates) * self.mean_response)
            owed = torch.cat([part.sum(1) for part in owed.split(self.counts, 1)])
            bias = bias + self._by_head(owed).flatten()
        return bias.view(self.heads, self.head_dim)

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``[heads * D]`` that lie block by block as ``[heads, D]``, in the heads' order."""
        return in_head_order(rows.view(self.heads, self.head_dim), self.order)


class TrainedLayer(nn.Module):
    """Keys and values of one layer in trained form.

    Args:
        keys, values: gated factors.
        key_norm: weight ``[D]`` and epsilon of the norm on keys, or None.
    """

    def __init__(
        self,
        keys: TrainedFactors,
        values: TrainedFactors,
        key_norm: tuple[torch.Tensor, float] | None = None,
    ) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.key_eps = None if key_norm is None else key_norm[1]
        self.key_norm: torch.Tensor | None
        self.register_buffer(
            "key_norm", None if key_norm is None else key_norm[0].detach().float(), persistent=False
        )

    def ranks(self, settings: GateSettings, shift: float = 0.0) -> LayerRanks:
        """Ranks that the gates give now, thresholds shifted."""
        return LayerRanks(self.keys.ranks(settings, shift), self.values.ranks(settings, shift))

    def set_ranks(self, ranks: LayerRanks, settings: GateSettings) -> None:
        """Move thresholds so that the gates give ``ranks``."""
        self.keys.set_ranks(ranks.keys, settings)
        self.values.set_ranks(ranks.values, settings)

    def weights(
        self, settings: GateSettings, dtype: torch.dtype, shift: Shift = 0.0
    ) -> LatentWeights:
        """Live weights for training, differentiable; closed components stay as zero channels."""
        gates_k, gates_v = self.keys.gates(settings, shift), self.values.gates(settings, shift)
        return self._factored(
            LayerRanks(self.keys.counts, self.values.counts), gates_k, gates_v, None, None
        ).weights(dtype)

    @torch.no_grad()
    def fold(self, settings: GateSettings) -> FoldedLayer:
        """Deployed form: only components that pass the gate; orthonormal ``U_h`` under QK-norm."""
        gates_k, gates_v = self.keys.gates(settings), self.values.gates(settings)
        kept_k, kept_v = gates_k.nonzero()[:, 0], gates_v.nonzero()[:, 0]
        folded = self._factored(self.ranks(settings), gates_k, gates_v, kept_k, kept_v)
        return folded if self.key_norm is None else _orthonormal(folded)

    def _factored(
        self,
        ranks: LayerRanks,
        gates_k: torch.Tensor,
        gates_v: torch.Tensor,
        kept_k: torch.Tensor | None,
        kept_v: torch.Tensor | None,
    ) -> FoldedLayer:
        def kept(tensor: torch.Tensor, index: torch.Tensor | None, dim: int) -> torch.Tensor:
            return tensor if index is None else tensor.index_select(dim, index)

        keys, values = self.keys, self.values
        return FoldedLayer(
            ranks=ranks,
            key_up=kept(keys.up, kept_k, 1),
            key_down=kept(gates_k[:, None] * keys.down, kept_k, 0),
            key_bias=keys.live_bias(gates_k),
            value_up=kept(values.up, kept_v, 1),
            value_down=kept(gates_v[:, None] * values.down, kept_v, 0),
            value_bias=values.live_bias(gates_v),
            heads=keys.heads,
            key_eps=self.key_eps,
            key_norm=self.key_norm,
            # Apart from the trained form's: a file holds both.
            key_order=None if keys.order is None else keys.order.clone(),
        )


@dataclass(frozen=True)
class FoldedLayer:
    """Factors of one layer with the gates folded in; columns of all groups side by side.

    Attributes:
        ranks: ranks of the layer.
        key_up: ``[n, R]``, ``n`` = D times the heads of a group.
        key_down: ``[R, d]``.
        key_bias: ``[H_kv, D]`` or None.
        value_up, value_down, value_bias: the same for values.
        heads: H_kv.
        key_eps: epsilon of the norm on keys, or None.
        key_norm: ``[D]``, weight of that norm if it is not yet folded into ``key_up``.
        key_order: int64 ``[H_kv]``, key heads group by group; None is their own order.
    """

    ranks: LayerRanks
    key_up: torch.Tensor
    key_down: torch.Tensor
    key_bias: torch.Tensor | None
    value_up: torch.Tensor
    value_down: torch.Tensor
    value_bias: torch.Tensor | None
    heads: int
    key_eps: float | None = None
    key_norm: torch.Tensor | None = None
    key_order: torch.Tensor | None = None

    def weights(self, dtype: torch.dtype, device: Any = None) -> LatentWeights:
        """What attention reads, in its dtype and on its device."""
        index, real = padded_index(self.ranks.keys, self.heads, self.key_up.device)
        key_up = per_head(self.key_up, index, real, len(self.ranks.keys))
        key_up, key_index = (in_head_order(t, self.key_order) for t in (key_up, index))
        gram = None
        if self.key_norm is not None:
            gram = key_up.transpose(1, 2) @ key_up
            key_up = self.key_norm[:, None] * key_up

        def to(tensor: torch.Tensor | None, as_dtype: torch.dtype = dtype) -> Any:
            return None if tensor is None else tensor.to(device=device, dtype=as_dtype)

        return LatentWeights(
            key_down=to(self.key_down),
            key_index=to(key_index, torch.int64),
            key_up=to(key_up),
            key_bias=to(self.key_bias),
            value_down=to(self.value_down),
            value_up=to(_block_sparse(self.value_up, self.ranks.values, self.heads)),
            value_bias=to(self.value_bias),
            key_eps=self.key_eps,
            key_gram=to(gram, torch.float32),
        )

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors to save, by field name."""
        found = {name: getattr(self, name) for name in FOLDED_TENSORS}
        return {
            name: tensor.detach()
            .to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            .contiguous()
            for name, tensor in found.items()
            if tensor is not None
        }


FOLDED_TENSORS = (
    "key_up", "key_down", "key_bias", "value_up", "value_down", "value_bias", "key_order",
)  # fmt: skip


def in_head_order(blocks: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """``[H, ...]`` that lies in ``order`` (None: the heads' own) in the heads' own order."""
    return blocks if order is None else blocks[order.argsort()]


def per_head(
    up: torch.Tensor, index: torch.Tensor, real: torch.Tensor, owners: int
) -> torch.Tensor:
    """``up [n, R]`` of keys as ``U_h [H, D, r]``, 0 where padded; differentiable.

    Args:
        index: int64 ``[H, r]``, channels of each head.
        real: bool ``[H, r]``, False where padded.
        owners: factorisations, each of as many heads in a row.
    """
    heads = len(index)
    members = heads // owners
    lanes = up.unflatten(0, (members, -1))  # [heads of a group, D, R]
    member = torch.arange(heads, device=up.device) % members
    return lanes[member[:, None], :, index].transpose(1, 2) * real[:, None, :]


def _block_sparse(columns: torch.Tensor, ranks: tuple[int, ...], heads: int) -> torch.Tensor:
    """``up [n, R]`` as ``[H, D, R]``: zero where a channel belongs to another group's heads."""
    groups = len(ranks)
    lanes = columns.unflatten(0, (heads // groups, -1))
    if groups == 1:
        return lanes
    owner = torch.repeat_interleave(torch.arange(groups), torch.tensor(ranks)).to(columns.device)
    mine = owner[None, :] == torch.arange(groups, device=columns.device)[:, None]
    return (lanes[None] * mine[:, None, None, :]).flatten(0, 1)


def _orthonormal(layer: FoldedLayer) -> FoldedLayer:
    """Give ``U_h`` orthonormal columns by a QR and fold the norm's weight into it (QK-norm)."""
    if layer.key_norm is None:
        raise ValueError("only layers with a norm on keys need orthonormal factors")
    up, down = [], []
    for u, v in zip(
        layer.key_up.split(layer.ranks.keys, 1), layer.key_down.split(layer.ranks.keys), strict=True
    ):
        q, r = torch.linalg.qr(u.double())
        up.append((layer.key_norm[:, None] * q).float())
        down.append((r @ v.double()).float())
    return replace(layer, key_up=torch.cat(up, 1), key_down=torch.cat(down), key_norm=None)


def layer_tensors(layers: Mapping[int, TrainedLayer]) -> dict[str, torch.Tensor]:
    """Tensors of the trained form, ``layers.I.keys.up`` and so on."""
    return {
        f"layers.{i}.{name}": tensor.detach().cpu()
        for i, layer in layers.items()
        for name, tensor in layer.state_dict().items()
    }


def layer_counts(layers: Mapping[int, TrainedLayer]) -> str:
    """Components per block as JSON, for the metadata."""
    return json.dumps({str(i): [f.keys.counts, f.values.counts] for i, f in layers.items()})


def layers_from(
    loaded: LoadedModel, tensors: Mapping[str, torch.Tensor], counts: str, where: str
) -> dict[int, TrainedLayer]:
    """Rebuild trained-form layers from their tensors.

    Raises:
        UserError: tensors missing or misshapen.
    """
    attentions: Any = loaded.family.attentions(loaded.model)
    made = {}
    try:
        for key, pair in json.loads(counts).items():
            i, prefix = int(key), f"layers.{key}."
            mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            key_counts, value_counts = pair
            layer = TrainedLayer(
                _blank(loaded.spec, key_counts, "keys", mine),
                _blank(loaded.spec, value_counts, "values", mine),
                loaded.family.key_norm(attentions[i]),
            )
            layer.load_state_dict(mine)
            made[i] = layer
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: does not fit the model: {first}") from error
    return made


def _blank(
    spec: ModelSpec, counts: list[int], kind: str, tensors: Mapping[str, torch.Tensor]
) -> TrainedFactors:
    """Factors of the right shape for saved ``tensors``, yet to be filled."""
    return TrainedFactors(
        tuple(counts),
        spec.n_kv_heads,
        spec.kv_width // len(counts),
        spec.hidden,
        f"{kind}.bias" in tensors,
        f"{kind}.mean_response" in tensors,
        f"{kind}.order" in tensors,
    )
