"""The cache of an eviction method: rows of a layer lose tokens, and their memory, at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from starkv_core.cache import LatentCache, RowwiseLayer, WindowLayer
from starkv_core.eviction.policy import Policy
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import RankMap


class EvictingLayer(RowwiseLayer):
    """Keys and values of the tokens that stay, and what the method must know of them.

    Tokens stand in the order of the text and end at the last slot. Rows that hold fewer than
    others begin with slots that are never read. Nothing is allocated ahead.

    Attributes:
        keys, values: ``[B, G, T, width]``; G is the key heads of a dense layer, 1 for latents.
        scores: float32 ``[B, G, T]``, attention received; of width 0 for methods without scores.
        positions: int32 ``[B, G, T]``, positions in the text where keys are not yet turned by them,
            else of width 0.
        length: slots seen, padding included.
        seen, held: int64 ``[B]`` on the CPU, tokens seen and held, padding not counted.

    Args:
        policy: the method.
        dtype: of keys and values.
        placed: whether positions are kept.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    keys: torch.Tensor | None
    values: torch.Tensor | None
    is_initialized: bool

    def __init__(self, policy: Policy, dtype: torch.dtype, placed: bool) -> None:
        super().__init__()
        self.policy, self.dtype, self.placed = policy, dtype, placed
        self.reset()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Become an empty layer for rows ``[B, G, L, width]``."""
        self.keys, self.values = (
            t.new_zeros(*t.shape[:2], 0, t.shape[3], dtype=self.dtype)
            for t in (key_states, value_states)
        )
        self.scores = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32)
        self.positions = self.scores.int()
        self.seen = torch.zeros(len(key_states), dtype=torch.long)
        self.held = self.seen.clone()
        self.is_initialized = True

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[B, G, T, width]``."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [*self.rows(), self.scores, self.positions] if self.is_initialized else []

    def admit(self, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor) -> None:
        """Append rows ``[B, G, L, width]``; ``seen`` int64 ``[B]`` is then seen, less padding."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        new = keys.shape[2]
        old_keys, old_values = self.rows()
        self.keys = torch.cat((old_keys, keys.to(self.dtype)), 2)
        self.values = torch.cat((old_values, values.to(self.dtype)), 2)
        if self.policy.scored:
            self.scores = torch.cat((self.scores, self.scores.new_zeros(*keys.shape[:3])), 2)
        if self.placed:
            places = torch.arange(self.length, self.length + new, device=keys.device)
            places = places.int().expand(*keys.shape[:3])
            self.positions = torch.cat((self.positions, places), 2)
        self.held, self.seen = self.held + seen - self.seen, seen
        self.length += new

    def place(self) -> torch.Tensor:
        """Int64 ``[B, T]``: each slot's place among the tokens of its row, negative for none."""
        keys, _ = self.rows()
        slots = torch.arange(keys.shape[2], device=keys.device)
        return slots - (keys.shape[2] - self.held.to(keys.device))[:, None]

    def evict(self, received: torch.Tensor) -> None:
        """Count float32 ``[B, H_kv, T]``, the attention received in a pass; drop what must go."""
        keys, values = self.rows()
        if self.policy.scored:
            self.scores += received if keys.shape[1] > 1 else received.sum(1, keepdim=True)
        budget = torch.tensor([self.policy.budget(n) for n in self.seen.tolist()])
        staying = torch.minimum(self.held, budget)
        width = int(staying.max())
        if width == keys.shape[2] and bool((staying == self.held).all()):
            return
        held, budget = (t.to(keys.device)[:, None, None] for t in (self.held, budget))
        kept = self.policy.kept(self.place()[:, None], held, budget, self.scores)
        # Stable: what stays goes to the end and keeps its order.
        order = kept.int().argsort(dim=-1, stable=True)[..., keys.shape[2] - width :]
        order = order.expand(-1, keys.shape[1], -1)
        self.keys, self.values = (
            t.gather(2, order[..., None].expand(*order.shape, t.shape[3])) for t in (keys, values)
        )
        if self.policy.scored:
            self.scores = self.scores.gather(2, order)
        if self.placed:
            self.positions = self.positions.gather(2, order)
        self.held = staying

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse: only attention that knows of eviction may fill this layer."""
        raise RuntimeError(
            "this cache layer drops tokens, but plain attention tried to fill it: run the model "
            "inside `with subject.active():`"
        )

    def get_seq_length(self) -> int:
        """Slots seen, held or not: the next token's position."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all that was seen, which tells tokens from padding."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized, self.length = False, 0
        self.scores = self.positions = self.seen = self.held = torch.empty(0)

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = map(change, self.rows())
            self.scores, self.positions = change(self.scores), change(self.positions)
            self.seen, self.held = change(self.seen), change(self.held)


class EvictingCache(LatentCache):
    """Cache whose layers drop tokens; layers under a sliding window stay as they are.

    Args:
        spec, ranks, dtype: as :class:`LatentCache` has them.
        policy: the method.
    """

    def __init__(
        self, spec: ModelSpec, ranks: RankMap | None, dtype: torch.dtype, policy: Policy
    ) -> None:
        super().__init__(spec, ranks, dtype)
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, WindowLayer):
                latent = ranks is not None and ranks.layers[i] is not None
                self.layers[i] = EvictingLayer(policy, dtype, latent and not policy.renumbered)

    def latent_tokens(self) -> list[int]:
        """Tokens that each compressed layer has taken in."""
        layers = () if self.ranks is None else zip(self.layers, self.ranks.layers, strict=True)
        return [layer.get_seq_length() for layer, ranks in layers if ranks is not None]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse (RuntimeError): the tokens that made room for the last ones are gone."""
        raise RuntimeError(
            "a cache that drops tokens cannot be cropped: those evicted do not come back; start "
            "from an empty one (subject.new_cache())"
        )
