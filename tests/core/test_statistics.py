"""Second moments gathered from a running model."""

from __future__ import annotations

import pytest
import torch

from starkv_core.statistics import LayerStatistics, gather_statistics
from tests import models


def test_sums_do_not_drift() -> None:
    """The same sequence many times has the statistics of one; float32 sums would round them off."""
    loaded = models.model()
    row = models.ids(1, 24)
    once = gather_statistics(loaded, row, [0, 2])
    often = gather_statistics(loaded, row.expand(60, -1), [0, 2])
    for i in (0, 2):
        for name in LayerStatistics.names():
            found = getattr(often[i], name)
            assert found.dtype == torch.float32
            assert torch.equal(found, getattr(once[i], name)), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_by_hand(family: str) -> None:
    """Against transformers' own eager attention: which query heads share a key head, what may
    attend to what, and that queries count after their norm and before RoPE.
    """
    loaded = models.model(family, num_key_value_heads=2)
    spec, tokens, layer = loaded.spec, models.ids(3, 24), 1
    found = gather_statistics(loaded, tokens, [layer])[layer]

    seen: list[torch.Tensor] = []
    block = loaded.model.model.layers[layer]
    handle = block.input_layernorm.register_forward_hook(lambda *args: seen.append(args[2]))
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        p = loaded.model(tokens, output_attentions=True).attentions[layer].double()
        q = block.self_attn.q_proj(seen[0]).unflatten(-1, (spec.n_heads, spec.head_dim))
        if spec.qk_norm:
            q = block.self_attn.q_norm(q)
    handle.remove()
    y = seen[0].double()
    mixed = torch.einsum("bhts,bsd->bhtd", p, y).flatten(0, 2)
    y = y.flatten(0, 1)
    energy = q.double().square().mean((0, 1))
    wanted = LayerStatistics(
        y.mean(0), y.T @ y / len(y), mixed.mean(0), mixed.T @ mixed / len(mixed),
        torch.stack([energy[:2].sum(0), energy[2:].sum(0)]),
    )  # fmt: skip
    for name in LayerStatistics.names():
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name).float(), rtol=1e-4, atol=1e-5, msg=name
        )
