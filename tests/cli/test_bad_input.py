"""Bad input through the command line: one line (or one per fault), exit code 2, nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from starkv_cli.main import main
from starkv_core.provenance import sha256_file
from tests.cli.conftest import OnDisk
from tests.standin import save_model

Recipe = dict[str, Any]


class Shell:
    """Runs commands in a folder and holds what lies there against what lay there before."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def files(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in self.folder.rglob("*")}

    def run(self, *args: object) -> tuple[int, str, str]:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        out, err = self.capsys.readouterr()
        return int(end.value.code or 0), out, err

    def refused(self, *args: object, lines: int = 1) -> str:
        """The message of a command that must change nothing."""
        before = self.files()
        code, out, err = self.run(*args)
        assert (code, out) == (2, ""), err
        assert len(err.splitlines()) == lines, err
        assert err.startswith("starkv: ")
        assert "Traceback" not in err
        assert "internal error" not in err
        assert self.files() == before
        return err


@pytest.fixture
def shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


@pytest.fixture
def content(on_disk: OnDisk) -> Recipe:
    return {
        "model": {"name": str(on_disk.model)},
        "budget": {"ratio": 2.0},
        "steps": 2,
        "rank_steps": 1,
        "batch": 1,
        "data": {"source": str(on_disk.text), "length": 32},
        "start": {"sequences": 2, "probes": 1},
    }


def written(folder: Path, content: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- recipes -------------------------------------------------------------------------------------


def test_missing_recipe(shell: Shell) -> None:
    assert "no such recipe file" in shell.refused("calibrate", "--recipe", "nothing.yaml")
    message = shell.refused("calibrate", "--recipe", "longchatt")
    assert "the nearest is longchat" in message


def test_malformed_recipe(shell: Shell, tmp_path: Path) -> None:
    path = written(tmp_path, "budget: {ratio: 2\nsteps: 3\n")
    assert "line 2" in shell.refused("calibrate", "--recipe", path)
    path = written(tmp_path, "- a\n- b\n")
    assert "a recipe is a mapping of keys" in shell.refused("calibrate", "--recipe", path)
    path.write_bytes(b"budget: \xff\xfe\n")
    assert "not UTF-8" in shell.refused("calibrate", "--recipe", path)


def test_all_faults_at_once(shell: Shell, tmp_path: Path, content: Recipe) -> None:
    content |= {"stepz": 3, "batch": 0, "budget": {"ratoi": 2, "fit": "much"}, "optim": {"lr": -1}}
    path = written(tmp_path, content)
    message = shell.refused("calibrate", "--recipe", path, "--set", "seeed=1", lines=7)
    for part in ("6 faults", "nearest is steps", "nearest is budget.ratio", "nearest is seed"):
        assert part in message
    for part in ("batch: must be at least 1", "TOKENS@MEMORY", "optim.lr: must be above 0"):
        assert part in message


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"ratio": 90}, "below the floor"),
        ({"bytes_per_token": 3}, "below the floor"),
        ({"fit": "32k@1KB"}, "below the floor"),
        ({"bytes_per_token": 100000}, "shrinks nothing"),
        ({"ratio": 0.5}, "must be above 1"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_impossible_budget(
    shell: Shell, tmp_path: Path, content: Recipe, budget: Recipe, reason: str, dry: list[str]
) -> None:
    path = written(tmp_path, content | {"budget": budget})
    assert reason in shell.refused("calibrate", "--recipe", path, "--out", "x", *dry)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("start.skip_layers=[7]", "layer 7 does not exist"),
        ("data.length=4096", "the model's context is 1024"),
        ("model.name=./nowhere", "no such model folder"),
        ("data.source=nowhere.txt", "nowhere.txt: no such file"),
    ],
)
def test_recipe_that_does_not_fit_the_model(
    shell: Shell, tmp_path: Path, content: Recipe, setting: str, reason: str
) -> None:
    path = written(tmp_path, content)
    args = ["calibrate", "--recipe", path, "--set", setting, "--out", "x"]
    assert reason in shell.refused(*args)
    assert reason in shell.refused(*args, "--dry-run")


