"""The two figures of the model card: held-out perplexity and retrieval accuracy, dense model."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from starkv_core.eval.retrieval_tasks import RetrievalPrompt, TokenIds, make_prompt


@dataclass(frozen=True)
class Perplexity:
    """``per_token`` = exp(mean negative log-likelihood); ``bits_per_byte`` of the UTF-8 text."""

    per_token: float
    bits_per_byte: float
    tokens: int


@torch.inference_mode()
def perplexity(
    model: Any, tokenizer: Any, documents: Sequence[str], window: int, batch: int = 4
) -> Perplexity:
    """Perplexity over non-overlapping windows of the documents, each ended with eos.

    The first token of a window has no context and is not scored; text after the last whole window
    is left out. Bits per byte spread the loss per token over the mean bytes per token of the text.
    """
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    count = len(ids) // window
    rows = torch.tensor(ids[: count * window], device=model.device).view(count, window)
    total = 0.0
    for chunk in rows.split(batch):
        logits = model(chunk, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum"
        ).item()
    loss = total / (count * (window - 1))
    text_bytes = sum(len(document.encode()) for document in documents)
    return Perplexity(math.exp(loss), loss / math.log(2) * len(ids) / text_bytes, count * window)


@torch.inference_mode()
def answered(model: Any, prompts: Sequence[RetrievalPrompt], batch: int = 8) -> list[bool]:
    """Whether greedy decoding would answer each prompt right, token for token.

    One pass over prompt plus answer decides it: greedy decoding produces the answer exactly when
    every answer token is the arg max after the true tokens before it. All prompts must have one
    length and one answer length.
    """
    right: list[bool] = []
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        answers = torch.tensor([prompt.answer_ids for prompt in group], device=model.device)
        inputs = torch.tensor([prompt.input_ids for prompt in group], device=model.device)
        length = answers.shape[1]
        whole = torch.cat([inputs, answers], dim=1)[:, :-1]
        logits: Tensor = model(whole, use_cache=False, logits_to_keep=length).logits
        right += (logits.argmax(-1) == answers).all(dim=1).tolist()
    return right


def retrieval_prompts(
    task: str, tokenizer: Any, filler_ids: TokenIds, length: int, count: int, seed: int
) -> list[RetrievalPrompt]:
    """``count`` prompts of one length, depths evenly spread over 0..1."""
    rng = random.Random(f"{seed}/{task}/{length}")
    return [
        make_prompt(task, tokenizer, filler_ids, length, i / max(count - 1, 1), rng)
        for i in range(count)
    ]


def evaluate(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    lengths: Sequence[int],
    prompts: int,
    seed: int,
) -> dict[str, Any]:
    """Perplexity at windows of 1024 and 2048 and accuracy (0..1) per task and prompt length."""
    model.eval()
    filler = [i for d in documents for i in tokenizer.encode(d, add_special_tokens=False)]
    accuracy: dict[str, dict[str, float]] = {}
    for task in ("passkey", "kv"):
        accuracy[task] = {}
        for length in lengths:
            asked = retrieval_prompts(task, tokenizer, filler, length, prompts, seed)
            accuracy[task][str(length)] = sum(answered(model, asked)) / len(asked)
    return {
        "perplexity": {
            str(window): asdict(perplexity(model, tokenizer, documents, window))
            for window in (1024, 2048)
        },
        "accuracy": accuracy,
        "prompts": prompts,
        "seed": seed,
    }
