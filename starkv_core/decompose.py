"""Low-rank decompositions of key and value weights: head-wise, grouped and joint.

One formula serves every variant. With a right second moment ``S`` (what the weights see) and a left
metric ``A`` (what an error costs), the best rank-r approximation of ``W`` under
``tr(A dW S dW^T)`` follows from the eigenvectors ``P`` of ``A^1/2 W S W^T A^1/2``:

    up = A^-1/2 P        sigma = sqrt(eigenvalues)        down = diag(1 / sigma) P^T A^1/2 W

This is the SVD of ``A^1/2 W L`` with ``L L^T = S`` and ``L`` undone on the right, but needs neither
``L`` nor its inverse, so a singular ``S`` is no trouble and full rank reproduces ``W`` exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

_FLOOR = 1e-7  # smallest sigma over the largest: keeps `down` finite for directions never seen


@dataclass(frozen=True)
class Decomposition:
    """``W = up @ diag(sigma) @ down``, components in descending order of ``sigma``.

    Attributes:
        up: ``[n, r]``.
        sigma: ``[r]``, not negative; ``sigma^2`` is what dropping the component costs.
        down: ``[r, d]``; with a second moment, every row has unit mean square on the data.
    """

    up: torch.Tensor
    sigma: torch.Tensor
    down: torch.Tensor

    def truncated(self, rank: int) -> Decomposition:
        """The leading ``rank`` components."""
        return Decomposition(self.up[:, :rank], self.sigma[:rank], self.down[:rank])

    def stored(self) -> Decomposition:
        """The same in float32 on the CPU."""
        return Decomposition(
            self.up.float().cpu(), self.sigma.float().cpu(), self.down.float().cpu()
        )

    def product(self, rank: int | None = None) -> torch.Tensor:
        """``[n, d]``: the approximation of ``W`` at a rank, in full when None."""
        return (self.up[:, :rank] * self.sigma[:rank]) @ self.down[:rank]


def decompose(
    weight: torch.Tensor,
    moment: torch.Tensor | None = None,
    metric: torch.Tensor | None = None,
    *,
    outputs: torch.Tensor | None = None,
) -> Decomposition:
    """Decompose one weight matrix; computed in float64, returned in float64.

    Args:
        weight: ``[n, d]``.
        moment: ``[d, d]`` second moment of the inputs; None for the identity (plain SVD).
        metric: ``[n, n]`` cost of output errors, positive definite; None for the identity.
        outputs: ``[n, n]`` second moment of the outputs, where it is not ``W S W^T``.

    Returns:
        ``min(n, d)`` components.
    """
    w = weight.double()
    half = inverse = None
    if metric is not None:
        half, inverse = _roots(metric.double())
        w = half @ w
    if outputs is not None:
        gram = outputs.double() if half is None else half @ outputs.double() @ half
    else:
        gram = w @ w.T if moment is None else w @ moment.double() @ w.T
    values, vectors = torch.linalg.eigh(0.5 * (gram + gram.T))
    rank = min(weight.shape)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    sigma = values.clamp_min(0).sqrt()
    sigma = sigma.clamp_min(float(sigma[0]) * _FLOOR + torch.finfo(sigma.dtype).tiny)
    up = vectors if inverse is None else inverse @ vectors
    return Decomposition(up, sigma, (vectors.T @ w) / sigma[:, None])


def _roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root and inverse square root of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(float(values[-1]) * 1e-12).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def head_groups(n_heads: int, group: int) -> Iterator[range]:
    """Heads of each group: group 1 is head-wise, group ``n_heads`` joint decomposition."""
    for start in range(0, n_heads, group):
        yield range(start, start + group)


def query_metric(query_energy: torch.Tensor) -> torch.Tensor:
    """Metric of one key head, ``diag(w)``: what a key error costs in the scores.

    RoPE turns each pair of dimensions by every angle, so over relative positions the second moment
    of the queries averages to one weight per pair (docs/design.md section 5).

    Args:
        query_energy: ``[D]`` mean square of the queries before RoPE, summed over the group's heads.
    """
    first, second = query_energy.double().chunk(2)
    pair = 0.5 * (first + second)
    weight = torch.cat((pair, pair))
    # A pair that the queries never use still gets a share, so that the metric stays invertible.
    return torch.diag(weight + 1e-3 * weight.mean() + torch.finfo(weight.dtype).tiny)


def attended_metric(query_moment: torch.Tensor) -> torch.Tensor:
    """Metric of one key head: what a key error costs in the scores, by how much it is attended to.

    Args:
        query_moment: ``[D, D]``, :func:`starkv_core.attended.seen_queries` of the group's heads.
    """
    moment = query_moment.double()
    # Directions that no query uses still get a share, so that the metric stays invertible.
    level = 1e-3 * moment.diagonal().mean() + torch.finfo(moment.dtype).tiny
    return moment + level * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def output_metric(
    output_weight: torch.Tensor, heads: Sequence[int], group: int, head_dim: int, damping: float
) -> torch.Tensor:
    """Metric of a group of value heads: what a value error costs after ``o_proj``.

    Block-diagonal with ``sum_g W_o,h^T W_o,h`` per value head (docs/design.md section 5), plus
    ``damping`` times its mean diagonal.

    Args:
        output_weight: ``[d, H * D]``, the weight of ``o_proj``.
        heads: value heads of the group.
        group: query heads per value head.
        damping: share of the mean added to the diagonal.

    Returns:
        ``[n, n]`` with ``n = len(heads) * D``.
    """
    w = output_weight.double()
    blocks = []
    for head in heads:
        block = w.new_zeros(head_dim, head_dim)
        for query in range(head * group, (head + 1) * group):
            part = w[:, query * head_dim : (query + 1) * head_dim]
            block += part.T @ part
        blocks.append(block)
    metric = torch.block_diag(*blocks)
    mean = metric.diagonal().mean()
    return metric + damping * mean * torch.eye(len(metric), dtype=w.dtype, device=w.device)
