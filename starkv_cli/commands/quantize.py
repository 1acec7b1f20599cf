"""``starkv quantize``: give the latents of a run a few bits each."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from starkv_cli.console import emit_json, note, print_table, progress
from starkv_cli.options import BaseModel, Device
from starkv_core.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("quantize", short_help="Give a run's latents a few bits each, under a budget.")(
        quantize
    )


def quantize(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")],
    scheme: Annotated[
        str, typer.Option(help="star: bits where they count. paper: 4 and 3 bits, as published.")
    ] = "star",
    bits: Annotated[
        float | None,
        typer.Option(help="Budget: mean bits of a latent of RUN. Default: 4 if none is given."),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Budget: dense cache over this one, counted whole.")
    ] = None,
    budget_bytes: Annotated[
        float | None, typer.Option(help="Budget: bytes per token of the whole cache.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="CTX@MEM", help="Budget: this context in this memory: 32k@8GiB."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens (1024, 2k) at which bytes are counted. Default: what RUN's recipe was "
            "fitted to, or the length of its sequences."
        ),
    ] = None,
    widths: Annotated[
        str | None, typer.Option(help="Bits that may be used, of 2,3,4,8. Default: all.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Most recent tokens kept in 16 bits. Default: 32.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens kept in 16 bits. Default: 4.")
    ] = None,
    scales: Annotated[
        str | None,
        typer.Option(help="Of tokens: static (none) or row (16 bits a row). Default: static."),
    ] = None,
    prefill: Annotated[
        str, typer.Option(help="What prompts attend to: exact or coded latents.")
    ] = "exact",
    recover_steps: Annotated[
        int,
        typer.Option(
            help="Steps of quantisation-aware distillation afterwards, on text, batch and "
            "learning rate of RUN's recipe."
        ),
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="New run folder. Default: beside the factors, in RUN.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the quantisation that RUN has.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write a result even if its KL says it is broken.")
    ] = False,
    model: BaseModel = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantise the latents of a run: 0 to 8 bits each, under one byte budget for the whole cache.

    RUN does best at a cache ratio of about the cube root of the final one: 1.5 for 4, 2 for 8,
    2.5 for 16. Bits do the rest.

    Example: starkv quantize runs/tiny-embedded --ratio 8 --context 1024 --out runs/tiny-q8
    """
    from starkv_core.quant.run import BitBudget, quantize_run
    from starkv_core.quant.scheme import make_scheme
    from starkv_core.sizes import fit_of, tokens_of

    made = make_scheme(
        scheme,
        widths=None if widths is None else _widths(widths),
        window=window,
        sinks=sinks,
        scales=scales,
        prefill=prefill,
    )
    try:
        sizes = None if fit is None else fit_of(fit)
    except ValueError as error:
        raise UserError(f"--fit {fit!r}: {error}") from None
    tokens = None if context is None else tokens_of(context)
    if context is not None and not tokens:
        raise UserError(f"--context {context!r}: give a number of tokens such as 1024 or 2k")
    budget = BitBudget(bits, ratio, budget_bytes, sizes, tokens)
    result = quantize_run(
        run,
        made,
        budget,
        out=out,
        replace_existing=replace,
        force=force,
        recover_steps=recover_steps,
        device=device,
        model=model,
        progress=progress(),
    )
    if as_json:
        emit_json(result.to_dict())
        return
    print_table(f"Run {result.run_dir}", ["what", "value"], result.rows())
    print_table(
        "Bits",
        ["layer", "bits, keys", "channels", "bits, values", "channels"],
        result.layer_rows(),
    )
    if result.kl > result.kl_limit:
        note("written by --force: the model is broken by the measure of its KL")
    most = max(result.scheme["widths"])
    if result.limit is not None and result.bits == most and result.measured_bytes < result.limit:
        note(
            f"the budget is not used up: all latents have {most} bits; a run of a smaller cache "
            "ratio would use it"
        )
    note(f"next: starkv eval {shlex.quote(result.run_dir)}")


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--widths {text!r}: whole numbers with commas are expected") from None
