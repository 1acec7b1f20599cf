"""Text to tokens: the embedded model's tokenizer, its token files and the texts shipped with it.

The text folder holds ``books/*.txt`` and ``permissive/*.txt``, UTF-8, documents separated by two
empty lines. Every twentieth book is held out, and of each permissive file the last documents.
"""

import json
import lzma
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv_core.errors import UserError
from starkv_core.eval.retrieval_tasks import TASKS, make_prompt

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
SEPARATOR = "\n\n\n"

HELDOUT_BOOK_STEP = 20
HELDOUT_BOOK_FIRST = 10
HELDOUT_TAIL = 0.02
# WordNet is 30 MB of near-identical short entries: a fifth of them is plenty.
DOCUMENT_STEP = {"dict_wn": 5}
# Only these may be shipped as text: public domain or CC0.
SHIPPED_FILES = (
    "dict_devil",
    "dict_jargon",
    "shakespeare_8plays",
    "sqlite3_docs",
    "us_inaugural",
    "us_state_union",
    "world_factbook",
)
CALIBRATION_BYTES = {"book": 13_000, "file": 60_000}
CALIBRATION_BOOKS = 60
HELDOUT_BYTES = {"book": 26_000, "file": 20_000}
EXCERPT_BYTES = 16_000
CALIBRATION_RECALL = 250  # retrieval documents, about a seventh of the calibration text


def read_documents(path: Path) -> list[str]:
    """The documents of one text file, empty ones left out."""
    text = path.read_text(encoding="utf-8")
    return [document.strip("\n") for document in text.split(SEPARATOR) if document.strip()]


class Corpus:
    """The text folder, split: name of each file -> its documents, for either side."""

    def __init__(self, folder: Path) -> None:
        books = sorted((folder / "books").glob("*.txt"))
        files = sorted((folder / "permissive").glob("*.txt"))
        if not books or not files:
            raise UserError(f"{folder}: needs books/*.txt and permissive/*.txt")
        self.train: dict[str, list[str]] = {}
        self.heldout: dict[str, list[str]] = {}
        self.books = {path.stem for path in books}
        for index, path in enumerate(books):
            held = index % HELDOUT_BOOK_STEP == HELDOUT_BOOK_FIRST
            (self.heldout if held else self.train)[path.stem] = read_documents(path)
        for path in files:
            documents = read_documents(path)[:: DOCUMENT_STEP.get(path.stem, 1)]
            cut = tail_start(documents)
            self.train[path.stem] = documents[:cut]
            self.heldout[path.stem] = documents[cut:]


def tail_start(documents: Sequence[str]) -> int:
    """Index of the first of the last documents that together hold ``HELDOUT_TAIL`` of the text."""
    wanted = HELDOUT_TAIL * sum(map(len, documents))
    held = 0
    for index in range(len(documents) - 1, 0, -1):
        held += len(documents[index])
        if held >= wanted:
            return index
    raise UserError("a text file must hold at least two documents, one of them to hold out")


def excerpt(document: str, start: int, size: int) -> str:
    """Whole paragraphs of ``document`` from about character ``start``, about ``size`` long."""
    if start > 0:
        start = max(document.find("\n\n", start), 0)
    end = document.find("\n\n", start + size)
    piece = document[start : end if end >= 0 else len(document)]
    return re.sub(r"\n{3,}", "\n\n", piece.strip("\n"))


