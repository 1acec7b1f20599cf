from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from starkv_core.data.corpus import check_source, documents
from starkv_core.data.packing import pack, plant
from starkv_core.errors import UserError
from starkv_core.models.load import load

END = 0


class Characters:
    """A tokenizer of code points, ``END`` between documents."""

    eos_token_id: int | None = END
    bos_token_id: int | None = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


@pytest.fixture
def need_datasets() -> None:
    pytest.importorskip("datasets")


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- documents -----------------------------------------------------------------------------------


def test_text_documents_are_separated_by_two_empty_lines(tmp_path: Path) -> None:
    text = "\ufeffone\n\nstill one\n\n\ntwo\r\n\r\n\r\n\r\nthree \n\n \n\n"
    assert list(documents(write(tmp_path / "a.txt", text))) == [
        "one\n\nstill one",
        "two",
        "three ",
    ]


def test_text_needs_no_datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert list(documents(write(tmp_path / "a.txt", "one"))) == ["one"]
    source = write(tmp_path / "a.jsonl", '{"text": "one"}\n')
    with pytest.raises(UserError, match="needs the package datasets"):
        next(documents(source))


@pytest.mark.parametrize("text", ["", "\n\n \n\t\n"])
def test_empty_text(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="a.txt: empty"):
        list(documents(write(tmp_path / "a.txt", text)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8_names_the_byte(tmp_path: Path, name: str) -> None:
    # Past the first mebibyte, with a character cut by the boundary of the reader's chunks.
    start = b"x" * (2**20 - 1) + "ä".encode()
    with pytest.raises(UserError, match=rf"not UTF-8 text \(byte {2**20 + 3}\)"):
        list(documents(write(tmp_path / name, start + b"yy\xff")))


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.parquet", "wiki.raw"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    for source in (str(tmp_path / name), name):
        with pytest.raises(UserError, match=f"{name}: no such file"):
            documents(source)


def test_a_hub_data_set_is_no_missing_file() -> None:
    check_source("someone/texts.v2")
    check_source("someone/texts")


def test_folders_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder; give one"):
        documents(str(tmp_path))
    with pytest.raises(UserError, match="not a .txt, .jsonl or .parquet file"):
        documents(write(tmp_path / "a.csv", "text\none\n"))


@pytest.mark.usefixtures("need_datasets")
def test_jsonl_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = write(tmp_path / "a.jsonl", '{"body": "one", "n": 1}\n{"body": "", "n": 2}\n')
    pyarrow.parquet.write_table(
        pyarrow.table({"body": ["one", "two"], "n": [1, 2]}), tmp_path / "a.parquet"
    )
    table = str(tmp_path / "a.parquet")
    assert list(documents(lines, field="body")) == ["one"]
    assert list(documents(table, field="body")) == ["one", "two"]
    for source in (lines, table):
        with pytest.raises(UserError, match="no field 'text'; its rows have body, n"):
            list(documents(source))
        with pytest.raises(UserError, match="row 1: field 'n' holds int"):
            list(documents(source, field="n"))


@pytest.mark.usefixtures("need_datasets")
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '{"text": '), ("a.parquet", "PAR1x")])
def test_damaged_files(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(UserError, match=f"{name}: cannot be read: "):
        list(documents(write(tmp_path / name, content)))


@pytest.mark.usefixtures("need_datasets")
def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> Iterator[dict[str, str]]:
        asked.update(options, path=path)
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents("owner/set", config="c", split="test")) == ["one", "two"]
    assert asked == {"path": "owner/set", "name": "c", "split": "test", "streaming": True}


@pytest.mark.usefixtures("need_datasets")
def test_an_unreachable_hub_is_a_user_error() -> None:
    with pytest.raises(UserError, match="owner/set: cannot be read: "):
        next(documents("owner/set"))


def test_builtin_and_held_out_text_differ() -> None:
    calibration, held_out = set(documents("builtin")), set(documents("builtin:heldout"))
    assert calibration and held_out
    assert not calibration & held_out


# --- packing -------------------------------------------------------------------------------------


def test_rows_hold_the_documents_back_to_back() -> None:
    docs = ["abc", "d", "efghij"]
    rows = pack(Characters(), docs, length=13, count=1, seed=0)
    assert rows.shape == (1, 13)
    assert rows.dtype == torch.int64
    ids = rows[0].tolist()
    assert ids[-1] == END
    found = "".join(map(chr, ids)).strip(chr(END)).split(chr(END))
    assert sorted(found) == sorted(docs)


