"""The captured decode step: what needs no GPU here, the graph itself under the mark ``gpu``."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from starkv_core.cache import Step
from starkv_core.decode import CapturedStep, CaptureError
from starkv_core.embedded import HELDOUT_TEXT
from starkv_core.engine import Sampler, stream
from starkv_core.models import load
from starkv_core.run import Subject
from tests import models
from tests.tolerances import FP32_LOGITS


def subject_of(kind: str, skip: int | None = None) -> Subject:
    """A small random model, one layer left dense if asked."""
    start = {"slack": 0, "skip_layers": [] if skip is None else [skip]}
    return models.deployed(models.model(kind), start=start)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
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


def test_without_a_gpu_nothing_is_captured() -> None:
    subject = subject_of("llama")
    cache = subject.new_cache()
    generator = torch.Generator()
    with pytest.raises(CaptureError, match="GPU"):
        CapturedStep(subject, cache, torch.tensor([1]), Sampler(), generator)


@pytest.mark.gpu
@pytest.mark.parametrize(
    # A dense layer's SDPA runs over all slots under a mask when captured: equal up to rounding
    # only, which draws at a temperature can tell.
    ("temperature", "skip"),
    [(0.0, []), (0.0, [2]), (0.8, [])],
)
def test_replays_give_the_tokens_of_single_steps(
    temperature: float, skip: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded model, ragged rows, 256 tokens: captured against uncaptured."""
    loaded = load(None, device="cuda", dtype="float16")
    start = {"slack": 0, "skip_layers": skip}
    subject = models.deployed(loaded, dtype=torch.float16, start=start)
    assert subject.backend == "triton"
    words = HELDOUT_TEXT.read_text()[:400]
    prompt = torch.tensor(loaded.tokenizer(words)["input_ids"])[:60].expand(3, -1)
    mask = torch.ones_like(prompt)
    mask[1, :20] = 0
    sampler = Sampler(temperature=temperature, seed=3)

    def run(subject: Subject) -> torch.Tensor:
        return torch.stack(list(stream(subject, prompt, mask, 256, sampler=sampler)), 1)

    captured = run(subject)
    assert captured.shape == (3, 256) or bool((captured[:, -1] == captured[0, -1]).all())
    monkeypatch.setattr("starkv_core.engine._captured", lambda *args: None)
    assert torch.equal(captured, run(subject))
    if temperature == 0.0:
        assert torch.equal(captured, run(replace(subject, backend="reference")))


@pytest.mark.gpu
def test_a_conversation_goes_on_after_captured_steps() -> None:
    """The cache after replays holds what single steps would have left in it."""
    loaded = load(None, device="cuda", dtype="float16")
    subject = models.deployed(loaded, dtype=torch.float16)
    prompt = torch.randint(20, 400, (2, 40), device="cuda")
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
            torch.testing.assert_close(
                got[:, :held].float(), wanted[:, :held].float(), rtol=0.05, atol=0.05
            )
