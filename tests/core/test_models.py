"""Loading and adapters: what the spec says is what the live model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from starkv_core.errors import UserError
from starkv_core.models.family import FAMILIES
from starkv_core.models.load import _source, fingerprint, inspect, load
from tests import models
from tests.standin import byte_tokenizer

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 12345.0},
    **models.SCALED_ROPES,
}


def live_model(family: str, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(models.config(family, vocab_size=258, **changes))


def save(folder: Path, family: str = "llama", *, dtype: Any = None, **changes: Any) -> Path:
    """A random model of a family as a folder with a tokenizer."""
    live = live_model(family, **changes)
    (live if dtype is None else live.to(dtype)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refusal(name: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(str(name), device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(name))
    return message


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", models.CONFIGS)
def test_spec_of_every_family(family: str) -> None:
    loaded = models.model(family)
    spec, attention = loaded.spec, loaded.family.attentions(loaded.model)
    assert spec.family == family
    assert (spec.n_layers, spec.n_heads, spec.hidden, spec.head_dim) == (3, 4, 48, 16)
    assert spec.n_kv_heads == {"llama": 4, "mistral": 1, "qwen2": 2, "qwen3": 2}[family]
    assert spec.group * spec.n_kv_heads == 4
    assert spec.qk_norm == (family == "qwen3")
    assert spec.dense_reasons == {}
    assert len(attention) == 3
    for module in attention:
        assert module.k_proj.weight.shape == (spec.kv_width, spec.hidden)
        assert (module.k_proj.bias is not None) == (family == "qwen2")
        assert (loaded.family.key_norm(module) is not None) == (family == "qwen3")
    assert spec.dense_bytes_per_token == 3 * 2 * spec.kv_width * 2


@pytest.mark.parametrize("family", models.CONFIGS)
def test_queries_are_the_models_own(family: str) -> None:
    """The adapter's queries, rotated, score as transformers' eager attention does."""
    loaded = models.model(family)
    module = loaded.family.attentions(loaded.model)[0]
    hidden = torch.randn(1, 9, 48)
    with torch.no_grad():
        q = loaded.family.queries(module, hidden, 16)
        k = module.k_proj(hidden).view(1, 9, -1, 16)
        norm = loaded.family.key_norm(module)
        if norm is not None:
            k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + norm[1]) * norm[0]
        k = k.transpose(1, 2).repeat_interleave(loaded.spec.group, 1)
        cos, sin = loaded.spec.rope.tables(0, 9, torch.device("cpu"))

        def rotated(x: torch.Tensor) -> torch.Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat((-b, a), -1) * sin

        scores = (rotated(q) @ rotated(k).transpose(2, 3) / 4.0).masked_fill(
            torch.ones(9, 9).triu(1).bool(), -torch.inf
        )
        loaded.model.config._attn_implementation = "eager"
        mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e30)
        tables = loaded.model.model.rotary_emb(hidden, torch.arange(9)[None])
        _, probabilities = module(hidden, tables, mask[None, None])
    torch.testing.assert_close(scores.softmax(-1), probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", models.CONFIGS)
@pytest.mark.parametrize("rope", ROPES)
def test_rope_equals_transformers_tables(family: str, rope: str) -> None:
    """Trap 7: theta, scaling and yarn's attention factor come from the model."""
    loaded = models.model(family, rope_parameters=ROPES[rope])
    found = loaded.spec.rope
    assert found.kind == rope
    assert (found.scaling != 1.0) == (rope == "yarn")
    cos, sin = found.tables(3, 400, torch.device("cpu"))
    wanted_cos, wanted_sin = loaded.model.model.rotary_emb(
        torch.zeros(1, 1, 1), torch.arange(3, 400)[None]
    )
    # transformers forms angles in float32: at 400 rad one rounding is 3e-5.
    torch.testing.assert_close(cos, wanted_cos[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(sin, wanted_sin[0], rtol=0, atol=5e-5)


def test_rope_of_a_16_bit_model_is_not_rounded(folder: Path) -> None:
    exact = load(str(folder), device="cpu", dtype="float32").spec.rope.inv_freq
    assert torch.equal(load(str(folder), device="cpu", dtype="bfloat16").spec.rope.inv_freq, exact)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "frequencies change"),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            },
            "frequencies switch",
        ),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
            "partial_rotary_factor 0.5",
        ),
    ],
)
def test_refused_rope(folder: Path, tmp_path: Path, rope: dict[str, Any], reason: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    message = refusal(edit_config(copy, rope_parameters=rope, rope_scaling=None))
    assert reason in message
    if rope["rope_type"] != "default":
        assert "supported: default, linear, llama3, yarn" in message


def test_refused_bias_under_a_norm(tmp_path: Path) -> None:
    assert "attention_bias" in refusal(save(tmp_path / "m", "qwen3", attention_bias=True))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi3"])
def test_refused_architecture(folder: Path, tmp_path: Path, kind: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    message = refusal(edit_config(copy, model_type=kind, architectures=None))
    assert f"architecture {kind!r} is not supported" in message
    assert message.endswith("supported: " + ", ".join(f.model_type for f in FAMILIES))


def test_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    assert "no-such-kind" in refusal(edit_config(copy, model_type="no-such-kind"))


def test_code_beside_a_model_is_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run folder may name any model: opening it must not run what somebody put there."""
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    ran = tmp_path / "ran"
    (copy / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nModel = Config\n")
    both = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    monkeypatch.setattr("builtins.input", None)  # nor is anybody asked whether it may
    edit_config(copy, auto_map=both)
    load(str(copy), device="cpu")
    inspect(str(copy))
    assert "no usable model config" in refusal(edit_config(copy, model_type="no-such-kind"))
    assert not ran.exists()


def test_refused_quantised_weights(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert "quantised base weights" in refusal(copy)


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such model folder" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["./m", "/m", "~/m", "a/b/c", "runs/m"])
def test_a_path_is_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(HfApi, "model_info", None)
    assert "no such model folder" in refusal(name)


@pytest.mark.parametrize("online", [True, False])
def test_an_unreachable_hub_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, online: bool
) -> None:
    """transformers would try for half a minute, with a line on stderr for every attempt."""
    asked = []

    def model_info(self: Any, name: str, **options: Any) -> None:
        asked.append(name)
        raise RuntimeError("no route\nto the hub")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not online)
    message = refusal("no-such-owner/model")
    assert "no such folder, and the hub could not be reached (no route); download" in message
    assert asked == ["no-such-owner/model"]
    said = [r.getMessage() for r in caplog.records if r.name == "starkv_core.models.load"]
    asking = "no-such-owner/model: no such folder; asking the Hugging Face hub for it"
    assert said == ([asking] if online else [])


def test_a_cached_model_needs_no_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repo = tmp_path / "models--owner--model"
    shutil.copytree(folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(HfApi, "model_info", None)  # calling it fails, as a dead line does
    assert _source("owner/model", None)[2]["local_files_only"]


def test_names_that_are_no_hub_ids() -> None:
    assert "not the form of a hub id" in refusal("a model: 1e5")


def test_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    message = refusal(tmp_path / "m")
    assert message.endswith("m: neither a run (manifest.json) nor a model (config.json)")
    (tmp_path / "m" / "manifest.json").touch()
    assert "m: a run, and a model is wanted" in refusal(tmp_path / "m")


def test_malformed_config(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    (copy / "config.json").write_text('{"model_type": "llama", ')
    assert "no usable model config" in refusal(copy)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert "safetensors weights" in refusal(copy)


def test_truncated_weights(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot load it" in refusal(copy)


def test_missing_tokenizer(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (copy / name).unlink(missing_ok=True)
    assert "tokenizer" in refusal(copy)


def test_device_and_device_map_exclude_each_other(folder: Path) -> None:
    with pytest.raises(UserError, match="device and device_map exclude each other"):
        load(str(folder), device="cpu", device_map="auto")


def test_unknown_dtype_and_device(folder: Path) -> None:
    with pytest.raises(UserError, match="dtype 'int3': use auto, bfloat16, float16, float32"):
        load(str(folder), device="cpu", dtype="int3")
    with pytest.raises(UserError, match="device 'no-such-device'"):
        load(str(folder), device="no-such-device")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda': no GPU"):
            load(str(folder), device="cuda")


# --- what loads ----------------------------------------------------------------------------------


def test_fingerprint_knows_weights_not_dtypes(folder: Path, tmp_path: Path) -> None:
    found = {
        dtype: load(str(folder), device="cpu", dtype=dtype) for dtype in ("bfloat16", "float32")
    }
    assert found["bfloat16"].dtype == torch.bfloat16
    assert found["bfloat16"].fingerprint == found["float32"].fingerprint
    live = found["float32"].model
    assert fingerprint(live) == found["float32"].fingerprint
    name, parameter = sorted(live.named_parameters())[-2]
    with torch.no_grad():
        parameter.view(-1)[0] += 0.5
    assert fingerprint(live) != found["float32"].fingerprint, name
    other = save(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    assert load(str(other), device="cpu").fingerprint != found["float32"].fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = load(str(save(tmp_path / "m", dtype=dtype)), device="cpu")
    assert loaded.dtype == torch.float32  # on a CPU, where 16-bit products are slow
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training


def test_shards_and_tied_embeddings(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", tie_word_embeddings=True)
    loaded = load(str(whole), device="cpu")
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    shards = tmp_path / "shards"
    loaded.model.save_pretrained(shards, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(shards)
    assert len(list(shards.glob("*.safetensors"))) > 1
    again = load(str(shards), device="cpu")
    assert again.fingerprint == loaded.fingerprint
    ids = models.ids(1, 12)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


def test_missing_shard(tmp_path: Path) -> None:
    live = live_model("llama")
    live.save_pretrained(tmp_path, max_shard_size="50KB")
    byte_tokenizer().save_pretrained(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    assert "cannot load it" in refusal(tmp_path)


def test_missing_tensor(folder: Path, tmp_path: Path) -> None:
    """Weights that a checkpoint lacks would be random: that is no model to compress."""
    copy = Path(shutil.copytree(folder, tmp_path / "m"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.self_attn.k_proj.weight" in refusal(copy)


@pytest.mark.parametrize("family", models.CONFIGS)
def test_inspect_equals_the_live_spec(tmp_path: Path, family: str) -> None:
    path = save(tmp_path / "m", family, rope_parameters=ROPES["yarn"])
    spec, count = inspect(str(path))
    live = load(str(path), device="cpu")
    assert count == sum(p.numel() for p in live.model.parameters())
    assert torch.equal(spec.rope.inv_freq, live.spec.rope.inv_freq)
    assert (spec.rope.kind, spec.rope.scaling) == (live.spec.rope.kind, live.spec.rope.scaling)
    plain = {k: v for k, v in vars(spec).items() if k != "rope"}
    assert plain == {k: v for k, v in vars(live.spec).items() if k != "rope"}


def test_inspect_of_the_embedded_model() -> None:
    spec, count = inspect(None)
    live = load(None, device="cpu")
    assert count == sum(p.numel() for p in live.model.parameters())
    assert spec.dense_bytes_per_token == live.spec.dense_bytes_per_token
