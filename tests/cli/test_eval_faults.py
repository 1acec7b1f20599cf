"""What `starkv eval` refuses: one line, exit 2, before what takes long."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starkv_cli.main import main
from starkv_core.artifacts import read_json, write_json_atomic
from starkv_core.provenance import sha256_file
from tests.cli.conftest import OnDisk
from tests.eval_rows import write_rows

QUICK = ["--window", 64, "--windows", 2, "--lengths", 400, "--depths", 0, "--prompts", 1]
Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `starkv eval`; it must end with exit code 2 and one line, which is returned."""

    def run(*args: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["eval", *map(str, args)])
        printed = capsys.readouterr()
        assert end.value.code == 2, printed.err
        assert printed.out == ""
        (line,) = [line for line in printed.err.splitlines() if line.startswith("starkv: ")]
        assert printed.err.endswith(line + "\n")
        return line

    return run


@pytest.fixture
def model(on_disk: OnDisk, tmp_path: Path) -> Path:
    """A copy of the model of a test's own."""
    return Path(shutil.copytree(on_disk.model, tmp_path / "model"))


def test_a_tokenizer_with_more_tokens_than_the_model(
    on_disk: OnDisk, model: Path, refused: Refused
) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"more{i}": 258 + i for i in range(9)}
    path.write_text(json.dumps(content))
    # told before the weights are read: here there are none
    (model / "model.safetensors").unlink()
    said = refused(model, *QUICK, "--text", on_disk.text)
    assert "tokenizer has 265 tokens, the model knows 258" in said


def test_a_token_that_the_model_does_not_know(
    on_disk: OnDisk, model: Path, refused: Refused
) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    added = {**content["added_tokens"][0], "id": 300, "content": "fox", "special": False}
    content["added_tokens"].append(added)
    path.write_text(json.dumps(content))
    said = refused(model, *QUICK, "--text", on_disk.text)
    assert "tokenizer makes token" in said and "knows 258" in said


def test_a_tokenizer_other_than_the_runs(
    on_disk: OnDisk, run: Path, model: Path, refused: Refused
) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(content))
    said = refused(run, *QUICK, "--text", on_disk.text, "--model", model)
    assert "made with another tokenizer" in said and "--model" in said


@pytest.mark.parametrize(
    "tasks", ["perplexity", "passkey", "kv", "multi-value", "arc_easy", "arc_easy --decode-path"]
)
def test_numbers_that_are_not_finite_name_the_layer(
    tasks: str, on_disk: OnDisk, run: Path, tmp_path: Path, refused: Refused
) -> None:
    """Factors of layer 1 that are too large, in every kind of task."""
    if tasks.startswith("arc_easy"):
        pytest.importorskip("lm_eval", reason="lm-eval is not installed (starkv[eval])")
        write_rows(tmp_path)
    path = run / "factors.safetensors"
    tensors = load_file(path)
    (name,) = [n for n in tensors if n.startswith("folded.layers.1.") and "value_up" in n]
    # finite, as what is read must be; its products are not
    tensors[name].fill_(torch.finfo(tensors[name].dtype).max)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    manifest = read_json(run / "manifest.json")
    manifest["files"]["factors.safetensors"] = sha256_file(path)
    write_json_atomic(run / "manifest.json", manifest)
    args = ["--tasks", *tasks.split(), "--data", tmp_path, "--no-dense", "--text", on_disk.text]
    said = refused(run, *QUICK, *args)
    assert "not finite from layer 1 on" in said
    assert not list(run.glob("results/*"))


def test_a_run_without_a_compressed_layer(
    on_disk: OnDisk, run: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "ranks.yaml"
    ranks = yaml.safe_load(path.read_text())
    ranks["layers"] = ["dense" for _ in ranks["layers"]]
    path.write_text(yaml.safe_dump(ranks))
    with pytest.raises(SystemExit) as end:
        main(["calibrate", "--export", str(run)])
    assert end.value.code == 0, capsys.readouterr().err
    assert "all of its layers are dense" in refused(run, *QUICK, "--text", on_disk.text)


def test_text_on_a_hub_out_of_reach(refused: Refused) -> None:
    said = refused("nowhere/at/all", "--text", "some/dataset")  # tests run offline
    assert "some/dataset: cannot be read" in said and "give a .txt" in said


def test_a_field_that_the_text_does_not_have(tmp_path: Path, refused: Refused) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"content": "A dog barks."}\n')
    said = refused("nowhere/at/all", "--text", rows)
    assert "no field 'text'; its rows have content" in said
