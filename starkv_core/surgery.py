"""Reversible surgery: put compressed attention into a transformers model, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from starkv_core.attention import CompressedAttention, LatentWeights
from starkv_core.models.load import LoadedModel
from triton_ops.latent_attention import RopeTables

WeightsOf = Callable[[], LatentWeights]
Attend = Callable[[torch.Tensor, torch.Tensor | None, Any], torch.Tensor]
"""Output ``[B, L, d]`` for new tokens ``[B, L, d]``, a mask in SDPA's form and a cache or None."""


def compressed(
    loaded: LoadedModel,
    layers: Mapping[int, WeightsOf],
    *,
    store_dtype: torch.dtype = torch.bfloat16,
    backend: str = "reference",
    tables: RopeTables | None = None,
) -> AbstractContextManager[Any]:
    """Run the model with some layers compressed; the base model is back on leaving, come what may.

    Compressed layers take cache slots as positions and do not read ``position_ids``. For the
    positions that ``generate`` makes, left padding included, scores are the same; packed sequences,
    whose positions begin anew, and positions with gaps are not supported (docs/design.md, trap 13).

    Args:
        loaded: the base model; its weights are shared, not copied.
        layers: for each compressed layer, a function that gives its weights at every forward (a
            training student computes them anew, a deployed model returns the same ones).
        store_dtype: dtype of latents in caches made inside.
        backend: of :func:`triton_ops.latent_attention.latent_attention`.
        tables: RoPE tables to share between calls.

    Returns:
        A context that gives the model, for ``forward`` and ``generate``.
    """
    tables = tables or loaded.spec.rope.growing()
    attentions = loaded.family.attentions(loaded.model)

    def attend(index: int, weights_of: WeightsOf) -> Attend:
        live = CompressedAttention(
            attentions[index], loaded.family, loaded.spec, tables, index, store_dtype, backend
        )
        return lambda hidden, mask, cache: live(weights_of(), hidden, mask, cache)

    return attending(loaded, {i: attend(i, weights_of) for i, weights_of in layers.items()})


@contextmanager
def attending(loaded: LoadedModel, layers: Mapping[int, Attend]) -> Iterator[Any]:
    """Run the model with other attention in some layers; the base model is back on leaving.

    Yields:
        The model.
    """
    model = loaded.model
    attentions = loaded.family.attentions(model)
    # Masks must come in SDPA's form: None, bool or additive.
    implementation = model.config._attn_implementation
    patched: list[Any] = []
    try:
        model.config._attn_implementation = "sdpa"
        for index, attend in layers.items():
            module = attentions[index]
            if "forward" in vars(module) and getattr(module.forward, "starkv", False):
                raise RuntimeError(f"layer {index} is compressed already; leave that context first")
            patched.append((module, vars(module).get("forward")))
            module.forward = _forward(attend)
        yield model
    finally:
        model.config._attn_implementation = implementation
        for module, original in patched:
            if original is None:
                del module.forward
            else:
                module.forward = original


def _forward(attend: Attend) -> Callable[..., Any]:
    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        return attend(hidden_states, attention_mask, past_key_values), None

    forward.starkv = True  # type: ignore[attr-defined]
    return forward
