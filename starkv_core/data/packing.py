"""Token sequences of equal length, packed from documents."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

import torch

from starkv_core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPAN: Final = 128  # tokens of a row for each passage that comes back in it
_LEAST, _MOST = 8, 48  # tokens of such a passage
_BUFFER: Final = 1024
"""Documents held for shuffling: enough to mix a stream, little enough to download first."""


def pack(
    tokenizer: PreTrainedTokenizerBase,
    docs: Iterable[str],
    length: int,
    count: int,
    seed: int,
    least: int | None = None,
) -> torch.Tensor:
    """Pack documents back to back into rows without padding.

    Documents are drawn through a shuffle buffer, tokenised without special tokens, each ended by
    the end-of-sequence token, joined, and cut into rows; the rows are then shuffled, since
    neighbours may come from one long document. The same documents, tokenizer and ``seed`` give the
    same rows. Reads no more documents than it needs, and the buffer.

    Where the tokenizer puts a beginning-of-sequence token before a text (LLaMA), every row begins
    with it, for a row is read as one text; it is not repeated before documents inside a row. The
    windows of perplexity are cut from a text as published figures are: only the first has it.

    Returns int64 token ids ``[count, length]``, or as many rows as the text gives if those are
    ``least`` or more; the first ``least`` are those that a call for no more of them returns.
    UserError if the text is too short, or the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("the tokenizer has no end-of-sequence token to put between documents")
    begin = _begin(tokenizer)
    size = length - len(begin)
    ids: list[int] = []
    for document in _shuffled(docs, random.Random(seed)):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(end)
        if len(ids) >= count * size:
            break
    needed = count if least is None else least
    if len(ids) < needed * size:
        raise UserError(
            f"too little text: {needed} sequences of {length} need {needed * size} tokens, "
            f"found {len(ids)}; give more text, fewer sequences or shorter ones"
        )
    count = min(count, len(ids) // size)
    rows = torch.tensor(ids[: count * size], dtype=torch.int64).view(count, -1)
    rows = torch.cat([torch.tensor(begin, dtype=torch.int64).expand(count, -1), rows], dim=1)
    generator = torch.Generator().manual_seed(seed)
    first = min(needed, count)
    order = torch.randperm(first, generator=generator)
    more = first + torch.randperm(count - first, generator=generator)
    return rows[torch.cat((order, more))]


def plant(
    tokenizer: PreTrainedTokenizerBase, rows: torch.Tensor, share: float, seed: int
) -> torch.Tensor:
    """Rows of which a share asks for recall: passages of the first half come back in the second.

    Plain text seldom asks what stood far before, and what it does not ask for is not measured and
    not trained. In a chosen row every stretch of 128 tokens of the first half gets a passage of 8
    to 48: its own text, its tokens in random order, or a record (words, a number); all come back
    in the second half, in another order. The rest of the row stays, its first token too.

    Args:
        rows: int64 ``[N, L]``, as of :func:`pack`; rows under 32 tokens stay as they are.
        share: of the rows, 0 to 1, spread evenly; each row's passages depend on ``seed`` and its
            place alone, not on how many rows follow.

    Returns:
        int64 ``[N, L]``, a copy.
    """
    found = rows.clone()
    half = rows.shape[1] // 2
    if half < 2 * _LEAST:
        return found
    for n in range(len(rows)):
        if round(share * (n + 1)) == round(share * n):
            continue
        order = random.Random(f"{seed} {n}")
        count = max(1, half // _SPAN)
        room = (half - 1) // count
        make = order.choice((_own, _shuffled_tokens, _record))
        back = order.sample(range(count), count)
        for early, late in enumerate(back):
            size = order.randint(_LEAST, min(_MOST, room))
            start = 1 + early * room + order.randint(0, room - size)
            passage = make(tokenizer, found[n, start : start + size].tolist(), order)
            found[n, start : start + size] = torch.tensor(passage)
            again = half + late * room + order.randint(0, room - size)
            found[n, again : again + size] = torch.tensor(passage)
    return found


def _own(tokenizer: PreTrainedTokenizerBase, ids: list[int], order: random.Random) -> list[int]:
    return ids


def _shuffled_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], order: random.Random
) -> list[int]:
    return order.sample(ids, len(ids))


def _record(tokenizer: PreTrainedTokenizerBase, ids: list[int], order: random.Random) -> list[int]:
    """Two words of the passage and a number, again and again with other numbers, as it fits."""
    words = [word for word in str(tokenizer.decode(ids)).split() if word.isalpha()]
    text = ""
    for _ in range(len(ids) // _LEAST + 1):
        name = " ".join(order.choice(words or ["item"]) for _ in range(2))
        text += f"\n{name}: {order.randrange(10_000, 100_000)}"
    made: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return (made + ids)[: len(ids)]


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token if the tokenizer puts it before a text, else nothing."""
    around: list[int] = tokenizer("", verbose=False)["input_ids"]
    return [id for id in around[:1] if id == tokenizer.bos_token_id]


def _shuffled(docs: Iterable[str], order: random.Random) -> Iterator[str]:
    """All of ``docs``, each drawn at random from a buffer that the stream refills."""
    buffer: list[str] = []
    for document in docs:
        if len(buffer) < _BUFFER:
            buffer.append(document)
            continue
        index = order.randrange(_BUFFER)
        yield buffer[index]
        buffer[index] = document
    order.shuffle(buffer)
    yield from buffer
