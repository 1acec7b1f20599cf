"""RULER as lm-eval makes it: the same prompts every time, and what cannot be made is refused."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (starkv[eval])")

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from starkv_core.embedded import MODEL_DIR
from starkv_core.errors import UserError
from starkv_core.eval import ruler
from starkv_core.eval.harness import run_task
from starkv_core.eval.records import Kept
from starkv_core.eval.taskset import HarnessTask, TaskSet, load_tasks
from starkv_core.models import load
from starkv_core.run import dense_subject
from tests.standin import byte_tokenizer, make_subject

FOLDER = Path(lm_eval.tasks.__file__).parent / "ruler"


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """A definition that imports nothing."""
    path = tmp_path / "nothing.yaml"
    path.write_text("task: nothing\n")
    return path


def test_the_tasks_are_those_of_lm_evals_group() -> None:
    group = load_yaml(FOLDER / "ruler.yaml", resolve_func=False)
    assert list(ruler.NEEDS) == group["task"]


def test_prompts_are_made_alike_and_nothing_else_is_touched(nothing: Path) -> None:
    drawn = []
    for _ in range(2):
        random.seed(3)
        np.random.seed(3)
        with ruler.making("ruler_vt", nothing, offline=True):
            drawn.append((random.random(), float(np.random.rand())))
    assert drawn[0] == drawn[1]
    # lm-eval's own seeds
    assert drawn[0] == (random.Random(0).random(), float(np.random.RandomState(1234).rand()))
    assert random.random() == random.Random(3).random()
    assert float(np.random.rand()) == float(np.random.RandomState(3).rand())


def test_nothing_is_fetched_offline(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    asked: list[str] = []
    monkeypatch.setattr(nltk, "download", asked.append)
    with ruler.making("niah_single_1", nothing, offline=True):
        nltk.download("punkt_tab")
    assert asked == []
    with ruler.making("niah_single_1", nothing, offline=False):
        nltk.download("punkt_tab")
    assert asked == ["punkt_tab"]


def test_lengths_take_turns() -> None:
    rows = [{"index": i, "max_length": n} for n in (512, 1024, 2048) for i in range(4)]
    task = SimpleNamespace(dataset={"test": Dataset.from_list(rows)})
    ruler.mix_lengths(task)
    assert task.dataset["test"]["max_length"][:] == [512, 1024, 2048] * 4
    assert task.dataset["test"]["index"][:6] == [0, 0, 0, 1, 1, 1]


@pytest.mark.slow
def test_made_for_the_lengths_asked_for() -> None:
    pytest.importorskip("wonderwords", reason="lm-eval's ruler is not installed (starkv[eval])")
    (task,) = load_tasks(["ruler_vt"], tokenizer=str(MODEL_DIR), lengths=[1200]).tasks
    assert task.lengths == (1200,)
    rows = task.task.dataset["test"]
    assert set(rows["max_length"]) == {1200}
    assert 1000 < max(rows["length"]) <= 1200
    row = rows[0]
    assert task.task.process_results(row, [" ".join(row["outputs"][:2])])["1200"] == 0.4


def test_without_a_network_the_rest_is_named() -> None:
    for name in ("ruler", "ruler_qa_squad"):
        with pytest.raises(UserError) as raised:
            load_tasks([name], tokenizer=str(MODEL_DIR), lengths=[1200])
        said = str(raised.value)
        assert "task ruler_qa_squad: needs SQuAD from the web" in said
        assert "HF_DATASETS_OFFLINE is set" in said
        assert said.endswith(
            "these need no network: niah_single_1,niah_multikey_2,niah_multikey_3,"
            "ruler_vt,ruler_cwe,ruler_fwe"
        )
        assert ("task niah_multivalue: needs" in said) == (name == "ruler")


def test_lengths_that_lm_eval_would_try_without_end(tmp_path: Path) -> None:
    pytest.importorskip("wonderwords", reason="lm-eval's ruler is not installed (starkv[eval])")
    for name, length in (("ruler_vt", 600), ("ruler_fwe", 100)):
        with pytest.raises(UserError, match=f"task {name}: prompts of {length} tokens are too"):
            load_tasks([name], tokenizer=str(MODEL_DIR), lengths=[length])
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="use variable-tracking"):
        load_tasks(["ruler_vt"], tokenizer=str(tmp_path), lengths=[4096])


def test_prompts_past_the_models_context_are_refused() -> None:
    task = HarnessTask("ruler_vt", None, "", "", "", 1, lengths=(128, 512))
    with pytest.raises(UserError, match=r"ruler_vt, prompts of 512 tokens \(--lengths\).*is 256"):
        TaskSet((task,)).check_context(make_subject(max_positions=256))


def test_every_length_has_rows_of_its_own() -> None:
    """lm-eval marks rows of other lengths with -1, or leaves out lengths that it does not know."""
    common = import_module("lm_eval.tasks.ruler.common_utils")
    lengths = [100, 4096] * 4
    rows = [{"input": f"Go {i}", "outputs": ["x"], "max_length": n} for i, n in enumerate(lengths)]
    scores = {f"Go {i}": i // 2 / 4 for i in range(8)}

    def scored(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        found = common.process_results(doc, results)
        return found | {str(doc["max_length"]): scores[doc["input"]]}

    definition = load_yaml(FOLDER / "niah_single_1.yaml", resolve_func=False)
    for key in ("dataset_path", "dataset_name", "tag"):
        del definition[key]
    definition["custom_dataset"] = lambda **_: {"test": Dataset.from_list(rows)}
    definition["process_results"] = scored
    for metric in definition["metric_list"]:
        metric["aggregation"] = common.aggregate_metrics
    definition["doc_to_target"], definition["gen_prefix"] = "x", ""
    definition["generation_kwargs"]["max_gen_toks"] = 1
    made = HarnessTask("niah", ConfigurableTask(config=definition), "", "", "", 1, (100, 4096))
    subject = dense_subject(load(None, device="cpu", dtype="float32"))
    found = run_task(subject, "dense", made, kept=Kept(None))
    assert {metric.name for metric in found.metrics} == {"100", "4096"}
    for metric in found.metrics:
        assert found.values(metric) == (0.0, 0.25, 0.5, 0.75)
        assert metric.value == 0.375
        assert metric.stderr == pytest.approx(stdev((0.0, 0.25, 0.5, 0.75)) / 2)
