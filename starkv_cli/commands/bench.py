"""``starkv bench``: speed beside the dense cache, with the memory limit and a correctness gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starkv_cli.console import emit_json, note, print_table, print_text, progress
from starkv_cli.options import BaseModel, Device
from starkv_core.errors import RunFailure, UserError

if TYPE_CHECKING:
    from starkv_core.bench.records import Record


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench", short_help="Speed and memory beside the dense cache, on a GPU.")(bench)


def bench(
    ctx: Annotated[
        str | None,
        typer.Option(help="Tokens in the cache, with commas: 4k,32k. Default: as the suite has."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Rows, with commas. Default: 16; of prefill, 1.")
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            help="llama-2-7b, llama-3.1-8b, mistral-7b, qwen2.5-0.5b, qwen3-0.6b, or a RUN folder."
        ),
    ] = "llama-2-7b",
    suite: Annotated[
        str,
        typer.Option(
            help="attention (one layer), decode (whole model, tokens/s), prefill, or all."
        ),
    ] = "attention",
    memory: Annotated[
        str | None,
        typer.Option(help="decode at equal memory: each side at the largest batch, such as 80GiB."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16 or bfloat16. Default: float16; of a RUN, bfloat16.")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Of latent attention: reference or triton. Default: the best there is."),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            help="Codes too: 2 to 4 (3.2: a fifth 4 bits, the rest 3) or 8. A quantised RUN's own "
            "need no --bits."
        ),
    ] = None,
    model: BaseModel = None,
    device: Device = None,
    scale_down: Annotated[
        bool,
        typer.Option("--scale-down", help="Small enough for a CPU; its times mean nothing."),
    ] = False,
    record: Annotated[
        bool,
        typer.Option("--record", help="Append to docs/benchmarks of this checkout, or to --out."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for records, their README.md and the figures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Time attention, decoding and prefill beside the dense cache; plans memory first.

    Example: starkv bench --ctx 32k --batch 16 --bits 3.2
    """
    from starkv_core.bench.codes import parse_bits
    from starkv_core.bench.records import broken, crossovers
    from starkv_core.bench.render import check_folder, notes, publish, tables
    from starkv_core.bench.sizes import parse_counts, parse_memory
    from starkv_core.bench.suite import BenchOptions, run_bench

    options = BenchOptions(
        suite=suite,
        shape=shape,
        contexts=parse_counts("ctx", ctx),
        batches=parse_counts("batch", batch),
        memory=parse_memory(memory),
        dtype=dtype,
        backend=backend,
        bits=parse_bits(bits),
        model=model,
        device=device,
        scale_down=scale_down,
    )
    folder = _folder(record, out, scale_down)
    if folder is not None:
        check_folder(folder)
    records = run_bench(options, progress())
    if folder is not None:
        for path in publish(folder, records):
            note(f"wrote {path}")
    if as_json:
        emit_json(records)
    else:
        for name, (columns, rows) in tables(records).items():
            print_table(f"{name}: {_title(records[0])}", columns, rows)
        for line in (*crossovers(records), *notes(records)):
            print_text(line)
    if records[0]["gpu"].startswith("none"):
        note("these times were taken on a CPU, scaled down: they show that it works, nothing more")
    if failed := broken(records):
        raise RunFailure(
            f"{len(failed)} of {len(records)} measurements failed: {failed[0]['suite']} "
            f"{failed[0]['ctx']} x {failed[0]['batch']} {failed[0]['backend']}: "
            f"{failed[0]['fault']}"
        )


def _folder(record: bool, out: Path | None, scale_down: bool) -> Path | None:
    """Where records go, None for nowhere."""
    if out is not None:
        return out
    if not record:
        return None
    if scale_down:
        raise UserError("--record: scaled-down runs are no benchmark; give another folder by --out")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        raise UserError("--record: starkv does not run from a checkout; give a folder by --out")
    return root / "docs" / "benchmarks"


def _title(record: Record) -> str:
    from starkv_core.bench.render import commit_of

    bandwidth = record["bandwidth"] / 1e12
    return (
        f"{record['shape']} in {record['dtype']} on {record['gpu']}, "
        f"{bandwidth:.2f} TB/s measured, commit {commit_of(record)}"
    )
