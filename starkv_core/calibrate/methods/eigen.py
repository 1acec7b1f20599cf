"""EigenAttention (arXiv 2408.05646): attention in the eigenbases of its activations.

The keys of a head are projected on the leading eigenvectors of keys and queries together, values on
those of the values (which is their whitened decomposition, head by head). With rotary embeddings
keys are cached before the rotation; the authors' code then leaves queries out and shares a basis
among heads, here the paper's definition holds. Keys enter without their bias, which is not cached.
Under a norm on keys a query counts as the unnormalised key sees it, by the norm's weight.

Ranks: the leading share of the singular values, one share for keys and values and all heads of a
layer, lowered until the error of the layer's output passes a limit. The limit, one for all layers,
is the least that the budget allows; what the budget still has is shared in proportion. The paper
adds up squares of singular values, its code the values themselves; this follows the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from starkv_core.calibrate.allocation import proportional_ranks
from starkv_core.calibrate.layer_start import LayerStart, approximated
from starkv_core.decompose import Decomposition
from starkv_core.models.load import LoadedModel
from starkv_core.progress import SILENT, Progress
from triton_ops.latent_attention import row_width

_SHARES = [0.98 - 0.02 * n for n in range(40)]  # of the singular values kept, 0.98 to 0.2


def key_query_basis(
    weight: torch.Tensor, moment: torch.Tensor, queries: torch.Tensor
) -> Decomposition:
    """``W = P P^T W`` with ``P`` the eigenvectors of ``W S W^T`` plus the queries' second moments.

    Args:
        weight: ``[n, d]`` of a group of key heads.
        moment: ``[d, d]``, ``S = E[y y^T]``.
        queries: ``[heads, D, D]``, ``sum_g E[q q^T]`` of each head of the group.

    Returns:
        ``sigma^2`` is the energy of keys and queries in a component. Float64.
    """
    w = weight.double()
    joint = w @ moment.double() @ w.T + torch.block_diag(*queries.double())
    values, vectors = torch.linalg.eigh(0.5 * (joint + joint.T))
    rank = min(w.shape)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    sigma = values.clamp_min(float(values[0]) * 1e-14).sqrt()
    return Decomposition(vectors, sigma, (vectors.T @ w) / sigma[:, None])


@torch.no_grad()
def query_moments(
    loaded: LoadedModel, tokens: torch.Tensor, layers: Sequence[int], progress: Progress = SILENT
) -> dict[int, torch.Tensor]:
    """``E[q q^T]`` of queries before RoPE, summed over each key head's group: ``[H_kv, D, D]``.

    Args:
        tokens: int64 ``[N, L]``.

    Returns:
        Float64, by layer index.
    """
    spec = loaded.spec
    attentions: Any = loaded.family.attentions(loaded.model)
    sums: dict[int, torch.Tensor] = {}

    def hook(index: int) -> Any:
        def look(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            y = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            q = loaded.family.queries(attention, y, spec.head_dim).float()
            q = q.unflatten(1, (spec.n_kv_heads, spec.group)).transpose(0, 1).flatten(1, 3)
            sums[index] = sums.get(index, 0.0) + (q.transpose(1, 2) @ q).double()

        return look

    with ExitStack() as held, progress.task("queries", len(tokens), "sequences") as task:
        for i in layers:
            handle = attentions[i].register_forward_pre_hook(hook(i), with_kwargs=True)
            held.callback(handle.remove)
        for row in tokens:
            loaded.model.model(row[None].to(loaded.device), use_cache=False)
            task.advance()
    return {i: total / tokens.numel() for i, total in sums.items()}


@torch.no_grad()
def error_ranks(
    loaded: LoadedModel,
    starts: Mapping[int, LayerStart],
    numbers: int,
    tokens: torch.Tensor,
    progress: Progress = SILENT,
) -> list[list[int]]:
    """Ranks at one error of the layers' outputs.

    Args:
        numbers: as of :func:`starkv_core.calibrate.allocation.best_ranks`.
        tokens: int64 ``[N, L]`` that errors are measured on.

    Returns:
        Ranks of keys and values of each layer in turn, as of
        :func:`starkv_core.calibrate.allocation.best_ranks`.
    """
    candidates = {i: [share_ranks(s, share) for share in _SHARES] for i, s in starts.items()}
    errors = layer_errors(loaded, starts, candidates, tokens, progress)
    limits = sorted({error for found in errors.values() for error in found})
    low, high = 0, len(limits) - 1
    while low < high:  # the least limit that the budget allows
        middle = (low + high) // 2
        chosen = _within(candidates, errors, limits[middle])
        if sum(row_width(sum(blocks)) for blocks in chosen) <= numbers:
            high = middle
        else:
            low = middle + 1
    chosen = _within(candidates, errors, limits[high])
    sizes = [
        [len(d.sigma) for d in blocks] for s in starts.values() for blocks in (s.keys, s.values)
    ]
    return proportional_ranks(sizes, [float(sum(blocks)) for blocks in chosen], numbers)


def share_ranks(start: LayerStart, share: float) -> tuple[list[int], list[int]]:
    """Least ranks that keep a share of the singular values in every head of a layer."""

    def side(blocks: Sequence[Decomposition]) -> list[int]:
        least = []
        for d in blocks:
            kept = d.sigma.double().cumsum(0) / d.sigma.double().sum()
            least.append(int((kept < share).sum()) + 1)
        return [min(max(least), len(d.sigma)) for d in blocks]

    return side(start.keys), side(start.values)


def layer_errors(
    loaded: LoadedModel,
    starts: Mapping[int, LayerStart],
    candidates: Mapping[int, Sequence[tuple[list[int], list[int]]]],
    tokens: torch.Tensor,
    progress: Progress = SILENT,
) -> dict[int, list[float]]:
    """Relative error ``||out' - out|| / ||out||`` of each decoder layer, it alone approximated.

    Args:
        candidates: for each layer the ranks of keys and values to try.
        tokens: int64 ``[N, L]``.
    """
    attentions: Any = loaded.family.attentions(loaded.model)
    squares = {i: torch.zeros(len(tried), dtype=torch.float64) for i, tried in candidates.items()}
    wholes = dict.fromkeys(candidates, 0.0)

    def hook(i: int) -> Any:
        def look(layer: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            exact, start = _hidden(output), starts[i]
            k, v = attentions[i].k_proj, attentions[i].v_proj
            wholes[i] += float(exact.square().sum())
            for n, (key_ranks, value_ranks) in enumerate(candidates[i]):
                with (
                    approximated(k, start.keys, key_ranks, start.key_mean, start.key_order),
                    approximated(v, start.values, value_ranks, start.value_mean),
                ):
                    # Past the hooks, or this one would be called again.
                    error = _hidden(layer.forward(*args, **kwargs)) - exact
                squares[i][n] += float(error.square().sum())
            task.advance()

        return look

    steps = len(tokens) * len(candidates)
    with ExitStack() as held, progress.task("errors of layers", steps, "layers") as task:
        for i in candidates:
            handle = loaded.model.model.layers[i].register_forward_hook(hook(i), with_kwargs=True)
            held.callback(handle.remove)
        for row in tokens:
            loaded.model.model(row[None].to(loaded.device), use_cache=False)
    return {i: (total / wholes[i]).sqrt().tolist() for i, total in squares.items()}


def _hidden(output: Any) -> torch.Tensor:
    return (output[0] if isinstance(output, tuple) else output).float()


def _within(
    candidates: Mapping[int, Sequence[tuple[list[int], list[int]]]],
    errors: Mapping[int, Sequence[float]],
    limit: float,
) -> list[list[int]]:
    """Ranks of keys and values of each layer: the last tried before its error passes the limit."""
    found = []
    for i, tried in candidates.items():
        passed = [error > limit for error in errors[i]]
        count = passed.index(True) if True in passed else len(tried)
        found += list(tried[max(count - 1, 0)])
    return found
