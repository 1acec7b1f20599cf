"""Perplexity against an independent computation in double precision, and against its other mode."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from starkv_core.errors import RunFailure, UserError
from starkv_core.eval import perplexity as module
from starkv_core.eval import steps
from starkv_core.eval.perplexity import Windows, cut_windows, perplexity
from starkv_core.eval.text import read_eval_text
from starkv_core.models import load
from starkv_core.run import dense_of
from tests import models
from tests.standin import StandinSubject, make_subject
from tests.tolerances import FP16_NLL, FP32_LOGITS

TEXT = "Ünïcode text, 第一章: the quick brown fox.\n\nA second paragraph 👍🏽 follows here.\n" * 5


@pytest.fixture(scope="module")
def subject() -> StandinSubject:
    return make_subject()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.raw"
    path.write_bytes(TEXT.encode())
    return path


def reference_nll(subject: StandinSubject, ids: torch.Tensor) -> float:
    """Mean over all windows, one plain forward pass each, everything in float64, no cache."""
    model = copy.deepcopy(subject.model).double()
    total, tokens = 0.0, 0
    for window in ids:
        with torch.no_grad():
            logits = model(window[None], use_cache=False).logits[0]
        assert logits.dtype == torch.float64
        logs = logits - logits.logsumexp(-1, keepdim=True)
        for position in range(len(window) - 1):
            total -= float(logs[position, window[position + 1]])
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("mode", ["prefill", "token"])
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("window", [2, 37])
def test_equals_the_reference(
    subject: StandinSubject, text_file: Path, mode: module.Mode, batch: int, window: int
) -> None:
    text = read_eval_text(subject.tokenizer, str(text_file))
    windows = cut_windows(subject.tokenizer, text, window, 5)
    result = perplexity(subject, windows, mode=mode, batch=batch)
    expected = reference_nll(subject, windows.ids)
    # float32 forward passes of two layers against float64
    assert result.nll == pytest.approx(expected, rel=2e-6)
    assert result.ppl == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.windows, result.window, result.tokens) == (5, window, 5 * (window - 1))
    assert result.cache.rows == min(batch, 5)
    assert result.cache.tokens == (window if mode == "prefill" else window - 1)
    # 2 layers, keys and values, 2 heads of 12 numbers, 4 bytes
    assert result.cache.per_token == 2 * 2 * 2 * 12 * 4
    assert json.loads(json.dumps(result.to_dict()))["ppl"] == result.ppl


def test_pieces_of_the_vocabulary_do_not_change_it(
    subject: StandinSubject, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = cut_windows(subject.tokenizer, read_eval_text(subject.tokenizer, str(text_file)), 41)
    whole = perplexity(subject, windows, batch=2)
    monkeypatch.setattr(module, "_LOGITS", 258 * 2 * 3)  # three positions at a time
    pieces = perplexity(subject, windows, batch=2)
    assert pieces.nll == pytest.approx(whole.nll, rel=1e-6)
    assert pieces.tokens == whole.tokens


def test_windows_are_cut_from_the_whole_text(subject: StandinSubject, text_file: Path) -> None:
    text = read_eval_text(subject.tokenizer, str(text_file))
    raw = TEXT.encode()
    assert text.sha256 == hashlib.sha256(raw).hexdigest()
    assert text.join == "whole file as one string"
    windows = cut_windows(subject.tokenizer, text, 50)
    assert windows.ids.shape == (len(raw) // 50, 50)
    assert windows.ids.flatten().tolist() == text.ids[: windows.ids.numel()]
    assert subject.tokenizer.decode(text.ids) == TEXT
    two = cut_windows(subject.tokenizer, text, 50, 2)
    assert torch.equal(two.ids, windows.ids[:2])
    assert cut_windows(subject.tokenizer, text, 50, 10_000).ids.shape == windows.ids.shape


def test_bits_per_byte(subject: StandinSubject, text_file: Path) -> None:
    text = read_eval_text(subject.tokenizer, str(text_file))
    windows = cut_windows(subject.tokenizer, text, len(text.ids))
    assert windows.bytes_per_token == 1.0  # this tokenizer makes one token of a byte
    result = perplexity(make_subject(max_positions=1000), windows)
    assert result.bits_per_byte == pytest.approx(result.nll / math.log(2))


def test_documents_are_joined_and_read_only_as_far_as_needed(
    subject: StandinSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def endless(*_: object):
        for i in range(10_000):
            read.append(i)
            yield f"document {i}"

    monkeypatch.setattr("starkv_core.eval.text.documents", endless)
    text = read_eval_text(subject.tokenizer, "some/dataset", tokens=200)
    assert len(text.ids) >= 200
    assert len(read) < 200
    assert subject.tokenizer.decode(text.ids).startswith("document 0\n\ndocument 1\n\ndocument 2")
    assert text.join == "documents joined with an empty line"


@pytest.mark.parametrize(
    ("content", "match"), [(b"", "empty"), (b" \n", "empty"), (b"ok \xff\xfe", r"UTF-8.*byte 3")]
)
def test_unusable_files(
    subject: StandinSubject, tmp_path: Path, content: bytes, match: str
) -> None:
    path = tmp_path / "bad.raw"
    path.write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_eval_text(subject.tokenizer, str(path))


def test_missing_file(subject: StandinSubject) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_eval_text(subject.tokenizer, "nowhere/near/here.txt")


def test_impossible_windows(subject: StandinSubject, text_file: Path) -> None:
    text = read_eval_text(subject.tokenizer, str(text_file))
    for window, count in ((1, None), (10, 0), (100_000, None)):
        with pytest.raises(UserError, match="window"):
            cut_windows(subject.tokenizer, text, window, count)
    with pytest.raises(UserError, match=r"300.*256"):
        perplexity(subject, cut_windows(subject.tokenizer, text, 300))


class FakeCompressed(StandinSubject):
    """Claims to be compressed; its caches report the latents they are told to."""

    compressed = True
    held: list[int]

    def with_prefill(self, prefill: str) -> FakeCompressed:
        return self

    def new_cache(self):
        cache = super().new_cache()
        cache.latent_tokens = lambda: self.held
        return cache


@pytest.mark.parametrize("held", [[], [0, 20], [20, 19]])
@pytest.mark.parametrize("mode", ["prefill", "token"])
def test_a_run_that_goes_past_its_latents_has_no_figure(
    subject: StandinSubject, held: list[int], mode: module.Mode
) -> None:
    fake = FakeCompressed(subject.model, subject.tokenizer)
    fake.held = held
    windows = Windows(torch.randint(0, 256, (1, 20)), 1.0)
    with pytest.raises(RunFailure, match="compressed"):
        perplexity(fake, windows, mode=mode)
    fake.held = [20, 20] if mode == "prefill" else [19, 19]
    perplexity(fake, windows, mode=mode)


def test_a_cache_left_empty_has_no_figure(subject: StandinSubject) -> None:
    class Forgetful(StandinSubject):
        def new_cache(self):
            return SimpleNamespace(get_seq_length=lambda: 0, update=None)

    class Ignoring(torch.nn.Module):
        """Takes the cache and ignores it, as trap 15 has it."""

        def __init__(self) -> None:
            super().__init__()
            self.base_model = lambda input_ids, **_: subject.model.base_model(input_ids=input_ids)
            self.get_output_embeddings = subject.model.get_output_embeddings
            self.config = subject.model.config

    with pytest.raises(RunFailure, match="empty"):
        perplexity(
            Forgetful(Ignoring(), subject.tokenizer), Windows(torch.randint(0, 256, (1, 20)), 1.0)
        )


@pytest.mark.parametrize("mode", module.MODES)
def test_not_a_number_is_no_figure(mode: module.Mode) -> None:
    broken = make_subject()
    windows = Windows(torch.randint(0, 256, (3, 20)), 1.0)
    with torch.no_grad():
        broken.model.lm_head.weight[7].fill_(math.inf)
    with pytest.raises(UserError, match="not finite from the output head on"):
        perplexity(broken, windows, mode=mode)


@pytest.mark.parametrize("mode", module.MODES)
def test_the_first_layer_that_is_not_finite_is_named(mode: module.Mode) -> None:
    loaded = models.model("llama")
    subject = models.deployed(loaded)
    layer = subject.weights[1]
    broken = dataclasses.replace(layer, value_up=layer.value_up * math.nan)
    subject = dataclasses.replace(subject, weights={**subject.weights, 1: broken})
    windows = Windows(models.ids(3, 9), 1.0)
    with pytest.raises(UserError, match="not finite from layer 1 on; the model or its factors"):
        perplexity(subject, windows, mode=mode, batch=2)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_compressed_modes_agree_and_differ_from_dense(family: str) -> None:
    """Both modes of a compressed model against full recomputation without any cache."""
    loaded = models.model(family)
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    windows = Windows(models.ids(3, 17), 1.0)
    results = {mode: perplexity(subject, windows, mode=mode, batch=2) for mode in module.MODES}
    with subject.active() as model, torch.no_grad():
        logits = model(windows.ids, use_cache=False).logits.double()
    logs = logits[:, :-1].log_softmax(-1).gather(-1, windows.ids[:, 1:, None])
    for result in results.values():
        # latents in float32 here: only the order of sums differs
        assert result.nll == pytest.approx(-float(logs.mean()), rel=1e-5)
    dense = perplexity(dense_of(subject), windows)
    assert abs(dense.nll - results["prefill"].nll) > 1e-3
    assert results["token"].cache.tokens == 16


def test_prefill_of_codes_is_what_decode_reads() -> None:
    """Prompts attend to exact latents; perplexity counts the codes all the same."""
    plain = models.deployed(models.model("llama"))
    subject = models.coded(plain, bits=(3, 2), sinks=2, window=5)
    windows = Windows(models.ids(2, 60), 4.0)
    prefill, token, exact = (
        perplexity(of, windows, mode=mode, batch=2).nll
        for of, mode in ((subject, "prefill"), (subject, "token"), (plain, "prefill"))
    )
    assert prefill == pytest.approx(token, abs=FP32_LOGITS)
    assert abs(prefill - exact) > 10 * FP32_LOGITS


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "latents", "codes"])
def test_replayed_steps_predict_what_single_steps_do(
    kind: str, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model token by token, as replays of a graph and without one."""
    loaded = load(None, device="cuda", dtype="float16")
    subject = models.deployed(loaded, dtype=torch.float16)
    if kind == "codes":
        subject = models.coded(subject, bits=(8, 4), sinks=4, window=32)
    elif kind == "dense":
        subject = dense_of(subject)
    text = read_eval_text(loaded.tokenizer)
    windows = cut_windows(loaded.tokenizer, text, 600, 3)
    replayed = perplexity(subject, windows, mode="token", batch=3)
    assert len(replays) == 598  # all steps but the first
    monkeypatch.setattr(steps, "captured_steps", lambda *args: None)
    single = perplexity(subject, windows, mode="token", batch=3)
    assert abs(replayed.nll - single.nll) < FP16_NLL
    assert replayed.cache == single.cache
