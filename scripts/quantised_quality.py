"""Quality of quantised caches of the embedded model: one JSON object a line for docs/results.

A row is `dense`, a baseline on the dense cache (`kivi-2`, `rtn-4`, ...) or a quantised run. Runs
read windows in one pass with prompts coded as decode reads them; baselines token by token.
Retrieval prompts attend to exact values and answers decode from codes, in all rows.

    python scripts/quantised_quality.py kivi-2 kivi-4 --windows 4
    python scripts/quantised_quality.py runs/q-8 runs/q-16 --windows 16
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from typing import Any, Literal

import torch

from starkv_core.artifacts import read_manifest
from starkv_core.budget import mean_bits, paper_rate
from starkv_core.eval.deployed import CacheBytes, measure
from starkv_core.eval.perplexity import Mode, Windows, cut_windows, perplexity
from starkv_core.eval.report import EvalOptions
from starkv_core.eval.retrieval import TASKS, make_grid, retrieval
from starkv_core.eval.text import read_eval_text
from starkv_core.provenance import git_commit, hardware, versions
from starkv_core.quant.dense import SCHEMES, coded_dense
from starkv_core.recipe import load_recipe
from starkv_core.run import RECIPE, Subject, open_subject

CONTEXT = 2048


def with_prefill(subject: Subject, prefill: Literal["exact", "coded"]) -> Subject:
    """The same with prompts that attend to exact latents or to what decode will see."""
    weights = {
        i: w if w.codes is None else replace(w, codes=replace(w.codes, prefill=prefill))
        for i, w in subject.weights.items()
    }
    return replace(subject, weights=weights)


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
    return {
        "scheme": made["scheme"],
        "base": {
            "method": recipe.method,
            "ratio": recipe.budget.ratio,
            "steps": recipe.steps,
            "recovery_steps": len(made["recovery"]),
        },
        "bits": {"keys": keys, "values": values},
        "paper_rate": paper_rate(subject.spec, subject.ranks, subject.codes),
    }


def method_of(subject: Subject, name: str) -> str:
    """Curve of the figure: scheme and factors of a run, or the baseline."""
    if not subject.codes:
        return name.split("-")[0]
    made = described(subject)
    base, recovered = made["base"], made["base"]["recovery_steps"]
    factors = f"{base['method']} factors, {base['steps']} steps"
    return f"{made['scheme']['name']} on {factors}" + (f" + {recovered}" if recovered else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--windows", type=int, default=4)
    given = parser.parse_args()
    dense, options = open_subject(None, device="cpu"), EvalOptions()
    text = read_eval_text(dense.tokenizer)
    windows = cut_windows(dense.tokenizer, text, CONTEXT, given.windows)
    special = set(dense.tokenizer.all_special_ids)
    filler = [token for token in text.ids if token not in special]
    grids = [
        make_grid(
            task, dense.tokenizer, filler, options.lengths, options.depths, options.prompts, 0
        )
        for task in TASKS
    ]
    exact = perplexity(dense, windows).ppl
    for name in given.rows:
        mode: Mode = "token" if name in SCHEMES else "prefill"
        if name == "dense":
            subject = read = dense
        elif name in SCHEMES:
            subject = read = coded_dense(dense, name)
        else:
            subject = with_prefill(open_subject(name, device="cpu"), "exact")
            read = with_prefill(subject, "coded")
        found = perplexity(read, windows, mode=mode, batch=4 if mode == "token" else 1)
        cache = held(subject, windows)
        record = {
            "name": name,
            "method": method_of(subject, name),
            "ratio": cache.ratio,
            "bytes_per_token": cache.per_token,
            "context": cache.tokens,
            "perplexity": found.ppl,
            "dense_perplexity": exact,
            "increase": found.ppl / exact - 1,
            "retrieval": {g.task: retrieval(subject, g, batch=4).accuracy for g in grids},
            "retrieval_prompts": options.prompts * len(options.lengths) * len(options.depths),
            "windows": found.windows,
            "window": found.window,
            "tokens": found.tokens,
            "read": "token by token" if mode == "token" else "one pass, coded as decode reads",
            **(described(subject) if subject.codes else {}),
            "text": {"source": text.source, "sha256": text.sha256},
            "command": shlex.join(["python", *sys.argv]),
            "commit": git_commit(),
            "versions": versions(),
            "hardware": {k: hardware()[k] for k in ("cores", "gpus")},
        }
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
