"""How latents become codes: the static part of one side of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from triton_ops.latent_codes.layout import CodeLayout
from triton_ops.latent_codes.reference import decode, encode, measure

Measure = Literal["rms", "absmax"]
Zero = Literal["rise", "tread"]


@dataclass(frozen=True, eq=False)
class Codec:
    """Quantiser of the keys (or the values) of one layer; formulas in ``reference.py``.

    Attributes:
        layout: of the codes and the scales.
        step: float32 ``[R]``, ``s_c``: distance of two levels at a scale of 1.
        weight: float32 ``[R]``: the scale of a token is taken over ``x * weight``.
        measure: ``rms`` or ``absmax`` over the channels of a scale group. With channel deviations
            ``sigma``, ``rms`` goes with weight ``1 / sigma`` and step ``sigma`` times the best step
            for a unit Gaussian; ``absmax`` with weight ``1 / (2^(b-1) - 1)`` and step 1.
        zero: ``rise``: ``2^b`` levels around ``(2^b - 1) / 2``; ``tread``: ``2^b - 1`` levels
            around ``2^(b-1)``, of which one is 0.

    Raises:
        ValueError: tensors of another shape or dtype, or steps and weights that are not positive.
    """

    layout: CodeLayout
    step: torch.Tensor
    weight: torch.Tensor
    measure: Measure
    zero: Zero

    def __post_init__(self) -> None:
        wrong = []
        for name in ("step", "weight"):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != (self.layout.channels,) or tensor.dtype != torch.float32:
                wrong.append(
                    f"{name} {list(tensor.shape)} {tensor.dtype}, "
                    f"expected [{self.layout.channels}] torch.float32"
                )
            elif not bool((tensor > 0).all() & tensor.isfinite().all()):
                wrong.append(f"{name} holds numbers that are not positive and finite")
        if self.measure not in ("rms", "absmax"):
            wrong.append(f"measure {self.measure!r}: rms or absmax")
        if self.zero not in ("rise", "tread"):
            wrong.append(f"zero {self.zero!r}: rise or tread")
        if wrong:
            raise ValueError("codec: " + "; ".join(wrong))

    @cached_property
    @torch.inference_mode(False)
    def inverse(self) -> torch.Tensor:
        """Float32 ``[R]``, ``1 / s_c``: codes are made with this very number."""
        return 1.0 / self.step

    @cached_property
    @torch.inference_mode(False)
    def levels(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Float32 ``[R]`` each: zero point, least and greatest code of every channel."""
        count = 2.0 ** self.layout.bits(self.step.device).float()
        if self.zero == "rise":
            return (count - 1) / 2, torch.zeros_like(count), count - 1
        return count / 2, torch.ones_like(count), count - 1

    @cached_property
    @torch.inference_mode(False)
    def groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Int64 ``[K, widest]``: channels of each scale group, then R; float64 ``[K]``: counts."""
        counts = torch.tensor(self.layout.groups, dtype=torch.int64)
        lane = torch.arange(max(self.layout.groups, default=0))
        index = (counts.cumsum(0) - counts)[:, None] + lane
        index = torch.where(lane < counts[:, None], index, self.layout.channels)
        return index.to(self.step.device), counts.double().to(self.step.device)

    @cached_property
    @torch.inference_mode(False)
    def group_of(self) -> torch.Tensor:
        """Int64 ``[R]``: the scale group of each channel."""
        counts = torch.tensor(self.layout.groups)
        return torch.arange(len(counts)).repeat_interleave(counts).to(self.step.device)

    def quantise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 ``[..., R]`` and scales fp16 ``[..., K]`` of ``x [..., R]`` as stored."""
        scales = measure(x, self.weight, *self.groups, self.measure)
        codes = encode(x, self.inverse, self._per_channel(scales), *self.levels)
        return codes, scales

    def dequantise(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Float32 ``[..., R]`` of codes uint8 ``[..., R]`` and scales fp16 ``[..., K]``."""
        return decode(codes, self.step, self._per_channel(scales), self.levels[0])

    def _per_channel(self, scales: torch.Tensor) -> torch.Tensor | None:
        """Float32 scales ``[..., K]`` of groups as ``[..., R]`` or ``[..., 1]``; None without."""
        if self.layout.scales < 2:
            return scales.float() if self.layout.scales else None
        return scales.float()[..., self.group_of]

    def same(self, other: Codec) -> bool:
        """Whether codes of the one are codes of the other."""
        if self is other:  # nearly always: no need to wait for a GPU
            return True
        kinds = (self.layout, self.measure, self.zero) == (other.layout, other.measure, other.zero)
        return kinds and all(
            torch.equal(a.cpu(), b.cpu())
            for a, b in ((self.step, other.step), (self.weight, other.weight))
        )

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., R]`` as it reads once coded, float32."""
        return self.dequantise(*self.quantise(x))

    def to(self, device: Any) -> Codec:
        """The same on another device."""
        return Codec(
            self.layout, self.step.to(device), self.weight.to(device), self.measure, self.zero
        )


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """How the cache of one compressed layer is coded.

    Attributes:
        keys, values: quantisers of its latents.
        sinks: first slots that stay in 16 bits.
        window: most recent tokens that stay in 16 bits; a token is coded once, when it leaves.
        prefill: ``exact``: a prompt attends to exact latents of its own tokens; ``coded``: to what
            decode will see at the same position.

    Raises:
        ValueError: negative counts, sides mixed up.
    """

    keys: Codec
    values: Codec
    sinks: int = 0
    window: int = 0
    prefill: Literal["exact", "coded"] = "exact"

    def __post_init__(self) -> None:
        if (self.keys.layout.side, self.values.layout.side) != ("key", "value"):
            raise ValueError("layer codes: keys take a key layout, values a value layout")
        if min(self.sinks, self.window) < 0 or self.prefill not in ("exact", "coded"):
            raise ValueError(
                f"layer codes: sinks {self.sinks}, window {self.window}, prefill {self.prefill!r}: "
                "counts are 0 or more, prefill is exact or coded"
            )

    def to(self, device: Any) -> LayerCodes:
        """The same on another device."""
        return LayerCodes(
            self.keys.to(device), self.values.to(device), self.sinks, self.window, self.prefill
        )
