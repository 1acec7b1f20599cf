"""Baselines for comparison: dense caches whose keys and values take a few bits, really packed.

KIVI (arXiv 2402.02750): keys by channel in groups of 32 tokens, values by token in groups of 32
channels, 2 or 4 bits, the most recent tokens in 16. Round-to-nearest: keys and values by token and
head. All asymmetric, with a scale and a zero point in fp16 for every group. A prompt attends to
exact values and is coded afterwards, as in KIVI's release.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final

import torch

from starkv_core.budget import slots
from starkv_core.cache import LatentCache, RowwiseLayer
from starkv_core.errors import UserError
from starkv_core.run import Subject, dense_of

_TINY = 2.0**-24  # least positive number of fp16


@dataclass(frozen=True)
class DenseScheme:
    """How a dense cache is coded.

    Attributes:
        name: as the user gives it.
        bits: 2, 4 or 8.
        group: channels of a value group (and tokens of a key group); 0 is a whole head.
        residual: most recent tokens in 16 bits, a multiple of ``group``; keys hold up to so many,
            values exactly so many. With it keys are coded by channel, without by token.
    """

    name: str
    bits: int
    group: int
    residual: int

    def sizes(self, head_dim: int) -> int:
        """Channels of a group. UserError where they do not divide a head."""
        group = self.group or head_dim
        if head_dim % group or head_dim * self.bits % 8:
            raise UserError(
                f"{self.name}: groups of {group} channels in {self.bits} bits do not divide heads "
                f"of {head_dim}; compare with another baseline"
            )
        return group


SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        DenseScheme("kivi-2", 2, 32, 128),
        DenseScheme("kivi-4", 4, 32, 128),
        DenseScheme("rtn-2", 2, 0, 0),
        DenseScheme("rtn-4", 4, 0, 0),
        DenseScheme("rtn-8", 8, 0, 0),
    )
}


@dataclass(frozen=True)
class CodedDenseSubject(Subject):
    """A dense model whose cache is coded.

    Attributes:
        dense_scheme: how.
    """

    dense_scheme: DenseScheme = SCHEMES["kivi-2"]

    @property
    def name(self) -> str:
        """Model and scheme."""
        return f"{self.base.name}, {self.dense_scheme.name}"

    @property
    def cache_name(self) -> str:
        """The scheme."""
        return self.dense_scheme.name

    @property
    def mixes_lengths(self) -> bool:
        """No: padding would take part in groups."""
        return False

    def new_cache(self) -> LatentCache:
        """An empty cache; layers under a sliding window stay in 16 bits."""
        cache = LatentCache(self.spec, None, self.store_dtype)
        for i in range(self.spec.n_layers):
            if i not in self.spec.windows:
                cache.layers[i] = CodedDenseLayer(self.dense_scheme, self.store_dtype)
        return cache


def coded_dense(subject: Subject, name: str) -> CodedDenseSubject:
    """The dense model of a subject with a coded cache: ``kivi-2``, ``kivi-4``, ``rtn-4``, ...

    Raises:
        UserError: unknown name (with the nearest), or heads that cannot be coded so.
    """
    scheme = SCHEMES.get(name)
    if scheme is None:
        nearest = get_close_matches(name, list(SCHEMES), n=1, cutoff=0.0)[0]
        raise UserError(
            f"baseline {name!r}: unknown; the nearest is {nearest}, all are {', '.join(SCHEMES)}"
        )
    scheme.sizes(subject.spec.head_dim)
    plain = dense_of(subject)
    return CodedDenseSubject(plain.base, store_dtype=plain.store_dtype, dense_scheme=scheme)


class _Coded:
    """Keys or values of a layer: codes of the oldest tokens, 16 bits for the rest.

    Attributes:
        codes: uint8 ``[B, H, room, D * bits / 8]``.
        scale, zero: fp16; by token ``[B, H, room, D / group]``, by channel
            ``[B, H, room / group, D]``.
        rest: ``[B, H, residual, D]``, the tokens from ``coded`` on.
    """

    def __init__(
        self, scheme: DenseScheme, by_channel: bool, new: torch.Tensor, dtype: Any
    ) -> None:
        batch, heads, _, dim = new.shape
        self.scheme, self.by_channel, self.dim = scheme, by_channel, dim
        self.group, self.coded, self.held = scheme.sizes(dim), 0, 0
        self.codes = new.new_zeros(batch, heads, 0, dim * scheme.bits // 8, dtype=torch.uint8)
        width = dim if by_channel else dim // self.group
        self.scale = new.new_zeros(batch, heads, 0, width, dtype=torch.float16)
        self.zero = torch.zeros_like(self.scale)
        self.rest = new.new_zeros(batch, heads, scheme.residual, dim, dtype=dtype)

    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.scale, self.zero, self.rest]

    def change(self, change: Any) -> None:
        self.codes, self.scale, self.zero, self.rest = map(change, self.tensors())

    def read(self) -> torch.Tensor:
        """Float32 ``[B, H, coded + held, D]``."""
        codes = _unpacked(self.codes[:, :, : self.coded], self.scheme.bits).float()
        if self.by_channel:
            of_token = torch.arange(self.coded, device=codes.device) // self.group
            scale, zero = (t[:, :, of_token].float() for t in (self.scale, self.zero))
        else:
            scale, zero = (
                t[:, :, : self.coded].float().repeat_interleave(self.group, -1)
                for t in (self.scale, self.zero)
            )
        return torch.cat((codes * scale + zero, self.rest[:, :, : self.held].float()), 2)

    def store(self, new: torch.Tensor) -> None:
        """Take in ``[B, H, L, D]`` and code what no longer belongs to the rest."""
        tail = torch.cat((self.rest[:, :, : self.held], new.to(self.rest.dtype)), 2)
        total, residual = self.coded + tail.shape[2], self.scheme.residual
        coded = total // residual * residual if self.by_channel else max(total - residual, 0)
        coded = max(coded, self.coded)
        leaving = coded - self.coded
        if leaving:
            self._grow(slots(coded))
            self._code(tail[:, :, :leaving].float())
        self.coded, self.held = coded, total - coded
        self.rest[:, :, : self.held] = tail[:, :, leaving:]

    def _code(self, x: torch.Tensor) -> None:
        dim = 2 if self.by_channel else 3
        parts = x.unflatten(dim, (-1, self.group))
        low, high = parts.amin(dim + 1), parts.amax(dim + 1)
        top = 2**self.scheme.bits - 1
        zero = low.half()
        scale = ((high - low) / top).clamp_min(_TINY).half()
        spread = [t.float().repeat_interleave(self.group, dim) for t in (scale, zero)]
        codes = ((x - spread[1]) / spread[0]).round().clamp(0, top).to(torch.uint8)
        stop = self.coded + x.shape[2]
        self.codes[:, :, self.coded : stop] = _packed(codes, self.scheme.bits)
        step = self.group if self.by_channel else 1
        place = slice(self.coded // step, stop // step)
        self.scale[:, :, place], self.zero[:, :, place] = scale, zero

    def _grow(self, room: int) -> None:
        def grown(t: torch.Tensor, count: int) -> torch.Tensor:
            more = max(count - t.shape[2], 0)
            return torch.cat((t, t.new_zeros(*t.shape[:2], more, t.shape[3])), 2) if more else t

        self.codes = grown(self.codes, room)
        groups = room // self.group if self.by_channel else room
        self.scale, self.zero = grown(self.scale, groups), grown(self.zero, groups)


class CodedDenseLayer(RowwiseLayer):
    """Cache layer of a dense model, coded; see the head of this module."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    keys: torch.Tensor | None
    values: torch.Tensor | None
    is_initialized: bool

    def __init__(self, scheme: DenseScheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.dtype, self.length = scheme, dtype, 0
        self.sides: list[_Coded] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the first ``[B, H, L, D]``."""
        by_channel = self.scheme.residual > 0
        self.sides = [
            _Coded(self.scheme, by_channel, key_states, self.dtype),
            _Coded(self.scheme, False, value_states, self.dtype),
        ]
        # transformers asks these for the batch alone.
        self.keys, self.values = self.sides[0].codes, self.sides[1].codes
        self.is_initialized = True

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [t for side in self.sides for t in side.tensors()]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, H, L, D]``; returns what was held, as it reads now, then the new, exact."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = []
        for side, new in zip(self.sides, (key_states, value_states), strict=True):
            exact = new.to(self.dtype).to(new.dtype)
            found.append(torch.cat((side.read().to(new.dtype), exact), 2) if self.length else exact)
            side.store(new)
        self.length += key_states.shape[2]
        self.keys, self.values = self.sides[0].codes, self.sides[1].codes
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next ``query_length`` tokens attend to."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.sides, self.length = [], 0
        self.keys = self.values = None
        self.is_initialized = False

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for side in self.sides:
            side.change(change)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 ``[..., D]`` as bytes ``[..., D * bits / 8]``, the first in the low bits."""
    parts = codes.unflatten(-1, (-1, 8 // bits))
    packed = torch.zeros_like(parts[..., 0])
    for n in range(8 // bits):
        packed |= parts[..., n] << (n * bits)
    return packed


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`_packed`."""
    parts = [packed >> (n * bits) & (2**bits - 1) for n in range(8 // bits)]
    return torch.stack(parts, -1).flatten(-2)
