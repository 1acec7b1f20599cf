"""Baselines against their own definitions, by independent float64 computation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from starkv_core.budget import bytes_per_token
from starkv_core.calibrate.allocation import proportional_ranks
from starkv_core.calibrate.layer_start import LayerStart, approximated
from starkv_core.calibrate.loop import budget_for, export_run, run_calibration
from starkv_core.calibrate.methods.care import greedy_ranks
from starkv_core.calibrate.methods.eigen import (
    error_ranks,
    key_query_basis,
    layer_errors,
    query_moments,
    share_ranks,
)
from starkv_core.calibrate.methods.palu import fisher_scores
from starkv_core.calibrate.methods.recalkv import (
    calibrate_values,
    calibrated,
    cka,
    similar_heads,
)
from starkv_core.calibrate.start import build_start, decompose_layer, group_sizes
from starkv_core.decompose import Decomposition, decompose
from starkv_core.errors import UserError
from starkv_core.models.load import LoadedModel
from starkv_core.quant.basis import sides_of
from starkv_core.recipe import ONE_SHOT, load_recipe, parse_recipe
from starkv_core.run import open_subject
from starkv_core.statistics import gather_statistics
from tests import models
from tests.tolerances import FP32_LOGITS
from triton_ops.latent_attention import row_width

TOKENS = models.ids(4, 48, seed=3)


def weight(loaded: LoadedModel, layer: int, name: str) -> torch.Tensor:
    attention = loaded.model.model.layers[layer].self_attn
    return getattr(attention, name).weight.detach().double()


def inputs(loaded: LoadedModel, layer: int) -> torch.Tensor:
    """What the attention of a layer sees, ``[tokens, d]`` float64."""
    seen: list[torch.Tensor] = []
    attention = loaded.model.model.layers[layer].self_attn
    handle = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        for row in TOKENS:
            loaded.model.model(row[None], use_cache=False)
    handle.remove()
    return torch.cat(seen).flatten(0, 1).double()


def whitened_svd(w: torch.Tensor, root: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of ``W root``, the root undone."""
    u, s, v = torch.linalg.svd(w @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)


def built(loaded: LoadedModel, method: str, **changes: Any) -> Any:
    made = models.recipe(method=method, **changes)
    layers = build_start(loaded, made, budget_for(made, loaded.spec), TOKENS)
    student = models.Student(loaded, layers, models.gate_settings(made))
    folded = {i: layer.fold(student.settings) for i, layer in layers.items()}
    return student.ranks(), folded


def key_weight(folded: Any, head: int) -> torch.Tensor:
    """What the deployed factors make of a key head's weight."""
    weights = folded.weights(torch.float32)
    return (weights.key_up[head] @ weights.key_down[weights.key_index[head]]).double()


def value_weight(folded: Any) -> torch.Tensor:
    weights = folded.weights(torch.float32)
    return (weights.value_up @ weights.value_down).flatten(0, 1).double()


def close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-4) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < share


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_SHOT)
def test_a_baseline_is_one_recipe_away_and_takes_no_steps(method: str) -> None:
    found = load_recipe("tiny", [f"method={method}"])
    assert (found.method, found.steps, found.rank_steps) == (method, 0, 0)
    shipped = load_recipe(f"baselines/{method}")
    assert (shipped.method, shipped.start) == (method, found.start)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("method", ONE_SHOT)
