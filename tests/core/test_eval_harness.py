"""lm-eval's requests on the deployed path, against lm-eval's own model for transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (starkv[eval])")

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from starkv_core.errors import UserError
from starkv_core.eval.harness import SubjectLM, generation, run_task
from starkv_core.eval.local_data import FILES
from starkv_core.eval.records import Kept, Record
from starkv_core.eval.taskset import HarnessTask, load_tasks
from starkv_core.models import load
from starkv_core.models.load import LoadedModel
from starkv_core.run import Subject, dense_subject
from tests import models
from tests.eval_rows import write_rows

PAIRS = (
    ("The history of the", " city begins"),
    ("A", " b"),
    ("Question: what is a dog?\nAnswer:", " an animal that barks, and is kept by people"),
    ("", " hello there"),
    ("Blanks behind  ", "go to what follows"),
)
TEXTS = ("The history of the city begins here. " * 12, "x")
PROMPTS = ("The history of the city begins", "In the year", "Once")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load(None, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def dense(loaded: LoadedModel) -> Subject:
    # Caches in float32: their rounding to 16 bits is no part of the comparison.
    return replace(dense_subject(loaded), store_dtype=torch.float32)


@pytest.fixture(scope="module")
def full(loaded: LoadedModel) -> Subject:
    """Every component kept."""
    start = {"slack": 0, "allocation": "uniform"}
    return models.deployed(loaded, models.full_ranks(loaded), start=start)


@pytest.fixture(scope="module")
def theirs(loaded: LoadedModel) -> HFLM:
    return HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=2,
        add_bos_token=False,
        max_length=64,
    )


def asked(kind: str, arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, args, 0) for args in arguments]


def short(subject: Subject) -> Subject:
    """The subject with a context of 64 tokens, so that texts have several windows."""
    spec = replace(subject.spec, max_positions=64)
    return replace(subject, base=replace(subject.base, spec=spec))


@pytest.mark.parametrize("path", ["prefill", "decode"])
def test_dense_equals_lm_evals_own_model(dense: Subject, theirs: HFLM, path: Any) -> None:
    mine = SubjectLM(short(dense), path=path, batch=3)
    requests = asked("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for (value, greedy), (wanted, wanted_greedy) in zip(
        mine.loglikelihood(requests), expected, strict=True
    ):
        assert value == pytest.approx(wanted, rel=1e-5)
        assert greedy == wanted_greedy
    requests = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)
    assert mine.paths == {path}


def test_a_context_too_long_loses_its_beginning(dense: Subject, theirs: HFLM) -> None:
    mine = SubjectLM(short(dense))
    requests = asked("loglikelihood", [(TEXTS[0], " and so on")])
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert mine.loglikelihood(requests)[0][0] == pytest.approx(expected[0][0], rel=1e-5)
    assert mine.cut == 1


def test_answers_equal_lm_evals_own(dense: Subject, theirs: HFLM) -> None:
    mine = SubjectLM(short(dense), batch=2)
    settings = (
        {"until": ["\n", "."], "max_gen_toks": 30},
        {"until": [" the"], "max_gen_toks": 12},
        {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 1},
    )
    for setting in settings:
        requests = asked("generate_until", [(prompt, setting) for prompt in PROMPTS])
        expected = theirs.generate_until(requests, disable_tqdm=True)
        assert mine.generate_until(requests) == expected
        assert any(expected)
    assert mine.paths == {"decode"}
    mixed = asked("generate_until", [(PROMPTS[0], setting) for setting in settings])
    alone = [mine.generate_until([request])[0] for request in mixed]
    assert mine.generate_until(mixed) == alone


def test_full_rank_equals_dense(full: Subject, dense: Subject) -> None:
    requests = asked("loglikelihood", PAIRS)
    expected = SubjectLM(dense).loglikelihood(requests)
    for path in ("prefill", "decode"):
        found = SubjectLM(full, path=path).loglikelihood(requests)  # type: ignore[arg-type]
        for (value, _), (wanted, _) in zip(found, expected, strict=True):
            assert value == pytest.approx(wanted, rel=1e-3)
    answers = asked("generate_until", [(p, {"until": [], "max_gen_toks": 12}) for p in PROMPTS])
    assert SubjectLM(full).generate_until(answers) == SubjectLM(dense).generate_until(answers)


def test_a_quantised_run_answers_each_prompt_as_alone(full: Subject) -> None:
    coded = models.coded(full, bits=(3, 2), sinks=2, window=4)
    setting = {"until": [], "max_gen_toks": 4}
    requests = asked("generate_until", [(p, setting) for p in (*PROMPTS, PROMPTS[0] + " of")])
    alone = [SubjectLM(coded).generate_until([request])[0] for request in requests]
    assert SubjectLM(coded).generate_until(requests) == alone
    requests = asked("loglikelihood", PAIRS)
    alone_scores = [SubjectLM(coded, path="decode").loglikelihood([r])[0][0] for r in requests]
    scores = [value for value, _ in SubjectLM(coded, path="decode").loglikelihood(requests)]
    assert scores == pytest.approx(alone_scores, rel=1e-4)


def test_special_tokens_are_up_to_the_caller(dense: Subject) -> None:
    begin = SubjectLM(dense).prefix_token_id

    class Beginning:
        """A tokenizer that puts a token of beginning before a text, as LLaMA's does."""

        bos_token_id = eos_token_id = begin
        decode = dense.tokenizer.decode

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            ids = dense.tokenizer.encode(text, add_special_tokens=False)
            return [begin, *ids] if add_special_tokens else ids

    for add_bos in (False, True):
        lm = SubjectLM(dense, add_bos=add_bos)
        lm.tokenizer = Beginning()
        assert (lm.tok_encode("A dog")[0] == begin) == add_bos
        written = Beginning().decode([begin]) + "A dog"
        assert lm.tok_encode(written).count(begin) == 1
        assert begin not in lm.tok_encode(" barks", add_special_tokens=False)


