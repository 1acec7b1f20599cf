"""starkv bench of packed caches: what is filled, planned, measured, and what the gates refuse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import starkv_core.attention as core
from starkv_core.bench import attention, decode, prefill
from starkv_core.bench.codes import coded_shape, parse_bits, step_bytes
from starkv_core.bench.models import coded_subject, dense_subject
from starkv_core.bench.packed import cache_parts, fill_random, read_exactly
from starkv_core.bench.plan import coded_work, largest_batch
from starkv_core.bench.records import CODED, KEYS
from starkv_core.bench.shapes import Shape, open_shape, scaled_down
from starkv_core.bench.suite import BenchOptions, run_bench
from starkv_core.budget import predict_bytes
from starkv_core.cache import LatentCache
from starkv_core.errors import UserError
from starkv_core.packed import PackedLayer
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.run import Subject
from tests.coded_case import codec
from triton_ops.coded_attention import Coded, coded_attention
from triton_ops.latent_codes import Codec, LayerCodes, unpack

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
NAMES = ("llama-2-7b", "llama-3.1-8b", "qwen3-0.6b")  # MHA, GQA, a norm on keys


def small(name: str, bits: float = 3.2) -> Shape:
    return scaled_down(open_shape(name)).in_bits(bits)


@pytest.fixture(scope="module")
def llama() -> Shape:
    return open_shape("llama-2-7b").in_bits(3.2)


# --- bits ----------------------------------------------------------------------------------------


def test_bits_are_2_to_4_or_8() -> None:
    assert [parse_bits(text) for text in ("2", "3.2", "4", "8", None)] == [2, 3.2, 4, 8, None]
    for wrong in ("1.9", "4.1", "5", "x", "nan", "", "-3", "inf"):
        with pytest.raises(UserError, match="--bits .*a number from 2 to 4"):
            parse_bits(wrong)


@pytest.mark.parametrize(
    ("bits", "of_ten", "of_seven"),
    [
        (3.2, {4: 2, 3: 8}, {4: 2, 3: 5}),
        (2.5, {3: 5, 2: 5}, {3: 4, 2: 3}),
        (2, {2: 10}, {2: 7}),
        (3, {3: 10}, {3: 7}),
        (4, {4: 10}, {4: 7}),
        (8, {8: 10}, {8: 7}),
    ],
)
def test_leading_channels_take_the_greater_width(
    bits: float, of_ten: dict[int, int], of_seven: dict[int, int]
) -> None:
    """Of every key head, rounded up as the paper's scheme has it; of all values together."""
    coded = coded_shape(RankMap((LayerRanks((10, 7), (17,)), None)), bits)
    codes, owner = coded.codes[0], coded.owners[0]
    assert list(coded.codes) == [0]
    widths = codes.keys.layout.bits()
    assert widths.tolist() == sorted(widths.tolist(), reverse=True)  # one section a width
    for head, counts in enumerate((of_ten, of_seven)):
        mine = widths[owner == head].tolist()
        assert {width: mine.count(width) for width in set(mine)} == counts
    leading = -(-17 * round(bits % 1 * 100) // 100)
    assert codes.values.layout.bits().tolist() == [int(bits) + 1] * leading + [int(bits)] * (
        17 - leading
    )
    assert (codes.sinks, codes.window, codes.keys.layout.scales) == (4, 32, 0)


def test_the_shape_of_the_aim_is_19_times_smaller_counted_whole(llama: Shape) -> None:
    """Measured from the tensors of a cache of 32K tokens, made but not filled."""
    coded, tokens = llama.codes, 32 << 10
    assert coded.bits == pytest.approx(3.2064, abs=1e-4)
    cache = LatentCache(llama.spec, coded.ranks, torch.float16, coded.codes)
    cache.reserve(1, tokens, torch.device("meta"))
    assert cache.nbytes == predict_bytes(llama.spec, coded.ranks, tokens, codes=coded.codes)
    dense = llama.spec.dense_bytes_per_token * tokens
    assert dense / cache.nbytes == pytest.approx(19.70, abs=0.005)
    with_room = decode.cache_bytes(llama, CODED, tokens, 1)
    assert dense / with_room == pytest.approx(19.40, abs=0.005)


# --- what is filled, and reading it bit by bit ---------------------------------------------------


def layer_of(zero: str, groups: str, sinks: int, window: int) -> PackedLayer:
    measure = "absmax" if zero == "tread" else "rms"
    keys = codec("key", [(4, 20), (3, 9), (8, 3)], groups, measure=measure, zero=zero)
    values = codec("value", [(3, 21), (2, 6)], groups, measure=measure, zero=zero)
    layer = PackedLayer(LayerCodes(keys, values, sinks, window), torch.float16)
    layer.reserve(3, 1100, (0, 0), CPU)
    return layer


CODES = pytest.mark.parametrize(
    ("zero", "groups", "sinks", "window"),
    [("rise", "static", 4, 32), ("rise", "row", 0, 7), ("tread", "section", 0, 0)],
)


@CODES
def test_bits_read_one_by_one_are_the_latents_of_the_cache(
    zero: str, groups: str, sinks: int, window: int
) -> None:
    layer = layer_of(zero, groups, sinks, window)
    for tokens in (1, 37, 1090):
        fill_random(layer, tokens, seed=1)
        assert (layer.length, layer.coded) == (tokens, max(tokens - window, 0))
        want = layer.latents(0, tokens)
        for row in range(3):
            parts = list(read_exactly(layer, row, 512))
            for side in (0, 1):
                got = torch.cat([part[side] for part in parts])
                torch.testing.assert_close(got.float(), want[side][row], rtol=1e-6, atol=0)


@CODES
def test_random_codes_leave_zero_what_a_cache_leaves_zero(
    zero: str, groups: str, sinks: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache sets every bit that it can where all codes are the greatest."""
    drawn, real = layer_of(zero, groups, sinks, window), layer_of(zero, groups, sinks, window)
    fill_random(drawn, 1090, seed=2)

    def greatest(self: Codec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(*x.shape[:-1], self.layout.scales, dtype=torch.float16)
        return self.levels[2].to(torch.uint8).expand(x.shape), ones

    monkeypatch.setattr(Codec, "quantise", greatest)
    codecs = drawn.layer_codes.keys, drawn.layer_codes.values
    real.store(*(torch.ones(3, 1090, c.layout.channels) for c in codecs))
    for got, most, of in zip(drawn.coded_sides(), real.coded_sides(), codecs, strict=True):
        assert not (got.codes & ~most.codes).any()
        assert (got.codes.float().mean() / most.codes.float().mean()).item() > 0.45
        assert torch.equal(got.scales > 0, most.scales > 0)
        assert not got.exact[most.exact == 0].any()
        held = unpack(got.codes, of.layout, sinks, 1090 - window)
        assert held.min() == (1 if zero == "tread" else 0)


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [2, 2.5, 3.2, 8])
def test_attention_over_codes_passes_its_gate(name: str, bits: float) -> None:
    done = attention.run_case(small(name, bits), 577, 2, torch.float16, CPU, CODED, "reference")
    assert done.fault is None
    assert done.error is not None and 0 < done.error < 1e-3
    assert done.timing is not None


@needs_triton
def test_kernels_over_codes_pass_their_gate() -> None:
    done = attention.run_case(small("llama-3.1-8b"), 600, 1, torch.float16, CPU, CODED, "triton")
    assert done.fault is None


def test_key_heads_that_share_channels_are_coded_too() -> None:
    shape = scaled_down(open_shape("llama-2-7b"))
    grouped = RankMap((LayerRanks((9, 5), (20,)),) * 2)
    shape = replace(shape, ranks=grouped).in_bits(3.2)
    done = attention.run_case(shape, 90, 2, torch.float16, CPU, CODED, "reference")
    assert done.fault is None


def flipped(side: Coded) -> Coded:
    codes = side.codes.clone()
    codes[-1] ^= 1  # the lowest bit of one token of eight, or of two
    return replace(side, codes=codes)


MISREADINGS: dict[str, Callable[..., Any]] = {
    "keys-a-bit": lambda k, v, how: (flipped(k), v, how),
    "values-a-bit": lambda k, v, how: (k, flipped(v), how),
    "keys-another-tile": lambda k, v, how: (replace(k, codes=k.codes.roll(1, 1)), v, how),
    "values-another-row": lambda k, v, how: (k, replace(v, codes=v.codes.roll(1, 0)), how),
    "window-as-codes": lambda k, v, how: (k, v, {**how, "coded": how["filled"]}),
    "window-turned": lambda k, v, how: (k, replace(v, exact=v.exact.roll(1, 1)), how),
}


@pytest.mark.parametrize("misread", MISREADINGS.values(), ids=MISREADINGS)
def test_misread_codes_get_no_time(
    misread: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(q: Any, keys: Coded, values: Coded, *args: Any, **how: Any) -> torch.Tensor:
        keys, values, how = misread(keys, values, how)
        return coded_attention(q, keys, values, *args, **how)

    monkeypatch.setattr(attention, "coded_attention", wrong)
    monkeypatch.setattr(attention, "measure", lambda *a: pytest.fail("timed all the same"))
    shape = small("llama-2-7b")
    done = attention.run_case(shape, 600, 2, torch.float16, CPU, CODED, "reference")
    assert done.timing is None
    assert done.fault is not None and done.fault.startswith("wrong")


# --- whole models --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subjects() -> dict[str, tuple[Shape, Subject]]:
    made = {}
    for name in NAMES:
        shape = small(name)
        dense = dense_subject(shape, torch.float16, CPU)
        made[name] = shape, coded_subject(shape, dense, "reference", 600**0.5)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_decode_agrees_with_its_reference_and_counts_its_bytes(
    name: str, subjects: dict[str, tuple[Shape, Subject]]
) -> None:
    shape, subject = subjects[name]
    for ctx in (20, 600):
        done = decode.run_case(subject, CODED, ctx, 3)
        assert done.fault is None
        assert done.error is not None and 0 < done.error < 3e-3
        assert done.cache == decode.cache_bytes(shape, CODED, ctx, 3)
        assert done.parts is not None and sum(done.parts.values()) == done.cache


@needs_triton
def test_decode_by_kernels_agrees_with_the_reference(
    subjects: dict[str, tuple[Shape, Subject]],
) -> None:
    subject = replace(subjects["llama-3.1-8b"][1], backend="triton")
    done = decode.run_case(subject, CODED, 40, 1)
    assert done.fault is None
    assert done.error is not None and 0 < done.error < 3e-3


def test_the_gate_leaves_the_cache_as_the_step_must_find_it(
    subjects: dict[str, tuple[Shape, Subject]],
) -> None:
    """Its own step codes what leaves the window and takes a place of the ring: of a copy."""
    subject = subjects["llama-2-7b"][1]
    with torch.no_grad():
        made = decode._Compressed(subject, 600, 2)
        before = [layer.latents(0, 600) for layer in made.cache.layers]
        first = made.reference([0, 1])
        assert torch.equal(made.reference([1]), first[1:])
        for layer, (keys, values) in zip(made.cache.layers, before, strict=True):
            assert (layer.length, layer.coded, layer.layer_codes.prefill) == (600, 568, "exact")
            after = layer.latents(0, 600)
            assert torch.equal(after[0], keys) and torch.equal(after[1], values)


def test_what_the_steps_stored_is_checked(
    subjects: dict[str, tuple[Shape, Subject]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a long context one token that is never coded hardly shows in the logits."""

    def after_steps() -> str | None:
        made = decode._Compressed(subjects["llama-2-7b"][1], 600, 2)
        with torch.no_grad(), made.stepping() as (step, _):
            for _ in range(3):
                step()
        return made.stored_fault()

    assert after_steps() is None
    monkeypatch.setattr("triton_ops.code_append.reference.write_codes", lambda *args: None)
    assert after_steps() == "tokens that left the window are not coded as they should be"


@pytest.mark.parametrize("bits", [1, 5, 0.5, 16, float("nan")])
def test_bits_that_cannot_be_made_are_refused(bits: float) -> None:
    with pytest.raises(UserError, match="bits"):
        BenchOptions(bits=bits)


@pytest.mark.parametrize("misread", MISREADINGS.values(), ids=MISREADINGS)
def test_decode_gate_sees_misread_codes(
    misread: Callable[..., Any],
    subjects: dict[str, tuple[Shape, Subject]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(q: Any, keys: Coded, values: Coded, *args: Any, **how: Any) -> torch.Tensor:
        keys, values, how = misread(keys, values, how)
        return coded_attention(q, keys, values, *args, **how)

    monkeypatch.setattr(core, "coded_attention", wrong)
    done = decode.run_case(subjects["llama-2-7b"][1], CODED, 600, 2)
    assert done.timing is None
    assert done.fault is not None and done.fault.startswith("wrong")


def test_parts_of_a_cache_are_what_was_stored() -> None:
    """Counted by hand: 3 rows, 3 tiles, 1090 tokens, of which 4 sinks and 32 in the window."""
    layer = layer_of("rise", "row", 4, 32)
    fill_random(layer, 1090, seed=3)
    cache = LatentCache(open_shape("llama-2-7b").spec, None, torch.float16)
    cache.layers = [layer]
    slots, bits = 1090 - 32 - 4, 4 * 20 + 3 * 9 + 8 * 3 + 3 * 21 + 2 * 6
    padding_bits = 4 * 12 + 3 * 7 + 8 * 13
    numbers = 32 + 27
    found = cache_parts(cache)
    assert found["codes"] == pytest.approx(3 * slots * bits / 8, abs=2)
    assert found["scales"] == 3 * slots * 2 * 2
    assert found["sinks"] == 3 * 4 * 2 * numbers and found["window"] == 3 * 32 * 2 * numbers
    of_rows = 3 * 36 * 2 * 5  # values of 27 in rows of 32
    assert found["padding"] == pytest.approx(3 * slots * padding_bits / 8 + of_rows, abs=2)
    per_slot = (bits + padding_bits) / 8 + 4
    assert found["room"] == pytest.approx(3 * (3 * 512 - slots) * per_slot, abs=4)
    assert sum(found.values()) == cache.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_prefill_agrees_with_a_cache_of_16_bits(
    name: str, subjects: dict[str, tuple[Shape, Subject]]
) -> None:
    shape = subjects[name][0]
    subject = coded_subject(shape, dense_subject(shape, torch.float16, CPU), "reference")
    done = prefill.run_case(subject, 33, 1, checked=False)
    assert done.fault is None
    assert done.timing is not None


def test_prefill_gate_sees_a_wrong_prompt_and_wrong_codes(
    subjects: dict[str, tuple[Shape, Subject]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = subjects["llama-2-7b"][0]
    subject = coded_subject(shape, dense_subject(shape, torch.float16, CPU), "reference")
    real = torch.nn.functional.scaled_dot_product_attention

    def cut(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
        if how["is_causal"]:
            v = torch.cat((v[:, :, :512], 0 * v[:, :, 512:]), 2)
        return real(q, k, v, **how)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", cut)
        done = prefill.run_case(subject, 33, 1, checked=False)
        assert done.timing is None
        assert done.fault is not None and done.fault.startswith("wrong: relative error")
    store = PackedLayer.store
    for turn, scale in ((1, 1.0), (0, 1.3)):

        def spoilt(layer: PackedLayer, k: Any, v: Any, t: int = turn, s: float = scale) -> None:
            store(layer, k.roll(t, 1), s * v)

        with monkeypatch.context() as patch:
            patch.setattr(PackedLayer, "store", spoilt)
            done = prefill.run_case(subject, 33, 1, checked=False)
        assert done.timing is None
        assert done.fault is not None and "codes are off" in done.fault


# --- plan ----------------------------------------------------------------------------------------


class _Allocated(TorchDispatchMode):
    """Bytes of the tensors made by ``torch.empty``."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
            self.total += out.nbytes
        return out


@needs_triton
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b"])
def test_plans_have_what_attention_over_codes_allocates(name: str) -> None:
    shape = small(name)
    with torch.no_grad():
        case = attention._Codes(shape, 600, 2, torch.float16, CPU, "triton")
        step = case.step(CODED)
        step()  # tables are kept
        with _Allocated() as counted:
            step()
    planned = coded_work(shape.spec, shape.layer_codes, shape.key_owner, 2, 600)
    assert 0.9 * planned < counted.total <= planned


def test_bytes_that_a_step_reads(llama: Shape) -> None:
    """Nothing but codes, their padding and the exact rows, of the tokens that are there."""
    codes = llama.layer_codes
    sides = codes.keys.layout, codes.values.layout
    rows = [-(-side.channels // 8) * 8 * 2 for side in sides]
    assert step_bytes(codes, 36) == 36 * sum(rows)
    assert step_bytes(codes, 36 + 512) == 36 * sum(rows) + sum(side.tile_bytes for side in sides)
    read = attention.read_bytes(llama, CODED, 32 << 10, 16)
    dense = attention.read_bytes(llama, attention.SDPA_DEFAULT, 32 << 10, 16)
    assert 19 < dense / read < 20
    assert read < attention.cache_bytes(llama, CODED, 32 << 10, 16)


def test_equal_memory_fits_many_more_rows(llama: Shape) -> None:
    def best(backend: str) -> int | None:
        return largest_batch(lambda b: decode.need(llama, backend, 16 << 10, b), 80 << 30)

    dense, ours = best(decode.STATIC), best(CODED)
    assert dense == 8
    assert ours is not None and ours > 16 * dense
    cache = decode.cache_bytes(llama, CODED, 16 << 10, ours)
    assert decode.need(llama, CODED, 16 << 10, ours).parts["cache"] == cache
    for ctx in (32 << 10, 64 << 10):
        assert attention.need(llama, CODED, ctx, 16).fault(139 << 30) is None
    assert prefill.need(llama, CODED, 32 << 10, 1).fault(139 << 30) is None


# --- the run -------------------------------------------------------------------------------------


def test_records_of_codes_stand_beside_the_others() -> None:
    options = BenchOptions(
        suite="all",
        shape="llama-3.1-8b",
        contexts=(4096,),
        batches=(1,),
        bits=3.2,
        device="cpu",
        scale_down=True,
    )
    records = run_bench(options)
    assert [r["fault"] for r in records] == [None] * 11
    assert all(tuple(r) == KEYS for r in records)
    coded = [r for r in records if r["backend"] == CODED]
    assert [r["suite"] for r in coded] == ["attention", "decode", "prefill"]
    assert {r["bits"] for r in records if r["backend"] != CODED} == {16}
    shape = small("llama-3.1-8b")
    for record in coded:
        assert record["bits"] == round(shape.codes.bits, 4)
        assert record["removed"] == pytest.approx(shape.removed)
    for record in (r for r in records if r["suite"] == "decode"):
        dense = 64 * shape.spec.dense_bytes_per_token
        assert record["cache_ratio"] == pytest.approx(dense / record["cache_bytes"])
        assert (record["cache_parts"] is not None) == (record["backend"] == CODED)
    assert all(r["cache_ratio"] is None for r in records if r["suite"] != "decode")


def test_a_shape_with_codes_of_its_own_takes_no_others() -> None:
    with pytest.raises(UserError, match="measured with its own codes; leave --bits out"):
        small("llama-2-7b").in_bits(4)


def test_scaled_down_runs_have_no_equal_memory() -> None:
    with pytest.raises(UserError, match="memory: scaled-down runs have sizes of their own"):
        BenchOptions(suite="decode", memory=80 << 30, scale_down=True)
