"""The packed cache layer against a plain list of tokens; its bytes against the prediction."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from starkv_core.budget import packed_bytes, predict_bytes
from starkv_core.cache import LatentCache, steps
from starkv_core.packed import PackedLayer
from starkv_core.rank_map import LayerRanks, RankMap
from tests import models
from tests.coded_case import SlowCache, codec
from triton_ops.latent_codes import TILE, LayerCodes, unpack

KEYS, VALUES = [(4, 3), (3, 7)], [(8, 1), (3, 2), (2, 3)]
R, R_V = 10, 6


def layer_codes(sinks: int = 0, window: int = 0, **options: Any) -> LayerCodes:
    groups = options.pop("groups", "row")
    return LayerCodes(
        codec("key", KEYS, groups), codec("value", VALUES, groups), sinks, window, **options
    )


def rows(batch: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, length, R, generator=generator),
        torch.randn(batch, length, R_V, generator=generator),
    )


class Both:
    """A packed layer and its slow twin, taken through the same steps and compared after each."""

    def __init__(self, codes: LayerCodes, dtype: torch.dtype = torch.bfloat16) -> None:
        self.fast, self.slow, self.seed = PackedLayer(codes, dtype), SlowCache(codes, dtype), 0

    def append(self, batch: int, length: int) -> None:
        self.seed += 1
        new = rows(batch, length, self.seed)
        self.fast.store(*new)
        self.slow.append(*new)
        self.check()

    def crop(self, tokens: int) -> None:
        self.fast.crop(-tokens)
        self.slow.crop(tokens)
        self.check()

    def pick(self, name: str, argument: Any, kept: list[int]) -> None:
        getattr(self.fast, name)(argument)
        self.slow.pick(kept)
        self.check()

    def check(self) -> None:
        """Latents of all slots, and codes bit for bit."""
        length = len(self.slow.rows[0])
        assert self.fast.get_seq_length() == length
        for side, held in enumerate((self.fast.key_rows, self.fast.value_rows)):
            assert held is not None
            assert torch.equal(self.fast.latents(0, length)[side], self.slow.side(side))
            middle = self.fast.latents(length // 3, length - 1)[side]
            assert torch.equal(middle, self.slow.side(side)[:, length // 3 : length - 1])
            for slot, wanted in self.slow.codes(side).items():
                got = unpack(held.codes, held.codec.layout, slot, slot + 1)[:, 0]
                assert torch.equal(got, wanted), slot


WINDOWS = [(0, 0), (4, 0), (0, 5), (3, 8), (1, 1), (9, 2)]


@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prompt_then_tokens(sinks: int, window: int, dtype: torch.dtype) -> None:
    both = Both(layer_codes(sinks, window), dtype)
    for length in [13, *[1] * 12, 5, 1]:
        both.append(2, length)


@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
def test_tokens_from_the_first_on(sinks: int, window: int) -> None:
    both = Both(layer_codes(sinks, window))
    for _ in range(15):
        both.append(1, 1)


@pytest.mark.parametrize("groups", ["static", "section"])
def test_other_scale_groups(groups: str) -> None:
    both = Both(layer_codes(2, 3, groups=groups))
    for length in [9, 1, 1, 4]:
        both.append(2, length)


@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (3, 5)])
def test_across_tiles(sinks: int, window: int) -> None:
    """Growth moves codes and scales of the tiles held."""
    both = Both(layer_codes(sinks, window))
    for length in [TILE - 3, 1, 1, 1, 1, 30]:
        both.append(1, length)
    assert both.fast.room == 2 * TILE


@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
@pytest.mark.parametrize("cropped", [1, 4, 7, 15, 19, 20])
def test_crop_into_the_window_the_codes_and_the_sinks(
    sinks: int, window: int, cropped: int
) -> None:
    both = Both(layer_codes(sinks, window))
    both.append(2, 20)
    both.fast.crop(0)
    both.crop(cropped) if cropped < 20 else both.fast.crop(-20)
    if cropped == 20:
        both.slow.crop(20)
        assert both.fast.get_seq_length() == 0
    for length in [2, 1, 11, 1]:
        both.append(2, length)


def test_rows_move_alike() -> None:
    """Trap 14: codes, scales, sinks and window."""
    both = Both(layer_codes(2, 4))
    both.append(3, 11)
    both.pick("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0])
    both.append(3, 1)
    both.pick("batch_select_indices", torch.tensor([1, 0]), [1, 0])
    both.append(2, 6)
    both.pick("batch_repeat_interleave", 3, [0, 0, 0, 1, 1, 1])
    both.append(6, 1)


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_operations(seed: int) -> None:
    draw = random.Random(seed)
    both, batch = Both(layer_codes(draw.randrange(5), draw.randrange(9))), 2
    both.append(batch, draw.randrange(1, 30))
    for _ in range(25):
        step = draw.choice(["append", "append", "token", "crop", "reorder", "select", "repeat"])
        length = both.fast.get_seq_length()
        if step == "append":
            both.append(batch, draw.randrange(1, 20))
        elif step == "token":
            both.append(batch, 1)
        elif step == "crop":
            both.crop(draw.randrange(length))
        elif step == "reorder":
            order = [draw.randrange(batch) for _ in range(batch)]
            both.pick("reorder_cache", torch.tensor(order), order)
        elif step == "select":
            batch = draw.randrange(1, batch + 1)
            order = draw.sample(range(both.fast.keys.shape[0]), batch)
            both.pick("batch_select_indices", torch.tensor(order), order)
        elif batch < 4:
            both.pick("batch_repeat_interleave", 2, [i for i in range(batch) for _ in range(2)])
            batch *= 2


def test_reset_forgets_everything() -> None:
    both = Both(layer_codes(2, 4))
    both.append(2, 20)
    both.fast.reset()
    assert both.fast.tensors() == [] and both.fast.get_seq_length() == 0
    both.slow.rows = []
    both.append(3, 9)


def test_operations_before_the_first_token() -> None:
    layer = PackedLayer(layer_codes(2, 4), torch.bfloat16)
    layer.reorder_cache(torch.tensor([0]))
    layer.crop(-1)
    layer.reset()
    assert layer.tensors() == [] and layer.room == 0 and layer.get_seq_length() == 0


def test_append_is_in_place() -> None:
    """Trap 11: with room reserved, nothing held is copied, and all stays where it is."""
    layer = PackedLayer(layer_codes(2, 4), torch.bfloat16)
    layer.reserve(1, 700, (0, 0), torch.device("cpu"))
    before = [t.data_ptr() for t in layer.tensors()]
    for i in range(20):
        layer.store(*rows(1, 37, i))
    assert layer.get_seq_length() == 740 and layer.room == 2 * TILE
    assert [t.data_ptr() for t in layer.tensors()] == before


def test_nothing_coded_is_held_in_16_bits() -> None:
    """No shadow: exact rows are as many as sinks and window, whatever the length."""
    layer = PackedLayer(layer_codes(2, 4), torch.bfloat16)
    layer.store(*rows(1, 300, 0))
    exact = [t for t in layer.tensors() if t.dtype == torch.bfloat16]
    assert [t.shape[:2] for t in exact] == [(1, 6), (1, 6)]
    assert {t.dtype for t in layer.tensors()} == {torch.bfloat16, torch.float16, torch.uint8}


@pytest.mark.parametrize("past", [0, 3, 12])
def test_what_a_prompt_sees(past: int) -> None:
    """Exact new tokens; and, where asked for, of each slot what decode sees from each token."""
    sinks, window, length = 2, 4, 18
    made = {}
    for prefill in ("exact", "coded"):
        layer = made[prefill] = PackedLayer(layer_codes(sinks, window, prefill=prefill), torch.half)
        if past:
            layer.store(*rows(2, past, 1))
    before = made["exact"].latents(0, past)[0] if past else torch.empty(2, 0, R)
    new = rows(2, length, 2)
    keys, values, exact = made["exact"].append_prompt(*new)
    assert exact is None and values.shape == (2, past + length, R_V)
    assert torch.equal(keys, torch.cat((before, new[0].half().float()), 1))
    keys, values, exact = made["coded"].append_prompt(*new)
    assert exact is not None and exact.shape == (length, past + length)
    decoded = PackedLayer(layer_codes(sinks, window), torch.half)
    if past:
        decoded.store(*rows(2, past, 1))
    for i in range(length):
        decoded.store(*(t[:, i : i + 1] for t in new))
        seen = past + i + 1
        for side, both in enumerate((keys, values)):
            first, second = both.split(past + length, dim=1)
            picked = torch.where(exact[i, :, None], first, second)[:, :seen]
            assert torch.equal(picked, decoded.latents(0, seen)[side])


@pytest.mark.parametrize("tokens", [1, 5, TILE, TILE + 1, 1300])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("groups", ["row", "section", "static"])
def test_bytes_of_a_layer_are_those_predicted(tokens: int, batch: int, groups: str) -> None:
    codes = layer_codes(3, 20, groups=groups)
    layer = PackedLayer(codes, torch.bfloat16)
    layer.store(*rows(batch, tokens, 0))
    held = sum(t.untyped_storage().nbytes() for t in layer.tensors())
    predicted = packed_bytes(codes.keys.layout, codes.values.layout, 3, 20, tokens)
    assert held == batch * predicted
    # By hand: keys 16 channels of 4 and 16 of 3 bits with pads; 16 + 8 numbers an exact row.
    scales = {"row": 2, "section": 5, "static": 0}[groups] * 16
    bits = 16 * 4 + 16 * 3 + 8 + 2 * 3 + 3 * 2 + scales
    tiles = -(-tokens // TILE)
    assert predicted == tiles * TILE * bits // 8 + (3 + 20) * (16 + 8) * 2


@pytest.mark.parametrize("tokens", [7, 600])
@pytest.mark.parametrize("batch", [1, 2])
def test_bytes_of_a_cache_with_all_kinds_of_layer(tokens: int, batch: int) -> None:
    """Packed, 16-bit latents, dense and a sliding window in one cache."""
    kinds = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    spec = models.model(
        "qwen2", num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=32
    ).spec
    ranks = RankMap((LayerRanks((4, 6), (R_V,)), LayerRanks((3, 5), (9,)), None, None))
    codes = {0: layer_codes(2, 16)}
    cache = LatentCache(spec, ranks, codes=codes)
    assert [type(layer).__name__ for layer in cache.layers] == [
        "PackedLayer", "LatentLayer", "DenseLayer", "WindowLayer"
    ]  # fmt: skip
    assert [steps(layer) for layer in cache.layers] == [True, True, True, False]
    assert cache.nbytes == 0
    cache.layers[0].store(*rows(batch, tokens, 0))
    cache.layers[1].append(torch.randn(batch, tokens, 8), torch.randn(batch, tokens, 9))
    for layer in cache.layers[2:]:
        layer.update(*torch.randn(2, batch, 2, tokens, 16))
    assert cache.nbytes == predict_bytes(spec, ranks, tokens, batch, codes=codes)
    assert cache.latent_tokens() == [tokens, tokens]
    cache.reserve(batch, 1500, torch.device("cpu"))
    grown = predict_bytes(spec, ranks, 1500, batch, codes=codes)
    window = 2 * spec.kv_width * 2 * batch * (31 - min(tokens, 31))
    assert cache.nbytes == grown - window


def test_reset_forgets_the_count_of_another_device() -> None:
    layer = PackedLayer(layer_codes(2, 3), torch.bfloat16)
    layer.reserve(1, 10, (0, 0), torch.device("meta"))
    assert layer.coded_count().device.type == "meta"
    layer.reset()
    layer.reserve(1, 10, (0, 0), torch.device("cpu"))
    assert layer.coded_count().device.type == "cpu"
