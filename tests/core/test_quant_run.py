"""`starkv quantize` as a function: budgets met, runs opened as made, bad input refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import starkv_core.quant.run as quant_run
from starkv_core.artifacts import read_manifest, read_yaml, write_manifest, write_yaml_atomic
from starkv_core.errors import RunFailure, UserError
from starkv_core.quant.artifact import QUANT, TENSORS
from starkv_core.quant.layer import QuantLayer
from starkv_core.quant.run import BitBudget, QuantizeResult, quantize_run
from starkv_core.quant.scheme import make_scheme
from starkv_core.run import FACTORS, Subject, open_subject
from tests.standin import TEXT, save_model, save_run

SMALL = make_scheme(window=8, sinks=2)
CONTEXT = 1024
DENSE = 2 * 2 * 24 * 2  # layers, sides, kv width, bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quant")
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return save_run(folder / "run", save_model(folder / "model"), text)


@dataclass
class Made:
    """A quantisation and its layers, as they were in memory."""

    result: QuantizeResult
    layers: dict[int, QuantLayer]


@pytest.fixture(autouse=True)
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_run, "_CHECK_TOKENS", 40)


def quantised(
    run: Path, out: Path | None, budget: BitBudget, scheme: Any = SMALL, **rest: Any
) -> Made:
    kept: dict[int, QuantLayer] = {}
    original = quant_run._write

    def write(*arguments: Any) -> None:
        kept.update(arguments[4])
        original(*arguments)

    quant_run._write = write
    try:
        result = quantize_run(run, scheme, budget, out=out, device="cpu", **rest)
    finally:
        quant_run._write = original
    return Made(result, kept)


def outputs(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt of 20 and of every token after it."""
    held, found = subject.new_cache(), []
    with torch.no_grad(), subject.active() as model:
        for part in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
            found.append(model(part, past_key_values=held, use_cache=True).logits)
    return torch.cat(found, 1)


