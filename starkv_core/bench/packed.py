"""A packed layer for the bench: filled with random codes, and read again bit by bit for the gate.

What reads follows the description of the layout (head of ``triton_ops/latent_codes/layout.py``)
and shares neither code nor constants with the cache and its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from starkv_core.cache import LatentCache
from starkv_core.packed import PackedLayer
from triton_ops.coded_attention import Coded
from triton_ops.latent_codes import TILE, Codec, CodeLayout, pack, unpack


def fill_random(layer: PackedLayer, tokens: int, seed: int, value_scale: float = 1.0) -> None:
    """Random latents of ``tokens`` tokens in a reserved layer, which then counts them as filled.

    Sinks and window are normal, codes uniform, and zero is what a cache leaves zero: the padding of
    rows and of sections of keys, and the codes and scales of slots that are not coded.

    Args:
        value_scale: factor on the exact rows of values; that of their codes is in the steps.
    """
    codes = layer.layer_codes
    sinks, until = codes.sinks, max(tokens - codes.window, codes.sinks)
    generator = torch.Generator(layer.device).manual_seed(seed)
    for side, codec, scale in zip(
        layer.coded_sides(), (codes.keys, codes.values), (1.0, value_scale), strict=True
    ):
        side.exact.normal_(generator=generator).mul_(scale)
        side.exact[..., codec.layout.channels :] = 0
        _fill_codes(side, codec, sinks, until, generator)
    layer.length, layer.coded = tokens, max(tokens - codes.window, 0)


def _fill_codes(
    side: Coded, codec: Codec, start: int, stop: int, generator: torch.Generator
) -> None:
    """Random codes and scales around 1 in the slots from ``start`` to ``stop - 1``."""
    layout, buffer = codec.layout, side.codes
    room = buffer.shape[1] * TILE
    buffer.random_(generator=generator)  # any byte is codes
    for plane in layout.planes:
        if plane.stored > plane.channels:  # of keys: channels are the last dimension
            end = plane.offset + plane.width * 64 * plane.stored
            part = buffer[..., plane.offset : end].unflatten(-1, (-1, plane.stored))
            part[..., plane.channels :] = 0
    if codec.zero == "tread":  # but for 0, which is no code there
        for at in range(0, room, TILE):
            pack(unpack(buffer, layout, at, at + TILE).clamp_(min=1), at, buffer, layout)
    for first, last in ((0, start), (stop, room)):
        pack(buffer.new_zeros(len(buffer), last - first, layout.channels), first, buffer, layout)
    slot = torch.arange(room, device=buffer.device).view(-1, 1, TILE)
    side.scales.uniform_(0.5, 1.5, generator=generator).mul_((slot >= start) & (slot < stop))


def cache_parts(cache: LatentCache) -> dict[str, int]:
    """Bytes of the tensors of a cache by what they are for; they add up to ``cache.nbytes``.

    ``padding`` is that of the coded slots' sections and of exact rows; ``room`` what is allocated
    for slots that are not coded, sinks and window among them.
    """
    parts = dict.fromkeys(("codes", "scales", "padding", "sinks", "window", "room", "others"), 0)
    for layer in cache.layers:
        if not isinstance(layer, PackedLayer):
            parts["others"] += sum(t.nbytes for t in layer.tensors())
            continue
        codes = layer.layer_codes
        slots = max(layer.coded - codes.sinks, 0)
        for side, codec in zip(layer.coded_sides(), (codes.keys, codes.values), strict=True):
            layout, batch = codec.layout, len(side.codes)
            held = {
                "codes": batch * slots * int(layout.bits().sum()) // 8,
                "scales": batch * slots * layout.scale_bytes // TILE,
            }
            of_sections = batch * slots * layout.tile_bytes // TILE - held["codes"]
            allocated = side.codes.nbytes + side.scales.nbytes
            held["room"] = allocated - sum(held.values()) - of_sections
            row = batch * side.exact.element_size()
            unused = side.exact.shape[-1] - layout.channels
            held["sinks"] = row * codes.sinks * layout.channels
            held["window"] = row * codes.window * layout.channels
            held["padding"] = of_sections + row * side.exact.shape[1] * unused
            for name, count in held.items():
                parts[name] += count
    return parts


def read_exactly(layer: PackedLayer, row: int, tile: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Float64 keys ``[T, R]`` and values ``[T, r_v]`` of the filled slots of a row, in order.

    Args:
        tile: slots at once, a multiple of 512.
    """
    codes = layer.layer_codes
    readers = [
        _Reader(side, codec, row)
        for side, codec in zip(layer.coded_sides(), (codes.keys, codes.values), strict=True)
    ]
    for start in range(0, layer.length, tile):
        slots = torch.arange(start, min(start + tile, layer.length), device=layer.device)
        keys, values = (
            reader.latents(slots, codes.sinks, codes.window, layer.coded) for reader in readers
        )
        yield keys, values


