"""Adapters: one per model family, all behind the same few questions.

The supported families share transformers' module names (``model.layers[i].self_attn.q_proj`` and so
on); an adapter states what differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from starkv_core.errors import UserError
from starkv_core.models.spec import ModelSpec, Rope

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
_REFUSED_ROPE = {
    "dynamic": "its frequencies change with the sequence's length, so latents would go stale",
    "longrope": "its frequencies switch at a length, so cached latents would go stale",
}


class Family:
    """Base adapter: RoPE on full heads, no norm on keys. Subclasses override what differs."""

    name: str
    model_type: str
    qk_norm: bool = False

    def __init__(self, config: Any) -> None:
        self.config = config

    # -- checks that need the config alone -----------------------------------------------------

    def faults(self) -> list[str]:
        """Reasons why this model cannot be compressed; empty when it can."""
        found = []
        kind = self.rope_kind()
        if kind not in SUPPORTED_ROPE:
            why = _REFUSED_ROPE.get(kind, "it is unknown to starkv")
            found.append(f"RoPE type {kind!r}: {why}; supported: {', '.join(SUPPORTED_ROPE)}")
        partial = (getattr(self.config, "rope_parameters", None) or {}).get(
            "partial_rotary_factor", 1.0
        )
        if partial != 1.0:
            found.append(f"partial_rotary_factor {partial}: only full rotation (1.0) is supported")
        if getattr(self.config, "quantization_config", None) is not None:
            found.append("quantised base weights: load the 16-bit or 32-bit checkpoint instead")
        return found

    def rope_kind(self) -> str:
        """RoPE type named by the config."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        return str(parameters.get("rope_type", "default"))

    def windows(self) -> dict[int, int]:
        """Layers under a sliding window, with its length in tokens."""
        window = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        count = self.config.num_hidden_layers
        if kinds is None:
            # Mistral's config carries a window but no layer types: it then holds for every layer.
            kinds = ["sliding_attention" if window else "full_attention"] * count
        if window is None:
            return {}
        return {i: window for i, kind in enumerate(kinds) if kind != "full_attention"}

    def spec(self, rope: Rope) -> ModelSpec:
        """The spec of this model, given the RoPE read from its live module."""
        c = self.config
        heads = c.num_attention_heads
        return ModelSpec(
            family=self.name,
            n_layers=c.num_hidden_layers,
            n_heads=heads,
            n_kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
            hidden=c.hidden_size,
            vocab=c.vocab_size,
            max_positions=c.max_position_embeddings,
            rope=rope,
            qk_norm=self.qk_norm,
            windows=self.windows(),
        )

    # -- modules of a live model ---------------------------------------------------------------

    @staticmethod
    def rope(model: nn.Module) -> Rope:
        """RoPE of a live model: its own ``inv_freq`` buffer and attention factor."""
        module = model.model.rotary_emb  # type: ignore[union-attr]
        return Rope(
            kind=str(getattr(module, "rope_type", "default")),
            inv_freq=module.inv_freq.detach().float().cpu().clone(),  # type: ignore[union-attr,operator]
            scaling=float(getattr(module, "attention_scaling", 1.0)),
        )

    @staticmethod
    def attentions(model: nn.Module) -> list[nn.Module]:
        """Attention modules, in the order of the layers."""
        return [layer.self_attn for layer in model.model.layers]  # type: ignore[union-attr]

    def queries(self, attention: Any, hidden: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Queries before RoPE: ``[B, L, d]`` to ``[B, H, L, D]``."""
        q = attention.q_proj(hidden)
        return q.view(*q.shape[:2], -1, head_dim).transpose(1, 2)

    def keys(self, attention: Any, hidden: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Keys before RoPE: ``[B, L, d]`` to ``[B, H_kv, L, D]``."""
        k = attention.k_proj(hidden)
        return k.view(*k.shape[:2], -1, head_dim).transpose(1, 2)

    def key_norm(self, attention: Any) -> tuple[torch.Tensor, float] | None:
        """Weight ``[D]`` and epsilon of the norm on keys, or None."""
        return None


class Llama(Family):
    """LLaMA 1 to 3.x, LongChat, vicuna and other checkpoints of model type ``llama``."""

    name = model_type = "llama"


class Mistral(Family):
    """Mistral; layers under a sliding window stay dense."""

    name = model_type = "mistral"


class Qwen2(Family):
    """Qwen2 and Qwen2.5: biases on queries, keys and values."""

    name = model_type = "qwen2"


class Qwen3(Family):
    """Qwen3: RMSNorm on queries and keys, per head, before RoPE."""

    name = model_type = "qwen3"
    qk_norm = True

    def faults(self) -> list[str]:
        found = super().faults()
        if getattr(self.config, "attention_bias", False):
            found.append("attention_bias with a norm on keys: the bias cannot be folded out of it")
        return found

    def queries(self, attention: Any, hidden: torch.Tensor, head_dim: int) -> torch.Tensor:
        q = attention.q_proj(hidden)
        return attention.q_norm(q.view(*q.shape[:2], -1, head_dim)).transpose(1, 2)

    def keys(self, attention: Any, hidden: torch.Tensor, head_dim: int) -> torch.Tensor:
        k = attention.k_proj(hidden)
        return attention.k_norm(k.view(*k.shape[:2], -1, head_dim)).transpose(1, 2)

    def key_norm(self, attention: Any) -> tuple[torch.Tensor, float] | None:
        return attention.k_norm.weight, float(attention.k_norm.variance_epsilon)


FAMILIES: tuple[type[Family], ...] = (Llama, Mistral, Qwen2, Qwen3)


def family_of(config: Any, name: str) -> Family:
    """The adapter for a transformers config.

    Raises:
        UserError: the architecture is not supported, or this model uses something that is not.
    """
    for family in FAMILIES:
        if config.model_type == family.model_type:
            adapter = family(config)
            faults = adapter.faults()
            if faults:
                raise UserError(f"{name}: cannot be compressed: " + "; ".join(faults))
            return adapter
    known = ", ".join(f.model_type for f in FAMILIES)
    raise UserError(
        f"{name}: architecture {config.model_type!r} is not supported; supported: {known}"
    )
