"""Pass-key and key-value prompts: exact length, depth, one source of the answer, determinism."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import AutoTokenizer

from starkv_core.embedded import HELDOUT_TEXT, MODEL_DIR
from starkv_core.errors import UserError
from starkv_core.eval.retrieval_tasks import (
    TASKS,
    RetrievalPrompt,
    make_prompt,
    question_and_answer,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def filler(tokenizer: Any) -> list[int]:
    return tokenizer.encode(HELDOUT_TEXT.read_text(encoding="utf-8")[:60_000])


def prompt_of(
    task: str,
    tokenizer: Any,
    filler: list[int],
    length: int,
    depth: float,
    seed: int = 3,
    **more: int,
) -> RetrievalPrompt:
    return make_prompt(task, tokenizer, filler, length, depth, random.Random(seed), **more)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 257, 511, 1024])
def test_length_is_exact(task: str, length: int, tokenizer: Any, filler: list[int]) -> None:
    prompt = prompt_of(task, tokenizer, filler, length, 0.3)
    assert len(prompt.input_ids) == length == prompt.length
    assert (prompt.task, prompt.depth) == (task, 0.3)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_answer_stands_in_its_needle_only_at_its_depth(
    task: str, depth: float, tokenizer: Any, filler: list[int]
) -> None:
    prompt = prompt_of(task, tokenizer, filler, 1024, depth)
    text = tokenizer.decode(prompt.input_ids)
    number = prompt.answer.strip()
    assert number.isdigit() and len(number) == 5
    assert tokenizer.decode(prompt.answer_ids) == prompt.answer
    # The pass key's needle says it twice, a pair's needle once; nothing else says it.
    assert text.count(number) == {"passkey": 2, "kv": 1}[task]
    before = text.index(f"is {number}.") / len(text)
    # The needle, the question and uneven token widths shift characters against tokens.
    assert abs(before - depth) < 0.2
    question = {"passkey": "The pass key is", "kv": "? The value of"}[task]
    assert question in text[-60:]


def test_depths_move_the_needle_by_tokens(tokenizer: Any, filler: list[int]) -> None:
    needle = tokenizer.encode("\nThe pass key is")
    starts = []
    for depth in (0.0, 0.5, 1.0):
        ids = prompt_of("passkey", tokenizer, filler, 512, depth).input_ids
        starts.append(next(i for i in range(512) if ids[i : i + len(needle)] == needle))
    room = starts[2]
    assert starts == [0, round(0.5 * room), room]


def test_key_value_prompt_has_all_its_pairs(tokenizer: Any, filler: list[int]) -> None:
    prompt = prompt_of("kv", tokenizer, filler, 1024, 0.5, pairs=12)
    text = tokenizer.decode(prompt.input_ids)
    stated = [line for line in text.split("\n") if line.startswith("The value of ")]
    assert len(stated) == 12
    assert len({line.split(" is ")[0] for line in stated}) == 12
    assert len({line.split(" is ")[1] for line in stated}) == 12


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_equal_prompts(task: str, tokenizer: Any, filler: list[int]) -> None:
    one, two, other = (prompt_of(task, tokenizer, filler, 400, 0.7, seed) for seed in (5, 5, 6))
    assert one == two
    assert one.answer != other.answer and one.input_ids != other.input_ids


class BosTokenizer:
    """The embedded tokenizer with a token in front of every text, as LLaMA's has."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [7, *self.inner.encode(text)]}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.inner.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def test_bos_counts_and_comes_first(tokenizer: Any, filler: list[int]) -> None:
    prompt = prompt_of("kv", BosTokenizer(tokenizer), filler, 300, 0.5)
    assert len(prompt.input_ids) == 300
    assert prompt.input_ids[0] == 7 and 7 not in prompt.answer_ids


class MergingTokenizer:
    """A tokenizer that makes one token of any text."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [hash(text)]


def test_merged_question_and_answer_are_refused() -> None:
    with pytest.raises(UserError, match="merges question and answer"):
        question_and_answer(MergingTokenizer(), "The pass key is", "12345")


def test_filler_with_the_answer_is_not_used(tokenizer: Any) -> None:
    number = prompt_of("passkey", tokenizer, tokenizer.encode("word " * 900), 300, 0.5).answer
    with pytest.raises(UserError, match="another text"):
        prompt_of("passkey", tokenizer, tokenizer.encode(number * 400), 300, 0.5)


@pytest.mark.parametrize(
    ("task", "length", "depth", "pairs", "message"),
    [
        ("needle", 512, 0.5, 8, "choose from passkey, kv"),
        ("passkey", 512, 1.5, 8, "outside 0..1"),
        ("passkey", 20, 0.5, 8, "use a longer prompt"),
        ("kv", 100, 0.5, 8, "use a longer prompt or fewer pairs"),
        ("kv", 512, 0.5, 0, "cannot hold 0"),
        ("passkey", 100_000, 0.5, 8, "give a longer text"),
    ],
)
def test_impossible_prompts_are_refused(
    task: str,
    length: int,
    depth: float,
    pairs: int,
    message: str,
    tokenizer: Any,
    filler: list[int],
) -> None:
    with pytest.raises(UserError, match=message):
        prompt_of(task, tokenizer, filler, length, depth, pairs=pairs)
