"""Which implementation of an op runs: plain torch anywhere, Triton on an NVIDIA GPU."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

BACKENDS = ("reference", "triton")
_LEAST_CAPABILITY = (8, 0)  # asynchronous copies and bf16 products


def choose_backend(asked: str | None, device: torch.device) -> str:
    """The backend to run on ``device``: the one asked for, or for None the best that can run.

    Raises:
        ValueError: unknown, or it cannot run on this device; the message says why.
    """
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"backend {asked!r}: use one of {', '.join(BACKENDS)}")
    if asked == "reference":
        return asked
    why_not = _triton_fault(device)
    if asked == "triton" and why_not:
        raise ValueError(f"backend 'triton' cannot run: {why_not}; use reference")
    # Interpreted kernels run on a CPU, but for tests: only when asked for.
    return "triton" if asked or (not why_not and device.type == "cuda") else "reference"


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Within, Triton launches on ``device``: it takes the current GPU, not that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _triton_fault(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted and device.type == "cpu" else f"the device is {device.type}"
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}, 8.0 is needed"
    return None
