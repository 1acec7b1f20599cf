"""Make the embedded default model: tokens from a text folder, training on one GPU, its figures.

    python -m starkv_core.embedded.train prepare TEXT_FOLDER PREPARED
    python -m starkv_core.embedded.train train PREPARED OUT --minutes 5
    python -m starkv_core.embedded.train evaluate OUT --text heldout.txt

Three of four training rows are plain text. The fourth is a retrieval row: training text with
pass keys and key-value pairs in it and questions about them, built with the same functions as the
evaluation's prompts, the answers' tokens weighted up.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from starkv_core.embedded.evaluate import evaluate
from starkv_core.embedded.prepare import (
    VOCAB_SIZE,
    prepare,
    read_documents,
    read_tokens,
)
from starkv_core.errors import RunFailure
from starkv_core.eval.retrieval_tasks import (
    encode,
    pair_needle,
    pair_question,
    passkey_needle,
    passkey_question,
    question_and_answer,
    random_number,
    random_pairs,
    scatter,
)

CONTEXT = 2048
ANSWER_WEIGHT = 8.0
SHORTEST_DOCUMENT = 128
MOST_PAIRS = 24
MOST_QUESTIONS = 8
# Generous token counts of one pair's needle and of one question with its answer.
NEEDLE_TOKENS = 24
QUESTION_TOKENS = 40

SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 704,
}


def new_model(end_id: int) -> Any:
    """The model, initialised from torch's global generator, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPE,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    return LlamaForCausalLM(config)


