"""The basis in which latents are coded: principal axes of what an error costs, or Hadamard's.

A *side* is the keys or the values of a layer. Changing its basis by any invertible ``T`` leaves the
model as it is: ``down' = T down``, ``up' = up T^-1``. The choice only decides what errors of codes
do (docs/design.md section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from starkv_core.attention import LatentWeights
from starkv_core.decompose import output_metric, query_metric
from starkv_core.errors import UserError
from starkv_core.models.spec import ModelSpec
from starkv_core.quant.measure import LatentStatistics
from starkv_core.quant.rotation import rotation
from starkv_core.quant.scheme import PAPER_LEADING

_DAMPING = 0.3  # as the decomposition's default: directions that o_proj ignores are not free
_FLOOR = 1e-10  # least eigenvalue of a metric over the largest


@dataclass(frozen=True)
class Side:
    """Keys or values of one layer, every channel for itself; float64 on the CPU.

    Attributes:
        down: ``[R, d]``.
        up: ``[H_kv, D, R]``, zero where a channel is not of the head.
        bias: ``[H_kv, D]`` or None.
        shift: ``[R]`` taken off the latents, or None.
        owner: int64 ``[R]``, the factorisation (group of heads) of each channel.
        worth: ``[R]``, what dropping the channel costs; zeros until it is known.
        rows: float32 ``[N, R]``, a sample of its latents.
    """

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    shift: torch.Tensor | None
    owner: torch.Tensor
    worth: torch.Tensor
    rows: torch.Tensor

    @property
    def channels(self) -> int:
        """R."""
        return len(self.owner)

    def picked(self, index: torch.Tensor) -> Side:
        """The channels ``index``, in that order; those left out read as zero."""
        return replace(
            self,
            down=self.down[index],
            up=self.up[..., index],
            shift=None if self.shift is None else self.shift[index],
            owner=self.owner[index],
            worth=self.worth[index],
            rows=self.rows[:, index],
        )

    def shift_in(self, dtype: torch.dtype) -> Side:
        """With a shift that ``dtype`` holds exactly: the mean may be many deviations large."""
        if self.shift is None:
            return self
        moved = self.shift.to(dtype).double() - self.shift
        bias = self.up @ moved
        return replace(
            self,
            shift=self.shift + moved,
            bias=bias if self.bias is None else self.bias + bias,
            rows=(self.rows.double() - moved).float(),
        )

    def _turned(self, blocks: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Side:
        """In other bases: for blocks of channels ``(index, T, T^-1)`` that cover all, in order."""
        index = torch.cat([block[0] for block in blocks])
        forth = torch.block_diag(*[block[1] for block in blocks])
        back = torch.block_diag(*[block[2] for block in blocks])
        side = self.picked(index)
        return replace(
            side,
            down=forth @ side.down,
            up=side.up @ back,
            shift=None if side.shift is None else forth @ side.shift,
            rows=(side.rows.double() @ forth.T).float(),
        )

    def _centred(self, mean: torch.Tensor) -> Side:
        """The mean taken off the latents and put into the bias."""
        moved = self.up @ mean
        return replace(
            self,
            shift=mean,
            bias=moved if self.bias is None else self.bias + moved,
            rows=(self.rows.double() - mean).float(),
        )


def sides_of(weights: LatentWeights, key_groups: int, stats: LatentStatistics) -> tuple[Side, Side]:
    """Keys and values of a layer as it is deployed.

    Args:
        key_groups: factorisations of the keys.

    Raises:
        UserError: heads of a group are not neighbours (``start.key_order: cka``).
    """
    firsts = weights.key_index[:, 0].tolist()
    if firsts != sorted(firsts):
        raise UserError(
            "quantize: key heads of this run are grouped out of order (start.key_order: cka), which"
            " codes do not support; calibrate with start.key_order=given"
        )

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", torch.float64)

    def wide_or_none(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else wide(tensor)

    heads, dim, _ = weights.key_up.shape
    channels = weights.key_down.shape[0]
    index = weights.key_index.cpu()
    key_up = torch.zeros(heads, dim, channels, dtype=torch.float64)
    # Padded columns are zero, and adding them to channel 0 changes nothing.
    key_up.scatter_add_(2, index[:, None, :].expand_as(weights.key_up), wide(weights.key_up))
    members = heads // key_groups
    keys = Side(
        wide(weights.key_down),
        key_up,
        wide_or_none(weights.key_bias),
        None,
        weights.channel_heads.cpu() // members,
        torch.zeros(channels, dtype=torch.float64),
        stats.key_rows,
    )
    rank = weights.value_down.shape[0]
    values = Side(
        wide(weights.value_down),
        wide(weights.value_up),
        wide_or_none(weights.value_bias),
        None,
        torch.zeros(rank, dtype=torch.long),
        torch.zeros(rank, dtype=torch.float64),
        stats.value_rows,
    )
    return keys, values


def key_metrics(stats: LatentStatistics) -> torch.Tensor:
    """What key errors cost in the scores, ``[H_kv, D, D]`` (docs/design.md section 5)."""
    return torch.stack([query_metric(energy) for energy in stats.query_energy])


def value_metrics(output_weight: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """What value errors cost after ``o_proj``, ``[H_kv, D, D]``."""
    whole = output_metric(
        output_weight.detach().cpu(), range(spec.n_kv_heads), spec.group, spec.head_dim, _DAMPING
    )
    blocks = whole.unflatten(0, (spec.n_kv_heads, -1)).unflatten(2, (spec.n_kv_heads, -1))
    return torch.stack([blocks[h, :, h] for h in range(spec.n_kv_heads)])


def principal(
    side: Side, mean: torch.Tensor, moment: torch.Tensor, metrics: torch.Tensor, *, centre: bool
) -> Side:
    """Principal axes of the cost of errors, block by block; every channel of unit variance.

    With the metric ``M = sum_h U_h^T A_h U_h`` of a block and the covariance C of its latents, the
    eigenvectors P of ``M^1/2 C M^1/2`` make ``T = P^T M^1/2``: errors of channels then add up with
    weight 1 and latents are uncorrelated, so that water-filling of their variances is the best
    that any basis allows. Under a norm on keys (``centre`` False) the basis must stay orthonormal:
    there P are the eigenvectors of C alone and the mean cannot be taken out.

    Args:
        mean, moment: of the latents, ``[R]`` and ``[R, R]``.
        metrics: A_h, ``[H_kv, D, D]``.
        centre: take the mean out and allow any basis.

    Returns:
        Channels of each owner in descending order of their worth.
    """
    covariance = moment - torch.outer(mean, mean) if centre else moment
    if centre:
        side = side._centred(mean)
    gram = torch.einsum("hdr,hde,hes->rs", side.up, metrics, side.up)
    blocks, worths = [], []
    for owner in range(int(side.owner.max()) + 1):
        index = (side.owner == owner).nonzero()[:, 0]
        c, m = (t[index][:, index] for t in (covariance, gram))
        if centre:
            values, vectors = torch.linalg.eigh(m)
            root = values.clamp_min(float(values[-1]) * _FLOOR).sqrt()
            half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
            found, axes = torch.linalg.eigh(half @ c @ half)
            found = found.clamp_min(float(found[-1]) * _FLOOR)
            forth, back = axes.T @ half, inverse @ axes
            deviation = found.sqrt()
            forth, back = forth / deviation[:, None], back * deviation
            worth = found
        else:
            found, axes = torch.linalg.eigh(c)
            forth, back = axes.T, axes
            worth = found.clamp_min(0) * torch.einsum("rc,rs,sc->c", axes, m, axes)
        order = worth.argsort(descending=True)
        blocks.append((index, forth[order], back[:, order]))
        worths.append(worth[order])
    return replace(side._turned(blocks), worth=torch.cat(worths))


def leading(count: int) -> int:
    """Channels of a block of ``count`` that the paper codes in 4 bits: a fifth, rounded up."""
    return ceil(round(PAPER_LEADING * count, 9))


def hadamard_blocks(side: Side) -> tuple[Side, torch.Tensor]:
    """The paper's basis: leading fifth and rest of every owner's channels rotated independently.

    Channels must come in the order of singular values, as runs have them.

    Returns:
        The side, and int64 ``[R]``: 0 for leading channels, 1 for the rest.
    """
    blocks: list[Any] = []
    parts: list[torch.Tensor] = []
    for owner in range(int(side.owner.max()) + 1):
        index = (side.owner == owner).nonzero()[:, 0]
        first = leading(len(index))
        for part, members in enumerate((index[:first], index[first:])):
            if len(members):
                turn = rotation(len(members))
                blocks.append((members, turn, turn.T))
                parts.append(torch.full((len(members),), part))
    return side._turned(blocks), torch.cat(parts)
