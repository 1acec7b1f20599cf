"""Suite ``decode``: one step of a whole model for every row, sampling included, as a CUDA graph.

Ours is the engine's own captured step on a reserved cache; beside it stands transformers' static
cache under the same forward, captured alike (``static-graph``). Both share one set of weights, and
both are greedy. The caches hold random numbers: speed does not depend on them. The logits of the
very step that is timed are held to another path through the same cache, some rows at its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from starkv_core.attention import DECODE_QUERIES
from starkv_core.bench.codes import step_bytes
from starkv_core.bench.gate import (
    LOGITS_LIMIT,
    fault,
    greedy_fault,
    relative_error,
    rows_checked,
)
from starkv_core.bench.outcome import Measured
from starkv_core.bench.packed import cache_parts, fill_random
from starkv_core.bench.plan import Need, coded_work, latent_work, slot_tables
from starkv_core.bench.records import CODED
from starkv_core.bench.shapes import Shape
from starkv_core.bench.timing import measure_steps, peak_bytes, release
from starkv_core.budget import predict_bytes, slots
from starkv_core.cache import LatentCache
from starkv_core.decode import CapturedStep
from starkv_core.engine import Sampler
from starkv_core.graphs import CaptureError, capture
from starkv_core.packed import PackedLayer
from starkv_core.rank_map import RankMap
from starkv_core.run import Subject

STATIC, STARKV = BACKENDS = ("static-graph", "starkv")
"""Those of every shape; one that is coded has :data:`CODED` beside them."""
ROOM = 256  # slots kept for the steps that are timed, on both sides
_CHUNK = DECODE_QUERIES + 1  # tokens from which latents are not read as they are


def tokens_held(ctx: int) -> int:
    """Slots of the cache of either side: the context and room for steps."""
    return slots(ctx) + ROOM


def cache_bytes(shape: Shape, backend: str, ctx: int, batch: int) -> int:
    """Bytes of the cache of all layers, with its room for steps."""
    if backend == CODED:
        coded = shape.codes
        return predict_bytes(shape.spec, coded.ranks, tokens_held(ctx), batch, codes=coded.codes)
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
    ranks = subject.ranks.layers if subject.ranks is not None else (None,) * spec.n_layers
    numbers = coded = 0
    for i, layer in enumerate(ranks):
        held = min(ctx, spec.windows[i] - 1) if i in spec.windows else ctx
        if layer is None:
            numbers += held * 2 * spec.kv_width
            continue
        weights -= 2 * spec.kv_width * spec.hidden
        up = spec.kv_width * sum(layer.values) + sum(layer.keys) * spec.head_dim
        weights += layer.total * spec.hidden + up
        if i in subject.codes:
            coded += step_bytes(subject.codes[i], ctx)
        else:
            numbers += ctx * layer.stored
    return 2 * (weights + batch * numbers) + batch * coded


def need(shape: Shape, backend: str, ctx: int, batch: int) -> Need:
    """Memory of one side: weights (for ours the factors beside them), cache, one layer's work."""
    spec = shape.spec
    parts = {"weights": 2 * shape.parameters, "cache": cache_bytes(shape, backend, ctx, batch)}
    held = tokens_held(ctx)
    work = batch * (8 * spec.vocab + 64 * spec.hidden)
    if backend == STARKV:
        parts["factors"] = 2 * shape.factor_numbers()
        parts["tables"] = 2 * slot_tables(spec, held)  # growth doubles them
        layers = {layer for layer in shape.ranks.layers if layer is not None}
        work += max(latent_work(spec, layer, batch, held) for layer in layers)
    elif backend == CODED:
        parts["factors"] = 2 * shape.factor_numbers(coded=True)
        parts["tables"] = 2 * slot_tables(spec, held)
        coded = shape.codes
        work += max(
            # The gate reads a row of a layer in float32, before the step needs its own.
            max(
                coded_work(spec, codes, coded.owners[i], batch, held),
                24 * held * (codes.keys.layout.channels + codes.values.layout.channels),
            )
            for i, codes in coded.codes.items()
        )
    elif spec.group > 1:
        # Under a mask transformers repeats keys and values for the heads that share them.
        work += 2 * 2 * batch * held * spec.n_heads * spec.head_dim
    parts["work"] = work
    parts["margin"] = 3 << 29
    return Need(parts)


