"""Tables and figures of records: for the terminal, for docs/benchmarks/README.md, as PNG."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from starkv_core.artifacts import read_text, write_text_atomic
from starkv_core.bench.records import (
    CODED,
    OURS,
    Record,
    append_records,
    baselines,
    crossovers,
    read_records,
    series_of,
    speed,
    tokens,
)
from starkv_core.errors import UserError

_COMPARED: Final = {
    "attention": ("sdpa-default", "sdpa-flash"),
    "decode": ("static-graph",),
    "prefill": ("sdpa-default",),
}
"""Baselines that a suite's tables compare with."""
_COLORS: Final = {
    "sdpa-default": "#1f4e79",
    "sdpa-flash": "#5b9bd5",
    "static-graph": "#1f4e79",
    "rebuild": "#7f7f7f",
    OURS: "#c55a11",
    CODED: "#548235",
}
_OWN: Final = """\
# Benchmarks

Rendered from the `.jsonl` files of this folder by `starkv bench --record`; do not edit.
"""
"""How the README.md of a folder of records begins."""
_INTRO: Final = f"""\
{_OWN}
- **case**: tokens in the cache (of the prompt, in `prefill`) x rows.
- **ms**: median and 20th to 80th percentile of one step. `attention`: one layer, from the turned
  query to what goes into `o_proj`. `decode`: a whole model, one token for every row, sampling
  included. `prefill`: a prompt to its first token.
- **read**: bytes that the backend must move. `attention`: its cache, once; `rebuild` also writes
  and reads a dense one. `decode`: weights and cache.
- **floor**: those bytes over the bandwidth that large kernels of torch reached in the same process,
  and the time as a multiple of it. `prefill` is bound by arithmetic and has none. It is the better
  of copying and of reading alone; in the first runs, those whose headings name no rank map, of
  copying only, which SDPA undercuts by up to 8%.
- **faster than**: speed over a baseline of the same run and case; above 1 is faster. At equal
  memory it compares tokens a second, each side at the largest batch that fits.
- **cache**: bytes of the cache that exist, padding of rows and slots allocated ahead included.
- **ratio**, in records that have it: a dense 16-bit cache of as many tokens, nothing allocated
  ahead, over the whole cache as its tensors were, room for the steps that were timed included.
- **peak**: most GPU memory while the backend ran, weights included.
- **removed**: the paper's rate, of latents alone, padding and the bits of codes not counted.

Backends: `sdpa-default` and `sdpa-flash` read a dense cache by torch's own choice of kernel and by
its FlashAttention; `rebuild` rebuilds all keys and values for SDPA by plain torch; `static-graph`
is transformers with a static cache, captured as a CUDA graph; `starkv` reads latents of 16 bits,
`starkv-coded` packed codes of them, sinks and a recent window in 16 bits.

A backend is shown only if its output passed the correctness gate in the same run. `attention`: the
output, before and after the timed runs, against float64. `decode`: the logits of the step that is
timed, on up to three rows at its batch and context, against another path through the same cache
(the plain kernel of SDPA, the reference backend; for the reference backend itself SDPA over rebuilt
keys). `prefill`: the logits of a prompt of 600 tokens at once against the same in chunks and single
tokens; with codes against chunks through a 16-bit cache, to whose latents the codes are held.
In the first runs, as above, `decode` compared two rows of a cache of their own and
`prefill` a prompt of 48 tokens.

Weights and caches are random numbers in the model's shape. **No real calibration stands behind the
rank maps** but for `qwen2.5-0.5b`: they carry over the relative spread of ranks (over layers, over
key heads, between keys and values) that was learned on Qwen2.5-Coder-0.5B, scaled to the rate
(`starkv_core/bench/rank_maps.py`); `llama-2-7b` splits keys and values as the
authors' release does. `attention` measures the layer whose rank is nearest to the mean;
its keys have a bias even where the model has none, since calibration adds one unless told
otherwise: it takes the mean out of the keys and puts it there. What the figures mean:
[reading.md](reading.md).
"""


