"""The compressed model against plain transformers and against full recomputation."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import Cache, DynamicCache

from starkv_core.attention import padded_index
from starkv_core.budget import predict_bytes
from starkv_core.cache import DenseLayer, LatentCache, LatentLayer, WindowLayer
from starkv_core.run import Subject
from tests import models
from tests.tolerances import BF16_LATENTS, FP32_LOGITS, FULL_RANK_LOGITS
from triton_ops.latent_attention import row_width

FAMILIES = list(models.CONFIGS)
ROPES = {**models.SCALED_ROPES, "theta": {"rope_type": "default", "rope_theta": 77.0}}


def logits(subject: Subject, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad(), subject.active() as model:
        return model(ids, attention_mask=mask, use_cache=False).logits


def cached(
    subject: Subject, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, LatentCache]:
    """Logits when the tokens are fed in pieces ending at ``cuts``."""
    cache, found, start = subject.new_cache(), [], 0
    with torch.no_grad(), subject.active() as model:
        for stop in cuts:
            seen = None if mask is None else mask[:, :stop]
            out = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache)
            found.append(out.logits)
            start = stop
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["star", "paper"])
def test_full_rank_reproduces_the_base_model(family: str, method: str) -> None:
    loaded = models.model(family)
    subject = models.deployed(loaded, models.full_ranks(loaded), method=method)
    ids = models.ids(2, 70)
    with torch.no_grad():
        wanted = loaded.model(ids).logits
    torch.testing.assert_close(logits(subject, ids), wanted, rtol=0, atol=FULL_RANK_LOGITS)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_comes_from_the_model(rope: str) -> None:
    """Trap 7: theta and scaling of the model itself, yarn's attention factor included."""
    loaded = models.model("llama", rope_parameters=ROPES[rope])
    subject = models.deployed(loaded, models.full_ranks(loaded))
    ids = models.ids(1, 90)
    with torch.no_grad():
        wanted = loaded.model(ids).logits
    torch.testing.assert_close(logits(subject, ids), wanted, rtol=0, atol=FULL_RANK_LOGITS)
    decoded, _ = cached(subject, ids, [30, *range(31, 91)])
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=FULL_RANK_LOGITS)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_causal_without_a_mask(family: str) -> None:
    """Trap 1: with no mask given, a later token changes nothing before it."""
    loaded = models.model(family)
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    ids = models.ids(1, 40)
    changed = ids.clone()
    changed[:, 25:] = models.ids(1, 15, seed=9)
    before, after = logits(subject, ids), logits(subject, changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "cuts", [list(range(1, 61)), [30, *range(31, 61)], [20, 45, 60], [1, 17, 18, 34, 60]]
)
def test_cached_equals_recomputation_at_every_position(family: str, cuts: list[int]) -> None:
    """Trap 2 and more: decode, second turns and chunked prefill, at ragged ranks."""
    loaded = models.model(family)
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    ids = models.ids(2, 60)
    decoded, _ = cached(subject, ids, cuts)
    torch.testing.assert_close(decoded, logits(subject, ids), rtol=0, atol=FP32_LOGITS)


