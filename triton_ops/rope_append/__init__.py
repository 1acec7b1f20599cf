"""What a decode step does before attention: queries turned, latents stored, in one launch."""

from triton_ops.rope_append.op import rope_append

__all__ = ["rope_append"]
