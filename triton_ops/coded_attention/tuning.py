"""Tile sizes of the kernels over codes, how the sequence is split, and the memory that follows.

Needs no Triton: what a call takes is planned on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from triton_ops.latent_attention.layout import power, row_width
from triton_ops.latent_attention.tuning import PROCESSORS, splits_of
from triton_ops.latent_codes import TILE, LayerCodes, Section, tiles

PART = 128  # slots of a step of the kernels that score codes
SCORES = 256  # slots of a tile of the softmax
EXACT = 64  # rows of a tile that are not coded


@dataclass(frozen=True)
class Tuning:
    """Tile sizes of the kernels; the defaults are the best measured on an H200.

    Attributes:
        band, rebuilt, mix, mix_3: keyword arguments of a launch, Triton's own included; ``mix_3``
            is of sections of 3 bits, whose steps are twice as long.
        band_programs, rebuilt_programs, mix_programs: that one multiprocessor runs at once; how
            often the sequence is split follows from it.
        processors: multiprocessors; None asks the device.
    """

    band: Mapping[str, int] = field(
        default_factory=lambda: {"STAGES": 3, "num_warps": 4, "maxnreg": 168}
    )
    rebuilt: Mapping[str, int] = field(
        default_factory=lambda: {"STAGES": 3, "num_warps": 4, "maxnreg": 168}
    )
    mix: Mapping[str, int] = field(
        default_factory=lambda: {"N": 128, "K": 64, "STAGES": 3, "num_warps": 4}
    )
    mix_3: Mapping[str, int] = field(
        default_factory=lambda: {"N": 128, "K": 128, "STAGES": 2, "num_warps": 4}
    )
    band_programs: int = 3
    rebuilt_programs: int = 3
    mix_programs: int = 2
    processors: int | None = None

    def mix_of(self, bits: int) -> Mapping[str, int]:
        """Arguments of the launch that mixes values of a section."""
        return self.mix_3 if bits == 3 else self.mix


def mix_splits(
    tuning: Tuning,
    sections: Sequence[Section],
    batch: int,
    columns: int,
    room: int,
    processors: int,
) -> tuple[int, int]:
    """Splits of ``room`` tiles for the kernels that mix values, and tiles of each.

    Args:
        columns: query columns of all heads.
    """
    blocks = -(-columns // min(64, power(columns)))
    # Sections run one after the other: the smallest has to fill the GPU.
    parts = min(-(-s.channels // tuning.mix_of(s.bits)["N"]) for s in sections) * blocks
    return splits_of(room, parts * batch, processors * tuning.mix_programs)


def workspace_bytes(
    codes: LayerCodes,
    lines: int,
    *,
    batch: int,
    heads: int,
    dim: int,
    tokens: int,
    processors: int = PROCESSORS,
) -> int:
    """Bytes that a call of the kernels for one new token allocates, its 16-bit result included.

    Args:
        lines: rows of scores that a row of the batch takes (:class:`CodedFactors` knows).
        batch, heads, dim: ``B``, ``H``, ``D`` of the queries.
        tokens: that the cache has room for.
        processors: multiprocessors of the GPU: fewer split the sequence less.
    """
    room, values = tiles(tokens), codes.values.layout
    slots = room * TILE
    exact = -(-(codes.sinks + codes.window) // EXACT)
    splits, _ = mix_splits(Tuning(), values.sections, batch, heads, room, processors)
    splits += exact > 0
    per_head = (
        2 * (slots + exact * EXACT)  # p
        + 8 * (exact + slots // SCORES)  # tops and masses
        + 4  # totals
        + (4 * splits + 2) * row_width(values.channels)  # mixed values of the splits, their sum
        + 2 * dim
    )
    return batch * (4 * lines * slots + heads * per_head)
