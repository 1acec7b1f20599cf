"""Multi-key, multi-value and variable-tracking prompts: exact length, one right answer, scores."""

from __future__ import annotations

import hashlib
import json
import random
import re
from typing import Any

import pytest
from transformers import AutoTokenizer

from starkv_core.embedded import HELDOUT_TEXT, MODEL_DIR
from starkv_core.errors import UserError
from starkv_core.eval.retrieval import make_grid
from starkv_core.eval.retrieval_ruler import TASKS, make_ruler_prompt
from starkv_core.eval.retrieval_tasks import RetrievalPrompt
from tests.standin import byte_tokenizer

PAIR = re.compile(r"\nThe value of ([a-z ]+) is (\d{5})\.\n")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def filler(tokenizer: Any) -> list[int]:
    return tokenizer.encode(HELDOUT_TEXT.read_text(encoding="utf-8")[:60_000])


def prompt_of(
    task: str, tokenizer: Any, filler: list[int], length: int, depth: float, seed: int = 3
) -> RetrievalPrompt:
    return make_ruler_prompt(task, tokenizer, filler, length, depth, random.Random(seed))


class Beginning:
    """A tokenizer with a token in front of every text, as LLaMA's has."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.encode, self.decode = inner.encode, inner.decode

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [7, *self.inner.encode(text)]}


@pytest.mark.parametrize("task", TASKS)
def test_length_is_exact_with_any_tokenizer(task: str, tokenizer: Any, filler: list[int]) -> None:
    for length in (256, 301, 1024):
        for depth in (0.0, 0.4, 1.0):
            prompt = prompt_of(task, tokenizer, filler, length, depth)
            assert len(prompt.input_ids) == length == prompt.length
            assert (prompt.task, prompt.depth) == (task, depth)
            assert tokenizer.decode(prompt.input_ids).endswith(
                " is" if task == TASKS[0] else " are"
            )
    begun = prompt_of(task, Beginning(tokenizer), filler, 300, 0.5)
    assert len(begun.input_ids) == 300
    assert begun.input_ids.count(7) == 1 == begun.input_ids.index(7) + 1
    byte = byte_tokenizer()
    text = byte(HELDOUT_TEXT.read_text(encoding="utf-8")[:5000]).input_ids
    assert len(prompt_of(task, byte, text, 777, 0.5).input_ids) == 777


@pytest.mark.parametrize("task", TASKS)
def test_prompts_follow_from_the_seed(task: str, tokenizer: Any, filler: list[int]) -> None:
    one, two, other = (prompt_of(task, tokenizer, filler, 400, 0.7, s) for s in (5, 5, 6))
    assert one == two
    assert one.answer != other.answer
    # ... and from the cell, not from the other cells of a grid
    big = make_grid(task, tokenizer, filler, [300, 400], [0.0, 0.5], 2, seed=1)
    assert big.cells[1][1] == make_grid(task, tokenizer, filler, [400], [0.5], 2, 1).cells[0][0]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_multi_key_is_needles_throughout(depth: float, tokenizer: Any, filler: list[int]) -> None:
    prompt = prompt_of("multi-key", tokenizer, filler, 1000, depth)
    text = tokenizer.decode(prompt.input_ids)
    pairs = PAIR.findall(text)
    names, numbers = zip(*pairs, strict=True)
    assert len(set(names)) == len(set(numbers)) == len(pairs) > 45
    # nothing but needles and the question, and less filler than one needle in front
    rest = PAIR.sub("", text)
    front, question, asked = rest.partition("\nWhat is the value of ")
    assert question
    assert len(tokenizer.encode(front)) < 22
    assert front and text.startswith(front)
    name = re.fullmatch(r"([a-z ]+)\? The value of \1 is", asked)[1]
    assert prompt.answer == " " + dict(pairs)[name]
    assert tokenizer.decode(prompt.answer_ids) == prompt.answer
    assert text.count(prompt.answer) == 1
    assert names.index(name) == round(depth * (len(pairs) - 1))
    assert prompt.asked == ()
    assert prompt.new_tokens == len(prompt.answer_ids)


def test_multi_key_has_names_enough_for_long_prompts(tokenizer: Any, filler: list[int]) -> None:
    prompt = prompt_of("multi-key", tokenizer, filler, 90_000, 0.5)
    pairs = PAIR.findall(tokenizer.decode(prompt.input_ids))
    assert len(dict(pairs)) == len(pairs) > 4368  # names of two words
    with pytest.raises(UserError, match="more numbers than there are"):
        prompt_of("multi-key", tokenizer, filler, 2_000_000, 0.5)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_multi_value_states_each_value_once_behind_its_depth(
    depth: float, tokenizer: Any, filler: list[int]
) -> None:
    prompt = prompt_of("multi-value", tokenizer, filler, 1000, depth)
    text = tokenizer.decode(prompt.input_ids)
    stated = re.findall(r"\nOne of the values of ([a-z ]+) is (\d{5})\.\n", text)
    assert {name for name, _ in stated} == {re.search(r"all the values of ([a-z ]+)\?", text)[1]}
    assert tuple(number for _, number in stated) == prompt.asked
    assert len(set(prompt.asked)) == 4
    assert all(text.count(number) == 1 for number in prompt.asked)
    first = tokenizer.encode(text[: text.index("\nOne of")])
    room = 1000 - sum(len(tokenizer.encode(t)) for t in needles_and_question(text))
    assert abs(len(first) - depth * room) <= 3


def needles_and_question(text: str) -> list[str]:
    """All paragraphs of a multi-value prompt that are no filler."""
    found = re.findall(r"\nOne of the values of [a-z ]+ is \d{5}\.\n", text)
    return [*found, text[text.rindex("\nWhat") :]]


@pytest.mark.parametrize("depth", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_variables_asked_for_hold_the_value(
    seed: int, depth: float, tokenizer: Any, filler: list[int]
) -> None:
    prompt = prompt_of("variable-tracking", tokenizer, filler, 900, depth, seed)
    text = tokenizer.decode(prompt.input_ids)
    held: dict[str, str] = {}
    for variable, value in re.findall(r"\nVAR ([A-Z]{5}) = ((?:VAR )?\w{5})\.\n", text):
        assert variable not in held
        # an assignment reads what was assigned before it
        held[variable] = held[value.removeprefix("VAR ")] if "VAR" in value else value
    asked = re.search(r"variables that are assigned the value (\d{5})\. The 5 variables", text)[1]
    assert {variable for variable, value in held.items() if value == asked} == set(prompt.asked)
    assert len(prompt.asked) == 5
    assert sorted(held.values()).count(asked) == 5 == len(held) - 5
    order = [text.index(f"VAR {variable} =") for variable in prompt.asked]
    assert order == sorted(order)
    assert abs(order[0] / text.index("\nFind all") - depth) < (0.4 if depth == 1.0 else 0.25)


def test_scores_are_rulers(tokenizer: Any, filler: list[int]) -> None:
    prompt = prompt_of("variable-tracking", tokenizer, filler, 300, 0.5)
    one, two, three, four, five = prompt.asked
    for said, score in (
        (prompt.answer, 1.0),
        (f" {five} and {one}, {three};\n {two}\n{four}. So", 1.0),
        (f" {one.lower()}, {one}, {two}", 0.4),
        (" 48213", 0.0),
        ("", 0.0),
    ):
        assert prompt.score(tokenizer, tokenizer.encode(said)) == pytest.approx(score)
    assert prompt.new_tokens == 2 * len(prompt.answer_ids)
    single = prompt_of("multi-key", tokenizer, filler, 300, 0.5)
    assert single.score(tokenizer, single.answer_ids) == 1.0
    assert single.score(tokenizer, single.answer_ids[:-1]) == 0.0


def test_scores_equal_lm_evals_string_match_all(tokenizer: Any, filler: list[int]) -> None:
    common = pytest.importorskip("lm_eval.tasks.ruler.common_utils")
    rng = random.Random(0)
    for task in TASKS[1:]:
        prompt = prompt_of(task, tokenizer, filler, 400, 0.2)
        for _ in range(20):
            words = rng.choices([*prompt.asked, prompt.asked[0][:-1], "and", "12345"], k=4)
            said = tokenizer.encode(" " + ", ".join(words))
            expected = common.string_match_all([tokenizer.decode(said)], [list(prompt.asked)])
            assert prompt.score(tokenizer, said) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "length", "depth", "message"),
    [
        ("multi-key", 256, 1.5, "outside 0..1"),
        ("multi-key", 50, 0.5, "holds no two needles"),
        ("multi-value", 90, 0.5, "use a longer prompt"),
        ("variable-tracking", 150, 0.5, "use a longer prompt"),
        ("variable-tracking", 90_000, 0.5, "give a longer text"),
    ],
)
def test_impossible_prompts_are_refused(
    task: str, length: int, depth: float, message: str, tokenizer: Any, filler: list[int]
) -> None:
    with pytest.raises(UserError, match=message):
        prompt_of(task, tokenizer, filler, length, depth)


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("passkey", "c20b3c937c3326e830fa04b0932a6ccf53168db4943521c13d23f0d1c0d5d597"),
        ("kv", "8f27c3afac6e4d43ce7f526b081d5c2a93dd506dd463928cbe052648e427648e"),
    ],
)
def test_what_the_embedded_model_was_trained_on_stays(
    task: str, digest: str, tokenizer: Any, filler: list[int]
) -> None:
    grid = make_grid(task, tokenizer, filler, [256, 1024], [0.0, 0.5, 1.0], 2, seed=0)
    ids = [[[(p.input_ids, p.answer_ids) for p in cell] for cell in row] for row in grid.cells]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == digest
