"""Compressed models on a packed cache: one layer exactly, whole models against recomputation."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from starkv_core.attention import CompressedAttention, LatentWeights, latents
from starkv_core.budget import predict_bytes
from starkv_core.cache import LatentCache
from starkv_core.engine import Sampler, stream
from starkv_core.models.load import LoadedModel
from starkv_core.packed import PackedLayer
from starkv_core.run import Subject
from tests import models
from tests.coded_case import coded_weights
from tests.tolerances import EIGHT_BIT_LATENTS, FP32_LOGITS, MOVED_CODES

CUTS = {
    "tokens": list(range(1, 61)),
    "prompt": [30, *range(31, 61)],
    "turns": [20, 45, 46, 60],
    "pieces": [5, 22, 23, 40, 52, 60],
}
WINDOWS = [(0, 0), (3, 0), (0, 7), (4, 20)]


@cache
def deployed(family: str) -> tuple[LoadedModel, Subject]:
    loaded = models.model(family)
    return loaded, models.deployed(loaded, models.ragged_ranks(loaded))


class OneLayer:
    """Attention of the first layer on inputs whose latents are free of rounding.

    Inputs and down factors lie on coarse grids, so that latents, and with them the codes, are the
    same bit for bit however many tokens go through at once.
    """

    def __init__(self, family: str, **options: Any) -> None:
        self.loaded, subject = deployed(family)
        plain = subject.weights[0]
        coarse = {n: (getattr(plain, n) * 16).round() / 16 for n in ("key_down", "value_down")}
        plain = replace(plain, **coarse)
        self.weights = coded_weights(plain, *latents(plain, self.hidden(4, 200, 1)), **options)
        assert self.weights.codes is not None
        self.codes = self.weights.codes
        self.module = self.loaded.family.attentions(self.loaded.model)[0]

    def hidden(self, batch: int, length: int, seed: int) -> torch.Tensor:
        """Random inputs ``[B, L, d]``."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, length, self.loaded.spec.hidden)
        return torch.randint(-4, 5, shape, generator=generator) / 8.0

    @torch.no_grad()
    def cached(
        self, hidden: torch.Tensor, cuts: list[int], first: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the layer gives when fed in pieces; rows are padded up to slot ``first``."""
        spec = self.loaded.spec
        attend = CompressedAttention(
            self.module, self.loaded.family, spec, spec.rope.growing(), 0, torch.bfloat16
        )
        cache = LatentCache(spec, None, torch.bfloat16, {0: self.codes})
        found, start = [], 0
        for stop in cuts:
            mask = None
            if first is not None:
                slot = torch.arange(stop)
                mask = slot <= torch.arange(start, stop)[:, None]
                mask = mask & (slot >= first[:, None, None, None])
            found.append(attend(self.weights, hidden[:, start:stop], mask, cache))
            start = stop
        assert isinstance(cache.layers[0], PackedLayer)
        return torch.cat(found, 1)

    def exact(self, cuts: list[int]) -> torch.Tensor:
        """Bool ``[L, L]``: whether a token sees the exact latents of a slot, by the definitions."""
        window, found, start = self.codes.window, [], 0
        slot = torch.arange(cuts[-1])
        for stop in cuts:
            for token in range(start, stop):
                if start > 0 and stop - start <= 16:
                    oldest = stop - window
                elif self.codes.prefill == "exact":
                    oldest = min(start, start - window)
                else:
                    oldest = token + 1 - window
                found.append((slot < self.codes.sinks) | (slot >= oldest))
            start = stop
        return torch.stack(found)

    @torch.no_grad()
    def recomputed(
        self, hidden: torch.Tensor, exact: torch.Tensor, first: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer in float64 on all tokens at once, latents exact or fake-quantised by slot."""
        spec, w, length = self.loaded.spec, self.weights, hidden.shape[1]
        stored = [t.bfloat16() for t in latents(w, hidden)]
        angle = torch.outer(torch.arange(length).double(), spec.rope.inv_freq.double())

        def turned(x: torch.Tensor) -> torch.Tensor:
            half = x.shape[-1] // 2
            return torch.complex(x[..., :half], x[..., half:]) * torch.polar(
                torch.ones_like(angle), angle
            )

        q = self.loaded.family.queries(self.module, hidden, spec.head_dim).double()
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if first is not None:
            seen = seen & (torch.arange(length) >= first[:, None, None, None])
        scores, expanded = [], []
        for keys, values in (stored, [self.codes.keys.seen(stored[0]), None]):
            if values is None:
                values = self.codes.values.seen(stored[1])
            per_head = [
                keys.double()[..., w.key_index[h]] @ w.key_up[h].double().T
                + (0 if w.key_bias is None else w.key_bias[h].double())
                for h in range(spec.n_kv_heads)
            ]
            k = torch.stack(per_head, 1).repeat_interleave(spec.group, 1)
            v = torch.einsum("blr,hdr->bhld", values.double(), w.value_up.double())
            expanded.append(v.repeat_interleave(spec.group, 1))
            scores.append((turned(q) @ turned(k).mH).real * self.module.scaling)
        p = torch.where(exact, *scores).masked_fill(~seen, float("-inf")).softmax(-1)
        p = p.nan_to_num(0.0)
        out = (p * exact) @ expanded[0] + (p * ~exact) @ expanded[1]
        if w.value_bias is not None:
            out = out + w.value_bias.repeat_interleave(spec.group, 0)[:, None].double()
        return self.module.o_proj(out.transpose(1, 2).flatten(2).float())


@pytest.mark.parametrize(
    ("family", "sinks", "window"),
    [*(("qwen2", *window) for window in WINDOWS), ("llama", 4, 20), ("mistral", 0, 7)],
)
@pytest.mark.parametrize("prefill", ["exact", "coded"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_layer_sees_what_is_held(
    family: str, sinks: int, window: int, prefill: str, cuts: list[int]
) -> None:
    """At every position: codes beyond the window, exact latents within and of the sinks."""
    layer = OneLayer(family, sinks=sinks, window=window, prefill=prefill)
    hidden = layer.hidden(2, 60, 2)
    exact = layer.exact(cuts)
    wanted = layer.recomputed(hidden, exact)
    torch.testing.assert_close(layer.cached(hidden, cuts), wanted, rtol=0, atol=FP32_LOGITS)
    shifted = exact.roll(1, dims=1)  # a window off by one would show
    other = layer.recomputed(hidden, shifted)
    assert shifted.equal(exact) or float((other - wanted).abs().max()) > 5 * FP32_LOGITS


@pytest.mark.parametrize("groups", ["static", "section"])
@pytest.mark.parametrize(("measure", "zero"), [("rms", "rise"), ("absmax", "tread")])
def test_a_layer_with_other_scales(groups: str, measure: str, zero: str) -> None:
    layer = OneLayer("qwen2", groups=groups, measure=measure, zero=zero, window=6, sinks=2)
    hidden, cuts = layer.hidden(2, 60, 2), CUTS["turns"]
    wanted = layer.recomputed(hidden, layer.exact(cuts))
    torch.testing.assert_close(layer.cached(hidden, cuts), wanted, rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("prefill", ["exact", "coded"])
@pytest.mark.parametrize("sinks", [0, 4])
def test_left_padding_of_a_layer(family: str, prefill: str, sinks: int) -> None:
    layer = OneLayer(family, sinks=sinks, window=7, prefill=prefill)
    hidden, cuts, first = layer.hidden(3, 60, 2), CUTS["prompt"], torch.tensor([0, 11, 29])
    found = layer.cached(hidden, cuts, first)
    wanted = layer.recomputed(hidden, layer.exact(cuts), first)
    for row, start in enumerate(first.tolist()):
        torch.testing.assert_close(
            found[row, start:], wanted[row, start:], rtol=0, atol=FP32_LOGITS
        )
        if sinks == 0:
            # Trap 13: the row alone, where its first slot is 0.
            own = [cut - start for cut in cuts]
            alone = layer.cached(hidden[row : row + 1, start:], own)
            torch.testing.assert_close(found[row, start:], alone[0], rtol=0, atol=FP32_LOGITS)


def fed(
    subject: Subject, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, LatentCache]:
    cache, found, start = subject.new_cache(), [], 0
    with torch.no_grad(), subject.active() as model:
        for stop in cuts:
            seen = None if mask is None else mask[:, :stop]
            out = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache)
            found.append(out.logits)
            start = stop
    return torch.cat(found, 1), cache


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", list(models.CONFIGS))
def test_eight_bits_are_close_to_none(family: str) -> None:
    _, plain = deployed(family)
    ids, cuts = models.ids(2, 60), CUTS["prompt"]
    wanted, _ = fed(plain, ids, [60])
    fine, coarse = (
        apart(
            fed(models.coded(plain, bits=bits, measure="absmax", zero="tread"), ids, cuts)[0],
            wanted,
        )
        for bits in ((8, 8), (2, 2))
    )
    assert 0 < fine < EIGHT_BIT_LATENTS < 5 * EIGHT_BIT_LATENTS < coarse


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("bits", [(4, 4), (3, 2)])
def test_kernels_decode_as_the_reference_does(family: str, bits: tuple[int, int]) -> None:
    """Left-padded rows, a token and then three at once, kernels interpreted."""
    subject = models.coded(deployed(family)[1], bits=bits, sinks=2, window=7)
    ids, mask = models.ids(2, 44), torch.ones(2, 44, dtype=torch.long)
    mask[1, :9] = 0
    found, wanted = (
        fed(replace(subject, backend=backend), ids, [40, 41, 44], mask)[0][:, 40:]
        for backend in ("triton", "reference")
    )
    # Products in float16 move a code of a later layer now and then.
    assert apart(found, wanted) < 2 * MOVED_CODES


@pytest.mark.parametrize("family", list(models.CONFIGS))
def test_a_window_as_long_as_the_text_is_exact(family: str) -> None:
    _, plain = deployed(family)
    ids, cuts = models.ids(2, 60), CUTS["turns"]
    found, _ = fed(models.coded(plain, window=60), ids, cuts)
    torch.testing.assert_close(found, fed(plain, ids, [60])[0], rtol=0, atol=FP32_LOGITS)


def without_cache(subject: Subject) -> Subject:
    """All that is attended to goes through the quantisers, with no cache to hold it."""

    def coding(w: LatentWeights) -> LatentWeights:
        assert w.codes is not None
        keys, values = w.codes.keys, w.codes.values
        return replace(w, codes=None, coding=lambda k, v: (keys.seen(k), values.seen(v)))

    return replace(subject, weights={i: coding(w) for i, w in subject.weights.items()})


@pytest.mark.parametrize("family", list(models.CONFIGS))
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_model_equals_recomputation(family: str, cuts: list[int]) -> None:
    """Nothing exact is left, so full recomputation with fake-quantised latents must agree."""
    _, plain = deployed(family)
    subject = models.coded(plain, prefill="coded")
    ids = models.ids(2, 60)
    with torch.no_grad(), without_cache(subject).active() as model:
        wanted = model(ids, use_cache=False).logits
    found, cache = fed(subject, ids, cuts)
    assert apart(found, wanted) < MOVED_CODES < apart(fed(plain, ids, [60])[0], wanted) / 5
    assert cache.latent_tokens() == [60] * 3


@pytest.mark.parametrize("family", list(models.CONFIGS))
@pytest.mark.parametrize("prefill", ["exact", "coded"])
def test_a_row_does_not_depend_on_its_neighbours(family: str, prefill: str) -> None:
    """Trap 13: left padding of any length, prefill and decode."""
    _, plain = deployed(family)
    subject = models.coded(plain, window=5, prefill=prefill)
    lengths, total, extra = [33, 25, 18], 33, 12
    ids = models.ids(3, total + extra)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : total - length] = 0
    cuts = [total, *range(total + 1, total + extra + 1)]
    together, _ = fed(subject, ids, cuts, mask)
    for row, length in enumerate(lengths):
        start = total - length
        alone, _ = fed(subject, ids[row : row + 1, start:], [cut - start for cut in cuts])
        assert apart(together[row, start:], alone[0]) < MOVED_CODES


@pytest.mark.parametrize("family", list(models.CONFIGS))
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generate_equals_generate_without_a_cache(family: str, options: dict[str, Any]) -> None:
    """Trap 14: beams move codes and scales."""
    _, plain = deployed(family)
    subject = models.coded(plain, prefill="coded")
    ids = models.ids(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    common = {"max_new_tokens": 12, "eos_token_id": None, "attention_mask": mask, **options}
    with subject.active() as model:
        found = model.generate(ids, past_key_values=subject.new_cache(), do_sample=False, **common)
    with without_cache(subject).active() as model:
        wanted = model.generate(ids, use_cache=False, do_sample=False, **common)
    assert torch.equal(found, wanted)


def test_generate_makes_its_own_packed_cache() -> None:
    _, plain = deployed("llama")
    subject = models.coded(plain, window=5, sinks=2)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with subject.active() as model:
        out = model.generate(models.ids(2, 20), return_dict_in_generate=True, **options)
        same = model.generate(models.ids(2, 20), past_key_values=subject.new_cache(), **options)
    assert isinstance(out.past_key_values, DynamicCache)
    assert [type(layer) for layer in out.past_key_values.layers] == [PackedLayer] * 3
    assert torch.equal(out.sequences, same)


def test_turns_of_the_engine() -> None:
    """A second turn feeds only its own tokens, as if the first had been decoded before it."""
    loaded, plain = deployed("qwen2")
    subject = models.coded(plain, window=5, sinks=2)
    ids, sampler = models.ids(2, 50), Sampler()
    cache = subject.new_cache()
    answer = torch.stack(list(stream(subject, ids[:, :20], None, 6, sampler=sampler, cache=cache)))
    assert cache.latent_tokens() == [25] * 3
    turn = torch.cat((answer[-1:].T, ids[:, 20:]), 1)
    second = torch.stack(list(stream(subject, turn, None, 6, sampler=sampler, cache=cache)))
    held = cache.get_seq_length()
    assert cache.nbytes == predict_bytes(
        loaded.spec, subject.ranks, held, 2, itemsize=4, codes={i: w.codes for i, w in
        subject.weights.items()}
    )  # fmt: skip
    everything = torch.cat((ids[:, :20], answer.T, ids[:, 20:], second.T), 1)
    cuts = [20, *range(21, 26), 56, *range(57, 62)]
    logits, _ = fed(subject, everything[:, :-1], cuts)
    assert torch.equal(logits[:, [19, *range(20, 25)]].argmax(-1), answer.T)
    assert torch.equal(logits[:, 55:].argmax(-1), second.T)


def test_latents_of_another_form_are_refused() -> None:
    """A layer that holds 16-bit latents in the order of heads is not read as coded, or back."""
    _, plain = deployed("llama")
    subject = models.coded(plain)
    for holder, reader in ((plain, subject), (subject, plain)):
        _, cache = fed(holder, models.ids(1, 20), [20])
        refused = pytest.raises(RuntimeError, match="another form")
        with torch.no_grad(), reader.active() as model, refused:
            model(models.ids(1, 1), past_key_values=cache)
