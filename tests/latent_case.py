"""Random calls of latent attention, and their results by plain mathematics in float64.

Shares nothing with the package's reference: keys are rebuilt head by head, turned as complex
numbers at their exact positions, and the softmax is taken over all scores at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from triton_ops.latent_attention import (
    SLOTS,
    KeyLayout,
    LatentFactors,
    RopeTables,
    latent_attention,
    row_width,
)

PAD = 30.0  # times what a leak from padding would weigh otherwise


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within, ``torch.empty`` gives NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """One call: shapes, RoPE and what hides slots.

    Attributes:
        heads, dim: query heads and their dimension.
        ranks: channels of each key head.
        value_rank: channels of the values.
        filled: slots filled, the queries' own included.
        queries: query tokens.
        starts: first channels of the key heads; None is side by side.
        theta, llama3, factor: of RoPE: its frequencies, scaled as in Llama 3 or not, its factor.
        padded: rows begin at different slots; with several rows, the last at ``filled``.
        holes: a mask hides a fifth of the slots.
    """

    heads: int
    dim: int
    ranks: tuple[int, ...]
    value_rank: int
    filled: int
    batch: int = 1
    queries: int = 1
    bias: bool = False
    starts: tuple[int, ...] | None = None
    theta: float = 1e4
    llama3: bool = False
    factor: float = 1.0
    padded: bool = False
    holes: bool = False

    def inv_freq(self) -> torch.Tensor:
        """Float64 ``[D / 2]``; Llama 3 slows the low frequencies eightfold, smoothly."""
        freq = self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        if not self.llama3:
            return freq
        keep = ((8192 * freq / (2 * math.pi) - 1) / 3).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / 8


@dataclass(frozen=True)
class Call:
    """A case with its tensors, on one device and in one dtype."""

    case: Case
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    factors: LatentFactors
    filled: torch.Tensor
    first: torch.Tensor | None
    mask: torch.Tensor | None

    def run(self, backend: str) -> torch.Tensor:
        """The op's result ``[B, H, Q, D]``; memory it allocates comes filled with NaN."""
        with unwritten_is_nan():
            return latent_attention(
                self.q,
                self.keys,
                self.values,
                self.factors,
                RopeTables(self.case.inv_freq(), self.case.factor),
                filled=self.filled,
                scale=self.case.dim**-0.5,
                first=self.first,
                mask=self.mask,
                backend=backend,
            )

    def seen(self, start: int, stop: int) -> torch.Tensor:
        """Bool ``[B, 1, Q, stop - start]``: the slots that each query attends to."""
        case, device = self.case, self.q.device
        slot = torch.arange(start, stop, device=device)
        own = case.filled - case.queries + torch.arange(case.queries, device=device)
        seen = (slot <= own[:, None]).expand(case.batch, 1, -1, -1)
        if self.first is not None:
            seen = seen & (slot >= self.first.view(-1, 1, 1, 1))
        return seen if self.mask is None else seen & self.mask[..., start:stop]

    def exact(self) -> torch.Tensor:
        """The result in float64; slots come in pieces, so that rebuilt keys stay small."""
        case, layout = self.case, self.factors.layout
        group = case.heads // len(case.ranks)
        half, piece = case.dim // 2, max(1, 2**14 // case.batch)
        pieces = [(s, min(s + piece, case.filled)) for s in range(0, case.filled, piece)]
        q = torch.complex(self.q[..., :half].double(), self.q[..., half:].double())
        inv_freq = case.inv_freq().to(self.q.device)
        scores = []
        for start, stop in pieces:
            slot = torch.arange(start, stop, device=self.q.device, dtype=torch.float64)
            angle = slot[:, None] * inv_freq
            turn = torch.polar(torch.full_like(angle, case.factor), angle)
            part = []
            for head, (at, rank) in enumerate(zip(layout.starts, layout.ranks, strict=True)):
                x = self.keys[:, start:stop, at : at + rank].double()
                key = x @ self.factors.key_up[head, :, :rank].double().T
                if self.factors.key_bias is not None:
                    key = key + self.factors.key_bias[head].double()
                turned = torch.complex(key[..., :half], key[..., half:]) * turn
                mine = q[:, head * group : (head + 1) * group].flatten(1, 2)
                both = torch.einsum("bqd,bld->bql", mine, turned.conj()).real
                part.append(both.unflatten(1, (group, case.queries)))
            piece_scores = torch.cat(part, dim=1) * case.dim**-0.5
            scores.append(piece_scores.masked_fill(~self.seen(start, stop), float("-inf")))
        p = torch.cat(scores, dim=-1).softmax(-1).nan_to_num(0.0).flatten(1, 2)
        mixed = p.new_zeros(*p.shape[:2], case.value_rank)
        for start, stop in pieces:
            values = self.values[:, start:stop, : case.value_rank]
            mixed += p[..., start:stop] @ values.double()
        mixed = mixed.unflatten(1, (len(case.ranks), group * case.queries))
        out = torch.einsum("bhqr,hdr->bhqd", mixed, self.factors.value_up.double())
        return out.reshape(case.batch, case.heads, case.queries, case.dim)


def draw(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int, room: int | None = None
) -> Call:
    """Random tensors: scores of about unit variance, NaN in every slot that is not filled.

    Args:
        room: slots of the buffers; None is the least that the kernels take.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    kv_heads = len(case.ranks)
    layout = (
        KeyLayout.side_by_side(case.ranks)
        if case.starts is None
        else KeyLayout(case.ranks, case.starts)
    )
    key_up = torch.zeros(kv_heads, case.dim, max(case.ranks), device=device, dtype=dtype)
    for head, rank in enumerate(case.ranks):
        key_up[head, :, :rank] = normal(case.dim, rank) / rank**0.5
    factors = LatentFactors(
        layout,
        key_up,
        normal(kv_heads, case.dim) if case.bias else None,
        normal(kv_heads, case.dim, case.value_rank) / case.value_rank**0.5,
    )
    first = mask = None
    if case.padded:
        share = torch.arange(1, case.batch + 1, device=device) / (case.batch + 1)
        first = (share * case.filled).int()
        if case.batch > 1:
            first[-1] = case.filled
    if case.holes:
        shape = (case.batch, 1, case.queries, case.filled)
        mask = torch.rand(shape, generator=generator, device=device) > 0.2
    room = -(-case.filled // SLOTS) * SLOTS if room is None else room

    def buffer(channels: int) -> torch.Tensor:
        shape = case.batch, room, row_width(channels)
        rows = torch.full(shape, float("nan"), device=device, dtype=dtype)
        rows[:, : case.filled, :channels].normal_(generator=generator)
        rows[:, : case.filled, channels:] = PAD
        if first is not None:
            for row, start in zip(rows, first.tolist(), strict=True):
                row[:start] *= PAD
        return rows

    return Call(
        case,
        normal(case.batch, case.heads, case.queries, case.dim),
        buffer(layout.channels),
        buffer(case.value_rank),
        factors,
        torch.tensor([case.filled], dtype=torch.int32, device=device),
        first,
        mask,
    )


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the error over the norm of what is wanted, the largest over rows of the batch.

    Rows that should be zero count by their norm alone.
    """
    error = (got.double() - want).flatten(1).norm(dim=1)
    size = want.flatten(1).norm(dim=1)
    return float((error / torch.where(size > 0, size, 1.0)).max())
