"""Pass-key and key-value prompts: seeded, of an exact token length, for any tokenizer.

Protocol. A prompt is real filler text with one or more needles (short sentences that state a
number) put between its tokens, and a question at the very end:

- ``passkey``: one needle, "The pass key is 70213. Remember it. 70213 is the pass key.", and the
  question "What is the pass key? The pass key is".
- ``kv``: several needles such as "The value of amber falcon is 48213." with distinct names and
  distinct numbers, and a question about one of them: "What is the value of amber falcon? The
  value of amber falcon is".

The answer is a space and five random digits. The filler never contains a number or a name used in
the prompt, so an answer can only come from its needle. ``depth`` is the share of the filler that
stands before the needle asked for; the other pairs lie at random places. The prompt has exactly
``length`` tokens. It is answered right when greedy decoding continues it with ``answer_ids``,
token for token. Training of the embedded model and every evaluation use these same functions;
only the filler differs (training text, held-out text). Harder tasks are in :mod:`.retrieval_ruler`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv_core.errors import UserError

TASKS = ("passkey", "kv")
DEFAULT_PAIRS = 8

_ADJECTIVES = (
    "amber azure bitter bold brave bright broken calm clever cold crimson dark distant early "
    "empty faint golden green hidden hollow honest iron ivory little lonely lost mild narrow "
    "noble pale proud purple quick quiet red rough royal rusty secret silent silver simple slow "
    "soft solemn steady strange sudden sweet tall tiny wild wise wooden"
)
_NOUNS = (
    "anchor apple arrow badger barrel basket beacon bell bridge candle canyon castle chain "
    "cherry clock cloud compass copper crown desert dolphin dragon eagle falcon feather forest "
    "fountain garden glacier hammer harbor island jacket kettle ladder lantern lemon lion marble "
    "meadow mirror mountain needle ocean orchard otter palace pepper pillow planet rabbit ribbon "
    "river saddle shadow ship stone summer table temple thunder tiger tower valley violin wagon "
    "willow window winter"
)

ADJECTIVES = _ADJECTIVES.split()
NOUNS = _NOUNS.split()

# Stretches of filler tried before giving up on a text full of forbidden strings.
_FILLER_ATTEMPTS = 200

TokenIds = Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class RetrievalPrompt:
    """One prompt. ``input_ids`` has ``length`` token ids, ``answer_ids`` those that must follow.

    Where several strings are ``asked`` for, ``answer_ids`` are those of a complete answer, and
    others do as well: see :meth:`score`.
    """

    input_ids: list[int]
    answer_ids: list[int]
    answer: str
    task: str
    length: int
    depth: float
    asked: tuple[str, ...] = ()

    @property
    def new_tokens(self) -> int:
        """Tokens of an answer that are read; twice a complete answer's where there are several."""
        return (2 if self.asked else 1) * len(self.answer_ids)

    def score(self, tokenizer: Any, answer: Sequence[int]) -> float:
        """How right an answer is, from 0 to 1.

        One string: whether its tokens are ``answer_ids``. Several: the share of them that stands in
        its text, in any case and order (string match all of RULER, arXiv 2404.06654).

        Args:
            tokenizer: of the prompt.
            answer: the :attr:`new_tokens` tokens that follow, or fewer up to an end.
        """
        if not self.asked:
            return float(list(answer) == self.answer_ids)
        text = tokenizer.decode(list(answer)).lower()
        return sum(string.lower() in text for string in self.asked) / len(self.asked)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` alone, without special tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def random_number(rng: random.Random) -> str:
    """Five random digits, the first not zero."""
    return str(rng.randrange(10_000, 100_000))


def random_pairs(count: int, rng: random.Random) -> dict[str, str]:
    """``count`` distinct two-word names with distinct numbers."""
    cells = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    names = [f"{ADJECTIVES[c // len(NOUNS)]} {NOUNS[c % len(NOUNS)]}" for c in cells]
    return dict(zip(names, map(str, rng.sample(range(10_000, 100_000), count)), strict=True))


def passkey_needle(number: str) -> str:
    """The paragraph that states the pass key."""
    return f"\nThe pass key is {number}. Remember it. {number} is the pass key.\n"


def passkey_question() -> str:
    """The paragraph that asks for the pass key; the answer follows it directly."""
    return "\nWhat is the pass key? The pass key is"


def pair_needle(name: str, number: str) -> str:
    """The paragraph that states the value of ``name``."""
    return f"\nThe value of {name} is {number}.\n"


def pair_question(name: str) -> str:
    """The paragraph that asks for the value of ``name``; the answer follows it directly."""
    return f"\nWhat is the value of {name}? The value of {name} is"


def question_and_answer(tokenizer: Any, question: str, number: str) -> tuple[list[int], list[int]]:
    """Token ids of a question and of " NUMBER" as its continuation.

    Raises:
        UserError: the tokenizer merges the end of the question with the answer, so that the two
            cannot be told apart on token ids.
    """
    head = encode(tokenizer, question)
    whole = encode(tokenizer, f"{question} {number}")
    if whole[: len(head)] != head or len(whole) == len(head):
        raise UserError(
            "retrieval prompts: this tokenizer merges question and answer into one token; "
            "use a tokenizer that starts a new token at a space"
        )
    return head, whole[len(head) :]


def scatter(
    tokenizer: Any,
    filler_ids: TokenIds,
    needles: Sequence[tuple[str, float]],
    tail_ids: Sequence[int],
    length: int,
    rng: random.Random,
    forbidden: Sequence[str],
) -> list[int]:
    """``length`` tokens: a stretch of filler with the needles in it, then ``tail_ids``.

    Args:
        tokenizer: a transformers tokenizer.
        filler_ids: token ids of real text, at least ``length`` of them to be safe; a random
            contiguous stretch is used.
        needles: texts and their depths, each the share of the filler before it, from 0 to 1.
        tail_ids: token ids that end the sequence.
        length: tokens in all, those the tokenizer puts in front of every text (bos) included.
        rng: the source of randomness.
        forbidden: strings that the filler must not contain.

    Raises:
        UserError: the length is too short for the needles, or the filler is too short or is full
            of forbidden strings.
    """
    bos_ids = list(tokenizer("")["input_ids"])
    placed = sorted(
        ((depth, encode(tokenizer, text)) for text, depth in needles), key=lambda item: item[0]
    )
    fixed = len(bos_ids) + sum(len(ids) for _, ids in placed) + len(tail_ids)
    room = length - fixed
    if room < 0:
        raise UserError(
            f"retrieval prompt of {length} tokens: needles and question alone take {fixed}; "
            "use a longer prompt or fewer pairs"
        )
    if len(filler_ids) < room:
        raise UserError(
            f"retrieval prompt of {length} tokens: {room} filler tokens are needed, the filler "
            f"text has {len(filler_ids)}; give a longer text"
        )
    filler = clean_stretch(tokenizer, filler_ids, room, rng, forbidden)
    ids = bos_ids
    done = 0
    for depth, needle_ids in placed:
        cut = round(depth * room)
        ids += filler[done:cut]
        ids += needle_ids
        done = cut
    ids += filler[done:]
    ids += tail_ids
    return ids


def clean_stretch(
    tokenizer: Any,
    filler_ids: TokenIds,
    count: int,
    rng: random.Random,
    forbidden: Sequence[str],
) -> list[int]:
    """A random stretch of ``count`` filler tokens without a forbidden string (UserError)."""
    for _ in range(_FILLER_ATTEMPTS):
        start = rng.randrange(len(filler_ids) - count + 1)
        stretch = [int(token) for token in filler_ids[start : start + count]]
        text = tokenizer.decode(stretch)
        if not any(string in text for string in forbidden):
            return stretch
    raise UserError(
        f"retrieval prompts: {_FILLER_ATTEMPTS} stretches of the filler text all contain an "
        "answer or a name of the prompt; give another text"
    )


def check_depth(depth: float) -> None:
    """Refuse a depth outside 0..1 (UserError)."""
    if not 0.0 <= depth <= 1.0:
        raise UserError(f"retrieval depth {depth} is outside 0..1")


def make_prompt(
    task: str,
    tokenizer: Any,
    filler_ids: TokenIds,
    length: int,
    depth: float,
    rng: random.Random,
    *,
    pairs: int = DEFAULT_PAIRS,
) -> RetrievalPrompt:
    """One pass-key or key-value prompt of exactly ``length`` tokens.

    Args:
        task: "passkey" or "kv".
        tokenizer: a transformers tokenizer.
        filler_ids: token ids of real text, more than ``length`` of them.
        length: prompt length in tokens.
        depth: share of the filler before the needle asked for, from 0 (start) to 1 (end).
        rng: the source of randomness; equal states give equal prompts.
        pairs: number of pairs of a ``kv`` prompt.

    Raises:
        UserError: unknown task, depth outside 0..1, impossible number of pairs, a length too
            short for the needles, or unsuitable filler.
    """
    if task not in TASKS:
        raise UserError(f"retrieval task {task!r} is unknown; choose from {', '.join(TASKS)}")
    check_depth(depth)
    if not 1 <= pairs <= len(ADJECTIVES) * len(NOUNS):
        raise UserError(f"retrieval prompts cannot hold {pairs} key-value pairs")
    if task == "passkey":
        number = random_number(rng)
        needles = [(passkey_needle(number), depth)]
        question = passkey_question()
        forbidden = [number]
    else:
        values = random_pairs(pairs, rng)
        asked, number = next(iter(values.items()))
        needles = [
            (pair_needle(name, value), depth if name == asked else rng.random())
            for name, value in values.items()
        ]
        question = pair_question(asked)
        forbidden = [*values, *values.values()]
    question_ids, answer_ids = question_and_answer(tokenizer, question, number)
    input_ids = scatter(tokenizer, filler_ids, needles, question_ids, length, rng, forbidden)
    return RetrievalPrompt(input_ids, answer_ids, f" {number}", task, length, depth)
