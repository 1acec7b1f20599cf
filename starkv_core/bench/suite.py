"""``starkv bench``: plan every case, measure what fits, and keep a record of each backend."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import torch

from starkv_core.bench import attention, decode, prefill
from starkv_core.bench.codes import bits_fault
from starkv_core.bench.models import coded_subject, compressed_subject, dense_subject
from starkv_core.bench.outcome import Measured
from starkv_core.bench.plan import Need, gib, largest_batch, room_on
from starkv_core.bench.records import CODED, KEYS, OURS, Record
from starkv_core.bench.shapes import (
    Shape,
    open_shape,
    scaled_down,
    small_batches,
    small_contexts,
)
from starkv_core.bench.timing import bandwidth, release
from starkv_core.budget import paper_rate
from starkv_core.errors import UserError
from starkv_core.models.load import pick_device
from starkv_core.progress import SILENT, Progress
from starkv_core.provenance import git_commit, versions
from starkv_core.quant.run import dense_bytes
from starkv_core.run import Subject
from triton_ops.backends import choose_backend

SUITES: Final = ("attention", "decode", "prefill")
_DTYPES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_CASES: Final = {
    "attention": ((4 << 10, 8 << 10, 32 << 10, 64 << 10), (16,)),
    "decode": ((8 << 10,), (16,)),
    "prefill": ((4 << 10, 32 << 10), (1,)),
}
"""Contexts and batches of a suite where none are given."""
_BACKENDS: Final = {
    "attention": attention.BACKENDS,
    "decode": decode.BACKENDS,
    "prefill": prefill.BACKENDS,
}


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        suite: of :data:`SUITES`, or ``all``.
        shape: a named shape or a run folder.
        contexts, batches: None for those of the suite.
        memory: bytes; ``decode`` then compares each side at the largest batch that fits into them,
            beside the batches if those are given.
        dtype: ``float16``, ``bfloat16``, or None: float16, but bfloat16 for a run, whose weights
            may not fit float16.
        backend: of latent attention: ``reference``, ``triton``, or None for the best there is.
        bits: of codes: 2 to 4, fractions too, or 8; None measures 16-bit latents alone, of a
            quantised run its own codes too.
        model: where the base model of a run lies now, if it has moved.
        device: as in :func:`starkv_core.models.load.pick_device`.
        scale_down: shrink everything so far that a CPU can run it.
    """

    suite: str = "attention"
    shape: str = "llama-2-7b"
    contexts: tuple[int, ...] | None = None
    batches: tuple[int, ...] | None = None
    memory: int | None = None
    dtype: str | None = None
    backend: str | None = None
    bits: float | None = None
    model: str | None = None
    device: str | None = None
    scale_down: bool = False

    def __post_init__(self) -> None:
        faults = []
        if self.suite not in (*SUITES, "all"):
            faults.append(f"suite {self.suite!r}: use {', '.join(SUITES)} or all")
        if self.dtype not in (None, *_DTYPES):
            faults.append(f"dtype {self.dtype!r}: use {' or '.join(_DTYPES)}")
        for name, given in (("ctx", self.contexts), ("batch", self.batches)):
            if given is not None and (not given or min(given) < 1):
                faults.append(f"{name}: whole numbers from 1 are expected")
        if self.bits is not None and (found := bits_fault(self.bits)) is not None:
            faults.append(found)
        if self.memory is not None and self.suite not in ("decode", "all"):
            faults.append("memory: only the suite decode compares at equal memory")
        if self.memory is not None and self.scale_down:
            faults.append("memory: scaled-down runs have sizes of their own; leave one of both out")
        if faults:
            raise UserError.many("bench", faults)

    @property
    def suites(self) -> tuple[str, ...]:
        """Suites to run."""
        return SUITES if self.suite == "all" else (self.suite,)


@dataclass(frozen=True)
class Case:
    """One backend at one size; ``batch`` is None where the memory allows not even one row."""

    suite: str
    backend: str
    ctx: int
    batch: int | None
    memory: int | None
    need: Need


def run_bench(options: BenchOptions, progress: Progress = SILENT) -> list[Record]:
    """Measure and return the records, those that did not fit or failed included.

    Raises:
        UserError: no GPU and no ``scale_down``, an unknown shape, nothing that fits.
    """
    device = _device(options.device)
    shape = open_shape(options.shape, options.model)
    if options.scale_down:
        shape, options = scaled_down(shape), _small(options)
    if options.bits is not None:
        shape = shape.in_bits(options.bits)
    cases = list(_cases(options, shape))
    if device.type != "cuda" and not options.scale_down:
        raise UserError(_no_gpu(cases))
    try:
        op_backend = choose_backend(options.backend, device)
    except ValueError as error:
        raise UserError(str(error)) from None
    release(device)
    room = room_on(device)
    if all(case.need.fault(room) for case in cases):
        raise UserError(f"nothing fits: {cases[0].need.fault(room)}; lower --ctx or --batch")
    return _Bench(options, shape, device, op_backend, room, progress).run(cases)