def test_the_budget_is_met_and_decoding_equals_prefill(method: str, family: str) -> None:
    loaded = models.model(family)
    subject = models.deployed(loaded, method=method)
    limit = loaded.spec.dense_bytes_per_token / 2
    assert subject.ranks is not None
    assert limit - 16 < bytes_per_token(loaded.spec, subject.ranks) <= limit
    ids = models.ids(2, 30)
    cache = subject.new_cache()
    with torch.no_grad(), subject.active() as model:
        whole = model(ids, use_cache=False).logits
        parts = [
            model(part, past_key_values=cache).logits for part in ids.split([20, *[1] * 10], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=FP32_LOGITS)


def test_under_a_norm_on_keys() -> None:
    loaded = models.model("qwen3")
    for method in ("uniform", "eigen"):
        assert models.deployed(loaded, method=method).ranks is not None
    with pytest.raises(UserError, match="start.key_group: keys with a norm"):
        models.deployed(loaded, method="care")
    assert models.deployed(loaded, method="care", start={"key_group": 1}).ranks is not None


def test_groups_of_more_heads_than_there_are_take_them_all() -> None:
    spec = models.model("llama").spec  # four key heads
    for group, wanted in ((0, 4), (1, 1), (2, 2), (4, 4), (5, 4)):
        start = models.recipe(start={"key_group": group, "value_group": group}).start
        assert group_sizes(start, spec) == (wanted, wanted)
    for name in ("key_group", "value_group"):
        with pytest.raises(UserError, match=f"start.{name}: 3 does not divide 4 heads"):
            group_sizes(models.recipe(start={name: 3}).start, spec)


def test_proportional_ranks_are_within_a_row_step_of_the_proportion() -> None:
    sizes, weights = [[64], [64], [32, 32], [64]], [1.0, 3.0, 2.0, 40.0]
    found = proportional_ranks(sizes, weights, 136)
    assert found[3] == [64]  # in full; the rest is for the others
    assert sum(row_width(sum(ranks)) for ranks in found) == 136
    for ranks, weight_of in zip(found[:3], weights, strict=False):
        assert abs(sum(ranks) - (136 - 64) * weight_of / 6) <= 8
    assert found[2][0] == found[2][1]


# --- uniform -------------------------------------------------------------------------------------


def test_uniform_is_the_svd_of_the_weights() -> None:
    loaded = models.model("llama")
    ranks, folded = built(loaded, "uniform")
    for i, layer in folded.items():
        key_ranks, (value_rank,) = ranks.layers[i].keys, ranks.layers[i].values
        assert max(key_ranks) - min(key_ranks) <= 1
        # Of 64 and, for the hidden size bounds it, of 48; as even as row steps allow.
        assert abs(sum(key_ranks) / 64 - value_rank / 48) < 8 / 48
        w = weight(loaded, i, "k_proj").split(16)
        for head in range(4):
            close(
                key_weight(layer, head),
                whitened_svd(w[head], torch.eye(48).double(), key_ranks[head]),
            )
        w = weight(loaded, i, "v_proj")
        close(value_weight(layer), whitened_svd(w, torch.eye(48).double(), value_rank))


# --- Palu ----------------------------------------------------------------------------------------


def test_palu_factors_are_cholesky_whitened_by_groups() -> None:
    """Four heads a group; with eight heads there are two."""
    loaded = models.model("llama", num_attention_heads=8, num_key_value_heads=8)
    ranks, folded = built(loaded, "palu")
    for i, layer in folded.items():
        y = inputs(loaded, i)
        root = torch.linalg.cholesky(y.T @ y / len(y))
        assert (len(ranks.layers[i].keys), len(ranks.layers[i].values)) == (2, 2)
        for group in range(2):
            rows = slice(64 * group, 64 * (group + 1))
            wanted = whitened_svd(
                weight(loaded, i, "k_proj")[rows], root, ranks.layers[i].keys[group]
            )
            found = torch.cat([key_weight(layer, 4 * group + h) for h in range(4)])
            close(found @ root, wanted @ root)
            wanted = whitened_svd(
                weight(loaded, i, "v_proj")[rows], root, ranks.layers[i].values[group]
            )
            close(value_weight(layer)[rows] @ root, wanted @ root)


def test_fisher_scores_by_hand() -> None:
    loaded = models.model("qwen2")
    found = fisher_scores(loaded, [0, 2], TOKENS)
    live = loaded.model.double()
    for n, layer in enumerate((0, 2)):
        for side, name in enumerate(("k_proj", "v_proj")):
            w = getattr(live.model.layers[layer].self_attn, name).weight
            w.requires_grad_(True)
            squares = torch.zeros_like(w)
            for row in TOKENS:
                live.zero_grad()
                out = live(row[None], use_cache=False).logits[0]
                chosen = out[:-1].log_softmax(-1).gather(1, row[1:, None])
                (-chosen.mean()).backward()
                squares += w.grad**2
            wanted = float((squares / 4).sqrt().mean())
            assert found[n][side] == pytest.approx(wanted, rel=1e-3)
            w.requires_grad_(False)


# --- ReCalKV -------------------------------------------------------------------------------------


def test_cka_by_gram_matrices() -> None:
    """HSIC of two linear kernels over the rows of ``X``, each kernel centred on both sides."""
    heads = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)).double()
    centring = torch.eye(12).double() - 1 / 12
    kernels = [centring @ h.T @ h @ centring for h in heads]
    wanted = torch.tensor(
        [[float((a * b).sum() / (a.norm() * b.norm())) for b in kernels] for a in kernels]
    ).double()
    torch.testing.assert_close(cka(heads), wanted)


