"""``starkv calibrate``: learn ranks under a budget and write a run folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv_cli.console import Interrupted, emit_json, note, print_table, progress
from starkv_cli.options import Device
from starkv_core.errors import UserError

if TYPE_CHECKING:
    from starkv_core.calibrate import CalibrationResult
    from starkv_core.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("calibrate", short_help="Learn ranks under a budget, write a run folder.")(
        calibrate
    )


def calibrate(
    recipe: Annotated[
        str | None, typer.Option(help="Recipe: a name such as longchat, or a YAML file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id, in place of the recipe's model; with --resume or --export, "
            "where the base model of the run lies now."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/RECIPE-MODEL.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run in its folder.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
    ] = None,
    device: Device = None,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Only fold RUN's factors again, after editing ranks.yaml."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compress a model: learn ranks under a budget, write a run folder.

    Example: starkv calibrate --recipe tiny --set ratio=3 --out runs/tiny3
    """
    from starkv_core.recipe import load_recipe, recipe_label, recipe_names

    if export is not None:
        if recipe or out or resume or dry_run or overrides:
            raise UserError(
                "--export takes a run folder and no other option but --model, --device and --json"
            )
        _export(export, model=model, device=device, as_json=as_json)
        return
    settings = list(overrides or [])
    moved = model if resume and recipe is None else None
    if model is not None and moved is None:
        # Opened from another folder, a relative path would be taken for a hub id.
        model = str(Path(model).resolve()) if Path(model).is_dir() else model
        settings.append(f"model.name={json.dumps(model)}")
    if recipe is None:
        if resume and out is None:
            raise UserError("name the run to resume with --out RUN")
        if out is None or not resume:
            names = ", ".join(recipe_names())
            raise UserError(f"name a recipe with --recipe: a YAML file, or one of {names}")
        started = out / "recipe.yaml"
        if not started.is_file():
            raise UserError(f"{out}: no run to resume (no {started.name} in it)")
        recipe = str(started)
    resolved = load_recipe(recipe, settings)
    if dry_run:
        _plan(resolved, device=device, as_json=as_json)
        return
    base = Path(resolved.model.name or "embedded").name
    folder = out or Path("runs") / f"{recipe_label(recipe)}-{base}"
    _run(resolved, folder, resume=resume, model=moved, device=device, as_json=as_json)


def _plan(recipe: Recipe, *, device: str | None, as_json: bool) -> None:
    from starkv_core.calibrate import plan

    planned = plan(recipe, device=device)
    if as_json:
        emit_json(planned.to_dict())
    else:
        print_table("Plan", ["what", "value"], planned.rows())


def _run(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    model: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    from starkv_core.calibrate import run_calibration
    from starkv_core.run import FACTORS

    finished = resume and (folder / FACTORS).is_file()
    try:
        result = run_calibration(
            recipe, folder, resume=resume, device=device, model=model, progress=progress()
        )
    except KeyboardInterrupt:
        if not folder.is_dir():
            raise
        where = f" --model {shlex.quote(model)}" if model else ""
        where += f" --device {device}" if device else ""
        raise Interrupted(
            "interrupted; to continue: "
            f"starkv calibrate --resume --out {shlex.quote(str(folder))}{where}"
        ) from None
    if finished:
        note(f"{folder}: was finished before; nothing was left to do")
    _show(result, as_json=as_json)


def _export(run_dir: Path, *, model: str | None, device: str | None, as_json: bool) -> None:
    from starkv_core.calibrate import export_run

    result = export_run(run_dir, device=device, model=model)
    _show(result, as_json=as_json)
    note("the quality of the edited ranks has not been measured; `starkv eval` does that")


def _show(result: CalibrationResult, *, as_json: bool) -> None:
    if as_json:
        emit_json(result.to_dict())
        return
    print_table(f"Run {result.run_dir}", ["what", "value"], result.rows())
    note(f"next: starkv eval {shlex.quote(str(result.run_dir))}")
