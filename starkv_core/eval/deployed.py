"""What a cache held after a forward pass: proof that an evaluation ran the deployed path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from starkv_core.errors import RunFailure

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


@torch.no_grad()
def where_not_finite(subject: Subject, ids: Sequence[int]) -> str:
    """Where numbers stop being finite in a forward over token ids ``ids``, in words."""
    found: list[str] = []

    def look(where: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not bool(torch.isfinite(first).all()):
                found.append(where)

        return hook

    model = subject.model
    watched = [("the embedding", model.get_input_embeddings())]
    watched += [(f"layer {i}", layer) for i, layer in enumerate(model.base_model.layers)]
    watched.append(("the output head", model.get_output_embeddings()))
    handles = [module.register_forward_hook(look(where)) for where, module in watched]
    try:
        with subject.active():
            model(
                input_ids=torch.tensor([list(ids)], device=subject.device),
                past_key_values=subject.new_cache(),
                use_cache=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"numbers are not finite from {found[0]} on"
    return "a prediction is not finite, though a prefill of the same tokens is"


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
