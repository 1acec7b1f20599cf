"""What does not fit in the arguments of an op, in words: an error lists all of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def shape_faults(
    expected: Mapping[str, tuple[torch.Tensor | None, tuple[int, ...]]],
) -> list[str]:
    """Tensors of another shape than the one beside them; None has any."""
    return [
        f"{name} {list(got.shape)}, expected {list(want)}"
        for name, (got, want) in expected.items()
        if got is not None and tuple(got.shape) != want
    ]


def dtype_faults(expected: Mapping[str, tuple[torch.Tensor, torch.dtype]]) -> list[str]:
    """Tensors of another dtype than the one beside them."""
    return [
        f"{name} {got.dtype}, expected {want}"
        for name, (got, want) in expected.items()
        if got.dtype != want
    ]


def stride_faults(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors whose numbers of the last dimension lie apart."""
    return [
        f"{name} has numbers {tensor.stride(-1)} apart, expected 1"
        for name, tensor in tensors.items()
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1
    ]


def gap_faults(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Tensors that are not contiguous."""
    return [
        f"{name} has gaps between its rows"
        for name, tensor in tensors.items()
        if not tensor.is_contiguous()
    ]
