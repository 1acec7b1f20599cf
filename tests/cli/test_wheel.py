"""What an installed starkv consists of."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from starkv_core.recipe import recipe_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {
        "starkv_cli",
        "starkv_core",
        "triton_ops",
    }
    for package in ("starkv_cli", "starkv_core", "triton_ops"):
        assert f"{package}/py.typed" in names
    assert {f"starkv_core/recipes/{name}.yaml" for name in recipe_names()} <= names
    core = ROOT / "starkv_core"
    shipped = {
        path.relative_to(ROOT).as_posix()
        for folder in (core / "embedded", core / "eval" / "tasks")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_recipes_are_found_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        "from starkv_core.recipe import find_recipe, load_recipe, recipe_names\n"
        "print(find_recipe('paper/longchat'), load_recipe('longchat').budget.ratio)\n"
        "print(*recipe_names())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, names = done.stdout.splitlines()
    assert found == f"{site}/starkv_core/recipes/paper/longchat.yaml 4.0"
    assert names.split() == recipe_names()
