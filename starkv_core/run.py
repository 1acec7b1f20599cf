"""A run folder on disk, and a model ready to use, dense or not (docs/design.md section 7)."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from starkv_core.artifacts import (
    MANIFEST,
    read_manifest,
    read_safetensors,
    read_yaml,
    save_safetensors_atomic,
    write_manifest,
    write_yaml_atomic,
)
from starkv_core.attention import LatentWeights
from starkv_core.cache import LatentCache
from starkv_core.errors import UserError
from starkv_core.factors import (
    FOLDED_TENSORS,
    FoldedLayer,
    GateSettings,
    TrainedLayer,
    layer_counts,
    layer_tensors,
    layers_from,
)
from starkv_core.models.load import LoadedModel, load, vocabulary_sha256
from starkv_core.models.spec import ModelSpec
from starkv_core.provenance import sha256_file
from starkv_core.quant.artifact import QUANT, is_quantised, read_quantisation, shape_faults
from starkv_core.quant.artifact import TENSORS as QUANT_TENSORS
from starkv_core.quant.layer import QuantLayer
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.recipe import Recipe, load_recipe
from starkv_core.surgery import WeightsOf, compressed
from triton_ops.backends import choose_backend
from triton_ops.latent_attention import RopeTables
from triton_ops.latent_codes import LayerCodes

RECIPE = "recipe.yaml"
RANKS = "ranks.yaml"
FACTORS = "factors.safetensors"
_NEW_FACTORS = "factors.new.safetensors"  # until the manifest has their checksum


@dataclass(frozen=True)
class Subject:
    """A model to evaluate or to chat with: a base model, compressed or not.

    Attributes:
        base: the frozen base model.
        ranks: rank map, None when dense.
        weights: deployed weights by layer; empty when dense.
        run_dir: run folder, None when dense.
        backend: of latent attention.
        store_dtype: dtype of what the cache stores.
    """

    base: LoadedModel
    ranks: RankMap | None = None
    weights: Mapping[int, LatentWeights] = field(default_factory=dict)
    run_dir: Path | None = None
    backend: str = "reference"
    store_dtype: torch.dtype = torch.bfloat16
    tables: RopeTables | None = None

    @property
    def model(self) -> Any:
        """The transformers model; compressed only inside :meth:`active`."""
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.base.tokenizer

    @property
    def spec(self) -> ModelSpec:
        """Its spec."""
        return self.base.spec

    @property
    def name(self) -> str:
        """Run folder or model."""
        return str(self.run_dir) if self.run_dir is not None else self.base.name

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.base.device

    @property
    def compressed(self) -> bool:
        """Whether any layer stores latents."""
        return bool(self.weights)

    @property
    def codes(self) -> dict[int, LayerCodes]:
        """How the latents of quantised layers are coded; empty without a quantisation."""
        return {i: w.codes for i, w in self.weights.items() if w.codes is not None}

    @property
    def cache_name(self) -> str | None:
        """The baseline that its cache follows; None for the cache that it deploys.

        A prompt attends to exact keys there, so that only decode tells what such a cache costs.
        """
        return None

    @property
    def mixes_lengths(self) -> bool:
        """Whether rows of a batch, padded on the left, read as each alone would."""
        return not self.codes

    @property
    def max_positions(self) -> int:
        """Longest context in tokens."""
        return self.spec.max_positions

    def with_prefill(self, prefill: Literal["exact", "coded"]) -> Subject:
        """The same with prompts that attend to exact latents, or to what decode will see."""
        weights = {
            i: w if w.codes is None else replace(w, codes=replace(w.codes, prefill=prefill))
            for i, w in self.weights.items()
        }
        return replace(self, weights=weights)

    def active(self) -> AbstractContextManager[Any]:
        """Context in which the model runs compressed (for a dense subject, as it is)."""
        return compressed(
            self.base,
            {i: _always(weights) for i, weights in self.weights.items()},
            store_dtype=self.store_dtype,
            backend=self.backend,
            tables=self.tables,
        )

    def new_cache(self) -> LatentCache:
        """An empty cache for ``generate`` or ``forward`` inside :meth:`active`."""
        return LatentCache(self.spec, self.ranks, self.store_dtype, self.codes)


def _always(weights: LatentWeights) -> WeightsOf:
    return lambda: weights


def dense_of(subject: Subject) -> Subject:
    """The dense baseline of a subject: same weights, no second copy."""
    return Subject(subject.base, store_dtype=subject.store_dtype)


def store_dtype_of(loaded: LoadedModel) -> torch.dtype:
    """16-bit dtype in which caches of this model are stored: its own, or bfloat16 for float32."""
    return loaded.dtype if loaded.dtype.itemsize == 2 else torch.bfloat16


def dense_subject(loaded: LoadedModel) -> Subject:
    """A plain base model as a subject."""
    return Subject(loaded, store_dtype=store_dtype_of(loaded))


def deployed_subject(
    loaded: LoadedModel,
    ranks: RankMap,
    layers: Mapping[int, FoldedLayer] | Mapping[int, QuantLayer],
    run_dir: Path | None = None,
    store_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Subject:
    """A compressed model from folded or quantised factors, where and as the base model computes.

    Raises:
        UserError: the backend asked for cannot run here.
    """
    attentions = loaded.family.attentions(loaded.model)
    weights = {
        i: layer.weights(loaded.dtype, attentions[i].q_proj.weight.device)  # type: ignore[union-attr]
        for i, layer in layers.items()
    }
    store_dtype = store_dtype or store_dtype_of(loaded)
    return Subject(
        loaded,
        ranks,
        weights,
        run_dir,
        backend=_backend(backend, loaded, store_dtype),
        store_dtype=store_dtype,
        tables=loaded.spec.rope.growing(),
    )


def _backend(asked: str | None, loaded: LoadedModel, store_dtype: torch.dtype) -> str:
    try:
        chosen = choose_backend(
            asked, loaded.device
        )  # first: other faults are of no use without it
        if loaded.dtype == store_dtype:
            return chosen
        if asked == "triton":
            raise ValueError(
                f"backend 'triton' cannot run: the model computes in {loaded.dtype}, its cache "
                f"holds {store_dtype}; load the model in 16 bits"
            )
        return choose_backend("reference", loaded.device)
    except ValueError as error:
        raise UserError(str(error)) from None


def is_run(path: str | Path) -> bool:
    """Whether a path is a run folder (finished or not)."""
    return (Path(path) / MANIFEST).is_file()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from writing to a run; the lock dies with this one, however it ends.

    It lies on the recipe, the one file that is never replaced.

    Raises:
        UserError: another process is at work on the run, or it has no recipe.
    """
    path = run_dir / RECIPE
    if not path.is_file():
        raise UserError(f"{path}: no such file; {run_dir} is not a whole run")
    try:
        import fcntl
    except ImportError:  # a platform without such locks
        yield
        return
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_dir}: another process is at work on this run; wait for it, or end it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def open_subject(
    run_or_model: str | None,
    *,
    device: str | None = None,
    device_map: str | None = None,
    dtype: str = "auto",
    model: str | None = None,
    backend: str | None = None,
    quantised: bool = True,
) -> Subject:
    """Open a run folder, a model folder or a hub id; None is the embedded model.

    Args:
        device, device_map, dtype: as in :func:`starkv_core.models.load`; where neither a device nor
            a map is given, a run has the map of its recipe.
        model: where the base model of a run lies now, if it has moved.
        backend: of latent attention, ``reference`` or ``triton``; None is the best that can run.
        quantised: whether a quantised run is opened as such, or with its latents in 16 bits.

    Raises:
        UserError: not there, unfinished, damaged, or made for another base model.
    """
    if run_or_model is None or not is_run(run_or_model):
        return dense_subject(load(run_or_model, dtype=dtype, device=device, device_map=device_map))
    run_dir = Path(run_or_model)
    manifest = read_manifest(run_dir)
    if FACTORS not in manifest["files"]:
        raise UserError(
            f"{run_dir}: calibration has not finished; continue it with "
            f"`starkv calibrate --resume --out {shlex.quote(str(run_dir))}`"
        )
    settle_factors(run_dir, manifest)
    base = manifest["base_model"]
    coded = quantised and is_quantised(manifest)
    # Cheap faults first: the files are checked before the model is loaded.
    layers: Mapping[int, FoldedLayer] | Mapping[int, QuantLayer]
    faults: Callable[[ModelSpec], Iterator[str]]
    if coded:
        layers, ranks = read_quantisation(run_dir, manifest, manifest["files"][FACTORS])
        faults = partial(shape_faults, layers)
    else:
        ranks = read_ranks(run_dir)
        layers = read_folded(run_dir, ranks, manifest["files"][FACTORS])
        faults = partial(_shape_faults, layers)
    recipe = load_recipe(run_dir / RECIPE)
    loaded = load(
        model or base.get("name"),
        dtype=dtype,
        device=device,
        device_map=device_map or device_map_of(recipe, device),
        revision=base.get("revision"),
    )
    check_base(run_dir, base, loaded)
    ranks.check(loaded.spec, f"{run_dir}/{QUANT if coded else RANKS}")
    found = list(faults(loaded.spec))
    if found:
        name = QUANT_TENSORS if coded else FACTORS
        raise UserError.many(f"{run_dir}/{name}: does not fit the model", found)
    return deployed_subject(loaded, ranks, layers, run_dir, backend=backend)


