"""What the kernels read beside codes: factors, in the pieces in which they take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from triton_ops.latent_attention.layout import PIECE, PIECE_HEADS, power, row_width
from triton_ops.latent_codes import LayerCodes
from triton_ops.latent_codes.layout import PAD, CodeLayout, Plane


@dataclass(frozen=True)
class Span:
    """One section of a row and where its codes lie.

    Attributes:
        bits: of its channels.
        first, channels: of the row.
        offset: bytes of a tile before it.
        stored: channels with padding.
        top_plane: bytes from ``offset`` to the plane of the third bit; 0 where there is none.
        middle: the code that stands for 0.
        planes: of its bits, low ones first.
    """

    bits: int
    first: int
    channels: int
    offset: int
    stored: int
    top_plane: int
    middle: float
    planes: tuple[Plane, ...]


def spans(layout: CodeLayout, middles: torch.Tensor) -> list[Span]:
    """Sections of a layout; ``middles`` is float32 ``[R]``, the zero point of each channel."""
    by_first: dict[int, list[Plane]] = {}
    for plane in layout.planes:
        by_first.setdefault(plane.first, []).append(plane)
    starts = accumulate((s.channels for s in layout.sections), initial=0)
    found = []
    for section, start in zip(layout.sections, starts, strict=False):
        planes = by_first[start]
        top = planes[1].offset - planes[0].offset if len(planes) > 1 else 0
        middle = float(middles[start])
        found.append(
            Span(
                section.bits,
                start,
                section.channels,
                planes[0].offset,
                planes[0].stored,
                top,
                middle,
                tuple(planes),
            )
        )
    return found


@dataclass(frozen=True)
class BandTable:
    """One section for scores without rebuilt keys.

    Attributes:
        rows: float32 ``[pieces, N, D]``; roles, heads: int32 ``[pieces, N]``; starts: int32
            ``[pieces]``; segments, groups: int32 ``[pieces, PIECE_HEADS]``.
    """

    span: Span
    rows: torch.Tensor
    roles: torch.Tensor
    heads: torch.Tensor
    starts: torch.Tensor
    segments: torch.Tensor
    groups: torch.Tensor
    biased: bool


@dataclass(frozen=True)
class RebuiltTable:
    """Heads of one section whose channels take windows of ``width`` lanes.

    Attributes:
        rows: float32 ``[entries, width, D]``; bias: float32 ``[entries, D]``; entries: int32
            ``[entries, 4]``: head, first channel to load, segment, scale group.
    """

    span: Span
    width: int
    rows: torch.Tensor
    bias: torch.Tensor
    entries: torch.Tensor


@dataclass(frozen=True, eq=False)
class CodedFactors:
    """Factors of one quantised layer, in the order of its stored rows.

    Attributes:
        codes: quantisers of the layer.
        key_index: int64 ``[H_kv, r]``: channels of each head, ascending, any where ``key_up`` is 0.
        ranks: channels of each head.
        key_up: ``[H_kv, D, r]``, zero from a head's rank on.
        key_bias: ``[H_kv, D]`` or None.
        value_up: ``[H_kv, D, r_v]``.
    """

    codes: LayerCodes
    key_index: torch.Tensor
    ranks: tuple[int, ...]
    key_up: torch.Tensor
    key_bias: torch.Tensor | None
    value_up: torch.Tensor

    @cached_property
    def _members(self) -> list[list[int]]:
        """Channels of each head."""
        index = self.key_index.tolist()
        return [index[h][:rank] for h, rank in enumerate(self.ranks)]

    @property
    def shared(self) -> bool:
        """Whether heads share channels."""
        return sum(self.ranks) > self.codes.keys.layout.channels

    @cached_property
    @torch.inference_mode(False)
    def key_spans(self) -> list[Span]:
        """Sections of the keys."""
        return spans(self.codes.keys.layout, self.codes.keys.levels[0].cpu())

    @cached_property
    @torch.inference_mode(False)
    def value_spans(self) -> list[Span]:
        """Sections of the values."""
        return spans(self.codes.values.layout, self.codes.values.levels[0].cpu())

    @cached_property
    def value_groups(self) -> list[int]:
        """Scale group of each section of the values."""
        return [scale_group(self.codes.values.layout, span.first) for span in self.value_spans]

    @cached_property
    @torch.inference_mode(False)
    def padded_value_up(self) -> torch.Tensor:
        """``value_up`` with rows that begin on 16 bytes."""
        pad = row_width(self.value_up.shape[-1]) - self.value_up.shape[-1]
        return torch.nn.functional.pad(self.value_up, (0, pad)).contiguous()

    @cached_property
    @torch.inference_mode(False)
    def exact_rows(self) -> torch.Tensor:
        """Int32 ``[1]``: rows that are not coded."""
        rows = self.codes.sinks + self.codes.window
        return torch.tensor([rows], dtype=torch.int32, device=self.key_up.device)

    @cached_property
    @torch.inference_mode(False)
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """For rows that are not coded: int32 ``[H_kv, K]`` channels, ``[H_kv, K, D]`` of U."""
        heads, dim, rank = self.key_up.shape
        width = power(rank)
        index = torch.zeros(heads, width, dtype=torch.int32, device=self.key_up.device)
        rows = self.key_up.new_zeros(heads, width, dim)
        index[:, :rank], rows[:, :rank] = self.key_index, self.key_up.transpose(1, 2)
        return index, rows

    @cached_property
    @torch.inference_mode(False)
    def band(self) -> tuple[list[BandTable], torch.Tensor, int, int]:
        """Tables of the sections; int32 ``[H, 2]``: first segment of each head and how many; how
        many there are in all, and how many the head has that has most."""
        cut = [self._pieces(number) for number in range(len(self.key_spans))]
        counts = [0] * len(self.ranks)
        for pieces in cut:
            for channels, _ in pieces:
                for head in {self._owner[c] for c in channels}:
                    counts[head] += 1
        firsts = list(accumulate(counts, initial=0))
        used = [0] * len(counts)
        tables = [
            self._band_table(span, pieces, firsts, used)
            for span, pieces in zip(self.key_spans, cut, strict=True)
        ]
        return tables, self._pairs(firsts, counts), firsts[-1], max(counts)

    @cached_property
    def _owner(self) -> dict[int, int]:
        return {c: h for h, channels in enumerate(self._members) for c in channels}

    @cached_property
    def _last_section(self) -> list[int]:
        """The section that has each head's last channel: its key bias goes there."""
        firsts = [span.first for span in self.key_spans]
        return [sum(first <= max(c) for first in firsts) - 1 for c in self._members]

    def _pieces(self, number: int) -> list[tuple[list[int], list[int]]]:
        """Section ``number`` cut up: channels of the row, and heads whose bias has a lane there."""
        span, found = self.key_spans[number], []
        channel, end = span.first, span.first + span.channels
        bias = self.key_bias is not None
        while channel < end:
            load = span.first + (channel - span.first) // PAD * PAD
            taken: list[int] = []
            biased: list[int] = []
            heads: set[int] = set()
            while channel < end:
                head = self._owner[channel]
                ends = bias and channel == max(self._members[head])
                lanes = channel + 1 - load + len(biased) + ends
                if lanes > PIECE or len(heads | {head}) > PIECE_HEADS:
                    break
                taken.append(channel)
                heads.add(head)
                if ends:
                    biased.append(head)
                channel += 1
            found.append((taken, biased))
        return found

    def _band_table(
        self,
        span: Span,
        pieces: list[tuple[list[int], list[int]]],
        firsts: list[int],
        used: list[int],
    ) -> BandTable:
        up, step = self.key_up, self.codes.keys.step
        size = len(pieces), PIECE
        rows = torch.zeros(*size, up.shape[1], dtype=torch.float32, device=up.device)
        roles = torch.full(size, -1, dtype=torch.int32)
        owners = torch.zeros(size, dtype=torch.int32)
        segments = torch.full((len(pieces), PIECE_HEADS), -1, dtype=torch.int32)
        groups = torch.zeros(len(pieces), PIECE_HEADS, dtype=torch.int32)
        starts = []
        for i, (channels, biased) in enumerate(pieces):
            load = (channels[0] - span.first) // PAD * PAD
            starts.append(load)
            here = sorted({self._owner[c] for c in channels})
            for column, head in enumerate(here):
                segments[i, column] = firsts[head] + used[head]
                used[head] += 1
            for c in channels:
                head, lane = self._owner[c], c - span.first - load
                roles[i, lane], owners[i, lane] = here.index(head), head
                groups[i, here.index(head)] = scale_group(self.codes.keys.layout, c)
                rows[i, lane] = up[head, :, self._members[head].index(c)].float() * step[c]
            after = channels[-1] + 1 - span.first - load
            for lane, head in enumerate(biased, after):
                assert self.key_bias is not None
                roles[i, lane], owners[i, lane] = here.index(head) + PIECE_HEADS, head
                rows[i, lane] = self.key_bias[head].float()
        device = up.device
        return BandTable(
            span,
            rows,
            roles.to(device),
            owners.to(device),
            torch.tensor(starts, dtype=torch.int32, device=device),
            segments.to(device),
            groups.to(device),
            any(biased for _, biased in pieces),
        )

    @cached_property
    @torch.inference_mode(False)
    def rebuilt(self) -> tuple[list[RebuiltTable], torch.Tensor, int, int]:
        """As :attr:`band`, for rebuilt keys."""
        members = self._members
        parts: list[tuple[int, int, list[int]]] = []
        for number, span in enumerate(self.key_spans):
            for head, channels in enumerate(members):
                mine = [c for c in channels if span.first <= c < span.first + span.channels]
                if mine:
                    parts.append((number, head, mine))
        counts = [sum(head == h for _, head, _ in parts) for h in range(len(members))]
        firsts = list(accumulate(counts, initial=0))
        used = [0] * len(counts)
        groups: dict[tuple[int, int], list[tuple[list[int], torch.Tensor, torch.Tensor]]] = {}
        up, step = self.key_up, self.codes.keys.step
        for number, head, mine in parts:
            span = self.key_spans[number]
            load = (mine[0] - span.first) // PAD * PAD
            width = power(mine[-1] + 1 - span.first - load, 32)  # words of two, 16 at least
            rows = torch.zeros(width, up.shape[1], dtype=torch.float32, device=up.device)
            for c in mine:
                column = up[head, :, members[head].index(c)].float()
                rows[c - span.first - load] = column * step[c]
            bias = torch.zeros(up.shape[1], dtype=torch.float32, device=up.device)
            if self.key_bias is not None and self._last_section[head] == number:
                bias += self.key_bias[head].float()
            group = scale_group(self.codes.keys.layout, mine[0])
            entry = [head, load, firsts[head] + used[head], group]
            used[head] += 1
            groups.setdefault((number, width), []).append((entry, rows, bias))
        tables = [
            RebuiltTable(
                self.key_spans[number],
                width,
                torch.stack([rows for _, rows, _ in found]),
                torch.stack([bias for _, _, bias in found]),
                torch.tensor([entry for entry, _, _ in found], dtype=torch.int32, device=up.device),
            )
            for (number, width), found in groups.items()
        ]
        return tables, self._pairs(firsts, counts), firsts[-1], max(counts)

    def _pairs(self, firsts: list[int], counts: list[int]) -> torch.Tensor:
        pairs = [[first, count] for first, count in zip(firsts, counts, strict=False)]
        return torch.tensor(pairs, dtype=torch.int32, device=self.key_up.device)


def scale_group(layout: CodeLayout, channel: int) -> int:
    """Scale group of a channel; 0 where there is none."""
    return sum(end <= channel for end in accumulate(layout.groups)) if layout.groups else 0
