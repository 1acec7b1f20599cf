"""Suite ``attention``: one layer's attention over a filled cache, all backends side by side.

From the turned queries ``[B, H, 1, D]`` of one new token to the output in front of ``o_proj``.
What making the query, appending and ``o_proj`` cost is the same for all and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from starkv_core.bench.codes import for_random, step_bytes
from starkv_core.bench.exact import attend, normal
from starkv_core.bench.gate import OUTPUT_LIMIT, fault, relative_error, rows_checked
from starkv_core.bench.outcome import Measured
from starkv_core.bench.packed import fill_random, read_exactly
from starkv_core.bench.plan import Need, coded_work, latent_work, slot_tables
from starkv_core.bench.records import CODED
from starkv_core.bench.shapes import Shape, key_layout
from starkv_core.bench.timing import measure, peak_bytes, release
from starkv_core.budget import packed_bytes, slots
from starkv_core.packed import PackedLayer
from triton_ops.coded_attention import CodedFactors, coded_attention
from triton_ops.latent_attention import (
    LatentFactors,
    expand_heads,
    latent_attention,
    rotate,
    row_width,
)

SDPA_DEFAULT, SDPA_FLASH, REBUILD, STARKV = BACKENDS = (
    "sdpa-default",
    "sdpa-flash",
    "rebuild",
    "starkv",
)
"""Those of every shape; one that is coded has :data:`CODED` beside them."""
_TILE = 4096  # tokens that `rebuild` rebuilds at once: bounds its temporaries
_GATE_TILE = 4096  # tokens of the float64 reference at once


def read_bytes(shape: Shape, backend: str, ctx: int, batch: int) -> int:
    """Bytes of cache that one step of a backend has to move.

    Dense: keys and values, read once. ``starkv``: the latents as stored, row padding included.
    ``rebuild``: the latents, and keys and values written and read again. ``starkv-coded``: codes,
    their scales and the rows that are not coded, padding of sections and rows included.
    """
    if backend == CODED:
        return batch * step_bytes(shape.layer_codes, ctx)
    dense = 2 * batch * ctx * 2 * shape.spec.kv_width
    latents = 2 * batch * ctx * shape.layer_ranks.stored
    return {REBUILD: latents + 2 * dense, STARKV: latents}.get(backend, dense)


def cache_bytes(shape: Shape, backend: str, ctx: int, batch: int) -> int:
    """Bytes of the layer's cache; latents and codes in whole blocks of slots, as the engine has."""
    if backend == CODED:
        codes = shape.layer_codes
        sides = codes.keys.layout, codes.values.layout
        return batch * packed_bytes(*sides, codes.sinks, codes.window, ctx)
    if backend in (REBUILD, STARKV):
        return 2 * batch * slots(ctx) * shape.layer_ranks.stored
    return 2 * batch * ctx * 2 * shape.spec.kv_width


def need(shape: Shape, backend: str, ctx: int, batch: int) -> Need:
    """Memory of one backend in one case."""
    spec, parts = shape.spec, {"cache": cache_bytes(shape, backend, ctx, batch)}
    if backend == REBUILD:
        parts["tables"] = slot_tables(spec, ctx)
        parts["rebuilt keys and values"] = 2 * batch * ctx * 2 * spec.kv_width
        parts["temporaries"] = 16 * batch * min(ctx, _TILE) * spec.kv_width
    elif backend == STARKV:
        parts["tables"] = slot_tables(spec, ctx)  # of the gate
        parts["work"] = latent_work(spec, shape.layer_ranks, batch, slots(ctx))
    elif backend == CODED:
        parts["tables"] = slot_tables(spec, ctx)
        parts["work"] = coded_work(spec, shape.layer_codes, shape.key_owner, batch, ctx)
    else:
        parts["splits"] = batch * spec.n_heads * slots(ctx) * 2
    parts["margin"] = 1 << 30
    return Need(parts)


def run_case(
    shape: Shape,
    ctx: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    op_backend: str,
) -> Measured:
    """Make the inputs of one backend, hold its output to float64, time it, and hold it again.

    The second time it is the output that the last of the timed runs left.

    Args:
        backend: of :data:`BACKENDS`, or :data:`CODED`.
        op_backend: of latent attention, ``reference`` or ``triton``.
    """
    release(device)
    case: _Dense | _Latents | _Codes
    if backend == CODED:
        case = _Codes(shape, ctx, batch, dtype, device, op_backend)
    elif backend in (REBUILD, STARKV):
        case = _Latents(shape, ctx, batch, dtype, device, op_backend)
    else:
        case = _Dense(shape, ctx, batch, dtype, device)
    step = case.step(backend)
    error = case.error(step())
    found = fault(error, OUTPUT_LIMIT[dtype])
    if found is not None:
        return Measured(None, error, found)
    left: list[Tensor] = []

    def timed() -> None:
        left[:] = [step()]

    release(device)
    timing = measure(timed, device)
    peak = peak_bytes(device)
    error = max(error, case.error(left[0]))
    found = fault(error, OUTPUT_LIMIT[dtype])
    if found is not None:
        return Measured(None, error, found)
    note = None if timing.graph or device.type != "cuda" else "launched without a graph"
    return Measured(timing, error, peak=peak, note=note)


