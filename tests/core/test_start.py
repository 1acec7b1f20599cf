"""Where training starts: what is decomposed under which moments, and what the bias makes up for."""

from __future__ import annotations

import pytest
import torch

from starkv_core.calibrate.start import decompose_layer
from starkv_core.statistics import gather_statistics
from tests import models
from tests.tolerances import FP32_LOGITS


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_no_error_on_the_mean_at_any_rank(family: str) -> None:
    """Docs/design.md section 5: cut components, closed gates and half-open ones alike."""
    loaded = models.model(family)
    made = models.recipe(steps=3, start={"slack": 1.0}, budget={"ratio": 3.0})
    live = models.student(loaded, made)
    stats = gather_statistics(loaded, models.ids(4, 48, seed=3), [0, 1, 2])
    slope = live.settings.slope
    for i, layer in live.by_layer().items():
        with torch.no_grad():
            for f in (layer.keys, layer.values):
                for block, levels in enumerate(f.levels(live.settings)):
                    f.alpha[block] += levels[levels > 0].min() - 0.5 / slope
        weights = layer.fold(live.settings).weights(torch.float32)
        attention = loaded.model.model.layers[i].self_attn
        mean, mixed = stats[i].mean, stats[i].mixed_mean
        key_latents = (weights.key_down @ mean)[weights.key_index]
        found = torch.einsum("hdr,hr->hd", weights.key_up, key_latents) + weights.key_bias
        wanted = attention.k_proj(mean).view_as(found)
        torch.testing.assert_close(found, wanted, rtol=0, atol=FP32_LOGITS)
        found = weights.value_up @ (weights.value_down @ mixed) + weights.value_bias
        wanted = attention.v_proj(mixed).view_as(found)
        torch.testing.assert_close(found, wanted, rtol=0, atol=FP32_LOGITS)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("keys", ["query-aware", "attended"])
def test_energy_by_hand(family: str, center: bool, keys: str) -> None:
    """All of sigma^2 is ``tr(A W S W^T)``, or with keys as they count ``tr(A K)``: the shrunk,
    centred moment and the queries' metric, in which the norm on keys counts squared.
    """
    loaded = models.model(family)
    start = models.recipe(start={"center": center, "shrinkage": 0.2, "keys": keys}).start
    stats = gather_statistics(loaded, models.ids(2, 30), [1])[1]
    attention = loaded.model.model.layers[1].self_attn
    norm = attention.k_norm.weight.double() if family == "qwen3" else torch.ones(16).double()
    share = (0.98 if family == "qwen3" else 1.0) if center else 0.0
    moment = stats.moment.double() - share * torch.outer(stats.mean, stats.mean).double()
    moment = 0.8 * moment + 0.2 * moment.trace() / len(moment) * torch.eye(len(moment))
    found = decompose_layer(loaded, 1, start, stats)
    for head, block in enumerate(found.keys):
        energy = stats.query_energy[head].double() * norm.square()
        w = attention.k_proj.weight[16 * head : 16 * (head + 1)].detach().double()
        metric = torch.diag(0.5 * (energy[:8] + energy[8:]).repeat(2))
        outputs = w @ moment @ w.T
        if keys == "attended":
            metric = stats.query_moment[head].double() * torch.outer(norm, norm)
            mean = w @ stats.mean.double() * stats.key_weight[head].double().sqrt()
            counted = stats.key_covariance[head].double() + (1 - share) * torch.outer(mean, mean)
            outputs = 0.8 * counted + 0.2 * counted.trace() * (w @ w.T) / (w @ w.T).trace()
        wanted = float((metric @ outputs).trace())
        # The metric gives directions that no query uses a thousandth of the mean.
        assert float(block.sigma.double().square().sum()) == pytest.approx(wanted, rel=0.01)