def shipped_text(corpus: Corpus, heldout: bool, seed: int) -> str:
    """Public-domain excerpts of one side, documents separated by two empty lines."""
    rng = random.Random(seed)
    side = corpus.heldout if heldout else corpus.train
    quota = HELDOUT_BYTES if heldout else CALIBRATION_BYTES
    books = sorted(name for name in side if name in corpus.books)
    if not heldout:
        books = sorted(rng.sample(books, min(CALIBRATION_BOOKS, len(books))))
    pieces: list[str] = []
    for name in books:
        document = max(side[name], key=len)
        pieces.append(excerpt(document, len(document) // 3, quota["book"]))
    for name in SHIPPED_FILES:
        documents = list(side[name])
        rng.shuffle(documents)
        taken = 0
        for document in documents:
            if taken >= quota["file"]:
                break
            pieces.append(excerpt(document, 0, min(EXCERPT_BYTES, quota["file"] - taken)))
            taken += len(pieces[-1])
    # A few source files lost characters on their way here.
    pieces = [piece for piece in pieces if "\ufffd" not in piece]
    rng.shuffle(pieces)
    return SEPARATOR.join(pieces) + "\n"


def retrieval_documents(tokenizer: Any, text: str, count: int, seed: int) -> list[str]:
    """Pass-key and key-value documents with their answers, filled up from ``text``.

    The embedded model was trained on such documents; text alone never asks for recall, and a
    calibration that never sees it prices the components that serve it at nothing.
    """
    rng = random.Random(seed)
    filler = tokenizer(text, add_special_tokens=False).input_ids
    found = []
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        prompt = make_prompt(task, tokenizer, filler, rng.randint(190, 460), rng.random(), rng)
        document = tokenizer.decode(prompt.input_ids + prompt.answer_ids) + "."
        # Needles stand between tokens, which may be parts of one character.
        document = document.replace("\ufffd", "")
        found.append(re.sub(r"\n\s*\n\s*\n+", "\n\n", document).strip())
    return found


def train_tokenizer(documents: Iterable[str]) -> Any:
    """A byte-level BPE of ``VOCAB_SIZE`` tokens, every digit a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenize(tokenizer: Any, documents: Sequence[str]) -> NDArray[np.uint16]:
    """uint16 [tokens]: every document followed by the end-of-text token."""
    end = tokenizer.eos_token_id
    parts: list[NDArray[np.uint16]] = []
    for first in range(0, len(documents), 256):
        encodings = tokenizer(documents[first : first + 256], add_special_tokens=False)
        parts += [np.array([*ids, end], dtype=np.uint16) for ids in encodings["input_ids"]]
    return np.concatenate(parts)


def write_tokens(path: Path, tokens: NDArray[np.uint16]) -> None:
    """Write token ids as xz-compressed little-endian 16-bit integers."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 2, "lc": 0, "lp": 1, "pb": 1}]
    path.write_bytes(lzma.compress(tokens.astype("<u2").tobytes(), filters=filters))


def read_tokens(path: Path) -> NDArray[np.uint16]:
    """Read what :func:`write_tokens` wrote."""
    return np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")


def prepare(folder: Path, out: Path, seed: int) -> dict[str, int]:
    """Write tokenizer, token files and shipped texts to ``out``; return their sizes.

    Files: ``tokenizer/``, ``train.u16.xz``, ``heldout.u16.xz``, ``calibration.txt``,
    ``heldout.txt``, ``split.json`` (which books are held out).
    """
    corpus = Corpus(folder)
    out.mkdir(parents=True, exist_ok=True)
    heldout_books = sorted(corpus.books & set(corpus.heldout))
    (out / "split.json").write_text(json.dumps({"heldout_books": heldout_books}, indent=1) + "\n")
    for name, heldout in (("calibration.txt", False), ("heldout.txt", True)):
        (out / name).write_text(shipped_text(corpus, heldout, seed), encoding="utf-8")
    rng = random.Random(seed)
    everything = [document for documents in corpus.train.values() for document in documents]
    # A third of the text fixes the merges as well as all of it would.
    sample = [document for document in everything if rng.random() < 1 / 3]
    tokenizer = train_tokenizer(sample)
    tokenizer.save_pretrained(out / "tokenizer")
    text = (out / "calibration.txt").read_text(encoding="utf-8")
    recall = retrieval_documents(tokenizer, text, CALIBRATION_RECALL, seed)
    text = SEPARATOR.join([text.rstrip("\n"), *recall]) + "\n"
    (out / "calibration.txt").write_text(text, encoding="utf-8")
    train = tokenize(tokenizer, everything)
    write_tokens(out / "train.u16.xz", train)
    held = [document for documents in corpus.heldout.values() for document in documents]
    heldout_tokens = tokenize(tokenizer, held)
    write_tokens(out / "heldout.u16.xz", heldout_tokens)
    return {
        "train_tokens": len(train),
        "train_bytes": sum(len(document.encode()) for document in everything),
        "heldout_tokens": len(heldout_tokens),
        "heldout_bytes": sum(len(document.encode()) for document in held),
    }