def test_unknown_device(shell: Shell, tmp_path: Path, content: Recipe) -> None:
    args = ["calibrate", "--recipe", written(tmp_path, content), "--device", "gpu0"]
    assert "device 'gpu0'" in shell.refused(*args)
    assert "device 'gpu0'" in shell.refused(*args, "--dry-run")


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b" \n\n\n \n", "empty"),
        (b"caf\xe9 au lait\n" * 100, "not UTF-8 text (byte 3)"),
        (b"too short", "too little text"),
    ],
)
def test_text_of_calibration(
    shell: Shell, tmp_path: Path, content: Recipe, data: bytes | None, reason: str
) -> None:
    text = tmp_path / "text.txt"
    if data is not None:
        text.write_bytes(data)
    content["data"]["source"] = str(text)
    path = written(tmp_path, content)
    args = ["calibrate", "--recipe", path, "--out", "x"]
    assert reason in shell.refused(*args)
    if reason != "too little text":  # that takes the tokenizer, the rest is told before a model
        content["model"]["name"] = str(tmp_path / "no-model")
        written(tmp_path, content)
        assert reason in shell.refused(*args)
        assert reason in shell.refused(*args, "--dry-run")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"caf\xe9 au lait\n" * 100, "not UTF-8 text (byte 3)"),
        (b"too short", "too few for one window"),
    ],
)
def test_text_of_eval(
    shell: Shell, tmp_path: Path, run: Path, data: bytes | None, reason: str
) -> None:
    text = tmp_path / "text.txt"
    if data is not None:
        text.write_bytes(data)
    args = ["--text", text, "--tasks", "perplexity", "--window", "64", "--out", "x"]
    assert reason in shell.refused("eval", run, *args)
    if reason != "too few for one window":
        assert reason in shell.refused("eval", "./no-model", *args)


# --- context -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["--tasks", "perplexity", "--window", 1025], ["--tasks", "passkey", "--lengths", 1024]]
)
def test_eval_past_the_context(shell: Shell, run: Path, on_disk: OnDisk, args: list[Any]) -> None:
    message = shell.refused("eval", run, "--text", on_disk.text, *args, "--out", "x")
    assert "do not fit the context" in message
    assert "1024 tokens" in message


def test_chat_past_the_context(shell: Shell, run: Path) -> None:
    before = shell.files()
    code, out, err = shell.run("chat", run, "--prompt", "word " * 300, "--max-new-tokens", 4)
    assert (code, out.strip(), len(err.splitlines())) == (2, "", 1)
    assert "1024 tokens; shorten it" in err
    assert shell.files() == before


# --- run folders ---------------------------------------------------------------------------------


def commands(run: Path) -> list[list[object]]:
    return [
        ["eval", run, "--out", "x"],
        ["chat", run, "--prompt", "hello"],
        ["analyze", "ranks", run, "--out", "x"],
        ["calibrate", "--export", run],
        ["calibrate", "--resume", "--out", run],
    ]