def tables(records: Sequence[Record]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """For each suite its columns and rows."""
    found = {}
    for suite in dict.fromkeys(r["suite"] for r in records):
        own = [r for r in records if r["suite"] == suite]
        # Older records have no ratio, most have no codes.
        with_ratio = any(r["cache_ratio"] is not None for r in own)
        compared = _COMPARED[suite]
        if any(r["backend"] == CODED for r in own):
            compared = (*compared, OURS)
        columns = ["case", "backend", "ms (p20-p80)", "read", "floor ms (times)"]
        columns += ["tokens/s"] if suite == "decode" else []
        columns += ["cache", *(["ratio"] if with_ratio else []), "peak"]
        names = ", ".join(name.removeprefix("sdpa-") for name in compared)
        columns.append(f"faster than {names}")
        found[suite] = columns, [_row(record, records, columns, compared) for record in own]
    return found


def _row(
    record: Record, records: Sequence[Record], columns: list[str], compared: tuple[str, ...]
) -> list[str]:
    case = _case(record)
    if record["ms_p50"] is None:
        return [case, record["backend"], "none", *[""] * (len(columns) - 3)]
    floor, factors, ratio = record["floor_ms"], baselines(record, records), record["cache_ratio"]
    gains = [factors.get(name) for name in compared]
    ms = [_figure3(record[key]) for key in ("ms_p50", "ms_p20", "ms_p80")]
    cells = [
        case,
        record["backend"] + ("" if record["note"] is None else " *"),
        f"{ms[0]} ({ms[1]}-{ms[2]})",
        "" if record["bytes"] is None else _bytes(record["bytes"]),
        "" if floor is None else f"{_figure3(floor)} ({record['ms_p50'] / floor:.2f}x)",
    ]
    if record["suite"] == "decode":
        cells.append(f"{record['tokens_per_s']:,.0f}")
    cells.append(_bytes(record["cache_bytes"]))
    if "ratio" in columns:
        cells.append("" if ratio is None else f"{ratio:.2f}")
    return [
        *cells,
        "" if record["peak_bytes"] is None else _bytes(record["peak_bytes"]),
        ", ".join("-" if gain is None else f"{gain:.2f}x" for gain in gains),
    ]


def _figure3(value: float) -> str:
    """Three significant digits, those before the point all kept."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def notes(records: Sequence[Record]) -> list[str]:
    """Why there is no time, and what readers of the times must know, each once."""
    lines = [f"{_case(r)} {r['backend']}: {r['fault']}" for r in records if r["ms_p50"] is None] + [
        f"* {r['backend']}: {r['note']}" for r in records if r["note"] and r["ms_p50"]
    ]
    for record in (r for r in records if r["cache_parts"]):
        parts = ", ".join(
            f"{name} {_bytes(count)}" for name, count in record["cache_parts"].items() if count
        )
        lines.append(
            f"{_case(record)} {record['backend']}: cache of {_bytes(record['cache_bytes'])}, "
            f"{record['cache_ratio']:.2f} times smaller than dense: {parts}"
        )
    return list(dict.fromkeys(lines))


def commit_of(record: Record) -> str:
    """The commit of a record for people, and whether files differed from it."""
    commit, dirty, _ = (record["commit"] or "unknown").partition("+dirty")
    return commit[:12] + dirty


def _case(record: Record) -> str:
    size = f" in {_bytes(record['memory'])}" if record["memory"] else ""
    return f"{tokens(record['ctx'])} x {record['batch'] or '-'}{size}"


def _bytes(count: float) -> str:
    for power, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {name}"
    return f"{count:.0f} B"


def check_folder(folder: Path) -> None:
    """Refuse a folder whose records cannot be joined, or whose README.md is someone else's.

    Raises:
        UserError: that, or it cannot be written.
    """
    readme = folder / "README.md"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give another --out")
    if readme.exists() and not read_text(readme).startswith(_OWN):
        raise UserError(f"{readme}: not of `starkv bench`, and would be lost; give another --out")
    read_records(folder)
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(found, os.W_OK):
        raise UserError(f"{found}: cannot be written; give another --out")


def publish(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Append records to DATE.jsonl in ``folder``, draw them, render its README; returns the files.

    Raises:
        UserError: the folder cannot be written, or holds a line that is no record.
    """
    lines = folder / f"{records[0]['date'][:10]}.jsonl"
    append_records(lines, records)
    return [lines, *figures(records, folder), render_readme(folder)]


def render_readme(folder: Path) -> Path:
    """Write README.md of a folder of records; returns it."""
    records = read_records(folder)
    parts = [_INTRO]
    for run in dict.fromkeys(r["run"] for r in records):
        parts.append(_run_section([r for r in records if r["run"] == run], folder))
    path = folder / "README.md"
    write_text_atomic(path, "\n".join(parts))
    return path


def _run_section(records: list[Record], folder: Path) -> str:
    first = records[0]
    bandwidth = first["bandwidth"]
    lines = [
        f"## {first['date'][:10]}, {first['gpu']}, run {first['run']}",
        "",
        f"torch {first['torch']}, triton {first['triton']}, transformers {first['transformers']}, "
        f"starkv {first['starkv']}, commit {commit_of(first)}"
        + ("" if bandwidth is None else f"; measured bandwidth {bandwidth / 1e12:.2f} TB/s"),
    ]
    for group in dict.fromkeys((r["suite"], r["shape"], r["dtype"]) for r in records):
        held = [r for r in records if (r["suite"], r["shape"], r["dtype"]) == group]
        removed = max(r["removed"] for r in held)
        columns, body = tables(held)[group[0]]
        heading = f"### {group[0]}, {group[1]}, {group[2]}, {removed:.1%} removed"
        heading += _coded(held)
        known = held[0]["rank_map"]  # older records do not say
        lines += ["", heading + ("" if known is None else f", rank map {known}"), ""]
        lines += ["| " + " | ".join(columns) + " |"]
        lines += ["| --- | --- |" + " ---: |" * (len(columns) - 2)]
        # A pipe in a message would end the cell.
        lines += ["| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in body]
        lines += ["", *(f"- {line}" for line in crossovers(held))]
        lines += [f"- {line}" for line in notes(held)]
        for path in (folder / name for name in _figure_names(held)):
            if path.is_file():
                lines += ["", f"![speed against context]({path.name})"]
    return "\n".join(lines) + "\n"


def _coded(records: Sequence[Record]) -> str:
    """What headings say of codes; nothing where there are none."""
    bits = dict.fromkeys(r["bits"] for r in records if r["backend"] == CODED)
    return "".join(f", codes of {one:.3g} bits" for one in bits)


def _figure_names(records: Sequence[Record]) -> list[str]:
    found = dict.fromkeys((r["run"], r["suite"], Path(r["shape"]).name) for r in records)
    return [re.sub(r"[^\w.-]+", "-", "-".join(key)).strip("-") + ".png" for key in found]


def figures(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write speed against context, a figure for each suite and shape; returns the files.

    A figure needs one backend with a time.
    """
    written = []
    for key in dict.fromkeys((r["run"], r["suite"], r["shape"]) for r in records):
        held = [
            r for r in records if (r["run"], r["suite"], r["shape"]) == key and speed(r) is not None
        ]
        if held:
            path = folder / _figure_names(held)[0]
            _figure(held, path)
            written.append(path)
    return written


def _figure(records: list[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    from starkv_core.figures import save_png

    first = records[0]
    series = list(dict.fromkeys(series_of(r) for r in records))
    figure = Figure(figsize=(1.6 + 4.2 * len(series), 4.6), layout="constrained")
    removed = max(r["removed"] for r in records)
    figure.suptitle(
        f"{first['suite']}: {first['shape']}, {removed:.0%} removed{_coded(records)}, "
        f"{first['gpu']}",
        fontsize=11,
    )
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for ax, key in zip(panels, series, strict=True):
        _panel(ax, [r for r in records if series_of(r) == key])
    handles: dict[str, Any] = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=2 * len(series),
        fontsize=8,
    )
    save_png(figure, path)


def _panel(ax: Any, records: list[Record]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    contexts = sorted({r["ctx"] for r in records})
    for backend in dict.fromkeys(r["backend"] for r in records):
        own = sorted((r for r in records if r["backend"] == backend), key=lambda r: r["ctx"])
        x, y = [r["ctx"] for r in own], [speed(r) or 0.0 for r in own]
        ax.plot(x, y, marker="o", markersize=4, color=_COLORS[backend], label=backend)
        floors = [(r["ctx"], _floor_speed(r)) for r in own if r["floor_ms"]]
        if backend in (OURS, CODED, "sdpa-default", "static-graph") and floors:
            ax.plot(
                *zip(*floors, strict=True),
                linestyle=":",
                linewidth=1,
                color=_COLORS[backend],
                label=f"memory limit of {backend}",
            )
    first = records[0]
    size = (
        f"each side as large as {first['memory'] / 2**30:g} GiB allow"
        if first["memory"]
        else f"batch {first['batch']}"
    )
    ax.set_title(size, fontsize=10)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(contexts)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens(round(value))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1 else f"{value:,.0f}")
    )
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("tokens in the cache", fontsize=9)
    ax.set_ylabel("tokens/s" if first["suite"] == "decode" else "steps/s", fontsize=9)
    ax.grid(alpha=0.3, which="both")
    ax.tick_params(labelsize=8, which="both")


def _floor_speed(record: Record) -> float:
    """Speed at the memory limit."""
    rows_per_step = record["batch"] if record["tokens_per_s"] else 1
    return 1e3 * rows_per_step / float(record["floor_ms"])
