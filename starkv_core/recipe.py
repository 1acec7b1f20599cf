"""Recipes: what to compress, to which budget, on which text, and how to train.

A recipe is a YAML file. Every key is checked before anything expensive starts, and all faults are
reported at once. Keys left out take the defaults of the method; the resolved recipe, with every key
spelled out, is what a run folder keeps.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal

from starkv_core.artifacts import SCHEMA, check_schema, parse_yaml, read_yaml
from starkv_core.errors import UserError
from starkv_core.sizes import fit_of

Method = Literal["star", "paper", "uniform", "palu", "recalkv", "eigen", "care"]
ONE_SHOT: Final = ("uniform", "palu", "recalkv", "eigen", "care")  # they have no training


@dataclass(frozen=True)
class _Range:
    """The numbers from ``low`` to ``high``, ``low`` itself excluded if ``above``; or ``also``."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under

    def __str__(self) -> str:
        text = f"{'above' if self.above else 'at least'} {self.low:g}"
        if self.high < math.inf:
            text += f" and {'below' if self.below else 'at most'} {self.high:g}"
        return text if self.also is None else f"{self.also:g} or {text}"


_POSITIVE = {"range": _Range(0, above=True)}
_COUNT = {"range": _Range(1)}
_NOT_NEGATIVE = {"range": _Range(0)}
_FRACTION = {"range": _Range(0, 1)}
_BETA = {"range": _Range(0, 1, below=True)}


@dataclass(frozen=True)
class ModelSection:
    """The base model.

    name: folder or hub id; null is the model embedded in the package.
    revision: commit, branch or tag of a hub model.
    dtype: of the frozen weights; auto is the checkpoint's own.
    device_map: as transformers takes it (auto, balanced, ...); null is one device.
    """

    name: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device_map: str | None = None


@dataclass(frozen=True)
class BudgetSection:
    """What the cache may take, over all layers. Exactly one of ratio, bytes_per_token and fit.

    ratio: bytes of the dense bf16 cache / bytes stored.
    bytes_per_token: bytes stored per token.
    fit: TOKENS@MEMORY, such as 32k@8GiB: a context of that many tokens (k is 1024) in that memory.
    batch: sequences of that length that must fit at once; only with fit.
    """

    ratio: float | None = field(default=None, metadata={"range": _Range(1, above=True)})
    bytes_per_token: float | None = field(default=None, metadata=_POSITIVE)
    fit: str | None = None
    batch: int = field(default=1, metadata=_COUNT)

    @property
    def fit_tokens(self) -> int:
        """Tokens per sequence that ``fit`` asks for. Only where fit is given."""
        return fit_of(self.fit or "")[0]

    @property
    def fit_bytes(self) -> int:
        """Bytes that ``fit`` allows all ``batch`` sequences together. Only where fit is given."""
        return fit_of(self.fit or "")[1]


@dataclass(frozen=True)
class DataSection:
    """The text to calibrate on.

    source: builtin, a .txt, .jsonl or .parquet file, or a hub data set (streamed).
    config: configuration of a hub data set.
    split: split of a hub data set.
    field: field of .jsonl, .parquet and hub data sets that holds the text.
    length: tokens per sequence.
    sequences: sequences to train on, in turn, again and again; 0 is as many as the steps take.
    recall: share of the sequences in which passages come back later, for a text that does not ask
        for recall itself.
    """

    source: str = "builtin"
    config: str | None = None
    split: str = "train"
    field: str = "text"
    length: int = dataclasses.field(default=1024, metadata={"range": _Range(2)})
    sequences: int = dataclasses.field(default=0, metadata=_NOT_NEGATIVE)
    recall: float = dataclasses.field(default=0.0, metadata=_FRACTION)


