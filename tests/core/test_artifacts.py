from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from starkv_core import artifacts
from starkv_core.artifacts import (
    check_disk_space,
    check_schema,
    find_run_dir,
    new_manifest,
    new_run_dir,
    parse_yaml,
    read_json,
    read_manifest,
    read_safetensors,
    read_yaml,
    save_safetensors_atomic,
    write_json_atomic,
    write_manifest,
    write_text_atomic,
    write_yaml_atomic,
)
from starkv_core.errors import UserError
from starkv_core.provenance import sha256_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "a.txt"
    write_text_atomic(target, "old")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="input/output"):
        write_text_atomic(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    write_text_atomic(target, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no disk space left to write .*a.txt"):
        write_text_atomic(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_disk_space_is_checked_before_tensors_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _: usage)
    check_disk_space(tmp_path / "not" / "there" / "yet", 2**20)
    with pytest.raises(UserError, match="needs 4 MiB and 1 MiB are free"):
        save_safetensors_atomic(tmp_path / "x.safetensors", {"a": torch.zeros(2**20)})
    assert names(tmp_path) == []


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.txt", "x")
    save_safetensors_atomic(tmp_path / "b.safetensors", {"a": torch.zeros(1)})
    modes = {stat.S_IMODE((tmp_path / n).stat().st_mode) for n in names(tmp_path)}
    (tmp_path / "plain").touch()
    assert modes == {stat.S_IMODE((tmp_path / "plain").stat().st_mode)}


def test_json_and_yaml_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2], "a": {"lr": 2e-5, "none": None, "text": "zwölf"}}
    write_json_atomic(tmp_path / "v.json", value)
    write_yaml_atomic(tmp_path / "v.yaml", value, comment="first\nsecond")
    assert read_json(tmp_path / "v.json") == value
    assert read_yaml(tmp_path / "v.yaml") == value
    text = (tmp_path / "v.yaml").read_text()
    assert text.startswith("# first\n# second\nb:")


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(tmp_path / "v.json", {"ppl": float("nan")})
    assert names(tmp_path) == []


# --- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-5", 2e-5), ("1E3", 1000.0), ("-.5e+2", -50.0), ("3.0e-4", 3e-4), ("1e", "1e"), ("7", 7)],
)
def test_yaml_reads_exponents_as_numbers(text: str, value: object) -> None:
    assert parse_yaml(text, "here") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"here, line 3, column 1: .*'a' stands here twice"),
        ("a: [1", r"here, line 1, column 6: not valid YAML"),
        ("a: !!python/object:os.system x", r"here, line 1, column 4: .*could not determine"),
        ("{[1]: 2}", r"here, line 1, column 2: .*unhashable key"),
        ("a: 2020-13-45", "here: not valid YAML"),
    ],
)
def test_bad_yaml_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "here")


def test_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"abc: \xff")
    with pytest.raises(UserError, match=r"r.yaml: not UTF-8 text \(byte 5\)"):
        read_yaml(tmp_path / "r.yaml")


# --- safetensors ---------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    weight = torch.arange(15, dtype=torch.float32).view(3, 5).t()  # not contiguous
    save_safetensors_atomic(
        path, {"w": weight, "head": weight[:2], "n": torch.tensor([7])}, {"k": "v"}
    )
    return path


def test_tensors_and_metadata_come_back(stored: Path) -> None:
    expected = {"w": ((5, 3), torch.float32), "head": (None, None), "n": ((1,), torch.int64)}
    tensors, metadata = read_safetensors(stored, expected, sha256=sha256_file(stored))
    assert torch.equal(tensors["w"], torch.arange(15, dtype=torch.float32).view(3, 5).t())
    assert torch.equal(tensors["head"], tensors["w"][:2])
    assert tensors["n"].item() == 7
    assert metadata == {"k": "v"}


def test_every_truncation_is_refused(stored: Path) -> None:
    data = stored.read_bytes()
    for length in range(0, len(data), 7):
        stored.write_bytes(data[:length])
        with pytest.raises(UserError, match="truncated or not safetensors"):
            read_safetensors(stored)


def test_a_changed_byte_is_refused_by_checksum(stored: Path) -> None:
    checksum = sha256_file(stored)
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(UserError, match="checksum is not the one in manifest.json"):
        read_safetensors(stored, sha256=checksum)


def test_all_tensor_faults_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_safetensors_atomic(
        path,
        {
            "shape": torch.zeros(2, 3),
            "dtype": torch.zeros(2, dtype=torch.float16),
            "bad": torch.tensor([1.0, float("nan")]),
            "extra": torch.zeros(1),
        },
    )
    with pytest.raises(UserError) as caught:
        read_safetensors(
            path,
            {
                "shape": ((3, 2), None),
                "dtype": (None, torch.float32),
                "bad": (None, None),
                "absent": (None, None),
            },
        )
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "absent is missing",
        "bad holds NaN or infinity",
        "dtype has dtype torch.float16, expected torch.float32",
        "extra does not belong here",
        "shape has shape [2, 3], expected [3, 2]",
    ]


def test_missing_tensor_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_safetensors(tmp_path / "none.safetensors")


# --- run folders ---------------------------------------------------------------------------------


def test_new_run_dir_is_whole_or_absent(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    with pytest.raises(RuntimeError), new_run_dir(run) as folder:
        (folder / "a").touch()
        raise RuntimeError
    assert names(tmp_path / "runs") == []
    with new_run_dir(run) as folder:
        (folder / "a").touch()
        assert not run.exists()
    assert names(tmp_path / "runs") == ["x"]
    assert names(run) == ["a"]
    assert find_run_dir(run) == run
    with pytest.raises(UserError, match="no run to resume there"):
        find_run_dir(tmp_path / "y")


def test_new_run_dir_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        with (
            pytest.raises(UserError, match=r"already exists; continue it with --resume"),
            new_run_dir(tmp_path / name),
        ):
            pass
    with pytest.raises(UserError, match="cannot be made"), new_run_dir(tmp_path / "file" / "x"):
        pass
    assert names(tmp_path) == ["file", "folder"]


def test_manifest_round_trip_with_checksums(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"one")
    base = {"name": "embedded", "revision": None, "fingerprint": "f" * 64, "dtype": "float32"}
    manifest = write_manifest(tmp_path, new_manifest(base, seed=3), ["a.bin"])
    (tmp_path / "b.bin").write_bytes(b"two")
    manifest = write_manifest(tmp_path, manifest, ["b.bin"])
    found = read_manifest(tmp_path)
    assert found == manifest
    assert found["base_model"] == base
    assert found["seed"] == 3
    assert found["files"] == {n: sha256_file(tmp_path / n) for n in ("a.bin", "b.bin")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schema": 2}, r"written by a newer starkv \(schema 2, this one reads up to 1\)"),
        ({"schema": "x"}, "schema is 'x', expected 1"),
        ([], "not a manifest"),
        ({"schema": 1, "base_model": {}}, "seed is missing or malformed\n.*files is missing"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_a_folder_without_manifest_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        read_manifest(tmp_path)


def test_malformed_json_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema": 1,\n "seed" 2}')
    with pytest.raises(UserError, match="line 2, column 9: not valid JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("schema", [True, 0, None, 1.0])
def test_schema_must_be_a_whole_number(schema: object) -> None:
    with pytest.raises(UserError, match="expected 1"):
        check_schema(schema, "here")