def device_map_of(recipe: Recipe, device: str | None) -> str | None:
    """The recipe's device_map, unless one device was asked for."""
    return recipe.model.device_map if device is None else None


def check_base(run_dir: Path, base: Mapping[str, Any], loaded: LoadedModel) -> None:
    """Refuse a base model, or a tokenizer, other than the one a run was made for."""
    if base.get("fingerprint") != loaded.fingerprint:
        raise UserError(
            f"{run_dir}: made for other weights than {loaded.name} has "
            f"(fingerprint {base.get('fingerprint')}, got {loaded.fingerprint}); "
            "give the weights it was made for with --model"
        )
    expected, found = base.get("vocabulary"), vocabulary_sha256(loaded.tokenizer)
    if expected not in (None, found):  # runs of earlier versions do not say
        raise UserError(
            f"{run_dir}: made with another tokenizer than {loaded.name} has (vocabulary "
            f"{expected}, got {found}); give the model and tokenizer it was made for with --model"
        )


def read_ranks(run_dir: Path) -> RankMap:
    """The rank map of a run."""
    path = run_dir / RANKS
    return RankMap.from_dict(read_yaml(path), str(path))


def write_ranks(run_dir: Path, ranks: RankMap) -> None:
    """Write ``ranks.yaml``, fit to be edited by hand."""
    write_yaml_atomic(
        run_dir / RANKS,
        ranks.to_dict(),
        comment=(
            "Ranks of every layer: one per key head, one for the values of all heads.\n"
            "`- dense` in place of both leaves a layer as it was.\n"
            f"After an edit: starkv calibrate --export {shlex.quote(str(run_dir))}"
        ),
    )


