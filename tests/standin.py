"""A tiny random model behind the attributes of ``Subject``, on transformers' own cache.

It keeps the tests of the engine and the evaluation independent of the compressed cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from starkv_core.artifacts import write_yaml_atomic
from starkv_core.calibrate import run_calibration
from starkv_core.models.family import family_of
from starkv_core.models.spec import Rope
from starkv_core.recipe import load_recipe

ROPE = Rope("default", torch.ones(1), 1.0)  # nothing here reads it

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class StandinCache(DynamicCache):
    """transformers' cache with the figures that starkv reads."""

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for x in self.layers for t in (x.keys, x.values))

    @property
    def dense_nbytes(self) -> int:
        return self.nbytes // 2  # float32 here, 16 bits there

    def latent_tokens(self) -> list[int]:
        return []


class StandinSubject:
    """A dense subject; counts how often and how deep it was activated."""

    compressed = False
    codes: dict[int, Any] = {}
    cache_name = None
    mixes_lengths = True
    run_dir = None
    device = torch.device("cpu")

    def __init__(self, model: Any, tokenizer: Any, max_positions: int = 256) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = "standin"
        self.max_positions = max_positions
        self.spec = family_of(model.config, self.name).spec(ROPE)
        self.active_now = 0

    @contextmanager
    def active(self) -> Iterator[None]:
        self.active_now += 1
        try:
            yield
        finally:
            self.active_now -= 1

    def new_cache(self) -> StandinCache:
        return StandinCache()


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, so that every character past ASCII is split; ids 256 and 257 special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_subject(*, seed: int = 0, chat: bool = False, max_positions: int = 256) -> StandinSubject:
    """A random two-layer LLaMA with grouped heads, sharp enough for varied greedy answers."""
    tokenizer = byte_tokenizer(chat)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    return StandinSubject(LlamaForCausalLM(config).eval(), tokenizer, max_positions)


TEXT = "The quick brown fox, 第一章, jumps over the lazy dog and naps.\n\n\n" * 120


def save_model(folder: Path, *, chat: bool = False, max_positions: int = 1024) -> Path:
    """The stand-in's model as a folder that ``--model`` takes."""
    subject = make_subject(chat=chat, max_positions=max_positions)
    subject.model.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)
    return folder


def save_run(folder: Path, model: Path, text: Path, ratio: float = 2.0) -> Path:
    """A run of that model, decomposed without training."""
    recipe = folder.with_suffix(".yaml")
    write_yaml_atomic(
        recipe,
        {
            "schema": 1,
            "method": "star",
            "steps": 0,
            "rank_steps": 0,
            "model": {"name": str(model)},
            "budget": {"ratio": ratio},
            "data": {"source": str(text), "length": 64},
            "start": {"sequences": 8},
        },
    )
    run_calibration(load_recipe(str(recipe), []), folder, resume=False, device="cpu")
    return folder