class _Dense:
    """A preallocated dense cache, ``[B, H_kv, L, D]`` for keys and for values."""

    def __init__(
        self, shape: Shape, ctx: int, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        spec = shape.spec
        size = (batch, spec.n_kv_heads, ctx, spec.head_dim)
        self.q = normal((batch, spec.n_heads, 1, spec.head_dim), dtype, device, 0)
        self.keys, self.values = (normal(size, dtype, device, seed) for seed in (1, 2))
        self.group = spec.group

    def step(self, backend: str) -> Callable[[], Tensor]:
        """One step of a backend of SDPA."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def default() -> Tensor:
            return F.scaled_dot_product_attention(
                self.q, self.keys, self.values, enable_gqa=self.group > 1
            )

        def flash() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return default()

        return flash if backend == SDPA_FLASH else default

    def error(self, out: Tensor) -> float:
        """Relative error of ``out [B, H, 1, D]`` on some rows."""
        got, want = [], []
        for row in rows_checked(len(self.q)):
            pairs = zip(
                self.keys[row].split(_GATE_TILE, 1),
                self.values[row].split(_GATE_TILE, 1),
                strict=True,
            )
            q = self.q[row, :, 0].double().unflatten(0, (-1, self.group))
            want.append(
                attend(q, ((k.double(), v.double()) for k, v in pairs), q.shape[-1] ** -0.5)
            )
            got.append(out[row, :, 0].unflatten(0, (-1, self.group)))
        return relative_error(torch.stack(got), torch.stack(want))


def _error(case: _Latents | _Codes, out: Tensor) -> float:
    """Relative error of ``out [B, H, 1, D]`` on some rows, from keys rebuilt tile by tile."""
    got, want = [], []
    for row in rows_checked(len(case.q)):
        q = case.q[row, :, 0].double().unflatten(0, (-1, case.group))
        mixed = attend(q, case.tiles(row), case.scale)
        want.append(torch.einsum("hgr,hdr->hgd", mixed, case.factors.value_up.double()))
        got.append(out[row, :, 0].unflatten(0, (-1, case.group)))
    return relative_error(torch.stack(got), torch.stack(want))


class _Latents:
    """Latents of one layer with the factors that read them.

    The keys have a bias: calibration leaves one wherever it centres them, as it does unless told
    otherwise, whether or not the model has one.
    """

    def __init__(
        self,
        shape: Shape,
        ctx: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        op_backend: str,
    ) -> None:
        spec, ranks = shape.spec, shape.layer_ranks
        dim, heads, layout = spec.head_dim, spec.n_kv_heads, key_layout(spec, ranks)
        value_rank = sum(ranks.values)
        key_up = normal((heads, dim, max(layout.ranks)), dtype, device, 1)
        for head, rank in enumerate(layout.ranks):
            key_up[head, :, rank:] = 0
            key_up[head] *= rank**-0.5
        self.factors = LatentFactors(
            layout,
            key_up,
            normal((heads, dim), dtype, device, 2, 0.5),
            normal((heads, dim, value_rank), dtype, device, 3, value_rank**-0.5),
        )
        self.rope = spec.rope.growing()
        self.q = normal((batch, spec.n_heads, 1, dim), dtype, device, 0)
        room = slots(ctx)
        self.x = normal((batch, room, row_width(layout.channels)), dtype, device, 4)
        self.z = normal((batch, room, row_width(value_rank)), dtype, device, 5)
        self.ctx, self.op_backend, self.group = ctx, op_backend, spec.group
        self.scale = dim**-0.5
        self.filled = torch.tensor([ctx], dtype=torch.int32, device=device)
        self.first = torch.zeros(batch, dtype=torch.int32, device=device)

    def step(self, backend: str) -> Callable[[], Tensor]:
        """One step of latent attention, or of SDPA on rebuilt keys and values."""
        if backend == STARKV:
            return self._latent
        size = (self.x.shape[0], len(self.factors.layout.ranks), self.ctx, self.q.shape[-1])
        keys, values = (torch.empty(size, dtype=self.q.dtype, device=self.q.device) for _ in "kv")
        return lambda: self._rebuild(keys, values)

    def _latent(self) -> Tensor:
        return latent_attention(
            self.q,
            self.x,
            self.z,
            self.factors,
            self.rope,
            filled=self.filled,
            scale=self.scale,
            first=self.first,
            backend=self.op_backend,
        )

    def _rebuild(self, keys: Tensor, values: Tensor) -> Tensor:
        cos, sin = self.rope.slots(self.ctx, self.q.device)
        factors, value_rank = self.factors, self.factors.value_up.shape[-1]
        for start in range(0, self.ctx, _TILE):
            tile = slice(start, min(start + _TILE, self.ctx))
            made = expand_heads(
                self.x[:, tile], factors.key_index, factors.key_up, factors.key_bias
            )
            keys[:, :, tile] = rotate(made, cos[tile], sin[tile])
            values[:, :, tile] = torch.einsum(
                "blr,hdr->bhld", self.z[:, tile, :value_rank], factors.value_up
            )
        return F.scaled_dot_product_attention(
            self.q, keys, values, scale=self.scale, enable_gqa=self.group > 1
        )

    error = _error

    def tiles(self, row: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys of every head, rebuilt in float64, and value latents.

        Head by head from its own channels, so that nothing is shared with what is tested.
        """
        layout, factors = self.factors.layout, self.factors
        cos, sin = self.rope.slots(self.ctx, self.q.device)
        for at in range(0, self.ctx, _GATE_TILE):
            tile = slice(at, min(at + _GATE_TILE, self.ctx))
            x = self.x[row, tile].double()
            keys = torch.stack(
                [
                    x[:, start : start + rank] @ factors.key_up[head, :, :rank].double().T
                    for head, (start, rank) in enumerate(
                        zip(layout.starts, layout.ranks, strict=True)
                    )
                ]
            )
            if factors.key_bias is not None:
                keys = keys + factors.key_bias[:, None].double()
            value_rank = factors.value_up.shape[-1]
            keys = rotate(keys, cos[tile].double(), sin[tile].double())
            yield keys, self.z[row, tile, :value_rank].double()


class _Codes:
    """A packed layer of random codes with the factors that read it; keys have a bias."""

    def __init__(
        self,
        shape: Shape,
        ctx: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        op_backend: str,
    ) -> None:
        spec, codes = shape.spec, for_random(shape.layer_codes.to(device))
        dim, heads, owner = spec.head_dim, spec.n_kv_heads, shape.key_owner
        groups, owner = int(owner.max()) + 1, owner.to(device)
        self.channels = [(owner == h * groups // heads).nonzero()[:, 0] for h in range(heads)]
        ranks = tuple(map(len, self.channels))
        key_up = normal((heads, dim, max(ranks)), dtype, device, 1)
        index = torch.zeros(heads, max(ranks), dtype=torch.long, device=device)
        for head, channels in enumerate(self.channels):
            key_up[head, :, len(channels) :] = 0
            key_up[head] *= len(channels) ** -0.5
            index[head, : len(channels)] = channels
        value_rank = codes.values.layout.channels
        self.key_bias = normal((heads, dim), dtype, device, 2, 0.5)
        self.factors = CodedFactors(
            codes,
            index,
            ranks,
            key_up,
            self.key_bias,
            normal((heads, dim, value_rank), dtype, device, 3, value_rank**-0.5),
        )
        self.rope = spec.rope.growing()
        self.q = normal((batch, spec.n_heads, 1, dim), dtype, device, 0)
        self.layer = PackedLayer(codes, dtype)
        self.layer.reserve(batch, ctx, (0, 0), device)
        fill_random(self.layer, ctx, 4)
        self.op_backend, self.group, self.scale = op_backend, spec.group, dim**-0.5
        self.filled = torch.tensor([ctx], dtype=torch.int32, device=device)
        self.coded = torch.tensor([self.layer.coded], dtype=torch.int32, device=device)
        self.first = torch.zeros(batch, dtype=torch.int32, device=device)

    def step(self, backend: str) -> Callable[[], Tensor]:
        """One step of attention over codes."""
        return lambda: coded_attention(
            self.q,
            *self.layer.coded_sides(),
            self.factors,
            self.rope,
            filled=self.filled,
            coded=self.coded,
            scale=self.scale,
            first=self.first,
            backend=self.op_backend,
        )

    error = _error

    def tiles(self, row: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys of every head, rebuilt in float64 from what each bit says, and value latents."""
        cos, sin = self.rope.slots(self.layer.length, self.q.device)
        at = 0
        for x, z in read_exactly(self.layer, row, _GATE_TILE):
            tile = slice(at, at + len(x))
            keys = torch.stack(
                [
                    x[:, channels] @ self.factors.key_up[head, :, : len(channels)].double().T
                    + self.key_bias[head].double()
                    for head, channels in enumerate(self.channels)
                ]
            )
            yield rotate(keys, cos[tile].double(), sin[tile].double()), z
            at += len(x)
