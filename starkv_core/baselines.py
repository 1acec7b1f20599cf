"""Cache-side baselines by name: KIVI and round-to-nearest, H2O and StreamingLLM."""

from __future__ import annotations

from difflib import get_close_matches
from fractions import Fraction
from typing import Final

from starkv_core.artifacts import read_manifest
from starkv_core.errors import UserError
from starkv_core.eviction.h2o import H2O
from starkv_core.eviction.policy import Policy
from starkv_core.eviction.streaming import Streaming
from starkv_core.eviction.subject import evicting
from starkv_core.quant.artifact import is_quantised
from starkv_core.quant.dense import SCHEMES, DenseScheme, coded_dense
from starkv_core.run import Subject, is_run

EVICTING: Final[dict[str, type[Policy]]] = {m.method: m for m in (H2O, Streaming)}


def parse_cache(name: str) -> DenseScheme | Policy:
    """What a name means: ``kivi-4``, ``rtn-8``, ``h2o-0.2`` (a share), ``streaming-256`` (tokens).

    Raises:
        UserError: unknown (with the nearest), or a budget that the method cannot keep.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    method, _, amount = name.partition("-")
    if method not in EVICTING:
        known = [*SCHEMES, *(f"{m}-0.2" for m in EVICTING)]
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        every = ", ".join([*SCHEMES, *(f"{m}-SHARE, {m}-TOKENS" for m in EVICTING)])
        raise UserError(f"cache {name!r}: unknown; the nearest is {nearest}, all are {every}")
    try:
        keep = Fraction(amount)
    except (ValueError, ZeroDivisionError):
        keep = Fraction(0)
    if keep <= 0 or keep > 1 and keep.denominator != 1:
        raise UserError(
            f"cache {name!r}: behind the dash goes a share of the tokens seen, above 0 and at most "
            f"1, or a number of tokens; such as {method}-0.2 or {method}-256"
        )
    least = EVICTING[method].least
    if 1 < keep < least:
        raise UserError(f"cache {name!r}: {method} needs {least} tokens at least; raise the number")
    return EVICTING[method](keep)


def check_caches(names: tuple[str, ...], run_or_model: str | None) -> None:
    """Find faults of :func:`with_cache` before any model is loaded (UserError)."""
    run = run_or_model is not None and is_run(run_or_model)
    coded = run and is_quantised(read_manifest(str(run_or_model)))
    for name in names:
        _check(parse_cache(name), str(run_or_model), compressed=run, coded=coded)


def with_cache(subject: Subject, name: str) -> Subject:
    """``subject`` with the cache of a baseline; eviction goes on top of latents as well.

    Raises:
        UserError: unknown name, or a cache that this subject cannot have.
    """
    found = parse_cache(name)
    _check(found, subject.name, compressed=subject.compressed, coded=bool(subject.codes))
    return evicting(subject, found) if isinstance(found, Policy) else coded_dense(subject, name)


def _check(found: DenseScheme | Policy, where: str, *, compressed: bool, coded: bool) -> None:
    if compressed and isinstance(found, DenseScheme):
        raise UserError(
            f"cache {found.name}: codes dense keys and values, {where} has latents; code those "
            "with starkv quantize, or name the base model"
        )
    if coded:
        raise UserError(
            f"cache {found.name}: drops tokens of 16-bit caches, the latents of {where} are coded; "
            "name the run as it was before starkv quantize"
        )
