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
        k = block.self_attn.k_proj(seen[0]).unflatten(-1, (2, -1)).double()
        v = block.self_attn.v_proj(seen[0]).unflatten(-1, (2, -1)).double()
        w_o = block.self_attn.o_proj.weight.unflatten(1, (spec.n_heads, -1)).double()
    handle.remove()
    y = seen[0].double()
    mixed = torch.einsum("bhts,bsd->bhtd", p, y).flatten(0, 2)
    y = y.flatten(0, 1)
    energy = q.double().square().mean((0, 1))
    # By the distance alone: what query t is to the key of slot s before RoPE.
    apart = torch.arange(24)[:, None] - torch.arange(24)
    angles = apart[..., None] * spec.rope.inv_freq.double()
    one, two = q.double().transpose(1, 2)[:, :, :, None].chunk(2, -1)
    turned = torch.cat(
        (one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()), -1
    )
    frames = torch.einsum("bhts,bhtsd,bhtse->hde", p, turned, turned) / (3 * 24)
    # How far the output moves when a query attends more to a key, and the spread of keys about
    # their mean under the weights that this gives them.
    k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    u = torch.einsum("ohd,bhtsd->bhtso", w_o, v[:, :, None] - (p @ v)[:, :, :, None])
    weight = p * u.square().sum(-1)
    mean = (weight @ k) / weight.sum(-1, keepdim=True).clamp_min(1e-300)
    off = k[:, :, None] - mean[:, :, :, None]
    spread = torch.einsum("bhts,bhtsd,bhtse->hde", weight, off, off) / (3 * 24)
    weight = weight.sum((0, 2, 3)) / (3 * 24)
    wanted = LayerStatistics(
        y.mean(0), y.T @ y / len(y), mixed.mean(0), mixed.T @ mixed / len(mixed),
        torch.stack([energy[:2].sum(0), energy[2:].sum(0)]),
        *(of_heads.unflatten(0, (2, 2)).sum(1) for of_heads in (frames, spread, weight)),
    )  # fmt: skip
    for name in LayerStatistics.names():
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name).float(), rtol=1e-4, atol=1e-5, msg=name
        )


def test_a_large_bias_of_keys_does_not_round_off_their_spread() -> None:
    """Qwen2.5 has biases of 200 where keys spread by less than 1."""
    plain, biased = models.model("qwen2"), models.model("qwen2")
    tokens = models.ids(2, 40)
    for loaded, size in ((plain, 0.0), (biased, 1000.0)):
        for module in loaded.model.modules():
            if hasattr(module, "k_proj"):
                # The slowest pairs: what the queries attend to hardly changes.
                module.k_proj.bias.data.zero_().unflatten(0, (-1, 16))[:, 7] = size
                module.q_proj.weight.data.unflatten(0, (-1, 16))[:, 7::8] = 0.0
                module.q_proj.bias.data.zero_()
    expected, found = (gather_statistics(loaded, tokens, [0])[0] for loaded in (plain, biased))
    torch.testing.assert_close(found.key_weight, expected.key_weight, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.key_covariance, expected.key_covariance, rtol=1e-4, atol=1e-5)
