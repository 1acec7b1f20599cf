"""Records of starkv bench: appended, compared, rendered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from starkv_core.bench.records import (
    KEYS,
    Record,
    append_records,
    baselines,
    broken,
    crossover,
    crossovers,
    read_records,
    tokens,
)
from starkv_core.bench.render import (
    check_folder,
    commit_of,
    notes,
    publish,
    render_readme,
    tables,
)
from starkv_core.errors import UserError

COMMON: dict[str, Any] = {
    "run": "20270101T000000Z-abcd",
    "shape": "llama-2-7b",
    "rank_map": "0123abcd",
    "memory": None,
    "dtype": "float16",
    "bits": 16,
    "runs": 100,
    "cache_bytes": 3 << 30,
    "planned_bytes": 5 << 30,
    "peak_bytes": 4 << 30,
    "cache_ratio": None,
    "cache_parts": None,
    "gate_error": 1e-4,
    "fault": None,
    "note": None,
    "bandwidth": 4.4e12,
    "gpu": "NVIDIA H200",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "starkv": "0.1.0",
    "commit": "0" * 40,
    "date": "2027-01-01T00:00:00+00:00",
}


def record(backend: str, ctx: int, ms: float | None, **changes: Any) -> Record:
    """A record as the suite makes them, of the suite attention unless said otherwise."""
    own = {
        "suite": "attention",
        "ctx": ctx,
        "batch": 16,
        "backend": backend,
        "removed": 0.75 if backend == "starkv" else 0.0,
        "ms_p20": ms and ms * 0.9,
        "ms_p50": ms,
        "ms_p80": ms and ms * 1.1,
        "bytes": 1 << 30,
        "floor_ms": 0.25,
        "tokens_per_s": None,
    }
    filled = {**COMMON, **own, **changes}
    return {key: filled[key] for key in KEYS}


def decoded(backend: str, ctx: int, batch: int | None, ms: float | None, memory: int) -> Record:
    """A record of decoding at equal memory."""
    rate = None if ms is None or batch is None else batch * 1e3 / ms
    return record(backend, ctx, ms, suite="decode", batch=batch, memory=memory, tokens_per_s=rate)


CURVE = [
    *(record("sdpa-default", ctx, ms) for ctx, ms in ((1024, 0.1), (4096, 0.4), (32768, 2.0))),
    *(record("sdpa-flash", ctx, ms) for ctx, ms in ((1024, 0.3), (4096, 0.6), (32768, 4.0))),
    *(record("starkv", ctx, ms) for ctx, ms in ((1024, 0.2), (4096, 0.2), (32768, 0.5))),
]


def test_crossover_is_where_all_that_follow_win() -> None:
    assert crossover({1: 0.5, 2: 1.5, 4: 2.0}) == 2
    assert crossover({1: 1.5, 2: 0.9, 4: 2.0}) == 4
    assert crossover({1: 1.5, 2: 2.0}) == 1
    assert crossover({1: 1.5, 2: 1.0}) is None
    assert crossovers(CURVE) == [
        "attention, llama-2-7b, batch 16: ours wins from 4K (not yet at 1K) against sdpa-default",
        "attention, llama-2-7b, batch 16: ours wins at every context measured, from 1K against "
        "sdpa-flash",
    ]


def test_speed_is_compared_within_a_case_of_one_run() -> None:
    ours = CURVE[-1]
    assert baselines(ours, CURVE) == {
        "sdpa-default": pytest.approx(4.0),
        "sdpa-flash": pytest.approx(8.0),
    }
    elsewhere = record("rebuild", 32768, 9.0, run="another")
    other_batch = record("rebuild", 32768, 9.0, batch=1)
    failed = record("rebuild", 32768, None, fault="wrong: ...")
    assert "rebuild" not in baselines(ours, [*CURVE, elsewhere, other_batch, failed])


def test_equal_memory_compares_tokens_a_second_of_different_batches() -> None:
    memory = 80 << 30
    records = [
        decoded("static-graph", 16384, 8, 20.0, memory),  # 400 a second
        decoded("starkv", 16384, 32, 20.0, memory),  # 1600
        decoded("static-graph", 65536, None, None, memory),
        decoded("starkv", 65536, 8, 20.0, memory),
    ]
    assert baselines(records[1], records) == {"static-graph": pytest.approx(4.0)}
    assert baselines(records[3], records) == {}
    _, rows = tables(records)["decode"]
    assert [row[0] for row in rows] == [
        "16K x 8 in 80 GiB",
        "16K x 32 in 80 GiB",
        "64K x - in 80 GiB",
        "64K x 8 in 80 GiB",
    ]
    assert rows[1][-1] == "4.00x"


def coded(ctx: int, ms: float, **changes: Any) -> Record:
    """A record of 3.2 bits."""
    return record("starkv-coded", ctx, ms, **{"bits": 3.2064, "removed": 0.75, **changes})


def test_codes_are_compared_with_our_16_bits_too() -> None:
    records = [*CURVE, coded(4096, 0.1), coded(32768, 0.2)]
    assert baselines(records[-1], records) == {
        "sdpa-default": pytest.approx(10.0),
        "sdpa-flash": pytest.approx(20.0),
        "starkv": pytest.approx(2.5),
    }
    assert "starkv" not in baselines(CURVE[0], records)
    assert crossovers(records)[:2] == crossovers(CURVE)
    assert crossovers(records)[2:] == [
        "attention, llama-2-7b, batch 16: ours in 3.21 bits wins at every context measured, from "
        f"4K against {name}"
        for name in ("sdpa-default", "sdpa-flash", "starkv")
    ]
    columns, rows = tables(records)["attention"]
    assert columns[-1] == "faster than default, flash, starkv"
    assert rows[-1][-1] == "10.00x, 20.00x, 2.50x"
    assert rows[0][-1] == "-, 3.00x, -"


def test_a_measured_ratio_has_its_column_and_what_it_is_made_of(tmp_path: Path) -> None:
    parts = {"codes": 3 << 20, "scales": 0, "window": 1 << 20}
    of_decode = {"suite": "decode", "tokens_per_s": 100.0, "cache_bytes": 4 << 20}
    records = [
        record("static-graph", 4096, 2.0, cache_ratio=0.97, **of_decode),
        coded(4096, 1.0, cache_ratio=19.4, cache_parts=parts, **of_decode),
    ]
    columns, rows = tables(records)["decode"]
    assert [row[columns.index("ratio")] for row in rows] == ["0.97", "19.40"]
    assert notes(records) == [
        "4K x 16 starkv-coded: cache of 4 MiB, 19.40 times smaller than dense: codes 3 MiB, "
        "window 1 MiB"
    ]
    text = publish(tmp_path, records)[-1].read_text()
    assert "### decode, llama-2-7b, float16, 75.0% removed, codes of 3.21 bits, rank map" in text
    assert "ratio" not in tables(CURVE)["attention"][0]


def test_a_commit_says_that_files_differed() -> None:
    assert commit_of({"commit": "a" * 40 + "+dirty"}) == "a" * 12 + "+dirty"
    assert commit_of({"commit": "a" * 40}) == "a" * 12
    assert commit_of({"commit": None}) == "unknown"


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "deep")
    publish(tmp_path, CURVE)
    check_folder(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match=r"README\.md: not of `starkv bench`"):
        check_folder(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"other\.jsonl, line 1: not a record"):
        check_folder(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        check_folder(tmp_path / "other.jsonl")


def test_the_records_of_this_checkout_are_read_and_their_page_is_current(tmp_path: Path) -> None:
    """Old records lack keys; the page in the repository is what the code renders."""
    docs = Path(__file__).parents[2] / "docs" / "benchmarks"
    copied = tmp_path / "benchmarks"
    shutil.copytree(docs, copied)
    check_folder(copied)
    assert render_readme(copied).read_text() == (docs / "README.md").read_text()


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "2027-01-01.jsonl"
    append_records(path, CURVE[:2])
    append_records(path, CURVE[2:])
    assert [json.loads(line) for line in path.read_text().splitlines()] == CURVE
    assert read_records(path.parent) == CURVE
    with pytest.raises(ValueError, match="(?i)json"):
        append_records(path, [record("starkv", 1, float("nan"))])
    assert read_records(path.parent) == CURVE


def test_records_from_before_rank_maps_were_named_are_read(tmp_path: Path) -> None:
    old = [{key: value for key, value in r.items() if key != "rank_map"} for r in CURVE]
    append_records(tmp_path / "a.jsonl", old)
    assert read_records(tmp_path) == [{**r, "rank_map": None} for r in CURVE]
    publish(tmp_path, [record("starkv", 4096, 0.1, run="20270102T000000Z-ffff")])
    text = (tmp_path / "README.md").read_text()
    assert "75.0% removed\n" in text and "75.0% removed, rank map 0123abcd\n" in text


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"run": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    append_records(tmp_path / "a.jsonl", CURVE[:1])
    (tmp_path / "b.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: not a record"):
        read_records(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        append_records(tmp_path / "file" / "a.jsonl", CURVE)


def test_published_folder(tmp_path: Path) -> None:
    missing = record("rebuild", 32768, None, fault="does not fit: 9 GiB | 8 GiB there")
    noted = record("starkv", 65536, 1.0, note="launched without a graph")
    written = publish(tmp_path, [*CURVE, missing, noted])
    assert [path.name for path in written] == [
        "2027-01-01.jsonl",
        "20270101T000000Z-abcd-attention-llama-2-7b.png",
        "README.md",
    ]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    text = written[2].read_text()
    assert "| 32K x 16 | starkv | 0.5 (0.45-0.55) | 1 GiB | 0.25 (2.00x) | 3 GiB | 4 GiB |" in text
    assert "| 4.00x, 8.00x |" in text
    assert "No real calibration stands behind" in text
    assert "- ours" not in text
    assert "ours wins from 4K (not yet at 1K) against sdpa-default" in text
    assert "32K x 16 rebuild: does not fit" in text
    assert "* starkv: launched without a graph" in text
    assert f"]({written[1].name})" in text
    # A second run joins the first, in the file and in the tables.
    publish(tmp_path, [record("starkv", 4096, 0.1, run="20270101T010000Z-ffff")])
    assert len(read_records(tmp_path)) == len(CURVE) + 3
    assert written[2].read_text().count("## 2027-01-01, NVIDIA H200") == 2


def test_failures_are_told_from_what_does_not_fit() -> None:
    fits = record("rebuild", 1, None, fault="does not fit: ...")
    wrong = record("starkv", 1, None, fault="wrong: relative error 1")
    assert broken([*CURVE, fits, wrong]) == [wrong]
    assert notes([wrong]) == ["1 x 16 starkv: wrong: relative error 1"]


def test_contexts_for_people() -> None:
    assert [tokens(n) for n in (500, 4096, 5000, 131072, 1 << 20)] == [
        "500",
        "4K",
        "5000",
        "128K",
        "1M",
    ]
