"""Tile sizes of the kernels, how the sequence is split, and the memory that follows from both.

Needs no Triton: what a call takes is planned on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from triton_ops.latent_attention.layout import KeyLayout, power, row_width

_MOST_SPLITS = 64
PROCESSORS = 132  # multiprocessors of an H200, where no GPU can be asked


@dataclass(frozen=True)
class Tuning:
    """Tile sizes of the kernels; the defaults are the best measured on an H200.

    Attributes:
        band, softmax, rebuilt, mix, expand: keyword arguments of a launch, Triton's own included.
        band_programs, rebuilt_programs, mix_programs: that one multiprocessor runs at once; how
            often the sequence is split follows from it.
        processors: multiprocessors; None asks the device.
    """

    band: Mapping[str, int] = field(
        default_factory=lambda: {"T": 128, "STAGES": 3, "num_warps": 4, "maxnreg": 168}
    )
    softmax: Mapping[str, int] = field(default_factory=lambda: {"T": 256, "num_warps": 4})
    rebuilt: Mapping[str, int] = field(
        default_factory=lambda: {"T": 64, "STAGES": 3, "num_warps": 4, "maxnreg": 128}
    )
    mix: Mapping[str, int] = field(
        default_factory=lambda: {"T": 128, "N": 128, "STAGES": 3, "num_warps": 4}
    )
    expand: Mapping[str, int] = field(
        default_factory=lambda: {"N": 32, "K": 256, "STAGES": 3, "num_warps": 4}
    )
    band_programs: int = 3
    rebuilt_programs: int = 4
    mix_programs: int = 1
    processors: int | None = None


def processors_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS  # interpreted: the sequence is split as there


@lru_cache(maxsize=4096)  # it takes longer than a launch, and every layer asks for the same
def splits_of(tiles: int, others: int, at_once: int) -> tuple[int, int]:
    """Splits of a sequence of ``tiles`` that end soonest, and tiles of each.

    Args:
        others: programs for each split.
        at_once: programs that run at once.
    """

    def length(splits: int) -> int:
        per = -(-tiles // splits)
        waves = -(-others * -(-tiles // per) // at_once)
        return waves * (per + 1)  # starting a program takes about as long as a tile

    wanted = min(range(1, min(tiles, _MOST_SPLITS) + 1), key=length)
    per = -(-tiles // wanted)
    return -(-tiles // per), per


def mix_splits(
    tuning: Tuning, batch: int, columns: int, value_room: int, room: int, processors: int
) -> tuple[int, int, int, int]:
    """How ``mix_values`` is cut.

    Args:
        columns: query columns of all heads.
        value_room: numbers of a row of value latents.
        room: slots.

    Returns:
        Columns of a program, programs for a split, splits, tiles of a split.
    """
    mix, width = tuning.mix, min(64, power(columns))
    parts = -(-value_room // mix["N"]) * -(-columns // width)
    tiles = -(-room // mix["T"])
    return width, parts, *splits_of(tiles, parts * batch, processors * tuning.mix_programs)


@lru_cache(maxsize=1024)
def score_segments(layout: KeyLayout, bias: bool, columns: int) -> int:
    """Rows of scores that a row of the batch takes.

    Args:
        bias: keys have one.
        columns: query columns of one key head.
    """
    pieces = layout.pieces(bias) if columns == 1 else None
    if pieces is None:
        return len(layout.ranks) * columns
    return pieces[-1].segment + pieces[-1].heads


def workspace_bytes(
    layout: KeyLayout,
    bias: bool,
    value_rank: int,
    *,
    batch: int,
    heads: int,
    dim: int,
    room: int,
    n_query: int = 1,
    processors: int = PROCESSORS,
) -> int:
    """Bytes that a call of the kernels allocates, its 16-bit result included.

    Args:
        layout, bias, value_rank: of the factors; whether keys have a bias.
        batch, heads, dim, n_query: ``B``, ``H``, ``D``, ``Q`` of the queries.
        room: slots of the buffers.
        processors: multiprocessors of the GPU: fewer split the sequence less.
    """
    tuning, columns, value_room = Tuning(), heads * n_query, row_width(value_rank)
    segments = score_segments(layout, bias, columns // len(layout.ranks))
    splits = mix_splits(tuning, batch, columns, value_room, room, processors)[2]
    tiles = room // tuning.softmax["T"]
    per_column = (
        2 * room  # p
        + 8 * tiles  # tops and masses
        + 4  # totals
        + (4 * splits + 2) * value_room  # mixed values of the splits, and their sum
        + 2 * dim
    )
    return batch * (4 * segments * room + columns * per_column)
