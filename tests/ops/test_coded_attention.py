"""Attention over packed codes, interpreted without a GPU, against plain mathematics in float64."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import pytest
import torch

from tests.latent_case import relative_error, unwritten_is_nan
from tests.tolerances import CODED_OP, FP32_TABLE
from triton_ops.coded_attention import Coded, CodedFactors, coded_attention
from triton_ops.latent_attention import RopeTables, row_width
from triton_ops.latent_codes import TILE, Codec, CodeLayout, LayerCodes, Section, pack, tiles

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        heads: query heads; ranks: per section of the keys, (bits, channels of each key head).
        values: (bits, channels) of each section.
        scales: ``static``, ``row`` or ``block``.
        filled, coded: slots; Q queries of them are new.
    """

    heads: int
    dim: int
    ranks: tuple[tuple[int, tuple[int, ...]], ...]
    values: tuple[tuple[int, int], ...]
    filled: int
    coded: int
    batch: int = 1
    queries: int = 1
    sinks: int = 4
    window: int = 32
    scales: str = "static"
    zero: str = "rise"
    bias: bool = True
    padded: bool = False
    holes: bool = False
    theta: float = 1e4

    def inv_freq(self) -> torch.Tensor:
        return self.theta ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)


@dataclass(frozen=True)
class Call:
    """A case with its tensors, and the latents that the stored bits stand for."""

    case: Case
    q: torch.Tensor
    keys: Coded
    values: Coded
    factors: CodedFactors
    x: torch.Tensor
    z: torch.Tensor
    first: torch.Tensor | None
    mask: torch.Tensor | None

    def run(self, backend: str) -> torch.Tensor:
        case, device = self.case, self.q.device
        with unwritten_is_nan():
            return coded_attention(
                self.q,
                self.keys,
                self.values,
                self.factors,
                RopeTables(case.inv_freq()),
                filled=torch.tensor([case.filled], dtype=torch.int32, device=device),
                coded=torch.tensor([case.coded], dtype=torch.int32, device=device),
                scale=case.dim**-0.5,
                first=self.first,
                mask=self.mask,
                backend=backend,
            )

    def exact(self) -> torch.Tensor:
        """The result in float64 from the latents, head by head and with complex rotations."""
        case, device = self.case, self.q.device
        half, group = case.dim // 2, case.heads // len(self.factors.ranks)
        slot = torch.arange(case.filled, device=device, dtype=torch.float64)
        angle = slot[:, None] * case.inv_freq().to(device)
        turn = torch.polar(torch.ones_like(angle), angle)
        q = torch.complex(self.q[..., :half].double(), self.q[..., half:].double())
        parts = []
        for head, rank in enumerate(self.factors.ranks):
            channels = self.factors.key_index[head, :rank]
            key = self.x[..., channels] @ self.factors.key_up[head, :, :rank].double().T
            if self.factors.key_bias is not None:
                key = key + self.factors.key_bias[head].double()
            turned = torch.complex(key[..., :half], key[..., half:]) * turn
            mine = q[:, head * group : (head + 1) * group]
            parts.append(torch.einsum("bgqd,bld->bgql", mine, turned.conj()).real)
        scores = torch.cat(parts, 1) * case.dim**-0.5
        whole = torch.arange(case.filled, device=device)
        own = case.filled - case.queries + torch.arange(case.queries, device=device)
        seen = (whole <= own[:, None]).expand(case.batch, 1, -1, -1)
        if self.first is not None:
            seen = seen & (whole >= self.first.view(-1, 1, 1, 1))
        if self.mask is not None:
            seen = seen & self.mask
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
        mixed = torch.einsum("bhql,blr->bhqr", p, self.z)
        up = self.factors.value_up.double().repeat_interleave(group, 0)
        return torch.einsum("bhqr,hdr->bhqd", mixed, up)


