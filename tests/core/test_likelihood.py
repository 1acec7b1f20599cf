"""Log-likelihoods of continuations against full recomputation, one request at a time."""

from __future__ import annotations

import math

import pytest
import torch

from starkv_core.errors import RunFailure, UserError
from starkv_core.eval import likelihood as module
from starkv_core.eval import steps
from starkv_core.eval.batching import Batches
from starkv_core.eval.likelihood import Path, Request, score
from starkv_core.models import load
from starkv_core.run import Subject, dense_of
from tests import models
from tests.standin import StandinSubject, make_subject
from tests.tolerances import FP16_NLL

PATHS: tuple[Path, ...] = ("prefill", "decode")
SIZES = ((9, 3), (1, 5), (14, 1), (30, 20), (2, 2), (1, 1))  # context, continuation


def requests() -> list[Request]:
    found = []
    for seed, (context, targets) in enumerate(SIZES):
        row = models.ids(1, context + targets, seed=seed)[0].tolist()
        found.append(Request(row[:context], row[context:]))
    return found


def reference(subject: Subject, request: Request) -> tuple[float, bool]:
    """One row, no padding, no cache, sums in float64."""
    ids = torch.tensor([request.context + request.targets])
    with subject.active() as model, torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].double()
    total, greedy = 0.0, True
    for at in range(len(request.context), ids.shape[1]):
        logs = logits[at - 1] - logits[at - 1].logsumexp(-1)
        total += float(logs[ids[0, at]])
        greedy = greedy and int(logs.argmax()) == int(ids[0, at])
    return total, greedy


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["compressed", "dense"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_ragged_batch_equals_each_row_alone(family: str, kind: str, path: Path) -> None:
    loaded = models.model(family)
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    if kind == "dense":
        subject = dense_of(subject)
    asked = requests()
    found, held = score(subject, asked, path)
    for request, one in zip(asked, found, strict=True):
        total, greedy = reference(subject, request)
        # float32 throughout: only the order of sums differs
        assert one.log_likelihood == pytest.approx(total, rel=2e-5)
        assert one.greedy == greedy
    # the longest row is 49 tokens fed; contexts end together on the decode path
    assert (held.rows, held.tokens) == (len(asked), 49)


@pytest.mark.parametrize("path", PATHS)
def test_greedy_continuations_are_told(path: Path) -> None:
    subject = models.deployed(models.model())
    context = models.ids(1, 12)[0].tolist()
    answer: list[int] = []
    with subject.active() as model, torch.no_grad():
        for _ in range(4):
            logits = model(torch.tensor([context + answer]), use_cache=False).logits[0, -1]
            answer.append(int(logits.argmax()))
    other = [*answer[:-1], (answer[-1] + 1) % models.VOCAB]
    found, _ = score(subject, [Request(context, answer), Request(context, other)], path)
    assert [one.greedy for one in found] == [True, False]


def test_both_paths_of_16_bit_latents_agree() -> None:
    loaded = models.model()
    subject = models.deployed(loaded, models.ragged_ranks(loaded), dtype=torch.bfloat16)
    prefill, decode = (score(subject, requests(), path)[0] for path in PATHS)
    exact, _ = score(models.deployed(loaded, models.ragged_ranks(loaded)), requests(), "prefill")
    for one, other, best in zip(prefill, decode, exact, strict=True):
        # Both read the same rounded latents; left padding turns them by other angles.
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-4)
        assert one.log_likelihood != best.log_likelihood


def test_decode_reads_codes_and_prefill_does_not() -> None:
    loaded = models.model()
    latents = models.deployed(loaded, models.ragged_ranks(loaded))
    coded = models.coded(latents, bits=(3, 2), sinks=2, window=4)
    asked = requests()
    exact, _ = score(latents, asked, "prefill")
    prefill, _ = score(coded, asked, "prefill")
    for one, other in zip(exact, prefill, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=2e-5)
    with pytest.raises(ValueError, match="different lengths"):
        score(coded, asked, "decode")
    whole = asked[3]  # of 30 tokens, so that most of what its continuation reads is coded
    alike = [Request(whole.context, whole.targets[:n]) for n in (7, 20, 1)]
    decode, _ = score(coded, alike, "decode")
    assert abs(decode[1].log_likelihood - exact[3].log_likelihood) > 0.1
    for request, one in zip(alike, decode, strict=True):
        # alone, by single calls of the model: what generation does
        cache, total = coded.new_cache(), 0.0
        with coded.active() as model, torch.no_grad():
            model(torch.tensor([request.context[:-1]]), past_key_values=cache)
            for fed, target in zip(request.inputs[29:], request.targets, strict=True):
                logits = model(torch.tensor([[fed]]), past_key_values=cache).logits[0, -1]
                total += float(logits.double().log_softmax(-1)[target])
        assert one.log_likelihood == pytest.approx(total, rel=1e-4)