class _Reader:
    """One side of one row."""

    def __init__(self, side: Coded, codec: Codec, row: int) -> None:
        self.codes, self.scales, self.exact = side.codes[row], side.scales[row], side.exact[row]
        self.codec, layout = codec, codec.layout
        device = self.codes.device
        self.planes = list(_planes(layout, device))
        bits = torch.tensor(
            [s.bits for s in layout.sections for _ in range(s.channels)], device=device
        )
        levels = 2.0 ** bits.double()
        self.zero = (levels - 1) / 2 if codec.zero == "rise" else levels / 2

    def latents(self, slots: Tensor, sinks: int, window: int, coded: int) -> Tensor:
        """Of consecutive slots, the first of which begins 512 of them; float64 ``[T, R]``."""
        layout = self.codec.layout
        first, last = int(slots[0]) // 512, int(slots[-1]) // 512 + 1
        code = torch.zeros(
            last - first, 512, layout.channels, dtype=torch.int32, device=slots.device
        )
        for start, low, width, byte, shift in self.planes:
            held = self.codes[first:last, byte].int() >> shift[:, None]
            code[..., start : start + byte.shape[1]] |= held % 2**width << low
        found = (code - self.zero) * self.codec.step.double()
        at = 0
        for i, count in enumerate(layout.groups):
            found[..., at : at + count] *= self.scales[first:last, i, :, None].double()
            at += count
        found = found.flatten(0, 1)[: len(slots)]
        exact = self.exact[:, : layout.channels].double()
        held = (slots < sinks) | (slots >= coded)
        rows = torch.where(slots < sinks, slots, sinks + slots % max(window, 1))
        found[held] = exact[rows[held]]
        return found


def _planes(
    layout: CodeLayout, device: torch.device
) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """Where the bits of a tile's slots lie, plane by plane.

    Yields:
        First channel, lowest bit, bits, int64 ``[512, channels]`` bytes of the tile and int32
        ``[512]`` shifts within them.
    """
    t = torch.arange(512, device=device)
    if layout.side == "key":
        u = t % 128
        n = torch.where(u >= 64, 2 * (t // 128), 2 * (t // 128) + 1)
        j = torch.where(u >= 64, u - 64, 63 - u)
    else:
        n, j = t // 64, 2 * (t % 32) + t % 64 // 32
    at = first = 0
    for section in layout.sections:
        count = section.channels
        stored = -(-count // 16) * 16 if layout.side == "key" else count
        channel, low = torch.arange(count, device=device), 0
        for width in {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}[section.bits]:
            bit = n * width
            column = (
                j[:, None] * stored + channel if layout.side == "key" else channel * 64 + j[:, None]
            )
            byte = at + (bit // 8 * 64 * stored)[:, None] + column
            yield first, low, width, byte, (bit % 8).int()
            at, low = at + width * 64 * stored, low + width
        first += count
