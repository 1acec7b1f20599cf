"""The captured decode step: what needs no GPU here, the graph itself under the mark ``gpu``."""

from __future__ import annotations

import copy
import gc
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from starkv_core import attention
from starkv_core.attention import latents
from starkv_core.cache import LatentCache, Step
from starkv_core.decode import CapturedStep, CaptureError
from starkv_core.embedded import HELDOUT_TEXT
from starkv_core.engine import Sampler, end_tokens, stream
from starkv_core.graphs import capture
from starkv_core.models import load
from starkv_core.run import Subject
from tests import models
from tests.tolerances import FP16_LATENTS, FP32_LOGITS, NEAR_TIE

CODED = {"bits": (4, 3), "sinks": 2, "window": 7}


def subject_of(kind: str, skip: int | None = None) -> Subject:
    """A small random model, one layer left dense if asked, packed if asked."""
    start = {"slack": 0, "skip_layers": [] if skip is None else [skip]}
    subject = models.deployed(models.model(kind.removesuffix("-coded")), start=start)
    return models.coded(subject, **CODED) if kind.endswith("-coded") else subject


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llama-coded", "qwen2-coded"])
@pytest.mark.parametrize("skip", [None, 1])
def test_a_step_written_by_tensors_equals_a_plain_one(kind: str, skip: int | None) -> None:
    """What a graph replays, run without one: slot, counts and mask from tensors."""
    subject = subject_of(kind, skip)
    ids = models.ids(2, 40)
    with subject.active(), torch.no_grad():
        plain = subject.new_cache()
        subject.model(input_ids=ids[:, :30], past_key_values=plain, use_cache=True)
        stepped = copy.deepcopy(plain)
        stepped.reserve(2, 300, torch.device("cpu"))
        room = stepped.layers[0].room
        assert room == 512
        slot, filled = torch.tensor([30]), torch.tensor([31], dtype=torch.int32)
        stepped.set_step(Step(slot, filled, None))
        mask = (torch.arange(room) <= 30).expand(2, room)[:, None, None].clone()
        for position in range(30, 40):
            token = ids[:, position : position + 1]
            wanted = subject.model(input_ids=token, past_key_values=plain, use_cache=True).logits
            got = subject.model(
                input_ids=token,
                attention_mask=mask,
                position_ids=slot.expand(2, 1),
                past_key_values=stepped,
                use_cache=True,
            ).logits
            torch.testing.assert_close(got, wanted, rtol=0, atol=FP32_LOGITS)
            slot += 1
            filled += 1
            mask.index_fill_(3, slot, True)
        stepped.set_step(None)
        stepped.fill(40)
        # The cache goes on as any other.
        token = ids[:, :1]
        wanted = subject.model(input_ids=token, past_key_values=plain, use_cache=True).logits
        got = subject.model(input_ids=token, past_key_values=stepped, use_cache=True).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=FP32_LOGITS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "llama-coded"])
def test_steps_of_the_kernels_give_the_tokens_of_plain_ones(kind: str) -> None:
    """Interpreted: with padding, by a step's tensors and launched plainly, the same logits."""
    loaded = models.model(kind.removesuffix("-coded"), dtype=torch.float16)
    subject = models.deployed(loaded, dtype=torch.float16)
    if kind.endswith("-coded"):
        subject = models.coded(subject, **CODED)
    subject = replace(subject, backend="triton")
    ids, first = models.ids(2, 26), torch.tensor([0, 3], dtype=torch.int32)
    held = torch.arange(26) >= first[:, None]
    places = (held.cumsum(-1) - 1).clamp(min=0)
    with subject.active(), torch.no_grad():
        plain = subject.new_cache()

        def run(start: int, stop: int) -> torch.Tensor:
            return subject.model(
                input_ids=ids[:, start:stop],
                attention_mask=held[:, :stop].long(),
                position_ids=places[:, start:stop],
                past_key_values=plain,
                use_cache=True,
            ).logits

        run(0, 24)
        stepped = copy.deepcopy(plain)
        slot, filled = torch.tensor([24]), torch.tensor([25], dtype=torch.int32)
        stepped.set_step(Step(slot, filled, first))
        mask = torch.ones(2, 1, 1, stepped.layers[0].room, dtype=torch.bool)
        for position in (24, 25):
            got = subject.model(
                input_ids=ids[:, position : position + 1],
                attention_mask=mask,
                position_ids=slot - first.long()[:, None],
                past_key_values=stepped,
                use_cache=True,
            ).logits
            assert torch.equal(got, run(position, position + 1))
            slot += 1
            filled += 1
    for ours, theirs in zip(stepped.layers, plain.layers, strict=True):
        assert all(map(torch.equal, ours.tensors(), theirs.tensors()))


