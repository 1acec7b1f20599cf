"""What a cache held after a forward pass: proof that an evaluation ran the deployed path."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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
