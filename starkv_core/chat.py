"""A conversation on one cache: history, reuse of what is cached, streamed text. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from starkv_core.budget import predict_bytes
from starkv_core.engine import Sampler, end_tokens, stream
from starkv_core.errors import UserError
from starkv_core.rank_map import RankMap

if TYPE_CHECKING:
    from starkv_core.run import Subject

_UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class Detokenizer:
    """Turns tokens into text as they come; the pieces joined equal the decoding of all tokens.

    Bytes of a character that is not complete yet are held back.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Decoding starts one emission back: how a token reads can depend on the one before it.
        self._context = 0
        self._emitted = 0

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._fresh()
        return "" if text.endswith(_UNFINISHED) else self._emit(text)

    def flush(self) -> str:
        """What was held back, as the tokenizer decodes it."""
        return self._emit(self._fresh())

    def _fresh(self) -> str:
        known = self._decode(self._ids[self._context : self._emitted])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _emit(self, text: str) -> str:
        self._context, self._emitted = self._emitted, len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


@dataclass
class Exchange:
    """One question and its answer; ``tokens`` are those of both, as running text."""

    user: str
    tokens: list[int]
    answer: str = ""


@dataclass(frozen=True)
class TurnStats:
    """Figures of one answer.

    Attributes:
        prompt_tokens: tokens of the whole prompt, history included.
        reused_tokens: of these, tokens that the cache still held.
        new_tokens: tokens of the answer, the end token included.
        prefill_seconds: until the first token.
        decode_seconds: from the first token to the last.
        cached_tokens, cache_bytes: what the cache holds, slots allocated ahead included.
        dense_bytes: what the cache of the dense model would, allocated in the same blocks: in a
            short chat these blocks weigh more than the tokens.
        dropped: oldest exchanges left out for lack of context.
        ended: ``end`` (the model ended it), ``length`` (the limit did) or ``stopped``.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cached_tokens: int
    cache_bytes: int
    dense_bytes: int
    dropped: int
    ended: str

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed, the first token left out; 0 for answers of one token."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else 0.0

    @property
    def cache_ratio(self) -> float:
        """Dense bytes over bytes held; 0 for an empty cache."""
        return self.dense_bytes / self.cache_bytes if self.cache_bytes else 0.0


class Conversation:
    """History and cache of one chat.

    With a chat template the history is rendered through it; without one, questions and answers form
    one running text, each new question on a new line. Either way only tokens that the cache lacks
    are fed: those after the longest prefix it shares with the new prompt.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        system: str | None = None,
        sampler: Sampler | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens}: must be 1 or more")
        self.subject = subject
        self.system = system
        self.sampler = sampler or Sampler()
        self.max_new_tokens = max_new_tokens
        self._ends = end_tokens(subject)
        self._stop = False
        self._cached: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget the history and the cache; the system prompt stays."""
        self.exchanges: list[Exchange] = []
        self.last: TurnStats | None = None
        self._asked = 0
        self._forget()

    def stop(self) -> None:
        """End the running answer after its current token. Safe to call from a signal handler."""
        self._stop = True

    def messages(self) -> list[dict[str, str]]:
        """The history as role and content, the system prompt first."""
        return self._messages(self.exchanges)

    def transcript(self) -> str:
        """The history as Markdown."""
        return "\n".join(f"## {m['role']}\n\n{m['content']}\n" for m in self.messages())

    def ask(self, text: str) -> Iterator[str]:
        """Answer ``text``, piece by piece; afterwards ``last`` holds the figures.

        An answer that :meth:`stop`, closing the iterator or an error cuts short stays in the
        history as far as it went.

        Raises:
            UserError: the question alone exceeds the context; the history is as before then.
        """
        self._stop = False
        exchange = Exchange(text, self._encode(f"\n{text}" if self.exchanges else text))
        kept, prompt = self._fit(exchange)
        dropped = len(self.exchanges) - len(kept)
        self.exchanges = [*kept, exchange]
        reused = self._reuse(prompt)
        said: list[int] = []
        clock = [time.perf_counter()]
        ended = "stopped"
        try:
            ended = yield from self._pieces(prompt, reused, exchange, said, clock)
        except GeneratorExit:
            raise  # between two steps: the cache is whole
        except BaseException:
            self._forget()  # perhaps within a pass: some layers may hold a token that others lack
            raise
        finally:
            self._asked += 1
            self._cached = (prompt + said)[: int(self._cache.get_seq_length())]
            exchange.tokens += [token for token in said if token not in self._ends]
            if not said:
                self.exchanges.pop()
            self.last = TurnStats(
                prompt_tokens=len(prompt),
                reused_tokens=reused,
                new_tokens=len(said),
                prefill_seconds=clock[1] - clock[0] if said else 0.0,
                decode_seconds=clock[-1] - clock[1] if said else 0.0,
                cached_tokens=len(self._cached),
                cache_bytes=int(self._cache.nbytes),
                dense_bytes=self._dense_bytes(len(self._cached)),
                dropped=dropped,
                ended=ended,
            )

    def _pieces(
        self,
        prompt: list[int],
        reused: int,
        exchange: Exchange,
        said: list[int],
        clock: list[float],
    ) -> Generator[str, None, str]:
        """Stream the answer into ``exchange``, its tokens into ``said``; returns how it ended."""
        steps = stream(
            self.subject,
            torch.tensor([prompt[reused:]]),
            None,
            min(self.max_new_tokens, self.subject.max_positions - len(prompt)),
            sampler=replace(self.sampler, seed=self.sampler.seed + self._asked),
            cache=self._cache,
        )
        text = Detokenizer(self.subject.tokenizer)
        ended = "length"
        with closing(steps):
            for step in steps:
                said.append(int(step[0]))
                clock.append(time.perf_counter())
                if said[-1] in self._ends:
                    ended = "end"
                    break
                piece = text.push(said[-1])
                exchange.answer += piece
                if piece:
                    yield piece
                if self._stop:
                    ended = "stopped"
                    break
        rest = text.flush()
        exchange.answer += rest
        if rest:
            yield rest
        return ended

    # -- prompts -------------------------------------------------------------------------------

    def _fit(self, exchange: Exchange) -> tuple[list[Exchange], list[int]]:
        """The newest exchanges that leave room for an answer, and the prompt they make."""
        limit = self.subject.max_positions
        room = min(self.max_new_tokens, limit // 4)
        kept = list(self.exchanges)
        prompt = self._prompt([*kept, exchange])
        while kept and len(prompt) + room > limit:
            kept = kept[1:]
            prompt = self._prompt([*kept, exchange])
        if len(prompt) >= limit:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and leaves no room for an answer in the "
                f"context of {self.subject.name}, which is {limit} tokens; shorten it"
            )
        return kept, prompt

    def _prompt(self, exchanges: list[Exchange]) -> list[int]:
        tokenizer = self.subject.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            head = tokenizer(f"{self.system}\n" if self.system else "").input_ids
            return [*head, *(token for exchange in exchanges for token in exchange.tokens)]
        return self._encode(self._rendered(self._messages(exchanges)[:-1]))

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        def apply(messages: list[dict[str, str]]) -> str:
            return str(
                self.subject.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
            )

        try:
            return apply(messages)
        except TemplateError as error:
            if not self.system:
                raise UserError(f"the chat template of {self.subject.name}: {error}") from error
        # Some templates know no system role (Mistral's): it then opens the first question.
        first = messages[1]["content"]
        return apply([{"role": "user", "content": f"{self.system}\n\n{first}"}, *messages[2:]])

    def _messages(self, exchanges: list[Exchange]) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in exchanges:
            messages.append({"role": "user", "content": exchange.user})
            messages.append({"role": "assistant", "content": exchange.answer})
        return messages

    def _encode(self, text: str) -> list[int]:
        return list(self.subject.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    # -- cache ---------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._cache = self.subject.new_cache()
        self._cached = []

    def _dense_bytes(self, tokens: int) -> int:
        spec = self.subject.spec
        return predict_bytes(spec, RankMap((None,) * spec.n_layers), tokens)

    def _reuse(self, prompt: list[int]) -> int:
        """Crop the cache to what it shares with ``prompt``; tokens shared, at most all but one."""
        shared = 0
        for held, wanted in zip(self._cached, prompt[:-1], strict=False):
            if held != wanted:
                break
            shared += 1
        surplus = len(self._cached) - shared
        try:
            if surplus:
                self._cache.crop(-surplus)
        except RuntimeError:
            shared = 0  # a sliding window has dropped what it would have to go back to
        if shared == 0:
            self._forget()
        return shared
