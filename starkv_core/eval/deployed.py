"""What a cache held after a forward pass: proof that an evaluation ran the deployed path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from starkv_core.errors import RunFailure, UserError

if TYPE_CHECKING:
    from starkv_core.run import Subject


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of a live cache (docs/design.md section 4).

    Attributes:
        rows: rows of the batch.
        tokens: tokens held per row.
        held: bytes of the tensors held, slots allocated ahead included.
        dense: bytes of a dense 16-bit cache of as many rows and tokens.
    """

    rows: int
    tokens: int
    held: int
    dense: int

    @property
    def per_token(self) -> float:
        """Bytes held per token."""
        return self.held / (self.rows * self.tokens)

    @property
    def ratio(self) -> float:
        """Cache ratio: dense bytes over held bytes, all layers."""
        return self.dense / self.held

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {**asdict(self), "per_token": self.per_token, "ratio": self.ratio}


def check_path(subject: Subject, path: str) -> None:
    """Refuse figures of one pass for a cache that only decode reads.

    Args:
        path: ``prefill``, or anything else for steps through the cache.

    Raises:
        UserError: a prompt would attend to all of itself, whatever the cache then keeps.
    """
    if path == "prefill" and subject.cache_name is not None:
        raise UserError(
            f"cache {subject.cache_name}: one pass attends to all tokens and never reads what it "
            "keeps; read it token by token (--mode token, of lm-eval's tasks --decode-path)"
        )


def measure(subject: Subject, cache: Any, rows: int) -> CacheBytes:
    """Bytes that ``cache`` holds for ``rows`` rows after a forward pass of ``subject``.

    Raises:
        RunFailure: the cache is not what ``subject`` deploys: empty, or latents are missing in a
            compressed layer (docs/design.md, trap 15).
    """
    tokens = int(cache.get_seq_length())
    if tokens == 0:
        raise RunFailure(f"{subject.name}: the forward pass left its cache empty")
    if subject.compressed:
        held = cache.latent_tokens()
        if not held or any(count != tokens for count in held):
            raise RunFailure(
                f"{subject.name}: after {tokens} tokens its compressed layers hold "
                f"{held or 'none'}: the forward pass went past the compressed cache, so no figure "
                "of it counts"
            )
    return CacheBytes(rows=rows, tokens=tokens, held=cache.nbytes, dense=cache.dense_nbytes)


@contextmanager
def watched(subject: Subject) -> Iterator[Callable[[], bool]]:
    """Watch the logits of the passes inside; what it gives says whether all were finite."""
    finite = torch.ones((), dtype=torch.bool, device=subject.device)

    def look(module: Any, inputs: Any, output: Tensor) -> None:
        # In place, so that a captured step looks too.
        finite.logical_and_(torch.isfinite(output).all().to(finite.device))

    handle = subject.model.get_output_embeddings().register_forward_hook(look)
    try:
        yield lambda: bool(finite)
    finally:
        handle.remove()


def refuse_not_finite(
    subject: Subject, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> NoReturn:
    """End an evaluation whose predictions were not finite; says where that begins.

    Args:
        subject: what made them.
        rows: token ids of each suspect: those fed in one pass, then those fed one by one.

    Raises:
        UserError: always. It is the model or its factors that cannot be used.
    """
    places = (place for row in rows if (place := _where_not_finite(subject, *row)) is not None)
    where = next(places, None)
    said = "a prediction is not finite, though its row alone gives none such"
    if where is not None:
        said = f"numbers are not finite from {where} on"
    raise UserError(f"{subject.name}: {said}; the model or its factors cannot be used")


@torch.no_grad()
def _where_not_finite(subject: Subject, prompt: Sequence[int], fed: Sequence[int]) -> str | None:
    """The first module that gives a number that is not finite; None where there is none."""
    found: list[str] = []

    def look(where: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not bool(torch.isfinite(first).all()):
                found.append(where)

        return hook

    model = subject.model
    seen = [("the embedding", model.get_input_embeddings())]
    seen += [(f"layer {i}", layer) for i, layer in enumerate(model.base_model.layers)]
    seen.append(("the output head", model.get_output_embeddings()))
    handles = [module.register_forward_hook(look(where)) for where, module in seen]
    cache = subject.new_cache()
    try:
        with subject.active():
            for part in [prompt, *([token] for token in fed)]:
                if len(part) > 0 and not found:
                    ids = torch.tensor([list(part)], device=subject.device)
                    model(input_ids=ids, past_key_values=cache, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@torch.no_grad()
def measure_at(subject: Subject, tokens: int) -> CacheBytes:
    """Bytes of a cache after a prefill of ``tokens`` tokens of one row, whichever they are."""
    cache = subject.new_cache()
    with subject.active() as model:
        model.base_model(
            input_ids=torch.zeros(1, tokens, dtype=torch.long, device=subject.device),
            past_key_values=cache,
            use_cache=True,
        )
    return measure(subject, cache, 1)
