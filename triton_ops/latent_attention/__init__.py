"""Attention of a few query tokens over cached latents (docs/design.md sections 2 and 6)."""

from triton_ops.latent_attention.op import BACKENDS, latent_attention
from triton_ops.latent_attention.reference import expand_heads, rotate

__all__ = ["BACKENDS", "expand_heads", "latent_attention", "rotate"]