def test_latents_of_keys_and_values_come_from_one_matrix() -> None:
    """Its parts are views, for weights in use and for those of a student, which learn by it."""
    loaded = models.model("llama")
    weights = models.deployed(loaded, models.ragged_ranks(loaded)).weights[0]
    keys, values = len(weights.key_down), len(weights.value_down)
    assert keys % 8 and values % 8  # both are padded
    for part in (weights.key_down, weights.value_down):
        assert part.untyped_storage().data_ptr() == weights.down.untyped_storage().data_ptr()
    hidden = torch.randn(2, 3, weights.down.shape[1])
    found = latents(weights, hidden)
    for got, down in zip(found, (weights.key_down, weights.value_down), strict=True):
        torch.testing.assert_close(got, hidden @ down.T, rtol=0, atol=FP32_LOGITS)
        assert got.storage_offset() % 8 == 0
    live = models.student(loaded, models.recipe())
    trained = live.by_layer()[0]
    learning = trained.weights(live.settings, torch.float32)
    sum(part.square().sum() for part in latents(learning, hidden)).backward()
    for factors in (trained.keys, trained.values):
        assert factors.down.grad is not None and bool(factors.down.grad.any())


def test_without_a_gpu_nothing_is_captured() -> None:
    subject = subject_of("llama")
    cache = subject.new_cache()
    generator = torch.Generator()
    with pytest.raises(CaptureError, match="GPU"):
        CapturedStep(subject, cache, torch.tensor([1]), Sampler(), generator)


class PlainGraph:
    """Stands in for a captured graph: runs the step itself."""

    def __init__(self, step: Callable[[], object]) -> None:
        self.replay = step