def test_generation_settings() -> None:
    sampler, most, stops = generation({"until": "x", "max_gen_toks": 7})
    assert (sampler.temperature, most, stops) == (0.0, 7, ["x"])
    sampler, most, stops = generation(
        {"until": [""], "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    )
    assert (sampler.temperature, sampler.top_p, most, stops) == (0.7, 0.9, 256, [])
    with pytest.raises(UserError, match="num_beams"):
        generation({"num_beams": 4})


def test_a_tokenizer_of_another_model(dense: Subject) -> None:
    small = replace(dense, base=replace(dense.base, spec=replace(dense.spec, vocab=300)))
    with pytest.raises(UserError, match="belongs to another model"):
        SubjectLM(small).tok_encode("The history of the city")


RAW: dict[str, tuple[str, Any]] = {
    "piqa": ("piqa/piqa.yaml", lambda r: {k: r[k] for k in ("goal", "sol1", "sol2", "label")}),
    "arc_easy": ("arc/arc_easy.yaml", lambda r: _lettered(r, "question")),
    "arc_challenge": ("arc/arc_challenge.yaml", lambda r: _lettered(r, "question")),
    "openbookqa": ("openbookqa/openbookqa.yaml", lambda r: _lettered(r, "question_stem")),
    "hellaswag": ("hellaswag/hellaswag.yaml", lambda r: r["raw"]),
    "winogrande": (
        "winogrande/default.yaml",
        lambda r: {k: r[k] for k in ("sentence", "option1", "option2", "answer")},
    ),
}


def _lettered(row: dict[str, Any], question: str) -> dict[str, Any]:
    letters = list("ABCDE")[: len(row["choices"])]
    choices = {"text": row["choices"], "label": letters}
    return {question: row[question], "choices": choices, "answerKey": letters[row["gold"]]}


@pytest.mark.parametrize("name", sorted(FILES))
def test_rows_are_asked_and_scored_as_lm_evals_own_task_does(name: str, tmp_path: Path) -> None:
    import lm_eval.tasks
    from datasets import Dataset

    rows = write_rows(tmp_path)[name]
    (mine,) = load_tasks([name], data=tmp_path).tasks
    file, raw = RAW[name]
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / file)
    split = config.get("test_split") or config["validation_split"]
    for key in ("dataset_path", "dataset_name", "training_split", "tag"):
        config.pop(key, None)
    for key in ("validation_split", "test_split"):
        config[key] = split if config.get(key) == split else None
    config["custom_dataset"] = lambda **_: {split: Dataset.from_list([raw(row) for row in rows])}
    theirs = ConfigurableTask(config=config)
    theirs.set_config(key="num_fewshot", value=0)
    for task in (mine.task, theirs):
        task.build_all_requests(limit=None, rank=0, world_size=1)
    assert len(mine.task.instances) >= 2 * len(rows)
    assert [i.args for i in mine.task.instances] == [i.args for i in theirs.instances]
    for doc, other in zip(mine.task.eval_docs, theirs.eval_docs, strict=True):
        for right in range(2):
            count = len(mine.task.doc_to_choice(doc))
            # the longest wins by length, another by likelihood
            answers = [(-3.0 - i if i != right else -2.5, False) for i in range(count)]
            assert mine.task.process_results(doc, answers) == theirs.process_results(other, answers)
    assert mine.task.aggregation().keys() == theirs.aggregation().keys()
    assert mine.task.higher_is_better() == theirs.higher_is_better()


def test_a_finished_task_is_kept(
    dense: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, results = tmp_path / "data", tmp_path / "results"
    data.mkdir()
    write_rows(data)
    (task,) = load_tasks(["arc_easy"], data=data).tasks
    kept = Kept(results)
    first = run_task(dense, "dense", task, kept=kept)
    assert not kept.reused
    (file,) = results.iterdir()
    assert json.loads(file.read_text())["record"]["task"] == "arc_easy"
    again = run_task(dense, "dense", task, kept=kept)
    assert kept.reused == ["arc_easy (dense, prefill)"]
    assert again == Record.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again.to_dict() == first.to_dict()
    # what each row scored
    for metric in first.metrics:
        assert fmean(first.values(metric)) == pytest.approx(metric.value)
        assert len(first.values(metric)) == first.n
    assert set(first.rows["acc"]) <= {"0", "1"}

    def made_anew(task: HarnessTask, **changed: Any) -> bool:
        before = len(kept.reused)
        run_task(dense, "dense", task, kept=kept, **changed)
        return len(kept.reused) == before

    # whatever the figures depend on
    for changed in ({"path": "decode"}, {"limit": 1}, {"add_bos": True}):
        assert made_anew(task, **changed)
    path = data / FILES["arc_easy"]
    path.write_text(path.read_text().replace("dog", "cat"))
    assert made_anew(*load_tasks(["arc_easy"], data=data).tasks)
    # a record that was damaged is made again
    file.write_text(file.read_text()[:50])
    path.write_text(path.read_text().replace("cat", "dog"))
    assert made_anew(task)
    assert not made_anew(task)
    with monkeypatch.context() as patch:
        patch.setattr("starkv_core.eval.records.source_hash", lambda: "other code")
        assert made_anew(task)
