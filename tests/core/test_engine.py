"""The generation loop against transformers' own ``generate`` and against itself, row by row."""

from __future__ import annotations

import pytest
import torch

from starkv_core.engine import Sampler, end_tokens, stream
from starkv_core.errors import UserError
from tests import models
from tests.standin import StandinSubject, make_subject

GREEDY = Sampler()


@pytest.fixture(scope="module")
def subject() -> StandinSubject:
    return make_subject()


def generate(
    subject: StandinSubject, ids: torch.Tensor, mask: torch.Tensor, n: int
) -> torch.Tensor:
    """Reference: new tokens ``[B, n]`` of plain transformers, end token switched off."""
    out = subject.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        pad_token_id=0,
    )
    return out[:, ids.shape[1] :]


def run(subject: StandinSubject, ids: torch.Tensor, mask: torch.Tensor | None, n: int, **options):
    options.setdefault("sampler", GREEDY)
    return torch.stack(list(stream(subject, ids, mask, n, **options)), dim=1)


def ragged(subject: StandinSubject, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(0, 256, (len(lengths), width), generator=generator)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return ids, mask


@pytest.mark.parametrize("chunk", [None, 1, 4, 13])
def test_greedy_equals_generate(subject: StandinSubject, chunk: int | None) -> None:
    ids, mask = ragged(subject, [13])
    expected = generate(subject, ids, mask, 24)
    assert len(set(expected[0].tolist())) > 4, "the reference should be a varied answer"
    assert torch.equal(run(subject, ids, None, 24, prefill_chunk=chunk), expected)


@pytest.mark.parametrize("chunk", [None, 5])
def test_left_padding_equals_generate(subject: StandinSubject, chunk: int | None) -> None:
    ids, mask = ragged(subject, [11, 3, 7, 1])
    expected = generate(subject, ids, mask, 16)
    assert torch.equal(run(subject, ids, mask, 16, prefill_chunk=chunk), expected)


def test_batch_equals_its_rows_alone(subject: StandinSubject) -> None:
    lengths = [9, 2, 6]
    ids, mask = ragged(subject, lengths)
    together = run(subject, ids, mask, 12)
    for row, length in enumerate(lengths):
        alone = run(subject, ids[row : row + 1, -length:], None, 12)
        assert torch.equal(together[row : row + 1], alone)


def test_what_lies_under_padding_does_not_matter(subject: StandinSubject) -> None:
    ids, mask = ragged(subject, [8, 3])
    other = torch.where(mask.bool(), ids, (ids + 17) % 256)
    assert torch.equal(run(subject, ids, mask, 10), run(subject, other, mask, 10))


def test_second_turn_feeds_only_new_tokens(subject: StandinSubject) -> None:
    ids, mask = ragged(subject, [10, 4])
    cache = subject.new_cache()
    first = run(subject, ids, mask, 5, cache=cache)
    assert cache.get_seq_length() == 10 + 4  # the last token yielded has not been fed
    turn = torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(2))
    new = torch.cat((first[:, -1:], turn), dim=1)
    full_mask = torch.cat((mask, torch.ones(2, 4 + 7, dtype=torch.long)), dim=1)
    again = run(subject, new, full_mask, 9, cache=cache, prefill_chunk=3)
    whole = torch.cat((ids, first, turn), dim=1)
    assert torch.equal(again, generate(subject, whole, full_mask, 9))


def test_rows_end_one_by_one(subject: StandinSubject) -> None:
    ids, mask = ragged(subject, [9, 2, 6])
    free = run(subject, ids, mask, 20)
    # What one row says early becomes the end token: it pads from there, the others go on.
    end = int(free[0, 3])
    subject.model.generation_config.eos_token_id = [end]
    try:
        assert end in end_tokens(subject)
        got = run(subject, ids, mask, 20)
    finally:
        subject.model.generation_config.eos_token_id = None
    pad = subject.tokenizer.pad_token_id
    for row in range(3):
        said = free[row].tolist()
        cut = said.index(end) + 1 if end in said else 20
        expected = (said[:cut] + [pad] * 20)[: got.shape[1]]
        assert got[row].tolist() == expected
    ends = [said.index(end) + 1 if end in said else 20 for said in free.tolist()]
    assert got.shape[1] == max(ends)