def test_run_of_another_base_model(shell: Shell, run: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for command in (["eval", run], ["chat", run, "--prompt", "hello"]):
        message = shell.refused(*command, "--model", other)
        assert "made for other weights" in message
        assert "--model" in message
    # The same when the folder the manifest names holds other weights now.
    named = json.loads((run / "manifest.json").read_text())["base_model"]["name"]
    for name in ("manifest.json", "recipe.yaml"):
        (run / name).write_text((run / name).read_text().replace(named, str(other)))
    for command in commands(run):
        if command[0] != "analyze":
            assert "made for other weights" in shell.refused(*command)


def test_moved_base_model(shell: Shell, run: Path, on_disk: OnDisk, tmp_path: Path) -> None:
    for name in ("manifest.json", "recipe.yaml"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace(str(on_disk.model), str(tmp_path / "gone")))
    other = save_model(tmp_path / "other", max_positions=512)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"][0, 0] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for command in (["--export", run], ["--resume", "--out", run]):
        assert "no such model folder" in shell.refused("calibrate", *command)
        assert "made for other weights" in shell.refused("calibrate", *command, "--model", other)
        assert shell.run("calibrate", *command, "--model", on_disk.model)[0] == 0


@pytest.mark.parametrize("file", ["manifest.json", "ranks.yaml"])
def test_newer_schema(shell: Shell, run: Path, file: str) -> None:
    path = run / file
    text = path.read_text()
    path.write_text(text.replace('"schema": 1', '"schema": 2').replace("schema: 1", "schema: 2"))
    assert path.read_text() != text
    for command in commands(run)[:4]:
        assert "written by a newer starkv (schema 2" in shell.refused(*command)


def test_newer_schema_of_a_recipe(shell: Shell, tmp_path: Path, content: Recipe) -> None:
    path = written(tmp_path, content | {"schema": 2})
    assert "newer starkv (schema 2" in shell.refused("calibrate", "--recipe", path)


@pytest.mark.parametrize("damage", ["truncated", "one byte", "missing", "empty"])
def test_damaged_factors(shell: Shell, run: Path, damage: str) -> None:
    path = run / "factors.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "one byte":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    for command in (c for c in commands(run)[:4] if c[0] != "analyze"):
        assert "factors.safetensors" in shell.refused(*command)


@pytest.mark.parametrize("damage", ["truncated", "nan", "misshapen", "fewer rows", "metadata"])
def test_damaged_factors_with_a_matching_checksum(shell: Shell, run: Path, damage: str) -> None:
    path = run / "factors.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for name in tensors:
            if name.endswith(("key_up", "keys.up")):
                if damage == "nan":
                    tensors[name][0, 0] = float("nan")
                elif damage == "misshapen":
                    tensors[name] = tensors[name][:, 1:].contiguous()
                elif damage == "fewer rows":
                    tensors[name] = tensors[name][1:].contiguous()
        save_file(tensors, path, metadata=None if damage == "metadata" else metadata)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"]["factors.safetensors"] = sha256_file(path)
    (run / "manifest.json").write_text(json.dumps(manifest))
    for command in (["eval", run], ["calibrate", "--export", run]):
        before = shell.files()
        code, out, err = shell.run(*command)
        assert (code, out) == (2, ""), err
        assert "factors.safetensors" in err
        assert "internal error" not in err
        assert shell.files() == before


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (["dense"], "1 layers, but the model has 2"),
        ([{"keys": [99, 1], "values": 1}, "dense"], "layer 0: key rank 99 is above 12"),
        (
            [{"keys": [1, 1, 1], "values": 1}, "dense"],
            "3 key ranks do not divide 2 heads; expected 1 or 2",
        ),
        ([{"keys": [1, 0], "values": 1}, "dense"], "whole numbers from 1"),
        ("dense", "not a rank map"),
    ],
)
def test_rank_map_that_does_not_fit(shell: Shell, run: Path, layers: Any, reason: str) -> None:
    (run / "ranks.yaml").write_text(yaml.safe_dump({"schema": 1, "layers": layers}))
    assert reason in shell.refused("calibrate", "--export", run)
    assert "ranks.yaml" in shell.refused("eval", run)


def test_edited_ranks_say_what_to_type(shell: Shell, run: Path) -> None:
    content = yaml.safe_load((run / "ranks.yaml").read_text())
    content["layers"][0]["values"] -= 1
    (run / "ranks.yaml").write_text(yaml.safe_dump(content))
    for command in commands(run)[:2]:
        assert f"`starkv calibrate --export {run}`" in shell.refused(*command)
    assert shell.run("calibrate", "--export", run)[0] == 0


