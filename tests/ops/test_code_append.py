"""Tokens stored and coded in one launch: bit for bit the cache layer that the slow twin checks.

The reference is held to a list of tokens in tests/core/test_packed_cache.py; here the kernel,
interpreted without a GPU, is held to the reference, and queries to plain mathematics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from tests.coded_case import SlowCache, codec
from tests.tolerances import FP64_OP
from triton_ops.code_append import code_append
from triton_ops.coded_attention import Coded
from triton_ops.latent_attention import RopeTables, row_width
from triton_ops.latent_codes import TILE, LayerCodes

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
HALF_DIGIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        keys, values: sections, (bits, channels).
        past: slots filled before.
        coded: slots coded before; None for those that the window has dropped.
        groups: scale groups of :func:`tests.coded_case.codec`.
    """

    keys: tuple[tuple[int, int], ...] = ((4, 20), (3, 37))
    values: tuple[tuple[int, int], ...] = ((8, 3), (4, 18), (2, 135))
    past: int = 700
    tokens: int = 1
    coded: int | None = None
    sinks: int = 4
    window: int = 32
    batch: int = 2
    heads: int = 6
    dim: int = 32
    groups: str = "static"
    measure: str = "rms"
    zero: str = "rise"
    size: float = 1.0
    dtype: torch.dtype = torch.float16

    @property
    def codes(self) -> LayerCodes:
        made = (
            codec(side, sections, self.groups, measure=self.measure, zero=self.zero)
            for side, sections in (("key", self.keys), ("value", self.values))
        )
        return LayerCodes(*made, self.sinks, self.window)


CASES = {
    "one": Case(),
    "all-bits": Case(
        keys=((8, 5), (4, 17), (3, 33), (2, 260)), values=((8, 140), (4, 1), (3, 129), (2, 65))
    ),
    "no-window": Case(sinks=0, window=0, past=511),
    "no-sinks": Case(sinks=0, window=3),
    "last-of-a-tile": Case(past=511 + 32),
    "first-of-a-tile": Case(past=512 + 32),
    "within-the-sinks": Case(past=2),
    "leaving-the-sinks": Case(past=3, tokens=3),
    "window-fills": Case(past=20),
    "after-a-crop": Case(past=690, coded=680),
    "tokens": Case(tokens=7, past=540),
    "sixteen-over-a-small-window": Case(tokens=16, window=5, past=6),
    "sixteen-without-window": Case(tokens=16, window=0, sinks=9, past=505),
    "sixteen-after-a-crop": Case(tokens=16, window=9, past=40, coded=38),
    "row": Case(groups="row"),
    "row-tokens": Case(groups="row", tokens=5, window=2),
    "sections": Case(groups="section", values=((4, 1), (3, 300), (2, 7))),
    "paper": Case(groups="section", measure="absmax", zero="tread", window=0, sinks=0, tokens=2),
    "paper-row": Case(groups="row", measure="absmax", zero="tread"),
    "tiny": Case(groups="row", size=1e-7),
    "huge": Case(groups="section", size=6e4),
    "beyond-the-levels": Case(size=300.0),
}