def test_alike_heads_are_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    bases = torch.randn(3, 6, 20, generator=generator)
    family = [0, 1, 2, 1, 0, 2]
    heads = torch.stack(
        [
            torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q @ bases[f]
            + 0.05 * torch.randn(6, 20, generator=generator)
            for f in family
        ]
    )
    assert similar_heads(heads, 2) == (0, 4, 1, 3, 2, 5)
    assert sorted(similar_heads(heads, 3)) == [0, 1, 2, 3, 4, 5]


def planted() -> LoadedModel:
    """Key heads 0 and 2, and 1 and 3, have the same rows up to a rotation and some noise."""
    loaded = models.model("qwen2", num_attention_heads=4, num_key_value_heads=4)
    generator = torch.Generator().manual_seed(2)
    for layer in loaded.model.model.layers:
        by_head = layer.self_attn.k_proj.weight.data.view(4, 16, 48)
        for head in (0, 1):
            turn = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
            noise = 0.01 * torch.randn(16, 48, generator=generator)
            by_head[head + 2] = turn @ by_head[head] + noise
    return loaded


def test_reordered_keys_are_those_of_their_groups(tmp_path: Path) -> None:
    loaded = planted()
    ranks, folded = built(loaded, "recalkv", start={"key_group": 2})
    for i, layer in folded.items():
        assert layer.key_order.tolist() == [0, 2, 1, 3]
        y = inputs(loaded, i)
        root = torch.linalg.cholesky(y.T @ y / len(y))
        w = weight(loaded, i, "k_proj").split(16)
        for group, pair in enumerate(((0, 2), (1, 3))):
            wanted = whitened_svd(
                torch.cat([w[h] for h in pair]), root, ranks.layers[i].keys[group]
            )
            found = torch.cat([key_weight(layer, h) for h in pair])
            close(found @ root, wanted @ root)


def test_a_mean_is_made_up_for_in_the_heads_own_order() -> None:
    loaded = planted()
    start = {"key_group": 2, "center": True}
    _, folded = built(loaded, "recalkv", start=start)
    for i, layer in folded.items():
        mean = inputs(loaded, i).mean(0)
        attention = loaded.model.model.layers[i].self_attn
        wanted = attention.k_proj(mean.float()).view(4, 16)
        found = torch.stack([key_weight(layer, h) @ mean for h in range(4)]).float()
        torch.testing.assert_close(found + layer.key_bias, wanted, rtol=0, atol=FP32_LOGITS)


def test_reordered_heads_survive_the_run_folder(tmp_path: Path) -> None:
    """Trained and folded form alike: opened again, exported again."""
    content = {
        "method": "recalkv",
        "budget": {"ratio": 2.0},
        "data": {"length": 64},
        "start": {"key_group": 2, "sequences": 2},
    }
    run = tmp_path / "run"
    run_calibration(parse_recipe(content, where="test"), run, device="cpu")
    first = open_subject(run, device="cpu")
    export_run(run, device="cpu")
    again = open_subject(run, device="cpu")
    reordered = 0
    for i, weights in first.weights.items():
        torch.testing.assert_close(weights.key_index, again.weights[i].key_index)
        torch.testing.assert_close(weights.key_up, again.weights[i].key_up)
        reordered += weights.key_index[:, 0].tolist() != sorted(weights.key_index[:, 0].tolist())
    assert reordered > 0  # or nothing was tested


def test_calibrated_is_one_alternation_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(12, 20, generator=generator).double()
    y = torch.randn(400, 20, generator=generator).double()
    other = y @ torch.randn(20, 20, generator=generator).double()
    block = decompose(w, y.T @ y / 400)
    found = calibrated(w, block, 5, other.T @ other / 400).product()
    down = block.down[:5]
    up = torch.linalg.lstsq(other @ down.T, other @ w.T).solution.T
    down = torch.linalg.lstsq(up, w).solution
    torch.testing.assert_close(found, up @ down)

    def error(product: torch.Tensor) -> float:
        return float((other @ (w - product).T).norm())

    assert error(found) < error(block.product(5))
    assert torch.linalg.matrix_rank(found) == 5


