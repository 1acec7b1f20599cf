"""The embedded model keeps what its card says; its training rows ask what they should."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from starkv_core.embedded import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_DIR
from starkv_core.embedded.evaluate import answered, perplexity, retrieval_prompts
from starkv_core.embedded.prepare import (
    excerpt,
    read_documents,
    read_tokens,
    tail_start,
    tokenize,
    write_tokens,
)
from starkv_core.embedded.train import ANSWER_WEIGHT, Budget, load, retrieval_row
from tests import tolerances

CARD_PERPLEXITY = 22.71  # MODEL_CARD.md: every fourth held-out document, windows of 1024


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load(MODEL_DIR, "cpu")


@pytest.fixture(scope="module")
def filler(embedded: tuple[Any, Any]) -> list[int]:
    return [i for text in read_documents(HELDOUT_TEXT) for i in embedded[1].encode(text)]


def test_size_limit_and_licence() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 16_000_000
    card = (MODEL_DIR.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in card
    assert f"{CARD_PERPLEXITY}" in card


def test_config_is_plain_llama_with_multi_head_attention() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] == config["num_attention_heads"] == 4
    assert config["head_dim"] == 64
    assert config["max_position_embeddings"] >= 2048
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    assert config["tie_word_embeddings"] and config["dtype"] == "bfloat16"


def test_tokenizer_is_lossless_and_splits_digits(embedded: tuple[Any, Any]) -> None:
    tokenizer = embedded[1]
    text = "The price: 70213 — naïve,\n\n\tyes \U0001f600."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize(" 70213") == ["Ġ", "7", "0", "2", "1", "3"]
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer("")["input_ids"] == []


def test_shipped_texts_are_clean_and_do_not_share_documents() -> None:
    calibration, heldout = read_documents(CALIBRATION_TEXT), read_documents(HELDOUT_TEXT)
    assert 1_000_000 < CALIBRATION_TEXT.stat().st_size < 1_500_000
    assert 300_000 < HELDOUT_TEXT.stat().st_size < 500_000
    assert not set(calibration) & set(heldout)
    assert not any("\ufffd" in document for document in calibration + heldout)


def test_passkey_accuracy_at_1024(embedded: tuple[Any, Any], filler: list[int]) -> None:
    model, tokenizer = embedded
    prompts = retrieval_prompts("passkey", tokenizer, filler, 1024, 20, seed=1)
    assert sum(answered(model, prompts, batch=4)) >= 19


def test_key_value_accuracy_at_512(embedded: tuple[Any, Any], filler: list[int]) -> None:
    model, tokenizer = embedded
    prompts = retrieval_prompts("kv", tokenizer, filler, 512, 10, seed=1)
    assert sum(answered(model, prompts, batch=4)) >= 9


def test_one_pass_agrees_with_greedy_generation(
    embedded: tuple[Any, Any], filler: list[int]
) -> None:
    model, tokenizer = embedded
    prompt = retrieval_prompts("passkey", tokenizer, filler, 300, 3, seed=2)[1]
    inputs = torch.tensor([prompt.input_ids])
    output = model.generate(inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    generated = output[0, 300:].tolist()
    assert answered(model, [prompt]) == [generated == prompt.answer_ids]


def test_heldout_perplexity_is_the_cards(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    found = perplexity(model, tokenizer, read_documents(HELDOUT_TEXT)[::4], 1024)
    assert found.per_token == pytest.approx(CARD_PERPLEXITY, rel=tolerances.CARD_PERPLEXITY)


def test_training_rows_answer_their_questions(embedded: tuple[Any, Any], filler: list[int]) -> None:
    tokenizer = embedded[1]
    rng = random.Random(0)
    for _ in range(6):
        ids, weights = retrieval_row(tokenizer, np.array(filler, dtype=np.uint16), 1025, rng)
        assert len(ids) == len(weights) == 1025
        runs: list[list[int]] = []
        for index, weight in enumerate(weights):
            if weight == ANSWER_WEIGHT:
                if weights[index - 1] != ANSWER_WEIGHT:
                    runs.append([])
                runs[-1].append(index)
        assert runs
        for run in runs:
            number = tokenizer.decode([ids[i] for i in run])
            before = tokenizer.decode(ids[: run[0]])
            asked = before[before.rindex("? ") + 2 :]
            assert f"\n{asked}{number}." in before


def test_budget_by_steps_and_by_minutes() -> None:
    assert Budget(steps=10, minutes=None).progress(5, 1e9) == 0.5
    assert Budget(steps=None, minutes=2.0).progress(10**9, 30.0) == 0.25
    assert Budget(steps=None, minutes=2.0).progress(1, 500.0) == 1.0


def test_token_files_round_trip(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    tokens = tokenize(embedded[1], ["one 12", "two"])
    assert embedded[1].decode(tokens.tolist()) == "one 12<|endoftext|>two<|endoftext|>"
    write_tokens(tmp_path / "t.xz", tokens)
    assert np.array_equal(read_tokens(tmp_path / "t.xz"), tokens)


def test_split_and_excerpts() -> None:
    assert tail_start(["a" * 100] * 100) == 98
    assert excerpt("one\n\ntwo\n\n\n\nthree\n\nfour", 2, 10) == "two\n\nthree"
