"""Slow references for coded latents: one number, one bit, one token at a time.

Shares nothing with the package's code: places of bits are computed token by token as docs/design.md
and the layout's description have them, formulas number by number, and a cache is a plain list.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from starkv_core.attention import LatentWeights
from triton_ops.latent_codes import Codec, CodeLayout, LayerCodes, Section

WIDTHS = {2: [2], 3: [2, 1], 4: [4], 8: [8]}


def codec(
    side: str,
    sections: Sequence[tuple[int, int]],
    groups: str | tuple[int, ...] = "row",
    *,
    measure: str = "rms",
    zero: str = "rise",
    seed: int = 0,
) -> Codec:
    """A quantiser with random steps about the right size for latents of unit variance.

    Args:
        sections: (bits, channels) of each.
        groups: ``row``, ``section``, ``static`` or the counts.
    """
    made = tuple(Section(bits, channels) for bits, channels in sections)
    counts = tuple(channels for _, channels in sections)
    named = {"row": (sum(counts),), "section": counts, "static": ()}
    layout = CodeLayout(side, made, named[groups] if isinstance(groups, str) else groups)
    generator = torch.Generator().manual_seed(seed)
    spread = 0.5 + torch.rand(layout.channels, generator=generator)
    bits = layout.bits()
    if measure == "absmax":
        return Codec(layout, torch.ones_like(spread), 1 / (2.0 ** (bits - 1) - 1), measure, zero)
    return Codec(layout, spread * 4 / 2.0**bits, 1 / spread, measure, zero)


def bit_places(layout: CodeLayout, slot: int) -> list[list[tuple[int, int]]]:
    """(byte of the tile, bit of the byte) of every bit, low first, of every channel of a slot."""
    t = slot % 512
    if layout.side == "key":
        u = t % 128
        n, j = (2 * (t // 128), u - 64) if u >= 64 else (2 * (t // 128) + 1, 63 - u)
    else:
        n, j = t // 64, t % 32 * 2 + (t % 64 >= 32)
    found, at = [], 0
    for section in layout.sections:
        stored = section.channels
        if layout.side == "key":
            stored += -stored % 16
        places: list[list[tuple[int, int]]] = [[] for _ in range(section.channels)]
        for w in WIDTHS[section.bits]:
            row, shift = n * w // 8, n * w % 8
            for c in range(section.channels):
                within = j * stored + c if layout.side == "key" else c * 64 + j
                places[c] += [(at + row * 64 * stored + within, shift + bit) for bit in range(w)]
            at += w * 64 * stored
        found += places
    return found


def read_bits(buffer: torch.Tensor, layout: CodeLayout, slots: Sequence[int]) -> torch.Tensor:
    """Codes ``[B, len(slots), R]`` in a buffer, bit by bit."""
    tiles = buffer.numpy()
    found = np.zeros((len(tiles), len(slots), layout.channels), dtype=np.uint8)
    for i, slot in enumerate(slots):
        for c, places in enumerate(bit_places(layout, slot)):
            for bit, (byte, at) in enumerate(places):
                found[:, i, c] |= (tiles[:, slot // 512, byte] >> at & 1) << bit
    return torch.from_numpy(found)


def quantised(c: Codec, row: torch.Tensor) -> tuple[list[int], list[float], torch.Tensor]:
    """Codes, scales and the float32 numbers they stand for, of one row ``[R]``."""
    f = np.float32
    x = row.float().numpy()
    step, weight = c.step.numpy(), c.weight.numpy()
    bits = [s.bits for s in c.layout.sections for _ in range(s.channels)]
    scales, of_channel, at = [], [], 0
    for count in c.layout.groups or (len(bits),):
        part = [float(a * b) for a, b in zip(x[at:], weight[at : at + count], strict=False)]
        g = (
            (sum(v * v for v in part) / count) ** 0.5
            if c.measure == "rms"
            else max(abs(v) for v in part)
        )
        g = min(max(float(f(g)), 2.0**-24), 65504.0)
        g = struct.unpack("e", struct.pack("e", g))[0] if c.layout.groups else 1.0
        scales.append(g)
        of_channel += [g] * count
        at += count
    codes, values = [], []
    for i, b in enumerate(bits):
        zero, least = ((2**b - 1) / 2, 0) if c.zero == "rise" else (2 ** (b - 1), 1)
        level = f(f(f(x[i] * (f(1) / step[i])) / f(of_channel[i])) + f(zero))
        code = min(max(int(np.rint(level)), least), 2**b - 1)
        codes.append(code)
        values.append(f(f(f(code - zero) * step[i]) * f(of_channel[i])))
    return codes, scales if c.layout.groups else [], torch.tensor(np.array(values))


class SlowCache:
    """A packed layer as a list of rows of tokens; codes are made on the spot, number by number.

    Each token is a dict: its exact row, and its codes once it has left the window.
    """

    def __init__(self, layer: LayerCodes, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.rows: list[list[dict[str, object]]] = []

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Tokens ``[B, L, R]`` and ``[B, L, r_v]``, one after the other or at once: the same."""
        if not self.rows:
            self.rows = [[] for _ in keys]
        for row, k, v in zip(self.rows, keys, values, strict=True):
            for one_k, one_v in zip(k.to(self.dtype), v.to(self.dtype), strict=True):
                row.append({"exact": (one_k, one_v), "coded": None})
                old = len(row) - 1 - self.layer.window
                if old >= self.layer.sinks and row[old]["coded"] is None:
                    k_old, v_old = row[old]["exact"]
                    row[old]["coded"] = (
                        quantised(self.layer.keys, k_old), quantised(self.layer.values, v_old)
                    )  # fmt: skip

    def pick(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self.rows = [[dict(token) for token in self.rows[i]] for i in rows]

    def crop(self, tokens: int) -> None:
        """Forget the last ``tokens``."""
        self.rows = [row[: len(row) - tokens] for row in self.rows]

    def side(self, side: int) -> torch.Tensor:
        """Float32 ``[B, L, R]``: the keys (0) or values (1) as attention sees them."""

        def seen(token: dict[str, object]) -> torch.Tensor:
            coded = token["coded"]
            return token["exact"][side].float() if coded is None else coded[side][2]

        return torch.stack([torch.stack([seen(token) for token in row]) for row in self.rows])

    def codes(self, side: int) -> dict[int, torch.Tensor]:
        """By slot that is coded: uint8 ``[B, R]``."""
        coded = [i for i, token in enumerate(self.rows[0]) if token["coded"] is not None]
        return {
            i: torch.tensor([row[i]["coded"][side][0] for row in self.rows], dtype=torch.uint8)
            for i in coded
        }


def coded_weights(
    weights: LatentWeights,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    bits: tuple[int, int] = (4, 3),
    groups: str = "row",
    measure: str = "rms",
    zero: str = "rise",
    sinks: int = 0,
    window: int = 0,
    prefill: str = "exact",
) -> LatentWeights:
    """A layer whose cache is coded: the first half of every head's channels, then the others.

    Args:
        keys, values: ``[..., R]`` and ``[..., r_v]``, latents whose deviations set the steps.
        bits: of the first half of each head's channels (and of the values'), and of the rest.
    """
    real = weights.key_index != 0
    real[:, 0] = True
    heads = [index[mask].tolist() for index, mask in zip(weights.key_index, real, strict=True)]
    halves = [[h[: (len(h) + 1) // 2] for h in heads], [h[(len(h) + 1) // 2 :] for h in heads]]
    order = torch.tensor([c for half in halves for part in half for c in part])
    place = {c: i for i, c in enumerate(order.tolist())}
    index = weights.key_index.clone()
    for row, channels in zip(index, heads, strict=True):
        row[: len(channels)] = torch.tensor([place[c] for c in channels])

    def made(side: str, counts: list[int], sample: torch.Tensor) -> Codec:
        sections = [(b, n) for b, n in zip(bits, counts, strict=True) if n]
        plain = codec(side, sections, groups, measure=measure, zero=zero)
        if measure == "absmax":
            return plain
        sigma = sample.flatten(0, -2).std(0).float()
        step = sigma * 4 / 2.0 ** plain.layout.bits(sigma.device)
        return replace(plain, step=step, weight=1 / sigma)

    first = (values.shape[-1] + 1) // 2
    return replace(
        weights,
        key_down=weights.key_down[order],
        key_index=index,
        codes=LayerCodes(
            made("key", [sum(map(len, half)) for half in halves], keys[..., order]),
            made("value", [first, values.shape[-1] - first], values),
            sinks,
            window,
            prefill,
        ),
    )
