"""ReCalKV (arXiv 2505.24357): key heads grouped by likeness, values calibrated on activations.

Keys: heads that are alike by centred kernel alignment (CKA) share a whitened factorisation. The
paper speaks of heads, its code compares their weights; so does this. Values: one whitened
factorisation for all heads, then one alternation of least squares on what the layer sees once the
layers before it are compressed, in sequence. Ranks are Palu's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from starkv_core.calibrate.layer_start import LayerStart, approximated
from starkv_core.decompose import Decomposition, decompose
from starkv_core.models.load import LoadedModel
from starkv_core.progress import SILENT, Progress


def similar_heads(heads: torch.Tensor, size: int) -> tuple[int, ...]:
    """Order of heads in which neighbours, ``size`` at a time, are alike.

    Pairs are taken in descending order of CKA. Two free heads open a group, or join one that has
    room for both when all are open; a free head joins its partner's group if there is room. Heads
    left over fill up what is left.

    Args:
        heads: ``[H, D, d]``, their weights.
        size: heads of a group; divides H.
    """
    count = len(heads)
    alike = cka(heads)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    groups: list[list[int]] = [[] for _ in range(count // size)]
    home: dict[int, list[int]] = {}
    for i, j in sorted(pairs, key=lambda pair: -float(alike[pair])):
        known = home.get(i) or home.get(j)
        joining = [h for h in (i, j) if h not in home]
        if known is None:
            known = min(groups, key=len)
        if joining and len(known) + len(joining) <= size:
            known += joining
            home.update(dict.fromkeys(joining, known))
    for head in range(count):
        if head not in home:
            home[head] = min(groups, key=len)
            home[head].append(head)
    return tuple(h for group in sorted(sorted(group) for group in groups) for h in group)


def cka(heads: torch.Tensor) -> torch.Tensor:
    """Linear CKA of every two heads, ``[H, H]``, float64.

    ``||X^T Y||^2 / (||X^T X|| ||Y^T Y||)`` with ``X [d, D]`` the transposed weights of a head, its
    columns centred.

    Args:
        heads: ``[H, D, d]``.
    """
    x = heads.detach().double()
    x = x - x.mean(-1, keepdim=True)
    cross = torch.einsum("ind,jmd->ijnm", x, x).square().sum((-2, -1))
    own = cross.diagonal().sqrt()
    return cross / torch.outer(own, own)


def calibrate_values(
    loaded: LoadedModel,
    starts: Mapping[int, LayerStart],
    ranks: list[tuple[list[int], list[int]]],
    tokens: torch.Tensor,
    progress: Progress = SILENT,
) -> dict[int, LayerStart]:
    """Starts with calibrated values, cut to their ranks; layer after layer.

    Args:
        ranks: of keys and values, in the order of ``starts``.
        tokens: int64 ``[N, L]``.
    """
    attentions: Any = loaded.family.attentions(loaded.model)
    made: dict[int, LayerStart] = {}
    with ExitStack() as before, progress.task("calibration of values", len(starts), "layers") as t:
        for (i, start), (key_ranks, value_ranks) in zip(starts.items(), ranks, strict=True):
            k, v = attentions[i].k_proj, attentions[i].v_proj
            moment = _seen(loaded, attentions[i], tokens)
            rows = v.weight.detach().double().split(len(v.weight) // len(start.values))
            values = [
                calibrated(w, block, rank, moment).stored()
                for w, block, rank in zip(rows, start.values, value_ranks, strict=True)
            ]
            made[i] = replace(start, values=values)
            before.enter_context(
                approximated(k, start.keys, key_ranks, start.key_mean, start.key_order)
            )
            before.enter_context(approximated(v, values, value_ranks, start.value_mean))
            t.advance()
    return made


def calibrated(
    weight: torch.Tensor, block: Decomposition, rank: int, moment: torch.Tensor
) -> Decomposition:
    """One alternation from the leading components of ``block``, as a decomposition of that rank.

    With ``W ~ L R``: ``L`` is the least-squares fit of the outputs ``W y`` on the latents ``R y``,
    then ``R = pinv(L) W``.

    Args:
        weight: ``[n, d]`` float64.
        moment: ``[d, d]`` float64, ``E[y y^T]`` of the inputs fitted to.
    """
    down = block.down[:rank].to(weight)
    crossed = moment @ down.T
    up = weight @ crossed @ torch.linalg.pinv(down @ crossed, hermitian=True)
    down = torch.linalg.pinv(up) @ weight
    # The product, which has that rank, in the form that all factors have.
    return decompose(up @ down, moment).truncated(rank)


class _Reached(Exception):
    """The layer looked for has been reached; what follows need not be computed."""


def _seen(loaded: LoadedModel, attention: Any, tokens: torch.Tensor) -> torch.Tensor:
    """``E[y y^T]`` of the inputs of an attention module as the model is now, float64 ``[d, d]``."""
    total = torch.zeros((), dtype=torch.float64, device=attention.v_proj.weight.device)

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total
        y = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0].float()
        total = total + (y.T @ y).double()
        raise _Reached

    with _hooked(attention, look):
        for row in tokens:
            try:
                loaded.model.model(row[None].to(loaded.device), use_cache=False)
            except _Reached:
                continue
    return total / tokens.numel()


@contextmanager
def _hooked(module: Any, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