def _device(name: str | None) -> torch.device:
    """As :func:`pick_device`; of no use here is its advice to take the CPU."""
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"device {name!r}: no GPU that torch can use; bench measures NVIDIA GPUs; --scale-down "
            "--device cpu shows that it works"
        )
    return pick_device(name)


def _small(options: BenchOptions) -> BenchOptions:
    contexts = options.contexts or (8 << 10, 32 << 10)
    return replace(
        options,
        contexts=small_contexts(contexts),
        batches=small_batches(options.batches or (2,)),
    )


def _cases(options: BenchOptions, shape: Shape) -> Iterator[Case]:
    """Every case, sides of a suite one after the other: so each is built and freed once."""
    for suite in options.suites:
        usual_contexts, usual_batches = _CASES[suite]
        contexts, batches = options.contexts or usual_contexts, options.batches or usual_batches
        memory = options.memory if suite == "decode" else None
        for backend in _BACKENDS[suite] + ((CODED,) if shape.coded is not None else ()):
            for ctx in contexts:
                need_of = _need_of(suite, shape, backend, ctx)
                if memory is None or options.batches is not None:
                    for batch in batches:
                        yield Case(suite, backend, ctx, batch, None, need_of(batch))
                if memory is not None:
                    largest = largest_batch(need_of, memory)
                    yield Case(suite, backend, ctx, largest, memory, need_of(largest or 1))


def _need_of(suite: str, shape: Shape, backend: str, ctx: int) -> Callable[[int], Need]:
    module: Any = {"attention": attention, "decode": decode, "prefill": prefill}[suite]
    return lambda batch: module.need(shape, backend, ctx, batch)


def _no_gpu(cases: list[Case]) -> str:
    least, most = (f(case.need.total for case in cases) for f in (min, max))
    return (
        "no GPU that torch can use: bench measures NVIDIA GPUs, and these cases would take "
        f"{gib(least)} to {gib(most)} of its memory; --scale-down runs them small enough for a "
        "CPU, to see that they work (times on a CPU mean nothing)"
    )


def _place(record: Record) -> tuple[int, int, int, int]:
    """Order of records: the backends of a case side by side, as they were measured."""
    memory = record["memory"] or 0
    return SUITES.index(record["suite"]), memory, 0 if memory else record["batch"], record["ctx"]