def run_case(subject: Subject, backend: str, ctx: int, batch: int) -> Measured:
    """Gate and time one side; ``subject`` is dense for ``static-graph``."""
    device, dtype = subject.device, subject.base.dtype
    limit = LOGITS_LIMIT[dtype]
    side = _Static if backend == STATIC else _Compressed
    with torch.no_grad():
        release(device)
        made, rows = side(subject, ctx, batch), rows_checked(batch)
        held, parts = made.nbytes, made.parts()
        want = made.reference(rows)
        release(device)
        with made.stepping() as (step, why_not):
            tokens, logits = step()
            error = relative_error(logits[rows], want)
            found = fault(error, limit) or greedy_fault(tokens, logits)
            if found is not None:
                return Measured(None, error, found)
            timing = measure_steps(step, device, graph=why_not is None)
        peak = peak_bytes(device)
        found = made.stored_fault()
        if found is not None:
            return Measured(None, error, found)
    note = why_not and f"not captured: {why_not}"
    return Measured(timing, error, peak=peak, note=note, cache=held, parts=parts)


def _first_tokens(subject: Subject, batch: int) -> Tensor:
    generator = torch.Generator(subject.device).manual_seed(7)
    return torch.randint(
        0, subject.spec.vocab, (batch,), generator=generator, device=subject.device
    )


def _randomise(caches: Any, ctx: int) -> None:
    """Fill the buffers of a cache's layers.

    Random values cancel out over a long context. Scaled by the root of its length they do not, so
    that a wrong attention shows in the logits; codes have that in their steps.
    """
    for i, layer in enumerate(caches.layers):
        if isinstance(layer, PackedLayer):
            fill_random(layer, ctx, i, ctx**0.5)
            continue
        generator = torch.Generator(layer.keys.device).manual_seed(i)
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator).mul_(ctx**0.5)


@contextmanager
def _only(caches: Any, row: int) -> Iterator[None]:
    """Within, a cache has one of its rows alone, and what is written goes there.

    Of packed layers to a copy: a window is a ring, and the step to come must code for itself.
    """
    whole = [dict(vars(layer)) for layer in caches.layers]
    one = slice(row, row + 1)
    for layer in caches.layers:
        layer.keys, layer.values = layer.keys[one], layer.values[one]
        if isinstance(layer, PackedLayer):
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            for name in ("key_rows", "value_rows"):
                rows = copy(getattr(layer, name))
                rows.change(lambda t: t[one].clone())
                setattr(layer, name, rows)
            # Several tokens are to see what each would see alone.
            layer.layer_codes = replace(layer.layer_codes, prefill="coded")
    try:
        yield
    finally:
        for layer, held in zip(caches.layers, whole, strict=True):
            vars(layer).update(held)


Step = Callable[[], tuple[Tensor, Tensor]]
"""Runs a step: the tokens it picked ``[B]`` and the logits ``[B, V]`` they come from."""


