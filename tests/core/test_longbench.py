"""LongBench from files of one's own: lm-eval's prompts and scores, and how prompts are cut."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (starkv[eval])")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.tasks._yaml_loader import load_yaml

from starkv_core.errors import UserError
from starkv_core.eval import longbench
from starkv_core.eval.harness import SubjectLM, run_task
from starkv_core.eval.longbench import file_of, without_middle
from starkv_core.eval.records import Kept
from starkv_core.eval.taskset import load_tasks
from starkv_core.models import load
from starkv_core.run import Subject, dense_subject

FOLDER = Path(lm_eval.tasks.__file__).parent / "longbench"
# lm-eval's metrics import all three at once; most of them use none.
PACKAGES = {"jieba": "cut", "fuzzywuzzy": "fuzz", "rouge": "Rouge"}
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
USED = {"lcc": "fuzzywuzzy", "samsum": "rouge"}


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Something to import in place of packages that are not installed."""
    for name in MISSING:
        empty = ModuleType(name)
        setattr(empty, PACKAGES[name], None)
        monkeypatch.setitem(sys.modules, name, empty)
    yield
    if MISSING:
        sys.modules.pop("lm_eval.tasks.longbench.metrics", None)


def row(question: str, context: str, answers: list[str], classes: Any = None) -> dict[str, Any]:
    """A row as LongBench has it."""
    return {
        "input": question,
        "context": context,
        "answers": answers,
        "length": len(context.split()),
        "dataset": "",
        "language": "en",
        "all_classes": classes,
        "_id": "5f3c",
    }


ROWS = {
    "hotpotqa": [
        row("Who rows {the} boat?", "Ann rows the boat. " * 400, ["Ann Lee", "the Lee, Ann"]),
        row("Where is the boat?", "The boat is at sea.", ["at sea"]),
    ],
    "trec": [
        row("Question: Who?\nType:", "Question: Where?\nType: Place", ["Human"], ["Human", "Place"])
    ],
    "passage_count": [row("", "Paragraph 1: A.\n\nParagraph 2: B.", ["2"])],
    "lcc": [row("", "x = 1\ny = ", ["y = x + 1"])],
    "samsum": [row("Dialogue: A: hi\nSummary: ", "Dialogue: ...", ["Ann greets Bea at sea"])],
}
# What the model is taken to say to each row, and the metric worked out by hand.
SAID = {
    "hotpotqa": [
        # 'ann rows boat' (articles fall) against 'ann lee': 1 of 3 and 1 of 2 words
        (" Ann rows the boat.", "qa_f1_score", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        (" At sea!", "qa_f1_score", 1.0),
    ],
    "trec": [(" Human or Place", "classification_score", 0.5)],
    "passage_count": [(" 2, or 3, or 2", "count_score", 2 / 3)],
    # the first line that is no comment; 2 * 8 of 9 + 9 letters and blanks alike
    "lcc": [("# next\ny = x + 2\nz", "code_sim_score", 0.89)],
    # longest common subsequence 'Ann at sea': 3 of 4 and 3 of 5
    "samsum": [(" Ann is at sea", "rouge_score", 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))],
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, rows in ROWS.items():
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


def definitions() -> dict[str, dict[str, Any]]:
    found = {}
    for path in FOLDER.glob("[!_]*.yaml"):
        config = load_yaml(path, resolve_func=False)
        found[config["task"]] = config
    return found


def test_files_are_named_as_longbench_names_them() -> None:
    known = definitions()
    assert len(known) > 30
    for name, config in known.items():
        assert file_of(name) == f"{config['dataset_name']}.jsonl"


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_are_asked_as_lm_eval_asks_and_scored_by_hand(name: str, data: Path) -> None:
    if USED.get(name) in MISSING:
        pytest.skip(f"{USED[name]} is not installed (starkv[eval])")
    (task,) = load_tasks([f"longbench_{name}"], data=data).tasks
    assert task.source == str(data / f"{name}.jsonl")
    assert task.middle
    config = definitions()[f"longbench_{name}"]
    task.task.build_all_requests(limit=None, rank=0, world_size=1)
    for doc, found, instance, (said, metric, score) in zip(
        ROWS[name], task.task.eval_docs, task.task.instances, SAID[name], strict=True
    ):
        prompt = config["doc_to_text"]
        for key, text in (("context", doc["context"]), ("question", doc["input"])):
            prompt = re.sub(r"\{\{\s*" + key + r"\s*\}\}", lambda _, t=text: t, prompt)
        assert instance.args[0].rstrip() == prompt.rstrip()
        assert instance.args[1]["max_gen_toks"] == config["generation_kwargs"]["max_gen_toks"]
        scores = task.task.process_results(found, [said])
        assert scores["score"] == scores[metric] == pytest.approx(score)


def test_a_folder_that_lacks_files(data: Path) -> None:
    (data / "trec.jsonl").unlink()
    with pytest.raises(UserError) as raised:
        load_tasks(["longbench_hotpotqa", "longbench_fewshot"], data=data)
    said = str(raised.value)
    assert f"--data {data}: no such file" in said
    for name in ("trec", "triviaqa", "lsht"):
        assert f"{name}.jsonl (task longbench_{name})" in said
    assert "hotpotqa" not in said and "samsum" not in said
    with pytest.raises(UserError) as raised:
        load_tasks(["longbench"], data=data)
    assert str(raised.value).count("(task longbench_") == 21 - len(list(data.glob("*.jsonl")))


def test_a_group_has_all_its_files(data: Path) -> None:
    for name in ("triviaqa", "lsht"):
        (data / f"{name}.jsonl").write_text(json.dumps(ROWS["trec"][0]))
    loaded = load_tasks(["longbench_fewshot", "longbench_lcc"], data=data)
    members = tuple(f"longbench_{n}" for n in ("trec", "triviaqa", "samsum", "lsht"))
    assert loaded.groups == {"longbench_fewshot": members}
    assert [task.name for task in loaded.tasks] == [*members, "longbench_lcc"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not an object"),
        ('{"input": "", "answers": []}', "line 2: context missing"),
        ('{"input": "", "context": 1, "answers": ["a"]}', "must be texts"),
        ('{"input": "", "context": "c", "answers": "a"}', "answers must be a list of texts"),
        ('{"input": "", "context": "c", "answers": []}', "no answers"),
        (
            '{"input": "", "context": "c", "answers": ["a"], "all_classes": "a"}',
            "all_classes must be a list of texts",
        ),
    ],
)
def test_bad_rows(data: Path, line: str, words: str) -> None:
    path = data / "hotpotqa.jsonl"
    path.write_text(json.dumps(ROWS["hotpotqa"][1]) + f"\n{line}\n")
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        longbench.rows(data=str(data), file=path.name)
    assert str(path) in str(raised.value)


