"""Suite ``prefill``: time to the first token, the compressed model beside the dense one.

Ours writes latents, or codes of them, and rebuilds keys and values a layer at a time for SDPA; the
dense model is transformers' own on a dynamic cache (``sdpa-default``). All share one set of
weights. A prompt attends to its own exact latents and is coded afterwards, within the time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from starkv_core.bench.gate import LOGITS_LIMIT, fault, relative_error
from starkv_core.bench.outcome import Measured
from starkv_core.bench.plan import Need, slot_tables
from starkv_core.bench.records import CODED
from starkv_core.bench.shapes import Shape
from starkv_core.bench.timing import measure_steps, peak_bytes, release
from starkv_core.budget import predict_bytes
from starkv_core.rank_map import RankMap
from starkv_core.run import Subject

DENSE, STARKV = BACKENDS = ("sdpa-default", "starkv")
"""Those of every shape; one that is coded has :data:`CODED` beside them."""
_LEAST_RUNS, _MOST_RUNS = 4, 10
_GATE_PROMPT = 600  # tokens: several tiles of SDPA, and not whole ones
_GATE_CHUNK, _GATE_REST = 300, 8  # of the first chunk; read back from the cache one by one


def cache_bytes(shape: Shape, backend: str, ctx: int, batch: int) -> int:
    """Bytes of the cache of all layers after the prompt."""
    if backend == CODED:
        coded = shape.codes
        return predict_bytes(shape.spec, coded.ranks, ctx, batch, codes=coded.codes)
    dense = RankMap((None,) * shape.spec.n_layers)
    return predict_bytes(shape.spec, shape.ranks if backend == STARKV else dense, ctx, batch)


def need(shape: Shape, backend: str, ctx: int, batch: int) -> Need:
    """Memory of one side: weights, cache, and the widest moment of one layer."""
    spec, tokens = shape.spec, batch * ctx
    parts = {"weights": 2 * shape.parameters, "cache": cache_bytes(shape, backend, ctx, batch)}
    # Hidden states, the MLP (its width is taken as four times theirs), queries in float32.
    parts["activations"] = tokens * (64 * spec.hidden + 16 * spec.n_heads * spec.head_dim)
    if backend != DENSE:
        coded = backend == CODED
        parts["factors"] = 2 * shape.factor_numbers(coded)
        ranks = (shape.codes.ranks if coded else shape.ranks).layers
        if coded:  # of a layer: what is rounded, and the codes before they are packed
            parts["coding"] = 24 * tokens * max(x.total for x in ranks if x is not None)
        parts["tables"] = 2 * slot_tables(spec, ctx)  # growth doubles them
        parts["rebuilt keys and values"] = 20 * tokens * spec.kv_width
    parts["margin"] = 3 << 29
    return Need(parts)


def run_case(subject: Subject, ctx: int, batch: int, *, checked: bool) -> Measured:
    """Gate and time one side.

    Args:
        subject: dense for ``sdpa-default``.
        checked: whether this side has passed its gate already.
    """
    device, error = subject.device, None
    with torch.no_grad():
        release(device)
        if not checked:
            error, found = _gate(subject)
            if found is not None:
                return Measured(None, error, found)
        release(device)
        with subject.active():
            prompt = _prompt(subject, ctx, batch)
            if not math.isfinite(float(_first(subject, prompt).sum())):
                return Measured(None, error, "wrong: the logits are not finite; no time is shown")
            timing = measure_steps(
                lambda: _first(subject, prompt).argmax(-1),
                device,
                graph=False,
                least=_LEAST_RUNS,
                most=_MOST_RUNS,
            )
        return Measured(timing, error, peak=peak_bytes(device))


def _prompt(subject: Subject, ctx: int, batch: int) -> Tensor:
    generator = torch.Generator(subject.device).manual_seed(7)
    size, device = (batch, ctx), subject.device
    return torch.randint(0, subject.spec.vocab, size, generator=generator, device=device)


def _new_cache(subject: Subject) -> Any:
    from transformers import DynamicCache

    return subject.new_cache() if subject.compressed else DynamicCache()


def _first(subject: Subject, prompt: Tensor, cache: Any = None) -> Tensor:
    """Float32 logits ``[B, V]`` that follow the prompt, from an empty cache unless one is given."""
    out = subject.model(
        input_ids=prompt,
        past_key_values=_new_cache(subject) if cache is None else cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1].float()


def _gate(subject: Subject) -> tuple[float, str | None]:
    """Error of the logits of a prompt, and why the subject is refused, or None.

    The whole prompt at once is held to the same in parts, which take other paths. Two chunks, the
    second over a cache and so under a mask, end within a tile of SDPA; the last tokens come one by
    one. For ours those are read by latent attention, for the dense model by SDPA over cached keys.
    """
    prompt, limit = _prompt(subject, _GATE_PROMPT, 1), LOGITS_LIMIT[subject.base.dtype]
    used = _new_cache(subject)
    with subject.active():
        whole = _first(subject, prompt, used)
    if any(codes.prefill == "exact" for codes in subject.codes.values()):
        return _coded_gate(subject, prompt, whole, used, limit)
    parts = [_GATE_CHUNK, _GATE_PROMPT - _GATE_CHUNK - _GATE_REST, *[1] * _GATE_REST]
    cache = _new_cache(subject)
    with subject.active():
        for part in prompt.split(parts, dim=1):
            stepwise = _first(subject, part, cache)
    error = relative_error(whole, stepwise)
    return error, fault(error, limit)


def _coded_gate(
    subject: Subject, prompt: Tensor, whole: Tensor, used: Any, limit: float
) -> tuple[float, str | None]:
    """The same where later parts would see codes, and the whole prompt has not.

    The parts go through a cache of the same latents in 16 bits. What the prompt has left in codes
    may lie no further from those than codes of them do, but for what rounding moves.

    Args:
        whole: logits of the prompt at once.
        used: the packed cache that it has filled.
    """
    weights = {i: replace(held, codes=None) for i, held in subject.weights.items()}
    plain = replace(subject, weights=weights)
    cache = plain.new_cache()
    with plain.active():
        for part in prompt.split(_GATE_CHUNK, dim=1):
            chunked = _first(plain, part, cache)
    error = relative_error(whole, chunked)
    found = fault(error, limit)
    for i, codes in subject.codes.items():
        held = used.layers[i].latents(0, prompt.shape[1])
        for got, exact, codec in zip(
            held, cache.layers[i].buffers(), (codes.keys, codes.values), strict=True
        ):
            want = exact[:, : got.shape[1], : got.shape[2]].float()
            least = relative_error(codec.seen(want), want)
            if not relative_error(got, want) <= 1.05 * least + limit:
                found = found or (
                    f"wrong: layer {i}: codes are off by {relative_error(got, want):.2g}, those of "
                    f"the same latents by {least:.2g}; no time is shown"
                )
    return error, found
