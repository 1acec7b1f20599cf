"""Quantisation schemes: what is coded how, as ``quant.yaml`` names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Final, Literal

from starkv_core.errors import UserError
from triton_ops.latent_codes.layout import PLANES

Name = Literal["star", "paper"]
Scales = Literal["static", "row", "block"]
Rotation = Literal["principal", "hadamard"]
Prefill = Literal["exact", "coded"]

WIDTHS: Final = tuple(sorted(PLANES, reverse=True))  # bits that can be packed
PAPER_LEADING: Final = 0.2  # share of channels, by singular value, that the paper codes finer
PAPER_WIDTHS: Final = (4, 3)


@dataclass(frozen=True)
class Scheme:
    """How latents become codes (docs/design.md section 5).

    Attributes:
        name: ``star``: bits by reverse water-filling under a byte budget. ``paper``: the leading
            fifth of the channels of every block 4 bits, the rest 3.
        widths: bits that may be used, descending; with star, channels may also be dropped.
        window: most recent tokens kept in 16 bits.
        sinks: first slots kept in 16 bits.
        scales: of tokens: ``static`` (none, steps are calibrated offline), ``row`` (one for all
            keys of a layer, one for all values) or, in the paper's, ``block`` (one for each block
            of equal bits).
        rotation: ``principal``: to the principal axes of what an error costs; ``hadamard``: spread
            over the block.
        prefill: ``exact``: a prompt attends to exact latents and is coded afterwards; ``coded``: to
            what decode will see.

    Raises:
        UserError: with all faults.
    """

    name: Name
    widths: tuple[int, ...]
    window: int
    sinks: int
    scales: Scales
    rotation: Rotation
    prefill: Prefill = "exact"

    def __post_init__(self) -> None:
        faults = [
            f"{width} bits cannot be packed; packed are {_listed(sorted(WIDTHS))}"
            for width in self.widths
            if width not in WIDTHS
        ]
        if not self.widths:
            faults.append(f"widths: none given; packed are {_listed(sorted(WIDTHS))}")
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                faults.append(f"{name} {getattr(self, name)}: must be 0 or more")
        if faults:
            raise UserError.many("quantisation scheme", faults)

    def to_dict(self) -> dict[str, Any]:
        """Plain form for YAML and JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_dict(data: Any, where: str) -> Scheme:
        """Read the plain form. UserError if it is none."""
        names = {f.name for f in fields(Scheme)}
        if not isinstance(data, dict) or data.keys() != names:
            raise UserError(f"{where}: malformed: expected {', '.join(sorted(names))}")
        known = _SCHEMES.get(data["name"])
        widths = data["widths"]
        counts = [data["window"], data["sinks"], *(widths if isinstance(widths, list) else [None])]
        if (
            known is None
            or not all(isinstance(n, int) and not isinstance(n, bool) for n in counts)
            or data["scales"] not in _SCALES[known.name]
            or data["rotation"] != known.rotation
            or data["prefill"] not in _PREFILLS
        ):
            raise UserError(f"{where}: malformed: not a scheme of this version")
        return Scheme(**{**data, "widths": tuple(widths)})


_SCHEMES: Final[dict[str, Scheme]] = {
    "star": Scheme("star", WIDTHS, 32, 4, "static", "principal"),
    "paper": Scheme("paper", PAPER_WIDTHS, 0, 0, "block", "hadamard"),
}
_SCALES: Final = {"star": ("static", "row"), "paper": ("block",)}
_PREFILLS: Final = ("exact", "coded")


def make_scheme(
    name: str = "star",
    *,
    widths: Sequence[int] | None = None,
    window: int | None = None,
    sinks: int | None = None,
    scales: str | None = None,
    prefill: str = "exact",
) -> Scheme:
    """A scheme by name with its defaults, some replaced.

    Raises:
        UserError: unknown name (with the nearest), an option that the paper's scheme does not have,
            bits that cannot be packed.
    """
    base = _SCHEMES.get(name)
    if base is None:
        nearest = get_close_matches(name, list(_SCHEMES), n=1, cutoff=0.0)[0]
        raise UserError(
            f"scheme {name!r}: unknown; the nearest is {nearest}, all are {', '.join(_SCHEMES)}"
        )
    given: dict[str, Any] = {
        key: value
        for key, value in (
            ("widths", None if widths is None else tuple(sorted(set(widths), reverse=True))),
            ("window", window),
            ("sinks", sinks),
            ("scales", scales),
        )
        if value is not None
    }
    if name == "paper" and given:
        raise UserError(
            f"scheme paper is fixed as published and takes no {', '.join(given)}; leave it out, or "
            "use scheme star"
        )
    for option, value, known in (
        ("scales", scales, (None, *_SCALES[name])),
        ("prefill", prefill, _PREFILLS),
    ):
        if value not in known:
            expected = " or ".join(k for k in known if k is not None)
            raise UserError(f"{option} {value!r}: must be {expected}")
    return Scheme(**{**vars(base), **given, "prefill": prefill})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths[:-1])) + f" or {widths[-1]}"