@dataclass(frozen=True)
class StartSection:
    """The decomposition that training starts from; with steps 0 it is the result.

    keys: weights (plain SVD), whitened, query-aware, attended: by what attention makes of their
        errors, or eigen: basis of keys and queries together.
    values: weights (plain SVD), whitened, mixed by attention, or calibrated: whitened, then fitted
        to what the layer sees once the layers before it are compressed.
    center: take the mean out of the second moments; a bias makes up for it. Under a norm on keys,
        which leaves no room for one, the mean of the keys is only discounted.
    output_aware: weight values by the output projection.
    allocation: start ranks: uniform (one share everywhere), common (one threshold on the singular
        values), probed (water-filling by what each layer's error does to the output), fisher (in
        proportion to the gradients of the weights), greedy (by the share of what is left that a row
        takes off) or error (one error of the output in all layers).
    floor: share of the rank it would have at even ranks that every factorisation starts with at
        least; for allocation probed and common. By default 0, of star without training 0.75.
    output_damping: share of the mean added to that weight, as a fraction.
    key_group: key heads per factorisation; 1 is head-wise; 0, or more than there are, is joint: all
        heads of a layer.
    value_group: the same for values.
    key_order: heads in a group are neighbours (given), or alike by CKA (cka).
    sequences: sequences of data.length tokens that the statistics are taken from.
    shrinkage: share of the second moments that is replaced by a multiple of the identity.
    probes: sequences, of those, that sensitivities are measured on; for allocation probed.
    slack: components kept in training, times the start ranks; 0 keeps all.
    skip_layers: layers left dense; negative numbers count from the last.
    """

    keys: Literal["weights", "whitened", "query-aware", "attended", "eigen"]
    values: Literal["weights", "whitened", "mixed", "calibrated"]
    center: bool
    output_aware: bool
    allocation: Literal["uniform", "common", "probed", "fisher", "greedy", "error"]
    slack: float = field(metadata={"range": _Range(1, also=0)})
    floor: float = field(default=0.0, metadata=_FRACTION)
    output_damping: float = field(default=0.3, metadata=_NOT_NEGATIVE)
    key_group: int = field(default=1, metadata=_NOT_NEGATIVE)
    value_group: int = field(default=0, metadata=_NOT_NEGATIVE)
    key_order: Literal["given", "cka"] = "given"
    sequences: int = field(default=64, metadata=_COUNT)
    shrinkage: float = field(default=0.1, metadata=_FRACTION)
    probes: int = field(default=4, metadata=_COUNT)
    skip_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class OptimSection:
    """Training: AdamW on the factors and on the thresholds.

    lr: learning rate of the factors; with lr_relative in units of each tensor's root mean square.
    threshold_lr: learning rate of the thresholds.
    weight_decay, beta1, beta2: AdamW's, on the factors.
    warmup: fraction of the steps over which the learning rates rise from 0.
    grad_clip: largest norm of the gradient.
    gate_slope: s in the gate sigma tanh(s (sigma - alpha)).
    gamma: weight of the paper's rank loss; method paper only.
    checkpointing: recompute activations in the backward pass, for less memory.
    checkpoint_every: steps between two resumable states on disk.
    """

    lr: float = field(metadata=_POSITIVE)
    lr_relative: bool
    threshold_lr: float = field(metadata=_POSITIVE)
    weight_decay: float = field(metadata=_NOT_NEGATIVE)
    beta1: float = field(metadata=_BETA)
    beta2: float = field(metadata=_BETA)
    gate_slope: float = field(metadata=_POSITIVE)
    warmup: float = field(default=0.05, metadata=_FRACTION)
    grad_clip: float = field(default=1.0, metadata=_POSITIVE)
    gamma: float = field(default=0.1, metadata=_NOT_NEGATIVE)
    checkpointing: bool = True
    checkpoint_every: int = field(default=50, metadata=_COUNT)


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    schema: version of the format.
    method: star (ours), paper (its gate, loss and hyperparameters), or a baseline: uniform, palu,
        recalkv, eigen, care. A method is its defaults; what they name can be combined.
    seed: of the order of documents and sequences; nothing else is random.
    steps: optimiser steps in all; 0 decomposes once, without training. Baselines take none,
        whatever is asked for.
    rank_steps: the first of them, in which the ranks are learned; by default a third.
    batch: sequences per step.
    """

    model: ModelSection
    budget: BudgetSection
    data: DataSection
    start: StartSection
    optim: OptimSection
    rank_steps: int = field(metadata=_NOT_NEGATIVE)
    schema: int = SCHEMA
    method: Method = "star"
    seed: int = field(default=0, metadata=_NOT_NEGATIVE)
    steps: int = field(default=300, metadata=_NOT_NEGATIVE)
    batch: int = field(default=4, metadata=_COUNT)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping of every key that applies; loading it gives an equal recipe."""
        plain = _plain(self)
        ordered = {key: plain[key] for key in (*_SCALARS, *_SECTIONS)}
        budget = {key: value for key, value in plain["budget"].items() if value is not None}
        if self.budget.fit is None:
            del budget["batch"]
        return {**ordered, "budget": budget}


