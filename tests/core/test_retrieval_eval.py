"""Retrieval accuracy on models whose answers are known beforehand."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from starkv_core.errors import RunFailure, UserError
from starkv_core.eval.retrieval import TASKS, RetrievalGrid, make_grid, retrieval
from tests.standin import StandinSubject, byte_tokenizer, make_subject

FILLER = "The weather was mild and the road was long, so they sang all the way home again. " * 40


class Oracle:
    """A model that finds the number in the prompt itself, and errs where it is told to.

    It answers from the tokens it has been fed through the cache so far, one step at a time.
    """

    def __init__(self, tokenizer, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.tokenizer = tokenizer
        self.answers = answers
        self.config = make_subject().model.config
        self.prefills: list[tuple[int, int]] = []
        self.head = torch.nn.Identity()

    def get_output_embeddings(self):
        return self.head

    def __call__(self, input_ids, past_key_values, **_):
        cache = past_key_values
        if not hasattr(cache, "seen"):
            cache.seen = input_ids
            self.prefills.append(tuple(input_ids.shape))
        else:
            cache.seen = torch.cat((cache.seen, input_ids), dim=1)
        states = torch.zeros(input_ids.shape[0], 1, input_ids.shape[1], 4)
        for layer in range(2):
            cache.update(states, states, layer)
        logits = torch.zeros(input_ids.shape[0], 1, len(self.tokenizer))
        for row, seen in enumerate(cache.seen.tolist()):
            for prompt, answer in self.answers.items():
                if tuple(seen[: len(prompt)]) == prompt:
                    said = len(seen) - len(prompt)
                    logits[row, 0, answer[said]] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def grid() -> RetrievalGrid:
    tokenizer = byte_tokenizer()
    ids = tokenizer(FILLER).input_ids
    return make_grid("passkey", tokenizer, ids, [150, 201], [0.0, 0.5, 1.0], 3, seed=7)


def oracle_subject(grid: RetrievalGrid, wrong: set[tuple[int, int, int]]) -> StandinSubject:
    tokenizer = byte_tokenizer()
    answers = {}
    for i, row in enumerate(grid.cells):
        for j, cell in enumerate(row):
            for k, prompt in enumerate(cell):
                answer = list(prompt.answer_ids)
                if (i, j, k) in wrong:
                    answer[0 if k == 0 else -1] += 1  # the first token alone, or the last
                answers[tuple(prompt.input_ids)] = answer
    return StandinSubject(Oracle(tokenizer, answers), tokenizer)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_counts_right_answers_by_cell(grid: RetrievalGrid, batch: int) -> None:
    wrong = {(0, 1, 0), (0, 1, 2), (1, 2, 1)}
    result = retrieval(oracle_subject(grid, wrong), grid, batch=batch)
    assert result.scores == (
        ((1, 1, 1), (0, 1, 0), (1, 1, 1)),
        ((1, 1, 1), (1, 1, 1), (1, 0, 1)),
    )
    assert result.accuracy == pytest.approx(15 / 18)
    assert result.at_length(150) == pytest.approx(7 / 9)
    assert result.at_length(201) == pytest.approx(8 / 9)
    assert result.cache.tokens == 201 + len(grid.cells[0][0][0].answer_ids) - 1
    assert json.loads(json.dumps(result.to_dict()))["by_length"]["201"] == pytest.approx(8 / 9)


@pytest.mark.parametrize("task", ["multi-value", "variable-tracking"])
def test_of_several_answers_the_share_counts(task: str) -> None:
    tokenizer = byte_tokenizer()
    grid = make_grid(task, tokenizer, tokenizer(FILLER).input_ids, [600], [0.5], 3, seed=7)
    subject = oracle_subject(grid, set())
    subject.max_positions = 1024
    answers, end = subject.model.answers, [tokenizer.eos_token_id] * 200
    prompts = grid.cells[0][0]
    said = [
        ", ".join(reversed(prompts[0].asked)) + " and so on",
        prompts[1].asked[1] + " " + prompts[1].asked[0],
        prompts[2].asked[2],
    ]
    for prompt, words in zip(prompts, said, strict=True):
        answers[tuple(prompt.input_ids)] = tokenizer(words).input_ids + end
    # what comes after an end, or too late, does not count
    late = tokenizer("x" * prompts[2].new_tokens + prompts[2].asked[2]).input_ids
    answers[tuple(prompts[2].input_ids)] = late
    answers[tuple(prompts[1].input_ids)] += tokenizer(prompts[1].asked[2]).input_ids
    count = len(prompts[0].asked)
    result = retrieval(subject, grid)
    assert result.scores == (((1.0, 2 / count, 0.0),),)
    subject.max_positions = 600 + prompts[0].new_tokens - 1
    with pytest.raises(UserError, match=f"{task} prompt of 600"):
        retrieval(subject, grid)


def test_prompts_are_batched(grid: RetrievalGrid) -> None:
    subject = oracle_subject(grid, set())
    retrieval(subject, grid, batch=2)
    assert subject.model.prefills == [(2, 150), (1, 150)] * 3 + [(2, 201), (1, 201)] * 3


def test_an_answer_that_ends_early_is_wrong(grid: RetrievalGrid) -> None:
    subject = oracle_subject(grid, set())
    subject.model.answers = {
        prompt: [subject.tokenizer.eos_token_id] * len(answer)
        for prompt, answer in subject.model.answers.items()
    }
    assert retrieval(subject, grid).accuracy == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_cells_do_not_depend_on_the_rest_of_the_grid(task: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(FILLER).input_ids
    big = make_grid(task, tokenizer, ids, [500, 600], [0.0, 0.5], 2, seed=1)
    small = make_grid(task, tokenizer, ids, [600], [0.5], 2, seed=1)
    assert big.cells[1][1] == small.cells[0][0]
    assert make_grid(task, tokenizer, ids, [600], [0.5], 2, seed=2).cells != small.cells
    for cell in big.cells[0]:
        assert all(len(prompt.input_ids) == 500 for prompt in cell)


def test_random_model_knows_nothing(grid: RetrievalGrid) -> None:
    assert retrieval(make_subject(max_positions=256), grid).accuracy == 0.0


def test_context_is_checked_for_the_whole_grid_first(grid: RetrievalGrid) -> None:
    subject = oracle_subject(grid, set())
    subject.max_positions = 203
    with pytest.raises(UserError, match=r"201 \+ 6 .*203"):
        retrieval(subject, grid)
    assert subject.model.prefills == []


@pytest.mark.parametrize("where", ["layer 1", "the output head"])
def test_predictions_that_are_not_finite_are_no_wrong_answers(
    grid: RetrievalGrid, where: str
) -> None:
    broken = make_subject(max_positions=256)
    model = broken.model
    module = model.lm_head if where == "the output head" else model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        module.weight.fill_(math.nan)
    with pytest.raises(UserError, match=f"not finite from {where} on"):
        retrieval(broken, grid)


def test_a_run_that_goes_past_its_latents_has_no_figure(grid: RetrievalGrid) -> None:
    subject = oracle_subject(grid, set())
    subject.compressed = True
    with pytest.raises(RunFailure, match="compressed"):
        retrieval(subject, grid)


@pytest.mark.parametrize(
    "lengths, depths, prompts", [([], [0.5], 1), ([150], [], 1), ([150], [0.5], 0)]
)
def test_empty_grids_are_refused(lengths: list[int], depths: list[float], prompts: int) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="at least one"):
        make_grid("kv", tokenizer, tokenizer(FILLER).input_ids, lengths, depths, prompts, 0)
