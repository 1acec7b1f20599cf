"""Rank maps: read and written by hand, refused with every fault when they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from starkv_core.artifacts import read_yaml
from starkv_core.errors import UserError
from starkv_core.rank_map import LayerRanks, RankMap
from starkv_core.run import read_ranks, write_ranks
from tests import models

MAP = RankMap((LayerRanks((3, 7, 1, 5), (9,)), None, LayerRanks((2, 4), (6, 8))))


def test_round_trip_through_the_file(tmp_path: Path) -> None:
    write_ranks(tmp_path, MAP)
    assert read_ranks(tmp_path) == MAP
    text = (tmp_path / "ranks.yaml").read_text()
    assert f"starkv calibrate --export {tmp_path}" in text
    assert "keys: [3, 7, 1, 5]" in text
    assert "values: 9" in text
    assert "dense" in text
    assert read_yaml(tmp_path / "ranks.yaml")["schema"] == 1


def test_totals() -> None:
    assert MAP.layers[0] is not None
    assert MAP.layers[0].total == 25
    assert LayerRanks((2, 4), (6, 8)).total == 20


@pytest.mark.parametrize(
    ("keys", "values", "stored"),
    [
        ((3, 7, 1, 5), (9,), 16 + 16),
        ((2, 4), (6, 8), 8 + 16),  # rows are padded, not blocks
        ((1,), (1,), 8 + 8),
        ((8,), (16,), 8 + 16),
        ((9,), (17,), 16 + 24),
    ],
)
def test_rows_begin_on_16_bytes(
    keys: tuple[int, ...], values: tuple[int, ...], stored: int
) -> None:
    assert LayerRanks(keys, values).stored == stored


@pytest.mark.parametrize(
    "content",
    [None, [], "dense", {}, {"schema": 1}, {"schema": 1, "layers": "dense"}],
)
def test_not_a_rank_map(content: Any) -> None:
    with pytest.raises(UserError, match="here: not a rank map"):
        RankMap.from_dict(content, "here")


def test_every_malformed_layer_is_named() -> None:
    layers = [
        {"keys": [1, 2], "values": 3},
        {"keys": [0, 2], "values": 3},
        {"keys": [1, 2], "values": 2.5},
        {"keys": [True], "values": 3},
        {"keys": [1]},
        "dens",
        {"keys": [], "values": 1},
    ]
    with pytest.raises(UserError) as caught:
        RankMap.from_dict({"schema": 1, "layers": layers}, "here")
    assert str(caught.value).splitlines() == [
        "here: malformed rank map:",
        "  layer 1: keys must be whole numbers from 1",
        "  layer 2: values must be whole numbers from 1",
        "  layer 3: keys must be whole numbers from 1",
        "  layer 4: expected `dense` or keys and values",
        "  layer 5: expected `dense` or keys and values",
        "  layer 6: keys must be whole numbers from 1",
    ]


@pytest.mark.parametrize("schema", [2, 99])
def test_newer_schema(schema: int) -> None:
    with pytest.raises(UserError, match=f"here: written by a newer starkv .schema {schema}"):
        RankMap.from_dict({"schema": schema, "layers": []}, "here")


def test_fit_to_the_model() -> None:
    spec = models.model("qwen2").spec  # 3 layers, 2 key heads of 16, hidden 48
    full = LayerRanks((16, 16), (32,))
    RankMap((full, None, LayerRanks((32,), (16, 16)))).check(spec, "here")
    with pytest.raises(UserError, match="here: 1 layers, but the model has 3"):
        RankMap((full,)).check(spec, "here")
    bad = RankMap((LayerRanks((17, 1), (33,)), LayerRanks((1, 1, 1), (1,)), full))
    with pytest.raises(UserError) as caught:
        bad.check(spec, "here")
    assert str(caught.value).splitlines() == [
        "here: rank map does not fit the model:",
        "  layer 0: key rank 17 is above 16",
        "  layer 0: value rank 33 is above 32",
        "  layer 1: 3 key ranks do not divide 2 heads; expected 1 or 2",
    ]


def test_a_sliding_window_must_stay_dense() -> None:
    spec = models.model("mistral", sliding_window=16).spec
    ranks = LayerRanks((4,), (4,))
    with pytest.raises(UserError, match="layer 0 must stay dense .sliding window of 16 tokens"):
        RankMap((ranks, ranks, ranks)).check(spec, "here")
