"""Baselines that drop tokens from a cache: H2O and StreamingLLM, on dense caches and on latents."""
