"""`starkv eval --cache`: baselines as columns of the one table, alone and on top of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from starkv_cli.main import main
from tests.cli.conftest import OnDisk

SMALL = [
    "--window",
    "48",
    "--windows",
    "2",
    "--lengths",
    "300",
    "--depths",
    "0.5",
    "--prompts",
    "1",
]


def starkv(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


@pytest.mark.parametrize("run", [False, True])
def test_caches_are_columns_beside_the_model(
    run: bool, on_disk: OnDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject, caches = on_disk.model, "rtn-4,h2o-0.25,streaming-12"
    if run:
        subject, caches = tmp_path / "run", "h2o-0.25,streaming-12"
        shutil.copytree(on_disk.run, subject)
    out = tmp_path / "out"
    tasks = ["--tasks", "perplexity,passkey", "--text", on_disk.text, "--out", out]
    done = starkv("eval", subject, "--cache", caches, *SMALL, *tasks)
    printed = capsys.readouterr()
    assert done == 0, printed.err
    assert "token by token" in printed.err
    prefix = "compressed + " if run else ""
    columns = ["dense", *(["compressed"] if run else []), *(prefix + c for c in caches.split(","))]
    document = json.loads((out / "eval.json").read_text())
    found = {(r["task"], r["subject"]): r for r in document["results"]}
    assert {subject for _, subject in found} == set(columns)
    perplexities = [found["perplexity", column] for column in columns]
    assert {record["path"] for record in perplexities} == {"decode"}
    assert len({record["metrics"][0]["value"] for record in perplexities}) == len(columns)
    # 47 tokens were fed. 2 layers, 2 heads of 12 numbers, keys and values; ratio 2 in the run.
    # H2O: 11 tokens, a score in 4 bytes for each head and token (with latents for each token,
    # and a position); streaming: 12 tokens.
    token = 2 * 2 * 2 * 12 * 2 // (2 if run else 1)
    extra = 2 * (4 + 4) if run else 2 * 2 * 4
    held = {c: document[c]["cache"]["held"] / 2 for c in columns}
    assert held[f"{prefix}h2o-0.25"] == 11 * (token + extra)
    assert held[f"{prefix}streaming-12"] == 12 * token
    dense = 47 * 2 * 2 * 2 * 12 * 2
    assert document[f"{prefix}h2o-0.25"]["cache"]["ratio"] == dense / held[f"{prefix}h2o-0.25"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--cache", "h20-0.2"], "the nearest is h2o-0.2"),
        (["--cache", "h2o-2.5"], "a share of the tokens seen"),
        (["--cache", "kivi-4"], "starkv quantize"),
        (["--cache", "h2o-0.2", "--mode", "both"], "--mode token"),
        (["--cache", "h2o-0.2", "--tasks", "piqa"], "--decode-path"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(
    args: list[str],
    said: str,
    on_disk: OnDisk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("starkv_core.run.load", load)
    assert starkv("eval", on_disk.run, *args) == 2
    message = capsys.readouterr().err.strip()
    assert said in message
    assert message.count("\n") == 0
