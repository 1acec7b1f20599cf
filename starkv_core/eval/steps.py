"""Given tokens fed one by one through a cache: every prediction reads what decode reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starkv_core.engine import LEAST_CAPTURED, Sampler, captured_steps

if TYPE_CHECKING:
    from starkv_core.decode import CapturedStep
    from starkv_core.run import Subject


def forced_steps(
    subject: Subject, ids: Tensor, cache: Any, mask: Tensor | None = None
) -> Iterator[Tensor]:
    """Feed ``ids`` to ``cache`` one token a step; on a GPU as replays of a graph where that pays.

    Args:
        subject: model; the caller is inside ``subject.active()`` and ``torch.no_grad()``.
        ids: int64 ``[B, T]``.
        cache: holds ``P`` slots, from none up.
        mask: int64 ``[B, P]``, 0 for padding on the left; None where nothing is padded.

    Yields:
        ``T`` times logits ``[B, V]`` that follow the token just fed, in a buffer that the next step
        may overwrite.
    """
    past, count = int(cache.get_seq_length()), ids.shape[1]
    captured: CapturedStep | None = None
    sampler = Sampler()
    try:
        for step in range(count):
            if captured is not None:
                captured.tokens.copy_(ids[:, step])
                captured.replay()
                yield captured.logits
                continue
            positions = torch.full_like(ids[:, :1], past + step)
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
                positions = mask.sum(dim=-1, keepdim=True) - 1
            yield subject.model(
                input_ids=ids[:, step : step + 1],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            if step == 0 and count > LEAST_CAPTURED:
                generator = sampler.generator(ids.device)
                captured = captured_steps(
                    subject, cache, ids[:, 1], sampler, generator, mask, count - 1
                )
    finally:
        if captured is not None:
            captured.close()