def test_pieces_of_the_vocabulary_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = models.deployed(models.model())
    whole, _ = score(subject, requests(), "prefill")
    monkeypatch.setattr(module, "_LOGITS", 3 * models.VOCAB)
    pieces, _ = score(subject, requests(), "prefill")
    for one, other in zip(whole, pieces, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("held", [[], [0, 5], [5, 4]])
def test_a_run_that_goes_past_its_latents_has_no_score(path: Path, held: list[int]) -> None:
    whole = make_subject()

    class FakeCompressed(StandinSubject):
        compressed = True

        def new_cache(self):
            cache = super().new_cache()
            cache.latent_tokens = lambda: held
            return cache

    fake = FakeCompressed(whole.model, whole.tokenizer)
    with pytest.raises(RunFailure, match="compressed"):
        score(fake, [Request([1, 2, 3], [4, 5, 6])], path)


@pytest.mark.parametrize("path", PATHS)
def test_the_layer_of_what_is_not_finite_is_named(path: Path) -> None:
    broken = make_subject()
    with torch.no_grad():
        broken.model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(UserError, match="not finite from layer 1 on"):
        score(broken, [Request([1, 2], [3])], path)
    with torch.no_grad():
        broken.model.model.layers[1].mlp.down_proj.weight.fill_(0.0)
        broken.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="from the output head on"):
        score(broken, [Request([1, 2], [3])], path)


def test_batches_keep_order_and_shrink_where_memory_ends() -> None:
    lengths = [3, 50, 7, 50, 1, 20, 20, 2]
    seen: list[list[int]] = []

    def work(part: list[int]) -> list[str]:
        if len(part) * max(part) > 60:
            raise torch.cuda.OutOfMemoryError
        seen.append(part)
        return [f"<{n}>" for n in part]

    batches = Batches(None, torch.device("cpu"))
    assert batches.run(lengths, lambda n: n, work) == [f"<{n}>" for n in lengths]
    assert seen[0] == [50]
    assert max(map(len, seen)) > 1
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Batches(2, torch.device("cpu")).run(lengths, lambda n: n, work)
    seen.clear()
    mixed = Batches(2, torch.device("cpu")).run([5, 6, 7, 8, 9], lambda n: 1, work, lambda n: n % 2)
    assert mixed == ["<5>", "<6>", "<7>", "<8>", "<9>"]
    assert seen == [[5, 7], [9], [6, 8]]
    seen.clear()
    Batches(3, torch.device("cpu")).run([1] * 7, lambda n: n, work)
    assert [len(part) for part in seen] == [3, 3, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "latents", "codes"])
def test_replayed_steps_score_what_single_steps_do(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of uneven length, padded on the left, on the embedded model in float16."""
    loaded = load(None, device="cuda", dtype="float16")
    subject = models.deployed(loaded, dtype=torch.float16)
    if kind == "codes":
        subject = models.coded(subject, bits=(8, 4), sinks=4, window=32)
    elif kind == "dense":
        subject = dense_of(subject)
    sizes = [(90, 40)] * 3 if kind == "codes" else [(90, 40), (300, 25), (1, 33)]
    rows = [models.ids(1, a + b, seed=a + b + i)[0].tolist() for i, (a, b) in enumerate(sizes)]
    asked = [Request(row[:a], row[a:]) for row, (a, _) in zip(rows, sizes, strict=True)]
    replayed, held = score(subject, asked, "decode")
    monkeypatch.setattr(steps, "captured_steps", lambda *args: None)
    single, same = score(subject, asked, "decode")
    assert held == same
    for one, other, request in zip(replayed, single, asked, strict=True):
        count = len(request.targets)
        assert abs(one.log_likelihood - other.log_likelihood) < FP16_NLL * count
        assert one.greedy == other.greedy
