"""Budgets, and predicted bytes against what live caches hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from starkv_core.budget import (
    BYTES_PER_NUMBER,
    GROWTH,
    Budget,
    bytes_per_token,
    cache_ratio,
    mean_bits,
    paper_rate,
    predict_bytes,
    resolve_budget,
)
from starkv_core.errors import UserError
from starkv_core.models.spec import ModelSpec
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.run import dense_subject
from tests import models
from triton_ops.latent_codes import Codec, CodeLayout, LayerCodes, Section

# 3 layers, 4 key heads of 16: 128 numbers a layer and token, 768 bytes in all.
SPEC = models.model("llama").spec


def resolved(spec: ModelSpec = SPEC, **options: Any) -> Budget:
    return resolve_budget(spec, **options)


def test_dense_bytes() -> None:
    assert SPEC.dense_bytes_per_token == 768


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"ratio": 2.0}, 192),
        ({"ratio": 3.0}, 128),
        ({"ratio": 1.7}, 224),  # 451.76 bytes: never above, and in rows of 16 bytes
        ({"bytes_limit": 384}, 192),
        ({"bytes_limit": 385.9}, 192),
        ({"bytes_limit": 399}, 192),
        ({"bytes_limit": 400}, 200),
        # A cache grows by whole blocks, and those count: 300 tokens take 512 slots.
        ({"fit": (300, 512 * 384)}, 192),
        ({"fit": (512, 512 * 384)}, 192),
        ({"fit": (300, 512 * 384 * 3), "fit_batch": 3}, 192),
        ({"fit": (300, 512 * 384 - 1)}, 184),
    ],
)
def test_numbers_for_the_compressed_layers(options: dict[str, Any], numbers: int) -> None:
    assert resolved(**options) == Budget(numbers, (0, 1, 2))


@pytest.mark.parametrize("skip", [(0,), (-3,), (0, -3)])
def test_skipped_layers_count_in_full(skip: tuple[int, ...]) -> None:
    """Trap 6: what is left dense comes out of the same budget."""
    assert resolved(ratio=2.0, skip_layers=skip) == Budget(192 - 128, (1, 2))


def test_sliding_windows_are_left_dense() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    spec = models.model(
        "qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=32, max_window_layers=0
    ).spec
    assert spec.dense_reasons == {1: "sliding window of 32 tokens"}
    assert list(spec.dense_reasons) == [1]
    assert resolved(spec, ratio=1.5) == Budget(int(3 * 64 / 1.5) - 64, (0, 2))


@pytest.mark.parametrize("batch", [1, 3])
def test_fit_counts_windows_as_they_are_held(batch: int) -> None:
    """They counted at full length: a context that fits was refused, or shrunk far below."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    spec = models.model("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=32).spec
    assert spec.windows == {1: 32}
    window = 31 * 64 * 2
    memory = batch * (512 * 2 * 40 + window)
    budget = resolved(spec, fit=(300, memory), fit_batch=batch)
    assert budget == Budget(40, (0, 2))
    ranks = RankMap((LayerRanks((3, 5), (2,)), None, LayerRanks((3, 4), (9,))))
    assert predict_bytes(spec, ranks, 300, batch) == memory


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"ratio": 30.0}, "ratio 30"),
        ({"bytes_limit": 95}, "95 bytes per token"),
        ({"fit": (32768, 2**19)}, "32768 tokens x 1 in 0.5 MiB"),
    ],
)
def test_the_floor_is_named(options: dict[str, Any], asked: str) -> None:
    # 3 layers, for each a row of keys and a row of values, 16 bytes a row: 96 bytes.
    with pytest.raises(UserError) as caught:
        resolved(**options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"budget: {asked} is below the floor")
    assert "96 bytes per token (ratio 8.00)" in message
    assert "rows are padded to 16 bytes, which takes" in message
    resolved(bytes_limit=96)


def test_the_floor_counts_dense_layers() -> None:
    with pytest.raises(UserError, match=r"1 layer stays dense, which takes 320 bytes"):
        resolved(ratio=3.0, skip_layers=(1,))


@pytest.mark.parametrize(
    "options", [{"bytes_limit": 768}, {"bytes_limit": 5000}, {"fit": (256, 2**30)}]
)
def test_a_budget_that_shrinks_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="dense cache takes 768 bytes per token") as caught:
        resolved(**options)
    assert "\n" not in str(caught.value)
    resolved(bytes_limit=766)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_does_not_exist(layer: int) -> None:
    with pytest.raises(UserError, match=f"layer {layer} does not exist .the model has 3"):
        resolved(ratio=2.0, skip_layers=(layer,))


def test_nothing_left_to_compress() -> None:
    with pytest.raises(UserError, match="all layers are skipped"):
        resolved(ratio=2.0, skip_layers=(0, 1, 2))
    spec = models.model("mistral", sliding_window=32).spec
    with pytest.raises(UserError, match="sliding window of 32 tokens"):
        resolved(spec, ratio=2.0)


def test_a_budget_must_be_given() -> None:
    with pytest.raises(UserError, match="give one of"):
        resolved()


def test_groups_raise_the_floor() -> None:
    """One rank for each group, in whole rows: 12 heads need two, four groups of three need one."""
    from starkv_core.calibrate.loop import budget_for

    spec = replace(SPEC, n_heads=12, n_kv_heads=12)
    for key_group, value_group, least in ((1, 0, 144), (1, 1, 192), (3, 1, 144), (3, 3, 96)):
        start = {"key_group": key_group, "value_group": value_group}
        budget_for(models.recipe(budget={"bytes_per_token": least}, start=start), spec)
        with pytest.raises(UserError, match=f"takes {least} bytes per token") as caught:
            budget_for(models.recipe(budget={"bytes_per_token": least - 1}, start=start), spec)
        assert "\n" not in str(caught.value)