def write_factors(
    run_dir: Path,
    ranks: RankMap,
    folded: Mapping[int, FoldedLayer],
    trained: Mapping[int, TrainedLayer],
    settings: GateSettings,
    dtype: torch.dtype,
) -> None:
    """Write folded factors (in ``dtype``) and the trained form (float32) they come from.

    They count once :func:`commit_factors` has put their checksum into the manifest.
    """
    tensors = {
        f"folded.layers.{i}.{name}": tensor
        for i, layer in folded.items()
        for name, tensor in layer.tensors(dtype).items()
    }
    tensors |= {f"trained.{name}": tensor for name, tensor in layer_tensors(trained).items()}
    metadata = {
        "ranks": json.dumps(ranks.to_dict()["layers"]),
        "heads": json.dumps({str(i): layer.heads for i, layer in folded.items()}),
        "key_eps": json.dumps({str(i): layer.key_eps for i, layer in folded.items()}),
        "counts": layer_counts(trained),
        "gate": json.dumps(vars(settings)),
    }
    save_safetensors_atomic(run_dir / _NEW_FACTORS, tensors, metadata)


def commit_factors(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with the checksum of the factors just written, and put them in place.

    A kill before the manifest is replaced leaves the run as it was; after it, settle_factors ends
    what is left to do.
    """
    checksum = sha256_file(run_dir / _NEW_FACTORS)
    files = {**manifest["files"], FACTORS: checksum}
    settle_factors(run_dir, write_manifest(run_dir, {**manifest, "files": files}))


def settle_factors(run_dir: Path, manifest: Mapping[str, Any]) -> None:
    """Put new factors in place if they are the ones that the manifest means."""
    new = run_dir / _NEW_FACTORS
    if new.is_file() and sha256_file(new) == manifest["files"].get(FACTORS):
        os.replace(new, run_dir / FACTORS)


def read_folded(run_dir: Path, ranks: RankMap, sha256: str) -> dict[int, FoldedLayer]:
    """Read the folded factors and hold them against the rank map.

    Raises:
        UserError: damaged, or of other ranks than ``ranks.yaml`` says.
    """
    path = run_dir / FACTORS
    tensors, metadata = read_safetensors(path, sha256=sha256, prefix="folded.")
    try:
        made_for = json.loads(metadata["ranks"])
        heads, eps = dict(json.loads(metadata["heads"])), dict(json.loads(metadata["key_eps"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged: its metadata is missing or malformed") from None
    if made_for != ranks.to_dict()["layers"]:
        raise UserError(
            f"{run_dir}/{RANKS}: not the ranks of {FACTORS}; after an edit run "
            f"`starkv calibrate --export {shlex.quote(str(run_dir))}`"
        )
    layers: dict[int, FoldedLayer] = {}
    faults = []
    for i, layer_ranks in enumerate(ranks.layers):
        if layer_ranks is None:
            continue
        found = {name: tensors.get(f"folded.layers.{i}.{name}") for name in FOLDED_TENSORS}
        fault = _rank_fault(layer_ranks, found)
        if fault:
            faults.append(f"layer {i}: {fault}")
            continue
        layers[i] = FoldedLayer(
            ranks=layer_ranks,
            heads=heads.get(str(i), 0),
            key_eps=eps.get(str(i)),
            **found,  # type: ignore[arg-type]
        )
    if faults:
        raise UserError.many(f"{path}: damaged", faults)
    return layers


def read_trained(
    run_dir: Path, loaded: LoadedModel, sha256: str
) -> tuple[dict[int, TrainedLayer], GateSettings]:
    """Read the trained form and the settings of its gates."""
    path = run_dir / FACTORS
    tensors, metadata = read_safetensors(path, sha256=sha256, prefix="trained.")
    own = {name.removeprefix("trained."): tensor for name, tensor in tensors.items()}
    layers = layers_from(loaded, own, metadata.get("counts", "{}"), str(path))
    try:
        settings = GateSettings(**json.loads(metadata["gate"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: damaged: its metadata is missing or malformed") from None
    return layers, settings


def _shape_faults(layers: Mapping[int, FoldedLayer], spec: ModelSpec) -> Iterator[str]:
    """What in the folded factors does not fit the model; their ranks are checked already."""
    for i, layer in layers.items():
        if layer.heads != spec.n_kv_heads or (layer.key_eps is None) == spec.qk_norm:
            yield f"layer {i}: made for other key heads"
            continue
        bias = (spec.n_kv_heads, spec.head_dim)
        for name, blocks in (("key", layer.ranks.keys), ("value", layer.ranks.values)):
            wanted = {
                f"{name}_up": (spec.kv_width // len(blocks), sum(blocks)),
                f"{name}_down": (sum(blocks), spec.hidden),
                f"{name}_bias": bias,
            }
            for field_name, shape in wanted.items():
                found = getattr(layer, field_name)
                if found is not None and tuple(found.shape) != shape:
                    yield (
                        f"layer {i}: {field_name} is {list(found.shape)}, expected {list(shape)}"
                    )


def _rank_fault(ranks: LayerRanks, found: Mapping[str, torch.Tensor | None]) -> str | None:
    for name, wanted in (("key", sum(ranks.keys)), ("value", sum(ranks.values))):
        up, down = found[f"{name}_up"], found[f"{name}_down"]
        if up is None or down is None or up.ndim != 2 or down.ndim != 2:
            return f"{name} factors are missing or misshapen"
        if up.shape[1] != wanted or down.shape[0] != wanted:
            return (
                f"{name} factors have rank {up.shape[1]} and {down.shape[0]}, the map says {wanted}"
            )
    return None
