"""Suite ``decode``: one step of a whole model for every row, sampling included, as a CUDA graph.

Ours is the engine's own captured step on a reserved cache; beside it stands transformers' static
cache under the same forward, captured alike (``static-graph``). Both share one set of weights, and
both are greedy. The caches hold random numbers: speed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from starkv_core.bench.gate import LOGITS_LIMIT, fault, relative_error, token_fault
from starkv_core.bench.outcome import Measured
from starkv_core.bench.plan import Need
from starkv_core.bench.shapes import Shape
from starkv_core.bench.timing import measure_steps, peak_bytes, release
from starkv_core.budget import predict_bytes, slots
from starkv_core.cache import LatentCache
from starkv_core.decode import CapturedStep
from starkv_core.engine import Sampler
from starkv_core.graphs import CaptureError, capture
from starkv_core.rank_map import RankMap
from starkv_core.run import Subject

STATIC, STARKV = BACKENDS = ("static-graph", "starkv")
ROOM = 256  # slots kept for the steps that are timed, on both sides
_GATE_ROWS = 2


def tokens_held(ctx: int) -> int:
    """Slots of the cache of either side: the context and room for steps."""
    return slots(ctx) + ROOM


def cache_bytes(shape: Shape, backend: str, ctx: int, batch: int) -> int:
    """Bytes of the cache of all layers, with its room for steps."""
    dense = RankMap((None,) * shape.spec.n_layers)
    ranks = shape.ranks if backend == STARKV else dense
    return predict_bytes(shape.spec, ranks, tokens_held(ctx), batch)


def read_bytes(shape: Shape, subject: Subject, ctx: int, batch: int) -> int:
    """Bytes that one step has to read: the weights it uses, and the filled part of the cache."""
    spec, model = shape.spec, subject.model
    weights = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    if embedding is not model.get_output_embeddings().weight:
        weights -= embedding.numel()  # a step reads one row of it for every token
    numbers = 0
    for layer in shape.ranks.layers:
        if subject.compressed and layer is not None:
            weights -= 2 * spec.kv_width * spec.hidden
            up = spec.kv_width * sum(layer.values) + sum(layer.keys) * spec.head_dim
            weights += layer.total * spec.hidden + up
            numbers += layer.stored
        else:
            numbers += 2 * spec.kv_width
    return 2 * (weights + batch * ctx * numbers)


def need(shape: Shape, backend: str, ctx: int, batch: int) -> Need:
    """Memory of one side: weights (for ours the factors beside them), cache, one layer's work."""
    spec = shape.spec
    parts = {"weights": 2 * shape.parameters, "cache": cache_bytes(shape, backend, ctx, batch)}
    held = tokens_held(ctx)
    work = batch * (8 * spec.vocab + 64 * spec.hidden)
    if backend == STARKV:
        parts["factors"] = 2 * shape.factor_numbers
        widest = max(sum(layer.values) for layer in shape.ranks.layers if layer is not None)
        work += batch * spec.n_heads * (4 * held + 4 * 33 * widest)
    elif spec.group > 1:
        # Under a mask transformers repeats keys and values for the heads that share them.
        work += 2 * 2 * batch * held * spec.n_heads * spec.head_dim
    parts["work"] = work
    parts["margin"] = 3 << 29
    return Need(parts)


def run_case(subject: Subject, backend: str, ctx: int, batch: int, *, checked: bool) -> Measured:
    """Gate and time one side; ``subject`` is dense for ``static-graph``.

    Args:
        checked: whether this side has passed its gate at this context already.
    """
    device, dtype = subject.device, subject.base.dtype
    limit = LOGITS_LIMIT[dtype]
    side = _Compressed if backend == STARKV else _Static
    error = None
    with torch.no_grad():
        if not checked:
            release(device)
            error = side(subject, ctx, _GATE_ROWS, peaked=True).error()
            found = fault(error, limit)
            if found is not None:
                return Measured(None, error, found)
        release(device)
        made = side(subject, ctx, batch, peaked=False)
        logits = made.logits()
        with made.stepping() as (step, why_not):
            tokens = step().clone()
            found = token_fault(tokens, logits, limit)
            if found is not None:
                return Measured(None, error, found)
            del logits
            timing = measure_steps(step, device, graph=why_not is None)
        peak = peak_bytes(device)
    return Measured(timing, error, peak=peak, note=why_not and f"not captured: {why_not}")


def _first_tokens(subject: Subject, batch: int) -> Tensor:
    generator = torch.Generator(subject.device).manual_seed(7)
    return torch.randint(
        0, subject.spec.vocab, (batch,), generator=generator, device=subject.device
    )