def test_values_are_calibrated_on_what_compressed_layers_pass_on() -> None:
    loaded = models.model("llama")
    made = models.recipe(method="recalkv")
    stats = gather_statistics(loaded, TOKENS, [0, 1, 2], mixed=False)
    starts = {i: decompose_layer(loaded, i, made.start, stats[i]) for i in range(3)}
    ranks = [([6], [9])] * 3
    found = calibrate_values(loaded, starts, ranks, TOKENS)
    dense = weight(loaded, 1, "v_proj")
    kept = [
        (linear, linear.weight.data.clone())
        for i in (0, 1)
        for linear in (
            loaded.model.model.layers[i].self_attn.k_proj,
            loaded.model.model.layers[i].self_attn.v_proj,
        )
    ]
    for i in (0, 1):
        attention = loaded.model.model.layers[i].self_attn
        attention.k_proj.weight.data = starts[i].keys[0].product(6)
        attention.v_proj.weight.data = found[i].values[0].product(9)
    y = inputs(loaded, 2)
    for linear, data in kept:
        linear.weight.data = data
    torch.testing.assert_close(weight(loaded, 1, "v_proj"), dense)
    wanted = calibrated(
        weight(loaded, 2, "v_proj"), starts[2].values[0], 9, y.T @ y / len(y)
    ).product()
    close(found[2].values[0].product().double(), wanted, 1e-3)


# --- EigenAttention ------------------------------------------------------------------------------


def test_the_basis_is_that_of_keys_and_queries_together() -> None:
    loaded = models.model("qwen2")
    y = inputs(loaded, 1)
    attention = loaded.model.model.layers[1].self_attn
    w_k = weight(loaded, 1, "k_proj").split(16)
    q = y @ weight(loaded, 1, "q_proj").T + attention.q_proj.bias.detach().double()
    q = q.unflatten(1, (4, 16))
    moments = query_moments(loaded, TOKENS, [1])[1]
    for head in range(2):
        both = torch.cat([y @ w_k[head].T, q[:, 2 * head], q[:, 2 * head + 1]])
        u, s, _ = torch.linalg.svd(both.T, full_matrices=False)
        found = key_query_basis(w_k[head], y.T @ y / len(y), moments[head : head + 1])
        torch.testing.assert_close(
            found.sigma, s / len(y) ** 0.5, rtol=1e-4, atol=0, check_dtype=False
        )
        close(found.product(7), u[:, :7] @ u[:, :7].T @ w_k[head], 1e-3)


def test_eigen_deploys_projections_of_keys_and_values() -> None:
    loaded = models.model("llama")
    ranks, folded = built(loaded, "eigen")
    for i, layer in folded.items():
        y = inputs(loaded, i)
        k, q = (y @ weight(loaded, i, f"{name}_proj").T for name in "kq")
        v = (y @ weight(loaded, i, "v_proj").T).split(16, 1)
        for head in range(4):
            cut = slice(16 * head, 16 * (head + 1))
            u = torch.linalg.svd(torch.cat([k[:, cut], q[:, cut]]).T, full_matrices=False)[0]
            u = u[:, : ranks.layers[i].keys[head]]
            close(key_weight(layer, head), u @ u.T @ weight(loaded, i, "k_proj")[cut], 1e-3)
            u = torch.linalg.svd(v[head].T, full_matrices=False)[0]
            u = u[:, : ranks.layers[i].values[head]]
            close(value_weight(layer)[cut], u @ u.T @ weight(loaded, i, "v_proj")[cut], 1e-3)


def start_of(*sigmas: list[float]) -> LayerStart:
    blocks = [
        Decomposition(torch.zeros(4, len(s)), torch.tensor(s), torch.zeros(len(s), 4))
        for s in sigmas
    ]
    return LayerStart(blocks, blocks[:1], None, None)


def test_a_share_of_the_singular_values_of_every_head() -> None:
    found = share_ranks(start_of([6.0, 2.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]), 0.75)
    assert found == ([3, 3], [2])