def test_ends_as_soon_as_every_row_has(subject: StandinSubject) -> None:
    ids, mask = ragged(subject, [7])
    free = run(subject, ids, mask, 10)[0].tolist()
    subject.model.generation_config.eos_token_id = free[2]
    try:
        got = run(subject, ids, mask, 10)[0].tolist()
    finally:
        subject.model.generation_config.eos_token_id = None
    assert got == free[: free.index(free[2]) + 1]


def test_context_is_checked_before_any_computation(subject: StandinSubject) -> None:
    class Untouchable(StandinSubject):
        def active(self):
            raise AssertionError("computed")

        def new_cache(self):
            raise AssertionError("allocated")

    guarded = Untouchable(subject.model, subject.tokenizer, max_positions=32)
    ids = torch.zeros(1, 30, dtype=torch.long)
    with pytest.raises(UserError, match=r"33 tokens do not fit .* 32 tokens|30 \+ 3.*32"):
        stream(guarded, ids, None, 3, sampler=GREEDY)
    cache = StandinSubject(subject.model, subject.tokenizer).new_cache()
    run(subject, ids, None, 1, cache=cache)
    with pytest.raises(UserError, match="32"):
        stream(guarded, ids[:, :2], None, 1, sampler=GREEDY, cache=cache)


def test_context_can_be_filled_to_the_last_token(subject: StandinSubject) -> None:
    small = StandinSubject(subject.model, subject.tokenizer, max_positions=32)
    assert run(small, torch.zeros(1, 30, dtype=torch.long), None, 2).shape == (1, 2)


def test_right_padding_is_refused(subject: StandinSubject) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    for mask in ([1, 1, 1, 0], [1, 0, 1, 1]):
        with pytest.raises(ValueError, match="left"):
            stream(subject, ids, torch.tensor([mask]), 2, sampler=GREEDY)


def test_surgery_ends_when_the_consumer_stops(subject: StandinSubject) -> None:
    steps = stream(subject, torch.zeros(1, 4, dtype=torch.long), None, 50, sampler=GREEDY)
    next(steps)
    assert subject.active_now == 1
    steps.close()
    assert subject.active_now == 0
    assert torch.is_grad_enabled()


def test_sampling_repeats_with_its_seed(subject: StandinSubject) -> None:
    ids, mask = ragged(subject, [6])
    draws = [
        run(subject, ids, mask, 16, sampler=Sampler(temperature=1.5, seed=seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_sampler_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    sampler = Sampler(temperature=2.0, seed=3)
    generator = sampler.generator(torch.device("cpu"))
    draws = sampler.pick(logits.expand(40_000, -1), generator)
    share = draws.bincount(minlength=4) / 40_000
    # Standard error of a share is at most 0.0025.
    assert torch.allclose(share, (logits[0] / 2.0).softmax(-1), atol=0.01)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.7}, {0, 3}),
        ({"top_p": 0.95}, {0, 2, 3}),
        ({"top_k": 3, "top_p": 0.95}, {0, 2, 3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_sampler_keeps_the_right_tokens(options: dict[str, float], kept: set[int]) -> None:
    probabilities = torch.tensor([[0.3, 0.02, 0.08, 0.6]])
    sampler = Sampler(temperature=1.0, **options)  # type: ignore[arg-type]
    generator = sampler.generator(torch.device("cpu"))
    draws = sampler.pick(probabilities.log().expand(5_000, -1), generator)
    assert set(draws.tolist()) == kept


def test_sampler_refuses_nonsense_all_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Sampler(temperature=-1.0, top_p=0.0, top_k=-3)
    assert all(word in str(caught.value) for word in ("temperature", "top_p", "top_k"))


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_compressed_subject_equals_generate(family: str, chunk: int | None) -> None:
    """The loop on latents against plain ``generate`` on latents, ragged rows and all."""
    loaded = models.model(family)
    loaded.model.generation_config.eos_token_id = None
    subject = models.deployed(loaded, models.ragged_ranks(loaded))
    ids = models.ids(3, 11)
    mask = torch.stack([(torch.arange(11) >= 11 - n).long() for n in (11, 4, 1)])
    cache = subject.new_cache()
    got = torch.stack(
        list(stream(subject, ids, mask, 9, sampler=GREEDY, cache=cache, prefill_chunk=chunk)), dim=1
    )
    assert cache.latent_tokens() == [11 + 8] * loaded.spec.n_layers
    with subject.active() as model:
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=subject.new_cache(),
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=0,
        )
    assert torch.equal(got, out[:, 11:])
