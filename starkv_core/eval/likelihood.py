"""Log-likelihoods of continuations on the deployed path: in one prefill, or token by token.

A prefill predicts all of a continuation in one pass. It attends to keys and values rebuilt from the
latents of that pass, of a quantised run to the exact ones: no code is read. On the decode path the
last token of the context and the continuation go through the cache one by one, so that every
prediction reads what generation reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from starkv_core.eval.deployed import CacheBytes, check_path, measure, refuse_not_finite
from starkv_core.eval.steps import forced_steps

if TYPE_CHECKING:
    from starkv_core.run import Subject

Path = Literal["prefill", "decode"]

_LOGITS = 2**26  # logits in memory at once: 256 MiB of float32


@dataclass(frozen=True)
class Request:
    """What to score: token ids of a context, one at least, and of what follows it, one at least."""

    context: list[int]
    targets: list[int]

    @property
    def inputs(self) -> list[int]:
        """What is fed: everything but the last token."""
        return [*self.context, *self.targets[:-1]]


@dataclass(frozen=True)
class Score:
    """Of one continuation.

    Attributes:
        log_likelihood: sum over its tokens, nats.
        greedy: whether each of its tokens is the most likely one.
    """

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def score(
    subject: Subject, requests: Sequence[Request], path: Path
) -> tuple[list[Score], CacheBytes]:
    """Score a batch of requests on a fresh cache; shorter rows are padded and padding not read.

    Contexts of a subject whose cache is coded must be of one length on the decode path: padding on
    the left would change what is coded.

    Raises:
        UserError: a prediction that is not finite; the first layer where that happens is named. A
            prefill for a cache that only decode reads.
        RunFailure: the pass did not go through the compressed cache.
    """
    check_path(subject, path)
    device = subject.device
    lengths = [len(request.targets) for request in requests]
    rows = torch.arange(len(requests), device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )
    total = torch.zeros(len(requests), dtype=torch.float64, device=device)
    misses = torch.zeros(len(requests), dtype=torch.long, device=device)
    cache = subject.new_cache()
    predictions = _by_prefill if path == "prefill" else _by_decode
    with subject.active():
        for at, logits, targets in predictions(subject, requests, rows, cache):
            at = at.to(logits.device)
            found = logits.float().log_softmax(-1).gather(-1, targets[:, None].to(logits.device))
            total.index_add_(0, at.to(device), found[:, 0].double().to(device))
            wrong = logits.argmax(-1) != targets.to(logits.device)
            misses.index_add_(0, at.to(device), wrong.long().to(device))
    held = measure(subject, cache, len(requests))
    finite = total.isfinite().tolist()
    if not all(finite):
        suspect = requests[finite.index(False)]
        once = suspect.inputs if path == "prefill" else suspect.context[:-1]
        refuse_not_finite(subject, [(once, suspect.inputs[len(once) :])])
    return [
        Score(value, missed == 0)
        for value, missed in zip(total.tolist(), misses.tolist(), strict=True)
    ], held


_Predictions = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Rows ``[n]``, logits ``[n, V]`` and the int64 tokens ``[n]`` they should predict."""


def _by_prefill(
    subject: Subject, requests: Sequence[Request], rows: Tensor, cache: Any
) -> _Predictions:
    """One pass; padding is on the right, where no token before it looks."""
    ids = _padded([request.inputs for request in requests], left=False).to(subject.device)
    hidden = subject.model.base_model(
        input_ids=ids, past_key_values=cache, use_cache=True
    ).last_hidden_state
    slots = torch.cat(
        [
            torch.arange(len(request.context) - 1, len(request.inputs), device=subject.device)
            for request in requests
        ]
    )
    targets = torch.tensor([t for r in requests for t in r.targets], device=subject.device)
    states = hidden[rows.to(hidden.device), slots.to(hidden.device)]
    head = subject.model.get_output_embeddings()
    piece = max(1, _LOGITS // subject.spec.vocab)
    for part in torch.arange(len(rows), device=subject.device).split(piece):
        yield rows[part], head(states[part.to(states.device)]), targets[part]


def _by_decode(
    subject: Subject, requests: Sequence[Request], rows: Tensor, cache: Any
) -> _Predictions:
    """All of a context but its last token in one pass, padded on the left; the rest in steps."""
    prefixes = [request.context[:-1] for request in requests]
    longest = max(map(len, prefixes))
    if not subject.mixes_lengths and min(map(len, prefixes)) < longest:
        raise ValueError("contexts of different lengths in a batch of a coded cache")
    mask: Tensor | None = None
    if longest:
        seen = _padded([[1] * len(prefix) for prefix in prefixes], left=True)
        if not bool(seen.all()):
            mask = seen.to(subject.device)
        positions = (seen.cumsum(-1) - 1).clamp(min=0).to(subject.device)
        subject.model.base_model(
            input_ids=_padded(prefixes, left=True).to(subject.device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    fed = _padded([[r.context[-1], *r.targets[:-1]] for r in requests], left=False)
    wanted = _padded([r.targets for r in requests], left=False).to(subject.device)
    lengths = torch.tensor([len(r.targets) for r in requests], device=subject.device)
    steps = forced_steps(subject, fed.to(subject.device), cache, mask)
    for step, logits in enumerate(steps):
        live = (lengths > step).nonzero()[:, 0]
        yield live, logits[live.to(logits.device)], wanted[live, step]


def _padded(rows: Sequence[Sequence[int]], *, left: bool) -> Tensor:
    """Int64 ``[B, L]``: rows of ids filled up with 0 on one side."""
    longest = max(map(len, rows))
    out = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        start = longest - len(row) if left else 0
        out[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
    return out