def test_errors_of_layers_by_hand_and_one_limit_for_all() -> None:
    loaded = models.model("llama")
    made = models.recipe(method="eigen")
    stats = gather_statistics(loaded, TOKENS, [0, 1, 2], mixed=False)
    queries = query_moments(loaded, TOKENS, [0, 1, 2])
    starts = {i: decompose_layer(loaded, i, made.start, stats[i], queries[i]) for i in range(3)}
    tried = {i: [([12] * 4, [12] * 4), ([5] * 4, [9] * 4)] for i in range(3)}
    found = layer_errors(loaded, starts, tried, TOKENS)

    def after(layer: int) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = lambda module, args, out: kept.append(out)  # noqa: E731
        handle = loaded.model.model.layers[layer].register_forward_hook(hook)
        with torch.no_grad():
            loaded.model.model(TOKENS, use_cache=False)
        handle.remove()
        return (kept[0][0] if isinstance(kept[0], tuple) else kept[0]).double()

    for i in range(3):
        exact = after(i)
        attention = loaded.model.model.layers[i].self_attn
        for n, (key_ranks, value_ranks) in enumerate(tried[i]):
            with (
                approximated(attention.k_proj, starts[i].keys, key_ranks, None),
                approximated(attention.v_proj, starts[i].values, value_ranks, None),
            ):
                wanted = float((after(i) - exact).norm() / exact.norm())
            assert found[i][n] == pytest.approx(wanted, rel=1e-3)

    budget = budget_for(made, loaded.spec)
    ranks = error_ranks(loaded, starts, budget.numbers, TOKENS)
    assert budget.numbers - 8 < sum(row_width(sum(r)) for r in ranks) <= budget.numbers
    chosen = {i: [(ranks[2 * i], ranks[2 * i + 1])] for i in range(3)}
    errors = [e[0] for e in layer_errors(loaded, starts, chosen, TOKENS).values()]
    uniform = {i: [([8] * 4, [8] * 4)] for i in range(3)}
    even = [e[0] for e in layer_errors(loaded, starts, uniform, TOKENS).values()]
    assert max(errors) / min(errors) < max(1.5, max(even) / min(even))


# --- CARE ----------------------------------------------------------------------------------------


def test_care_is_the_svd_by_the_root_of_the_covariance() -> None:
    loaded = models.model("llama")
    ranks, folded = built(loaded, "care")
    for i, layer in folded.items():
        y = inputs(loaded, i)
        c = y.T @ y / len(y)
        c = c + 0.1 * c.diagonal().mean() * torch.eye(48).double()
        values, vectors = torch.linalg.eigh(c)
        root = (vectors * values.sqrt()) @ vectors.T
        assert (len(ranks.layers[i].keys), len(ranks.layers[i].values)) == (1, 1)
        found = torch.cat([key_weight(layer, h) for h in range(4)])
        close(found, whitened_svd(weight(loaded, i, "k_proj"), root, ranks.layers[i].keys[0]))
        wanted = whitened_svd(weight(loaded, i, "v_proj"), root, ranks.layers[i].values[0])
        close(value_weight(layer), wanted)


def test_greedy_ranks_step_by_step() -> None:
    """Every step of the result is the best one there was, by scores computed from scratch."""
    generator = torch.Generator().manual_seed(0)
    decays = [0.99, 0.9, 0.95, 0.97]
    groups = [
        [decay ** torch.arange(64.0) * (1 + torch.rand(1, generator=generator))]
        for decay in decays
        for _ in range(2)
    ]
    found = greedy_ranks(groups, 8 * 32)
    for side in (0, 1):
        spectra = [g[0].double() for g in groups[side::2]]
        ranks = [16] * 4  # half of the even share, 32
        for _ in range((4 * 32 - 4 * 16) // 8):
            scores = []
            for n, (s, r) in enumerate(zip(spectra, ranks, strict=True)):
                local = float(s[r : r + 8].sum() / s[r:].sum())
                scores.append(local * ((4 - n) / 2.5) ** 0.5 / (r / 16) ** 0.5 if r < 64 else -1.0)
            ranks[scores.index(max(scores))] += 8
        assert [r[0] for r in found[side::2]] == ranks


def test_quantising_reordered_heads_is_refused() -> None:
    subject = models.deployed(planted(), method="recalkv", start={"key_group": 2, "slack": 0})
    with pytest.raises(UserError, match="start.key_order: cka"):
        sides_of(subject.weights[0], 2, None)  # type: ignore[arg-type]
