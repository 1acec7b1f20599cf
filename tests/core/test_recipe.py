from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from starkv_core import recipe as recipe_module
from starkv_core.errors import UserError
from starkv_core.recipe import (
    OptimSection,
    StartSection,
    find_recipe,
    load_recipe,
    parse_recipe,
    recipe_label,
    recipe_names,
)


def parse(content: Any, *overrides: str) -> recipe_module.Recipe:
    return parse_recipe(content, where="r.yaml", overrides=overrides)


def faults(content: Any, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(content, *overrides)
    title, *lines = str(caught.value).splitlines()
    return [line.strip() for line in lines] or [title.partition(" fault: ")[2]]


# --- defaults ------------------------------------------------------------------------------------


def test_defaults_of_star() -> None:
    r = parse({"budget": {"ratio": 2}})
    assert (r.method, r.steps, r.rank_steps, r.batch, r.seed) == ("star", 300, 100, 4, 0)
    assert (r.start.keys, r.start.values) == ("attended", "mixed")
    assert r.start.center and r.start.output_aware and r.optim.lr_relative
    assert (r.optim.lr, r.optim.threshold_lr, r.optim.gate_slope) == (3e-3, 3e-3, 20)
    assert r.data.source == "builtin"
    assert r.model.name is None


def test_defaults_of_paper() -> None:
    r = parse({"budget": {"ratio": 2}, "method": "paper"})
    assert (r.start.keys, r.start.values, r.start.slack) == ("weights", "weights", 0)
    assert not (r.start.center or r.start.output_aware or r.optim.lr_relative)
    assert (r.optim.lr, r.optim.threshold_lr, r.optim.gate_slope) == (2e-5, 1e-2, 50)
    assert (r.optim.gamma, r.optim.weight_decay, r.optim.beta2) == (0.1, 0.01, 0.999)


def test_only_one_shot_star_has_a_floor() -> None:
    budget = {"budget": {"ratio": 2}}
    assert parse(budget).start.floor == 0
    assert parse(budget, "rank_steps=0").start.floor == 0
    assert parse(budget, "steps=0").start.floor == 0.75
    assert parse({**budget, "start": {"floor": 0.25}}, "steps=0").start.floor == 0.25
    assert parse(budget, "steps=0", "method=paper").start.floor == 0
    assert parse(budget, "method=palu").start.floor == 0  # steps are 0, whatever is asked for


def test_given_keys_win_over_the_method() -> None:
    r = parse({"budget": {"ratio": 2}, "method": "paper", "start": {"keys": "query-aware"}})
    assert r.start.keys == "query-aware"
    assert r.start.values == "weights"


@pytest.mark.parametrize(("steps", "rank_steps"), [(0, 0), (3, 1), (60, 20)])
def test_a_third_of_the_steps_learns_ranks(steps: int, rank_steps: int) -> None:
    assert parse({"budget": {"ratio": 2}, "steps": steps}).rank_steps == rank_steps


def test_one_shot_of_a_recipe_that_trains() -> None:
    r = parse({"budget": {"ratio": 2}, "steps": 300, "rank_steps": 100}, "steps=0")
    assert (r.steps, r.rank_steps) == (0, 0)


# --- faults --------------------------------------------------------------------------------------


def test_all_faults_at_once() -> None:
    found = faults(
        {
            "method": "stra",
            "stepz": 3,
            "batch": 0,
            "seed": True,
            "lr": 3,
            "budget": {"ratio": 0.5, "fit": "32q@1"},
            "data": 3,
            "model": {"trust_remote_code": True},  # a recipe from elsewhere must not run code
            "start": {"kyes": 3, "skip_layers": [0, "a"], "slack": 0.5},
            "optim": {"lr": "fast", "beta1": 1, "checkpointing": 1, "gamma": float("inf")},
        },
        "rato=3",
        "nothing",
    )
    assert found == [
        "--set rato=3: no such key; the nearest is budget.ratio",
        "--set nothing: expected key=value",
        "stepz: unknown key; the nearest is steps",
        "lr: unknown key; the nearest is optim.lr",
        "method: must be one of star, paper, uniform, palu, recalkv, eigen, care, got 'stra'",
        "seed: must be a whole number, got true",
        "batch: must be at least 1, got 0",
        "model.trust_remote_code: unknown key; the nearest is model.revision",
        "budget.ratio: must be above 1, got 0.5",
        "budget: give exactly one of ratio, bytes_per_token, fit, got ratio and fit",
        "budget.fit: must be TOKENS@MEMORY such as 32k@8GiB, got '32q@1'",
        "data: expected a section of keys, got 3",
        "start.kyes: unknown key; the nearest is start.keys",
        "start.slack: must be 0 or at least 1, got 0.5",
        "start.skip_layers: must be a list of whole numbers, got [0, 'a']",
        "optim.lr: must be a number, got 'fast'",
        "optim.beta1: must be at least 0 and below 1, got 1",
        "optim.gamma: must be a number, got inf",
        "optim.checkpointing: must be true or false, got 1",
    ]


def test_a_single_fault_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        parse({"budget": {"ratio": 2}, "steps": -1})
    assert str(caught.value) == "r.yaml: 1 fault: steps: must be at least 0, got -1"


@pytest.mark.parametrize("budget", [None, {}, {"batch": 2}])
def test_a_budget_is_needed(budget: Any) -> None:
    assert "budget: give exactly one of ratio, bytes_per_token, fit, got none" in faults(
        {"budget": budget}
    )


def test_rank_steps_cannot_exceed_steps() -> None:
    assert faults({"budget": {"ratio": 2}, "steps": 5, "rank_steps": 6}) == [
        "rank_steps: 6 of steps 5 cannot learn ranks; set at most 5"
    ]


@pytest.mark.parametrize("content", [[1], "text", 3])
def test_a_recipe_is_a_mapping(content: Any) -> None:
    with pytest.raises(UserError, match="a recipe is a mapping of keys"):
        parse(content)


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(UserError, match="written by a newer starkv"):
        parse({"schema": 2, "budget": {"ratio": 2}})


def test_numbers_beyond_floats_are_refused() -> None:
    assert (
        "optim.lr: must be a number"
        in faults({"budget": {"ratio": 2}, "optim": {"lr": float("nan")}})[0]
    )


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "tokens", "size"),
    [
        ("32k@8GiB", 32 * 1024, 8 * 2**30),
        ("1M@1.5GB", 2**20, 1_500_000_000),
        ("4096 @ 512MiB", 4096, 2**29),
    ],
)
def test_fit(fit: str, tokens: int, size: int) -> None:
    budget = parse({"budget": {"fit": fit, "batch": 3}}).budget
    assert (budget.fit_tokens, budget.fit_bytes, budget.batch) == (tokens, size, 3)


