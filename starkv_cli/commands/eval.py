"""``starkv eval``: perplexity, retrieval and tasks of a run beside its dense model."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from starkv_cli.console import Interrupted, emit_json, note, print_table, progress
from starkv_cli.options import Backend, BaseModel, Device, DeviceMap, Dtype
from starkv_core.errors import UserError

if TYPE_CHECKING:
    from starkv_core.run import Subject

_Number = TypeVar("_Number", int, float)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval", short_help="Perplexity, retrieval, tasks of lm-eval, beside dense.")(
        evaluate
    )


def evaluate(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|MODEL",
            help="Run folder, model folder or hub id, several with --compare. Default: the "
            "embedded model.",
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Of perplexity, passkey, kv, multi-key, multi-value, variable-tracking, "
            "zero-shot, longbench, ruler and lm-eval's own, with commas."
        ),
    ] = "perplexity,passkey,kv",
    text: Annotated[
        str,
        typer.Option(
            help="Text of perplexity and filler of retrieval: a file, a hub data set, or builtin."
        ),
    ] = "builtin",
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    field: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    window: Annotated[int, typer.Option(help="Tokens in a window of perplexity.")] = 1024,
    windows: Annotated[
        int | None,
        typer.Option(help="Most windows. Default: all of a file, 32 of builtin, 64 of the hub."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="Of perplexity: prefill (one pass; quantised latents are read as decoding reads "
            "them), token (by token) or both. Default: prefill, with --cache token."
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens, of retrieval (default 256,512,1024) and RULER (4096)."
        ),
    ] = None,
    depths: Annotated[
        str, typer.Option(help="Depths of the needle, 0 (start) to 1 (end).")
    ] = "0,0.25,0.5,0.75,1",
    prompts: Annotated[int, typer.Option(help="Prompts for each length and depth.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    batch: Annotated[
        str,
        typer.Option(
            "--batch-size",
            "--batch",
            help="Windows, prompts or requests at a time. auto: 4, and of lm-eval's what fits.",
        ),
    ] = "auto",
    limit: Annotated[int | None, typer.Option(help="Rows of each lm-eval task.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with rows of the zero-shot tasks or LongBench, to read instead of a hub."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of lm-eval task files of one's own.")
    ] = None,
    decode_path: Annotated[
        bool,
        typer.Option(
            "--decode-path",
            help="Feed what lm-eval tasks score token by token, through the cache.",
        ),
    ] = False,
    add_bos: Annotated[
        bool,
        typer.Option("--add-bos", help="Begin texts of lm-eval tasks as the tokenizer would."),
    ] = False,
    cache: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="Baselines, each a column of its own, with commas: kivi-2, kivi-4, rtn-2, rtn-4, "
            "rtn-8; h2o-0.2, streaming-0.2 keep that share of the tokens seen, h2o-256, "
            "streaming-256 so many tokens, of RUN's latents or of MODEL's keys and values.",
        ),
    ] = "",
    model: BaseModel = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    backend: Backend = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New folder for report and figure. Default: in RUN; of a MODEL, none."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Set what is measured already of several runs side by side; nothing is run. With "
            "--out, a PNG of quality against cache bytes.",
        ),
    ] = False,
    no_dense: Annotated[
        bool, typer.Option("--no-dense", help="Leave out the dense baseline of RUN.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure perplexity, retrieval, lm-eval tasks and cache bytes, a run beside its dense model.

    Example: starkv eval runs/tiny-embedded --tasks perplexity,passkey --mode both --windows 8
    """
    if compare:
        _compare(subjects or [], out, as_json)
        return
    if subjects is not None and len(subjects) > 1:
        raise UserError(f"{len(subjects)} runs to evaluate; name one, or compare with --compare")
    subject = subjects[0] if subjects else None

    from starkv_core.baselines import check_caches
    from starkv_core.eval.builtin import PERPLEXITY
    from starkv_core.eval.perplexity import MODES
    from starkv_core.eval.records import Kept, holds_only_records
    from starkv_core.eval.report import LENGTHS, TASKS, EvalOptions
    from starkv_core.eval.report import evaluate as run
    from starkv_core.eval.table import CAPTION
    from starkv_core.eval.taskset import load_tasks, tokenizer_of
    from starkv_core.eval.text import check_eval_text
    from starkv_core.run import open_subject

    caches = _names(cache)
    mode = mode or ("token" if caches else "prefill")
    if mode != "both" and not set(_names(mode)) <= set(MODES):
        raise UserError(f"--mode {mode!r}: give prefill, token or both")
    options = EvalOptions(
        tasks=_names(tasks),
        text=text,
        config=config,
        split=split,
        field=field,
        window=window,
        windows=windows,
        modes=MODES if mode == "both" else _names(mode),  # type: ignore[arg-type]
        lengths=LENGTHS if lengths is None else tuple(_numbers("lengths", lengths, int)),
        depths=tuple(_numbers("depths", depths, float)),
        prompts=prompts,
        seed=seed,
        batch=_batch(batch),
        dense=not no_dense,
        limit=limit,
        decode_path=decode_path,
        add_bos=add_bos,
        caches=caches,
    )
    check_caches(caches, subject)
    if out is not None and out.exists() and not holds_only_records(out):
        raise UserError(f"{out} already exists; give another --out")
    if options.builtin:
        check_eval_text(text, config, split, field)
    loaded = load_tasks(
        [task for task in options.tasks if task not in TASKS],
        known=TASKS,
        data=data,
        include_path=include_path,
        tokenizer=tokenizer_of(subject, model),
        lengths=None if lengths is None else options.lengths,
    )
    opened = open_subject(
        subject,
        device=device,
        device_map=device_map,
        dtype=dtype,
        model=model,
        backend=backend,
    )
    if caches and PERPLEXITY in options.tasks:
        note("--cache: perplexity is read token by token, one pass never reads what a cache keeps")
    kept = Kept(out if opened.run_dir is None else opened.run_dir / "results")
    try:
        report = run(opened, options, progress(), loaded, kept)
    except KeyboardInterrupt:
        if kept.folder is None:
            raise
        raise Interrupted(
            f"interrupted; finished tasks are kept in {kept.folder}, the same command goes on"
        ) from None
    if kept.reused:
        note(f"kept from before in {kept.folder}: {', '.join(kept.reused)}")
    files = _files(opened, out)
    if files is not None:
        for path in report.write(*files):
            note(f"wrote {path}")
    if as_json:
        emit_json(report.document)
    else:
        caption = CAPTION.format(next(iter(report.columns)))
        print_table(
            f"Evaluation of {opened.name}", ["", *report.columns], report.rows(), caption=caption
        )


