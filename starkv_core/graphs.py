"""Capturing work as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from triton_ops.backends import launching_on

_WARM_UPS = 2  # runs before the capture: kernels compile, libraries set themselves up


class CaptureError(Exception):
    """A step cannot be captured; the message says why."""


def require_gpu(device: torch.device) -> None:
    """Refuse other devices.

    Raises:
        CaptureError: not a GPU.
    """
    if device.type != "cuda":
        raise CaptureError("CUDA graphs need a GPU")


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
        device: the GPU of the tensors.
        reset: undoes a run, so that after the warm-ups all is as it was; not captured.
        generator: of draws within the step; its state moves with the replays alone. Whatever
            fails, it is left as it was, and can be drawn from.

    Raises:
        CaptureError: no GPU, or something in the step cannot be captured. What fails in the
            warm-ups, so without a capture too, is raised as it is.
    """
    require_gpu(device)
    with launching_on(device):
        stream = torch.cuda.current_stream()
        state = None if generator is None else generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(stream)
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    try:
                        step()
                    finally:
                        reset()  # also of half a run: the caller may go on without the graph
        finally:
            if generator is not None and state is not None:
                generator.set_state(state)
        stream.wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        try:
            # On its own stream: torch's belongs to the GPU that captured first.
            with torch.cuda.graph(graph, stream=side):
                step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that cannot end leaves its own
            torch.cuda.synchronize()
            # Every capture takes in the default generator too.
            default = torch.cuda.default_generators[torch.cuda.current_device()]
            for held in (default, generator):
                if held is not None:
                    _release(held)
            raise CaptureError(reason(error)) from error
        return graph


def _release(generator: torch.Generator) -> None:
    """Take a generator out of a capture that failed; its state stays as it is.

    torch counts it as captured for good and would refuse every draw to come. The mark is on the
    state, not on the generator: a new state with the same numbers has none.
    """
    fresh = torch.Generator(generator.device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh)


def reason(error: Exception) -> str:
    """An error in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