def _randomise(caches: Any, peak: float) -> None:
    """Fill the buffers of a cache's layers; ``peak`` scales the values.

    Random values cancel out over a long context. Scaled by the root of its length they do not, so
    that a wrong attention shows in the logits.
    """
    for i, layer in enumerate(caches.layers):
        generator = torch.Generator(layer.keys.device).manual_seed(i)
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator).mul_(peak)


class _Compressed:
    """The compressed model on a reserved latent cache."""

    def __init__(self, subject: Subject, ctx: int, batch: int, *, peaked: bool) -> None:
        self.subject, self.ctx = subject, ctx
        self.cache: LatentCache = subject.new_cache()
        self.cache.reserve(batch, tokens_held(ctx), subject.device)
        _randomise(self.cache, ctx**0.5 if peaked else 1.0)
        self.tokens = _first_tokens(subject, batch)
        self.cache.fill(ctx)

    def logits(self) -> Tensor:
        """``[B, V]`` of the first step, launched kernel by kernel; the cache stays as it was."""
        return self._logits(self.subject)

    def _logits(self, subject: Subject) -> Tensor:
        with subject.active():
            out = self._forward()
        self.cache.fill(self.ctx)
        return out

    def error(self) -> float:
        """Of the backend's logits against the reference's, on the same cache."""
        reference = replace(self.subject, backend="reference")
        return relative_error(self.logits(), self._logits(reference))

    def _forward(self) -> Tensor:
        past = self.cache.get_seq_length()
        return self.subject.model(
            input_ids=self.tokens[:, None],
            position_ids=torch.full_like(self.tokens, past)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    @contextmanager
    def stepping(self) -> Iterator[tuple[Callable[[], Tensor], str | None]]:
        """The step to time, and why it is not captured (None if it is)."""
        sampler = Sampler()
        generator = sampler.generator(self.tokens.device)
        with self.subject.active():
            try:
                captured = CapturedStep(self.subject, self.cache, self.tokens, sampler, generator)
            except CaptureError as error:
                yield self._step, str(error)
                return
            yield captured.replay, None
            captured.close()

    def _step(self) -> Tensor:
        self.tokens = self._forward().argmax(-1)
        return self.tokens


class _Static:
    """The dense model on transformers' static cache."""

    def __init__(self, subject: Subject, ctx: int, batch: int, *, peaked: bool) -> None:
        from transformers import StaticCache

        spec, device = subject.spec, subject.device
        self.model, self.ctx, room = subject.model, ctx, tokens_held(ctx)
        self.cache: Any = StaticCache(config=self.model.config, max_cache_len=room)
        like = torch.empty(
            batch, spec.n_kv_heads, 0, spec.head_dim, dtype=subject.base.dtype, device=device
        )
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)
        _randomise(self.cache, ctx**0.5 if peaked else 1.0)
        self.first = _first_tokens(subject, batch)
        self.tokens = self.first.clone()
        self.slots = torch.arange(room, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self._rewind()

    def _rewind(self) -> None:
        self.tokens.copy_(self.first)
        self.position.fill_(self.ctx)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.ctx)

    def _forward(self) -> Tensor:
        batch = len(self.tokens)
        # Ready in the form the model wants it, as `generate` prepares it for a static cache.
        mask = (self.slots <= self.position)[None, None, None].expand(batch, 1, 1, -1)
        return self.model(
            input_ids=self.tokens[:, None],
            attention_mask=mask,
            position_ids=self.position.expand(batch)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _step(self) -> Tensor:
        self.tokens.copy_(self._forward().argmax(-1))
        self.position += 1
        return self.tokens

    def logits(self) -> Tensor:
        """``[B, V]`` of the first step, launched kernel by kernel; the cache stays as it was."""
        out = self._forward()
        self._rewind()
        return out

    def error(self) -> float:
        """Of SDPA's own choice against its plain kernel, on the same cache."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        got = self.logits()
        with sdpa_kernel(SDPBackend.MATH):
            return relative_error(got, self.logits())

    @contextmanager
    def stepping(self) -> Iterator[tuple[Callable[[], Tensor], str | None]]:
        """The step to time, and why it is not captured (None if it is)."""
        device = self.tokens.device
        if device.type != "cuda":
            yield self._step, "CUDA graphs need a GPU"
            return
        try:
            graph = capture(self._step, device, reset=self._rewind)
        except CaptureError as error:
            yield self._step, str(error)
            return

        def replay() -> Tensor:
            graph.replay()
            return self.tokens

        yield replay, None
