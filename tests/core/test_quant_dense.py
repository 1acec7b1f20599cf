"""Baselines on dense caches: KIVI and round-to-nearest, number by number, and their bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from starkv_core.errors import UserError
from starkv_core.eval.perplexity import Windows, perplexity
from starkv_core.quant.dense import SCHEMES, CodedDenseLayer, coded_dense
from starkv_core.run import dense_subject
from tests import models

BATCH, HEADS, DIM = 2, 3, 64


def _group(values: list[float], bits: int) -> list[float]:
    """One group as it reads, in the formulas of the paper."""
    half = lambda v: float(np.float16(np.float32(v)))  # noqa: E731
    low, high, top = min(values), max(values), 2**bits - 1
    zero, scale = half(low), max(half(np.float32(high - low) / np.float32(top)), 2.0**-24)
    return [min(max(round((v - zero) / scale), 0), top) * scale + zero for v in values]


def _expected(x: torch.Tensor, name: str, keys: bool, length: int) -> torch.Tensor:
    """What ``x [B, H, length, D]`` reads as once all of it is stored: slowly."""
    scheme, out = SCHEMES[name], x.clone()
    channelwise = keys and scheme.residual > 0
    residual, group = scheme.residual, scheme.group or DIM
    coded = length - length % residual if channelwise else max(length - residual, 0)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            if channelwise:
                for start in range(0, coded, group):
                    for d in range(DIM):
                        part = x[b, h, start : start + group, d].tolist()
                        out[b, h, start : start + group, d] = torch.tensor(
                            _group(part, scheme.bits)
                        )
            else:
                for t in range(coded):
                    for start in range(0, DIM, group):
                        part = x[b, h, t, start : start + group].tolist()
                        out[b, h, t, start : start + group] = torch.tensor(
                            _group(part, scheme.bits)
                        )
    return out


def _bytes(name: str, length: int) -> int:
    """Bytes per row and head: codes, scales and zeros in blocks of 256 slots, the rest in full."""
    scheme = SCHEMES[name]
    group, residual = scheme.group or DIM, scheme.residual
    total = 0
    for channelwise in (residual > 0, False):
        coded = length - length % residual if channelwise else max(length - residual, 0)
        room = -(-coded // 256) * 256
        pairs = room // group * DIM if channelwise else room * (DIM // group)
        total += room * DIM * scheme.bits // 8 + pairs * 4 + residual * DIM * 2
    return total


@pytest.mark.parametrize("name", sorted(SCHEMES))
@pytest.mark.parametrize("parts", [(5,), (130, 1, 1), (100, 27, 1, 130), (256, 5)])
def test_what_is_read_is_what_the_papers_formulas_give(name: str, parts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(parts))
    layer = CodedDenseLayer(SCHEMES[name], torch.bfloat16)
    length = sum(parts)
    k, v = (
        torch.randn(1, 1, length, DIM, generator=generator).bfloat16().float() for _ in range(2)
    )
    done = 0
    for part in parts:
        new = slice(done, done + part)
        seen_k, seen_v = layer.update(k[:, :, new], v[:, :, new])
        # New tokens are exact; those before are as they were stored before.
        assert torch.equal(seen_k[:, :, done:], k[:, :, new])
        assert torch.equal(seen_v[:, :, done:], v[:, :, new])
        for seen, exact, keys in ((seen_k, k, True), (seen_v, v, False)):
            wanted = _expected(exact[:, :, :done], name, keys, done)
            assert seen.shape[2] == done + part
            assert torch.allclose(seen[:, :, :done], wanted, atol=1e-5)
        done += part
        assert layer.get_seq_length() == done
    assert sum(t.untyped_storage().nbytes() for t in layer.tensors()) == _bytes(name, length)


def test_rows_move_together() -> None:
    layer = CodedDenseLayer(SCHEMES["kivi-4"], torch.bfloat16)
    k, v = (torch.randn(BATCH, HEADS, 140, DIM).bfloat16().float() for _ in range(2))
    layer.update(k, v)
    new = torch.zeros(BATCH, HEADS, 1, DIM)
    before = [side.read() for side in layer.sides]
    layer.reorder_cache(torch.tensor([1, 0]))
    assert all(
        torch.equal(side.read(), old.flip(0)) for side, old in zip(layer.sides, before, strict=True)
    )
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(layer.update(new[:1], new[:1])[0][:, :, :-1], before[0][:1])


@pytest.mark.parametrize("name", ["kivi-4", "rtn-8"])
def test_a_dense_model_reads_its_coded_cache(name: str) -> None:
    dense = dense_subject(models.model("llama", head_dim=64))
    coded = coded_dense(dense, name)
    windows = Windows(models.ids(2, 150), 1.0)
    results = [perplexity(s, windows, mode="token", batch=2) for s in (dense, coded)]
    assert results[0].nll != results[1].nll
    assert results[1].nll == pytest.approx(results[0].nll, rel=0.05)
    heads = dense.spec.n_kv_heads * dense.spec.n_layers * 2
    assert results[1].cache.held == heads * _bytes(name, 149)
    assert coded.name.endswith(name)


def test_bad_baselines() -> None:
    dense = dense_subject(models.model("llama"))  # heads of 16
    with pytest.raises(UserError, match="nearest is kivi-4"):
        coded_dense(dense, "kivi4")
    with pytest.raises(UserError, match="32 channels.*heads of 16"):
        coded_dense(dense, "kivi-2")
    assert coded_dense(dense, "rtn-4").dense_scheme.bits == 4
