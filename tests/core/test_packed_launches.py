"""A prompt of a packed cache takes few ops whatever its length, and none waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from starkv_core.packed import PackedLayer
from starkv_core.run import Subject
from tests import models
from tests.coded_case import codec
from triton_ops.latent_codes import LayerCodes

# Ops whose result the host waits for, and tensors made of the host's numbers, which are copied.
WAITING = {"nonzero", "masked_select", "_local_scalar_dense", "equal", "is_nonzero", "lift_fresh"}
A_LAYER = 110  # launches at most: 3 bits and 4 in both sides, with a scale a token or two


class Launches(TorchDispatchMode):
    """Counts the ops that write something, and lists those that would wait for a GPU.

    Attributes:
        count: ops but for views.
        waiting: names of those that wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waiting: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
        self.count += all(alias.is_write for alias in aliases)
        masks = name.startswith("index") and isinstance(args[1], list | tuple)
        if masks and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waiting.append(f"{name} by a mask")
        if name in WAITING or func.overloadpacket is torch.ops.aten.repeat_interleave:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], Any]) -> int:
    """How many ops a call takes, none of which waits."""
    with Launches() as seen:
        call()
    assert seen.waiting == []
    return seen.count


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t[t > 0],
        lambda t: t.__setitem__(t > 0, 1.0),
        lambda t: (t > 0).nonzero(),
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).all()),
        lambda t: t.masked_select(t > 0),
        lambda t: torch.tensor([1.0, 2.0]),
        lambda t: t.repeat_interleave(torch.ones(4, dtype=torch.int64)),
    ],
)
def test_what_waits_is_seen(call: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="assert \\["):
        launches(lambda: call(torch.ones(4)))


def layer_codes(groups: str, prefill: Literal["exact", "coded"]) -> LayerCodes:
    return LayerCodes(
        codec("key", [(4, 3), (3, 17)], groups),
        codec("value", [(4, 5), (3, 9)], groups),
        4,
        32,
        prefill,
    )


def prompt(length: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(2, length, r, generator=generator) for r in (20, 14))
    return keys.bfloat16().to(device), values.bfloat16().to(device)


def two_prompts(codes: LayerCodes, length: int) -> list[int]:
    """Ops of the first, and of one after it that begins within the window."""
    new, layer = prompt(length), PackedLayer(codes, torch.bfloat16)
    layer.reserve(2, 2 * length, (0, 0), new[0].device)
    return [launches(lambda: layer.append_prompt(*new)) for _ in range(2)]


@pytest.mark.parametrize("groups", ["static", "row", "section"])
@pytest.mark.parametrize("prefill", ["exact", "coded"])
def test_a_layer_takes_as_many_for_any_prompt(
    groups: str, prefill: Literal["exact", "coded"]
) -> None:
    codes, counts = layer_codes(groups, prefill), []
    for length in (100, 1100, 2300):
        layer = PackedLayer(codes, torch.bfloat16)
        for _ in range(2):  # tables of the quantisers and of the slots are made once
            layer.append_prompt(*prompt(length))
        counts.append(two_prompts(codes, length))
    # What is a view within one tile is a copy beyond.
    assert counts[1] == counts[2] and max(counts[0]) <= max(counts[1])
    if prefill == "exact":
        assert counts[1][0] <= A_LAYER


def test_a_model_takes_as_many_for_any_prompt() -> None:
    """Beside the same latents in 16 bits: what a layer has more is coding."""
    plain = models.deployed(models.model("llama"))
    packed = models.coded(plain, sinks=4, window=32)

    def prefill(subject: Subject, length: int) -> int:
        ids = models.ids(2, length)
        with torch.no_grad(), subject.active() as live:
            live(ids, past_key_values=subject.new_cache())
            cache = subject.new_cache()
            return launches(lambda: live(ids, past_key_values=cache))

    counts = [[prefill(subject, length) for subject in (plain, packed)] for length in (530, 1200)]
    assert counts[0] == counts[1]
    assert counts[0][1] - counts[0][0] <= A_LAYER * plain.spec.n_layers


@pytest.mark.gpu
@pytest.mark.parametrize("groups", ["static", "row", "section"])
@pytest.mark.parametrize("prefill", ["exact", "coded"])
def test_nothing_waits_on_a_gpu(groups: str, prefill: Literal["exact", "coded"]) -> None:
    """As CUDA itself says; and the same bits as on the CPU."""
    on_cpu = PackedLayer(layer_codes(groups, prefill), torch.bfloat16)
    codes = on_cpu.layer_codes.to("cuda")
    PackedLayer(codes, torch.bfloat16).append_prompt(*prompt(900, "cuda"))
    layer, parts = PackedLayer(codes, torch.bfloat16), [prompt(n) for n in (900, 700)]
    on_device = [prompt(n, "cuda") for n in (900, 700)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for keys, values in on_device:
            layer.append_prompt(keys, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for keys, values in parts:
        on_cpu.append_prompt(keys, values)
    for got, wanted in zip(layer.tensors(), on_cpu.tensors(), strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), wanted.view(torch.uint8))
