"""Codes of latents: a few bits each, really packed (docs/design.md sections 4 and 5)."""

from triton_ops.latent_codes.codec import Codec, LayerCodes
from triton_ops.latent_codes.layout import PLANES, TILE, CodeLayout, Section, tiles
from triton_ops.latent_codes.reference import pack, unpack

__all__ = [
    "PLANES",
    "TILE",
    "CodeLayout",
    "Codec",
    "LayerCodes",
    "Section",
    "pack",
    "tiles",
    "unpack",
]
