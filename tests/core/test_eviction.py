"""H2O and StreamingLLM against their definitions, alone and on top of latents; and their bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from starkv_core.baselines import check_caches, parse_cache, with_cache
from starkv_core.errors import UserError
from starkv_core.eval.deployed import measure
from starkv_core.eval.likelihood import Request, score
from starkv_core.eval.perplexity import Windows, perplexity
from starkv_core.eviction.cache import EvictingCache, EvictingLayer
from starkv_core.run import Subject, dense_subject
from tests import evicted, models
from tests.tolerances import FP32_LOGITS

FAMILIES = list(models.CONFIGS)
NAMES = {
    "h2o-0.3": evicted.h2o(0.3),
    "h2o-7": evicted.h2o(7),
    "streaming-0.3": evicted.streaming(0.3),
    "streaming-8": evicted.streaming(8),
}


@cache
def subject_of(family: str, latent: bool) -> Subject:
    """A small model in float32, stored in float32; with latents of ragged ranks in all layers."""
    loaded = models.model(family)
    if latent:
        return models.deployed(loaded, models.ragged_ranks(loaded), method="uniform")
    return replace(dense_subject(loaded), store_dtype=torch.float32)


def fed(
    subject: Subject, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, EvictingCache]:
    """Logits when the tokens are fed in pieces ending at ``cuts``, and the cache."""
    held, found, start = subject.new_cache(), [], 0
    with torch.no_grad(), subject.active() as model:
        for stop in cuts:
            seen = None if mask is None else mask[:, :stop]
            place = torch.arange(start, stop)[None].expand(len(ids), -1)
            if seen is not None:
                place = (seen.cumsum(-1) - 1).clamp(min=0)[:, start:]
            out = model(
                ids[:, start:stop], attention_mask=seen, position_ids=place, past_key_values=held
            )
            found.append(out.logits)
            start = stop
    return torch.cat(found, 1), held  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("family", "latent"),
    [
        *((family, False) for family in FAMILIES),
        ("llama", True),
        ("mistral", True),
        ("qwen2", True),
    ],
)
def test_tokens_and_logits_are_those_of_the_definition(
    family: str, latent: bool, name: str
) -> None:
    """Multi-head, multi-query and grouped heads, biases, a norm on keys."""
    bare = subject_of(family, latent)
    ids, prompt, length = models.ids(1, 20), 9, 20
    streams = name.startswith("streaming")
    wanted = evicted.reference(bare, ids, prompt, NAMES[name], renumbered=streams)
    subject = with_cache(bare, name)
    logits, cache = fed(subject, ids, [prompt, *range(prompt + 1, length + 1)])
    torch.testing.assert_close(logits.double(), wanted.logits, rtol=0, atol=FP32_LOGITS)
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, EvictingLayer)
        kept = torch.tensor(wanted.kept[i])
        if latent and not streams:
            assert layer.positions[0].tolist() == kept.tolist()
        keys, _ = layer.rows()
        assert keys.shape[:3] == (1, *kept.shape)
        if not latent and not streams:
            for h, tokens in enumerate(kept):
                turned = wanted.keys[i][h, tokens].float()
                torch.testing.assert_close(keys[0, h], turned, rtol=0, atol=FP32_LOGITS)
        if not streams:
            for h, tokens in enumerate(kept.tolist()):
                scores = torch.tensor([wanted.scores[i][h][token] for token in tokens])
                torch.testing.assert_close(layer.scores[0, h], scores, rtol=0, atol=FP32_LOGITS)
    sets = [tokens for held in wanted.kept.values() for tokens in held]
    assert any(tokens != list(range(length - len(tokens), length)) for tokens in sets)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("method", ["h2o", "streaming"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_is_the_model_itself(family: str, method: str, latent: bool) -> None:
    bare, ids = subject_of(family, latent), models.ids(2, 24)
    with torch.no_grad(), bare.active() as model:
        wanted = model(ids).logits
    for cuts in ([24], [*range(1, 7), 10, 11, 24]):
        logits, cache = fed(with_cache(bare, f"{method}-1"), ids, cuts)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=FP32_LOGITS)
        assert all(layer.keys.shape[2] == 24 for layer in cache.layers)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("name", ["h2o-0.4", "streaming-9"])
def test_a_padded_batch_reads_as_its_rows_alone(name: str, latent: bool) -> None:
    """Also where padding fills a whole piece of a prompt, and with tokens fed several at once."""
    subject = with_cache(subject_of("qwen2", latent), name)
    lengths, length = [30, 24, 7], 30
    ids, mask = models.ids(3, length), torch.ones(3, length, dtype=torch.long)
    for row, own in enumerate(lengths):
        mask[row, : length - own] = 0
    cuts = [10, 18, *range(19, 27), 30]
    together, cache = fed(subject, ids, cuts, mask)
    for row, own in enumerate(lengths):
        pad = length - own
        alone, single = fed(subject, ids[row : row + 1, pad:], [c - pad for c in cuts if c > pad])
        torch.testing.assert_close(together[row, pad:], alone[0], rtol=0, atol=FP32_LOGITS)
        for layer, other in zip(cache.layers, single.layers, strict=True):
            held = int(layer.held[row])
            assert held == other.keys.shape[2] == subject.policy.budget(own) or held == own
            for mine, its in ((layer.values, other.values), (layer.scores, other.scores)):
                last = mine[row, :, mine.shape[2] - held :] if mine.shape[2] else mine[row]
                torch.testing.assert_close(last, its[0], rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("name", ["h2o-0.25", "h2o-16", "streaming-0.25", "streaming-16"])
def test_memory_is_given_back_and_counted(name: str, latent: bool) -> None:
    bare = subject_of("qwen2", latent)
    subject = with_cache(bare, name)
    ids = models.ids(2, 100)
    wants = {"scored": name.startswith("h2o"), "renumbered": name.startswith("streaming")}
    for tokens in (10, 64, 100):
        _, cache = fed(subject, ids[:, :tokens], [8, tokens])
        held = min(tokens, max(tokens // 4, subject.policy.least) if "." in name else 16)
        measured = measure(subject, cache, 2)
        assert measured.held == evicted.predicted_bytes(bare, held, batch=2, **wants)
        assert measured.tokens == tokens
        # 16 bits, layers, keys and values
        assert measured.dense == 2 * 2 * tokens * 2 * bare.spec.kv_width * bare.spec.n_layers
        assert all(
            layer.keys.untyped_storage().nbytes() == layer.keys.nbytes for layer in cache.layers
        )


@pytest.mark.parametrize("name", ["h2o-6", "streaming-6"])
@pytest.mark.parametrize("latent", [False, True])
def test_rows_move_together(name: str, latent: bool) -> None:
    subject = with_cache(subject_of("llama", latent), name)
    ids, mask = models.ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, :13] = 0
    wanted, _ = fed(subject, ids, [15, 16], mask)
    _, cache = fed(subject, ids[:, :15], [15], mask[:, :15])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    rows = [1, 0]
    with torch.no_grad(), subject.active() as model:
        moved = model(ids[rows, 15:], attention_mask=mask[rows], past_key_values=cache).logits
    torch.testing.assert_close(moved[:, 0], wanted[rows, 15], rtol=0, atol=FP32_LOGITS)
    with pytest.raises(RuntimeError, match="do not come back"):
        cache.crop(-1)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)


def test_generation_goes_through_the_cache() -> None:
    """Greedy tokens of ``generate`` are those of steps; other caches are refused."""
    subject = with_cache(subject_of("qwen2", True), "h2o-8")
    ids, cache = models.ids(2, 12), subject.new_cache()
    with torch.no_grad(), subject.active() as model:
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        with pytest.raises(RuntimeError, match="new_cache"):
            model(ids)
    logits, _ = fed(subject, out[:, :-1], [12, *range(13, out.shape[1])])
    assert torch.equal(logits[:, 11:].argmax(-1), out[:, 12:])
    with torch.no_grad(), pytest.raises(RuntimeError, match="active"):
        subject.model(ids, past_key_values=subject.new_cache())


def test_windows_stay_as_they_are() -> None:
    """Layers under a sliding window drop nothing else; a model of nothing else is refused."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    window = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    loaded = models.model("qwen2", **window)
    dense = replace(dense_subject(loaded), store_dtype=torch.float32)
    ids = models.ids(1, 26)
    with torch.no_grad():
        wanted = loaded.model(ids).logits
    logits, cache = fed(with_cache(dense, "h2o-1"), ids, [20, *range(21, 27)])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=FP32_LOGITS)
    assert [isinstance(layer, EvictingLayer) for layer in cache.layers] == [True, False, True]
    everywhere = models.model("mistral", sliding_window=8)
    with pytest.raises(UserError, match="sliding window"):
        with_cache(dense_subject(everywhere), "h2o-0.5")


