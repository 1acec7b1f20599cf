"""`starkv quantize`: measure, allocate bits, fold, check, write (docs/design.md section 5)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from starkv_core.artifacts import (
    new_run_dir,
    read_manifest,
    write_manifest,
)
from starkv_core.budget import predict_bytes, slots
from starkv_core.calibrate.distill import distillation_loss
from starkv_core.calibrate.loop import CHECK_SEQUENCES, calibration_tokens
from starkv_core.errors import RunFailure, UserError
from starkv_core.models.spec import ModelSpec
from starkv_core.progress import SILENT, Progress
from starkv_core.provenance import git_commit, versions
from starkv_core.quant.allocate import BLOCK, Option, allocate, key_options, value_options
from starkv_core.quant.artifact import (
    quantised_ranks,
    refuse_quantised,
    to_dict,
    write_quantisation,
)
from starkv_core.quant.basis import (
    Side,
    hadamard_blocks,
    key_metrics,
    principal,
    sides_of,
    value_metrics,
)
from starkv_core.quant.costs import coding_costs, sensitivities
from starkv_core.quant.layer import QuantLayer, code_side
from starkv_core.quant.measure import LatentStatistics, measure_latents
from starkv_core.quant.recover import recover
from starkv_core.quant.scheme import PAPER_WIDTHS, Scheme
from starkv_core.rank_map import RankMap
from starkv_core.recipe import Recipe, load_recipe
from starkv_core.run import (
    FACTORS,
    RANKS,
    RECIPE,
    Subject,
    deployed_subject,
    is_run,
    locked,
    open_subject,
)
from triton_ops.latent_attention import row_width
from triton_ops.latent_codes import TILE, tiles

KL_LIMIT = 0.5  # nats a token: above it the quantised model no longer says what it said before
DEFAULT_BITS = 4.0
_MEASURE_TOKENS = 16384
_PROBES = 4  # sequences for sensitivities
_CHECK_ROWS = 2  # of those that calibration keeps out of training
_CHECK_TOKENS = 256  # of each, read token by token


@dataclass(frozen=True)
class BitBudget:
    """What a quantised cache may take. At most one is given; none is ``bits`` of 4.

    Attributes:
        bits: of codes, scales and padding, for each latent of the run, on average.
        ratio: dense bytes over stored bytes, whole cache.
        bytes_per_token: stored bytes over tokens, whole cache.
        fit: ``(tokens, bytes)``: this context in this much memory.
        context: tokens at which ratio and bytes per token are meant; None is what the recipe was
            fitted to, or the length of its sequences.
    """

    bits: float | None = None
    ratio: float | None = None
    bytes_per_token: float | None = None
    fit: tuple[int, int] | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        given = self.given
        if len(given) > 1:
            raise UserError(f"budget: give one of {' and '.join(given)}, not several at once")
        if self.fit is not None and self.context is not None:
            raise UserError("budget: fit says the context itself; leave --context out")
        if self.bits is not None and not 0 < self.bits <= 8:
            raise UserError(f"bits {self.bits:g}: must be above 0 and at most 8")
        if self.ratio is not None and not self.ratio > 1:
            raise UserError(f"ratio {self.ratio:g}: must be above 1")
        if self.bytes_per_token is not None and not self.bytes_per_token > 0:
            raise UserError(f"budget-bytes {self.bytes_per_token:g}: must be above 0")
        if self.context is not None and self.context < 1:
            raise UserError(f"context {self.context}: must be 1 or more")

    @property
    def given(self) -> list[str]:
        """Names of the options given."""
        named = {
            "--bits": self.bits,
            "--ratio": self.ratio,
            "--budget-bytes": self.bytes_per_token,
            "--fit": self.fit,
        }
        return [name for name, value in named.items() if value is not None]

    def tokens(self, recipe: Recipe) -> int:
        """The context in tokens."""
        if self.fit is not None:
            return self.fit[0]
        if self.context is not None:
            return self.context
        return recipe.data.length if recipe.budget.fit is None else recipe.budget.fit_tokens


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantisation made.

    Attributes:
        run_dir: where it lies.
        scheme: plain form.
        context: tokens that bytes are counted at.
        limit: bytes that the whole cache may take there, None with the paper's scheme.
        predicted_bytes, measured_bytes: of the whole cache there, the second from its tensors.
        dense_bytes: of the dense 16-bit cache there.
        ratio: whole-cache ratio, dense over measured.
        bits: mean bits of a latent of the run, dropped ones counted, codes alone.
        layers: of every layer ``{"keys": mean bits, "values": mean bits, "key_channels": left,
            "value_channels": left}``, None where dense.
        kl: mean KL to the unquantised run over ``kl_tokens`` tokens of held-out text, token by
            token through both caches, in nats; kl_limit: what it may be.
        recovery: KL before each recovery step, empty without.
        seconds: all in all.
    """

    run_dir: str
    scheme: dict[str, Any]
    context: int
    limit: int | None
    predicted_bytes: int
    measured_bytes: int
    dense_bytes: int
    ratio: float
    bits: float
    layers: list[dict[str, float] | None]
    kl: float
    kl_tokens: int
    kl_limit: float
    recovery: list[float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """For a table of two columns."""
        per_token = self.context
        rows = [
            ("scheme", str(self.scheme["name"])),
            ("context", f"{self.context} tokens"),
            ("bytes per token, predicted", f"{self.predicted_bytes / per_token:.1f}"),
            ("bytes per token, measured", f"{self.measured_bytes / per_token:.1f}"),
            ("bytes per token, dense", f"{self.dense_bytes / per_token:.1f}"),
            ("cache ratio", f"{self.ratio:.3f}"),
            ("mean bits of a latent", f"{self.bits:.2f}"),
            (
                f"KL to 16-bit latents, {self.kl_tokens} tokens",
                f"{self.kl:.4f} nats per token (limit {self.kl_limit:g})",
            ),
        ]
        if self.recovery:
            rows.append(
                ("recovery", f"{len(self.recovery)} steps, KL to the base model "
                 f"{self.recovery[0]:.4f} to {self.recovery[-1]:.4f}")
            )  # fmt: skip
        return [*rows, ("time", f"{self.seconds:.1f} s")]

    def layer_rows(self) -> list[tuple[str, ...]]:
        """Layer, mean bits of keys and values, channels left."""
        return [
            (str(i), "dense", "", "", "")
            if layer is None
            else (
                str(i),
                f"{layer['keys']:.2f}",
                f"{layer['key_channels']:.0f}",
                f"{layer['values']:.2f}",
                f"{layer['value_channels']:.0f}",
            )
            for i, layer in enumerate(self.layers)
        ]


def quantize_run(
    run_dir: str | Path,
    scheme: Scheme,
    budget: BitBudget,
    *,
    out: str | Path | None = None,
    replace_existing: bool = False,
    force: bool = False,
    recover_steps: int = 0,
    device: str | None = None,
    model: str | None = None,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantise the latents of a run.

    Args:
        run_dir: a finished run.
        scheme: how.
        budget: how small; the paper's scheme takes none.
        out: new folder for a quantised copy; None writes beside the factors.
        replace_existing: replace a quantisation that the run has.
        force: write even what the KL says is broken.
        recover_steps: steps of quantisation-aware distillation.
        device: where to compute; None is the recipe's device_map, or a GPU where there is one.
        model: where the base model lies now, if it has moved.
        progress: where progress is shown.

    Raises:
        UserError: anything wrong with run, scheme, budget or folder; nothing is written.
        RunFailure: the KL is above :data:`KL_LIMIT` and ``force`` is not given; nothing is written.
    """
    began = time.monotonic()
    run_dir = Path(run_dir)
    if scheme.name == "paper" and budget.given:
        raise UserError(
            f"scheme paper has fixed bits and takes no {budget.given[0]}; calibrate to another "
            "ratio, or use scheme star"
        )
    if recover_steps < 0:
        raise UserError(f"recover-steps {recover_steps}: must be 0 or more")
    if out is not None and Path(out).exists():
        raise UserError(f"{out} already exists; give another --out")
    if not is_run(run_dir):
        raise UserError(f"{run_dir}: not a run folder; `starkv calibrate` makes one")
    with ExitStack() as held:
        if out is None:
            held.enter_context(locked(run_dir))
        manifest = read_manifest(run_dir)
        if not replace_existing:
            refuse_quantised(run_dir, manifest)
        recipe = load_recipe(run_dir / RECIPE)
        subject = open_subject(
            str(run_dir), device=device, model=model, backend="reference", quantised=False
        )
        check_window(scheme, subject.spec)
        tokens = budget.tokens(recipe)
        if tokens > subject.max_positions:
            raise UserError(
                f"context {tokens}: longer than the model's, which is {subject.max_positions} "
                "tokens; give a shorter one"
            )
        limit = None
        if scheme.name != "paper":
            limit = byte_limit(budget, tokens, subject, scheme)
            check_floor(subject, scheme, limit, tokens)
        rows = calibration_tokens(recipe, subject.tokenizer, recover_steps)
        check, pool = rows[:_CHECK_ROWS, :_CHECK_TOKENS], rows[CHECK_SEQUENCES:]
        layers = quantise(subject, scheme, limit, tokens, pool, progress)
        recovery: list[float] = []
        if recover_steps:
            layers, recovery = recover(subject, layers, recipe, pool, recover_steps, progress)
        ranks = quantised_ranks(layers, subject.spec.n_layers)
        # As it will be deployed, kernels included: the gate must see what users will.
        coded = deployed_subject(subject.base, ranks, layers, run_dir, subject.store_dtype)
        kl = decoded_kl(coded, subject, check, progress)
        if not kl <= KL_LIMIT and not force:
            raise RunFailure(
                f"{run_dir}: quantised, the model is broken: its next-token distribution is "
                f"{kl:.3g} nats from that of the 16-bit run (limit {KL_LIMIT:g}); nothing was "
                "written; raise the budget, add --recover-steps, or write it anyway with --force"
            )
        result = _result(
            str(out or run_dir), coded, subject, scheme, layers, tokens, limit, kl, check.numel(),
            recovery, time.monotonic() - began,
        )  # fmt: skip
        _write(run_dir, out, manifest, scheme, layers, result)
    return result


def check_window(scheme: Scheme, spec: ModelSpec) -> None:
    """Refuse 16-bit tokens that leave nothing to quantise."""
    for name, count in (("window", scheme.window), ("sinks", scheme.sinks)):
        if count >= spec.max_positions:
            raise UserError(
                f"{name} {count}: not shorter than the model's context of {spec.max_positions} "
                f"tokens, so nothing would be quantised; lower --{name}"
            )


def byte_limit(budget: BitBudget, tokens: int, subject: Subject, scheme: Scheme) -> int:
    """Most bytes that the whole cache may take for a row of ``tokens`` tokens."""
    dense = dense_bytes(subject.spec, tokens)
    if budget.ratio is not None:
        return int(dense / budget.ratio)
    if budget.bytes_per_token is not None:
        return int(budget.bytes_per_token * tokens)
    if budget.fit is not None:
        return budget.fit[1]
    bits = DEFAULT_BITS if budget.bits is None else budget.bits
    assert subject.ranks is not None
    latents = sum(layer.total for layer in subject.ranks.layers if layer is not None)
    exact = sum(layer.stored for layer in subject.ranks.layers if layer is not None)
    kept = 2 * exact * (scheme.sinks + scheme.window)
    return int(bits * latents * tiles(tokens) * TILE / 8) + kept + _dense_part(subject, tokens)


def dense_bytes(spec: ModelSpec, tokens: int) -> int:
    """Bytes of a dense 16-bit cache of a row of ``tokens`` tokens, nothing allocated ahead."""
    windows = spec.windows
    held = sum(
        min(tokens, windows[i] - 1) if i in windows else tokens for i in range(spec.n_layers)
    )
    return held * 2 * spec.kv_width * 2


def check_floor(subject: Subject, scheme: Scheme, limit: int, tokens: int) -> None:
    """Refuse a limit that no allocation can meet.

    Raises:
        UserError: naming the floor.
    """
    assert subject.ranks is not None
    width, kept = min(scheme.widths), 2 * (scheme.sinks + scheme.window)
    least = _fixed_bytes(subject, scheme, tokens)
    for layer in subject.ranks.layers:
        if layer is not None:
            keys, values = (min(BLOCK, sum(ranks)) for ranks in (layer.keys, layer.values))
            # Keys need a block, and one channel in every head.
            blocks = -(-max(keys, len(layer.keys)) // BLOCK)
            keys = min(blocks * BLOCK, sum(layer.keys))
            least += (blocks * BLOCK + values) * width * tiles(tokens) * TILE // 8
            least += (row_width(keys) + row_width(values)) * kept
    if limit < least:
        dense = dense_bytes(subject.spec, tokens)
        raise UserError(
            f"budget: {limit / tokens:.1f} bytes per token at {tokens} tokens are below the floor "
            f"of {least / tokens:.1f} (ratio {dense / least:.2f}): every layer keeps {BLOCK} "
            f"channels of keys and of values in {width} bits, and {scheme.sinks} sinks and a "
            f"window of {scheme.window} tokens in 16; raise the budget"
            + (", or lower --window" if scheme.window else "")
        )


def _fixed_bytes(subject: Subject, scheme: Scheme, tokens: int) -> int:
    """Bytes that no allocation changes: dense layers, and scales of tokens."""
    scales = 0 if scheme.scales == "static" else 2 * 2 * tiles(tokens) * TILE
    return scales * len(subject.weights) + _dense_part(subject, tokens)


def _dense_part(subject: Subject, tokens: int) -> int:
    """Bytes of the layers that stay dense."""
    spec = subject.spec
    everything = predict_bytes(spec, RankMap((None,) * spec.n_layers), tokens)
    return everything - len(subject.weights) * 2 * spec.kv_width * slots(tokens) * 2


@torch.no_grad()
def quantise(
    subject: Subject,
    scheme: Scheme,
    limit: int | None,
    tokens: int,
    pool: torch.Tensor,
    progress: Progress = SILENT,
) -> dict[int, QuantLayer]:
    """Quantised layers of a compressed model.

    Args:
        subject: with latents in 16 bits.
        limit: bytes the whole cache may take at ``tokens`` tokens; None for the paper's scheme.
        pool: int64 ``[N, L]``, text to measure on.
    """
    count = max(1, min(len(pool), -(-_MEASURE_TOKENS // pool.shape[1])))
    skip = min(scheme.sinks, pool.shape[1] - 1)
    stats = measure_latents(subject, pool[:count], skip=skip, progress=progress)
    if scheme.name == "paper":
        bits = {}
        sides = {}
        for i in subject.weights:
            turned = [hadamard_blocks(side) for side in _raw_sides(subject, i, stats[i])]
            sides[i] = (turned[0][0], turned[1][0])
            bits[i] = [torch.tensor(PAPER_WIDTHS)[part] for _, part in turned]
    else:
        assert limit is not None
        sides = {}
        with progress.task("principal axes", len(stats), "layers") as task:
            for i in subject.weights:
                sides[i] = principal_sides(subject, i, stats[i])
                task.advance()
        probes = pool[-min(_PROBES, len(pool)) :]
        worth = sensitivities(subject, sides, scheme, probes, progress)
        bits = allocated(subject, sides, worth, scheme, limit, tokens)
    return {
        i: QuantLayer(
            code_side(sides[i][0], "key", bits[i][0], scheme, subject.base.dtype, subject.device),
            code_side(sides[i][1], "value", bits[i][1], scheme, subject.base.dtype, subject.device),
            subject.spec.n_kv_heads,
            subject.weights[i].key_eps,
            scheme,
        )
        for i in subject.weights
    }


def _raw_sides(subject: Subject, index: int, stats: LatentStatistics) -> tuple[Side, Side]:
    assert subject.ranks is not None
    ranks = subject.ranks.layers[index]
    assert ranks is not None
    return sides_of(subject.weights[index], len(ranks.keys), stats)


def principal_sides(subject: Subject, index: int, stats: LatentStatistics) -> tuple[Side, Side]:
    """Keys and values of a layer on their principal axes, channels in the order of their worth.

    The best channel of every key head comes first of all: no head may lose its last.
    """
    attention: Any = subject.base.family.attentions(subject.model)[index]
    keys, values = _raw_sides(subject, index, stats)
    centre = subject.weights[index].key_eps is None
    keys = principal(keys, stats.key_mean, stats.key_moment, key_metrics(stats), centre=centre)
    metrics = value_metrics(attention.o_proj.weight, subject.spec)
    values = principal(values, stats.value_mean, stats.value_moment, metrics, centre=True)
    order = keys.worth.argsort(descending=True, stable=True)
    owners = keys.owner[order]
    first = torch.stack([(owners == g).nonzero()[0, 0] for g in range(int(owners.max()) + 1)])
    rest = torch.ones(len(order), dtype=torch.bool)
    rest[first] = False
    return keys.picked(torch.cat((order[first], order[rest]))), values


def allocated(
    subject: Subject,
    sides: Mapping[int, tuple[Side, Side]],
    worth: Mapping[int, tuple[float, float]],
    scheme: Scheme,
    limit: int,
    tokens: int,
) -> dict[int, list[torch.Tensor]]:
    """Bits of every channel, int64 ``[R]`` for keys and values of each layer, under ``limit``."""
    room, kept = tiles(tokens) * TILE, 2 * (scheme.sinks + scheme.window)
    groups: list[Sequence[Option]] = []
    places: list[tuple[int, int, int]] = []
    for i, pair in sides.items():
        for number, (side, weight) in enumerate(zip(pair, worth[i], strict=True)):
            costs = {
                b: c * weight for b, c in coding_costs(side, scheme.widths, subject.device).items()
            }
            if number == 0:
                owners = int(side.owner.max()) + 1
                groups.append(key_options(costs, scheme.widths, room, kept, owners))
                places.append((i, 0, 0))
            else:
                for n, options in enumerate(value_options(costs, scheme.widths, room, kept)):
                    groups.append(options)
                    places.append((i, 1, n * BLOCK))
    fixed = _fixed_bytes(subject, scheme, tokens)
    bits = {i: [torch.zeros(s.channels, dtype=torch.long) for s in sides[i]] for i in sides}
    for (i, number, start), option in zip(places, allocate(groups, limit - fixed), strict=True):
        for n, width in enumerate(option.bits):
            at = start + n * BLOCK
            bits[i][number][at : at + BLOCK] = width
    return bits


@torch.no_grad()
def decoded_kl(
    coded: Subject, exact: Subject, rows: torch.Tensor, progress: Progress = SILENT
) -> float:
    """Mean KL of ``coded`` to ``exact`` in nats, rows ``[B, L]`` read token by token by both.

    Raises:
        RunFailure: the cache does not hold the bytes that were predicted for it.
    """
    head = exact.model.get_output_embeddings().weight
    rows = rows.to(exact.device)
    read = []
    for subject, name in ((exact, "16 bits"), (coded, "codes")):
        cache = subject.new_cache()
        states = []
        with (
            subject.active() as model,
            progress.task(f"held-out text, {name}", rows.shape[1], "steps") as task,
        ):
            for step in range(rows.shape[1]):
                token = rows[:, step : step + 1]
                states.append(model.model(token, past_key_values=cache, use_cache=True)[0])
                task.advance()
        read.append(torch.cat(states, 1))
    held, expected = cache.nbytes, _predicted(coded, rows.shape[1]) * len(rows)
    if held != expected:
        raise RunFailure(f"the quantised cache holds {held} bytes, {expected} were predicted")
    return float(distillation_loss(read[1], read[0], head))


def _predicted(coded: Subject, tokens: int) -> int:
    assert coded.ranks is not None
    return predict_bytes(coded.spec, coded.ranks, tokens, codes=coded.codes)


def _measured(coded: Subject, tokens: int) -> int:
    """Bytes of a cache with room for ``tokens`` tokens; its tensors are made, but not filled."""
    cache = coded.new_cache()
    cache.reserve(1, tokens, torch.device("meta"))
    # A sliding window cannot be reserved: transformers' own layer, which holds what it must.
    sliding = sum(min(tokens, window - 1) for window in coded.spec.windows.values())
    return cache.nbytes + sliding * 2 * coded.spec.kv_width * 2


def _result(
    run_dir: str,
    coded: Subject,
    subject: Subject,
    scheme: Scheme,
    layers: Mapping[int, QuantLayer],
    tokens: int,
    limit: int | None,
    kl: float,
    kl_tokens: int,
    recovery: list[float],
    seconds: float,
) -> QuantizeResult:
    assert subject.ranks is not None
    shown: list[dict[str, float] | None] = []
    total, numbers = 0.0, 0
    for i, before in enumerate(subject.ranks.layers):
        if before is None:
            shown.append(None)
            continue
        line: dict[str, float] = {}
        for name, count in (("keys", sum(before.keys)), ("values", sum(before.values))):
            layout = getattr(layers[i], name).codec.layout
            spent = float(layout.bits().sum())
            line |= {name: spent / count, f"{name[:-1]}_channels": float(layout.channels)}
            total, numbers = total + spent, numbers + count
        shown.append(line)
    measured, dense = _measured(coded, tokens), dense_bytes(subject.spec, tokens)
    return QuantizeResult(
        run_dir=run_dir,
        scheme=scheme.to_dict(),
        context=tokens,
        limit=limit,
        predicted_bytes=_predicted(coded, tokens),
        measured_bytes=measured,
        dense_bytes=dense,
        ratio=dense / measured,
        bits=total / numbers,
        layers=shown,
        kl=kl,
        kl_tokens=kl_tokens,
        kl_limit=KL_LIMIT,
        recovery=recovery,
        seconds=seconds,
    )


def _write(
    run_dir: Path,
    out: str | Path | None,
    manifest: Mapping[str, Any],
    scheme: Scheme,
    layers: Mapping[int, QuantLayer],
    result: QuantizeResult,
) -> None:
    """Write the quantisation beside the factors, or with a copy of them into a new run."""
    predicted = {
        "context": result.context,
        "bytes": result.predicted_bytes,
        "bytes_per_token": result.predicted_bytes / result.context,
        "ratio": result.ratio,
    }
    document = to_dict(scheme, layers, len(result.layers), predicted)
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": versions(),
        "factors": manifest["files"][FACTORS],
        "result": result.to_dict(),
    }
    if out is None:
        write_quantisation(run_dir, manifest, layers, document, record)
        return
    with new_run_dir(out) as folder:
        for name in (RECIPE, RANKS, FACTORS):
            shutil.copyfile(run_dir / name, folder / name)
        listed = manifest["files"]
        kept = {name: listed[name] for name in (RECIPE, FACTORS) if name in listed}
        copied = write_manifest(folder, {**manifest, "files": kept})
        write_quantisation(folder, copied, layers, document, record)
