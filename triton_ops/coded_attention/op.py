"""Checked entry point of attention over packed codes, one signature for both backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from triton_ops.backends import launching_on
from triton_ops.coded_attention.tables import CodedFactors
from triton_ops.coded_attention.tuning import Tuning
from triton_ops.latent_attention import KeyLayout, LatentFactors, latent_attention, row_width
from triton_ops.latent_attention.rope import RopeTables
from triton_ops.latent_codes import TILE, Codec, unpack


@dataclass(frozen=True)
class Coded:
    """What a cache layer stores of its keys or its values.

    Attributes:
        codes: uint8 ``[B, tiles, tile_bytes]``.
        scales: fp16 ``[B, tiles, K, TILE]``.
        exact: ``[B, sinks + window, row_width]`` in 16 bits: sinks, then the window as a ring.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    exact: torch.Tensor

    def faults(self, name: str, codec: Codec, batch: int, tiles: int, rows: int) -> list[str]:
        """What does not fit ``rows`` exact rows and ``tiles`` tiles that a quantiser has filled."""
        layout = codec.layout
        expected = {
            "codes": (self.codes, (batch, tiles, layout.tile_bytes), torch.uint8),
            "scales": (self.scales, (batch, tiles, layout.scales, TILE), torch.float16),
            "exact": (self.exact, (batch, rows, row_width(layout.channels)), self.exact.dtype),
        }
        wrong = [
            f"{name}.{part} {list(got.shape)} {got.dtype}, expected {list(shape)} {dtype}"
            for part, (got, shape, dtype) in expected.items()
            if tuple(got.shape) != shape or got.dtype != dtype
        ]
        # Kernels step from row to row as they are told, but not within a row of the batch.
        return wrong + [
            f"{name}.{part} has gaps within a row of the batch"
            for part, (got, _, _) in expected.items()
            if got.numel() and not got[0].is_contiguous()
        ]


def coded_attention(
    q: torch.Tensor,
    keys: Coded,
    values: Coded,
    factors: CodedFactors,
    rope: RopeTables,
    *,
    filled: torch.Tensor,
    coded: torch.Tensor,
    scale: float,
    first: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    backend: str = "reference",
) -> torch.Tensor:
    """Attention of the ``Q`` last tokens over packed codes and 16-bit rows, without value bias.

    Slots from ``sinks`` to ``coded - 1`` are read from codes, the others from the exact rows. All
    else is :func:`triton_ops.latent_attention.latent_attention`.

    Args:
        q: ``[B, H, Q, D]``, turned for its own slots.
        keys, values: what is stored.
        factors: of the layer, in the order of its rows.
        rope: tables of the model.
        filled: int32 ``[1]``, slots filled, the Q tokens included.
        coded: int32 ``[1]``, slots below are coded (but for sinks); at most ``filled``.
        scale: factor on the scores.
        first: int32 ``[B]``, the first slot of each row (left padding); None is 0.
        mask: bool ``[B, 1, Q, S']``, True where a token may attend, on top of the above.
        backend: ``reference`` or ``triton``.

    Returns:
        ``[B, H, Q, D]`` in the dtype of q; zeros for tokens that may attend to nothing.

    Raises:
        ValueError: shapes or dtypes that do not fit, with all of them listed.
    """
    _check(q, keys, values, factors, filled, coded)
    if backend == "triton":
        # Imported here: where Triton is missing the reference still runs.
        from triton_ops.coded_attention.launch import coded_attention_triton

        if mask is not None:
            mask = mask[:, 0] if mask.stride(-1) == 1 else mask[:, 0].contiguous()
        if first is None:
            first = torch.zeros(len(q), dtype=torch.int32, device=q.device)
        with launching_on(q.device):
            return coded_attention_triton(
                q, keys, values, factors, rope, filled, coded, first, mask, scale, Tuning()
            )
    length, until = int(filled), int(coded)
    codes = factors.codes
    x = _read(keys, codes.keys, length, until, codes.sinks, codes.window)
    z = _read(values, codes.values, length, until, codes.sinks, codes.window)
    order = torch.cat([factors.key_index[h, :r] for h, r in enumerate(factors.ranks)])
    x = x[..., order]
    plain = LatentFactors(
        KeyLayout.side_by_side(factors.ranks),
        factors.key_up.float(),
        None if factors.key_bias is None else factors.key_bias.float(),
        factors.value_up.float(),
    )
    x, z = (torch.nn.functional.pad(t, (0, row_width(t.shape[-1]) - t.shape[-1])) for t in (x, z))
    return latent_attention(
        q.float(),
        x,
        z,
        plain,
        rope,
        filled=filled,
        scale=scale,
        first=first,
        mask=mask,
    ).to(q.dtype)


def _read(
    side: Coded, codec: Codec, length: int, coded: int, sinks: int, window: int
) -> torch.Tensor:
    """Float32 ``[B, length, R]``: the latents that the stored codes and rows stand for."""
    channels = codec.layout.channels
    slot = torch.arange(length, device=side.codes.device)
    codes = unpack(side.codes, codec.layout, 0, length)
    scales = side.scales[:, slot // TILE, :, slot % TILE].transpose(0, 1)
    found = codec.dequantise(codes, scales)
    inner = side.exact[..., :channels].float()
    found[:, :sinks] = inner[:, : min(sinks, length)]
    recent = slot[max(coded, sinks) :]
    found[:, recent] = inner[:, sinks + recent % max(window, 1)]
    return found


def _check(
    q: torch.Tensor,
    keys: Coded,
    values: Coded,
    factors: CodedFactors,
    filled: torch.Tensor,
    coded: torch.Tensor,
) -> None:
    batch, heads, _, dim = q.shape
    codes = factors.codes
    tiles, rows = keys.codes.shape[1], codes.sinks + codes.window
    wrong = keys.faults("keys", codes.keys, batch, tiles, rows)
    wrong += values.faults("values", codes.values, batch, tiles, rows)
    if factors.key_up.shape[1] != dim or heads % factors.key_up.shape[0]:
        wrong.append(f"q {list(q.shape)} does not fit key_up {list(factors.key_up.shape)}")
    for name, count in (("filled", filled), ("coded", coded)):
        if count.shape != (1,) or count.dtype != torch.int32:
            wrong.append(f"{name} {list(count.shape)} {count.dtype}, expected [1] torch.int32")
    if wrong:
        raise ValueError("coded_attention: " + "; ".join(wrong))
