"""Quality of caches: one JSON object a row, for docs/results.

A row is `dense`, a baseline on the dense cache (`kivi-2`, `rtn-4`, ...) or a run, in codes or not.
By default perplexity is read token by token, through the cache that decode fills; `--read prefill`
reads runs in one pass with prompts coded as decode reads them (baselines token by token all the
same). Retrieval prompts attend to exact values and answers decode from codes, in all rows. On a GPU
runs decode by the kernels.

    python scripts/quality_rows.py dense kivi-2 runs/q-8 --windows 16 --batch 16
    python scripts/quality_rows.py runs/q-4 --model MODEL --text wiki.test.raw --device cuda
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from starkv_core.artifacts import read_manifest
from starkv_core.budget import mean_bits, paper_rate
from starkv_core.eval.deployed import CacheBytes, measure
from starkv_core.eval.perplexity import Mode, Windows, cut_windows, perplexity
from starkv_core.eval.report import EvalOptions
from starkv_core.eval.retrieval import RetrievalGrid, make_grid, retrieval
from starkv_core.eval.retrieval_tasks import TASKS
from starkv_core.eval.text import BUILTIN, EvalText, read_eval_text
from starkv_core.provenance import git_commit, hardware, versions
from starkv_core.quant.dense import SCHEMES, coded_dense
from starkv_core.recipe import load_recipe
from starkv_core.run import RECIPE, Subject, is_run, open_subject

CONTEXT = 2048
READ = {"token": "token by token", "prefill": "one pass, coded as decode reads"}


@dataclass(frozen=True)
class Measurement:
    """What every row is measured on.

    Attributes:
        model: base model, None for the embedded one.
        text: windows of perplexity and filler of retrieval.
        windows: most windows of :data:`CONTEXT` tokens.
        batch: windows at a time.
        lengths, depths, prompts: the retrieval grid and prompts in each of its cells.
        read: how runs are read for perplexity.
        device, backend: where and by what rows are computed; None is the best there is.
    """

    model: str | None = None
    text: str = BUILTIN
    windows: int = 4
    batch: int = 4
    lengths: tuple[int, ...] = EvalOptions.lengths
    depths: tuple[float, ...] = EvalOptions.depths
    prompts: int = EvalOptions.prompts
    read: Mode = "token"
    device: str | None = None
    backend: str | None = None

    @cached_property
    def dense(self) -> Subject:
        """The base model."""
        return open_subject(self.model, device=self.device)

    @cached_property
    def eval_text(self) -> EvalText:
        """The text in tokens."""
        return read_eval_text(self.dense.tokenizer, self.text)

    @cached_property
    def cut(self) -> Windows:
        """Windows of perplexity."""
        return cut_windows(self.dense.tokenizer, self.eval_text, CONTEXT, self.windows)

    @cached_property
    def grids(self) -> list[RetrievalGrid]:
        """Retrieval prompts of every task."""
        special = set(self.dense.tokenizer.all_special_ids)
        filler = [token for token in self.eval_text.ids if token not in special]
        return [
            make_grid(
                task, self.dense.tokenizer, filler, self.lengths, self.depths, self.prompts, 0
            )
            for task in TASKS
        ]

    @cached_property
    def exact(self) -> float:
        """Perplexity of the dense model."""
        return perplexity(self.dense, self.cut).ppl

    def row(self, name: str) -> dict[str, Any]:
        """Measure one row."""
        began = time.monotonic()
        mode: Mode = self.read
        if name == "dense":
            subject = read = self.dense
        elif name in SCHEMES:
            subject = read = coded_dense(self.dense, name)
            mode = "token"
        else:
            opened = open_subject(name, device=self.device, model=self.model, backend=self.backend)
            subject = opened.with_prefill("exact")
            read = subject if mode == "token" else subject.with_prefill("coded")
        found = perplexity(read, self.cut, mode=mode, batch=self.batch if mode == "token" else 1)
        cache = held(subject, self.cut)
        answers = [retrieval(subject, grid, batch=self.prompts) for grid in self.grids]
        return {
            "name": name,
            "method": method_of(subject, name),
            "ratio": cache.ratio,
            "bytes_per_token": cache.per_token,
            "context": cache.tokens,
            "perplexity": found.ppl,
            "dense_perplexity": self.exact,
            "increase": found.ppl / self.exact - 1,
            "retrieval": {answer.task: answer.accuracy for answer in answers},
            "retrieval_by_length": {
                answer.task: {str(n): answer.at_length(n) for n in answer.lengths}
                for answer in answers
            },
            "retrieval_prompts": self.prompts * len(self.lengths) * len(self.depths),
            "windows": found.windows,
            "window": found.window,
            "tokens": found.tokens,
            "read": READ[mode],
            **(described(subject) if subject.codes else {}),
            "text": {"source": self.eval_text.source, "sha256": self.eval_text.sha256},
            "backend": read.backend,
            "dtype": str(subject.base.dtype).removeprefix("torch."),
            "seconds": time.monotonic() - began,
            "command": shlex.join(["python", *sys.argv]),
            "commit": git_commit(),
            "versions": versions(),
            "hardware": {k: hardware()[k] for k in ("cores", "gpus")},
        }


@torch.no_grad()
def held(subject: Subject, windows: Windows) -> CacheBytes:
    """Bytes of a live cache of one window."""
    cache = subject.new_cache()
    with subject.active() as model:
        model.base_model(windows.ids[:1].to(subject.device), past_key_values=cache, use_cache=True)
    return measure(subject, cache, 1)


def described(subject: Subject) -> dict[str, Any]:
    """What a quantised run is."""
    assert subject.run_dir is not None and subject.ranks is not None
    recipe, record = load_recipe(subject.run_dir / RECIPE), read_manifest(subject.run_dir)
    made = record["quantization"]["result"]
    keys, values = mean_bits(subject.codes)
    recovered = made["recovery"]
    return {
        "scheme": made["scheme"],
        "base": {
            "method": recipe.method,
            "ratio": recipe.budget.ratio,
            "steps": recipe.steps,
            "keys": recipe.start.keys,
            "floor": recipe.start.floor,
            "key_group": recipe.start.key_group,
            "recovery_steps": len(recovered),
            "batch": recipe.batch,
            "length": recipe.data.length,
            "recall": recipe.data.recall,
            "lr": recipe.optim.lr,
        },
        "bits": {"keys": keys, "values": values},
        "channels": sum(layer.total for layer in subject.ranks.layers if layer is not None),
        "kl": {"quantised": made["kl"], "recovery": [*recovered[:1], *recovered[-1:]]},
        "paper_rate": paper_rate(subject.spec, subject.ranks, subject.codes),
    }


def method_of(subject: Subject, name: str) -> str:
    """Curve of the figure: scheme and training of a run, or the baseline."""
    if not subject.codes:
        return name.split("-")[0]
    made = described(subject)
    trained = "trained" if made["base"]["recovery_steps"] else "not trained"
    return f"{made['scheme']['name']}, {trained}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--text", default=BUILTIN)
    parser.add_argument("--windows", type=int, default=Measurement.windows)
    parser.add_argument("--batch", type=int, default=Measurement.batch)
    parser.add_argument("--lengths", type=int, nargs="+", default=Measurement.lengths)
    parser.add_argument("--prompts", type=int, default=Measurement.prompts)
    parser.add_argument("--read", choices=READ, default=Measurement.read)
    parser.add_argument("--device")
    parser.add_argument("--backend", choices=("reference", "triton"))
    given = vars(parser.parse_args(arguments))
    rows = given.pop("rows")
    for row in rows:
        if row != "dense" and row not in SCHEMES and not is_run(row):
            names = ", ".join(SCHEMES)
            parser.error(f"{row}: neither dense, a cache ({names}) nor a run folder")
    measurement = Measurement(**{**given, "lengths": tuple(given["lengths"])})
    for name in rows:
        sys.stdout.write(json.dumps(measurement.row(name)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