class _Bench:
    """One run: what its records share, and the models that its cases share."""

    def __init__(
        self,
        options: BenchOptions,
        shape: Shape,
        device: torch.device,
        op_backend: str,
        room: int,
        progress: Progress,
    ) -> None:
        self.shape, self.device, self.room = shape, device, room
        self.op_backend, self.progress = op_backend, progress
        dtype = options.dtype or ("float16" if shape.config is not None else "bfloat16")
        self.dtype = _DTYPES[dtype]
        self.dense: Subject | None = None
        self.ours: tuple[tuple[str, float | None], Subject] | None = None
        self.passed: set[str] = set()  # backends, the gate of prefill
        now = datetime.now(UTC)
        found = versions()
        self.bandwidth = bandwidth(device)
        release(device)
        self.common = {
            "run": f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}",
            "shape": shape.name,
            "rank_map": shape.ranks.digest,
            "dtype": dtype,
            "bandwidth": self.bandwidth,
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none (CPU)",
            "torch": torch.__version__,
            "triton": found["triton"],
            "transformers": found["transformers"],
            "starkv": found["starkv"],
            "commit": git_commit(),
            "date": now.isoformat(timespec="seconds"),
        }

    def run(self, cases: list[Case]) -> list[Record]:
        """Measure all cases; a case that fails leaves its reason."""
        records = []
        with self.progress.task(f"bench {self.shape.name}", len(cases), "backends") as task:
            for case in cases:
                measured = self._measured(case)
                record = self._record(case, measured)
                records.append(record)
                took = "no time" if record["ms_p50"] is None else f"{record['ms_p50']:.4g} ms"
                where = f"{case.suite} {case.ctx} x {case.batch}"
                task.advance(1, **{f"{where} {case.backend}": took})
        return sorted(records, key=_place)

    def _measured(self, case: Case) -> Measured:
        room = self.room if case.memory is None else min(self.room, case.memory)
        if (found := case.need.fault(room)) is not None:
            return Measured(None, fault=found)
        try:
            measured = self._measure(case)
        except UserError:
            raise
        except torch.OutOfMemoryError:
            measured = Measured(None, fault=f"ran out of memory ({gib(case.need.total)} planned)")
        except Exception as error:  # one case must not cost the others their times
            text = " ".join(str(error).split())[:200]
            measured = Measured(None, fault=f"failed: {type(error).__name__}: {text}")
        release(self.device)
        return measured

    def _measure(self, case: Case) -> Measured:
        batch = case.batch or 1
        if case.suite == "attention":
            return attention.run_case(
                self.shape, case.ctx, batch, self.dtype, self.device, case.backend, self.op_backend
            )
        subject = self._subject(case)
        if case.suite == "decode":
            return decode.run_case(subject, case.backend, case.ctx, batch)
        # Its gate has a length of its own: once is enough.
        checked = case.backend in self.passed
        done = prefill.run_case(subject, case.ctx, batch, checked=checked)
        if done.timing is not None:
            self.passed.add(case.backend)
        return done

    def _subject(self, case: Case) -> Subject:
        """The side of a case; weights are made once.

        Factors are there only while they are used, so that the dense side has the memory to itself.
        """
        if self.dense is None:
            self.dense = dense_subject(self.shape, self.dtype, self.device)
        if case.backend not in (OURS, CODED):
            self.ours = None
            return self.dense
        # Random codes of values are to be as large as the rest of a cache of decode.
        scale = case.ctx**0.5 if (case.backend, case.suite) == (CODED, "decode") else None
        key = case.backend, scale
        if self.ours is None or self.ours[0] != key:
            self.ours = None
            made = (
                compressed_subject(self.shape, self.dense, self.op_backend)
                if case.backend == OURS
                else coded_subject(self.shape, self.dense, self.op_backend, scale)
            )
            self.ours = key, made
        return self.ours[1]

    def _record(self, case: Case, measured: Measured) -> Record:
        timing, batch, shape = measured.timing, case.batch or 1, self.shape
        read: int | None = None
        if case.suite == "attention":
            read = attention.read_bytes(shape, case.backend, case.ctx, batch)
            held = attention.cache_bytes(shape, case.backend, case.ctx, batch)
        elif case.suite == "decode":
            if timing is not None:
                read = decode.read_bytes(shape, self._subject(case), case.ctx, batch)
            held = decode.cache_bytes(shape, case.backend, case.ctx, batch)
        else:
            held = prefill.cache_bytes(shape, case.backend, case.ctx, batch)
        bits: float = 16
        removed = 0.0
        if case.backend in (OURS, attention.REBUILD):
            removed = shape.removed
        elif case.backend == CODED:
            bits = round(shape.codes.bits, 4)
            removed = paper_rate(shape.spec, shape.codes.ranks)
        note, ratio = self._note(case, measured, held), None
        if measured.cache is not None:
            held = measured.cache
            ratio = batch * dense_bytes(shape.spec, case.ctx) / held
        rate = batch * 1e3 / timing.p50 if timing is not None and case.suite == "decode" else None
        own = {
            "suite": case.suite,
            "ctx": case.ctx,
            "batch": case.batch,
            "memory": case.memory,
            "backend": case.backend,
            "bits": bits,
            "removed": removed,
            "ms_p20": timing and timing.p20,
            "ms_p50": timing and timing.p50,
            "ms_p80": timing and timing.p80,
            "runs": timing and timing.runs,
            "bytes": read,
            "floor_ms": None if read is None else read / self.bandwidth * 1e3,
            "cache_bytes": held,
            "planned_bytes": case.need.total,
            "peak_bytes": measured.peak,
            "tokens_per_s": rate,
            "cache_ratio": ratio,
            "cache_parts": measured.parts,
            "gate_error": measured.error if math.isfinite(measured.error or 0.0) else None,
            "fault": measured.fault,
            "note": note,
        }
        filled = {**self.common, **own}
        return {key: filled[key] for key in KEYS}

    def _note(self, case: Case, measured: Measured, predicted: int) -> str | None:
        notes = [] if measured.note is None else [measured.note]
        if (
            case.backend in (OURS, CODED)
            and case.suite != "prefill"
            and self.op_backend != "triton"
        ):
            notes.append("latent attention by the reference backend")
        if measured.peak is not None and measured.peak > case.need.total:
            notes.append(f"took {gib(measured.peak)}, {gib(case.need.total)} were planned")
        if measured.cache not in (None, predicted):
            notes.append(f"the cache takes {measured.cache} bytes, {predicted} were predicted")
        return "; ".join(notes) or None
