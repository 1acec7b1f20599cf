"""Multi-key, multi-value and variable-tracking prompts, in the spirit of RULER (arXiv 2404.06654).

They are made as those of :mod:`.retrieval_tasks` (seeded, of an exact token length, for any
tokenizer, the question at the very end), in RULER's harder forms. The embedded model was not
trained on them. ``kv`` there is RULER's multi-key of the easy sort (NIAH multikey_1): eight pairs
in real text. Here:

- ``multi-key`` is RULER's multikey_2 and multikey_3: there is no text, every stretch between is
  another needle of the same form ("The value of amber falcon is 48213.", distinct names, distinct
  numbers), as many as the length holds; fewer tokens of filler than one needle has, at the very
  start, make the length exact. One value is asked for.
- ``multi-value``: four needles "One of the values of amber falcon is 48213." about one name, in
  real text, and all four numbers are asked for (RULER's NIAH multivalue).
- ``variable-tracking``: two chains of five assignments in real text, "VAR XKQWD = 48213." and then
  "VAR BNTRA = VAR XKQWD." four times over, each in its order; all five variables that hold the
  first chain's value are asked for (RULER's has one such chain, and a solved example in front).

Where several strings are asked for, the score is RULER's string match all, its recall-based
accuracy: the share of them that stand in the answer, whatever the case and the order. The answer
may be twice as long as the shortest complete one, so that naming everything does not help.
``depth`` is the share of the filler (for ``multi-key``: of the other needles) before what is asked
for begins: the one needle, or the first value or assignment; the rest lie at random places behind.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

from starkv_core.errors import UserError
from starkv_core.eval.retrieval_tasks import (
    ADJECTIVES,
    NOUNS,
    RetrievalPrompt,
    TokenIds,
    check_depth,
    clean_stretch,
    encode,
    pair_needle,
    pair_question,
    question_and_answer,
    random_number,
    random_pairs,
    scatter,
)

TASKS = ("multi-key", "multi-value", "variable-tracking")
VALUES = 4
CHAINS = 2
HOPS = 4  # assignments after the first of a chain

_LETTERS = 5  # of a variable; all names have as many, so none is part of another
_NUMBERS = 90_000  # of five digits, the first not zero


def make_ruler_prompt(
    task: str,
    tokenizer: Any,
    filler_ids: TokenIds,
    length: int,
    depth: float,
    rng: random.Random,
) -> RetrievalPrompt:
    """One prompt of exactly ``length`` tokens.

    Args:
        task: of :data:`TASKS`.
        tokenizer: a transformers tokenizer.
        filler_ids: token ids of real text, more than ``length`` of them.
        length: prompt length in tokens.
        depth: share before what is asked for begins, from 0 (start) to 1 (end).
        rng: the source of randomness; equal states give equal prompts.

    Raises:
        UserError: depth outside 0..1, a length too short or too long for the needles, or
            unsuitable filler.
    """
    check_depth(depth)
    make = {"multi-key": _multi_key, "multi-value": _multi_value, "variable-tracking": _tracking}
    return make[task](tokenizer, filler_ids, length, depth, rng)


def _multi_key(
    tokenizer: Any, filler_ids: TokenIds, length: int, depth: float, rng: random.Random
) -> RetrievalPrompt:
    bos_ids = list(tokenizer("")["input_ids"])
    most = 2 * length // len(encode(tokenizer, pair_needle("amber anchor", "10000")))
    if most > _NUMBERS:
        raise UserError(f"multi-key prompt of {length} tokens: needs more numbers than there are")
    # Half of the names at most are used up, so drawing until one is new is quick.
    words = 2 if most <= len(ADJECTIVES) * len(NOUNS) else 3
    names: set[str] = set()
    numbers: set[str] = set()

    def pair() -> tuple[str, str]:
        def name() -> str:
            first = [rng.choice(ADJECTIVES) for _ in range(words - 1)]
            return " ".join([*first, rng.choice(NOUNS)])

        return _new(name, names), _new(lambda: random_number(rng), numbers)

    asked, number = pair()
    needle_ids = encode(tokenizer, pair_needle(asked, number))
    question_ids, answer_ids = question_and_answer(tokenizer, pair_question(asked), number)
    room = length - len(bos_ids) - len(needle_ids) - len(question_ids)
    others: list[list[int]] = []
    while len(ids := encode(tokenizer, pair_needle(*pair()))) <= room:
        others.append(ids)
        room -= len(ids)
    if not others:
        raise UserError(
            f"multi-key prompt of {length} tokens: holds no two needles; use a longer prompt"
        )
    gap = clean_stretch(tokenizer, filler_ids, room, rng, [*names, *numbers])
    cut = round(depth * len(others))
    parts = [bos_ids, gap, *others[:cut], needle_ids, *others[cut:], question_ids]
    input_ids = [token for part in parts for token in part]
    return RetrievalPrompt(input_ids, answer_ids, f" {number}", "multi-key", length, depth)


def value_needle(name: str, number: str) -> str:
    """The paragraph that states one of several values of ``name``."""
    return f"\nOne of the values of {name} is {number}.\n"


def value_question(name: str) -> str:
    """The paragraph that asks for all values of ``name``; the answer follows it directly."""
    return f"\nWhat are all the values of {name}? The {VALUES} values of {name} are"


def _multi_value(
    tokenizer: Any, filler_ids: TokenIds, length: int, depth: float, rng: random.Random
) -> RetrievalPrompt:
    (name,) = random_pairs(1, rng)
    numbers: set[str] = set()
    values = [_new(lambda: random_number(rng), numbers) for _ in range(VALUES)]
    needles = [
        (value_needle(name, value), place)
        for value, place in zip(values, _places(depth, VALUES, rng), strict=True)
    ]
    return _several(
        "multi-value",
        tokenizer,
        filler_ids,
        needles,
        value_question(name),
        values,
        [name, *values],
        length,
        depth,
        rng,
    )


def assignment(variable: str, value: str) -> str:
    """The paragraph that gives ``variable`` a number, or the value of "VAR OTHER"."""
    return f"\nVAR {variable} = {value}.\n"


def tracking_question(number: str) -> str:
    """The paragraph that asks which variables hold a number; the answer follows it directly."""
    return (
        f"\nFind all variables that are assigned the value {number}. The {HOPS + 1} variables "
        f"that are assigned the value {number} are"
    )


def _tracking(
    tokenizer: Any, filler_ids: TokenIds, length: int, depth: float, rng: random.Random
) -> RetrievalPrompt:
    variables: set[str] = set()
    numbers: set[str] = set()
    needles: list[tuple[str, float]] = []
    chains = []
    for start in (depth, *(rng.random() for _ in range(CHAINS - 1))):
        number = _new(lambda: random_number(rng), numbers)
        chain = [
            _new(lambda: "".join(rng.choices(string.ascii_uppercase, k=_LETTERS)), variables)
            for _ in range(HOPS + 1)
        ]
        values = [number, *(f"VAR {variable}" for variable in chain)]
        places = _places(start, HOPS + 1, rng)
        needles += [
            (assignment(variable, value), place)
            for variable, value, place in zip(chain, values, places, strict=False)
        ]
        chains.append((number, chain))
    number, chain = chains[0]
    return _several(
        "variable-tracking",
        tokenizer,
        filler_ids,
        needles,
        tracking_question(number),
        chain,
        [*variables, *numbers],
        length,
        depth,
        rng,
    )


def _several(
    task: str,
    tokenizer: Any,
    filler_ids: TokenIds,
    needles: list[tuple[str, float]],
    question: str,
    asked: list[str],
    forbidden: list[str],
    length: int,
    depth: float,
    rng: random.Random,
) -> RetrievalPrompt:
    """Needles in filler and a question with several answers."""
    complete = ", ".join(asked)
    question_ids, answer_ids = question_and_answer(tokenizer, question, complete)
    input_ids = scatter(tokenizer, filler_ids, needles, question_ids, length, rng, forbidden)
    return RetrievalPrompt(input_ids, answer_ids, f" {complete}", task, length, depth, tuple(asked))


def _places(first: float, count: int, rng: random.Random) -> list[float]:
    """Depths in order: ``first``, and the others at random places behind it."""
    return [first, *sorted(first + (1.0 - first) * rng.random() for _ in range(count - 1))]


def _new(draw: Callable[[], str], seen: set[str]) -> str:
    """A draw that is not in ``seen`` yet; it is put there."""
    while (drawn := draw()) in seen:
        pass
    seen.add(drawn)
    return drawn
