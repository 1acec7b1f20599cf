"""``quant.yaml`` and ``quant.safetensors``: quantised latents on disk (docs/design.md section 7).

``quant.yaml`` says in words which channels have how many bits; ``quant.safetensors`` holds the
folded factors in that order and the static parts of the quantisers. Both count once their checksums
are in the manifest.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from starkv_core.artifacts import (
    SCHEMA,
    check_schema,
    read_safetensors,
    read_yaml,
    save_safetensors_atomic,
    write_manifest,
    write_yaml_atomic,
)
from starkv_core.errors import UserError
from starkv_core.models.spec import ModelSpec
from starkv_core.provenance import sha256_file
from starkv_core.quant.layer import (
    CodedSide,
    QuantLayer,
    layout_of,
    make_codec,
    stored_order,
)
from starkv_core.quant.scheme import WIDTHS, Scheme
from starkv_core.rank_map import RankMap

QUANT = "quant.yaml"
TENSORS = "quant.safetensors"
_RECORD = "quantization"  # key of the manifest
_SIDES = ("keys", "values")

Counts = list[dict[int, int]]


def is_quantised(manifest: Mapping[str, Any]) -> bool:
    """Whether a run of this manifest has been quantised."""
    return QUANT in manifest["files"]


def refuse_quantised(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """UserError if there is a quantisation already."""
    if is_quantised(manifest):
        raise UserError(
            f"{run_dir}: already quantised; give --replace to quantise its factors anew, or "
            "quantise a copy made with --out before"
        )


def quantised_ranks(layers: Mapping[int, QuantLayer], n_layers: int) -> RankMap:
    """Channels that are left, as ranks."""
    return RankMap(tuple(layers[i].ranks if i in layers else None for i in range(n_layers)))


def to_dict(
    scheme: Scheme, layers: Mapping[int, QuantLayer], n_layers: int, predicted: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``quant.yaml`` holds."""

    def plain(side: CodedSide) -> Counts:
        return [dict(sorted(counts.items(), reverse=True)) for counts in side.counts]

    return {
        "schema": SCHEMA,
        "scheme": scheme.to_dict(),
        "predicted": dict(predicted),
        "layers": [
            {"keys": plain(layers[i].keys), "values": plain(layers[i].values)[0]}
            if i in layers
            else "dense"
            for i in range(n_layers)
        ],
    }


