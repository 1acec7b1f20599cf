"""Quantised layers: a change of basis changes nothing, codes cost what they are said to cost."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch

from starkv_core.quant.basis import (
    Side,
    hadamard_blocks,
    key_metrics,
    principal,
    sides_of,
    value_metrics,
)
from starkv_core.quant.costs import coding_costs
from starkv_core.quant.layer import QuantLayer, code_side, stored_order
from starkv_core.quant.measure import measure_latents
from starkv_core.quant.recover import _Coded
from starkv_core.quant.run import principal_sides
from starkv_core.quant.scheme import make_scheme
from starkv_core.run import Subject, deployed_subject
from tests import models

STAR = make_scheme(window=0, sinks=0)
PAPER = make_scheme("paper")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@cache
def subject_of(family: str, dtype: torch.dtype = torch.float32, ratio: float = 2.0) -> Subject:
    loaded = models.model(family)
    start = {"slack": 0, "allocation": "common"}
    return models.deployed(loaded, dtype=dtype, start=start, budget={"ratio": ratio})


def hidden(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), subject.active() as model:
        return model.model(ids, use_cache=False)[0]


def in_basis(subject: Subject, scheme: Any, bits: int = 8) -> tuple[Subject, dict[int, Any]]:
    """The subject with every channel kept, in the basis of a scheme, not coded without a cache."""
    stats = measure_latents(subject, models.ids(6, 48, seed=5))
    layers, sides = {}, {}
    for i in subject.weights:
        if scheme.name == "paper":
            raw = sides_of(subject.weights[i], len(subject.ranks.layers[i].keys), stats[i])
            sides[i] = tuple(hadamard_blocks(side)[0] for side in raw)
        else:
            sides[i] = principal_sides(subject, i, stats[i])
        layers[i] = QuantLayer(
            *(
                code_side(side, name, torch.full((side.channels,), bits), scheme, torch.float32)
                for side, name in zip(sides[i], ("key", "value"), strict=True)
            ),
            subject.spec.n_kv_heads,
            subject.weights[i].key_eps,
            scheme,
        )
    turned = deployed_subject(
        subject.base, subject.ranks, layers, store_dtype=subject.store_dtype, backend="reference"
    )
    return turned, {i: (sides[i], stats[i], layers[i]) for i in sides}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", [STAR, PAPER], ids=["star", "paper"])
def test_the_basis_leaves_the_model_as_it_is(family: str, scheme: Any) -> None:
    subject = subject_of(family)
    turned, _ = in_basis(subject, scheme)
    ids = models.ids(2, 40)
    before, after = hidden(subject, ids), hidden(turned, ids)
    assert torch.allclose(before, after, atol=2e-4 * float(before.abs().max()))


def test_so_it_does_where_heads_share_channels() -> None:
    loaded = models.model("llama")
    subject = models.deployed(loaded, start={"slack": 0, "key_group": 2, "value_group": 2})
    turned, made = in_basis(subject, STAR)
    ids = models.ids(2, 40)
    assert torch.allclose(hidden(subject, ids), hidden(turned, ids), atol=1e-3)
    assert all(len(layer.ranks.keys) == 2 for _, _, layer in made.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_principal_channels_are_uncorrelated_and_centred(family: str) -> None:
    """On the very text that was measured: latents through the model, not formulas again."""
    subject = subject_of(family)
    turned, made = in_basis(subject, STAR)
    again = measure_latents(turned, models.ids(6, 48, seed=5))
    for i, (sides, _, layer) in made.items():
        for name, side in zip(("key", "value"), sides, strict=True):
            mean = getattr(again[i], f"{name}_mean")
            moment = getattr(again[i], f"{name}_moment")
            owner = getattr(layer, f"{name}s").owner
            same = owner[:, None] == owner[None, :]
            deviation = moment.diagonal().sqrt()
            apart = (moment / deviation / deviation[:, None] - torch.eye(len(owner)))[same]
            assert float(apart.abs().max()) < 2e-3
            if family != "qwen3" or name == "value":
                assert float(mean.abs().max()) < 2e-3
                assert torch.allclose(deviation, torch.ones_like(deviation), atol=2e-3)
            assert bool((side.worth > 0).all())


def _errors_in_scores(subject: Subject, index: int, dropped: int, sides: Any, stats: Any) -> float:
    """Mean square of what dropping a channel changes in the keys, by the queries."""
    side: Side = sides[0]
    channel = side.up[..., dropped]
    total, energy = 0.0, stats.query_energy
    half = subject.spec.head_dim // 2
    for head in range(subject.spec.n_kv_heads):
        for d in range(subject.spec.head_dim):
            pair = 0.5 * (energy[head, d % half] + energy[head, d % half + half])
            total += float(pair * channel[head, d] ** 2)
    return total * float(side.rows[:, dropped].double().square().mean())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_worth_is_what_dropping_costs(family: str) -> None:
    subject = subject_of(family)
    _, made = in_basis(subject, STAR)
    for i, (sides, stats, _) in made.items():
        for channel in (0, sides[0].channels // 2):
            wanted = _errors_in_scores(subject, i, channel, sides, stats)
            assert float(sides[0].worth[channel]) == pytest.approx(wanted, rel=0.02)
        costs = coding_costs(sides[0], (8, 4, 3, 2))
        for finer, coarser in ((8, 4), (4, 3), (3, 2), (2, 0)):
            assert bool((costs[finer] < costs[coarser]).all())


def test_principal_axes_beat_other_bases_at_equal_bits() -> None:
    """Sum over channels of log variance times weight is what sets the error at a rate."""
    subject = subject_of("llama")
    stats = measure_latents(subject, models.ids(6, 48, seed=5))[0]
    raw = sides_of(subject.weights[0], 4, stats)
    attention = subject.base.family.attentions(subject.model)[0]
    for number, metrics, mean, moment in (
        (0, key_metrics(stats), stats.key_mean, stats.key_moment),
        (1, value_metrics(attention.o_proj.weight, subject.spec), stats.value_mean,
         stats.value_moment),
    ):  # fmt: skip
        side = raw[number]
        best = principal(side, mean, moment, metrics, centre=True)
        gram = torch.einsum("hdr,hde,hes->rs", side.up, metrics, side.up)
        covariance = moment - torch.outer(mean, mean)
        for owner in range(int(side.owner.max()) + 1):
            own = side.owner == owner
            c, m = covariance[own][:, own], gram[own][:, own]
            for seed in range(3):
                turn, _ = torch.linalg.qr(
                    torch.randn(
                        len(c), len(c), dtype=c.dtype, generator=torch.Generator().manual_seed(seed)
                    )
                )
                turn = torch.eye(len(c), dtype=c.dtype) if seed == 0 else turn
                weighed = (turn.T @ c @ turn).diagonal() * (turn.T @ m @ turn).diagonal()
                assert best.worth[best.owner == owner].log().sum() <= weighed.log().sum() + 1e-6


def test_value_metrics_are_blocks_of_the_output() -> None:
    subject = subject_of("qwen2")
    attention = subject.base.family.attentions(subject.model)[0]
    found = value_metrics(attention.o_proj.weight, subject.spec)
    w = attention.o_proj.weight.double().view(48, 2, 2, 16)  # out, kv head, query head, D
    wanted = torch.einsum("ohgd,ohge->hde", w, w)
    mean = wanted.diagonal(dim1=1, dim2=2).mean()
    assert torch.allclose(found, wanted + 0.3 * mean * torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("scales", ["static", "row"])
def test_stored_order_is_by_bits_then_heads(scales: str) -> None:
    subject = subject_of("llama")
    scheme = make_scheme(window=0, sinks=0, scales=scales)
    _, made = in_basis(subject, scheme)
    side = made[0][0][0]
    bits = torch.tensor([4, 0, 3, 8, 2, 3, 4, 0])[torch.arange(side.channels) % 8]
    coded = code_side(side, "key", bits, scheme, torch.float32)
    wanted = sorted(
        (c for c in range(side.channels) if bits[c]),
        key=lambda c: (-int(bits[c]), int(side.owner[c]), c),
    )
    assert coded.owner.tolist() == [int(side.owner[c]) for c in wanted]
    assert coded.codec.layout.bits().tolist() == [int(bits[c]) for c in wanted]
    assert torch.equal(coded.down, side.down[wanted].float())
    for place, c in enumerate(wanted):
        head = int(side.owner[c])
        assert torch.equal(coded.up[:, place], side.up[head, :, c].float())
    owner, order = stored_order(coded.counts)
    assert torch.equal(owner, coded.owner) and torch.equal(order, coded.codec.layout.bits())
    assert coded.codec.layout.groups == (() if scales == "static" else (len(wanted),))


def test_the_papers_layer_number_by_number() -> None:
    """Bits, groups, scales and codes of the paper's scheme, from its description."""
    subject = subject_of("llama", ratio=1.5)
    turned, made = in_basis(subject, PAPER)
    ranks = subject.ranks.layers[0].keys
    raw, _ = sides_of(subject.weights[0], len(ranks), made[0][1])
    side, part = hadamard_blocks(raw)
    coded = code_side(side, "key", torch.tensor([4, 3])[part], PAPER, torch.float32)
    lead = [-(-r // 5) for r in ranks]
    sections = [(4, sum(lead)), (3, sum(ranks) - sum(lead))]
    assert [(s.bits, s.channels) for s in coded.codec.layout.sections] == sections
    rest = [r - n for r, n in zip(ranks, lead, strict=True)]
    assert coded.codec.layout.groups == tuple(n for n in (*lead, *rest) if n)
    x = torch.randn(5, sum(ranks), generator=torch.Generator().manual_seed(1))
    seen, at = coded.codec.seen(x), 0
    for bits, counts in ((4, lead), (3, rest)):
        for count in filter(None, counts):
            for row in range(5):
                block = x[row, at : at + count]
                top = 2 ** (bits - 1) - 1
                g = float((block.abs().max() * torch.tensor(1.0 / top)).half())
                wanted = [g * min(max(round(float(v) / g), -top), top) for v in block]
                assert seen[row, at : at + count].tolist() == pytest.approx(wanted, rel=1e-5)
            at += count
    assert turned.compressed


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_read_token_by_token_are_close_to_sixteen(family: str) -> None:
    subject = subject_of(family, dtype=torch.bfloat16)
    ids = models.ids(2, 24)

    def decoded(one: Subject) -> torch.Tensor:
        held, states = one.new_cache(), []
        with torch.no_grad(), one.active() as model:
            for token in ids.split(1, dim=1):
                states.append(model.model(token, past_key_values=held, use_cache=True)[0])
        return torch.cat(states, 1)

    exact = decoded(subject)
    errors = [
        float((decoded(in_basis(subject, STAR, bits)[0]) - exact).square().mean())
        / float(exact.square().mean())
        for bits in (8, 4)
    ]
    # Random models have sharp attention, and 8 bits clip what the short text never showed.
    assert errors[0] < 0.02
    assert errors[0] < 0.2 * errors[1]


def test_a_shift_is_what_the_dtype_holds() -> None:
    subject = subject_of("llama")
    _, made = in_basis(subject, STAR)
    side = made[0][0][0]
    far = replace(side, shift=side.shift + 100.0)
    coarse = far.shift_in(torch.bfloat16)
    assert torch.equal(coarse.shift, coarse.shift.bfloat16().double())
    moved = coarse.shift - far.shift
    assert float(moved.abs().max()) > 1e-3
    # What is taken off more comes back through the bias.
    assert torch.allclose(
        torch.einsum("hdr,r->hd", side.up, moved), coarse.bias - far.bias, atol=1e-9
    )


@pytest.mark.parametrize("group", [1, 2], ids=["head-wise", "shared by two heads"])
def test_what_recovery_trains_starts_as_the_layer_and_reaches_every_factor(group: int) -> None:
    """Against the layer's matrices as they are stored, head by head and channel by channel."""
    loaded = models.model("qwen2")
    subject = models.deployed(loaded, start={"slack": 0, "key_group": group})
    _, made = in_basis(subject, STAR)
    for _, _, layer in made.values():
        module = _Coded(layer, torch.float32, "cpu")
        weights, plain = module.weights(), layer.weights(torch.float32)
        for field in fields(plain):
            before, after = getattr(plain, field.name), getattr(weights, field.name)
            assert not isinstance(before, torch.Tensor) or torch.equal(before, after)
        heads, dim, _ = weights.key_up.shape
        for head in range(heads):
            own = (layer.keys.owner == head // group).nonzero()[:, 0].tolist()
            lane = layer.keys.up[(head % group) * dim :][:dim]
            assert weights.key_index[head, : len(own)].tolist() == own
            assert torch.equal(weights.key_up[head, :, : len(own)], lane[:, own])
            assert not weights.key_up[head, :, len(own) :].any()
        (weights.down.sum() + weights.key_up.sum() + weights.value_up.sum()).backward()
        for name in ("keys_down", "keys_up", "values_down", "values_up"):
            assert bool((getattr(module, name).grad == 1).all())
        kept = module.deployed()
        assert torch.equal(kept.keys.up, layer.keys.up) and kept.values.codec is layer.values.codec
