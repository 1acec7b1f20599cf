"""Turned queries and stored latents, interpreted without a GPU, against plain mathematics."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from tests.latent_case import unwritten_is_nan
from tests.tolerances import FP64_OP
from triton_ops.latent_attention import RopeTables
from triton_ops.rope_append import rope_append

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
HALF_DIGIT = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


@dataclass(frozen=True)
class Case:
    """One call: shapes, dtypes, and how the tensors lie in memory.

    Attributes:
        heads, dim: query heads and their dimension.
        key_width, value_width: channels stored of each token.
        filled: slots filled, the new tokens included.
        padding: numbers that follow the channels in rows of the buffers.
        spread: q, keys, values and buffers are cut out of larger tensors.
        factor: RoPE's factor.
    """

    heads: int
    dim: int
    key_width: int
    value_width: int
    filled: int
    batch: int = 1
    tokens: int = 1
    padding: int = 0
    spread: bool = False
    factor: float = 1.0
    dtype: torch.dtype = torch.float16
    stored: torch.dtype = torch.float16
    room: int = 70


@dataclass(frozen=True)
class Call:
    """A case with its tensors. The buffers are NaN all over."""

    case: Case
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    buffers: tuple[torch.Tensor, torch.Tensor]
    whole: tuple[torch.Tensor, torch.Tensor]
    tables: tuple[torch.Tensor, torch.Tensor]

    def run(self, backend: str) -> torch.Tensor:
        """The turned queries; memory that the op allocates comes filled with NaN."""
        with unwritten_is_nan():
            return rope_append(
                self.q,
                self.keys,
                self.values,
                *self.buffers,
                *self.tables,
                filled=torch.tensor([self.case.filled], dtype=torch.int32, device=self.q.device),
                backend=backend,
            )

    def exact(self) -> torch.Tensor:
        """The turned queries in float64, as complex numbers at their exact slots."""
        case, half = self.case, self.case.dim // 2
        slots = torch.arange(case.filled - case.tokens, case.filled, dtype=torch.float64)
        angle = slots[:, None] * inv_freq(case.dim)
        turn = torch.polar(torch.full_like(angle, case.factor), angle).to(self.q.device)
        q = self.q.double()
        turned = torch.complex(q[..., :half], q[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def check(self, turned: torch.Tensor) -> None:
        """Queries turned to half a last digit; every latent in its place, and nothing else."""
        case = self.case
        assert turned.is_contiguous() and turned.dtype == case.dtype
        want = self.exact()
        size = self.q.double().unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 1, 1, 2) * case.factor
        bound = (HALF_DIGIT[case.dtype] + FP64_OP) * size
        assert bool(((turned.double() - want).abs() <= bound).all())
        for buffer, rows, whole in zip(
            self.buffers, (self.keys, self.values), self.whole, strict=True
        ):
            new = buffer[:, case.filled - case.tokens : case.filled, : rows.shape[-1]]
            assert torch.equal(new, rows.to(case.stored))
            assert int((~whole.isnan()).sum()) == rows.numel()


def inv_freq(dim: int) -> torch.Tensor:
    """Float64 ``[D / 2]``."""
    return 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def draw(case: Case, device: str = "cpu") -> Call:
    """Random queries and latents, as a model makes them: tokens before heads."""
    generator = torch.Generator(device).manual_seed(1)
    more = 3 if case.spread else 0

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator, device=device)
        return made.to(case.dtype)

    def buffer(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = case.batch + more, case.room + more, width + case.padding + more
        whole = torch.full(shape, float("nan"), device=device, dtype=case.stored)
        stop = width + case.padding + 1 if case.spread else None
        part = whole[1:, 2:, 1:stop] if case.spread else whole
        return whole, part[: case.batch, : case.room]

    q = normal(case.batch + more, case.tokens + more, case.heads + more, case.dim + 2 * more)
    at = more // 3
    q = q[at : at + case.batch, at : at + case.tokens, at : at + case.heads, at : at + case.dim]
    both = normal(case.batch, case.tokens, case.key_width + case.value_width)
    keys, values = both.split((case.key_width, case.value_width), -1)
    wholes, parts = zip(
        *(buffer(width) for width in (case.key_width, case.value_width)), strict=True
    )
    tables = RopeTables(inv_freq(case.dim), case.factor).slots(case.room, torch.device(device))
    return Call(case, q.transpose(1, 2), keys, values, parts, wholes, tables)


CASES = {
    "one": Case(1, 32, 1, 1, 1),
    "last-slot": Case(5, 128, 37, 1030, 70, batch=3, padding=3),
    "spread": Case(4, 80, 8, 24, 9, batch=2, tokens=3, padding=5, spread=True, factor=1.3),
    "sixteen": Case(33, 96, 2050, 12, 16, batch=2, tokens=16, padding=6),
    "wide": Case(9, 256, 20, 7, 65, batch=2, tokens=2, spread=True),
    "odd-half": Case(3, 50, 20, 7, 40, tokens=5),
    "fp32": Case(3, 64, 20, 7, 33, dtype=torch.float32),
}
# Compiled only: the interpreter cuts numbers off to bfloat16 where a GPU rounds them.
BF16_CASES = {
    "bf16": Case(5, 128, 37, 1030, 70, 3, padding=3, dtype=torch.bfloat16, stored=torch.bfloat16),
    "fp16-stored-bf16": Case(3, 64, 20, 7, 33, padding=1, stored=torch.bfloat16),
    "bf16-stored-fp16": Case(3, 64, 20, 7, 33, tokens=2, dtype=torch.bfloat16),
    "fp32-stored-bf16": Case(3, 64, 20, 7, 33, dtype=torch.float32, stored=torch.bfloat16),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_queries_and_latents(case: Case, backend: str) -> None:
    call = draw(case)
    call.check(call.run(backend))


@pytest.mark.parametrize("case", BF16_CASES.values(), ids=BF16_CASES)
def test_reference_in_bfloat16(case: Case) -> None:
    call = draw(case)
    call.check(call.run("reference"))


@needs_triton
def test_the_kernel_is_launched_on_the_gpu_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_ops.rope_append import kernels, op

    inside: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            assert inside == [torch.device("cpu")]
            return lambda *args, **options: None

    monkeypatch.setattr(op, "launching_on", guard)
    monkeypatch.setattr(kernels, "rope_append", Kernel())
    draw(CASES["one"]).run("triton")
    assert not inside


@needs_triton
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backends_agree_bit_for_bit(case: Case) -> None:
    assert torch.equal(draw(case).run("triton"), draw(case).run("reference"))


def test_every_wrong_shape_is_listed() -> None:
    call = draw(Case(2, 32, 20, 7, 33, batch=2, tokens=3))
    wrong = replace(
        call,
        q=call.q[..., :31],
        keys=call.keys[:, :2],
        values=call.values[:1],
        buffers=(call.buffers[0][..., :19], call.buffers[1][:, :60]),
        tables=(call.tables[0], call.tables[1][:69]),
    )
    with pytest.raises(ValueError) as caught:
        wrong.run("reference")
    for part in (
        "keys [2, 2, 20], expected [2, 3, 20]",
        "values [1, 3, 7], expected [2, 3, 7]",
        "key_latents [2, 70, 19], expected [2, 70, 20]",
        "value_latents [2, 60, 7], expected [2, 70, 7]",
        "cos [70, 32], expected [70, 31]",
        "sin [69, 32], expected [70, 31]",
        "head dimension 31, RoPE takes an even one",
    ):
        assert part in str(caught.value)
    assert all(bool(whole.isnan().all()) for whole in call.whole)


def test_what_the_kernel_cannot_read_is_listed() -> None:
    call = draw(Case(2, 32, 20, 7, 33))
    cos, sin = call.tables
    wrong = replace(
        call, q=call.q.repeat(1, 1, 1, 2)[..., ::2], tables=(cos.double(), sin.repeat(1, 2)[:, :32])
    )
    with pytest.raises(ValueError) as caught:
        wrong.run("triton")
    for part in (
        "q has numbers 2 apart, expected 1",
        "cos torch.float64, expected torch.float32",
        "sin has gaps between its rows",
    ):
        assert part in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES.values(), *BF16_CASES.values()], ids=str)
def test_compiled(case: Case) -> None:
    """The compiled kernel, and bit for bit the reference on the same GPU."""
    call = draw(case, "cuda")
    turned = call.run("triton")
    call.check(turned)
    assert torch.equal(turned, draw(case, "cuda").run("reference"))


@pytest.mark.gpu
def test_beyond_32_bits() -> None:
    """The last slots of a million, in buffers of more numbers than an int32 counts."""
    room = 2**20
    call = draw(Case(2, 32, 2100, 2056, room, batch=1, tokens=2, room=room), "cuda")
    call.check(call.run("triton"))