class Beginning(Characters):
    """As LLaMA's: a token before every text, unless none is asked for."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}


def test_rows_begin_as_the_tokenizer_begins_a_text() -> None:
    docs = ["abc", "d", "efghij"]
    rows = pack(Beginning(), docs, length=5, count=3, seed=0)
    assert rows.shape == (3, 5)
    assert rows[:, 0].tolist() == [1, 1, 1]
    assert not (rows[:, 1:] == 1).any()
    plain = pack(Characters(), docs, length=4, count=3, seed=0)
    assert torch.equal(rows[:, 1:], plain)
    silent = Characters()
    silent.bos_token_id = 1  # it has one, but does not use it (Qwen)
    assert torch.equal(pack(silent, docs, length=4, count=3, seed=0), plain)


def test_identical_input_gives_identical_rows() -> None:
    docs = [f"document {i} " * (1 + i % 7) for i in range(3000)]

    def rows(seed: int) -> torch.Tensor:
        return pack(Characters(), iter(docs), length=33, count=40, seed=seed)

    assert torch.equal(rows(1), rows(1))
    assert not torch.equal(rows(1), rows(2))


def test_reads_no_more_of_a_stream_than_it_needs() -> None:
    read = 0

    def stream() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "some text"

    pack(Characters(), stream(), length=10, count=20, seed=0)
    assert read <= 1024 + 20


def test_too_little_text_says_how_much() -> None:
    with pytest.raises(UserError, match="3 sequences of 5 need 15 tokens, found 8"):
        pack(Characters(), ["abc", "def"], length=5, count=3, seed=0)


def test_rows_beyond_the_least_are_as_many_as_the_text_gives() -> None:
    found = pack(Characters(), ["abc", "def"], length=2, count=9, seed=0, least=3)
    assert sorted(found.flatten().tolist()) == sorted([*map(ord, "abcdef"), END, END])
    with pytest.raises(UserError, match="5 sequences of 2 need 10 tokens, found 8"):
        pack(Characters(), ["abc", "def"], length=2, count=9, seed=0, least=5)


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = Characters()
    tokenizer.eos_token_id = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        pack(tokenizer, ["abc"], length=2, count=1, seed=0)


# --- passages that come back -------------------------------------------------------------------


def builtin_rows(count: int, length: int) -> tuple[Any, torch.Tensor]:
    loaded = load(None, device="cpu")
    return loaded.tokenizer, pack(loaded.tokenizer, documents("builtin"), length, count, 0)


def test_passages_of_the_first_half_come_back_in_the_second() -> None:
    tokenizer, rows = builtin_rows(12, 512)
    planted = plant(tokenizer, rows, 0.5, seed=1)
    changed = (planted != rows).any(1)
    assert int(changed.sum()) == 6
    assert torch.equal(planted[:, 0], rows[:, 0])
    for row in planted[changed].tolist():
        early, late = row[:256], row[256:]
        places = {tuple(early[i : i + 8]): i for i in range(len(early) - 7)}
        again = {places[p] for i in range(len(late) - 7) if (p := tuple(late[i : i + 8])) in places}
        # Two stretches of 127 tokens, one passage of at least 8 in each.
        assert any(i < 128 for i in again) and any(i >= 120 for i in again)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_planting_depends_on_seed_and_share_alone(share: float) -> None:
    tokenizer, rows = builtin_rows(4, 128)
    before = rows.clone()
    planted = plant(tokenizer, rows, share, seed=1)
    assert torch.equal(rows, before)
    assert torch.equal(planted, plant(tokenizer, rows, share, seed=1))
    assert int((planted != rows).any(1).sum()) == round(share * 4)


def test_more_rows_change_none_of_the_first() -> None:
    """What calibration kept out stays out of what a longer recovery trains on."""
    loaded = load(None, device="cpu")
    few, many = (
        pack(loaded.tokenizer, documents("builtin"), 128, count, 3, least=8) for count in (8, 30)
    )
    assert len(many) == 30 and torch.equal(many[:8], few)
    planted = plant(loaded.tokenizer, many, 0.4, seed=1)
    assert torch.equal(planted[:8], plant(loaded.tokenizer, few, 0.4, seed=1))


def test_rows_too_short_to_ask_are_left_alone() -> None:
    tokenizer, rows = builtin_rows(4, 16)
    assert torch.equal(plant(tokenizer, rows, 1.0, seed=1), rows)