_SCALARS: Final = ("schema", "method", "seed", "steps", "rank_steps", "batch")
_SECTIONS: Final[dict[str, type]] = {
    "model": ModelSection,
    "budget": BudgetSection,
    "data": DataSection,
    "start": StartSection,
    "optim": OptimSection,
}
_BUDGETS: Final = ("ratio", "bytes_per_token", "fit")

_PLAIN_OPTIM: Final[dict[str, Any]] = {
    "lr": 2e-5,
    "lr_relative": False,
    "threshold_lr": 1e-2,
    "weight_decay": 0.01,
    "beta1": 0.9,
    "beta2": 0.999,
    "gate_slope": 50.0,
}
_PLAIN_START: Final[dict[str, Any]] = {
    "keys": "weights",
    "values": "weights",
    "center": False,
    "output_aware": False,
    "allocation": "uniform",
    "slack": 1.0,
}
_ONE_SHOT_FLOOR: Final = 0.75  # of star (docs/results/ablations.md)
_METHOD_DEFAULTS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "star": {
        "start": {
            "keys": "attended",
            "values": "mixed",
            "center": True,
            "output_aware": True,
            "allocation": "probed",
            "slack": 1.25,
        },
        "optim": {
            "lr": 3e-3,
            "lr_relative": True,
            "threshold_lr": 3e-3,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.95,
            "gate_slope": 20.0,
        },
    },
    "paper": {
        "start": {**_PLAIN_START, "allocation": "common", "slack": 0.0},
        "optim": _PLAIN_OPTIM,
    },
    # The baselines; who they are from is told in starkv_core/calibrate/methods/.
    "uniform": {"start": _PLAIN_START, "optim": _PLAIN_OPTIM},
    "palu": {
        "start": {
            **_PLAIN_START,
            "keys": "whitened",
            "values": "whitened",
            "allocation": "fisher",
            "key_group": 4,
            "value_group": 4,
            "shrinkage": 0.0,
        },
        "optim": _PLAIN_OPTIM,
    },
    "recalkv": {
        "start": {
            **_PLAIN_START,
            "keys": "whitened",
            "values": "calibrated",
            "allocation": "fisher",
            "key_group": 4,
            "key_order": "cka",
            "shrinkage": 0.0,
        },
        "optim": _PLAIN_OPTIM,
    },
    "eigen": {
        "start": {
            **_PLAIN_START,
            "keys": "eigen",
            "values": "whitened",
            "allocation": "error",
            "value_group": 1,
            "shrinkage": 0.0,
        },
        "optim": _PLAIN_OPTIM,
    },
    "care": {
        "start": {
            **_PLAIN_START,
            "keys": "whitened",
            "values": "whitened",
            "allocation": "greedy",
            "key_group": 0,
            "shrinkage": 1 / 11,  # a tenth of the mean on the diagonal
        },
        "optim": _PLAIN_OPTIM,
    },
}


