"""Latent attention, interpreted without a GPU, against plain mathematics in float64."""

from __future__ import annotations

import importlib.util
import math
import random
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal, localcontext
from itertools import accumulate

import pytest
import torch

from tests.latent_case import Call, Case, draw, relative_error
from tests.tolerances import (
    FP16_BAND_LARGE,
    FP16_OP,
    FP16_REBUILT_LARGE,
    FP16_TABLE,
    FP32_TABLE,
    FP64_OP,
)
from triton_ops.backends import choose_backend, launching_on
from triton_ops.latent_attention import KeyLayout, LatentFactors, RopeTables
from triton_ops.latent_attention.layout import ALIGN, PIECE, PIECE_HEADS, two_powers
from triton_ops.latent_attention.tuning import Tuning, splits_of, workspace_bytes

# The interpreter computes both sides of a where: 1 / 0 for queries that attend to nothing.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)

# One query token and one query head per key head: scores without rebuilt keys.
BAND = {
    "one-slot": Case(1, 32, (1,), 1, 1),
    "ragged": Case(4, 64, (5, 40, 33, 1), 20, 63, batch=3, bias=True, padded=True),
    "full": Case(2, 128, (23, 41), 8, 256, llama3=True, theta=5e5),
    "yarn": Case(2, 96, (11, 64), 37, 65, batch=3, bias=True, factor=1.3, holes=True),
    "pieces": Case(33, 32, (3, *(2, 1, 4) * 10, 5, 7), 9, 130, bias=True, theta=1e6),
    "wide": Case(2, 256, (20, 9), 13, 260, holes=True),
    "cut-twice": Case(3, 80, (7, 140, 2), 12, 385, batch=2, bias=True, padded=True, holes=True),
}
# Grouped queries, several query tokens, or heads that share channels: rebuilt keys.
REBUILT = {
    "one-slot": Case(2, 32, (1,), 1, 1, bias=True),
    "gqa": Case(8, 64, (5, 33), 70, 65, batch=3, bias=True, llama3=True, padded=True),
    "mqa": Case(6, 80, (75,), 37, 130, queries=2, holes=True, factor=1.3),
    "five": Case(2, 32, (1, 20), 12, 63, batch=3, queries=5, bias=True, padded=True),
    "sixteen": Case(5, 96, (12,), 17, 64, queries=16, theta=1e6, holes=True),  # over 64 columns
    "nothing-before": Case(2, 128, (23,), 8, 16, batch=2, queries=16, padded=True),
    "shared": Case(4, 128, (20, 20, 9, 9), 24, 65, starts=(0, 0, 20, 20), bias=True),
    "wide": Case(4, 256, (3, 126), 13, 260, bias=True, padded=True, holes=True),
}


@needs_triton
@pytest.mark.parametrize("case", BAND.values(), ids=BAND)
def test_scores_without_rebuilt_keys(case: Case) -> None:
    call = draw(case, torch.float16, CPU, seed=1)
    assert call.factors.band is not None and case.heads == len(case.ranks)
    assert relative_error(call.run("triton"), call.exact()) < FP16_OP


@needs_triton
@pytest.mark.parametrize("case", REBUILT.values(), ids=REBUILT)
def test_scores_of_rebuilt_keys(case: Case) -> None:
    call = draw(case, torch.float16, CPU, seed=2)
    assert relative_error(call.run("triton"), call.exact()) < FP16_OP


@needs_triton
@pytest.mark.parametrize(("at_once", "filled"), [(1, 530), (64, 1000)])
@pytest.mark.parametrize("queries", [1, 2])
def test_splits_of_the_sequence(queries: int, at_once: int, filled: int) -> None:
    """Programs that take several tiles; some splits are empty, or all are used."""
    from triton_ops.latent_attention.launch import latent_attention_triton

    case = Case(2, 32, (9, 70), 21, filled, batch=2, queries=queries, bias=True, padded=True)
    call = draw(case, torch.float16, CPU, seed=3, room=1024)
    assert call.first is not None
    got = latent_attention_triton(
        call.q,
        call.keys,
        call.values,
        call.factors,
        RopeTables(case.inv_freq()),
        call.filled,
        call.first,
        None,
        case.dim**-0.5,
        Tuning(processors=at_once),
    )
    assert relative_error(got, call.exact()) < FP16_OP


