"""Loading a base model: a folder, a hub id, or the embedded default."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from starkv_core import embedded
from starkv_core.artifacts import MANIFEST
from starkv_core.errors import UserError
from starkv_core.models.family import Family, family_of
from starkv_core.models.spec import ModelSpec

EMBEDDED_NAME = "embedded"
_CONFIG = "config.json"
_log = logging.getLogger(__name__)  # shown on stderr
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_FLOAT16_NORMAL = 1e-4  # above it, float16 holds every bfloat16 value exactly
_HUB_TIMEOUT = 10.0  # seconds
_NO_SETTINGS = ("architectures", "dtype", "transformers_version")  # of a config, for figures
_SAMPLE = 256  # numbers of each tensor that enter the fingerprint


@dataclass(frozen=True)
class LoadedModel:
    """A frozen base model in evaluation mode.

    Attributes:
        model: transformers causal language model; parameters do not require gradients.
        tokenizer: its tokenizer.
        spec: shape of its attention.
        family: its adapter.
        name: folder, hub id or ``embedded``.
        fingerprint: hash of its weights (:func:`fingerprint`).
    """

    model: Any
    tokenizer: Any
    spec: ModelSpec
    family: Family
    name: str
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the model computes."""
        return self.model.get_input_embeddings().weight.dtype

    @cached_property
    def settings_sha256(self) -> str:
        """Hash of config (RoPE, norms, end tokens) and tokenizer: answers depend on these too."""
        config = self.model.config.to_diff_dict()
        known = {k: v for k, v in config.items() if k not in _NO_SETTINGS and k[0] != "_"}
        ends = self.model.generation_config.eos_token_id
        content = json.dumps([known, ends, _tokenizing(self.tokenizer)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Hash that tells two sets of weights apart, whatever dtype they were loaded in.

    Every parameter enters with its name, shape and a strided sample of values rounded to bfloat16,
    those too small for float16 to hold as zero.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLE)
        sample = flat[::stride][:_SAMPLE].to(torch.bfloat16).cpu()
        sample = torch.where(sample.abs() < _FLOAT16_NORMAL, 0.0, sample).view(torch.int16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:32]


def _tokenizing(tokenizer: Any) -> dict[str, Any]:
    """All that decides which ids a text becomes; of slow tokenizers only the vocabulary."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return dict(tokenizer.get_vocab())
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    return {k: v for k, v in known.items() if k not in ("padding", "truncation")}  # of a call


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary; tokens added to it later (padding, roles) do not count."""
    added = tokenizer.get_added_vocab()
    vocabulary = {k: v for k, v in tokenizer.get_vocab().items() if k not in added}
    return hashlib.sha256(json.dumps(vocabulary, sort_keys=True).encode()).hexdigest()


def load(
    name: str | None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a base model for compression or as a dense baseline; code beside it is never run.

    Args:
        name: folder or hub id; None for the embedded model.
        dtype: ``auto`` (the checkpoint's, but float32 on a CPU, where 16-bit products are slow),
            ``bfloat16``, ``float16`` or ``float32``.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None picks a GPU where there is one.
        device_map: as in transformers (``auto``, ``balanced``, ...); excludes ``device``.
        revision: branch, tag or commit of a hub id.

    Raises:
        UserError: nothing there, an unsupported architecture, pickled weights, a tokenizer of
            another model.
    """
    if device is not None and device_map is not None:
        raise UserError("device and device_map exclude each other; give one of them")
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, label, common = _source(name, revision)
    config = _config(source, label, common)
    family = family_of(config, label)
    if device_map is None:
        target = pick_device(device)
        on_cpu = target.type == "cpu"
        placement: Any = {"": str(target)} if target.type != "cpu" else None
    else:
        on_cpu, placement = not torch.cuda.is_available(), device_map
    if dtype == "auto":
        torch_dtype: Any = torch.float32 if on_cpu else "auto"
    elif dtype in _DTYPES:
        torch_dtype = _DTYPES[dtype]
    else:
        raise UserError(f"dtype {dtype!r}: use auto, {', '.join(_DTYPES)}")

    try:
        # Before the weights: it is read in no time, and may not fit.
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        _check_vocabulary(tokenizer, config.vocab_size, label)
        with _without_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=torch_dtype,
                device_map=placement,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                **common,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(
            f"{label}: cannot load it (safetensors weights and a tokenizer are needed): "
            f"{_first_line(error)}"
        ) from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        # transformers would fill them with random numbers.
        raise UserError(
            f"{label}: the checkpoint lacks {len(lacking)} of the model's tensors: "
            f"{', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
        )
    if any(p.is_meta for p in model.parameters()):
        raise UserError(
            f"{label}: device_map moved weights off the GPUs (offloading); "
            "use a device_map that keeps every layer on a GPU"
        )
    return prepare(model, tokenizer, label, family)


def _check_vocabulary(tokenizer: Any, known: int, label: str) -> None:
    """Refuse a tokenizer with tokens past the embedding; added ones may never be used."""
    if tokenizer.vocab_size > known:
        raise UserError(
            f"{label}: its tokenizer has {tokenizer.vocab_size} tokens, the model knows {known}: "
            "it belongs to another model; put the model's own tokenizer files beside its weights"
        )


def pick_device(name: str | None) -> torch.device:
    """A device by its name; None is a GPU where there is one, else the CPU.

    Raises:
        UserError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no GPU that torch can use; use --device cpu")
    return device


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' bar over the weights; the hub's, over long downloads, stays."""
    from transformers.utils import logging

    def disabled(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{**kwargs, "disable": True})

    before = logging.set_tqdm_hook(disabled)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def inspect(name: str | None, *, revision: str | None = None) -> tuple[ModelSpec, int]:
    """Spec and number of parameters of a model, from its config alone: no weights are read.

    Raises:
        UserError: as :func:`load`.
    """
    from transformers import AutoModelForCausalLM

    source, label, common = _source(name, revision)
    config = _config(source, label, common)
    family = family_of(config, label)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return family.spec(family.rope(model)), sum(p.numel() for p in model.parameters())


def _source(name: str | None, revision: str | None) -> tuple[str, str, dict[str, Any]]:
    """Where a model lies, what to call it, and the options all of transformers' loaders share."""
    label = name or EMBEDDED_NAME
    source = str(embedded.MODEL_DIR) if label == EMBEDDED_NAME else label
    local = Path(source).is_dir()
    if not local and _is_path(source):
        raise UserError(f"{label}: no such model folder, and no run")
    if local and (Path(source) / MANIFEST).is_file():
        raise UserError(f"{label}: a run, and a model is wanted; name the base model of the run")
    if local and not (Path(source) / _CONFIG).is_file():
        raise UserError(f"{label}: neither a run (manifest.json) nor a model ({_CONFIG})")
    if not local:
        local = _only_cached(source, revision)
    return (
        source,
        label,
        {
            "revision": revision,
            # All families are native to transformers. Left out, it would ask at the terminal.
            "trust_remote_code": False,
            "local_files_only": local,
        },
    )


def _is_path(name: str) -> bool:
    """Whether a name can only mean a folder; hub ids are ``model`` or ``owner/model``."""
    first, slash, rest = name.partition("/")
    return name.startswith((".", "/", "~")) or "/" in rest or (bool(slash) and Path(first).is_dir())


def _only_cached(name: str, revision: str | None) -> bool:
    """Ask the hub once whether it has a model; True if it is out of reach but the cache is filled.

    transformers would try an unreachable hub for half a minute, for every file anew.

    Raises:
        UserError: the hub has no such model, or cannot be reached and nothing is cached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        cached = isinstance(try_to_load_from_cache(name, _CONFIG, revision=revision), str)
        if not cached and not constants.HF_HUB_OFFLINE:
            _log.warning("%s: no such folder; asking the Hugging Face hub for it", name)
        HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT)
    except HFValidationError:
        raise UserError(f"{name}: no such model folder, and not the form of a hub id") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        at = "" if revision is None else f" at revision {revision}"
        raise UserError(
            f"{name}: no such folder, and the hub has no such model{at}, or not for you "
            "(`hf auth login`)"
        ) from None
    except Exception as error:  # what a failed connection raises depends on the hub's client
        if not cached:
            raise UserError(
                f"{name}: no such folder, and the hub could not be reached "
                f"({_first_line(error)}); download the model and give its folder"
            ) from error
        return True
    return False


def _config(source: str, label: str, common: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **common)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{label}: no usable model config: {_first_line(error)}") from error


def prepare(model: Any, tokenizer: Any, name: str, family: Family | None = None) -> LoadedModel:
    """Wrap a live transformers model: frozen, in evaluation mode, with its spec."""
    family = family or family_of(model.config, name)
    model.requires_grad_(False)
    model.eval()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        spec=family.spec(family.rope(model)),
        family=family,
        name=name,
        fingerprint=fingerprint(model),
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
