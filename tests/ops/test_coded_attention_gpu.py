"""Attention over packed codes, compiled, against plain mathematics in float64 on the same GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.latent_case import relative_error
from tests.ops.test_coded_attention import CASES, Case, draw
from tests.tolerances import BF16_OP, CODED_OP

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
BOUND = {torch.float16: CODED_OP, torch.bfloat16: BF16_OP}

RAGGED = tuple(12 + 7 * h % 17 for h in range(32))
LEADING = tuple(-(-r // 5) for r in RAGGED)
REST = tuple(r - n for r, n in zip(RAGGED, LEADING, strict=True))
LLAMA_2_7B = Case(32, 128, ((4, LEADING), (3, REST)), ((4, 288), (3, 1146)), 1, 0)
LLAMA_3_1_8B = Case(32, 128, ((4, (33, 41, 37, 40, 64, 66, 68, 70)),), ((4, 500),), 1, 0)


def check(case: Case, dtype: torch.dtype) -> None:
    call = draw(case, dtype, DEVICE, seed=1)
    got = call.run("triton")
    assert torch.equal(got, call.run("triton")), "two runs differ"
    assert relative_error(got, call.exact()) < BOUND[dtype]
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", BOUND, ids=["fp16", "bf16"])
@pytest.mark.parametrize("filled", [1, 63, 65, 4097, 131072])
@pytest.mark.parametrize("shape", [LLAMA_2_7B, LLAMA_3_1_8B], ids=["llama-2", "llama-3.1"])
def test_lengths(shape: Case, filled: int, dtype: torch.dtype) -> None:
    check(replace(shape, filled=filled, coded=max(filled - 32, 0)), dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shapes(case: Case) -> None:
    check(case, torch.float16)


def test_batch() -> None:
    check(replace(LLAMA_2_7B, filled=1500, coded=1468, batch=16, padded=True), torch.float16)