@pytest.mark.parametrize("fit", ["32k", "k@8GiB", "32k@8", "0k@8GiB", "32k@0GiB", "-1@8GiB", ""])
def test_bad_fit(fit: str) -> None:
    assert faults({"budget": {"fit": fit}})[-1].startswith("budget.fit: must be")


def test_batch_belongs_to_fit() -> None:
    assert faults({"budget": {"ratio": 2, "batch": 2}}) == [
        "budget.batch: only with fit; the batch of a training step is batch"
    ]


# --- overrides -----------------------------------------------------------------------------------


def test_overrides() -> None:
    r = parse(
        {"budget": {"fit": "32k@8GiB", "batch": 2}},
        "ratio=3",
        "optim.lr=2e-5",
        "skip_layers=[0, -1]",
        "name=some/model",
        "batch=8",
        "config=null",
        "method=paper",
    )
    assert r.budget == recipe_module.BudgetSection(ratio=3.0)
    assert r.optim.lr == 2e-5
    assert r.start.skip_layers == (0, -1)
    assert r.model.name == "some/model"
    assert r.batch == 8
    assert r.optim.gate_slope == 50


def test_the_last_budget_override_wins() -> None:
    budget = parse({"budget": {"ratio": 2}}, "ratio=3", "bytes_per_token=1024").budget
    assert (budget.ratio, budget.bytes_per_token) == (None, 1024)


