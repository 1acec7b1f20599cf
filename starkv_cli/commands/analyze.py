"""``starkv analyze``: spectra of a model's weights, and the rank map of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from starkv_cli.console import emit_json, note, print_table, progress
from starkv_cli.options import BaseModel, Device, Dtype
from starkv_core.errors import UserError

if TYPE_CHECKING:
    from starkv_core.models.spec import ModelSpec
    from starkv_core.rank_map import RankMap
    from starkv_core.spectra import LayerSpectra, SpectraReport


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
    group.command("spectra", short_help="Spectra of keys and values, layer by layer.")(spectra)
    group.command("ranks", short_help="Ranks and bytes of every layer of a run.")(ranks)
    app.add_typer(group, name="analyze", help=_HELP)


_HELP = """Look at a model's spectra, or at the ranks of a run.

Example: starkv analyze spectra --whiten
"""


def spectra(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id. Default: the embedded model.")
    ] = None,
    whiten: Annotated[
        bool, typer.Option("--whiten", help="Weigh the inputs by their second moment on a text.")
    ] = False,
    text: Annotated[
        str, typer.Option(help="Text to whiten on: builtin, a file or a hub data set.")
    ] = "builtin",
    sequences: Annotated[int, typer.Option(help="Sequences of it.", min=1)] = 64,
    length: Annotated[int, typer.Option(help="Tokens in each.", min=2)] = 1024,
    device: Device = None,
    dtype: Dtype = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="New folder. Default: runs/spectra-MODEL, written over."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """How fast the singular values of keys and values fall, layer by layer.

    Example: starkv analyze spectra --model Qwen/Qwen2.5-0.5B --whiten --out runs/spectra
    """
    from starkv_core.artifacts import SCHEMA, save_safetensors_atomic
    from starkv_core.data.corpus import documents
    from starkv_core.data.packing import pack
    from starkv_core.figures import spectra_figures
    from starkv_core.models import load
    from starkv_core.spectra import analyze_spectra

    if out is not None and out.exists():
        raise UserError(f"{out} already exists; give another --out")
    loaded = load(model, device=device, dtype=dtype)
    tokens = None
    if whiten:
        if length > loaded.spec.max_positions:
            raise UserError(
                f"--length {length}: the context of {loaded.name} is "
                f"{loaded.spec.max_positions} tokens"
            )
        tokens = pack(loaded.tokenizer, documents(text), length, sequences, 0)
    report = analyze_spectra(loaded, tokens, progress())
    kind = "-whitened" if whiten else ""
    folder = out or Path("runs") / f"spectra-{Path(loaded.name).name}{kind}"
    tensors = folder / "spectra.safetensors"
    metadata = {"schema": str(SCHEMA), "model": loaded.name, "fingerprint": loaded.fingerprint}
    save_safetensors_atomic(tensors, report.tensors(), metadata | {"whitened": str(whiten).lower()})
    for path in (tensors, *spectra_figures(report, folder)):
        note(f"wrote {path}")
    if as_json:
        emit_json(_spectra_document(report))
    else:
        _print_spectra(report)


def _spectra_document(report: SpectraReport) -> dict[str, Any]:
    from starkv_core.spectra import BUDGETS, LEVELS

    def layer(x: LayerSpectra) -> dict[str, Any]:
        return {
            "layer": x.index,
            "key_energy_ranks": list(x.key_energy_ranks),
            "value_energy_ranks": list(x.value_energy_ranks),
            "key_errors": {kind: list(errors) for kind, errors in x.key_errors.items()},
            "value_errors": {kind: list(errors) for kind, errors in x.value_errors.items()},
        }

    return {
        "model": report.model,
        "whitened": report.whitened,
        "energy_levels": list(LEVELS),
        "error_budgets": list(BUDGETS),
        "layers": [layer(x) for x in report.layers],
    }


def _print_spectra(report: SpectraReport) -> None:
    from starkv_core.spectra import BUDGETS, LEVELS

    levels = "/".join(f"{100 * level:g}" for level in LEVELS)
    columns = ["layer", f"keys {levels}%", f"values {levels}%"]
    for name in ("keys", "values"):
        columns += [f"{name} HD : JD at {budget:.0%}" for budget in BUDGETS]
    rows = []
    for x in report.layers:
        row = [str(x.index)]
        row += ["/".join(f"{r:.0f}" for r in x.key_energy_ranks)]
        row += ["/".join(f"{r:.0f}" for r in x.value_energy_ranks)]
        for errors in (x.key_errors, x.value_errors):
            row += [f"{errors['hd'][b]:.2%} : {errors['jd'][b]:.2%}" for b in range(len(BUDGETS))]
        rows.append(row)
    first = report.layers[0]
    print_table(
        f"Spectra of {report.model}{', whitened' if report.whitened else ''}",
        columns,
        rows,
        caption=(
            f"Ranks that hold {levels}% of the energy: keys per head (mean) of "
            f"{first.keys.shape[1]}, values of all heads together of {len(first.values)}. "
            "HD : JD are relative squared errors of head-wise and joint decomposition that cache "
            "the same share of the width."
        ),
    )


def ranks(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    model: BaseModel = None,
    out: Annotated[
        Path | None, typer.Option(help="New PNG. Default: RUN/figures/ranks.png, written over.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """The rank map of a run: ranks of every key head and of the values, bytes of every layer.

    Example: starkv analyze ranks runs/tiny-embedded
    """
    from starkv_core.artifacts import read_manifest
    from starkv_core.figures import rank_map_figure
    from starkv_core.models.load import inspect
    from starkv_core.quant.artifact import QUANT, is_quantised
    from starkv_core.run import RANKS, read_ranks

    if out is not None and out.exists():
        raise UserError(f"{out} already exists; give another --out")
    manifest = read_manifest(run)
    base = manifest["base_model"]
    found = read_ranks(run)
    spec, _ = inspect(model or base.get("name"), revision=base.get("revision"))
    found.check(spec, f"{run}/{RANKS}")
    figure = out or run / "figures" / "ranks.png"
    rank_map_figure(spec, found, f"ranks of {run}", figure)
    note(f"wrote {figure}")
    if is_quantised(manifest):
        note(f"ranks before quantisation, their latents in 16 bits; {run / QUANT} has the bits")
    document = _ranks_document(spec, found)
    if as_json:
        emit_json({"run": str(run)} | document)
    else:
        _print_ranks(f"Ranks of {run}", document)


def _ranks_document(spec: ModelSpec, found: RankMap) -> dict[str, Any]:
    from starkv_core.budget import bytes_per_token, cache_ratio, paper_rate
    from starkv_core.figures import bytes_per_layer

    return {
        "layers": [
            {
                "layer": i,
                "keys": None if layer is None else list(layer.keys),
                "values": None if layer is None else list(layer.values),
                "dense_reason": spec.dense_reasons.get(i),
                "bytes_per_token": stored,
            }
            for i, (layer, stored) in enumerate(
                zip(found.layers, bytes_per_layer(spec, found), strict=True)
            )
        ],
        "bytes_per_token": bytes_per_token(spec, found),
        "dense_bytes_per_token": spec.dense_bytes_per_token,
        "cache_ratio": cache_ratio(spec, found),
        "paper_rate": paper_rate(spec, found),
    }


def _print_ranks(title: str, document: dict[str, Any]) -> None:
    layers = document["layers"]
    dense = document["dense_bytes_per_token"] / len(layers)
    rows = []
    for layer in layers:
        keys, values = layer["keys"], layer["values"]
        if keys is None:
            shown = ["dense", "", "", layer["dense_reason"] or "dense"]
        else:
            mean = f"{sum(keys) / len(keys):.1f}"
            shown = [mean, str(min(keys)), str(max(keys)), "/".join(map(str, values))]
        stored = layer["bytes_per_token"]
        rows.append([layer["layer"], *shown, f"{stored:,}", f"{stored / dense:.0%}"])
    total = document["bytes_per_token"]
    rows.append(["all", "", "", "", "", f"{total:,}", f"{total / (dense * len(layers)):.0%}"])
    print_table(
        title,
        ["layer", "keys, mean", "least", "most", "values", "bytes per token", "of dense"],
        rows,
        caption=(
            f"cache ratio {document['cache_ratio']:.2f} over all layers; paper rate "
            f"{document['paper_rate']:.1%} (compressed layers only)"
        ),
    )
