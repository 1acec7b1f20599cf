"""Small random models of every supported family, and compressed versions of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from starkv_core.calibrate.loop import budget_for
from starkv_core.calibrate.start import build_start, gate_settings
from starkv_core.calibrate.student import Student
from starkv_core.models.load import LoadedModel, prepare
from starkv_core.rank_map import LayerRanks
from starkv_core.recipe import Recipe, parse_recipe
from starkv_core.run import Subject, deployed_subject
from tests.coded_case import coded_weights

VOCAB = 97
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# head_dim differs from hidden / heads everywhere; GQA, MHA and MQA are all here.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2},
}

SCALED_ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    },
}


def config(family: str, **changes: Any) -> Any:
    """A small config of a family."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **SHAPES[family],
        **changes,
    }
    return CONFIGS[family](**shape)


def model(family: str = "llama", seed: int = 0, **changes: Any) -> LoadedModel:
    """A random model: weights large enough that attention is far from uniform, biases not zero."""
    torch.manual_seed(seed)
    live = AutoModelForCausalLM.from_config(config(family, **changes))
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return prepare(live, None, family)


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def recipe(**changes: Any) -> Recipe:
    """A one-shot recipe for small models."""
    content = {"steps": 0, "budget": {"ratio": 2.0}, "data": {"length": 48}, **changes}
    return parse_recipe(content, where="test")


def student(loaded: LoadedModel, made: Recipe) -> Student:
    """Trained form of a model at the recipe's start."""
    layers = build_start(loaded, made, budget_for(made, loaded.spec), ids(4, 48, seed=3))
    return Student(loaded, layers, gate_settings(made))


def deployed(
    loaded: LoadedModel,
    ranks: LayerRanks | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Subject:
    """A compressed model; ``ranks`` in every layer if given, stored in float32 for exactness."""
    made = recipe(**{"start": {"slack": 0}, **changes})
    live = student(loaded, made)
    if ranks is not None:
        for layer in live.by_layer().values():
            layer.set_ranks(ranks, live.settings)
    folded = {i: layer.fold(live.settings) for i, layer in live.by_layer().items()}
    return deployed_subject(loaded, live.ranks(), folded, store_dtype=dtype)


def coded(subject: Subject, **options: Any) -> Subject:
    """A subject with packed caches, steps set on random tokens; options of ``coded_weights``."""
    cache = subject.new_cache()
    with torch.no_grad(), subject.active() as live:
        live(ids(4, 80, seed=8).to(subject.device), past_key_values=cache)
    weights = {}
    for i, w in subject.weights.items():
        keys, values = (t[:, :80].float() for t in cache.layers[i].buffers())
        r, r_v = len(w.key_down), len(w.value_down)
        weights[i] = coded_weights(w, keys[..., :r], values[..., :r_v], **options)
    return replace(subject, weights=weights)


def full_ranks(loaded: LoadedModel) -> LayerRanks:
    """Every component kept: head-wise keys, joint values."""
    spec = loaded.spec
    return LayerRanks((spec.key_rank,) * spec.n_kv_heads, (spec.value_rank,))


def ragged_ranks(loaded: LoadedModel) -> LayerRanks:
    """A different rank for every key head (trap 3), and an odd value rank."""
    spec = loaded.spec
    return LayerRanks(tuple(3 + 4 * h for h in range(spec.n_kv_heads)), (spec.value_rank // 2 + 1,))