def test_override_of_a_section_that_is_not_one() -> None:
    assert faults({"budget": 4, "data": None}, "ratio=3", "length=64") == [
        "budget: expected a section of keys, got 4"
    ]


def test_overrides_do_not_change_the_mapping_given() -> None:
    content = {"budget": {"ratio": 2}}
    parse(content, "ratio=3", "length=64")
    assert content == {"budget": {"ratio": 2}}


def test_a_bare_name_of_two_sections_is_ambiguous() -> None:
    assert faults({"budget": {"ratio": 2}}, "sequences=8") == [
        "--set sequences=8: sequences is ambiguous; write data.sequences or start.sequences"
    ]


def test_malformed_override_value() -> None:
    assert "not valid YAML" in faults({"budget": {"ratio": 2}}, "skip_layers=[0")[0]


# --- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("method", ["star", "paper"])
def test_resolved_recipe_loads_as_itself(name: str, method: str, tmp_path: Path) -> None:
    r = load_recipe(name, [f"method={method}"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(r.to_dict(), sort_keys=False))
    assert load_recipe(path) == r


def test_resolved_recipe_shows_every_key() -> None:
    shown = parse({"budget": {"ratio": 2}}).to_dict()
    assert set(shown["start"]) == {f.name for f in dataclasses.fields(StartSection)}
    assert set(shown["optim"]) == {f.name for f in dataclasses.fields(OptimSection)}
    assert shown["budget"] == {"ratio": 2.0}
    assert shown["start"]["skip_layers"] == []


# --- finding -------------------------------------------------------------------------------------


def test_shipped_recipes() -> None:
    assert set(recipe_names()) >= {
        "tiny",
        "longchat",
        "llama-2-7b",
        "llama-3.1-8b-instruct",
        "mistral-7b-instruct",
        "qwen2.5-0.5b",
        "qwen3-0.6b",
        "paper/longchat",
        "paper/llama-2-7b",
    }


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_open_with_needs_and_the_line_that_runs_them(name: str) -> None:
    text = find_recipe(name).read_text()
    head = text[: text.index("\nmethod:")]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    assert "# Needs:" in head
    assert f"starkv calibrate --recipe {name}\n" in head + "\n"


@pytest.mark.parametrize("name", ["paper/longchat", "paper/llama-2-7b"])
def test_paper_recipes(name: str) -> None:
    r = load_recipe(name)
    assert r.method == "paper"
    assert (r.rank_steps * r.batch, (r.steps - r.rank_steps) * r.batch) == (3000, 1000)
    # LLaMA-2's context ends at 4096.
    assert r.data.length == (4096 if name == "paper/llama-2-7b" else 8192)
    assert r.data.source == "HuggingFaceFW/fineweb-edu"
    assert (r.optim.lr, r.optim.threshold_lr, r.optim.gate_slope, r.optim.gamma) == (
        2e-5,
        1e-2,
        50,
        0.1,
    )
    assert r.start.skip_layers == (0, 1, -1)


def test_a_name_and_a_path_find_the_same_recipe() -> None:
    path = Path(__file__).parents[2] / "recipes" / "longchat.yaml"
    assert load_recipe("longchat") == load_recipe(str(path))
    assert load_recipe("longchat").budget.ratio == 4
    assert recipe_label(path) == recipe_label("longchat") == "longchat"
    assert recipe_label("paper/longchat") == "paper-longchat"


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(
        UserError, match="longchta: no recipe of that name; the nearest is longchat"
    ):
        load_recipe("longchta")


def test_missing_empty_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(UserError, match="empty; it needs at least a budget"):
        load_recipe(tmp_path / "empty.yaml")
    (tmp_path / "bad.yaml").write_text("budget: {ratio: 2\nsteps: 3\n")
    with pytest.raises(UserError, match=r"bad.yaml, line 2, column \d+: not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
