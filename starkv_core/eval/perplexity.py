"""Perplexity over windows of a text, in one forward pass a window or token by token.

Both modes run on fresh caches of the subject and check that these were filled (:mod:`.deployed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv_core.engine import check_context
from starkv_core.errors import UserError
from starkv_core.eval.deployed import CacheBytes, check_path, measure, refuse_not_finite
from starkv_core.eval.steps import forced_steps
from starkv_core.eval.text import EvalText
from starkv_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from starkv_core.run import Subject

Mode = Literal["prefill", "token"]
MODES: tuple[Mode, ...] = ("prefill", "token")

_LOGITS = 2**26  # logits in memory at once: 256 MiB of float32


@dataclass(frozen=True)
class Windows:
    """Non-overlapping windows of one text.

    Attributes:
        ids: int64 ``[n, W]`` on the CPU.
        bytes_per_token: UTF-8 bytes of the text per token.
    """

    ids: Tensor
    bytes_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        count, window = self.ids.shape
        return {
            "windows": count,
            "window": window,
            "overlap": 0,
            "predicted_tokens": count * (window - 1),
            "bytes_per_token": self.bytes_per_token,
        }


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one subject.

    Attributes:
        mode: ``prefill`` or ``token``.
        nlls: mean negative log-likelihood of each window, nats per predicted token.
        tokens: predicted tokens: all but the first of each window.
        windows, window: how many, and tokens in each.
        bits_per_nat: bits per UTF-8 byte of the text for a nat per token.
        cache: bytes of the live cache at the end of the first batch of windows.
    """

    mode: Mode
    nlls: tuple[float, ...]
    tokens: int
    windows: int
    window: int
    bits_per_nat: float
    cache: CacheBytes

    @property
    def nll(self) -> float:
        """Mean over all windows, which are of one length."""
        return fmean(self.nlls)

    @property
    def bits_per_byte(self) -> float:
        """``nll`` in bits per UTF-8 byte of the text; comparable between tokenizers."""
        return self.nll * self.bits_per_nat

    @property
    def ppl(self) -> float:
        """``exp(nll)``; infinite where a float cannot hold it."""
        return math.exp(self.nll) if self.nll < 700.0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON; an infinite perplexity becomes None."""
        return {
            "mode": self.mode,
            "ppl": self.ppl if math.isfinite(self.ppl) else None,
            "nll": self.nll,
            "nlls": list(self.nlls),
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "windows": self.windows,
            "window": self.window,
            "cache": self.cache.to_dict(),
        }


def cut_windows(tokenizer: Any, text: EvalText, window: int, count: int | None = None) -> Windows:
    """Cut a text into windows of ``window`` tokens, at most ``count``; the rest is dropped.

    Raises:
        UserError: impossible sizes, or a text too short for one window.
    """
    if window < 2:
        raise UserError(f"window {window}: at least 2 tokens are needed to predict one")
    if count is not None and count < 1:
        raise UserError(f"windows {count}: must be 1 or more")
    found = len(text.ids) // window
    if found == 0:
        raise UserError(
            f"{text.source}: {len(text.ids)} tokens, too few for one window of {window}; "
            "give a longer text or a smaller window"
        )
    used = text.ids[: min(found, count or found) * window]
    decoded = tokenizer.decode(used, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Windows(torch.tensor(used).view(-1, window), len(decoded.encode()) / len(used))


@torch.no_grad()
def perplexity(
    subject: Subject,
    windows: Windows,
    *,
    mode: Mode = "prefill",
    batch: int = 1,
    progress: Progress = SILENT,
) -> PerplexityResult:
    """Perplexity of ``subject``, ``batch`` windows at a time.

    ``prefill`` predicts a window in one forward pass; quantised latents are then read as decode
    reads them (docs/design.md section 5), or their codes would not count at all. ``token`` feeds it
    token by token, so that every prediction reads what the cache holds.

    Raises:
        UserError: a window exceeds the model's context, or a prefill for a cache that only decode
            reads. A prediction is not finite; the first layer where that happens is named.
        RunFailure: the pass did not go through the compressed cache.
    """
    count, window = windows.ids.shape
    check_context(subject, window, f"window {window}")
    check_path(subject, mode)
    negative_logs = _by_prefill if mode == "prefill" else _by_token
    if mode == "prefill" and subject.compressed:
        subject = subject.with_prefill("coded")
    nlls: list[float] = []
    cache_bytes: list[CacheBytes] = []
    name = f"perplexity, {mode}, {subject.name}"
    with subject.active(), progress.task(name, count * (window - 1), "tok") as task:
        for part in windows.ids.split(batch):
            cache = subject.new_cache()
            total = torch.zeros(len(part), dtype=torch.float64, device=subject.device)
            for nll in negative_logs(subject, part.to(subject.device), cache):
                total += nll.double().sum(-1).to(total.device)
                task.advance(nll.numel())
            cache_bytes.append(measure(subject, cache, part.shape[0]))
            nlls += (total / (window - 1)).tolist()
            if not math.isfinite(sum(nlls)):
                break
    suspect = next((i for i, nll in enumerate(nlls) if not math.isfinite(nll)), None)
    if suspect is not None:
        fed = windows.ids[suspect, :-1].tolist()
        once = len(fed) if mode == "prefill" else 0
        refuse_not_finite(subject, [(fed[:once], fed[once:])])
    return PerplexityResult(
        mode=mode,
        nlls=tuple(nlls),
        tokens=count * (window - 1),
        windows=count,
        window=window,
        bits_per_nat=1.0 / math.log(2.0) / windows.bytes_per_token,
        cache=cache_bytes[0],
    )


def _by_prefill(subject: Subject, ids: Tensor, cache: Any) -> Iterator[Tensor]:
    """One pass over ``[B, W]``; logits come in pieces, for vocabularies of 150k and more."""
    model = subject.model
    hidden = model.base_model(
        input_ids=ids, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, :-1]
    targets = ids[:, 1:]
    head = model.get_output_embeddings()
    piece = max(1, _LOGITS // (subject.spec.vocab * ids.shape[0]))
    for states, wanted in zip(hidden.split(piece, 1), targets.split(piece, 1), strict=True):
        yield _nll(head(states), wanted)


def _by_token(subject: Subject, ids: Tensor, cache: Any) -> Iterator[Tensor]:
    """One token a step over ``[B, W]``, through the cache."""
    for step, logits in enumerate(forced_steps(subject, ids[:, :-1], cache)):
        yield _nll(logits[:, None], ids[:, step + 1 : step + 2])


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, float32 ``[B, L]``, of ``targets`` under ``[B, L, V]``."""
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten().to(logits.device), reduction="none"
    )
    return flat.view(targets.shape)
