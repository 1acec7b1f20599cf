"""The one generation loop: prefill, then one token a step, always on the subject's own cache.

Evaluation and chat both go through :func:`stream`, so what is measured is what is deployed
(docs/design.md section 7).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starkv_core.cache import LatentCache
from starkv_core.decode import CapturedStep, CaptureError
from starkv_core.errors import UserError

if TYPE_CHECKING:
    from starkv_core.run import Subject

_LOG = logging.getLogger(__name__)
LEAST_CAPTURED = 16  # steps from which a capture pays for itself


@dataclass(frozen=True)
class Sampler:
    """How the next token is picked from its logits.

    Attributes:
        temperature: divides the logits; 0 is greedy, and then the rest has no effect.
        top_p: smallest set of tokens whose probabilities sum to at least this; 1 keeps all.
        top_k: keep only this many most likely tokens; 0 keeps all.
        seed: of the draws; equal seeds give equal answers on one machine.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not self.temperature >= 0.0:
            faults.append(f"temperature {self.temperature:g}: must be 0 (greedy) or more")
        if not 0.0 < self.top_p <= 1.0:
            faults.append(f"top_p {self.top_p:g}: must be above 0 and at most 1")
        if self.top_k < 0:
            faults.append(f"top_k {self.top_k}: must be 0 (all) or more")
        if faults:
            raise UserError.many("sampling", faults)

    def generator(self, device: torch.device) -> torch.Generator:
        """A fresh source of draws on ``device``."""
        return torch.Generator(device=device).manual_seed(self.seed)

    def pick(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Next token of every row: ``[B, V]`` of any float dtype to int64 ``[B]``."""
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        scores = logits.float() / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            floor = scores.topk(self.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < floor, float("-inf"))
        if self.top_p < 1.0:
            ordered, order = scores.softmax(dim=-1).sort(dim=-1, descending=True)
            # A token stays when those before it have not reached top_p yet: the first always does.
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p
            scores = scores.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
        # The largest p / Exp(1) is token i with probability p_i; unlike torch.multinomial it can be
        # captured in a CUDA graph.
        chances = scores.softmax(dim=-1)
        return (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1)


def end_tokens(subject: Subject) -> tuple[int, ...]:
    """Ids that end an answer: those of the generation config and of the tokenizer."""
    config = getattr(subject.model, "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    ids = set(named if isinstance(named, (list, tuple)) else [named])
    ids.add(getattr(subject.tokenizer, "eos_token_id", None))
    return tuple(sorted(i for i in ids if i is not None))


def check_context(subject: Subject, needed: int, what: str) -> None:
    """Refuse ``needed`` positions when the model has fewer.

    Raises:
        UserError: naming both numbers.
    """
    if needed > subject.max_positions:
        raise UserError(
            f"{what}: {needed} tokens do not fit the context of {subject.name}, which is "
            f"{subject.max_positions} tokens; shorten it"
        )


def check_ids(subject: Subject, ids: Iterable[int]) -> None:
    """Refuse token ids that the model does not know (UserError)."""
    largest = max(ids, default=0)
    if largest >= subject.spec.vocab:
        raise UserError(
            f"{subject.name}: its tokenizer makes token {largest}, the model knows "
            f"{subject.spec.vocab}: it belongs to another model"
        )


def stream(
    subject: Subject,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    *,
    sampler: Sampler,
    cache: Any | None = None,
    prefill_chunk: int | None = None,
) -> Generator[Tensor, None, None]:
    """Generate up to ``max_new_tokens`` tokens a row, one step at a time.

    On a GPU the steps after the prompt are replays of one CUDA graph where that can be captured;
    where it cannot, the log says why and the steps run one by one, with the same tokens.

    Args:
        subject: model, compressed or dense.
        input_ids: int64 ``[B, L]``, the new tokens, ragged rows padded on the left. With a
            ``cache``, only what it does not hold yet.
        attention_mask: int64 ``[B, P + L]``, 0 for padding, where P is what ``cache`` holds;
            None when nothing is padded.
        max_new_tokens: most tokens to generate.
        sampler: how tokens are picked.
        cache: cache of earlier turns; None starts on ``subject.new_cache()``. It is left holding
            every token but the last one yielded.
        prefill_chunk: most prompt tokens in one forward pass; None takes all at once.

    Yields:
        int64 ``[B]`` on the subject's device. A row that has ended yields padding (the end token
        where there is no padding token); the last step is the one where every row has ended.

    Raises:
        UserError: prompt and answer exceed the model's context; nothing has been computed then.
    """
    past = 0 if cache is None else int(cache.get_seq_length())
    batch, length = input_ids.shape
    if batch == 0 or length == 0:
        raise UserError("the prompt is empty")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: must be 1 or more")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise UserError(f"prefill_chunk {prefill_chunk}: must be 1 or more")
    check_context(
        subject, past + length + max_new_tokens, f"{past + length} + {max_new_tokens} new tokens"
    )
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch, past + length):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)}, expected {(batch, past + length)}"
            )
        if not bool((attention_mask.diff(dim=-1) >= 0).all() & attention_mask[:, -1].all()):
            raise ValueError("attention_mask: padding must be on the left")
        if bool(attention_mask.all()):
            attention_mask = None
    return _steps(
        subject,
        input_ids.to(subject.device),
        None if attention_mask is None else attention_mask.to(subject.device),
        max_new_tokens,
        sampler,
        subject.new_cache() if cache is None else cache,
        prefill_chunk or length,
    )


@torch.no_grad()
def _steps(
    subject: Subject,
    tokens: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    sampler: Sampler,
    cache: Any,
    chunk: int,
) -> Generator[Tensor, None, None]:
    generator = sampler.generator(tokens.device)
    ends = torch.tensor(end_tokens(subject), dtype=torch.long, device=tokens.device)
    padding = getattr(subject.tokenizer, "pad_token_id", None)
    if padding is None:
        padding = int(ends[0]) if len(ends) else 0
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    past = int(cache.get_seq_length())
    captured: CapturedStep | None = None
    with subject.active():
        try:
            for step in range(max_new_tokens):
                if captured is not None:
                    captured.tokens.copy_(tokens[:, 0])
                    following = captured.replay().clone()
                else:
                    for part in tokens.split(chunk, dim=1):
                        past += part.shape[1]
                        logits = _forward(subject, part, mask, past, cache)
                    following = sampler.pick(logits, generator)
                following = following.masked_fill(ended, padding)
                ended = ended | torch.isin(following, ends)
                yield following
                if step + 1 == max_new_tokens or bool(ended.all()):
                    return
                tokens = following[:, None]
                if mask is not None:
                    mask = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), dim=1)
                if step == 0 and max_new_tokens > LEAST_CAPTURED:
                    captured = captured_steps(
                        subject, cache, following, sampler, generator, mask, max_new_tokens
                    )
        finally:
            if captured is not None:
                captured.close()


def captured_steps(
    subject: Subject,
    cache: Any,
    tokens: Tensor,
    sampler: Sampler,
    generator: torch.Generator,
    mask: Tensor | None,
    steps: int,
) -> CapturedStep | None:
    """The ``steps`` to come as replays of one graph, or None where that is not possible.

    Arguments as :class:`CapturedStep` has them; the log says why not, but for want of a GPU.
    """
    if tokens.device.type != "cuda" or not isinstance(cache, LatentCache):
        return None
    first = None if mask is None else (mask == 0).sum(dim=-1, dtype=torch.int32)
    try:
        cache.reserve(len(tokens), cache.get_seq_length() + steps, tokens.device)
        return CapturedStep(subject, cache, tokens, sampler, generator, first)
    except (CaptureError, torch.cuda.OutOfMemoryError) as error:
        _LOG.warning("decoding without a CUDA graph: %s", error)
        return None


def _forward(subject: Subject, part: Tensor, mask: Tensor | None, past: int, cache: Any) -> Tensor:
    """Feed slots ``past - l .. past - 1``; logits ``[B, V]`` that follow the last of them."""
    count = part.shape[1]
    if mask is None:
        positions = torch.arange(past - count, past, device=part.device).expand(part.shape[0], -1)
    else:
        mask = mask[:, :past]
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -count:]
    output = subject.model(
        input_ids=part,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
