"""Attention of a few query tokens over cached latents (docs/design.md sections 2 and 6)."""

from triton_ops.latent_attention.factors import LatentFactors
from triton_ops.latent_attention.layout import KeyLayout, row_width
from triton_ops.latent_attention.op import SLOTS, latent_attention
from triton_ops.latent_attention.reference import expand_heads, rotate
from triton_ops.latent_attention.rope import RopeTables, by_slot
from triton_ops.latent_attention.tuning import workspace_bytes

__all__ = [
    "SLOTS",
    "KeyLayout",
    "LatentFactors",
    "RopeTables",
    "by_slot",
    "expand_heads",
    "latent_attention",
    "rotate",
    "row_width",
    "workspace_bytes",
]