def kl_to_base(run: Path) -> float:
    """Nats a token on the calibration text, whose prompts attend to codes."""
    subject = open_subject(str(run), device="cpu").with_prefill("coded")
    ids = torch.tensor(subject.tokenizer(TEXT)["input_ids"][:2048]).view(-1, 64)
    with torch.no_grad():
        exact = subject.model(ids).logits.log_softmax(-1)
        with subject.active() as model:
            cache = subject.new_cache()
            logits = model(ids, past_key_values=cache, use_cache=True).logits.log_softmax(-1)
    return float((exact.exp() * (exact - logits)).sum(-1).mean())


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        (BitBudget(ratio=4.0, context=CONTEXT), DENSE * CONTEXT / 4),
        (BitBudget(ratio=7.0, context=CONTEXT), DENSE * CONTEXT / 7),
        (BitBudget(bytes_per_token=40.0, context=CONTEXT), 40 * CONTEXT),
        (BitBudget(fit=(600, 30 * 1024)), 30 * 1024),
    ],
    ids=["ratio 4", "ratio 7", "bytes", "fit"],
)
def test_budgets_are_met_within_a_step(
    run: Path, tmp_path: Path, budget: BitBudget, limit: float
) -> None:
    made = quantised(run, tmp_path / "out", budget, force=True)
    result, tokens = made.result, budget.fit[0] if budget.fit else CONTEXT
    assert result.context == tokens
    assert result.predicted_bytes == result.measured_bytes <= limit
    # What would be the next step: one more bit for all of a block of 16 channels (or, where
    # channels are still dropped, two bits and their rows in 16 bits), at every allocated slot.
    slots = -(-tokens // 512) * 512
    full = all(
        layer["keys"] == layer["values"] == 8.0 for layer in result.layers if layer is not None
    )
    assert full or limit - result.measured_bytes < slots * 16 * 4 / 8 + 16 * 2 * 10
    assert result.ratio == pytest.approx(DENSE * tokens / result.measured_bytes)

    # The bytes again, from the live tensors of an opened run that has really read so many tokens.
    subject = open_subject(str(tmp_path / "out"), device="cpu")
    held = subject.new_cache()
    with torch.no_grad(), subject.active() as model:
        model.model(torch.randint(0, 200, (1, tokens)), past_key_values=held, use_cache=True)
    assert held.nbytes == result.measured_bytes
    assert all(count == tokens for count in held.latent_tokens())


def test_mean_bits_are_those_asked_for(run: Path, tmp_path: Path) -> None:
    for bits in (3.0, 5.0):
        made = quantised(run, tmp_path / f"{bits}", BitBudget(bits=bits), force=True)
        spent = [s.codec.layout for x in made.layers.values() for s in (x.keys, x.values)]
        coded = sum(layout.tile_bytes for layout in spent) / 512 * 8
        ranks = open_subject(str(run), device="cpu").ranks
        latents = sum(layer.total for layer in ranks.layers)
        assert coded / latents <= bits  # padding counted
        assert made.result.bits == pytest.approx(
            sum(int(layout.bits().sum()) for layout in spent) / latents
        )


@pytest.mark.parametrize("name", ["star", "row", "paper"])
def test_an_opened_run_is_the_one_in_memory(run: Path, tmp_path: Path, name: str) -> None:
    scheme = {
        "star": SMALL,
        "row": make_scheme(window=0, sinks=1, scales="row", prefill="coded"),
        "paper": make_scheme("paper"),
    }[name]
    budget = BitBudget() if name == "paper" else BitBudget(ratio=5.0, context=CONTEXT)
    made = quantised(run, tmp_path / "out", budget, scheme, force=True)
    opened = open_subject(str(tmp_path / "out"), device="cpu")
    exact = open_subject(str(run), device="cpu")
    in_memory = replace(
        exact,
        ranks=opened.ranks,
        weights={i: layer.weights(torch.float32) for i, layer in made.layers.items()},
    )
    ids = torch.randint(0, 200, (2, 60), generator=torch.Generator().manual_seed(0))
    assert torch.equal(outputs(opened, ids), outputs(in_memory, ids))
    assert not torch.equal(outputs(opened, ids), outputs(exact, ids))
    unquantised = open_subject(str(tmp_path / "out"), device="cpu", quantised=False)
    assert torch.equal(outputs(unquantised, ids), outputs(exact, ids))
    document = read_yaml(tmp_path / "out" / QUANT)
    assert document["scheme"] == scheme.to_dict()
    assert document["predicted"]["bytes"] == made.result.predicted_bytes


def test_coded_prefill_is_decoding_token_by_token(run: Path, tmp_path: Path) -> None:
    scheme = replace(SMALL, prefill="coded")
    quantised(run, tmp_path / "out", BitBudget(ratio=5.0, context=CONTEXT), scheme, force=True)
    subject = open_subject(str(tmp_path / "out"), device="cpu")
    ids = torch.randint(0, 200, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), subject.active() as model:
        whole = model(ids, past_key_values=subject.new_cache(), use_cache=True).logits
        held, steps = subject.new_cache(), []
        for token in ids.split(1, dim=1):
            steps.append(model(token, past_key_values=held, use_cache=True).logits)
    assert torch.allclose(whole, torch.cat(steps, 1), atol=2e-2, rtol=1e-2)


def test_in_place_it_adds_two_files_and_is_refused_the_second_time(
    run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    before = listing(own)
    budget = BitBudget(ratio=5.0, context=CONTEXT)
    quantised(own, None, budget, force=True)
    after = listing(own)
    assert after.keys() - before.keys() == {QUANT, TENSORS}
    assert {n for n in before if before[n] != after[n]} == {"manifest.json"}
    files = read_manifest(own)["files"]
    assert {QUANT, TENSORS} <= files.keys()

    with pytest.raises(UserError, match="already quantised"):
        quantize_run(own, SMALL, budget, device="cpu")
    with pytest.raises(UserError, match="already quantised"):
        quantize_run(own, SMALL, budget, device="cpu", out=tmp_path / "copy")
    assert listing(own) == after and not (tmp_path / "copy").exists()

    other = BitBudget(ratio=4.0, context=CONTEXT)
    made = quantised(own, None, other, force=True, replace_existing=True)
    opened = open_subject(str(own), device="cpu")
    assert opened.ranks.layers == tuple(layer.ranks for layer in made.layers.values())
    assert listing(own)[QUANT] != after[QUANT]


def test_a_broken_result_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quant_run, "KL_LIMIT", 1e-9)
    before = listing(run)
    budget = BitBudget(ratio=5.0, context=CONTEXT)
    for out in (None, tmp_path / "out"):
        with pytest.raises(RunFailure, match="nothing was written.*--force"):
            quantize_run(run, SMALL, budget, device="cpu", out=out)
    assert listing(run) == before
    assert list(tmp_path.iterdir()) == []
    assert quantised(run, tmp_path / "out", budget, force=True).result.kl > 1e-9


def test_the_kl_is_that_of_the_logits(run: Path, tmp_path: Path) -> None:
    made = quantised(run, tmp_path / "out", BitBudget(ratio=5.0, context=CONTEXT), force=True)
    exact, coded = (open_subject(str(f), device="cpu") for f in (run, tmp_path / "out"))
    rows = quant_run.calibration_tokens(
        quant_run.load_recipe(run / "recipe.yaml"), exact.tokenizer
    )[:2, :40]
    assert made.result.kl_tokens == rows.numel()
    logs = []
    for subject in (exact, coded):
        held, found = subject.new_cache(), []
        with torch.no_grad(), subject.active() as model:
            for token in rows.split(1, dim=1):
                found.append(model(token, past_key_values=held, use_cache=True).logits)
        logs.append(torch.cat(found, 1).double().log_softmax(-1))
    wanted = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert made.result.kl == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": BitBudget(ratio=60.0, context=CONTEXT)}, ["below the floor of", "ratio"]),
        ({"budget": BitBudget(bytes_per_token=1.0)}, ["below the floor"]),
        ({"budget": BitBudget(fit=(512, 1000))}, ["below the floor"]),
        ({"budget": BitBudget(context=4096)}, ["context 4096", "1024"]),
        ({"scheme": make_scheme(window=1024)}, ["window 1024", "context of 1024"]),
        ({"scheme": make_scheme(sinks=5000)}, ["sinks 5000", "context of 1024"]),
        ({"scheme": make_scheme("paper"), "budget": BitBudget(bits=3.0)}, ["paper", "--bits"]),
        ({"recover_steps": -1}, ["recover-steps -1"]),
        ({"out": "."}, ["already exists"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    run: Path, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    before = listing(run)
    arguments = {"scheme": SMALL, "budget": BitBudget(), "out": tmp_path / "out", **options}
    with pytest.raises(UserError) as caught:
        quantize_run(
            run, arguments.pop("scheme"), arguments.pop("budget"), device="cpu", **arguments
        )
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert listing(run) == before and not (tmp_path / "out").exists()


def test_the_floor_it_names_can_be_met(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        quantize_run(run, SMALL, BitBudget(bytes_per_token=1.0, context=CONTEXT), device="cpu")
    least = float(str(caught.value).partition("floor of ")[2].partition(" ")[0])
    budget = BitBudget(bytes_per_token=least + 0.1, context=CONTEXT)
    made = quantised(run, tmp_path / "out", budget, force=True)
    assert made.result.measured_bytes == pytest.approx(least * CONTEXT, abs=0.1 * CONTEXT)


@pytest.mark.parametrize(
    "arguments",
    [
        {"bits": 3.0, "ratio": 4.0},
        {"ratio": 4.0, "bytes_per_token": 10.0, "fit": (1, 1)},
        {"fit": (512, 1000), "context": 512},
        {"bits": 9.0},
        {"bits": 0.0},
        {"ratio": 1.0},
        {"bytes_per_token": 0.0},
        {"context": 0},
    ],
)
def test_impossible_budgets(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        BitBudget(**arguments)


# --- damaged files ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    quantised(run, out, BitBudget(ratio=5.0, context=CONTEXT), force=True)
    return out


def _edited(finished: Path, tmp_path: Path, change: Any) -> Path:
    """A copy whose quant.yaml has been changed by hand, its checksum in order."""
    folder = tmp_path / "edited"
    shutil.copytree(finished, folder)
    document = read_yaml(folder / QUANT)
    change(document)
    write_yaml_atomic(folder / QUANT, document)
    write_manifest(folder, read_manifest(folder), [QUANT])
    return folder


def _five_bits(document: Any) -> None:
    document["layers"][1]["values"] = {5: 12}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(schema=2), ["newer starkv", "schema 2"]),
        (_five_bits, ["layer 1", "5 bits cannot be packed"]),
        (lambda d: d["layers"][0].update(values={4: -1}), ["layer 0", "-1 channels"]),
        (lambda d: d["layers"][0].update(keys=[]), ["layer 0", "channels by bits"]),
        (lambda d: d["layers"][0].update(values={4: 100}), ["damaged", "layer 0"]),
        (lambda d: d["scheme"].update(name="other"), ["malformed"]),
        (lambda d: d.pop("layers"), ["layers must be a list"]),
        (lambda d: d["layers"].pop(), ["quant.yaml: 1 layers"]),
    ],
)
def test_a_changed_quant_yaml_is_refused_in_one_line(
    finished: Path, tmp_path: Path, change: Any, words: list[str]
) -> None:
    folder = _edited(finished, tmp_path, change)
    with pytest.raises(UserError) as caught:
        open_subject(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_files_that_do_not_belong_together_are_refused(finished: Path, tmp_path: Path) -> None:
    for name, words in ((QUANT, "edited or damaged"), (TENSORS, "altered or damaged")):
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        with open(folder / name, "ab") as file:
            file.write(b"\n# edited\n")
        with pytest.raises(UserError, match=words):
            open_subject(str(folder), device="cpu")
    folder = tmp_path / "exported"
    shutil.copytree(finished, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][FACTORS] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="other factors"):
        open_subject(str(folder), device="cpu")


def test_a_kill_before_the_manifest_leaves_an_unquantised_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    import starkv_core.quant.artifact as artifact

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        quantize_run(own, SMALL, BitBudget(ratio=5.0, context=CONTEXT), device="cpu", force=True)
    assert (own / QUANT).is_file()
    opened = open_subject(str(own), device="cpu")
    assert all(weights.codes is None for weights in opened.weights.values())


# --- recovery --------------------------------------------------------------------------------


def test_recovery_brings_the_quantised_model_closer_to_the_base(run: Path, tmp_path: Path) -> None:
    scheme = make_scheme(window=0, sinks=1)
    budget = BitBudget(ratio=6.5, context=CONTEXT)
    made = quantised(run, tmp_path / "out", budget, scheme, force=True, recover_steps=30)
    assert len(made.result.recovery) == 30
    quantised(run, tmp_path / "as it is", budget, scheme, force=True)
    before, after = (kl_to_base(tmp_path / name) for name in ("as it is", "out"))
    assert after < 0.96 * before  # 2.005 and 1.851 nats; steps of so few tokens differ by a fifth
    assert made.result.measured_bytes <= DENSE * CONTEXT / 6.5
    opened = open_subject(str(tmp_path / "out"), device="cpu")
    ids = torch.randint(0, 200, (1, 30))
    exact = open_subject(str(run), device="cpu")
    in_memory = replace(
        exact,
        ranks=opened.ranks,
        weights={i: layer.weights(torch.float32) for i, layer in made.layers.items()},
    )
    assert torch.equal(outputs(opened, ids), outputs(in_memory, ids))
