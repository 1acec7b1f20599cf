"""What the rest of starkv needs to know of a model: one spec, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from triton_ops.latent_attention import RopeTables, by_slot


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model, taken from the model itself (docs/design.md, trap 7).

    Attributes:
        kind: ``default``, ``linear``, ``llama3`` or ``yarn``.
        inv_freq: float32 ``[D / 2]``, radians per token, on the CPU.
        scaling: factor on cos and sin (yarn's attention factor; 1 elsewhere).
    """

    kind: str
    inv_freq: torch.Tensor
    scaling: float

    def tables(
        self, start: int, stop: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin for slots ``start .. stop - 1``: two float32 ``[stop - start, D]``.

        Angles are formed in float64, so that far positions keep float32 accuracy.
        """
        return by_slot(start, stop, self.inv_freq, self.scaling, device)

    def growing(self) -> RopeTables:
        """Tables to keep: made once, grown with the context."""
        return RopeTables(self.inv_freq, self.scaling)


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a model's attention and cache.

    Attributes:
        family: adapter name, such as ``llama``.
        n_layers, n_heads, n_kv_heads, head_dim, hidden, vocab: sizes (H, H_kv, D, d of the design).
        max_positions: longest context in tokens.
        rope: rotary embedding.
        qk_norm: whether keys pass an RMSNorm per head before RoPE (Qwen3).
        windows: layers under a sliding window, with its length in tokens. They stay dense.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    max_positions: int
    rope: Rope
    qk_norm: bool = False
    windows: dict[int, int] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Query heads per key head, G = H / H_kv."""
        return self.n_heads // self.n_kv_heads

    @property
    def dense_reasons(self) -> dict[int, str]:
        """Layers that must stay dense, with the reason."""
        return {i: f"sliding window of {n} tokens" for i, n in self.windows.items()}

    @property
    def kv_width(self) -> int:
        """Numbers per token in the keys (or the values) of one layer, H_kv * D."""
        return self.n_kv_heads * self.head_dim

    @property
    def value_rank(self) -> int:
        """Largest useful joint value rank, min(H_kv * D, d)."""
        return min(self.kv_width, self.hidden)

    @property
    def key_rank(self) -> int:
        """Largest useful rank of one key head, min(D, d)."""
        return min(self.head_dim, self.hidden)

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes per token of the dense 16-bit cache: ``2 * H_kv * D * 2`` per layer."""
        return self.n_layers * 2 * self.kv_width * 2