@dataclass(frozen=True)
class Call:
    """A case with its tensors; the buffers hold random bytes all over."""

    case: Case
    codes: LayerCodes
    q: torch.Tensor
    rows: tuple[torch.Tensor, torch.Tensor]
    sides: tuple[Coded, Coded]
    tables: tuple[torch.Tensor, torch.Tensor]

    def run(self, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        case, device = self.case, self.q.device
        before = case.past - case.window if case.coded is None else case.coded
        return code_append(
            self.q,
            *self.rows,
            *self.sides,
            self.codes,
            *self.tables,
            filled=torch.tensor([case.past + case.tokens], dtype=torch.int32, device=device),
            coded=torch.tensor([max(0, before)], dtype=torch.int32, device=device),
            backend=backend,
        )

    def buffers(self) -> Iterator[torch.Tensor]:
        for side in self.sides:
            yield from (side.codes, side.scales, side.exact)


def draw(case: Case, device: str = "cpu") -> Call:
    """The same numbers on every device."""
    codes = case.codes
    generator = torch.Generator().manual_seed(1)
    tiles = (case.past + case.tokens) // TILE + 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * case.size

    sides, rows = [], []
    for c in (codes.keys, codes.values):
        layout = c.layout
        bytes_ = (case.batch, tiles, layout.tile_bytes)
        exact = normal(case.batch, case.sinks + case.window, row_width(layout.channels))
        side = (
            torch.randint(256, bytes_, generator=generator, dtype=torch.uint8),
            normal(case.batch, tiles, layout.scales, TILE).half(),
            exact.to(case.dtype),
        )
        sides.append(Coded(*(t.to(device) for t in side)))
        rows.append(normal(case.batch, case.tokens, layout.channels).to(case.dtype).to(device))
    q = torch.randn(case.batch, case.tokens, case.heads, case.dim, generator=generator)
    q = q.to(case.dtype).to(device).transpose(1, 2)
    tables = RopeTables(inv_freq(case.dim), 1.0).slots(tiles * TILE, torch.device(device))
    return Call(case, codes.to(device), q, (rows[0], rows[1]), (sides[0], sides[1]), tables)


def inv_freq(dim: int) -> torch.Tensor:
    return 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def agree(case: Case, device: str) -> None:
    """The kernel leaves the reference's bits in every buffer, and the same queries and counts."""
    got, want = draw(case, device), draw(case, device)
    ours, theirs = got.run("triton"), want.run("reference")
    for name, a, b in zip(("queries", "coded"), ours, theirs, strict=True):
        assert torch.equal(a, b), name
    for i, (a, b) in enumerate(zip(got.buffers(), want.buffers(), strict=True)):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), i


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_and_reference_agree_bit_for_bit(case: Case) -> None:
    agree(case, "cpu")


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_queries_are_turned_for_their_slots(backend: str) -> None:
    case = Case(tokens=3)
    call = draw(case)
    turned, _ = call.run(backend)
    half = case.dim // 2
    slots = torch.arange(case.past, case.past + 3, dtype=torch.float64)
    turn = torch.polar(torch.ones(3, half).double(), slots[:, None] * inv_freq(case.dim))
    q = call.q.double()
    want = torch.complex(q[..., :half], q[..., half:]) * turn
    want = torch.cat((want.real, want.imag), -1)
    size = q.unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 1, 1, 2)
    assert bool(((turned.double() - want).abs() <= (HALF_DIGIT[case.dtype] + FP64_OP) * size).all())


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cache_filled_token_by_token_is_the_slow_one(backend: str, tokens: int) -> None:
    """From the empty cache on, with a count of coded slots that stays behind, as in a graph."""
    case = Case(keys=((3, 9),), values=((4, 3), (2, 4)), sinks=2, window=5, groups="row", batch=1)
    first = draw(replace(case, past=0, tokens=tokens))
    for buffer in first.buffers():
        buffer.zero_()
    slow = SlowCache(first.codes, case.dtype)
    generator = torch.Generator().manual_seed(3)
    for past in range(0, 8 * tokens, tokens):
        rows = [torch.randn(1, tokens, c, generator=generator).half() for c in (9, 7)]
        call = replace(
            first, case=replace(case, past=past, tokens=tokens, coded=0), rows=(rows[0], rows[1])
        )
        _, coded = call.run(backend)
        slow.append(*rows)
        assert int(coded) == max(0, past + tokens - 5)
    for number, side in enumerate(first.sides):
        for slot, wanted in slow.codes(number).items():
            from triton_ops.latent_codes import unpack

            layout = (first.codes.keys, first.codes.values)[number].layout
            assert torch.equal(unpack(side.codes, layout, slot, slot + 1)[:, 0], wanted), slot


def test_every_wrong_shape_is_listed() -> None:
    call = draw(Case(tokens=3))
    wrong = replace(
        call,
        rows=(call.rows[0][:, :2], call.rows[1][..., :5]),
        sides=(replace(call.sides[0], exact=call.sides[0].exact[:, 1:]), call.sides[1]),
        tables=(call.tables[0].double(), call.tables[1][:100]),
    )
    with pytest.raises(ValueError) as caught:
        wrong.run("reference")
    for part in (
        "keys [2, 2, 57], expected [2, 3, 57]",
        "values [2, 3, 5], expected [2, 3, 156]",
        "keys.exact [2, 35, 64] torch.float16, expected [2, 36, 64]",
        "sin [100, 32], expected [1024, 32]",
        "cos torch.float64, expected torch.float32",
    ):
        assert part in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled(case: Case, dtype: torch.dtype) -> None:
    agree(replace(case, dtype=dtype), "cuda")


@pytest.mark.gpu
def test_beyond_32_bits() -> None:
    """The last slots of a million, in buffers of more bytes than an int32 counts."""
    wide = Case(keys=((4, 4400),), values=((4, 20),), past=2**20 - 40, tokens=3, batch=1)
    agree(wide, "cuda")