def uncaptured(
    step: Callable[[], object],
    device: torch.device,
    *,
    reset: Callable[[], None] = lambda: None,
    generator: torch.Generator | None = None,
) -> PlainGraph:
    """Stands in for :func:`starkv_core.graphs.capture`."""
    for _ in range(2):
        try:
            step()
        finally:
            reset()
    return PlainGraph(step)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are "captured" without a GPU."""
    monkeypatch.setattr("starkv_core.decode.require_gpu", lambda device: None)
    monkeypatch.setattr("starkv_core.decode.capture", uncaptured)


def prompted(subject: Subject, length: int) -> LatentCache:
    """A cache of two rows of ``length`` tokens, with room for 30 more."""
    cache = subject.new_cache()
    subject.model(input_ids=models.ids(2, length), past_key_values=cache, use_cache=True)
    cache.reserve(2, length + 30, torch.device("cpu"))
    return cache


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("length", [1, 5, 30])  # the sinks, the window or codes take the token
@pytest.mark.parametrize("kind", ["llama-coded", "qwen2-coded"])
def test_replays_store_what_single_steps_store(kind: str, length: int) -> None:
    """Warm-ups of a capture overwrite the ring: what was there has to come back."""
    subject = subject_of(kind)
    with subject.active(), torch.no_grad():
        cache, single = (prompted(subject, length) for _ in range(2))
        fed = models.ids(2, 12, seed=5)
        captured = CapturedStep(subject, cache, fed[:, 0], Sampler(), torch.Generator())
        for token in fed.split(1, dim=1):
            captured.tokens.copy_(token[:, 0])
            captured.replay()
            subject.model(input_ids=token, past_key_values=single, use_cache=True)
        captured.close()
        with pytest.raises(RuntimeError, match="ended"):
            captured.replay()
        for ours, theirs in zip(cache.layers, single.layers, strict=True):
            assert (ours.length, ours.coded) == (theirs.length, theirs.coded)
            for got, wanted in zip(
                ours.latents(0, length + 12), theirs.latents(0, length + 12), strict=True
            ):
                torch.testing.assert_close(got, wanted, rtol=0, atol=FP32_LOGITS)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyboardInterrupt()])
def test_a_capture_that_fails_leaves_a_packed_cache_as_it_was(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second layer of a warm-up, when the first has stored its token already."""
    subject, calls = subject_of("llama-coded"), []
    attend = attention.coded_attention

    def failing(*args: object, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return attend(*args, **options)

    with subject.active(), torch.no_grad():
        cache, single = (prompted(subject, 30) for _ in range(2))
        monkeypatch.setattr(attention, "coded_attention", failing)
        wanted = CaptureError if isinstance(error, Exception) else KeyboardInterrupt
        with pytest.raises(wanted):
            CapturedStep(subject, cache, torch.tensor([5, 6]), Sampler(), torch.Generator())
        for ours, theirs in zip(cache.layers, single.layers, strict=True):
            assert ours.step is None and ours.coded == theirs.coded
            for got, kept in zip(ours.latents(0, 30), theirs.latents(0, 30), strict=True):
                assert torch.equal(got, kept)
        for token in models.ids(2, 10, seed=6).split(1, dim=1):
            got, kept = (
                subject.model(input_ids=token, past_key_values=c, use_cache=True).logits
                for c in (cache, single)
            )
            torch.testing.assert_close(got, kept, rtol=0, atol=FP32_LOGITS)


@pytest.mark.usefixtures("on_cpu")
def test_a_captured_step_keeps_the_tables_it_reads() -> None:
    """A longer context elsewhere replaces a model's tables; the graph goes on with its own."""
    subject, ids = subject_of("llama"), models.ids(2, 20)
    assert subject.tables is not None
    with subject.active(), torch.no_grad():
        cache = subject.new_cache()
        subject.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache.reserve(2, 30, torch.device("cpu"))
        captured = CapturedStep(subject, cache, ids[:, 0], Sampler(), torch.Generator())
        # Made once: where it is None, every call of the kernels has to make it.
        assert torch.equal(cache.layers[0].step.first, torch.zeros(2, dtype=torch.int32))
        read = [weakref.ref(table) for table in subject.tables.held()]
        subject.tables.slots(4096, torch.device("cpu"))
        assert read and all(table() is not None for table in read)
        assert captured.replay().shape == (2,)
        captured.close()
    assert cache.get_seq_length() == 21
    del captured
    gc.collect()  # the stand-in holds the step that holds it
    assert not any(table() is not None for table in read)


def _until_ended(subject: Subject, told: torch.Tensor) -> torch.Tensor:
    """Bool ``[B, L]``: tokens up to each row's end token; what follows one is padding."""
    ends = torch.isin(told, torch.tensor(end_tokens(subject), device=told.device))
    return ends.cumsum(-1) - ends.int() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("skip", [[], [2]])
def test_replays_give_the_tokens_of_single_steps(
    skip: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model, ragged rows, 256 tokens: captured, uncaptured, the reference backend.

    They may part only where the two best tokens lie within rounding of each other. All tokens are
    held to the logits of a forward of the whole text as well; so alone where a layer is dense,
    whose SDPA runs over all slots under a mask when captured.
    """
    loaded = load(None, device="cuda", dtype="float16")
    start = {"slack": 0, "skip_layers": skip}
    subject = models.deployed(loaded, dtype=torch.float16, start=start)
    assert subject.backend == "triton"
    words = loaded.tokenizer(HELDOUT_TEXT.read_text()[:2000])["input_ids"]
    prompt = torch.tensor([words[start : start + 60] for start in (0, 100, 200)])
    mask = torch.ones_like(prompt)
    mask[1, :20] = 0

    def run(subject: Subject) -> torch.Tensor:
        return torch.stack(list(stream(subject, prompt, mask, 256, sampler=Sampler())), 1)

    captured = run(subject)
    assert captured.shape == (3, 256)
    ids = torch.cat((prompt, captured.cpu()), 1).to("cuda")
    whole = torch.ones_like(ids)
    whole[1, :20] = 0
    with subject.active(), torch.no_grad():
        logits = subject.model(input_ids=ids[:, :-1], attention_mask=whole[:, :-1]).logits
    logits = logits[:, prompt.shape[1] - 1 :].double()
    spread = logits.std(-1)
    chosen = logits.gather(-1, captured.to("cuda")[..., None])[..., 0]
    alive = _until_ended(subject, captured)
    assert int(alive.sum()) > 2 * 256
    assert float(((logits.amax(-1) - chosen) / spread)[alive].max()) < NEAR_TIE
    if skip:
        return
    best = logits.topk(2).values
    tie = ((best[..., 0] - best[..., 1]) / spread < NEAR_TIE).cpu()
    assert float(tie.float().mean()) < 0.05

    def refused(*args: object) -> CapturedStep:
        raise CaptureError("this test takes single steps")

    monkeypatch.setattr("starkv_core.engine.CapturedStep", refused)
    for other in (run(subject), run(replace(subject, backend="reference"))):
        differs = captured.cpu() != other.cpu()
        for row in range(3):
            if differs[row].any():
                assert tie[row, int(differs[row].int().argmax())]  # the first that differs


@pytest.mark.gpu
def test_replayed_draws_are_those_of_single_steps() -> None:
    """Sampling within a graph: 40 draws of 3 rows, one generator each way from the same seed."""
    device = torch.device("cuda")
    logits = 3 * torch.randn(
        3, 4096, generator=torch.Generator(device).manual_seed(1), device=device
    )
    sampler = Sampler(temperature=0.8, top_p=0.95, top_k=200, seed=3)
    picked = torch.zeros(3, dtype=torch.long, device=device)
    generator = sampler.generator(device)
    graph = capture(
        lambda: picked.copy_(sampler.pick(logits, generator)), device, generator=generator
    )
    single = sampler.generator(device)
    for _ in range(40):
        graph.replay()
        assert torch.equal(picked, sampler.pick(logits, single))


@pytest.mark.gpu
def test_a_capture_leaves_what_it_runs_on_as_it_was() -> None:
    device = torch.device("cuda")
    count, draws = torch.zeros(1, device=device), torch.zeros(3, device=device)
    generator = torch.Generator(device).manual_seed(5)

    def step() -> None:
        count.add_(1)
        draws.exponential_(generator=generator)

    def reset() -> None:
        count.zero_()

    graph = capture(step, device, reset=reset, generator=generator)
    assert float(count) == 0
    graph.replay()
    wanted = torch.empty_like(draws).exponential_(generator=generator.manual_seed(5))
    assert float(count) == 1 and torch.equal(draws, wanted)


@pytest.mark.gpu
def test_what_waits_for_the_gpu_is_not_captured() -> None:
    device = torch.device("cuda")
    count = torch.zeros(1, device=device)
    with pytest.raises(CaptureError):
        capture(lambda: count.add_(1).item(), device)
    assert float(count.add_(1)) > 0  # the GPU goes on


@pytest.mark.gpu
def test_draws_go_on_after_a_capture_that_fails() -> None:
    """The step's own generator and the default one, as if nothing had been tried."""
    device = torch.device("cuda")
    default = torch.cuda.default_generators[torch.cuda.current_device()]
    generator = torch.Generator(device).manual_seed(5)
    draws = torch.zeros(3, device=device)
    stream = torch.cuda.current_stream()

    def step() -> None:
        draws.exponential_(generator=generator)
        draws.sum().item()  # waits, which no capture allows

    default.manual_seed(6)
    with pytest.raises(CaptureError):
        capture(step, device, generator=generator)
    assert torch.cuda.current_stream() == stream
    got = [torch.empty(5, device=device).exponential_(generator=g) for g in (generator, default)]
    for found, seed in zip(got, (5, 6), strict=True):
        fresh = torch.Generator(device).manual_seed(seed)
        assert torch.equal(found, torch.empty(5, device=device).exponential_(generator=fresh))
    # And a capture that works takes the same generator.
    graph = capture(lambda: draws.exponential_(generator=generator), device, generator=generator)
    graph.replay()
    fresh = torch.Generator(device).manual_seed(5)
    torch.empty(5, device=device).exponential_(generator=fresh)
    assert torch.equal(draws, torch.empty(3, device=device).exponential_(generator=fresh))


@pytest.mark.gpu
def test_a_conversation_goes_on_after_captured_steps() -> None:
    """The cache after replays holds what single steps would have left in it."""
    loaded = load(None, device="cuda", dtype="float16")
    subject = models.deployed(loaded, dtype=torch.float16)
    seeded = torch.Generator("cuda").manual_seed(11)
    prompt = torch.randint(20, 400, (2, 40), generator=seeded, device="cuda")
    cache = subject.new_cache()
    told = torch.stack(list(stream(subject, prompt, None, 40, sampler=Sampler(), cache=cache)), 1)
    held = cache.get_seq_length()
    assert held == 40 + told.shape[1] - 1
    fresh = subject.new_cache()
    with subject.active(), torch.no_grad():
        everything = torch.cat((prompt, told), 1)[:, :held]
        subject.model(input_ids=everything, past_key_values=fresh, use_cache=True)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        for got, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
            gap = (got[:, :held].double() - wanted[:, :held].double()).norm(dim=-1)
            # Token by token: one in another's slot would be off by its own size.
            assert float((gap / wanted[:, :held].double().norm(dim=-1)).max()) < FP16_LATENTS


@pytest.mark.gpu
def test_replayed_steps_code_what_single_steps_code(replays: list[int]) -> None:
    """The embedded model, packed: 200 replays, then the same tokens one by one.

    Latents of the first layer depend on the tokens alone, so all it stores is the same bit for bit:
    no row was lost to the capture, none coded twice or late. Deeper layers see the kernels round.
    """
    loaded = load(None, device="cuda", dtype="float16")
    subject = models.coded(models.deployed(loaded, dtype=torch.float16), sinks=4, window=32)
    assert subject.backend == "triton"
    words = loaded.tokenizer(HELDOUT_TEXT.read_text()[:2000])["input_ids"]
    prompt = torch.tensor([words[start : start + 450] for start in (0, 10)], device="cuda")
    cache, single = subject.new_cache(), subject.new_cache()
    told = torch.stack(list(stream(subject, prompt, None, 200, sampler=Sampler(), cache=cache)), 1)
    assert len(replays) == cache.get_seq_length() - 450 == 199
    with subject.active(), torch.no_grad():
        logits = [subject.model(input_ids=prompt, past_key_values=single).logits[:, -1]]
        for token in told.split(1, dim=1)[:-1]:
            logits.append(subject.model(input_ids=token, past_key_values=single).logits[:, -1])
    found = torch.stack(logits, 1).double()
    short = (found.amax(-1) - found.gather(-1, told[..., None])[..., 0]) / found.std(-1)
    alive = _until_ended(subject, told)
    assert int(alive.sum()) > 100
    assert float(short[alive].max()) < NEAR_TIE
    single.reserve(2, 450 + 200, torch.device("cuda"))
    for number, (ours, theirs) in enumerate(zip(cache.layers, single.layers, strict=True)):
        assert ours.coded == theirs.coded == 450 + 199 - 32
        for got, wanted in zip(ours.tensors(), theirs.tensors(), strict=True):
            if number == 0:
                assert torch.equal(got, wanted)
            elif got.dtype == torch.uint8:
                assert float((got != wanted).float().mean()) < 0.05
