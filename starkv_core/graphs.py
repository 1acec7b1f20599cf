"""Capturing work as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UPS = 2  # runs before the capture: kernels compile, libraries set themselves up


class CaptureError(Exception):
    """A step cannot be captured; the message says why."""


def capture(
    step: Callable[[], object],
    device: torch.device,
    *,
    reset: Callable[[], None] = lambda: None,
    generator: torch.Generator | None = None,
) -> torch.cuda.CUDAGraph:
    """Run ``step`` a few times on a side stream, then capture it; the capture runs nothing.

    Args:
        step: works on static tensors.
        device: the current GPU.
        reset: undoes a run, so that after the warm-ups all is as it was; not captured.
        generator: of draws within the step; its state moves with the replays alone.

    Raises:
        CaptureError: something in the step cannot be captured. What fails in the warm-ups, so
            without a capture too, is raised as it is.
    """
    state = None if generator is None else generator.get_state()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            step()
            reset()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    if generator is not None and state is not None:
        generator.set_state(state)
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        raise CaptureError(reason(error)) from error
    return graph


def reason(error: Exception) -> str:
    """An error in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
