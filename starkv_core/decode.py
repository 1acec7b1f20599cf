"""One decode step as a CUDA graph: forward, sampling and the in-place append, replayed per token.

Launching a model's kernels one by one takes longer than running them; a captured step takes one
launch (docs/design.md section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from starkv_core.cache import LatentCache, Step, steps
from starkv_core.graphs import CaptureError, capture, reason, require_gpu

if TYPE_CHECKING:
    from starkv_core.engine import Sampler
    from starkv_core.run import Subject

__all__ = ["CaptureError", "CapturedStep"]


class CapturedStep:
    """The next token of every row, again and again, on one cache.

    The capture costs about three steps and leaves the cache as it was. Each replay appends the
    current tokens and picks the next ones; :meth:`close` tells the cache how many it then holds.

    Attributes:
        tokens: int64 ``[B]``, to feed next.
        logits: ``[B, V]``, what they were picked from; a replay overwrites both.

    Args:
        subject: model, compressed or dense; the caller is inside ``subject.active()``.
        cache: filled by the prompt and with room (:meth:`LatentCache.reserve`) for all steps.
        tokens: int64 ``[B]``, the tokens to feed first.
        sampler: how tokens are picked.
        generator: its source of draws, on the GPU.
        first: int32 ``[B]``, the first slot of each row (left padding), or None.

    Raises:
        CaptureError: no GPU or several, a sliding window, or the capture itself fails.
    """

    logits: torch.Tensor

    def __init__(
        self,
        subject: Subject,
        cache: LatentCache,
        tokens: torch.Tensor,
        sampler: Sampler,
        generator: torch.Generator,
        first: torch.Tensor | None = None,
    ) -> None:
        require_gpu(tokens.device)
        kinds = sorted({type(layer).__name__ for layer in cache.layers if not steps(layer)})
        if kinds:
            raise CaptureError(f"layers of {', '.join(kinds)} cannot be written by a replay")
        if any(layer.device != tokens.device for layer in cache.layers):
            raise CaptureError("the model's layers are on several devices")
        self._model, self._cache, self._sampler = subject.model, cache, sampler
        self._generator = generator
        self._start = cache.get_seq_length()
        self._steps = 0
        device, room = tokens.device, min(layer.room for layer in cache.layers)
        if self._start >= room:
            raise CaptureError(f"the cache has room for {room} tokens and holds as many")
        self._room = room
        self.tokens = tokens.clone()
        self._slot = torch.tensor([self._start], device=device)
        self._filled = torch.tensor([self._start + 1], dtype=torch.int32, device=device)
        self._offset = (
            torch.zeros(len(tokens), 1, dtype=torch.long, device=device)
            if first is None
            else first.long()[:, None]
        )
        slots = torch.arange(room, device=device)
        held = slots <= self._start
        # Only layers left dense read it; compressed ones go by the step's own counts.
        seen = held if first is None else held & (slots >= first[:, None])
        self._mask = seen.expand(len(tokens), room)[:, None, None].clone()
        if first is None:
            first = torch.zeros(len(tokens), dtype=torch.int32, device=device)
        cache.set_step(Step(self._slot, self._filled, first))
        try:
            self._graph: torch.cuda.CUDAGraph | None = self._capture()
        except BaseException as error:
            cache.set_step(None)
            cache.fill(self._start)
            if not isinstance(error, Exception):
                raise
            raise CaptureError(reason(error)) from error
        # The graph reads them by address, and a longer context elsewhere replaces them.
        self._tables = () if subject.tables is None else subject.tables.held()

    def _capture(self) -> torch.cuda.CUDAGraph:
        moving = self.tokens, self._slot, self._filled, self._mask, *self._cache.overwritten()
        kept = [t.clone() for t in moving]

        def restore() -> None:
            for tensor, value in zip(moving, kept, strict=True):
                tensor.copy_(value)

        return capture(self._run, self.tokens.device, reset=restore, generator=self._generator)

    def _run(self) -> None:
        output = self._model(
            input_ids=self.tokens[:, None],
            attention_mask=self._mask,
            position_ids=self._slot - self._offset,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        self.tokens.copy_(self._sampler.pick(self.logits, self._generator))
        self._slot += 1
        self._filled += 1
        self._mask.index_fill_(3, self._slot.clamp(max=self._room - 1), True)

    def replay(self) -> torch.Tensor:
        """One step: int64 ``[B]``, the next tokens, in a buffer that the next replay overwrites.

        Raises:
            RuntimeError: the cache has no room left, or the steps have been ended.
        """
        if self._graph is None:
            raise RuntimeError("these steps have been ended: capture new ones")
        if self._start + self._steps >= self._room:
            raise RuntimeError(f"the cache has room for {self._room} tokens and holds as many")
        self._graph.replay()
        self._steps += 1
        return self.tokens

    def close(self) -> None:
        """End the captured steps: the cache holds the prompt and one token a replay."""
        self._graph = None  # it has the addresses of buffers that may be replaced now
        self._cache.set_step(None)
        self._cache.fill(self._start + self._steps)