def test_an_empty_file(data: Path) -> None:
    (data / "hotpotqa.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        load_tasks(["longbench_hotpotqa"], data=data)


def test_the_middle_is_what_goes() -> None:
    ids = list(range(10))
    assert without_middle(ids, 10) == without_middle(ids, 12) == ids
    assert without_middle(ids, 4) == [0, 1, 8, 9]
    assert without_middle(ids, 5) == [0, 1, 7, 8, 9]
    assert without_middle(ids, 1) == [9]


@pytest.fixture(scope="module")
def dense() -> Subject:
    subject = dense_subject(load(None, device="cpu", dtype="float32"))
    spec = replace(subject.spec, max_positions=160)
    return replace(subject, base=replace(subject.base, spec=spec))


def test_prompts_past_the_context_lose_their_middle(dense: Subject) -> None:
    prompt = "The history of the city begins here. " * 40 + "And so it ends, for"
    ids = dense.tokenizer.encode(prompt)
    settings = {"until": [], "max_gen_toks": 12}
    lm = SubjectLM(dense, middle=True)
    answer = lm.generate_until([Instance("generate_until", {}, (prompt, settings), 0)])
    assert lm.cut == 1
    kept = ids[:74] + ids[-74:]
    out = dense.model.generate(
        input_ids=dense.model.dummy_inputs["input_ids"].new_tensor([kept]),
        max_new_tokens=12,
        do_sample=False,
    )
    assert answer == [dense.tokenizer.decode(out[0, 148:], skip_special_tokens=True)]


def test_the_record_says_how_many_were_cut(dense: Subject, data: Path) -> None:
    (task,) = load_tasks(["longbench_hotpotqa"], data=data).tasks
    record = run_task(dense, "dense", task, kept=Kept(None))
    assert (record.n, record.cut, record.path) == (2, 1, "decode")
    assert record.options["cut"] == "middle"
    assert record.cache is not None and record.cache.tokens <= 160
    assert [metric.name for metric in record.metrics] == ["score", "qa_f1_score"]
