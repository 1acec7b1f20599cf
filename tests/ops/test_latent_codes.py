"""Codes of latents against a reference that goes bit by bit and number by number."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.coded_case import bit_places, codec, quantised, read_bits
from triton_ops.latent_codes import TILE, Codec, CodeLayout, LayerCodes, Section, pack, unpack

SIDES = ["key", "value"]
MIXES = {
    "2": [(2, 5)],
    "3": [(3, 17)],
    "4": [(4, 16)],
    "8": [(8, 1)],
    "3.2": [(4, 4), (3, 13)],
    "all": [(8, 3), (4, 18), (3, 2), (2, 7)],
    "mixed-up": [(2, 1), (8, 2), (2, 3), (3, 1)],
}


def layout(side: str, mix: list[tuple[int, int]]) -> CodeLayout:
    return codec(side, mix).layout


def draw(made: CodeLayout, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (batch, length, made.channels), generator=generator)
    return (codes % 2 ** made.bits()).to(torch.uint8)


def buffer(made: CodeLayout, batch: int, tiles: int, fill: int = 0) -> torch.Tensor:
    return torch.full((batch, tiles, made.tile_bytes), fill, dtype=torch.uint8)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (500, 27), (63, 131), (0, TILE), (300, 1100)]
)
def test_every_bit_lies_where_the_layout_says(
    side: str, mix: list[tuple[int, int]], start: int, length: int
) -> None:
    made = layout(side, mix)
    codes, held = draw(made, 2, length), buffer(made, 2, 3)
    pack(codes, start, held, made)
    slots = sorted({0, length // 2, length - 1, *range(0, length, 37)})
    assert torch.equal(read_bits(held, made, [start + s for s in slots]), codes[:, slots])
    assert torch.equal(unpack(held, made, start, start + length), codes)
    others = [s for s in (start - 1, start + length) if 0 <= s < 3 * TILE]
    assert not read_bits(held, made, others).any()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_tokens_one_by_one_are_those_packed_at_once(side: str, mix: list[tuple[int, int]]) -> None:
    made = layout(side, mix)
    codes = draw(made, 2, 150)
    at_once, one_by_one = buffer(made, 2, 2), buffer(made, 2, 2)
    pack(codes, 430, at_once, made)
    for i in range(150):
        pack(codes[:, i : i + 1], 430 + i, one_by_one, made)
    assert torch.equal(at_once, one_by_one)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_overwriting_leaves_every_other_bit(side: str, mix: list[tuple[int, int]]) -> None:
    """As after a crop; of other slots and of the padding."""
    made = layout(side, mix)
    held = torch.randint(256, (2, 3, made.tile_bytes), dtype=torch.uint8)
    before, codes, slots = held.clone(), draw(made, 2, 601), range(455, 1056)
    pack(codes, 455, held, made)
    own = [[0] * made.tile_bytes for _ in range(3)]
    for slot in slots:
        for byte, bit in itertools.chain(*bit_places(made, slot)):
            own[slot // TILE][byte] |= 1 << bit
    others = ~torch.tensor(own, dtype=torch.uint8)
    assert torch.equal(held & others, before & others)
    assert torch.equal(read_bits(held, made, slots[::25]), codes[:, ::25])


def test_a_tile_is_as_small_as_its_bits() -> None:
    """Three bits take three bits; only sections of keys are padded, to 16 channels."""
    assert layout("value", [(3, 40)]).tile_bytes == TILE * 40 * 3 // 8
    assert layout("value", [(4, 5), (2, 3)]).tile_bytes == TILE * (5 * 4 + 3 * 2) // 8
    assert layout("key", [(3, 32)]).tile_bytes == TILE * 32 * 3 // 8
    assert layout("key", [(4, 5), (3, 17)]).tile_bytes == TILE * (16 * 4 + 32 * 3) // 8
    assert codec("key", [(4, 5), (3, 17)], "section").layout.scale_bytes == TILE * 2 * 2


def test_pads_stay_zero() -> None:
    made = layout("key", [(8, 3)])
    held = buffer(made, 1, 1)
    pack(torch.full((1, TILE, 3), 255, dtype=torch.uint8), 0, held, made)
    assert int((held != 0).sum()) == TILE * 3


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("groups", ["row", "section", "static", (2, 9, 5)])
@pytest.mark.parametrize(
    ("measure", "zero"), list(itertools.product(["rms", "absmax"], ["rise", "tread"]))
)
def test_codes_and_scales_number_by_number(
    side: str, groups: str | tuple[int, ...], measure: str, zero: str
) -> None:
    made = codec(side, [(8, 2), (4, 5), (3, 4), (2, 5)], groups, measure=measure, zero=zero)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 40, 16, generator=generator) * torch.logspace(-6, 3, 40)[:, None]
    x[0, 0] = 0.0
    x[0, 1] = 1e9  # above every scale
    x = x.bfloat16()
    codes, scales = made.quantise(x)
    values = made.dequantise(codes, scales)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.float16
    assert scales.shape == (2, 40, made.layout.scales)
    assert torch.equal(values, made.seen(x))
    for row, token in itertools.product(range(2), range(40)):
        want_codes, want_scales, want_values = quantised(made, x[row, token])
        assert codes[row, token].tolist() == want_codes
        assert scales[row, token].tolist() == want_scales
        assert torch.equal(values[row, token], want_values)


@pytest.mark.parametrize("zero", ["rise", "tread"])
def test_halves_are_rounded_to_even_and_ends_are_clamped(zero: str) -> None:
    one = torch.ones(1)
    made = Codec(CodeLayout("value", (Section(3, 1),), ()), one, one, "rms", zero)
    x = torch.tensor([-99.0, -3.5, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 99.0])[:, None]
    got = made.quantise(x)[0][:, 0].tolist()
    wanted = {"rise": [0, 0, 0, 2, 3, 4, 4, 4, 6, 7], "tread": [1, 1, 1, 3, 4, 4, 4, 5, 6, 7]}
    assert got == wanted[zero]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    made = codec("key", [(4, 70), (3, 59)])
    x = torch.randn(3, 33, 129, generator=torch.Generator().manual_seed(0))
    codes, scales = made.quantise(x)
    for row, token in itertools.product(range(3), range(0, 33, 4)):
        own = made.quantise(x[row : row + 1, token : token + 1])
        assert torch.equal(own[0][0, 0], codes[row, token])
        assert torch.equal(own[1][0, 0], scales[row, token])


@pytest.mark.parametrize(
    ("sections", "groups", "why"),
    [
        (((5, 4),), (4,), "bits are 2, 3, 4 or 8"),
        (((0, 4),), (4,), "bits are 2, 3, 4 or 8"),
        (((4, 0),), (), "channels from 1"),
        ((), (), "no section"),
        (((4, 4),), (3,), "do not cover 4 channels"),
        (((4, 4),), (4, 0), "do not cover 4 channels"),
    ],
)
def test_layouts_that_cannot_be(
    sections: tuple[tuple[int, int], ...], groups: tuple[int, ...], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        CodeLayout("key", tuple(Section(*s) for s in sections), groups)


def test_a_side_that_is_none() -> None:
    with pytest.raises(ValueError, match="key or value"):
        CodeLayout("query", (Section(4, 4),), (4,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (torch.ones(3), "expected \\[4\\]"),
        (torch.ones(4).double(), "torch.float32"),
        (torch.tensor([1.0, 0.0, 1.0, 1.0]), "not positive"),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), "not positive"),
    ],
)
def test_steps_that_cannot_be(step: torch.Tensor, why: str) -> None:
    made = layout("key", [(4, 4)])
    with pytest.raises(ValueError, match=why):
        Codec(made, step, torch.ones(4), "rms", "rise")


def test_layers_that_cannot_be() -> None:
    keys, values = codec("key", [(4, 4)]), codec("value", [(4, 4)])
    with pytest.raises(ValueError, match="keys take a key layout"):
        LayerCodes(values, keys)
    with pytest.raises(ValueError, match="window -1"):
        LayerCodes(keys, values, window=-1)


def test_codes_that_do_not_fit_the_buffer() -> None:
    made = layout("key", [(4, 4)])
    with pytest.raises(ValueError, match="slots 1000 to 1025, the buffer has 1024"):
        pack(draw(made, 1, 25), 1000, buffer(made, 1, 2), made)
    with pytest.raises(ValueError, match="expected \\[1, tiles"):
        pack(draw(made, 1, 1), 0, buffer(made, 2, 2), made)
    with pytest.raises(ValueError, match="5 channels, expected 4"):
        pack(draw(layout("key", [(4, 5)]), 1, 1), 0, buffer(made, 1, 2), made)