# No statistics: only sizes matter here.
PLAIN = {"keys": "weights", "values": "weights", "center": False, "allocation": "uniform"}
RAGGED = LayerRanks((1, 7, 16, 3), (5,))
MAPS = {
    "ragged": RankMap((RAGGED, LayerRanks((2, 2, 2, 2), (48,)), LayerRanks((9, 1, 1, 1), (1,)))),
    "with dense layers": RankMap((None, RAGGED, None)),
    "grouped": RankMap((LayerRanks((3, 20), (11, 2)), RAGGED, RAGGED)),
}


@pytest.mark.parametrize("which", MAPS)
def test_ratio_and_rate_by_hand(which: str) -> None:
    ranks = MAPS[which]
    # Keys of 27 take 32, of 12 take 16, of 23 take 24; values of 5 and 1 take 8, of 13 take 16.
    numbers = {
        "ragged": (32 + 8) + (8 + 48) + (16 + 8),
        "with dense layers": (32 + 8) + 2 * 128,
        "grouped": (24 + 16) + 2 * (32 + 8),
    }[which]
    assert bytes_per_token(SPEC, ranks) == 2 * numbers
    assert cache_ratio(SPEC, ranks) == 768 / (2 * numbers)
    # The paper counts latents alone.
    kept = {"ragged": 101 / 384, "with dense layers": 32 / 128, "grouped": 100 / 384}[which]
    assert paper_rate(SPEC, ranks) == pytest.approx(1 - kept)


def test_rate_and_bits_of_codes_by_hand() -> None:
    def codec(side: str, *sections: tuple[int, int]) -> Codec:
        made = tuple(Section(*s) for s in sections)
        layout = CodeLayout(side, made, ())  # type: ignore[arg-type]
        return Codec(
            layout, torch.ones(layout.channels), torch.ones(layout.channels), "rms", "rise"
        )

    ranks = RankMap((LayerRanks((4, 4, 4, 4), (8,)), None, LayerRanks((1, 1, 1, 1), (12,))))
    # Windows and the padding of keys to 16 channels take bytes, but have no part in the rate.
    coded = {
        0: LayerCodes(codec("key", (4, 6), (2, 10)), codec("value", (8, 8)), 32, 4),
        2: LayerCodes(codec("key", (3, 4)), codec("value", (3, 4), (2, 8)), 32, 4),
    }
    keys, values = 6 * 4 + 10 * 2 + 4 * 3, 8 * 8 + 4 * 3 + 8 * 2
    assert mean_bits(coded) == (keys / 20, values / 20)
    assert paper_rate(SPEC, ranks, coded) == pytest.approx(1 - (keys + values) / (2 * 128 * 16))
    # A layer without codes has 16 bits.
    one = {2: coded[2]}
    kept = 24 * 16 + 4 * 3 + 4 * 3 + 8 * 2
    assert paper_rate(SPEC, ranks, one) == pytest.approx(1 - kept / (2 * 128 * 16))
    assert paper_rate(SPEC, ranks, {}) == paper_rate(SPEC, ranks) == pytest.approx(1 - 40 / 256)


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 400])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("which", ["ragged", "with dense layers"])
def test_predicted_bytes_are_the_measured_ones(which: str, batch: int, tokens: int) -> None:
    loaded = models.model("llama")
    ranks = MAPS[which]
    skip = [i for i, layer in enumerate(ranks.layers) if layer is None]
    made = models.recipe(
        budget={"bytes_per_token": 700}, start={"slack": 0, "skip_layers": skip, **PLAIN}
    )
    live = models.student(loaded, made)
    for i, layer in live.by_layer().items():
        wanted = ranks.layers[i]
        assert wanted is not None
        layer.set_ranks(wanted, live.settings)
    folded = {i: layer.fold(live.settings) for i, layer in live.by_layer().items()}
    subject = models.deployed_subject(loaded, ranks, folded)
    cache = subject.new_cache()
    ids = models.ids(batch, tokens)
    with torch.no_grad(), subject.active() as model:
        # In two pieces, the second of which crosses the end of a block.
        for piece in ids.tensor_split([tokens - tokens // 8], 1):
            if piece.shape[1]:
                model(piece, past_key_values=cache)
    assert cache.get_seq_length() == tokens
    assert cache.nbytes == predict_bytes(SPEC, ranks, tokens, batch)
    assert cache.dense_nbytes == batch * tokens * 768
    if tokens % GROWTH == 0:
        assert cache.nbytes == batch * tokens * bytes_per_token(SPEC, ranks)


@pytest.mark.parametrize("tokens", [5, 31, 32, 33, 300])
def test_predicted_bytes_of_a_window(tokens: int) -> None:
    loaded = models.model("mistral", sliding_window=32)
    subject = dense_subject(loaded)
    cache = subject.new_cache()
    ids = models.ids(2, tokens)
    with torch.no_grad(), subject.active() as model:
        for piece in ids.split(20, 1):
            model(piece, past_key_values=cache)
    dense = RankMap((None, None, None))
    assert cache.nbytes == predict_bytes(loaded.spec, dense, tokens, 2)
    assert cache.nbytes <= 2 * tokens * loaded.spec.kv_width * 2 * 3 * BYTES_PER_NUMBER
