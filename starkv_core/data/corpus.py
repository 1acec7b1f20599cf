"""Documents from the built-in text, local files and hub data sets."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from starkv_core import embedded
from starkv_core.artifacts import read_text
from starkv_core.errors import UserError

BUILTIN: Final = {
    "builtin": embedded.CALIBRATION_TEXT,
    "builtin:heldout": embedded.HELDOUT_TEXT,
}
"""Sources that come with the package: calibration text, and text held out from it."""

_LOADERS: Final = {".jsonl": "json", ".parquet": "parquet"}
_TWO_EMPTY_LINES: Final = re.compile(r"\n[ \t]*\n[ \t]*\n\s*")


def check_source(source: str) -> None:
    """Whether ``source`` can be read at all, told before a model is loaded; a hub is not asked.

    UserError: a folder, a missing or empty file, text that is not UTF-8, or a file of another kind.
    """
    path = BUILTIN.get(source, Path(source))
    if path.is_dir():
        raise UserError(f"{source}: a folder; give one .txt, .jsonl or .parquet file in it")
    readable = path.suffix.lower() in (".txt", *_LOADERS)
    beside = len(path.parts) == 1 or path.parent.is_dir()
    if not path.exists() and (readable or (path.suffix and beside)):
        raise UserError(f"{source}: no such file")
    if readable:
        if path.suffix.lower() == ".parquet":
            if path.stat().st_size == 0:
                raise _empty(source)
        elif source not in BUILTIN:
            check_text_file(path)
    elif source not in BUILTIN and (path.exists() or source.startswith((".", "/", "~"))):
        raise UserError(f"{source}: not a .txt, .jsonl or .parquet file, nor a hub data set")


def documents(
    source: str, config: str | None = None, split: str = "train", field: str = "text"
) -> Iterator[str]:
    """Documents of ``source`` in its own order, empty ones left out.

    ``source`` is a name in :data:`BUILTIN`, a .txt file (documents separated by two empty lines), a
    .jsonl or .parquet file, or a hub data set, which is streamed. ``field`` holds the text of a
    row; ``config`` and ``split`` choose within a hub data set.

    UserError, before the first document where possible: no such file or data set, no text, not
    UTF-8, no such field, or the ``datasets`` package missing.
    """
    check_source(source)
    path = BUILTIN.get(source, Path(source))
    suffix = path.suffix.lower()
    if source in BUILTIN or suffix == ".txt":
        found: Iterable[str] = _TWO_EMPTY_LINES.split(read_text(path).replace("\r\n", "\n"))
    elif suffix in _LOADERS:
        found = _texts(_local_rows(path, suffix), source, field)
    else:
        found = _texts(_hub_rows(source, config, split), source, field)
    return _not_empty(found, source)


def _not_empty(found: Iterable[str], source: str) -> Iterator[str]:
    any_text = False
    for text in found:
        if text and not text.isspace():
            any_text = True
            yield text.strip("\n")
    if not any_text:
        raise _empty(source)


def _empty(source: str | Path) -> UserError:
    return UserError(f"{source}: empty; it holds no text to read")


def _texts(rows: Iterable[Mapping[str, Any]], source: str, field: str) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        if field not in row:
            raise UserError(
                f"{source}: no field {field!r}; its rows have {', '.join(map(str, row))}; name one "
                "with data.field"
            )
        text = row[field]
        if not isinstance(text, str):
            raise UserError(f"{source}, row {number}: field {field!r} holds {type(text).__name__}")
        yield text


def _local_rows(path: Path, suffix: str) -> Iterator[Mapping[str, Any]]:
    return _rows(_LOADERS[suffix], str(path), data_files=str(path), split="train")


def _hub_rows(source: str, config: str | None, split: str) -> Iterator[Mapping[str, Any]]:
    return _rows(source, source, name=config, split=split)


def _rows(loader: str, source: str, **options: Any) -> Iterator[Mapping[str, Any]]:
    """Rows streamed through ``datasets``, whatever it raises turned into a UserError."""
    try:
        import datasets  # optional at import: .txt and the built-in text work without it
    except ImportError:
        raise UserError(
            f"{source}: reading it needs the package datasets; install it, or give a .txt file"
        ) from None
    try:
        yield from datasets.load_dataset(loader, streaming=True, **options)
    except Exception as error:  # the readers below it have no common base of errors
        hint = "; without the hub, give a .txt, .jsonl or .parquet file" if loader == source else ""
        raise UserError(f"{source}: cannot be read: {_first_line(error)}{hint}") from error


def _first_line(error: BaseException) -> str:
    # Readers wrap the reason: "An error occurred while generating the dataset" helps nobody.
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def check_text_file(path: Path) -> None:
    """Read a text file through, a piece at a time.

    UserError: unreadable, not UTF-8 (with the offset of the first bad byte), or nothing but spaces.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, blank = 0, True
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        while True:
            chunk = file.read(1 << 20)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: not UTF-8 text (byte {offset - pending + error.start}); "
                    "convert it first"
                ) from None
            blank = blank and not text.removeprefix("\ufeff").strip()
            if not chunk:
                break
            offset += len(chunk)
    if blank:
        raise _empty(path)
