"""starkv: low-rank key-value caches with learned ranks (STAR-KV, arXiv 2606.08382)."""

__version__ = "0.1.0"
