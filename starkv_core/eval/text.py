"""The text an evaluation reads: tokenised as a whole, then cut into windows or used as filler."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starkv_core.artifacts import read_text
from starkv_core.data.corpus import check_text_file, documents
from starkv_core.errors import UserError

BUILTIN = "builtin"
_HELDOUT = "builtin:heldout"  # as starkv_core.data.corpus names it

_BY_DOCUMENTS = (".jsonl", ".parquet")
_CHARACTERS_PER_TOKEN = 4  # first guess of how many documents to read


@dataclass(frozen=True)
class EvalText:
    """A text and its tokens.

    Attributes:
        ids: token ids of the whole text, with the special tokens its tokenizer puts around a text.
        source: where the text came from.
        join: how its documents became one text.
        sha256: of the UTF-8 text.
    """

    ids: list[int]
    source: str
    join: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON, without the tokens."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "join": self.join,
            "tokens": len(self.ids),
        }


def is_endless(source: str) -> bool:
    """Whether ``source`` is a hub data set, which may be too long to read whole."""
    return source != BUILTIN and not Path(source).exists()


def check_eval_text(
    source: str, config: str | None = None, split: str = "test", field: str = "text"
) -> None:
    """Whether ``source`` can be read at all, told before a model is loaded.

    Args:
        source, config, split, field: as :func:`read_eval_text` has them. The first document of a
            hub data set is fetched.

    Raises:
        UserError: missing, empty or not UTF-8, no such field, or a hub out of reach.
    """
    if _is_plain(source):
        check_text_file(Path(source))
    elif source != BUILTIN:
        next(documents(source, config, split, field))


def _is_plain(source: str) -> bool:
    """Whether ``source`` is a file to read as one string, whatever it is called."""
    path = Path(source)
    return source != BUILTIN and path.is_file() and path.suffix.lower() not in _BY_DOCUMENTS


def read_eval_text(
    tokenizer: Any,
    source: str = BUILTIN,
    *,
    tokens: int | None = None,
    config: str | None = None,
    split: str = "test",
    field: str = "text",
) -> EvalText:
    """Read and tokenise a text.

    Args:
        tokenizer: of the model.
        source: ``builtin`` (the held-out text of the package, its documents each closed by the end
            token, as the embedded model was trained), a file, or a hub data set. A plain text file
            is one string, byte for byte; documents of .jsonl, .parquet and the hub are joined with
            an empty line.
        tokens: enough tokens; more documents than give them are not read. None reads all.
        config, split, field: of a hub data set; ``field`` of .jsonl and .parquet as well.

    Raises:
        UserError: no such text, empty, not UTF-8, no such field.
    """
    if source == BUILTIN:
        parts = list(documents(_HELDOUT))
        text = "\n\n".join(parts)
        ids = [token for part in parts for token in _ended(tokenizer, part)]
        join = "documents each closed by the end token"
    elif _is_plain(source):
        text, join = read_text(source), "whole file as one string"
        if not text.strip():
            raise UserError(f"{source}: empty; it holds no text to read")
        ids = _tokenise(tokenizer, text)
    else:
        text, ids = _gather(tokenizer, documents(source, config, split, field), tokens)
        join = "documents joined with an empty line"
    return EvalText(ids, source, join, hashlib.sha256(text.encode()).hexdigest())


def _ended(tokenizer: Any, text: str) -> list[int]:
    end = tokenizer.eos_token_id
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return ids if end is None else [*ids, end]


def _tokenise(tokenizer: Any, text: str) -> list[int]:
    # `verbose` silences the warning about lengths past the model's: the windows are what is fed.
    return list(tokenizer(text, verbose=False).input_ids)


def _gather(tokenizer: Any, parts: Iterator[str], tokens: int | None) -> tuple[str, list[int]]:
    """Read documents until they give ``tokens`` tokens (None: all of them)."""
    gathered: list[str] = []
    size, goal = 0, math.inf if tokens is None else float(tokens * _CHARACTERS_PER_TOKEN)
    for part in parts:
        gathered.append(part)
        size += len(part)
        if size >= goal:
            text = "\n\n".join(gathered)
            ids = _tokenise(tokenizer, text)
            if tokens is not None and len(ids) >= tokens:
                return text, ids
            goal = 2.0 * size
    text = "\n\n".join(gathered)
    return text, _tokenise(tokenizer, text)