# --- loading -------------------------------------------------------------------------------------


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Find, read, override and check a recipe.

    ``name_or_path`` is what :func:`find_recipe` takes; ``overrides`` are ``key=value`` with a
    dotted key, or a bare one where only one section has it, and a YAML value. Setting one form of
    the budget clears the others. UserError with all faults at once.
    """
    path = find_recipe(name_or_path)
    content = read_yaml(path)
    if content is None:
        raise UserError(f"{path}: empty; it needs at least a budget")
    return parse_recipe(content, where=str(path), overrides=overrides)


def parse_recipe(content: object, *, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a parsed YAML mapping; ``where`` names it in errors. As :func:`load_recipe`."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: a recipe is a mapping of keys, not {_describe(content)}")
    if "schema" in content:
        check_schema(content["schema"], where)
    raw: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()
    }
    faults = [fault for override in overrides if (fault := _apply_override(raw, override))]
    recipe = _Resolver(raw).resolve(faults)
    if faults or recipe is None:
        raise UserError.many(f"{where}: {_plural(len(faults), 'fault')}", faults)
    return recipe


def _apply_override(raw: dict[str, Any], override: str) -> str | None:
    """Write one ``key=value`` into ``raw``; the fault, if it is one."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return f"--set {override}: expected key=value"
    paths = [path for path in _known_paths() if path == key]
    paths = paths or [path for path in _known_paths() if path.rpartition(".")[2] == key]
    if len(paths) > 1:
        return f"--set {override}: {key} is ambiguous; write {' or '.join(paths)}"
    if not paths:
        return f"--set {override}: no such key; the nearest is {_nearest(key, _known_paths())}"
    try:
        value = parse_yaml(text, f"--set {override}")
    except UserError as error:
        return str(error)
    section, _, leaf = paths[0].rpartition(".")
    if not section:
        raw[leaf] = value
        return None
    target = raw.setdefault(section, {})
    if target is None:
        target = raw[section] = {}
    if isinstance(target, dict):  # otherwise the resolver reports the section itself
        if section == "budget" and leaf in _BUDGETS:
            target.clear()
        target[leaf] = value
    return None


class _Resolver:
    """Turns a raw mapping into a Recipe, collecting faults instead of stopping at the first."""

    def __init__(self, raw: Mapping[Any, Any]) -> None:
        self.raw = raw
        self.faults: list[str] = []

    def resolve(self, faults: list[str]) -> Recipe | None:
        """The recipe, or None with the reasons appended to ``faults``."""
        self._refuse_unknown(self.raw, (*_SCALARS, *_SECTIONS), prefix="")
        defaults = _METHOD_DEFAULTS.get(
            str(self.raw.get("method", "star")), _METHOD_DEFAULTS["star"]
        )
        scalars = self._scalars()
        if scalars.get("method", "star") == "star" and scalars.get("steps") == 0:
            # Training mends what the probes misjudge, and does better without a floor.
            defaults = {**defaults, "start": {**defaults["start"], "floor": _ONE_SHOT_FLOOR}}
        sections = {
            name: self._section(name, kind, defaults.get(name, {}))
            for name, kind in _SECTIONS.items()
        }
        faults.extend(self.faults)
        if faults:
            return None
        return Recipe(**scalars, **sections)

    def _scalars(self) -> dict[str, Any]:
        given = {key: self.raw[key] for key in _SCALARS if key in self.raw}
        found = self._values(Recipe, given, _SCALARS, prefix="")
        if found.get("method") in ONE_SHOT:
            found["steps"] = 0
        steps, ranks = found.get("steps", Recipe.steps), found.get("rank_steps")
        if ranks is None or steps == 0:  # one-shot: nothing is learned, whatever the file says
            found["rank_steps"] = steps // 3
        elif ranks > steps:
            self.faults.append(
                f"rank_steps: {ranks} of steps {steps} cannot learn ranks; set at most {steps}"
            )
        return found

    def _section(self, name: str, kind: type, defaults: Mapping[str, Any]) -> Any:
        raw = self.raw.get(name)
        if raw is None:
            raw = {}
        if not isinstance(raw, Mapping):
            self.faults.append(f"{name}: expected a section of keys, got {_describe(raw)}")
            return None
        names = [f.name for f in dataclasses.fields(kind)]
        self._refuse_unknown(raw, names, prefix=f"{name}.")
        before = len(self.faults)
        found = self._values(kind, raw, names, prefix=f"{name}.")
        if name == "budget":
            self._check_budget(raw)
        return kind(**{**defaults, **found}) if len(self.faults) == before else None

    def _values(
        self, kind: type, raw: Mapping[Any, Any], names: Sequence[str], prefix: str
    ) -> dict[str, Any]:
        hints = typing.get_type_hints(kind)
        limits = {f.name: f.metadata.get("range") for f in dataclasses.fields(kind)}
        found: dict[str, Any] = {}
        for name in names:
            if name not in raw:
                continue
            try:
                value = _convert(raw[name], hints[name])
            except ValueError as error:
                self.faults.append(f"{prefix}{name}: {error}, got {_describe(raw[name])}")
                continue
            limit = limits[name]
            if limit is not None and value is not None and value not in limit:
                self.faults.append(f"{prefix}{name}: must be {limit}, got {value:g}")
                continue
            found[name] = value
        return found

    def _check_budget(self, raw: Mapping[Any, Any]) -> None:
        given = [key for key in _BUDGETS if raw.get(key) is not None]
        if len(given) != 1:
            got = " and ".join(given) if given else "none"
            self.faults.append(f"budget: give exactly one of {', '.join(_BUDGETS)}, got {got}")
        if "batch" in raw and "fit" not in given:
            self.faults.append("budget.batch: only with fit; the batch of a training step is batch")
        if isinstance(raw.get("fit"), str):
            try:
                fit_of(raw["fit"])
            except ValueError as error:
                self.faults.append(f"budget.fit: {error}, got {raw['fit']!r}")

    def _refuse_unknown(self, raw: Mapping[Any, Any], known: Sequence[str], *, prefix: str) -> None:
        for key in raw:
            if key in known:
                continue
            elsewhere = [p for p in _known_paths() if p.rpartition(".")[2] == key]
            nearest = elsewhere[0] if elsewhere else prefix + _nearest(str(key), known)
            self.faults.append(f"{prefix}{key}: unknown key; the nearest is {nearest}")