@pytest.mark.parametrize("name", ["h2o-0.5", "streaming-0.5", "rtn-8"])
def test_one_pass_says_nothing_of_such_a_cache(name: str) -> None:
    dense = dense_subject(models.model("llama"))
    subject = with_cache(dense, name)
    windows = Windows(models.ids(2, 16), 1.0)
    with pytest.raises(UserError, match="token by token"):
        perplexity(subject, windows)
    with pytest.raises(UserError, match="token by token"):
        score(subject, [Request([3, 4], [5])], "prefill")
    found = perplexity(subject, windows, mode="token", batch=2)
    assert found.nll != perplexity(dense, windows, mode="token", batch=2).nll
    assert found.cache.tokens == 15


def test_continuations_of_uneven_contexts_score_as_alone() -> None:
    subject = with_cache(subject_of("qwen2", True), "h2o-0.4")
    rows = [(20, 4), (3, 2), (1, 5)]
    requests = [
        Request(models.ids(1, n, seed=n)[0].tolist(), models.ids(1, m, seed=m)[0].tolist())
        for n, m in rows
    ]
    together, _ = score(subject, requests, "decode")
    for request, found in zip(requests, together, strict=True):
        alone, _ = score(subject, [request], "decode")
        assert found.log_likelihood == pytest.approx(alone[0].log_likelihood, abs=FP32_LOGITS)


def test_names() -> None:
    assert parse_cache("h2o-0.2").budget(1000) == 200
    assert parse_cache("h2o-0.29").budget(100) == 29  # not 28, as floats have it
    assert parse_cache("h2o-256").budget(1000) == 256
    assert parse_cache("streaming-0.001").budget(1000) == 5
    for name in ("streaming-0.5", "h2o-1234567", "h2o-1"):
        assert parse_cache(name).name == name
    for name, said in {
        "h20-0.2": "nearest is h2o-0.2",
        "kivi4": "nearest is kivi-4",
        "h2o": "share",
        "h2o-0": "share",
        "h2o-1.5": "share",
        "h2o--1": "share",
        "h2o-1/0": "share",
        "h2o-x": "share",
        "streaming-4": "5 tokens at least",
    }.items():
        with pytest.raises(UserError, match=said):
            parse_cache(name)
    check_caches(("kivi-2", "h2o-0.5"), None)


def test_what_a_compressed_model_cannot_have() -> None:
    latent = subject_of("llama", True)
    with pytest.raises(UserError, match="starkv quantize"):
        with_cache(latent, "kivi-4")
    with pytest.raises(UserError, match="before starkv quantize"):
        with_cache(models.coded(latent), "h2o-0.5")