def write_quantisation(
    run_dir: Path,
    manifest: Mapping[str, Any],
    layers: Mapping[int, QuantLayer],
    document: Mapping[str, Any],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Write both files, then the manifest that makes them count; returns it.

    Args:
        manifest: of the run; must list its factors.
        document: of :func:`to_dict`.
        record: what the manifest is to keep of how it was made.
    """
    files = {k: v for k, v in manifest["files"].items() if k not in (QUANT, TENSORS)}
    if files != manifest["files"]:
        # From here on the run counts as not quantised, so that a kill leaves one that is whole.
        manifest = write_manifest(run_dir, {**manifest, "files": files})
    tensors = {
        f"layers.{i}.{name}.{key}": tensor
        for i, layer in layers.items()
        for name in _SIDES
        for key, tensor in getattr(layer, name).tensors().items()
    }
    metadata = {
        "heads": json.dumps({str(i): layer.heads for i, layer in layers.items()}),
        "key_eps": json.dumps({str(i): layer.key_eps for i, layer in layers.items()}),
    }
    save_safetensors_atomic(run_dir / TENSORS, tensors, metadata)
    write_yaml_atomic(
        run_dir / QUANT,
        document,
        comment=(
            "Bits of latents: channels by bits, for every key head and for all values of a layer.\n"
            f"Belongs to {TENSORS}; made by `starkv quantize`, not to be edited."
        ),
    )
    return write_manifest(run_dir, {**manifest, _RECORD: dict(record)}, [QUANT, TENSORS])


def read_quantisation(
    run_dir: Path, manifest: Mapping[str, Any], factors: str
) -> tuple[dict[int, QuantLayer], RankMap]:
    """Read a quantised run's layers, and the ranks that are left.

    Args:
        factors: checksum of the factors the run has now.

    Raises:
        UserError: damaged, edited, of a newer schema, or made from other factors.
    """
    path = run_dir / QUANT
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise UserError(f"{path}: malformed: expected schema, scheme and layers")
    check_schema(document.get("schema"), str(path))
    scheme = Scheme.from_dict(document.get("scheme"), f"{path}, scheme")
    counts = _read_counts(document.get("layers"), str(path))
    if sha256_file(path) != manifest["files"][QUANT]:
        raise UserError(
            f"{path}: edited or damaged: its checksum is not the one in the manifest; restore it, "
            f"or run `starkv quantize {shlex.quote(str(run_dir))} --replace`"
        )
    record = manifest.get(_RECORD)
    if not isinstance(record, dict) or record.get("factors") != factors:
        raise UserError(
            f"{run_dir}: quantised from other factors than it has now (exported since?); run "
            f"`starkv quantize {shlex.quote(str(run_dir))} --replace`"
        )
    tensors, metadata = read_safetensors(run_dir / TENSORS, sha256=manifest["files"].get(TENSORS))
    layers: dict[int, QuantLayer] = {}
    for i, layer in enumerate(counts):
        if layer is None:
            continue
        try:
            sides = [
                _read_side(tensors, f"layers.{i}.{name}.", name[:-1], layer[name], scheme)
                for name in _SIDES
            ]
            heads = json.loads(metadata["heads"])[str(i)]
            key_eps = json.loads(metadata["key_eps"])[str(i)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{run_dir / TENSORS}: damaged: layer {i} does not fit {QUANT} ({error})"
            ) from None
        layers[i] = QuantLayer(sides[0], sides[1], heads, key_eps, scheme)
    return layers, quantised_ranks(layers, len(counts))


def shape_faults(layers: Mapping[int, QuantLayer], spec: ModelSpec) -> Iterator[str]:
    """What in the layers does not fit a model; their ranks are checked already."""
    for i, layer in layers.items():
        if layer.heads != spec.n_kv_heads or (layer.key_eps is None) == spec.qk_norm:
            yield f"layer {i}: made for other key heads"
            continue
        for name in _SIDES:
            side: CodedSide = getattr(layer, name)
            channels, owners = side.codec.layout.channels, len(side.counts)
            wanted = {
                "down": (channels, spec.hidden),
                "up": (spec.kv_width // owners, channels),
                "bias": (spec.n_kv_heads, spec.head_dim),
                "shift": (channels,),
            }
            for key, shape in wanted.items():
                found = getattr(side, key)
                if found is not None and tuple(found.shape) != shape:
                    yield f"layer {i}: {name} {key} is {list(found.shape)}, expected {list(shape)}"


def _read_side(
    tensors: Mapping[str, torch.Tensor], prefix: str, side: str, counts: Counts, scheme: Scheme
) -> CodedSide:
    """A side from its saved tensors; KeyError or ValueError where they do not fit its counts."""
    owner, bits = stored_order(counts)
    mine = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    layout = layout_of(side, bits, owner, scheme.scales)
    codec = make_codec(layout, mine["step"], mine["weight"], scheme.name)
    return CodedSide(mine["down"], mine["up"], mine.get("bias"), mine.get("shift"), owner, codec)


def _read_counts(data: Any, where: str) -> list[dict[str, Counts] | None]:
    """Counts of every layer; UserError with every fault."""
    if not isinstance(data, list):
        raise UserError(f"{where}: malformed: layers must be a list")
    found: list[dict[str, Counts] | None] = []
    faults: list[str] = []
    for i, entry in enumerate(data):
        if entry == "dense":
            found.append(None)
            continue
        if not isinstance(entry, dict) or entry.keys() != set(_SIDES):
            faults.append(f"layer {i}: expected `dense` or keys and values")
            continue
        keys = entry["keys"]
        sides = {"keys": keys if isinstance(keys, list) else [keys], "values": [entry["values"]]}
        faults += [f"layer {i}: {f}" for name in _SIDES for f in _count_faults(sides[name])]
        found.append(sides)
    if faults:
        raise UserError.many(f"{where}: cannot be used", faults)
    return found


def _count_faults(blocks: list[Any]) -> Iterator[str]:
    for counts in blocks or [None]:
        if not isinstance(counts, dict) or not counts:
            yield "expected channels by bits, such as {4: 8, 3: 24}"
            continue
        for bits, channels in counts.items():
            if bits not in WIDTHS:
                yield f"{bits} bits cannot be packed; packed are 2, 3, 4 and 8"
            elif not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
                yield f"{channels!r} channels of {bits} bits: a whole number from 1 is expected"
