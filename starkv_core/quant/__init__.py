"""Bits for latents: schemes, their allocation under a byte budget, and `starkv quantize`."""
