"""A subject as a model of lm-evaluation-harness (the extra ``eval``); import it lazily.

Every number goes through the deployed model and a fresh cache of it, which is checked
(:mod:`.deployed`). Tokens are those of lm-eval's own model for transformers, without a token of
beginning unless asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from starkv_core.engine import Sampler, check_ids, end_tokens, stream
from starkv_core.errors import UserError
from starkv_core.eval.batching import Batches
from starkv_core.eval.confidence import standard_error
from starkv_core.eval.deployed import CacheBytes, measure, refuse_not_finite, watched
from starkv_core.eval.likelihood import Path, Request, Score, score
from starkv_core.eval.longbench import without_middle
from starkv_core.eval.records import About, Kept, Metric, Record, packed
from starkv_core.eval.taskset import HarnessTask, quiet
from starkv_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval.api.instance import Instance

    from starkv_core.run import Subject

_BOOTSTRAP = 1000  # draws for the standard errors that have no formula
_NOT_ASKED = -1  # RULER's mark for a length that it has no prompts of
_GENERATION = {"until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks"}


def generation(kwargs: Mapping[str, Any]) -> tuple[Sampler, int, list[str]]:
    """Sampler, most tokens and stop strings that a task's ``generation_kwargs`` ask for.

    Raises:
        UserError: a way to generate that starkv does not have (beams, penalties, ...).
    """
    asked = cast("dict[str, Any]", normalize_gen_kwargs(dict(kwargs)))
    beyond = sorted(set(asked) - _GENERATION)
    if beyond:
        raise UserError(f"generation_kwargs: {', '.join(beyond)}: not supported")
    sampler = Sampler()
    if asked["do_sample"]:
        sampler = Sampler(asked["temperature"], asked.get("top_p", 1.0), asked.get("top_k", 0))
    stops = [stop for stop in asked["until"] if stop]
    return sampler, asked["max_gen_toks"], stops


class SubjectLM(TemplateLM):
    """Answers lm-eval's requests.

    Attributes:
        paths: how the answers were made so far, ``prefill`` or ``decode``.
        cut: requests whose context lost tokens, to fit the model's.
        cache: bytes of the longest cache so far.

    Args:
        subject: model, compressed or dense.
        path: of log-likelihoods.
        batch: requests at a time; None finds out what fits.
        add_bos: whether the tokenizer puts its special tokens around a text.
        middle: whether a prompt too long to generate from loses its middle, not its beginning.
        what: the task, for progress.
        progress: a bar for each kind of request.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        path: Path = "prefill",
        batch: int | None = None,
        add_bos: bool = False,
        middle: bool = False,
        what: str = "requests",
        progress: Progress = SILENT,
    ) -> None:
        super().__init__()
        self.subject, self.path, self.add_bos = subject, path, add_bos
        self._fitted = without_middle if middle else _end_of
        self.tokenizer: Any = subject.tokenizer
        self.what, self.progress = what, progress
        self.paths: set[Path] = set()
        self.cut = 0
        self.cache: CacheBytes | None = None
        self._batches = Batches(batch, subject.device)

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.subject.max_positions

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            UserError: the tokenizer has none.
        """
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.subject.name}: its tokenizer has no end token, which texts are separated "
                "with; name one as eos_token in its tokenizer_config.json"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the token of beginning, or that of end."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text.

        Raises:
            UserError: the tokenizer knows tokens that the model does not.
        """
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = self.add_bos and not string.startswith(begin)
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        check_ids(self.subject, ids)
        return list(ids)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether decoding greedily gives it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self._scores([(context, targets) for _, context, targets in requests])
        return [(one.log_likelihood, one.greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood (nats) of whole texts, in windows of the model's context."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                pairs.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, one in zip(owners, self._scores(pairs), strict=True):
            totals[owner] += one.log_likelihood
        return totals

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        cut = [self._fit(context, targets) for context, targets in pairs]
        name = f"{self.what}, {self.path}, {self.subject.name}"
        with self.progress.task(name, len(cut), "req") as task:

            def work(part: list[Request]) -> list[Score]:
                scores, held = score(self.subject, part, self.path)
                self._note(self.path, held)
                task.advance(len(part))
                return scores

            def alike(request: Request) -> int:
                # Padding on the left would change which tokens of a row are coded.
                ragged = self.path == "prefill" or self.subject.mixes_lengths
                return 0 if ragged else len(request.context)

            return self._batches.run(cut, lambda request: len(request.inputs), work, alike)

    def _fit(self, context: list[int], targets: list[int]) -> Request:
        """Drop what does not fit from the left, as lm-eval does."""
        if not targets or len(targets) > self.max_length:
            raise UserError(
                f"a continuation of {len(targets)} tokens: at least 1 and at most "
                f"{self.max_length} can be scored by {self.subject.name}"
            )
        room = self.max_length + 1 - len(targets)
        self.cut += len(context) > room
        return Request(context[-room:], targets)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Answers, generated up to a stop string; requests of equal settings share batches."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        answers = [""] * len(requests)
        name = f"{self.what}, {self.subject.name}"
        with self.progress.task(name, len(requests), "req") as task:
            for members in groups.values():
                sampler, most, stops = generation(requests[members[0]].args[1])
                room = self.max_length - most
                if room < 1:
                    raise UserError(
                        f"{most} tokens are to be generated, the context of {self.subject.name} "
                        f"is {self.max_length} tokens"
                    )
                prompts = [self.tok_encode(requests[i].args[0]) for i in members]
                self.cut += sum(len(prompt) > room for prompt in prompts)

                def work(part: list[list[int]], how: Any = (sampler, most, stops)) -> list[str]:
                    texts = self._generate(part, *how)
                    task.advance(len(part))
                    return texts

                fed = [self._fitted(prompt, room) for prompt in prompts]
                found = self._batches.run(
                    fed, len, work, _alike if self.subject.mixes_lengths else len
                )
                for i, text in zip(members, found, strict=True):
                    answers[i] = text
        return answers

    def _generate(
        self, prompts: list[list[int]], sampler: Sampler, most: int, stops: list[str]
    ) -> list[str]:
        if not all(prompts):
            prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        cache = self.subject.new_cache()
        ends = set(end_tokens(self.subject))
        # A stop string has no more tokens than bytes; older tokens need not be read again.
        tail = 8 + 2 * max((len(stop.encode()) for stop in stops), default=0)
        rows: list[list[int]] = [[] for _ in prompts]
        going = [True] * len(prompts)
        steps = stream(self.subject, ids, mask, most, sampler=sampler, cache=cache)
        with watched(self.subject) as finite, closing(steps):
            for step in steps:
                for i, token in enumerate(step.tolist()):
                    if going[i] and token not in ends:
                        rows[i].append(token)
                        text = self.tokenizer.decode(rows[i][-tail:]) if stops else ""
                        going[i] = not any(stop in text for stop in stops)
                    else:
                        going[i] = False
                if not any(going):
                    break
        if not finite():
            refuse_not_finite(self.subject, list(zip(prompts, rows, strict=True)))
        self._note("decode", measure(self.subject, cache, len(prompts)))
        return [self._until(row, stops) for row in rows]

    def _until(self, row: list[int], stops: list[str]) -> str:
        text = str(self.tokenizer.decode(row, skip_special_tokens=True))
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _note(self, path: Path, held: CacheBytes) -> None:
        self.paths.add(path)
        if self.cache is None or held.tokens > self.cache.tokens:
            self.cache = held


def _end_of(prompt: Sequence[int], room: int) -> list[int]:
    """The last ``room`` tokens, as lm-eval cuts."""
    return list(prompt[-room:])


def _alike(prompt: list[int]) -> int:
    """All prompts can share batches, padded on the left."""
    return 0


def run_task(
    subject: Subject,
    column: str,
    task: HarnessTask,
    *,
    kept: Kept,
    path: Path = "prefill",
    batch: int | None = None,
    add_bos: bool = False,
    limit: int | None = None,
    progress: Progress = SILENT,
) -> Record:
    """Run a task on a subject, or take what is kept of an earlier run of the very same.

    Args:
        subject, path, batch, add_bos, progress: as :class:`SubjectLM` has them.
        column: ``dense`` or ``compressed``.
        task: loaded by :func:`.taskset.load_tasks`.
        kept: where finished tasks are looked for and put.
        limit: rows, the first ones; None takes all.

    Raises:
        UserError: rows that the model or its tokenizer cannot take, or predictions not finite.
        RunFailure: a pass that went past the compressed cache.
    """
    about = About(
        task.name,
        data={"source": task.source, "sha256": task.data_sha256},
        options={
            "log_likelihoods": path,
            "limit": limit,
            "add_bos": add_bos,
            "few_shot": task.task.get_config("num_fewshot"),
            "definition_sha256": task.config_sha256,
            **({"cut": "middle"} if task.middle else {}),
        },
        versions={"lm_eval": version("lm_eval"), "task": task.version},
    )

    def run() -> dict[str, Any]:
        lm = SubjectLM(
            subject,
            path=path,
            batch=batch,
            add_bos=add_bos,
            middle=task.middle,
            what=task.name,
            progress=progress,
        )
        try:
            with quiet():
                outcome = evaluate(
                    lm,
                    {"tasks": {task.name: task.task}},
                    limit=limit,
                    bootstrap_iters=_BOOTSTRAP,
                    log_samples=True,
                )
        except UserError as error:
            raise UserError(f"task {task.name}: {error}") from None
        metrics = _metrics(outcome["results"][task.name], outcome["higher_is_better"][task.name])
        blank = _NOT_ASKED if task.lengths else None
        samples = outcome["samples"][task.name]
        found = [
            (m, _rows(m, samples, blank)) for m in metrics if blank is None or m.value != blank
        ]
        return {
            "path": "+".join(sorted(lm.paths)),
            "n": int(outcome["n-samples"][task.name]["effective"]),
            "metrics": tuple(_of_rows(m, rows) if rows else m for m, rows in found),
            "rows": {m.name: packed(rows) for m, rows in found if rows},
            "cut": lm.cut,
            "cache": lm.cache,
        }

    return kept.take(subject, column, about, run)


def _of_rows(metric: Metric, rows: Sequence[float]) -> Metric:
    """The metric as the mean of its rows, with their standard error if it came without any."""
    error = standard_error(rows) if metric.stderr is None else metric.stderr
    return replace(metric, rows=(metric.name,), stderr=error)


def _rows(metric: Metric, samples: Sequence[Mapping[str, Any]], blank: float | None) -> list[float]:
    """What each row scored; empty where the figure is no mean over rows.

    Args:
        blank: marks rows that the figure is not of.
    """
    name, _, chosen = metric.name.partition(",")
    values = [
        sample.get(name)
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        if sample["filter"] == (chosen or "none")
        and (blank is None or sample.get(name, blank) != blank)
    ]
    numbers = [float(value) for value in values if isinstance(value, (bool, int, float))]
    if metric.value is None or not numbers or len(numbers) < len(values):
        return []
    return numbers if math.isclose(fmean(numbers), metric.value, abs_tol=1e-9) else []


def _metrics(figures: Mapping[str, Any], higher: Mapping[str, Any]) -> Iterator[Metric]:
    """Figures as lm-eval names them: ``metric,filter``, and ``metric_stderr,filter``."""
    for key, value in figures.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = figures.get(f"{name}_stderr,{chosen}")
        yield Metric(
            name if chosen == "none" else f"{name},{chosen}",
            float(value) if math.isfinite(value) else None,
            float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None,
            "lower" if higher.get(name) is False else "higher",
        )
