"""Rank maps of the named shapes, carried over from a real calibration.

No calibration of the 7B and 8B models stands behind these maps: their spread over layers, over key
heads and between keys and values is that of one real run, scaled to the rate asked for. Run
``python -m starkv_core.bench.rank_maps`` after a change; a test holds the files to it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from starkv_core.artifacts import read_yaml, write_yaml_atomic
from starkv_core.errors import UserError
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import LayerRanks, RankMap

FOLDER: Final = Path(__file__).with_name("ranks")
SOURCE: Final = "qwen2.5-0.5b"
"""The shape whose map was really learned."""


def derive(
    source: RankMap,
    source_full: tuple[int, int],
    target: ModelSpec,
    removed: float,
    key_rank: float | None = None,
) -> RankMap:
    """A ragged map for ``target`` that stores exactly ``1 - removed`` of the dense numbers.

    A layer takes the shares of the source's layer at the same relative depth. Its key heads take
    quantiles of how the source's heads differ from their layer's mean, dealt out at random but
    always alike. One factor for all ranks meets the rate; what rounding leaves goes to the largest
    remainders.

    Args:
        source: a learned map, head-wise keys and joint values, no layer dense.
        source_full: its full ranks, of a key head and of the values.
        target: the shape to serve.
        removed: the paper's rate.
        key_rank: mean rank of a key head to reach, the values taking the rest; None keeps the
            source's split between keys and values.
    """
    learned = [layer for layer in source.layers if layer is not None]
    key_full, value_full = source_full
    means = [sum(layer.keys) / len(layer.keys) for layer in learned]
    spread = sorted(k / m for layer, m in zip(learned, means, strict=True) for k in layer.keys)
    heads = target.n_kv_heads
    quantiles = [spread[int((h + 0.5) / heads * len(spread))] for h in range(heads)]
    wanted: list[float] = []
    for i in range(target.n_layers):
        at = round(i / max(1, target.n_layers - 1) * (len(learned) - 1))
        dealt = random.Random(i).sample(quantiles, heads)
        wanted += [means[at] / key_full * target.head_dim * q for q in dealt]
        wanted.append(learned[at].values[0] / value_full * target.kv_width)
    limits = ([target.key_rank] * heads + [target.value_rank]) * target.n_layers
    total = round((1.0 - removed) * target.n_layers * 2 * target.kv_width)
    width = heads + 1
    if key_rank is None:
        ranks = _scaled(wanted, limits, total)
    else:
        of_keys = round(key_rank * heads * target.n_layers)
        keys = [i for i in range(len(wanted)) if i % width < heads]
        values = [i for i in range(len(wanted)) if i % width == heads]
        ranks = [0] * len(wanted)
        for part, numbers in ((keys, of_keys), (values, total - of_keys)):
            scaled = _scaled([wanted[i] for i in part], [limits[i] for i in part], numbers)
            for i, rank in zip(part, scaled, strict=True):
                ranks[i] = rank
    rows = [ranks[i * width : (i + 1) * width] for i in range(target.n_layers)]
    return RankMap(tuple(LayerRanks(tuple(row[:-1]), (row[-1],)) for row in rows))


def _scaled(wanted: list[float], limits: list[int], total: int) -> list[int]:
    """Whole numbers from 1 to their limits, in proportion to ``wanted``, that sum to ``total``."""
    low, high = 0.0, float(total)
    for _ in range(200):  # bisection on the common factor
        factor = (low + high) / 2
        held = sum(min(max(factor * w, 1.0), cap) for w, cap in zip(wanted, limits, strict=True))
        low, high = (factor, high) if held < total else (low, factor)
    exact = [min(max(low * w, 1.0), cap) for w, cap in zip(wanted, limits, strict=True)]
    ranks = [int(x) for x in exact]
    order = sorted(range(len(exact)), key=lambda i: ranks[i] - exact[i])
    for i in order[: total - sum(ranks)]:
        ranks[i] += 1
    return ranks


def read_entry(name: str) -> dict[str, Any]:
    """The recorded entry of a named shape: ``model``, ``removed`` and the rank map's keys.

    Raises:
        UserError: no such shape, with those there are.
    """
    if name not in names():
        raise UserError(
            f"--shape {name}: no such shape and no run folder; shapes: {', '.join(names())}"
        )
    return dict(read_yaml(FOLDER / f"{name}.yaml"))


def names() -> list[str]:
    """The named shapes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def comment_of(name: str, removed: float, key_rank: float | None = None) -> str:
    """What a file says of itself."""
    how = (
        "Learned: method star at cache ratio 3 on Qwen2.5-Coder-0.5B, which has this shape\n"
        "(docs/results/qwen2.5-coder-0.5b.md, q-star-3.0)."
        if name == SOURCE
        else f"NOT a calibration of this model: the relative spread of the ranks learned in\n"
        f"{SOURCE}.yaml, scaled to {removed:.0%} removed by starkv_core/bench/rank_maps.py."
    )
    if key_rank is not None:
        how += (
            "\nBetween keys and values they are split as in the authors' release: "
            f"{key_rank:g} a key head\nin the mean (docs/design.md section 6)."
        )
    return f"Shape and rank map for `starkv bench --shape {name}`.\n{how}"


def rewrite(specs: Mapping[str, ModelSpec]) -> None:
    """Derive every map but the source's anew and write the files."""
    for name, spec in specs.items():
        entry = read_entry(name)
        ranks = RankMap.from_dict(entry, name) if name == SOURCE else derived(name, spec)
        write_yaml_atomic(
            FOLDER / f"{name}.yaml",
            {**entry, **ranks.to_dict()},
            comment=comment_of(name, entry["removed"], entry.get("key_rank")),
        )


def derived(name: str, spec: ModelSpec) -> RankMap:
    """The map of a named shape as :func:`derive` gives it from the recorded source."""
    source = read_entry(SOURCE)
    config = source["model"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    full = head_dim, head_dim * config["num_key_value_heads"]
    entry = read_entry(name)
    learned = RankMap.from_dict(source, SOURCE)
    return derive(learned, full, spec, entry["removed"], entry.get("key_rank"))


if __name__ == "__main__":
    from starkv_core.bench.shapes import named_spec

    rewrite({name: named_spec(name) for name in names()})
