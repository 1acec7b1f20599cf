"""Times of one step: a CUDA graph replayed between events, after a flush of the L2 cache.

On a CPU the same functions run on the wall clock; such times say nothing about a GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from starkv_core.graphs import CaptureError, capture
from triton_ops.backends import launching_on

LEAST_RUNS, MOST_RUNS = 10, 100
SECONDS = 0.5  # measured time of one backend in one case
_CPU_RUNS = 3  # enough to see that it works
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
_STREAM_BYTES = 2 << 30  # of the tensors that measure the bandwidth
_CPU_STREAM_BYTES = 16 << 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step, and whether it ran as a captured graph."""

    p20: float
    p50: float
    p80: float
    runs: int
    graph: bool


def measure(step: Callable[[], object], device: torch.device, *, cold: bool = True) -> Timing:
    """Time ``step``, captured as a CUDA graph where that works and else launched as it is.

    Args:
        step: works on static tensors; called a few times to warm up, then captured.
        cold: flush the L2 cache before every run, as decoding finds the latents of a layer after
            all other layers have passed through it.
    """
    if device.type != "cuda":
        return _timed(step, device, graph=False, cold=False)
    try:
        graph = capture(step, device)
    except CaptureError:  # something in it waits for the GPU
        return _timed(step, device, graph=False, cold=cold)
    return _timed(graph.replay, device, graph=True, cold=cold)


def measure_steps(
    step: Callable[[], object],
    device: torch.device,
    *,
    graph: bool,
    least: int = LEAST_RUNS,
    most: int = 30,
) -> Timing:
    """Time a step as it is, of a captured model (``graph``) or launched: no flush of the L2.

    A whole model passes through far more than the L2 by itself.
    """
    return _timed(step, device, graph=graph, cold=False, least=least, most=most)


def _timed(
    step: Callable[[], object],
    device: torch.device,
    *,
    graph: bool,
    cold: bool,
    least: int = LEAST_RUNS,
    most: int = MOST_RUNS,
) -> Timing:
    if device.type != "cuda":
        spent = []
        for _ in range(_CPU_RUNS):
            started = time.perf_counter()
            step()
            spent.append((time.perf_counter() - started) * 1e3)
        return summary(spent, graph)
    with launching_on(device):  # events are recorded on the current GPU
        step()
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = max(time.perf_counter() - started, 1e-6)
        runs = max(least, min(most, int(SECONDS / seconds)))
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if cold else None
        marks = []
        for _ in range(runs):
            if flush is not None:
                flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            stop.record()
            marks.append((start, stop))
        torch.cuda.synchronize()
    return summary([start.elapsed_time(stop) for start, stop in marks], graph)


def summary(milliseconds: list[float], graph: bool) -> Timing:
    """Median and 20th and 80th percentile."""
    ordered = torch.tensor(sorted(milliseconds), dtype=torch.float64)
    p20, p50, p80 = (float(torch.quantile(ordered, q)) for q in (0.2, 0.5, 0.8))
    return Timing(p20, p50, p80, len(milliseconds), graph)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that memory really moves, by whichever is faster: reading alone or copying.

    ``a.sum()`` and ``b = 2 a`` over 2 GiB each: a decode step reads, which is quicker than copying
    where memory has to turn around. Kernels of torch: a memcpy captured in a graph goes through
    another engine.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        size = min(_STREAM_BYTES, free // 4)
    else:
        size = _CPU_STREAM_BYTES
    a = torch.ones(size // 4, dtype=torch.float32, device=device)
    b, total = torch.empty_like(a), torch.empty((), device=device)
    copied = measure(lambda: torch.mul(a, 2, out=b), device, cold=False)
    read = measure(lambda: torch.sum(a, 0, out=total), device, cold=False)
    return max(2 * a.nbytes / copied.p50, a.nbytes / read.p50) * 1e3


def release(device: torch.device) -> None:
    """Give back what is no longer referenced, and start a new count of peak memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors since :func:`release`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