def _compare(sources: list[str], out: Path | None, as_json: bool) -> None:
    """Print one table of runs; write it and its figure to a new folder."""
    from starkv_core.artifacts import write_json_atomic
    from starkv_core.eval.compare import compare
    from starkv_core.eval.figures import comparison_figure
    from starkv_core.eval.table import CAPTION

    if out is not None and out.exists():
        raise UserError(f"{out} already exists; give another --out")
    found = compare(sources)
    if out is not None:
        comparison_figure(found.columns, out / "compare.png")
        write_json_atomic(out / "compare.json", found.to_dict())
        note(f"wrote {out / 'compare.png'}\nwrote {out / 'compare.json'}")
    if as_json:
        emit_json(found.to_dict())
        return
    print_table(
        "Comparison",
        ["", *(column.label for column in found.columns)],
        found.rows(),
        caption=CAPTION.format(found.columns[0].label),
    )


def _files(subject: Subject, out: Path | None) -> tuple[Path, Path] | None:
    """Where report and figure go."""
    if out is not None:
        return out / "eval.json", out / "retrieval.png"
    if subject.run_dir is None:
        return None
    stamp = f"eval-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    results, figures = subject.run_dir / "results", subject.run_dir / "figures"
    # Two evaluations may end within a second: the later one must not replace the earlier.
    stems = chain([stamp], (f"{stamp}-{n}" for n in count(2)))
    stem = next(s for s in stems if not (results / f"{s}.json").exists())
    return results / f"{stem}.json", figures / f"{stem}.png"


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--batch-size {text!r}: a number or auto is expected") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    try:
        return list(dict.fromkeys(kind(part) for part in _names(text)))
    except ValueError:
        raise UserError(f"--{option} {text!r}: numbers with commas are expected") from None