def _known_paths() -> list[str]:
    """Every key that can be set, dotted."""
    leaves = [f"{s}.{f.name}" for s, kind in _SECTIONS.items() for f in dataclasses.fields(kind)]
    return [*_SCALARS, *leaves]


def _nearest(key: str, known: Sequence[str]) -> str:
    # A bare key is compared with bare keys: "ratoi" is near "budget.ratio" only by its last part.
    leaves = {k if "." in key else k.rpartition(".")[2]: k for k in reversed(known)}
    return leaves[get_close_matches(key, list(leaves), n=1, cutoff=0.0)[0]]


def _convert(value: object, kind: Any) -> Any:
    """``value`` as ``kind`` (an annotation of a section); ValueError says what was expected."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(k for k in typing.get_args(kind) if k is not types.NoneType))
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(_is_int(item) for item in value):
            raise ValueError("must be a list of whole numbers")
        return tuple(value)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if kind is int:
        if not _is_int(value):
            raise ValueError("must be a whole number")
        return value
    if kind is float:
        if not (_is_int(value) or isinstance(value, float)) or not abs(value) < math.inf:
            raise ValueError("must be a number")
        return float(value)
    if not isinstance(value, str) or not value:
        raise ValueError("must be text")
    return value


def _is_int(value: object) -> typing.TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


# --- finding -------------------------------------------------------------------------------------


def find_recipe(name_or_path: str | Path) -> Path:
    """File of a recipe: a path as given, or a name such as ``longchat`` or ``paper/longchat``.

    Names are looked up in a checkout's ``recipes/`` or in the installed package. UserError if there
    is none, with the nearest name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    name = str(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{name}: no such recipe file")
    names = recipe_names()
    if name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0.0)
        hint = f"; the nearest is {nearest[0]}, all are {', '.join(names)}" if nearest else ""
        raise UserError(f"{name}: no recipe of that name{hint}")
    return _recipe_folder() / f"{name}.yaml"


def recipe_label(name_or_path: str | Path) -> str:
    """Short name of a recipe for naming a run: ``paper-longchat`` for ``paper/longchat``."""
    path = find_recipe(name_or_path).resolve()
    folder = _recipe_folder().resolve()
    name = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return "-".join(name.with_suffix("").parts)


def recipe_names() -> list[str]:
    """Names of the recipes that come with starkv, sorted."""
    folder = _recipe_folder()
    files: Iterator[Path] = folder.rglob("*.yaml")
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)


def _recipe_folder() -> Path:
    package = Path(__file__).resolve().parent
    installed = package / "recipes"  # the wheel puts them there; a checkout keeps them on top
    return installed if installed.is_dir() else package.parent / "recipes"
