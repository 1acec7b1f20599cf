"""Eviction by its definition: plain transformers without a cache, one query after the other.

Attention is causal, so that a pass over a whole text, in which every query sees what the definition
leaves of the tokens before it, gives what steps over a cache must give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from starkv_core.run import Subject

SINKS = 4
Stays = Callable[[list[int], dict[int, float], int], list[int]]


def h2o(keep: float, least: int = 2) -> Stays:
    """Of the tokens held, those with the most attention and the latest, half and half."""

    def stays(held: list[int], scores: dict[int, float], seen: int) -> list[int]:
        budget = max(int(keep * seen + 1e-9) if keep <= 1 else int(keep), least)
        if len(held) <= budget:
            return held
        latest = held[len(held) - (budget - budget // 2) :]
        older = held[: len(held) - len(latest)]
        heavy = sorted(older, key=lambda token: (-scores[token], token))[: budget // 2]
        return sorted(heavy) + latest

    return stays


def streaming(keep: float) -> Stays:
    """Of the tokens held, the first four and the latest."""

    def stays(held: list[int], scores: dict[int, float], seen: int) -> list[int]:
        budget = max(int(keep * seen + 1e-9) if keep <= 1 else int(keep), SINKS + 1)
        if len(held) <= budget:
            return held
        return held[:SINKS] + held[len(held) - (budget - SINKS) :]

    return stays


@dataclass
class Reference:
    """What the definition gives.

    Attributes:
        logits: float64 ``[1, L, V]``.
        kept: tokens held at the end, by layer and group of heads.
        scores: attention received, by layer, group of heads and token.
        keys: float64 ``[H_kv, L, D]`` of every layer, turned by the text's positions.
    """

    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    kept: dict[int, list[list[int]]] = field(default_factory=dict)
    scores: dict[int, list[dict[int, float]]] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)


def reference(
    subject: Subject, ids: torch.Tensor, prompt: int, stays: Stays, *, renumbered: bool
) -> Reference:
    """``ids [1, L]`` in float64; the first ``prompt`` tokens see each other before any is dropped.

    Heads of a compressed layer drop tokens together, on the sum of their scores.
    """
    found = Reference()
    model = copy.deepcopy(subject.base.model).double()
    for i, weights in subject.weights.items():
        _low_rank(subject.base.family.attentions(model)[i], weights)
    inv_freq, length = subject.spec.rope.inv_freq.double(), ids.shape[1]

    def turned(keys: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        angles = by.double()[:, None] * inv_freq
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        first, second = keys.chunk(2, -1)
        return keys * cos + torch.cat((-second, first), -1) * sin

    def attention(
        module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        layer, (heads, group) = module.layer_idx, (k.shape[1], q.shape[1] // k.shape[1])
        together = layer in subject.weights
        sets = [list(range(heads))] if together else [[h] for h in range(heads)]
        held: list[list[int]] = [[] for _ in sets]
        scores: list[dict[int, float]] = [{} for _ in sets]
        out = torch.zeros_like(q)
        for t in range(length):
            for s, members in enumerate(sets):
                held[s].append(t)
                scores[s][t] = 0.0
                tokens, last = torch.tensor(held[s]), len(held[s]) - 1
                for h in (m * group + g for m in members for g in range(group)):
                    keys = k[0, h // group, tokens]
                    if renumbered:
                        keys = turned(keys, t - last + torch.arange(last + 1) - tokens)
                    probs = (keys @ q[0, h, t] * scaling).softmax(0)
                    out[0, h, t] = probs @ v[0, h // group, tokens]
                    for token, p in zip(held[s], probs.tolist(), strict=True):
                        scores[s][token] += p
                if t + 1 >= prompt:
                    held[s] = stays(held[s], scores[s], t + 1)
        found.kept[layer], found.scores[layer], found.keys[layer] = held, scores, k[0]
        return out.transpose(1, 2), None

    AttentionInterface.register("evicted", attention)
    AttentionMaskInterface.register("evicted", lambda *args, **kwargs: None)
    model.config._attn_implementation = "evicted"
    with torch.no_grad():
        found.logits = model(ids, use_cache=False).logits
    return found


def _low_rank(module: Any, weights: Any) -> None:
    """Put the products of the factors in the place of the projections of keys and values."""
    heads, dim, _ = weights.key_up.shape
    keys, values = [], []
    for h in range(heads):
        real = weights.real_channels[h]
        index = weights.key_index[h][real]
        keys.append(weights.key_up[h][:, real].double() @ weights.key_down[index].double())
        values.append(weights.value_up[h].double() @ weights.value_down.double())
    pairs = ((module.k_proj, keys, weights.key_bias), (module.v_proj, values, weights.value_bias))
    for projection, blocks, bias in pairs:
        zero = torch.zeros(heads, dim, dtype=torch.float64)
        projection.weight = torch.nn.Parameter(torch.cat(blocks))
        whole = zero if bias is None else bias.double()
        projection.bias = torch.nn.Parameter(whole.flatten())


def predicted_bytes(
    subject: Subject, held: int, *, scored: bool, renumbered: bool, batch: int = 1
) -> int:
    """Bytes of a cache of ``held`` tokens a row in each layer: float32 keys and values, float32
    scores and int32 positions, which keys turned by them do without."""
    total = 0
    for i in range(subject.spec.n_layers):
        ranks = None if subject.ranks is None else subject.ranks.layers[i]
        if ranks is None:
            numbers = 2 * subject.spec.kv_width + (subject.spec.n_kv_heads if scored else 0)
        else:
            numbers = sum(ranks.keys) + sum(ranks.values) + scored + (not renumbered)
        total += 4 * numbers
    return total * held * batch
