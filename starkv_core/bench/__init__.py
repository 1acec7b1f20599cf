"""Speed of latent attention and of whole models, beside the dense cache (docs/benchmarks)."""