def test_existing_out(shell: Shell, tmp_path: Path, content: Recipe, run: Path) -> None:
    path = written(tmp_path, content)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for out in (run, "file", "folder"):
        message = shell.refused("calibrate", "--recipe", path, "--out", out)
        assert "already exists" in message
    assert "already exists" in shell.refused("eval", run, "--out", "folder")
    assert "cannot be made" in shell.refused("calibrate", "--recipe", path, "--out", "file/x")


def test_nothing_to_resume(shell: Shell, tmp_path: Path, content: Recipe) -> None:
    path = written(tmp_path, content)
    args = ["calibrate", "--resume", "--out", "nowhere"]
    assert "nowhere: no run to resume" in shell.refused(*args)
    assert "no run to resume" in shell.refused(*args, "--recipe", path)


def test_unfinished_run(shell: Shell, run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["files"]["factors.safetensors"]
    edit_json(run / "manifest.json", files=manifest["files"])
    for command in commands(run)[:2]:
        message = shell.refused(*command)
        assert f"`starkv calibrate --resume --out {run}`" in message
    assert "has not finished" in shell.refused("calibrate", "--export", run)


# --- resources -----------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def test_no_disk_space(
    shell: Shell, tmp_path: Path, content: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 5000, 5000))
    path = written(tmp_path, content)
    message = shell.refused("calibrate", "--recipe", path, "--out", "x")
    assert "no disk space: x needs" in message


def test_out_of_gpu_memory(
    shell: Shell, tmp_path: Path, content: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was needed, what to change; and the run can go on from where it stood."""
    import starkv_core.calibrate.loop as loop

    def step(*_: Any) -> float:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 "
            "GiB of which 1.10 GiB is free. Including non-PyTorch memory, this process has 22 GiB"
        )

    path = written(tmp_path, content)
    with monkeypatch.context() as broken:
        broken.setattr(loop._Calibration, "step", step)
        code, out, err = shell.run("calibrate", "--recipe", path, "--out", "x", "--device", "cpu")
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("starkv: out of GPU memory: 2.00 GiB more were needed, 1.10 GiB of")
    assert "lower batch" in last
    assert "Traceback" not in err
    resumed = [shell.run("calibrate", "--resume", "--out", "x", "--device", "cpu") for _ in "12"]
    assert [code for code, _, _ in resumed] == [0, 0]
    assert ["finished before" in err for _, _, err in resumed] == [False, True]


# --- Ctrl-C --------------------------------------------------------------------------------------


INTERRUPTED = """\
import signal, sys
import starkv_core.calibrate.loop as loop
from starkv_cli.main import main

step = loop._Calibration.step

def interrupted(self, now):
    if now == 2:
        signal.raise_signal(signal.SIGINT)
    return step(self, now)

loop._Calibration.step = interrupted
main(sys.argv[1:])
"""


def test_interrupted_run_says_what_to_type_and_it_works(
    shell: Shell, tmp_path: Path, content: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    content |= {"steps": 4, "rank_steps": 2, "optim": {"checkpoint_every": 1}}
    path = str(written(tmp_path, content))
    calibrate = ["calibrate", "--recipe", path, "--out", "a run", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *calibrate],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr
    command = "starkv calibrate --resume --out 'a run' --device cpu"
    assert done.stderr.splitlines()[-1] == f"starkv: interrupted; to continue: {command}"
    assert len((tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()) == 2

    import starkv_core.calibrate.loop as loop

    steps, plain = [], loop._Calibration.step

    def step(self: Any, now: int) -> float:
        steps.append(now)
        return plain(self, now)

    monkeypatch.setattr(loop._Calibration, "step", step)
    assert shell.run("calibrate", "--resume", "--out", "a run", "--device", "cpu")[0] == 0
    assert steps == [2, 3]
