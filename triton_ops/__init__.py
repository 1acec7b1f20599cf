"""Operations on latent caches: for each a plain-torch reference, a kernel and a checked wrapper.

Nothing here imports ``starkv_core``; importing it needs neither Triton nor a GPU.
"""