def retrieval_document(
    tokenizer: Any, filler: NDArray[np.uint16], length: int, rng: random.Random
) -> tuple[list[int], list[float]]:
    """``length`` tokens of filler with needles, then questions with answers and end-of-text.

    Returns:
        token ids, and the loss weight of each: ``ANSWER_WEIGHT`` for answers, otherwise 1.
    """
    if rng.random() < 0.4:
        number = random_number(rng)
        needles = [(passkey_needle(number), rng.random())]
        asked = [(passkey_question(), number)]
        forbidden = [number]
    else:
        count = rng.randint(1, min(MOST_PAIRS, (length - QUESTION_TOKENS) // NEEDLE_TOKENS))
        values = random_pairs(count, rng)
        room = (length - count * NEEDLE_TOKENS) // QUESTION_TOKENS
        names = rng.sample(sorted(values), min(count, MOST_QUESTIONS, room))
        needles = [(pair_needle(name, value), rng.random()) for name, value in values.items()]
        asked = [(pair_question(name), values[name]) for name in names]
        forbidden = [*values, *values.values()]
    tail: list[int] = []
    weights: list[float] = []
    stop = encode(tokenizer, ".")
    for question, number in asked:
        question_ids, answer_ids = question_and_answer(tokenizer, question, number)
        tail += question_ids + answer_ids + stop
        weights += [1.0] * len(question_ids) + [ANSWER_WEIGHT] * len(answer_ids) + [1.0] * len(stop)
    tail.append(tokenizer.eos_token_id)
    weights.append(1.0)
    ids = scatter(tokenizer, filler, needles, tail, length, rng, forbidden)
    return ids, [1.0] * (length - len(weights)) + weights


def retrieval_row(
    tokenizer: Any, filler: NDArray[np.uint16], length: int, rng: random.Random
) -> tuple[list[int], list[float]]:
    """One row of ``length`` tokens: one long retrieval document, or several of mixed lengths."""
    ids: list[int] = []
    weights: list[float] = []
    whole = rng.random() < 0.5
    while len(ids) < length:
        room = length - len(ids)
        size = room
        if not whole and room > 2 * SHORTEST_DOCUMENT:
            size = int(math.exp(rng.uniform(math.log(SHORTEST_DOCUMENT), math.log(room))))
        if room - size < SHORTEST_DOCUMENT:
            size = room
        more_ids, more_weights = retrieval_document(tokenizer, filler, size, rng)
        ids += more_ids
        weights += more_weights
    return ids, weights


class RetrievalRows(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless retrieval rows: ids int64 [CONTEXT + 1], weights float32 [CONTEXT + 1]."""

    def __init__(self, tokenizer: Any, filler: NDArray[np.uint16], seed: int) -> None:
        self.tokenizer = tokenizer
        self.filler = filler
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(f"{self.seed}/{worker.id if worker else 0}")
        while True:
            ids, weights = retrieval_row(self.tokenizer, self.filler, CONTEXT + 1, rng)
            yield torch.tensor(ids), torch.tensor(weights)


def causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Attention of whole unpadded rows: no mask tensor, so the flash kernel serves it.

    query, key, value: [B, H, L, D]; returns [B, L, H, D].
    """
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2), None


def token_losses(model: Any, rows: Tensor) -> Tensor:
    """Cross entropy of every next token: rows int64 [B, L + 1] -> float32 [B, L]."""
    hidden = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    )
    return losses.view(rows.shape[0], -1)


@dataclass(frozen=True)
class Budget:
    """When training ends: after ``steps``, or after ``minutes`` of wall time."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget spent, 0 to 1; the learning rate falls with it."""
        if self.minutes is not None:
            return min(seconds / (60 * self.minutes), 1.0)
        return min(step / (self.steps or 1), 1.0)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write bf16 weights, config and tokenizer as an ordinary transformers folder."""
    copy = new_model(tokenizer.eos_token_id)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(
    prepared: Path,
    out: Path,
    *,
    budget: Budget,
    rows: int,
    retrieval_rows: int,
    learning_rate: float,
    warmup: int,
    workers: int,
    compiled: bool,
    device: str,
    seed: int,
) -> dict[str, Any]:
    """Train from scratch and save to ``out`` (at half time as well). Returns what was done.

    Learning rate: linear warm-up over ``warmup`` steps, then linearly to zero at the budget's end.
    """
    from transformers import AttentionInterface, AutoTokenizer

    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    tokens = read_tokens(prepared / "train.u16.xz")
    AttentionInterface.register("causal", causal_attention)
    model = new_model(tokenizer.eos_token_id).to(device)
    model.set_attn_implementation("causal")
    model.train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    losses_of = torch.compile(token_losses) if compiled else token_losses
    stream = iter(
        DataLoader(
            RetrievalRows(tokenizer, tokens, seed),
            batch_size=retrieval_rows,
            num_workers=workers,
            pin_memory=device != "cpu",
            prefetch_factor=8 if workers else None,
        )
    )
    text = torch.from_numpy(tokens.astype(np.int32)).to(device)
    generator = torch.Generator(device=device).manual_seed(seed)
    text_rows = rows - retrieval_rows
    offsets = torch.arange(CONTEXT + 1, device=device)
    text_weights = torch.ones(text_rows, CONTEXT + 1, device=device)

    step, progress, saved_half = 0, 0.0, False
    started = marked = time.monotonic()
    marked_step = 0
    while progress < 1.0:
        starts = torch.randint(
            len(text) - CONTEXT, (text_rows, 1), generator=generator, device=device
        )
        asked, asked_weights = next(stream)
        batch = torch.cat([text[starts + offsets].long(), asked.to(device, non_blocking=True)])
        weights = torch.cat([text_weights, asked_weights.to(device, non_blocking=True)])[:, 1:]
        rate = learning_rate * min((step + 1) / warmup, 1.0) * (1.0 - progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu"):
            losses = losses_of(model, batch)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        # Reading the loss waits for the GPU, which keeps the clock honest.
        if step % 10 == 0 and not math.isfinite(loss.item()):
            raise RunFailure(f"training diverged at step {step}; lower --learning-rate")
        if step == 10:
            # Compilation is over: the schedule and the speed count from here.
            started = marked = time.monotonic()
            marked_step = step
        progress = budget.progress(step, time.monotonic() - started if step >= 10 else 0.0)
        if step % 100 == 0 or progress >= 1.0:
            now = time.monotonic()
            answers = weights > 1.0
            sys.stderr.write(
                f"step {step} {100 * progress:.0f}% text {losses[:text_rows].mean().item():.3f} "
                f"answers {losses[answers].mean().item():.3f} rate {rate:.2e} "
                f"{(step - marked_step) * rows * CONTEXT / max(now - marked, 1e-9):.3g} tokens/s\n"
            )
            marked, marked_step = now, step
        if progress >= 0.5 and not saved_half:
            save(model, tokenizer, out)
            saved_half = True
    save(model, tokenizer, out)
    return {
        "steps": step,
        "tokens": step * rows * CONTEXT,
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
        "retrieval_rows": retrieval_rows,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "seed": seed,
    }


def load(folder: Path, device: str) -> tuple[Any, Any]:
    """The model (float32) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    return model, AutoTokenizer.from_pretrained(folder)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m starkv_core.embedded.train", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="tokenizer, token files and shipped texts")
    one.add_argument("texts", type=Path, help="folder with books/*.txt and permissive/*.txt")
    one.add_argument("out", type=Path)
    one.add_argument("--seed", type=int, default=0)
    two = commands.add_parser("train", help="train from scratch on prepared tokens")
    two.add_argument("prepared", type=Path)
    two.add_argument("out", type=Path)
    length = two.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float)
    length.add_argument("--steps", type=int)
    two.add_argument("--rows", type=int, default=32, help="rows of 2048 tokens a step")
    two.add_argument("--retrieval-rows", type=int, default=8, help="of which retrieval rows")
    two.add_argument("--learning-rate", type=float, default=3e-3)
    two.add_argument("--warmup", type=int, default=200, help="steps")
    two.add_argument("--workers", type=int, default=8, help="processes building retrieval rows")
    two.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    two.add_argument("--device", default="cuda")
    two.add_argument("--seed", type=int, default=0)
    three = commands.add_parser("evaluate", help="held-out perplexity and retrieval accuracy")
    three.add_argument("model", type=Path)
    three.add_argument("--text", type=Path, required=True, help="held-out documents")
    three.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 1536, 2040])
    three.add_argument("--prompts", type=int, default=100, help="prompts per task and length")
    three.add_argument("--device", default="cpu")
    three.add_argument("--seed", type=int, default=0)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; its result is one JSON object on stdout."""
    args = parser().parse_args(arguments)
    result: dict[str, Any]
    if args.command == "prepare":
        result = dict(prepare(args.texts, args.out, args.seed))
    elif args.command == "train":
        result = train(
            args.prepared,
            args.out,
            budget=Budget(args.steps, args.minutes),
            rows=args.rows,
            retrieval_rows=args.retrieval_rows,
            learning_rate=args.learning_rate,
            warmup=args.warmup,
            workers=args.workers,
            compiled=args.compile,
            device=args.device,
            seed=args.seed,
        )
    else:
        model, tokenizer = load(args.model, args.device)
        result = evaluate(
            model,
            tokenizer,
            read_documents(args.text),
            lengths=args.lengths,
            prompts=args.prompts,
            seed=args.seed,
        )
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
