"""H2O, the heavy-hitter oracle (arXiv 2306.14048): heavy hitters and the latest tokens, by half.

The score of a token is the attention probability that it has received, summed over all queries that
saw it, the prompt's included. Every key head of a dense layer drops tokens of its own, as in the
paper; query heads that share one are summed. Latents serve all heads of a layer, so there the score
is summed over its heads. A prompt attends to all of itself and is cut afterwards; a new token
attends to what is held and to itself, is scored, and then one is dropped. Of an odd budget the
latest tokens get the odd one.

Positions are those of the text: the paper does not renumber, and its release keeps keys turned by
the positions they were read at and turns queries by theirs. (The release's variant that rolls
positions, for texts beyond the context, is not this one.)
"""

from __future__ import annotations

import torch

from starkv_core.eviction.policy import Policy


class H2O(Policy):
    """Keeps ``budget // 2`` heavy hitters and, of the rest, the latest; see the module."""

    method = "h2o"
    least = 2
    scored = True
    renumbered = False

    def kept(
        self, place: torch.Tensor, held: torch.Tensor, budget: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """As the base class has it; of equal scores the earlier token stays."""
        heavy = budget // 2
        late = (place >= 0) & (place >= held - (budget - heavy))
        older = (place >= 0) & ~late
        first = scores.masked_fill(~older, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        return late | older & (first.argsort(-1) < heavy)