def test_contexts_past_the_first_block() -> None:
    loaded = models.model("qwen2")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    ids = models.ids(1, 300)
    decoded, cache = cached(subject, ids, [250, *range(251, 301)])
    torch.testing.assert_close(decoded, logits(subject, ids), rtol=0, atol=FP32_LOGITS)
    assert cache.nbytes == predict_bytes(loaded.spec, subject.ranks, 300, itemsize=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_ranks_survive_export(family: str) -> None:
    """Trap 3: ranks differ per head; a row holds their sum, padded, not heads times one."""
    loaded = models.model(family)
    ranks = models.ragged_ranks(loaded)
    subject = models.deployed(loaded, ranks)
    _, cache = cached(subject, models.ids(1, 8), [8])
    for layer in cache.layers:
        assert layer.keys.shape[-1] == row_width(sum(ranks.keys))
        assert layer.values.shape[-1] == row_width(sum(ranks.values))
    assert all(layer == ranks for layer in subject.ranks.layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["star", "paper"])
def test_exported_equals_trained(family: str, method: str) -> None:
    """Traps 4 and 5: with gates half open, as training leaves them."""
    loaded = models.model(family)
    made = models.recipe(method=method, steps=3, start={"slack": 0})
    live = models.student(loaded, made)
    slope = live.settings.slope
    for layer in live.by_layer().values():
        layer.set_ranks(models.ragged_ranks(loaded), live.settings)
        with torch.no_grad():
            for factors in (layer.keys, layer.values):
                for block, levels in enumerate(factors.levels(live.settings)):
                    last = levels[levels > 0].min()
                    factors.alpha[block] += last - 0.5 / slope  # the last gate opens to tanh(0.5)
                for part in (factors.up, factors.down):
                    part.add_(0.05 * part.std() * torch.randn_like(part))
    first = next(iter(live.by_layer().values())).keys
    opened = (first.gates(live.settings) / first.sigma).detach()
    assert 0 < float(opened[opened > 0].min()) < 0.95
    folded = {i: layer.fold(live.settings) for i, layer in live.by_layer().items()}
    subject = models.deployed_subject(loaded, live.ranks(), folded, store_dtype=torch.float32)
    ids = models.ids(2, 50)
    with torch.no_grad(), live.active() as model:
        trained = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits(subject, ids), trained, rtol=0, atol=FP32_LOGITS)
    decoded, _ = cached(subject, ids, [20, *range(21, 51)])
    torch.testing.assert_close(decoded, trained, rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("groups", [{"key_group": 2}, {"value_group": 1}, {"value_group": 2}])
def test_grouped_decomposition(groups: dict[str, int]) -> None:
    loaded = models.model("llama")
    subject = models.deployed(loaded, start={"slack": 0, **groups}, budget={"ratio": 1.0001})
    ids = models.ids(2, 40)
    decoded, _ = cached(subject, ids, [20, *range(21, 41)])
    torch.testing.assert_close(decoded, logits(subject, ids), rtol=0, atol=FP32_LOGITS)
    with torch.no_grad():
        wanted = loaded.model(ids).logits
    # One row step of 8 numbers is missing at this ratio, no more.
    assert float((logits(subject, ids) - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_neighbours(family: str) -> None:
    """Trap 13: left padding of any length, prefill and decode."""
    loaded = models.model(family)
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    lengths, total, extra = [33, 20, 7], 33, 12
    ids = models.ids(3, total + extra)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : total - length] = 0
    cuts = [total, *range(total + 1, total + extra + 1)]
    together, _ = cached(subject, ids, cuts, mask)
    for row, length in enumerate(lengths):
        own = ids[row : row + 1, total - length :]
        alone, _ = cached(subject, own, [length, *range(length + 1, length + extra + 1)])
        torch.testing.assert_close(
            together[row, total - length :], alone[0], rtol=0, atol=FP32_LOGITS
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_greedy(family: str) -> None:
    """Plain generate on the latent cache equals greedy choice by full recomputation."""
    loaded = models.model(family)
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    ids = models.ids(1, 12)
    with torch.no_grad(), subject.active() as model:
        found = model.generate(
            ids, past_key_values=subject.new_cache(), max_new_tokens=15, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        wanted = ids
        for _ in range(15):
            best = model(wanted, use_cache=False).logits[:, -1].argmax(-1)
            wanted = torch.cat([wanted, best[:, None]], 1)
    assert torch.equal(found, wanted)


def test_generate_makes_its_own_latent_cache() -> None:
    loaded = models.model("llama")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    with torch.no_grad(), subject.active() as model:
        out = model.generate(
            models.ids(2, 9), max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
    assert all(isinstance(layer, LatentLayer) for layer in out.past_key_values.layers)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 5}])
def test_generate_beams_and_samples(options: dict[str, object]) -> None:
    """Trap 14: beams reorder latents. At full rank the answers are those of the base model."""
    loaded = models.model("qwen2")
    subject = models.deployed(loaded, models.full_ranks(loaded))
    ids = models.ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    kwargs = {"max_new_tokens": 12, "eos_token_id": None, "attention_mask": mask, **options}
    torch.manual_seed(5)
    wanted = loaded.model.generate(ids, **kwargs)
    torch.manual_seed(5)
    with subject.active() as model:
        found = model.generate(ids, past_key_values=subject.new_cache(), **kwargs)
    assert torch.equal(found, wanted)


def test_reorder_select_repeat_and_crop() -> None:
    """Trap 14: after any of them, decode equals recomputation of the rows it now holds."""
    loaded = models.model("llama")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    ids = models.ids(3, 30)
    tail = models.ids(3, 6, seed=4)
    _, cache = cached(subject, ids, [30])
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    cache.crop(-5)
    rows = ids[[2, 0]][:, :25].repeat_interleave(2, 0)
    new = tail[[0, 1, 2, 0]]
    with torch.no_grad(), subject.active() as model:
        found = [
            model(new[:, i : i + 1], past_key_values=cache).logits for i in range(new.shape[1])
        ]
    wanted = logits(subject, torch.cat([rows, new], 1))[:, 25:]
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("tokens_to_remove", [-31, -30, -5, 0, 5, 30, 31])
def test_crop_is_that_of_the_installed_transformers(tokens_to_remove: int) -> None:
    """A positive number is refused by some versions and the length to keep in others."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    loaded = models.model("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=64)
    subject = models.deployed(loaded, start={"slack": 0, "skip_layers": [0]}, budget={"ratio": 1.2})
    kinds_held = [type(layer) for layer in subject.new_cache().layers]
    assert kinds_held == [DenseLayer, WindowLayer, LatentLayer]

    def cropped(cache: Cache) -> list[int] | None:
        with subject.active() if isinstance(cache, LatentCache) else nullcontext():
            loaded.model(models.ids(1, 30), past_key_values=cache)
        try:
            cache.crop(tokens_to_remove)
        except ValueError:
            return None
        return [layer.get_seq_length() for layer in cache.layers]

    with torch.no_grad():
        assert cropped(subject.new_cache()) == cropped(DynamicCache())


def test_append_is_in_place() -> None:
    """Trap 11: a decode step writes one slot; it does not copy the cache."""
    loaded = models.model("llama")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    _, cache = cached(subject, models.ids(1, 20), [20])
    before = [layer.keys.data_ptr() for layer in cache.layers]
    with torch.no_grad(), subject.active() as model:
        for i in range(30):
            model(models.ids(1, 1, seed=i), past_key_values=cache)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before


def test_bfloat16_latents_under_float32_compute() -> None:
    loaded = models.model("llama")
    exact = models.deployed(loaded, models.ragged_ranks(loaded))
    stored = models.deployed(loaded, models.ragged_ranks(loaded), dtype=torch.bfloat16)
    ids = models.ids(2, 40)
    decoded, cache = cached(stored, ids, [20, *range(21, 41)])
    wanted = logits(exact, ids)
    assert float((decoded - wanted).norm() / wanted.norm()) < BF16_LATENTS
    assert cache.nbytes == predict_bytes(loaded.spec, stored.ranks, 40, batch=2)


def test_surgery_is_undone_even_after_an_error() -> None:
    loaded = models.model("qwen2")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    ids = models.ids(1, 20)
    with torch.no_grad():
        before = loaded.model(ids).logits
    with pytest.raises(ZeroDivisionError), subject.active():
        raise ZeroDivisionError
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, before)
    assert all("forward" not in vars(a) for a in loaded.family.attentions(loaded.model))


def test_surgery_does_not_nest() -> None:
    loaded = models.model("llama")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    with (
        subject.active(),
        pytest.raises(RuntimeError, match="compressed already"),
        subject.active(),
    ):
        pass


def test_a_dense_cache_with_content_is_refused() -> None:
    loaded = models.model("llama")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    cache = DynamicCache()
    with torch.no_grad():
        loaded.model(models.ids(1, 5), past_key_values=cache)
        with pytest.raises(RuntimeError, match="dense keys"), subject.active() as model:
            model(models.ids(1, 1), past_key_values=cache)


def test_latents_are_refused_to_the_dense_model() -> None:
    loaded = models.model("llama")
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    with torch.no_grad(), pytest.raises(RuntimeError, match="holds latents"):
        loaded.model(models.ids(1, 5), past_key_values=subject.new_cache())


@pytest.mark.parametrize("length", [2, 40], ids=["decode", "prefill"])
def test_additive_masks_are_refused(length: int) -> None:
    """Their finite values were taken for "do not attend"."""
    loaded = models.model()
    subject = models.deployed(loaded)
    mask = torch.full((1, 1, length, length), -1.0)
    with subject.active() as model, pytest.raises(TypeError, match="take bool masks"):
        model(models.ids(1, length), attention_mask=mask, past_key_values=subject.new_cache())


def test_inference_mode_first_and_training_after() -> None:
    """Tables and indices are kept; made under inference mode they could not be trained with."""
    loaded = models.model()
    subject = models.deployed(loaded, dtype=torch.float32)
    padded_index.cache_clear()
    with torch.inference_mode(), subject.active() as model:
        model(models.ids(1, 40))
    live = models.student(loaded, models.recipe())
    with torch.inference_mode(), live.active() as model:
        model(models.ids(1, 40), use_cache=False)
    with live.active() as model:
        model(models.ids(1, 40), use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for n, p in live.named_parameters() if "alpha" not in n)


def test_sliding_window_layers_stay_dense_and_are_counted() -> None:
    """A window shorter than the text: those layers keep the last tokens, the others latents."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    loaded = models.model("qwen2", use_sliding_window=True, sliding_window=16, layer_types=kinds)
    assert loaded.spec.windows == {0: 16}
    live = models.student(loaded, models.recipe(start={"slack": 0}, budget={"ratio": 1.2}))
    for layer in live.by_layer().values():
        layer.set_ranks(models.full_ranks(loaded), live.settings)
    folded = {i: layer.fold(live.settings) for i, layer in live.by_layer().items()}
    subject = models.deployed_subject(loaded, live.ranks(), folded, store_dtype=torch.float32)
    ids = models.ids(1, 50)
    with torch.no_grad():
        wanted = loaded.model(ids).logits
    decoded, cache = cached(subject, ids, [30, *range(31, 51)])
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=FULL_RANK_LOGITS)
    assert cache.nbytes == predict_bytes(loaded.spec, subject.ranks, 50, itemsize=4)