def draw(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Call:
    """Random codes, scales and rows; what no slot holds is 7 or all ones."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    owners = [h for _, counts in case.ranks for h, n in enumerate(counts) for _ in range(n)]
    n_heads, channels = len(case.ranks[0][1]), len(owners)
    members = [[c for c, h in enumerate(owners) if h == head] for head in range(n_heads)]
    ranks = tuple(map(len, members))
    index = torch.zeros(n_heads, max(ranks), dtype=torch.long)
    key_up = torch.zeros(n_heads, case.dim, max(ranks), device=device)
    for head, rank in enumerate(ranks):
        index[head, :rank] = torch.tensor(members[head])
        key_up[head, :, :rank] = normal(case.dim, rank) / rank**0.5
    value_rank = sum(n for _, n in case.values)

    def codec(side: str, sections: list[Section], blocks: list[int]) -> Codec:
        total = sum(s.channels for s in sections)
        groups = {"static": (), "row": (total,), "block": tuple(blocks)}[case.scales]
        layout = CodeLayout(side, tuple(sections), groups)  # type: ignore[arg-type]
        bits = layout.bits(device).float()
        step = 2.5 * 2**-bits * (0.5 + torch.rand(total, generator=generator, device=device))
        return Codec(layout, step, torch.ones_like(step), "rms", case.zero)  # type: ignore[arg-type]

    key_sections = [Section(bits, sum(counts)) for bits, counts in case.ranks]
    key_blocks = [n for _, counts in case.ranks for n in counts if n]
    value_sections = [Section(*s) for s in case.values]
    codes = LayerCodes(
        codec("key", key_sections, key_blocks),
        codec("value", value_sections, [n for _, n in case.values]),
        case.sinks,
        case.window,
    )
    factors = CodedFactors(
        codes,
        index.to(device),
        ranks,
        key_up.to(dtype),
        normal(n_heads, case.dim).to(dtype) if case.bias else None,
        (normal(n_heads, case.dim, value_rank) / value_rank**0.5).to(dtype),
    )
    found, sides = [], []
    room = tiles(case.filled)
    for side, count in ((codes.keys, channels), (codes.values, value_rank)):
        layout, (_, least, most) = side.layout, side.levels
        span = torch.rand(case.batch, case.filled, count, generator=generator, device=device)
        drawn = (least + span * (most - least + 1)).floor().clamp(max=most).to(torch.uint8)
        scales = torch.full(
            (case.batch, room, layout.scales, TILE), 7.0, dtype=torch.float16, device=device
        )
        slot = torch.arange(case.filled, device=device)
        g = 0.5 + torch.rand(
            case.batch, case.filled, layout.scales, generator=generator, device=device
        )
        scales[:, slot // TILE, :, slot % TILE] = g.half().transpose(0, 1)
        buffer = torch.full(
            (case.batch, room, layout.tile_bytes), 255, dtype=torch.uint8, device=device
        )
        pack(drawn, 0, buffer, layout)
        latents = side.dequantise(drawn, g.half()).double()
        rows = torch.zeros(
            case.batch, case.sinks + case.window, row_width(count), dtype=dtype, device=device
        )
        inner = rows[..., :count]
        inner.normal_(generator=generator)
        latents[:, : case.sinks] = inner[:, : min(case.sinks, case.filled)].double()
        recent = slot[max(case.coded, case.sinks) :]
        latents[:, recent] = inner[:, case.sinks + recent % max(case.window, 1)].double()
        found.append(latents)
        sides.append(Coded(buffer, scales, rows))
    first = mask = None
    if case.padded:
        share = torch.arange(1, case.batch + 1, device=device) / (case.batch + 1)
        first = (share * case.filled).int()
        first[-1] = case.filled if case.batch > 2 else first[-1]
    if case.holes:
        shape = (case.batch, 1, case.queries, case.filled)
        mask = torch.rand(shape, generator=generator, device=device) > 0.2
    q = normal(case.batch, case.heads, case.queries, case.dim).to(dtype)
    return Call(case, q, sides[0], sides[1], factors, found[0], found[1], first, mask)


CASES = {
    "four bits": Case(3, 64, ((4, (9, 20, 5)),), ((4, 70),), 700, 668),
    "two": Case(2, 32, ((2, (9, 30)),), ((2, 21),), 530, 498, batch=2, bias=False),
    "three": Case(2, 48, ((3, (17, 3)),), ((3, 40),), 300, 268, zero="tread"),
    "eight": Case(2, 32, ((8, (1, 16)),), ((8, 33),), 129, 97, sinks=0),
    "mixed": Case(
        3,
        64,
        ((4, (4, 2, 3)), (3, (9, 0, 12))),
        ((8, 3), (4, 40), (2, 30)),
        1100,
        1068,
        padded=True,
        batch=3,
    ),
    "many heads": Case(20, 32, ((4, (3,) * 20), (2, (2,) * 20)), ((3, 24),), 200, 168),
    "cut heads": Case(2, 64, ((4, (70, 90)),), ((4, 65),), 300, 268, scales="row"),
    "block scales": Case(
        3,
        32,
        ((4, (2, 1, 3)), (3, (6, 9, 4))),
        ((4, 8), (3, 30)),
        600,
        568,
        scales="block",
        zero="tread",
    ),
    "grouped": Case(8, 64, ((4, (33, 20)),), ((4, 50),), 700, 668, batch=2, padded=True),
    "grouped mixed": Case(
        6, 48, ((4, (8, 20)), (3, (9, 30))), ((4, 20), (3, 21)), 600, 568, scales="row", holes=True
    ),
    "grouped blocks": Case(
        4, 32, ((8, (3, 5)), (2, (9, 3))), ((8, 4), (2, 9)), 520, 488, scales="block"
    ),
    "several queries": Case(
        4, 32, ((4, (9, 12)),), ((4, 20),), 333, 301, queries=5, holes=True, padded=True, batch=2
    ),
    "nothing coded": Case(2, 32, ((4, (9, 12)),), ((4, 20),), 20, 0),
    "nothing exact": Case(2, 32, ((4, (9, 12)),), ((4, 20),), 140, 140, sinks=0, window=0),
    "after a crop": Case(2, 32, ((4, (9, 12)),), ((4, 20),), 200, 195),
    "long window": Case(2, 32, ((4, (9, 12)),), ((4, 20),), 400, 200, window=200, sinks=5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference(case: Case) -> None:
    call = draw(replace(case), torch.float32, CPU, seed=1)
    assert relative_error(call.run("reference"), call.exact()) < 10 * FP32_TABLE


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels(case: Case) -> None:
    call = draw(case, torch.float16, CPU, seed=2)
    assert relative_error(call.run("triton"), call.exact()) < CODED_OP


def test_what_does_not_fit_is_listed() -> None:
    call = draw(CASES["two"], torch.float16, CPU, seed=1)
    keys = Coded(call.keys.codes[..., 1:], call.keys.scales.float(), call.keys.exact)
    with pytest.raises(ValueError, match=r"keys.codes \[2, 2, .*; keys.scales .*float32") as found:
        replace(call, keys=keys).run("reference")
    assert "values" not in str(found.value)