class _Compressed:
    """The compressed model on a reserved latent cache."""

    def __init__(self, subject: Subject, ctx: int, batch: int) -> None:
        self.subject, self.ctx = subject, ctx
        self.cache: LatentCache = subject.new_cache()
        self.cache.reserve(batch, tokens_held(ctx), subject.device)
        _randomise(self.cache, ctx)
        self.tokens = _first_tokens(subject, batch)
        self.cache.fill(ctx)
        # Of the first packed layer: what the steps will code, as it reads exact.
        packed = [layer for layer in self.cache.layers if isinstance(layer, PackedLayer)]
        self.watched = packed[0] if packed else None
        if self.watched is not None:
            leaving = self.watched.coded, self.cache.get_seq_length()
            self.leaving = leaving, self.watched.latents(*leaving)

    def stored_fault(self) -> str | None:
        """Why what the timed steps coded is not what they should have, or None.

        The steps may have run past the window; what left it by then is checked, bit for bit.
        """
        layer = self.watched
        if layer is None:
            return None
        (start, stop), exact = self.leaving
        stop = max(start, min(stop, layer.coded))
        codes = layer.layer_codes
        found = layer.latents(start, stop)
        for codec, rows, got in zip((codes.keys, codes.values), exact, found, strict=True):
            if not torch.equal(codec.seen(rows[:, : stop - start]), got):
                return "tokens that left the window are not coded as they should be"
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    def parts(self) -> dict[str, int] | None:
        """The same by what they are for, where it holds codes."""
        return cache_parts(self.cache) if self.subject.codes else None

    def reference(self, rows: list[int]) -> Tensor:
        """``[rows, V]``: logits of the first step by the reference backend.

        That backend itself is held to SDPA over rebuilt keys, which is what more tokens take: the
        first of several sees what it would see alone. The cache stays as it was.
        """
        itself = self.subject.backend == "reference"
        with replace(self.subject, backend="reference").active():
            return torch.cat([self._row(row, _CHUNK if itself else 1) for row in rows])

    def _row(self, row: int, count: int) -> Tensor:
        with _only(self.cache, row):
            return self._forward(self.tokens[row].expand(1, count))[:, 0]

    def _forward(self, tokens: Tensor) -> Tensor:
        past, count = self.cache.get_seq_length(), tokens.shape[1]
        places = torch.arange(past, past + count, device=tokens.device)
        return self.subject.model(
            input_ids=tokens,
            position_ids=places.expand_as(tokens),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=count,
        ).logits

    @contextmanager
    def stepping(self) -> Iterator[tuple[Step, str | None]]:
        """The step to time, and why it is not captured (None if it is)."""
        sampler = Sampler()
        generator = sampler.generator(self.tokens.device)
        with self.subject.active():
            try:
                captured = CapturedStep(self.subject, self.cache, self.tokens, sampler, generator)
            except CaptureError as error:
                yield self._step, str(error)
                return
            yield lambda: (captured.replay(), captured.logits), None
            captured.close()

    def _step(self) -> tuple[Tensor, Tensor]:
        logits = self._forward(self.tokens[:, None])[:, -1]
        self.tokens = logits.argmax(-1)
        return self.tokens, logits


class _Static:
    """The dense model on transformers' static cache."""

    logits: Tensor

    def __init__(self, subject: Subject, ctx: int, batch: int) -> None:
        from transformers import StaticCache

        spec, device = subject.spec, subject.device
        self.model, self.ctx, room = subject.model, ctx, tokens_held(ctx)
        self.cache: Any = StaticCache(config=self.model.config, max_cache_len=room)
        like = torch.empty(
            batch, spec.n_kv_heads, 0, spec.head_dim, dtype=subject.base.dtype, device=device
        )
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)
        _randomise(self.cache, ctx)
        self.first = _first_tokens(subject, batch)
        self.tokens = self.first.clone()
        self.slots = torch.arange(room, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self._rewind()

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))

    def stored_fault(self) -> None:
        """What transformers stores is not checked."""

    def parts(self) -> None:
        """A dense cache has but one."""

    def _rewind(self) -> None:
        self.tokens.copy_(self.first)
        self.position.fill_(self.ctx)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.ctx)

    def _forward(self, tokens: Tensor) -> Tensor:
        batch = len(tokens)
        # Ready in the form the model wants it, as `generate` prepares it for a static cache.
        mask = (self.slots <= self.position)[None, None, None].expand(batch, 1, 1, -1)
        return self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self.position.expand(batch)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _step(self) -> None:
        self.logits = self._forward(self.tokens)
        self.tokens.copy_(self.logits.argmax(-1))
        self.position += 1

    def reference(self, rows: list[int]) -> Tensor:
        """``[rows, V]``: logits of the first step by SDPA's plain kernel.

        The cache stays as it was.
        """
        from torch.nn.attention import SDPBackend, sdpa_kernel

        found = []
        for row in rows:
            with _only(self.cache, row), sdpa_kernel(SDPBackend.MATH):
                found.append(self._forward(self.first[row : row + 1]))
            self._rewind()
        return torch.cat(found)

    @contextmanager
    def stepping(self) -> Iterator[tuple[Step, str | None]]:
        """The step to time, and why it is not captured (None if it is)."""
        run, why_not = self._step, None
        try:
            run = capture(self._step, self.tokens.device, reset=self._rewind).replay
        except CaptureError as error:
            why_not = str(error)

        def step() -> tuple[Tensor, Tensor]:
            run()
            return self.tokens, self.logits

        yield step, why_not
