"""What an error of a key costs: by the queries that attend to it, and by what these would miss.

An error ``e_s`` of the key of slot s changes the score of the query of slot t by ``x_ts . e_s``,
where ``x_ts = R_s^T R_t q_t`` is the query in the frame of the key before its RoPE. Errors ``d_s``
of the scores move the output of the head by ``sum_s p_s d_s u_s`` with ``u_s = W_o (v_s - o)``. An
error that all scores share does nothing (``sum_s p_s u_s = 0``), so by Jensen the square is at most

    sum_s p_s |u_s|^2 (d_s - c)^2    for any c, least where c is the mean under these weights.

With ``d_s = x_ts . e_s`` that is a form in ``x x^T`` and in the covariance of the keys under the
weights. The two are averaged apart (docs/design.md section 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from starkv_core.models.load import LoadedModel
from triton_ops.latent_attention import rotate

_QUERIES = 64  # of a sequence, whose attention to all keys before them is looked at


def seen_queries(
    q: torch.Tensor, p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Second moment of queries in the frames of the keys: ``sum_s p_ts x_ts x_ts^T``, mean over t.

    Args:
        q: ``[H, n, D]``, after RoPE.
        p: ``[H, n, L]``, weights of the keys for each query.
        cos, sin: ``[L, D]``, RoPE of the keys.

    Returns:
        float32 ``[H, D, D]``.
    """
    found = []
    for queries, weights in zip(q.float(), p.float(), strict=True):
        turned = rotate(queries[:, None, :], cos, -sin).flatten(0, 1)
        found.append((turned * weights.flatten()[:, None]).T @ turned / len(queries))
    return torch.stack(found)


def counted_keys(k: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scatter of keys about their mean under each query's weights, and these weights' sum.

    Args:
        k: ``[H, L, D]``.
        weight: ``[H, n, L]``, of the keys for each query.

    Returns:
        float32 ``[H, D, D]`` and ``[H]``, means over the queries.
    """
    k, weight = k.float(), weight.float()
    total = weight.sum(-1, keepdim=True)
    mean = (weight @ k) / total.clamp_min(torch.finfo(torch.float32).tiny)
    second = (k * weight.sum(1)[..., None]).transpose(1, 2) @ k
    covariance = second - (mean * total).transpose(1, 2) @ mean
    return covariance / weight.shape[1], total.mean((1, 2))


class Attended:
    """Attention of one layer of a dense model to one row of inputs.

    Attributes:
        rows: int64, slots of the queries that moments are taken over, in even distances.

    Args:
        loaded: the model.
        attention: its module.
        y: ``[L, d]``, inputs.
    """

    def __init__(self, loaded: LoadedModel, attention: Any, y: torch.Tensor) -> None:
        spec, family = loaded.spec, loaded.family
        self._attention, self._spec, self._y = attention, spec, y
        k = attention.k_proj(y).unflatten(1, (spec.n_kv_heads, spec.head_dim))
        if family.key_norm(attention) is not None:
            k = attention.k_norm(k)
        self._cos, self._sin = spec.rope.tables(0, len(y), y.device)
        q = family.queries(attention, y[None], spec.head_dim)[0]
        self._q, self._k = (rotate(x, self._cos, self._sin) for x in (q, self._of_queries(k)))
        self.rows = torch.arange(0, len(y), -(-len(y) // _QUERIES), device=y.device)

    def probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 ``[H, n, L]``: what the queries in slots ``rows`` attend to."""
        scores = self._q[:, rows] @ self._k.transpose(1, 2) * self._attention.scaling
        slots = torch.arange(self._k.shape[1], device=rows.device)
        return scores.float().masked_fill(slots > rows[:, None], float("-inf")).softmax(-1)

    def moves(self, p: torch.Tensor) -> torch.Tensor:
        """float32 ``[H, n, L]``: ``|u_s|^2``, how far more attention to a slot moves the output."""
        spec, attention = self._spec, self._attention
        by_head = attention.v_proj(self._y).unflatten(1, (spec.n_kv_heads, spec.head_dim))
        v = self._of_queries(by_head).float()
        w_o = attention.o_proj.weight.detach().unflatten(1, (spec.n_heads, spec.head_dim)).float()
        metric = torch.einsum("ohd,ohe->hde", w_o, w_o)
        o = p @ v
        weighted = v @ metric
        own = (o @ metric * o).sum(-1, keepdim=True)
        squares = (v * weighted).sum(-1)[:, None] - 2 * o @ weighted.transpose(1, 2) + own
        return squares.clamp_min(0)

    def queries(self, p: torch.Tensor) -> torch.Tensor:
        """float32 ``[H_kv, D, D]``: :func:`seen_queries` of ``rows``, summed over each group.

        Args:
            p: ``[H, n, L]``, weights of the keys.
        """
        return self._summed(seen_queries(self._q[:, self.rows], p, self._cos, self._sin))

    def keys(self, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 ``[H_kv, D, D]`` and ``[H_kv]``: :func:`counted_keys`, summed over each group.

        Keys are those before bias, norm and RoPE, the weights ``p_s |u_s|^2``.

        Args:
            p: ``[H, n, L]``, attention of ``rows``.
        """
        # Without the bias, which all keys share: beside 200 their spread would round off.
        plain = linear(self._y, self._attention.k_proj.weight)
        plain = plain.unflatten(1, (self._spec.n_kv_heads, self._spec.head_dim))
        covariance, weight = counted_keys(self._of_queries(plain), p * self.moves(p))
        return self._summed(covariance), self._summed(weight)

    def _of_queries(self, of_kv_heads: torch.Tensor) -> torch.Tensor:
        """``[L, H_kv, D]`` as ``[H, L, D]``, once for every query head."""
        return of_kv_heads.transpose(0, 1).repeat_interleave(self._spec.group, 0)

    def _summed(self, of_heads: torch.Tensor) -> torch.Tensor:
        return of_heads.unflatten(0, (self._spec.n_kv_heads, -1)).sum(1)
