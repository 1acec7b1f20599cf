"""Tasks of lm-eval in `starkv eval`: table, report, what is kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from starkv_cli.main import main
from starkv_core.eval.local_data import FILES
from tests.cli.conftest import OnDisk
from tests.eval_rows import ROWS, write_rows


def starkv(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder)
    return folder


def test_without_lm_eval_it_says_what_to_install(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    assert starkv("eval", "nowhere/at/all", "--tasks", "piqa,pass-key", "--data", data) == 2
    said = capsys.readouterr().err
    assert "'starkv[eval]'" in said
    assert "did you mean passkey" in said


class TestWithHarness:
    """What needs lm-eval itself."""

    @pytest.fixture(autouse=True)
    def harness(self) -> None:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed (starkv[eval])")

    def test_beside_the_built_in_tasks(
        self,
        on_disk: OnDisk,
        run: Path,
        data: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        args = ["--tasks", "perplexity,zero-shot", "--windows", 1, "--window", 64]
        args += ["--data", data, "--limit", 2, "--text", on_disk.text, "--out", tmp_path / "out"]
        assert starkv("eval", run, *args) == 0
        printed = capsys.readouterr()
        assert "piqa, acc (prefill, n 2)" in printed.out
        assert "zero-shot, mean" in printed.out
        report = json.loads((tmp_path / "out/eval.json").read_text())
        found = {(r["subject"], r["task"]): r for r in report["results"]}
        assert {task for _, task in found} == {"perplexity", *FILES}
        assert {subject for subject, _ in found} == {"dense", "compressed"}
        runs = {
            subject: {r["run"] for (s, _), r in found.items() if s == subject}
            for subject in ("dense", "compressed")
        }
        assert all(len(hashes) == 1 for hashes in runs.values())
        assert runs["dense"] != runs["compressed"]
        for (_, task), record in found.items():
            assert record["path"] == "prefill"
            assert record["versions"]["torch"]
            assert len(record["data"]["sha256"]) == 64
            assert record["cache"]["held"] > 0
            if task != "perplexity":
                assert record["n"] == 2
                names = [metric["name"] for metric in record["metrics"]]
                assert names == (["acc"] if task == "winogrande" else ["acc", "acc_norm"])
                assert all(metric["stderr"] is not None for metric in record["metrics"])
        chosen = {
            "piqa": "acc",
            "winogrande": "acc",
            "arc_easy": "acc",
            "arc_challenge": "acc_norm",
            "openbookqa": "acc_norm",
            "hellaswag": "acc_norm",
        }
        mean = sum(
            next(m["value"] for m in found["compressed", t]["metrics"] if m["name"] == chosen[t])
            for t in FILES
        ) / len(FILES)
        (whole,) = (f for f in report["compressed"]["figures"] if f["task"] == "zero-shot")
        assert whole["value"] == pytest.approx(mean)
        assert whole["difference"]["paired"]

    def test_both_paths(
        self, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reports = []
        for path in ([], ["--decode-path"]):
            out = tmp_path / f"out{len(path)}"
            args = ["--tasks", "arc_easy", "--data", data, "--no-dense", "--out", out, *path]
            assert starkv("eval", run, *args, "--json") == 0
            reports.append(json.loads(capsys.readouterr().out))
        records = [report["results"][0] for report in reports]
        assert [record["path"] for record in records] == ["prefill", "decode"]
        assert records[0]["metrics"] == records[1]["metrics"]
        # bytes come from a cache of 1024 tokens, not from these short rows
        assert reports[0]["compressed"]["cache"]["tokens"] == 1024
        assert reports[0]["compressed"]["cache"]["ratio"] == pytest.approx(2.0)

    def test_an_interrupted_evaluation_goes_on(
        self,
        on_disk: OnDisk,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        from starkv_core.eval import harness

        out = tmp_path / "out"
        args = ["eval", on_disk.model, "--tasks", "piqa,hellaswag", "--data", data, "--out", out]
        whole = harness.SubjectLM._loglikelihood_tokens
        asked: list[int] = []

        def interrupted(self, requests, **kwargs):
            asked.append(len(requests))
            if len(asked) == 2:
                raise KeyboardInterrupt
            return whole(self, requests, **kwargs)

        monkeypatch.setattr(harness.SubjectLM, "_loglikelihood_tokens", interrupted)
        assert starkv(*args) == 130
        assert "the same command goes on" in capsys.readouterr().err
        assert [path.name.split("-")[1] for path in out.iterdir()] == ["piqa"]
        asked[:] = [0, 0]
        assert starkv(*args) == 0
        assert asked[2:] == [2 * len(ROWS["hellaswag"])]
        assert "piqa (dense, prefill)" in capsys.readouterr().err
        report = json.loads((out / "eval.json").read_text())
        assert [record["task"] for record in report["results"]] == ["piqa", "hellaswag"]
        assert starkv(*args) == 2
        assert "already exists" in capsys.readouterr().err

    def test_task_files_of_ones_own(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "own"
        folder.mkdir()
        (folder / "rows.jsonl").write_text(
            '{"q": "A dog", "a": " barks"}\n{"q": "I", "a": " am"}\n'
        )
        (folder / "mine.yaml").write_text(
            "task: mine\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
            "output_type: generate_until\n"
            "test_split: test\n"
            "doc_to_text: q\n"
            "doc_to_target: a\n"
            "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
            "metric_list: [{metric: exact_match}]\n"
        )
        args = ["--tasks", "mine", "--include-path", folder, "--no-dense", "--json"]
        assert starkv("eval", run, *args) == 0
        (record,) = json.loads(capsys.readouterr().out)["results"]
        assert (record["task"], record["path"], record["n"]) == ("mine", "decode", 2)
        assert record["metrics"][0]["name"] == "exact_match"

    def test_code_beside_task_files_of_ones_own_counts(self, run: Path, tmp_path: Path) -> None:
        """lm-eval's definition has the function that it names, not what that calls."""
        (tmp_path / "rows.jsonl").write_text('{"q": "A dog", "a": " barks"}\n' * 2)
        (tmp_path / "mine.yaml").write_text(
            "task: mine\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
            "output_type: generate_until\n"
            "test_split: test\n"
            "doc_to_text: q\n"
            "doc_to_target: a\n"
            "generation_kwargs: {until: ['.'], max_gen_toks: 4}\n"
            "process_results: !function scores.score\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
        code = "def score(doc, results):\n    return {'acc': share()}\n\ndef share():\n    return "
        args = ["--tasks", "mine", "--include-path", tmp_path, "--no-dense"]
        for share, kept in (("0.25", 1), ("0.25", 1), ("0.75", 2)):
            (tmp_path / "scores.py").write_text(f"{code}{share}\n")
            assert starkv("eval", run, *args) == 0
            assert len(list(run.glob("results/task-*"))) == kept

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--tasks", "piqqa,longbnch"], ["piqqa", "did you mean piqa", "longbench"]),
            (
                ["--tasks", "passky"],
                ["passky", "did you mean passkey", "zero-shot, longbench, ruler"],
            ),
            (["--tasks", "key-value"], ["key-value", "did you mean kv?"]),
            (["--tasks", "ruler"], ["niah_single_2: needs essays", "no network: niah_single_1,"]),
            (["--tasks", "longbench", "--data", "."], ["no such file", "hotpotqa.jsonl (task"]),
            (["--tasks", "piqa"], ["task piqa", "HF_DATASETS_OFFLINE is set", FILES["piqa"]]),
            (["--tasks", "piqa", "--data", "no/such"], ["--data no/such", "no such folder"]),
            (["--tasks", "piqa", "--include-path", "no/such"], ["--include-path no/such"]),
            (["--tasks", "piqa", "--limit", "0"], ["limit 0"]),
            (
                ["--tasks", "piqa", "--batch-size", "many"],
                ["--batch-size 'many'", "a number or auto"],
            ),
            (["--tasks", "piqa", "--batch-size", ""], ["--batch-size ''"]),
        ],
    )
    def test_faults_are_told_before_the_model_loads(
        self, args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert starkv("eval", "nowhere/at/all", *args) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert all(word in printed.err for word in words), printed.err
        assert "nowhere" not in printed.err

    def test_missing_files_and_bad_rows(
        self, data: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = ["eval", "nowhere/at/all", "--tasks", "zero-shot", "--data", data]
        for name in ("piqa", "winogrande"):
            (data / FILES[name]).unlink()
        assert starkv(*args) == 2
        said = capsys.readouterr().err
        assert all(f"{FILES[name]} (task {name})" in said for name in ("piqa", "winogrande"))
        assert FILES["arc_easy"] not in said
        args[3] = "arc_easy"
        path = data / FILES["arc_easy"]
        for line, words in (
            ("{", "not JSON"),
            ("[]", "not an object"),
            ('{"context": "x", "choices": ["a"]}', "gold missing"),
            ('{"context": "x", "choices": ["a"], "gold": 1}', "gold 1 is none of 1"),
            ('{"context": "x", "choices": "a", "gold": 0}', "a list of choices"),
            ('{"context": "", "choices": ["a"], "gold": 0}', "empty texts"),
        ):
            path.write_text(json.dumps(ROWS["arc_easy"][0]) + f"\n{line}\n")
            assert starkv(*args) == 2
            said = capsys.readouterr().err
            assert words in said
            assert "line 2" in said
        path.write_text("\n")
        assert starkv(*args) == 2
        assert "no rows" in capsys.readouterr().err
