"""Conversations: streamed text, reuse of the cache, stopping, and contexts that fill up."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from starkv_core.chat import Conversation, Detokenizer
from starkv_core.engine import Sampler
from starkv_core.errors import UserError
from tests import models
from tests.standin import StandinSubject, byte_tokenizer, make_subject

TEXTS = [
    "plain words, twice  spaced\n\nand lines",
    "naïve café £5 – “quoted”",
    "你好，世界！こんにちは 한국어 ไทย",
    "👩‍👩‍👧 family 🇳🇴 flag 👍🏽 skin e\u0301",
    "ends with a replacement \ufffd",
    "\ufffd\ufffdstarts with two",
    " ",
]


# --- streamed text -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode()), "one token per byte, so characters are split"
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
        # Nothing is held back longer than its character: every whole character came out at once.
        assert sum(bool(piece) for piece in pieces) == len(text)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_arbitrary_bytes_join_to_the_full_decoding(seed: int) -> None:
    tokenizer = byte_tokenizer()
    rng = random.Random(seed)
    ids = [rng.randrange(256) for _ in range(60)]
    stream = Detokenizer(tokenizer)
    streamed = "".join([*map(stream.push, ids), stream.flush()])
    assert streamed == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_special_tokens_are_not_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a", add_special_tokens=False).input_ids
    stream = Detokenizer(tokenizer)
    assert [stream.push(i) for i in [*ids, tokenizer.pad_token_id, *ids]] == ["a", "", "a"]


# --- turns ---------------------------------------------------------------------------------------


class CountingSubject(StandinSubject):
    """Notes how many tokens each forward pass was fed."""

    def __init__(self, other: StandinSubject, max_positions: int | None = None) -> None:
        super().__init__(other.model, other.tokenizer, max_positions or other.max_positions)
        self.fed: list[int] = []
        self._handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.fed.append(kwargs["input_ids"].shape[1])


@pytest.fixture(scope="module", params=[False, True], ids=["running text", "chat template"])
def subject(request: pytest.FixtureRequest) -> StandinSubject:
    return make_subject(chat=request.param, max_positions=400)


def ask(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def from_scratch(subject: StandinSubject, prompt: list[int], n: int) -> list[int]:
    """Greedy answer of plain transformers to the whole prompt."""
    ids = torch.tensor([prompt])
    out = subject.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("system", [None, "Be brief. 简短"])
def test_turns_on_one_cache_equal_turns_from_scratch(
    subject: StandinSubject, system: str | None
) -> None:
    counting = CountingSubject(subject)
    conversation = Conversation(counting, system=system, max_new_tokens=12)
    for turn, question in enumerate(["Hello there", "第二个问题", "And 👍🏽?"]):
        before = list(conversation.exchanges)
        counting.fed.clear()
        answer = ask(conversation, question)
        stats = conversation.last
        assert stats is not None
        assert [e.user for e in before] == [e.user for e in conversation.exchanges[:-1]]
        prompt = conversation._prompt(conversation.exchanges)
        if subject.tokenizer.chat_template is None:
            prompt = prompt[: -stats.new_tokens]
        fed = counting.fed[:]
        said = from_scratch(subject, prompt, 12)
        assert answer == subject.tokenizer.decode(said, clean_up_tokenization_spaces=False)
        assert stats.new_tokens == 12
        assert stats.ended == "length"
        assert stats.prompt_tokens == len(prompt)
        assert fed == [len(prompt) - stats.reused_tokens, *[1] * 11]
        assert (stats.reused_tokens > 0) == (turn > 0)
        assert stats.cached_tokens == len(prompt) + 11
        # 2 layers, keys and values, 2 heads of 12 numbers: 4 bytes each here, and 2 bytes in blocks
        # of 256 slots in a dense cache
        assert stats.cache_bytes == stats.cached_tokens * 2 * 2 * 2 * 12 * 4
        assert stats.dense_bytes == -(-stats.cached_tokens // 256) * 256 * 2 * 2 * 2 * 12 * 2
        assert stats.tokens_per_second > 0


def test_running_text_feeds_only_what_is_new() -> None:
    subject = CountingSubject(make_subject(max_positions=400))
    conversation = Conversation(subject, max_new_tokens=9)
    ask(conversation, "one")
    subject.fed.clear()
    ask(conversation, "two")
    # The last token of the answer was never fed; then a line break and the question.
    assert subject.fed[0] == 1 + len("\ntwo")


def test_stop_ends_one_answer_and_keeps_it(subject: StandinSubject) -> None:
    conversation = Conversation(subject, max_new_tokens=40)
    whole = ask(conversation, "tell me")
    conversation.reset()
    got = ""
    for piece in conversation.ask("tell me"):
        got += piece
        if len(got) >= 3:
            conversation.stop()
    assert conversation.last is not None
    assert conversation.last.ended == "stopped"
    assert conversation.last.new_tokens < 40
    assert whole.startswith(got.rstrip("\ufffd"))
    assert conversation.exchanges[-1].answer == got
    assert subject.active_now == 0
    # The next question is answered as if the short answer had always been all.
    continued = ask(conversation, "go on")
    assert conversation.last.reused_tokens > 0
    conversation._forget()
    conversation.exchanges.pop()
    assert ask(conversation, "go on") == continued


def test_interrupt_within_a_pass_loses_no_history(subject: StandinSubject) -> None:
    conversation = Conversation(subject, max_new_tokens=20)
    ask(conversation, "first")
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # after the first layer has cached a token and before the second has
            raise KeyboardInterrupt

    handle = subject.model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(conversation, "second")
    finally:
        handle.remove()
    assert subject.active_now == 0
    assert [e.user for e in conversation.exchanges] == ["first", "second"]
    after = ask(conversation, "third")
    assert conversation.last is not None
    assert conversation.last.reused_tokens == 0, "a half-filled cache must not be used again"
    conversation.exchanges.pop()
    conversation._forget()
    assert ask(conversation, "third") == after


def test_closing_the_iterator_keeps_the_cache(subject: StandinSubject) -> None:
    conversation = Conversation(subject, max_new_tokens=30)
    pieces = conversation.ask("question")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert subject.active_now == 0
    continued = ask(conversation, "more")
    assert conversation.last is not None
    assert conversation.last.reused_tokens > 0
    conversation.exchanges.pop()
    conversation._forget()
    assert ask(conversation, "more") == continued


def test_end_token_is_neither_text_nor_history(subject: StandinSubject) -> None:
    conversation = Conversation(subject, max_new_tokens=12)
    ask(conversation, "hello")
    tokens = conversation.exchanges[0].tokens
    end = tokens[-8]
    subject.model.generation_config.eos_token_id = end
    try:
        conversation = Conversation(subject, max_new_tokens=12)
        answer = ask(conversation, "hello")
    finally:
        subject.model.generation_config.eos_token_id = None
    said = tokens[-12:]
    kept = said[: said.index(end)]
    assert answer == subject.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
    assert conversation.last is not None
    assert conversation.last.ended == "end"
    assert conversation.last.new_tokens == len(kept) + 1


def test_full_context_drops_the_oldest_exchanges() -> None:
    subject = make_subject(chat=True, max_positions=160)
    conversation = Conversation(subject, system="sys", max_new_tokens=20)
    dropped = []
    for number in range(6):
        ask(conversation, f"question {number} " + "x" * 20)
        assert conversation.last is not None
        assert conversation.last.prompt_tokens + conversation.last.new_tokens <= 160
        dropped.append(conversation.last.dropped)
    assert sum(dropped) > 0
    users = [e.user.split()[1] for e in conversation.exchanges]
    assert users[-1] == "5"
    assert all(int(b) == int(a) + 1 for a, b in pairwise(users))
    assert conversation.messages()[0] == {"role": "system", "content": "sys"}


def test_question_past_the_context_is_refused_and_nothing_lost(subject: StandinSubject) -> None:
    conversation = Conversation(subject, max_new_tokens=5)
    ask(conversation, "hi")
    with pytest.raises(UserError, match=r"5\d\d tokens.*400"):
        ask(conversation, "y" * 500)
    assert [e.user for e in conversation.exchanges] == ["hi"]
    ask(conversation, "still here")
    assert conversation.last is not None
    assert conversation.last.reused_tokens > 0


def test_reset_and_seeds(subject: StandinSubject) -> None:
    conversation = Conversation(
        subject, sampler=Sampler(temperature=1.5, seed=5), max_new_tokens=16
    )
    first = [ask(conversation, "a"), ask(conversation, "a")]
    conversation.reset()
    assert conversation.exchanges == []
    assert [ask(conversation, "a"), ask(conversation, "a")] == first


def test_template_without_system_role_gets_it_in_the_first_question() -> None:
    subject = make_subject(chat=True)
    subject.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}" + subject.tokenizer.chat_template
    )
    conversation = Conversation(subject, system="Be brief.", max_new_tokens=2)
    ask(conversation, "Why?")
    rendered = subject.tokenizer.decode(conversation._cached)
    assert rendered.startswith("[user]Be brief.\n\nWhy?\n[assistant]")


def test_transcript_reads_in_order(subject: StandinSubject) -> None:
    conversation = Conversation(subject, system="sys", max_new_tokens=3)
    answer = ask(conversation, "q")
    roles = [m["role"] for m in conversation.messages()]
    assert roles == ["system", "user", "assistant"]
    assert (
        conversation.transcript()
        == f"## system\n\nsys\n\n## user\n\nq\n\n## assistant\n\n{answer}\n"
    )


@pytest.mark.parametrize("chat", [False, True], ids=["running text", "chat template"])
@pytest.mark.parametrize("window", [None, 12])
def test_compressed_turns_equal_turns_from_scratch(chat: bool, window: int | None) -> None:
    """Latents, and sliding windows that cannot go back: both end in the same answers."""
    tokenizer = byte_tokenizer(chat)
    changes = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    if window is not None:
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        loaded = models.model("qwen2", **changes, layer_types=kinds, use_sliding_window=True,
                              sliding_window=window)  # fmt: skip
    else:
        loaded = models.model("qwen2", **changes)
    subject = models.deployed(replace(loaded, tokenizer=tokenizer))
    assert subject.compressed
    conversation = Conversation(subject, max_new_tokens=10)
    for question in ("one", "two", "three"):
        answer = ask(conversation, question)
        fresh = Conversation(subject, max_new_tokens=10)
        fresh.exchanges = [replace(e, tokens=list(e.tokens)) for e in conversation.exchanges[:-1]]
        assert ask(fresh, question) == answer
        assert fresh.last is not None
        assert conversation.last is not None
        assert fresh.last.reused_tokens == 0
        assert fresh.last.cached_tokens == conversation.last.cached_tokens
    if window is None or not chat:
        assert conversation.last.reused_tokens > 0
