"""`starkv calibrate` passes on what it is given and says how to go on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from starkv_cli.main import main
from starkv_core.recipe import Recipe, load_recipe


class Calls:
    """Stands in for starkv_core.calibrate and remembers what it was asked."""

    def __init__(self) -> None:
        self.kind = ""
        self.recipe: Recipe | None = None
        self.folder: Path | None = None
        self.options: dict[str, Any] = {}
        self.interrupt_after_start = False
        self.interrupt_before_start = False

    def plan(self, recipe: Recipe, **options: Any) -> Any:
        self.kind, self.recipe, self.options = "plan", recipe, options
        return SimpleNamespace(rows=lambda: [("layers", "4")], to_dict=lambda: {"layers": 4})

    def run_calibration(self, recipe: Recipe, folder: Path, **options: Any) -> Any:
        self.kind, self.recipe, self.folder, self.options = "run", recipe, folder, options
        if self.interrupt_before_start:
            raise KeyboardInterrupt
        folder.mkdir(parents=True)
        if self.interrupt_after_start:
            raise KeyboardInterrupt
        return self._result(folder)

    def export_run(self, folder: Path, **options: Any) -> Any:
        self.kind, self.folder, self.options = "export", folder, options
        return self._result(folder)

    @staticmethod
    def _result(folder: Path) -> Any:
        return SimpleNamespace(
            run_dir=folder,
            rows=lambda: [("cache ratio", "2.00")],
            to_dict=lambda: {"run_dir": str(folder), "ratio": 2.0},
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    found = Calls()
    for name in ("plan", "run_calibration", "export_run"):
        monkeypatch.setattr(f"starkv_core.calibrate.{name}", getattr(found, name), raising=False)
    monkeypatch.chdir(tmp_path)
    return found


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["calibrate", *args])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("args", "folder"),
    [
        (["--recipe", "tiny"], "runs/tiny-embedded"),
        (["--recipe", "longchat"], "runs/longchat-longchat-7b-v1.5-32k"),
        (["--recipe", "paper/longchat", "--model", "/a/b/"], "runs/paper-longchat-b"),
        (["--recipe", "tiny", "--out", "here/x"], "here/x"),
    ],
)
def test_run_folder(calls: Calls, args: list[str], folder: str) -> None:
    assert run(*args) == 0
    assert (calls.kind, calls.folder) == ("run", Path(folder))


def test_overrides_model_and_device_are_passed_on(calls: Calls) -> None:
    odd = "a model: 1e5"  # would be a mapping if it went through YAML unquoted
    code = run(
        "--recipe",
        "tiny",
        "--set",
        "ratio=3",
        "--set",
        "lr=1e-4",
        "--model",
        odd,
        "--device",
        "cpu",
    )
    assert code == 0
    assert calls.recipe is not None
    assert calls.recipe.budget.ratio == 3
    assert calls.recipe.optim.lr == 1e-4
    assert calls.recipe.model.name == odd
    assert calls.options["device"] == "cpu"
    assert calls.options["resume"] is False


def test_results(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recipe", "tiny", "--json", "--out", "a") == 0
    assert json.loads(capsys.readouterr().out) == {"run_dir": "a", "ratio": 2.0}
    assert run("--recipe", "tiny", "--out", "b") == 0
    out, err = capsys.readouterr()
    assert "cache ratio" in out
    assert err == "next: starkv eval b\n"


def test_dry_run_writes_nothing(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--recipe", "tiny", "--dry-run", "--json") == 0
    assert calls.kind == "plan"
    assert json.loads(capsys.readouterr().out) == {"layers": 4}
    assert run("--recipe", "tiny", "--dry-run") == 0
    assert "layers" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_says_how_to_continue(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.interrupt_after_start = True
    assert run("--recipe", "tiny", "--out", "a b", "--device", "cpu") == 130
    assert capsys.readouterr().err == (
        "starkv: interrupted; to continue: starkv calibrate --resume --out 'a b' --device cpu\n"
    )


def test_interrupt_before_anything_was_written(
    calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    calls.interrupt_before_start = True
    assert run("--recipe", "tiny") == 130
    assert capsys.readouterr().err == "starkv: interrupted\n"


def test_resume_takes_the_recipe_of_the_run(calls: Calls, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = load_recipe("tiny", ["ratio=3"])
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(recipe.to_dict()))
    (folder / "x").mkdir()
    calls.interrupt_before_start = True
    assert run("--resume", "--out", str(folder)) == 130
    assert calls.recipe == recipe
    assert calls.folder == folder
    assert calls.options["resume"] is True


@pytest.mark.parametrize("args", [[], ["--out", "a"]])
def test_a_recipe_must_be_named(
    calls: Calls, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert err.startswith("starkv: name a recipe with --recipe: ")
    assert "paper/longchat" in err
    assert calls.kind == ""


def test_resume_must_name_its_run(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--resume") == 2
    assert capsys.readouterr().err == "starkv: name the run to resume with --out RUN\n"
    assert calls.kind == ""


def test_a_moved_base_model_is_passed_on(
    calls: Calls, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--export", "a", "--model", "/now/here") == 0
    assert (calls.kind, calls.options["model"]) == ("export", "/now/here")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(load_recipe("tiny").to_dict()))
    calls.interrupt_before_start = True
    assert run("--resume", "--out", "run", "--model", "/now/here") == 130
    assert calls.recipe == load_recipe("tiny")
    assert calls.options["model"] == "/now/here"
    assert "starkv calibrate --resume --out run --model /now/here\n" in capsys.readouterr().err


def test_export_goes_alone(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--export", "a", "--recipe", "tiny") == 2
    assert "--export takes a run folder and no other option" in capsys.readouterr().err
    assert run("--export", "a") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "next: starkv eval a"
    assert "has not been measured" in said[1]
    assert run("--export", "a", "--json") == 0
    assert (calls.kind, calls.folder) == ("export", Path("a"))
    assert json.loads(capsys.readouterr().out)["ratio"] == 2.0


def test_a_model_folder_is_remembered_wherever_one_stands(calls: Calls, tmp_path: Path) -> None:
    """From another folder its relative name would be asked of the hub."""
    (tmp_path / "mine").mkdir()
    for given, wanted in (("mine", str(tmp_path / "mine")), ("owner/model", "owner/model")):
        with pytest.raises(SystemExit):
            main(["calibrate", "--recipe", "tiny", "--model", given, "--dry-run"])
        assert calls.recipe is not None and calls.recipe.model.name == wanted
