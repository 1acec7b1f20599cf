"""StreamingLLM (arXiv 2309.17453): the first four tokens as attention sinks, and the latest.

Positions are slots of the cache, as in the paper: keys are stored before RoPE and turned at every
step by where they then stand, so that distances never exceed what is held. A prompt attends to all
of itself and is cut afterwards; a new token attends to what is held and to itself.
"""

from __future__ import annotations

import torch

from starkv_core.eviction.policy import Policy

SINKS = 4


class Streaming(Policy):
    """Keeps the first :data:`SINKS` tokens of a row and its latest."""

    method = "streaming"
    least = SINKS + 1
    scored = False
    renumbered = True

    def kept(
        self, place: torch.Tensor, held: torch.Tensor, budget: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """As the base class has it."""
        late = place >= held - (budget - SINKS)
        return (place >= 0) & (late | (place < SINKS))