@pytest.mark.parametrize("tiles", [1, 7, 32, 256, 1024])
@pytest.mark.parametrize("others", [1, 10, 160, 272, 3000])
def test_splits_cover_the_sequence_and_fill_waves(tiles: int, others: int) -> None:
    splits, per = splits_of(tiles, others, 264)
    assert (splits - 1) * per < tiles <= splits * per
    waves = -(-others * splits // 264)
    for other in range(1, min(tiles, 64) + 1):  # none ends sooner
        each = -(-tiles // other)
        assert waves * (per + 1) <= -(-others * -(-tiles // each) // 264) * (each + 1)


@needs_triton
@pytest.mark.parametrize(("queries", "bound"), [(1, FP16_BAND_LARGE), (3, FP16_REBUILT_LARGE)])
def test_large_scores_keep_their_order(queries: int, bound: float) -> None:
    """Scores of hundreds: tiles differ by more than any exponent holds."""
    call = draw(Case(2, 64, (17, 9), 8, 300, queries=queries), torch.float16, CPU, seed=4)
    call = replace(call, q=call.q * 100)
    got = call.run("triton")
    assert bool(got.isfinite().all())
    assert relative_error(got, call.exact()) < bound


@needs_triton
@pytest.mark.parametrize("nats", [11.0, 17.5, 21.0])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("at", [3, 700])
def test_what_lies_far_below_a_sink_is_kept(at: int, queries: int, nats: float) -> None:
    """A sink of value 0: all of the output comes from slots ``nats`` below, in its tile and out."""
    # One slow frequency pair carries the scores, so that RoPE leaves them as they are.
    case = Case(1, 32, (1,), 8, 900, queries=queries, theta=1e15)
    call = draw(case, torch.float16, CPU, seed=10)
    call.factors.key_up.zero_()
    call.factors.key_up[0, 15, 0] = 1.0
    q = torch.zeros_like(call.q)
    q[..., 15] = 32**0.5
    call.keys[:, :900, 0] = 0.0
    call.keys[:, at, 0] = nats
    call.values[:, :900, :8] = 2.0**15 + 2.0**13 * call.values[:, :900, :8].clamp(-2, 2)
    call.values[:, at] = 0.0
    call = replace(call, q=q)
    want = call.exact()
    assert float(want.abs().max()) > 2.0**-10  # far from what fp16 cannot hold
    assert relative_error(call.run("triton"), want) < FP16_OP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("case", [*BAND.values(), *REBUILT.values()], ids=str)
def test_reference(case: Case, dtype: torch.dtype) -> None:
    call = draw(case, dtype, CPU, seed=5)
    bound = FP16_OP if dtype == torch.float16 else FP64_OP
    assert relative_error(call.run("reference"), call.exact()) < bound


def test_reference_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton_ops.latent_attention.op.REFERENCE_TILE", 7)
    case = Case(4, 32, (5, 9), 11, 65, batch=3, queries=3, bias=True, padded=True, holes=True)
    call = draw(case, torch.float32, CPU, seed=6)
    assert relative_error(call.run("reference"), call.exact()) < FP64_OP


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_nothing_to_attend_to_gives_zeros(backend: str) -> None:
    case = Case(2, 32, (5,), 11, 20, batch=2, queries=2, padded=True, holes=True)
    call = draw(case, torch.float16, CPU, seed=7)
    assert call.mask is not None
    call.mask[0, :, 0] = False
    got = call.run(backend)
    assert bool(got.isfinite().all())
    assert not got[1].any()  # padded to its end
    assert not got[0, :, 0].any() and got[0, :, 1:].any()  # the mask hides all of its first query


@needs_triton
@pytest.mark.parametrize("case", [*BAND.values(), *REBUILT.values()], ids=str)
def test_memory_of_a_call_is_known_before(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton_ops.latent_attention.launch as launch

    made: list[torch.Tensor] = []

    class Recorder:
        """torch, but for what it allocates; kernels are not run."""

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            made.append(torch.empty(*shape, dtype=dtype, device=device))
            return made[-1]

        def empty_like(self, other: torch.Tensor) -> torch.Tensor:
            return self.empty(*other.shape, dtype=other.dtype, device=other.device)

    class Kernels:
        def __getattr__(self, name: str) -> object:
            return defaultdict(lambda: lambda *args, **options: None)

    monkeypatch.setattr(launch, "torch", Recorder())
    monkeypatch.setattr(launch, "kernels", Kernels())
    call = draw(case, torch.float16, CPU, seed=12, room=4096)
    call.run("triton")
    assert sum(t.nbytes for t in made) == workspace_bytes(
        call.factors.layout,
        case.bias,
        case.value_rank,
        batch=case.batch,
        heads=case.heads,
        dim=case.dim,
        room=4096,
        n_query=case.queries,
    )


# Tables.


def _turn(position: int, half: bool, freq: float) -> tuple[float, float]:
    """Cos and sin of ``(position + half / 2) * freq`` by 60-digit arithmetic."""
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
    with localcontext() as context:
        context.prec = 60
        angle = float((Decimal(position) + Decimal(half) / 2) * Decimal(freq) % (2 * pi))
    return math.cos(angle), math.sin(angle)


@pytest.mark.parametrize("kind", ["band", "rebuilt"])
def test_tables_of_tiles_at_a_million_tokens(kind: str) -> None:
    """Angles of the far end are as exact as those of the start, and add up to the slots' own."""
    tile, slots, dim, factor = 128, 2**20, 80, 1.25
    inv_freq = Case(1, dim, (1,), 1, 1).inv_freq()
    rope = RopeTables(inv_freq, factor)
    make = rope.band if kind == "band" else rope.rebuilt
    make(tile, 3, CPU)
    cos, sin, cos_at, sin_at = make(tile, slots // tile, CPU)  # grown
    middle = kind == "band"
    bound = FP16_TABLE if middle else FP32_TABLE
    for index in (0, 1, slots // tile - 1):
        place = index * tile + (tile // 2 - 1 if middle else 0)
        for i in range(dim // 2):
            want = _turn(place, middle, float(inv_freq[i]))
            assert float(cos_at[index, i]) == pytest.approx(factor * want[0], abs=bound)
            assert float(sin_at[index, i]) == pytest.approx(factor * want[1], abs=bound)
    for j in (0, 1, len(cos) - 1):
        for i in range(dim // 2):
            want = _turn(j, middle, float(inv_freq[i]))
            assert float(cos[j, i]) == pytest.approx(want[0], abs=FP16_TABLE)
            assert float(sin[j, i]) == pytest.approx(want[1], abs=FP16_TABLE)
    assert cos.shape == (tile // 2 if middle else tile, 64) and cos_at.shape[1] == 64
    assert not cos[:, dim // 2 :].any() and not sin_at[:, dim // 2 :].any()


def test_tables_of_slots_at_a_million_tokens() -> None:
    inv_freq = Case(1, 8, (1,), 1, 1).inv_freq()
    rope = RopeTables(inv_freq, 1.25)
    rope.slots(5, CPU)
    cos, sin = rope.slots(2**20, CPU)
    assert cos.shape == sin.shape == (2**20, 8)
    for slot in (0, 1, 2**20 - 1):
        for i in range(4):
            want = [1.25 * t for t in _turn(slot, False, float(inv_freq[i]))]
            for half in (i, i + 4):
                found = [float(cos[slot, half]), float(sin[slot, half])]
                assert found == pytest.approx(want, abs=FP32_TABLE)


def test_tables_that_growth_replaces_stay_while_they_are_held() -> None:
    rope = RopeTables(Case(1, 8, (1,), 1, 1).inv_freq())

    def made(tiles: int) -> list[weakref.ref[torch.Tensor]]:
        tables = (*rope.slots(256 * tiles, CPU), *rope.band(128, tiles, CPU))
        tables += rope.rebuilt(64, tiles, CPU)
        return [weakref.ref(t if t._base is None else t._base) for t in tables]

    small = made(2)
    held = rope.held()
    made(5)
    assert all(t() is not None for t in small)
    del held
    assert not any(t() is not None for t in small)


# Layout.


def test_two_powers_are_the_least_sum() -> None:
    powers = [16, 32, 64, 128, 256, 512, 1024]
    sums = [a + b for a in powers for b in (0, *powers) if b < a]
    for n in range(1, 700):
        whole, more = two_powers(n)
        assert whole in powers and more in (0, *powers) and more < whole
        assert whole + more == min(s for s in sums if s >= n), n


def _layouts() -> list[KeyLayout]:
    draws = random.Random(0)
    found = []
    for _ in range(100):
        ranks = tuple(draws.randint(1, 90) for _ in range(draws.randint(1, 40)))
        found.append(KeyLayout.side_by_side(ranks))
        pairs = KeyLayout.side_by_side(ranks)
        twice = KeyLayout(
            tuple(r for r in ranks for _ in range(2)),
            tuple(s for s in pairs.starts for _ in range(2)),
        )
        found.append(twice)
    return found


@pytest.mark.parametrize("layout", _layouts()[:2], ids=["side by side", "shared"])
def test_channels_of_a_row(layout: KeyLayout) -> None:
    used = {c for s, r in zip(layout.starts, layout.ranks, strict=True) for c in range(s, s + r)}
    assert used == set(range(layout.channels))


@pytest.mark.parametrize("bias", [False, True])
def test_pieces_hold_every_channel_and_key_bias_once(bias: bool) -> None:
    for layout in _layouts():
        pieces = layout.pieces(bias)
        if pieces is None:
            assert len(set(layout.starts)) < len(layout.starts)
            continue
        ends = list(accumulate(layout.ranks))
        owner = [h for h, rank in enumerate(layout.ranks) for _ in range(rank)]
        channel = segments = 0
        biased: list[int] = []
        for piece in pieces:
            assert piece.first == channel < piece.end
            assert piece.load % ALIGN == 0 and piece.first < piece.load + ALIGN
            assert piece.head == owner[piece.first] and piece.segment == segments
            assert piece.heads == owner[piece.end - 1] - piece.head + 1 <= PIECE_HEADS
            ended = [h for h, end in enumerate(ends) if piece.first < end <= piece.end]
            assert piece.biases == (len(ended) if bias else 0)
            assert ended[:1] in ([], [piece.head])
            lanes = piece.end - piece.load + piece.biases
            # Full, by lanes (a channel and its head's bias may not fit) or heads, but for the last.
            assert lanes <= PIECE
            full = lanes >= PIECE - bias or piece.heads == PIECE_HEADS
            assert full or piece.end == layout.channels
            biased += ended
            channel, segments = piece.end, segments + piece.heads
        assert channel == layout.channels and biased == list(range(len(ends)))


def test_buckets_load_every_head_and_no_more_than_needed() -> None:
    for layout in _layouts():
        heads = []
        for (k, more), entries in layout.buckets().items():
            for head, first in entries:
                start, rank = layout.starts[head], layout.ranks[head]
                assert first % ALIGN == 0 and first <= start < first + ALIGN
                assert (k, more) == two_powers(start - first + rank)
                heads.append(head)
        assert sorted(heads) == list(range(len(layout.ranks)))


# Backends and faults.


def test_backend_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose_backend(None, CPU) == "reference"
    assert choose_backend("reference", CPU) == "reference"
    with pytest.raises(ValueError, match="cannot run: the device is cpu; use reference"):
        choose_backend("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU) == "triton"
    assert choose_backend(None, CPU) == "reference"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "reference"), ((9, 0), "triton")])
def test_backend_on_a_gpu(
    capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert choose_backend(None, gpu) == chosen
    assert choose_backend("reference", gpu) == "reference"
    if chosen == "reference":
        with pytest.raises(ValueError, match=r"compute capability 7\.5, 8\.0 is needed"):
            choose_backend("triton", gpu)


def test_backend_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_backend(None, torch.device("cuda")) == "reference"
    with pytest.raises(ValueError, match="triton is not installed"):
        choose_backend("triton", torch.device("cuda"))
    with pytest.raises(ValueError, match="'cuda': use one of reference, triton"):
        choose_backend("cuda", torch.device("cuda"))


def test_triton_launches_on_the_gpu_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(wanted)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda:1")
    with launching_on(second):
        assert entered == [second]
    with launching_on(CPU):
        assert not entered


@needs_triton
def test_the_kernels_are_launched_under_that_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton_ops.latent_attention.launch as launch
    import triton_ops.latent_attention.op as op

    inside: list[torch.device] = []

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def launched(q: torch.Tensor, *args: object) -> torch.Tensor:
        assert inside == [q.device]
        return q

    monkeypatch.setattr(op, "launching_on", guard)
    monkeypatch.setattr(launch, "latent_attention_triton", launched)
    call = _call()
    assert call.run("triton") is call.q and not inside


def _call() -> Call:
    case = Case(4, 32, (5, 9), 11, 20, batch=2, bias=True, padded=True, holes=True)
    return draw(case, torch.float16, CPU, seed=8)


def test_every_wrong_shape_is_listed() -> None:
    call = _call()
    factors = call.factors
    assert factors.key_bias is not None and call.first is not None and call.mask is not None
    wrong = replace(
        call,
        q=call.q[:, :3],
        keys=call.keys[..., :8],
        values=call.values[:, :255],
        factors=LatentFactors(
            factors.layout, factors.key_up[:1], factors.key_bias[:, :16], factors.value_up[:, :16]
        ),
        filled=call.filled.repeat(2),
        first=call.first[:1],
        mask=call.mask[:1],
    )
    with pytest.raises(ValueError) as caught:
        wrong.run("reference")
    for part in (
        "key_latents [2, 256, 8], expected [2, 256, 16]",
        "value_latents [2, 255, 16], expected [2, 256, 16]",
        "key_up [1, 32, 9], expected [2, 32, 9]",
        "key_bias [2, 16], expected [2, 32]",
        "value_up [2, 16, 11], expected [2, 32, 11]",
        "filled [2], expected [1]",
        "first [1], expected [2]",
        "mask [1, 1, 1, 20], expected [2, 1, 1, 20]",
        "3 query heads do not divide among 2 key heads",
    ):
        assert part in str(caught.value)


def test_what_the_kernels_cannot_read_is_listed() -> None:
    call = _call()
    factors = replace(call.factors, value_up=call.factors.value_up.float())
    wide = torch.zeros(2, 255, 24, dtype=torch.float16)
    wrong = replace(call, keys=wide[..., :16], values=wide[..., 1:17], factors=factors)
    with pytest.raises(ValueError) as caught:
        wrong.run("triton")
    for part in (
        "255 slots, the triton backend takes a multiple of 256",
        "key_latents has rows 24 apart, expected 16",
        "value_latents has rows 24 apart, expected 16",
        "value_up torch.float32, expected torch.float16 as key_latents",
    ):
        assert part in str(caught.value)


def test_masks_are_true_or_false() -> None:
    call = _call()
    assert call.mask is not None
    for backend in ("reference", "triton"):
        with pytest.raises(ValueError, match="mask torch.float32, expected torch.bool"):
            replace(call, mask=call.mask.float()).run(backend)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_slots_beyond_a_mask_are_hidden(backend: str) -> None:
    call = draw(Case(2, 32, (9, 4), 8, 300, queries=2, holes=True), torch.float16, CPU, seed=11)
    assert call.mask is not None
    hidden = call.mask.clone()
    hidden[..., 270:] = False
    want = replace(call, mask=hidden)
    # What follows in memory is all True.
    around = torch.ones(*call.mask.shape[:3], 900, dtype=torch.bool)
    around[..., :270] = call.mask[..., :270]
    short = replace(call, mask=around[..., :270])
    assert torch.equal(short.run(backend), want.run(backend))
    assert relative_error(short.run(backend), want.exact()) < FP16_OP


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("queries", [1, 2])
def test_keys_of_hidden_slots_may_be_anything(queries: int, backend: str) -> None:
    case = Case(2, 32, (9, 4), 8, 300, 2, queries, bias=True, padded=True, holes=True)
    call = draw(case, torch.float16, CPU, seed=13)
    assert call.mask is not None and call.first is not None
    want = call.exact()
    before = torch.arange(call.keys.shape[1]) < call.first[:, None]
    before[:, :300] |= ~call.mask.any(2)[:, 0]
    call.keys[before] = float("nan")
    assert relative_error(call.run(backend), want) < FP16_OP


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tables_are_of_the_heads_dimension(backend: str) -> None:
    call = _call()
    wrong = replace(call, case=replace(call.case, dim=64))
    with pytest.raises(ValueError, match="head dimension 32, the tables have 64"):
        wrong.run(backend)


def test_the_kernels_take_16_bits() -> None:
    call = draw(_call().case, torch.float32, CPU, seed=8)
    with pytest.raises(ValueError, match=r"key_latents torch.float32, the triton backend takes 16"):
        call.run("triton")


@needs_triton
def test_masks_of_any_stride() -> None:
    call = draw(Case(1, 32, (9,), 8, 70, queries=2, holes=True), torch.float16, CPU, seed=9)
    assert call.mask is not None
    spread = replace(call, mask=torch.stack((call.mask, ~call.mask), dim=-1)[..., 0])
    assert relative_error(spread.run("triton"), call.exact()) < FP16_OP
