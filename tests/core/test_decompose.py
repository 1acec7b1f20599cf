"""Decompositions against independent float64 mathematics."""

import pytest
import torch

from starkv_core.decompose import decompose, head_groups, output_metric, query_metric

N, D = 12, 20


def positive(size: int, rank: int | None = None) -> torch.Tensor:
    root = torch.randn(size, rank or 3 * size, dtype=torch.float64)
    return root @ root.T / root.shape[1]


def cost(error: torch.Tensor, moment: torch.Tensor, metric: torch.Tensor) -> float:
    return float(torch.trace(metric @ error @ moment @ error.T))


def test_plain_equals_svd() -> None:
    w = torch.randn(N, D, dtype=torch.float64)
    found = decompose(w)
    torch.testing.assert_close(found.sigma, torch.linalg.svdvals(w))
    for rank in (1, 5, 12):
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        torch.testing.assert_close(found.product(rank), (u[:, :rank] * s[:rank]) @ v[:rank])


def test_best_under_moment_and_metric() -> None:
    """Equals the whitened SVD done the long way: SVD of A^1/2 W L, undone on both sides."""
    w = torch.randn(N, D, dtype=torch.float64)
    moment, metric = positive(D), positive(N)
    half = torch.linalg.cholesky(metric).T  # any root of the metric will do
    root = torch.linalg.cholesky(moment)
    u, s, v = torch.linalg.svd(half @ w @ root, full_matrices=False)
    found = decompose(w, moment, metric)
    torch.testing.assert_close(found.sigma, s)
    for rank in (1, 4, 11):
        long_way = (
            torch.linalg.inv(half) @ (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root)
        )
        torch.testing.assert_close(found.product(rank), long_way)
        dropped = float(s[rank:].square().sum())
        assert cost(w - found.product(rank), moment, metric) == pytest.approx(dropped)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_full_rank_is_exact_even_with_a_singular_moment(shape: tuple[int, int]) -> None:
    w = torch.randn(*shape, dtype=torch.float64)
    moment = positive(shape[1], rank=3)
    found = decompose(w, moment).product()
    if shape[0] <= shape[1]:
        torch.testing.assert_close(found, w)
    # With more rows than columns the rank is the columns': exact wherever there is data.
    torch.testing.assert_close(found @ moment, w @ moment, rtol=1e-6, atol=1e-8)


def test_channels_have_unit_mean_square_on_the_data() -> None:
    w = torch.randn(N, D, dtype=torch.float64)
    moment = positive(D)
    down = decompose(w, moment).down
    torch.testing.assert_close(
        (down @ moment @ down.T).diagonal(), torch.ones(N, dtype=torch.float64)
    )


def test_query_metric_is_the_mean_over_all_relative_positions() -> None:
    """RoPE turns pairs (i, i + D/2); averaging R^T q q^T R over angles leaves one weight a pair."""
    q = torch.randn(8, dtype=torch.float64)
    total = torch.zeros(8, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    turns = 20000
    angles = 6.283185307179586 * torch.rand(turns, 4, generator=generator, dtype=torch.float64)
    cos, sin = torch.cos(angles).repeat(1, 2), torch.sin(angles).repeat(1, 2)
    turned = q * cos + torch.cat((-q[4:], q[:4])) * sin
    total = turned.T @ turned / turns
    metric = query_metric(q.square())
    torch.testing.assert_close(metric, total, rtol=0.05, atol=0.05)


def test_output_metric_is_the_cost_after_o_proj() -> None:
    heads, group, dim, hidden = 2, 3, 4, 10
    w_o = torch.randn(hidden, heads * group * dim, dtype=torch.float64)
    metric = output_metric(w_o, range(heads), group, dim, damping=0.0)
    error = torch.randn(heads * dim, dtype=torch.float64)
    wanted = 0.0
    for head in range(heads):
        for query in range(head * group, (head + 1) * group):
            part = w_o[:, query * dim : (query + 1) * dim]
            wanted += float((part @ error[head * dim : (head + 1) * dim]).square().sum())
    assert float(error @ metric @ error) == pytest.approx(wanted)


def test_groups_cover_the_heads() -> None:
    assert [list(g) for g in head_groups(4, 2)] == [[0, 1], [2, 3]]
