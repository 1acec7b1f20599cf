"""A model, dense or compressed, whose cache drops tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any

from starkv_core.errors import UserError
from starkv_core.eviction.attention import EvictingAttention
from starkv_core.eviction.cache import EvictingCache
from starkv_core.eviction.policy import Policy
from starkv_core.run import Subject
from starkv_core.surgery import attending


@dataclass(frozen=True)
class EvictingSubject(Subject):
    """A subject whose layers, but for those under a sliding window, drop tokens.

    Attributes:
        policy: the method.
    """

    policy: Policy = field(kw_only=True)

    @property
    def name(self) -> str:
        """Subject and method."""
        return f"{super().name}, {self.policy.name}"

    @property
    def cache_name(self) -> str:
        """The method."""
        return self.policy.name

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the model drops tokens from its cache."""
        tables = self.tables or self.spec.rope.growing()
        attentions = self.base.family.attentions(self.model)
        return attending(
            self.base,
            {
                i: EvictingAttention(
                    module, self.base.family, self.spec, tables, i, self.weights.get(i)
                )
                for i, module in enumerate(attentions)
                if i not in self.spec.windows
            },
        )

    def new_cache(self) -> EvictingCache:
        """An empty cache that drops tokens."""
        return EvictingCache(self.spec, self.ranks, self.store_dtype, self.policy)


def evicting(subject: Subject, policy: Policy) -> EvictingSubject:
    """``subject`` with a cache that drops tokens, dense or of latents in 16 bits.

    Raises:
        UserError: every layer has a sliding window.
    """
    if len(subject.spec.windows) == subject.spec.n_layers:
        raise UserError(
            f"{policy.name}: all layers of {subject.name} have a sliding window, which drops "
            "tokens already; compare on another model"
        )
    return EvictingSubject(
        **{f.name: getattr(subject, f.name) for f in fields(Subject)}, policy=policy
    )
