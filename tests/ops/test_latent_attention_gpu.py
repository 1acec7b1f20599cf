"""Latent attention, compiled, against plain mathematics in float64 on the same GPU.

Buffers are mostly of one odd number of blocks: Triton compiles anew for arguments that are 1 or
multiples of 16, so the lengths of a shape share their kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from starkv_core.graphs import capture
from tests.latent_case import Case, draw, relative_error
from tests.tolerances import BF16_OP, FP16_OP, FP16_OP_MANY

pytestmark = pytest.mark.gpu

BOUND = {torch.float16: FP16_OP, torch.bfloat16: BF16_OP}
DEVICE = torch.device("cuda")
ROOM = 17 * 256  # slots that hold 4097
FREE = 9 << 30  # bytes that the longest contexts take

LLAMA_2_7B = Case(32, 128, tuple(12 + 7 * h % 17 for h in range(32)), 1434, 1)
# Ranks of two kinds: a kernel is compiled for each pair of product sizes.
LLAMA_3_1_8B = Case(32, 128, (33, 41, 37, 40, 64, 66, 68, 70), 500, 1, theta=5e5, llama3=True)

# Each head dimension, and what the layers above leave out; one of the two dtypes each.
OTHERS = {
    "mqa": (torch.float16, Case(4, 32, (9,), 12, 300, 3, 2, bias=True, padded=True, holes=True)),
    "batch-256": (torch.float16, Case(4, 64, (5, 9, 3, 7), 24, 130, 256, bias=True, padded=True)),
    "shared": (torch.float16, Case(4, 64, (20, 20, 9, 9), 24, 65, starts=(0, 0, 20, 20))),
    "yarn": (
        torch.bfloat16,
        Case(3, 80, (7, 75, 2), 37, 385, 3, bias=True, factor=1.3, padded=True, holes=True),
    ),
    "sixteen": (torch.bfloat16, Case(4, 96, (12, 70), 17, 80, queries=16, theta=1e6, bias=True)),
    "wide": (torch.float16, Case(3, 256, (40, 150, 9), 20, 1000)),
    "wide-gqa": (torch.bfloat16, Case(4, 256, (33, 126), 20, 1000, queries=5, holes=True)),
}


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Each test gives back what it took."""
    yield
    torch.cuda.empty_cache()


def check(
    case: Case, dtype: torch.dtype, room: int | None = None, bound: float | None = None
) -> None:
    """Error within bounds, and bit for bit the same in a second run."""
    call = draw(case, dtype, DEVICE, 1, room)
    got = call.run("triton")
    assert torch.equal(got, call.run("triton")), "two runs differ"
    want = call.exact()
    assert bool(want.any())
    assert relative_error(got, want) < (bound or BOUND[dtype])


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("filled", [1, 63, 64, 65, 4097])
@pytest.mark.parametrize("layer", [LLAMA_2_7B, LLAMA_3_1_8B], ids=["llama-2-7b", "llama-3.1-8b"])
def test_layers(layer: Case, filled: int, dtype: torch.dtype) -> None:
    check(replace(layer, filled=filled, batch=2), dtype, ROOM)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("layer", [LLAMA_2_7B, LLAMA_3_1_8B], ids=["llama-2-7b", "llama-3.1-8b"])
def test_layers_at_128k(layer: Case, dtype: torch.dtype) -> None:
    check(replace(layer, filled=131072), dtype, 131072 + ROOM)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    case, dtype = OTHERS["yarn"][1], torch.float16
    second = torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    call = draw(case, dtype, second, 5)
    assert relative_error(call.run("triton"), call.exact()) < FP16_OP
    kept: list[torch.Tensor] = []
    graph = capture(lambda: kept.append(call.run("triton")), second)
    graph.replay()
    torch.cuda.synchronize(second)
    assert relative_error(kept[-1], call.exact()) < FP16_OP
    assert torch.cuda.current_device() == 0


def test_sixteen_tokens_at_once() -> None:
    check(replace(LLAMA_3_1_8B, filled=4097, queries=16), torch.bfloat16, ROOM)


@pytest.mark.parametrize(("dtype", "case"), OTHERS.values(), ids=OTHERS)
def test_shapes(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, bound=FP16_OP_MANY if case.batch == 256 else None)


@pytest.mark.parametrize(
    "case",
    [
        Case(33, 64, (64,) * 33, 8, 2**20),  # keys beyond 2^31 numbers, not rebuilt
        Case(4, 64, (9, 7), 2056, 2**20, queries=2),  # values beyond 2^31 numbers, keys rebuilt
    ],
    ids=["keys", "values"],
)
def test_a_million_tokens(case: Case) -> None:
    """Positions stay exact, and offsets in a row of the batch outgrow 32 bits."""
    free, _ = torch.cuda.mem_get_info()
    if free < FREE:
        pytest.skip(f"{free >> 20} MiB of GPU memory free, {FREE >> 20} needed")
    check(case, torch.float16)
