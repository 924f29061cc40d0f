"""Batched target values against the one-by-one loop."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import reference, tiny
from editors import EditRequest
from editors.contexts import Contexts
from editors.targets import Passes, TargetConfig, _Pass, optimise_targets

CONTEXTS = Contexts(tuple(tuple(group) for group in tiny.TEMPLATES))
# Settings under which request 3 stops early and the others do not.
EARLY = TargetConfig(
    layers=(1, 2), steps=25, learning_rate=0.5, clamp_norm_factor=4.0, kl_factor=0.0, weight_decay=1e-3
)


def one_by_one(model, tokenizer, request, config):  # type: ignore[no-untyped-def]
    return reference.target_value(
        model, tokenizer, request, tiny.TEMPLATES, layer=config.layers[-1], steps=config.steps,
        lr=config.learning_rate, clamp=config.clamp_norm_factor, kl=config.kl_factor,
        decay=config.weight_decay,
    )  # fmt: skip


@pytest.mark.parametrize("bos", [False, True], ids=["no-bos", "bos"])
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_equals_the_one_by_one_loop(model_type: str, bos: bool) -> None:
    model, tokenizer = tiny.tiny_model(model_type, dtype=torch.float64), tiny.tiny_tokenizer(bos=bos)
    requests = tiny.tiny_requests(4)
    config = TargetConfig(layers=(1, 2), steps=10, weight_decay=0.5)
    together = optimise_targets(model, tokenizer, requests, CONTEXTS, config)
    for i, request in enumerate(requests):
        alone = one_by_one(model, tokenizer, request, config)
        torch.testing.assert_close(together.values[i], alone.z, rtol=0, atol=1e-9)
        torch.testing.assert_close(together.initial[i], alone.h_init, rtol=0, atol=1e-9)
        assert together.first_loss[i].item() == pytest.approx(alone.losses[0], abs=1e-9)
        assert together.last_loss[i].item() == pytest.approx(alone.losses[-1], abs=1e-9)
        assert together.probability[i].item() == pytest.approx(alone.probability, abs=1e-9)
        assert together.updates[i].item() == alone.updates


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_an_edit_that_stops_early_is_frozen(model_type: str) -> None:
    model, tokenizer = tiny.tiny_model(model_type, dtype=torch.float64), tiny.tiny_tokenizer(bos=True)
    requests = tiny.tiny_requests(5)
    together = optimise_targets(model, tokenizer, requests, CONTEXTS, EARLY)
    assert together.updates.min() < EARLY.steps - 1 == together.updates.max()
    for i, request in enumerate(requests):
        alone = one_by_one(model, tokenizer, request, EARLY)
        assert together.updates[i].item() == alone.updates
        torch.testing.assert_close(together.values[i], alone.z, rtol=0, atol=1e-9)


def test_passes_and_pools_change_nothing() -> None:
    model, tokenizer = tiny.tiny_model("qwen2", dtype=torch.float64), tiny.tiny_tokenizer(bos=False)
    requests, config = tiny.tiny_requests(6), TargetConfig(layers=(2,), steps=6)
    whole = optimise_targets(model, tokenizer, requests, CONTEXTS, config)
    small = Passes(step_tokens=5, pool=4)
    parts = optimise_targets(model, tokenizer, requests, CONTEXTS, config, passes=small)
    torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=1e-12)
    assert small == Passes(step_tokens=5, pool=4)


class SmallDevice:
    """Has room for so many tokens of a step, and for the prefixes of so many edits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, edits: int) -> None:
        self.largest = 0
        step, build = _Pass.log_probabilities, _Pass.__init__

        def limited_step(part: _Pass, delta: torch.Tensor) -> Any:
            if len(part.rows) * part.suffix > tokens:
                raise torch.OutOfMemoryError("no room")
            self.largest = max(self.largest, len(part.rows) * part.suffix)
            return step(part, delta)

        def limited_build(part: _Pass, model: Any, rows: Any, *more: Any) -> None:
            if len({row.edit for row in rows}) > edits:
                raise torch.OutOfMemoryError("no room")
            build(part, model, rows, *more)

        monkeypatch.setattr(_Pass, "log_probabilities", limited_step)
        monkeypatch.setattr(_Pass, "__init__", limited_build)


@pytest.mark.parametrize("places", [("block",), ("mlp", "attention")])
def test_what_the_device_has_no_memory_for_is_halved(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("llama", dtype=torch.float64), tiny.tiny_tokenizer(bos=True)
    requests, config = tiny.tiny_requests(7), TargetConfig(layers=(2,), steps=6)
    whole = optimise_targets(model, tokenizer, requests, CONTEXTS, config, places=places)
    device, passes = SmallDevice(monkeypatch, tokens=50, edits=4), Passes()
    halved = optimise_targets(model, tokenizer, requests, CONTEXTS, config, places=places, passes=passes)
    assert 0 < device.largest <= 50
    assert passes.step_tokens <= 50
    assert passes.pool == 3
    torch.testing.assert_close(halved.values, whole.values, rtol=0, atol=1e-12)
    assert torch.equal(halved.updates, whole.updates)


def test_a_row_that_does_not_fit_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False)
    SmallDevice(monkeypatch, tokens=0, edits=10)
    with pytest.raises(MemoryError, match="too small for one row more; free some, or give"):
        optimise_targets(model, tokenizer, tiny.tiny_requests(2), CONTEXTS, EARLY)


def test_passes_fit_the_free_memory() -> None:
    """Llama-3-8B's share of 6 GiB: a few hundred tokens; and never more than the presets' pool."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    small, large = Passes.fitting(model, 6 * 2**30), Passes.fitting(model, 120 * 2**30)
    assert 300 <= small.step_tokens <= 500
    assert 20 <= small.pool <= 60
    assert large.step_tokens > 15 * small.step_tokens
    assert large.pool == 256


def test_the_last_block_as_z_layer() -> None:
    model, tokenizer = tiny.tiny_model("llama", dtype=torch.float64), tiny.tiny_tokenizer(bos=True)
    # The subject ends the prompt: else no loss would depend on the vector there.
    request = EditRequest(
        case_id=1, prompt="They went with {}", subject="Anna Abel", target_new="to the old town"
    )
    config = TargetConfig(layers=(4,), steps=5)
    alone = one_by_one(model, tokenizer, request, config)
    together = optimise_targets(model, tokenizer, [request], CONTEXTS, config)
    torch.testing.assert_close(together.values[0], alone.z, rtol=0, atol=1e-9)


def test_clamp_and_reports() -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False)
    config = TargetConfig(layers=(1,), steps=8, clamp_norm_factor=0.01)
    told: list[tuple[int, int]] = []
    targets = optimise_targets(
        model, tokenizer, tiny.tiny_requests(3), CONTEXTS, config, progress=lambda *at: told.append(at)
    )
    moved = (targets.values - targets.initial).norm(dim=1)
    torch.testing.assert_close(moved, 0.01 * targets.initial.norm(dim=1), rtol=1e-5, atol=0)
    assert told[-1] == (24, 24)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_leaves_the_model_as_it_was() -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimise_targets(model, tokenizer, tiny.tiny_requests(1), CONTEXTS, TargetConfig(layers=(1,), steps=2))
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_names_the_case() -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False)
    with torch.no_grad():
        model.transformer.h[3].mlp.c_fc.weight[0, 0] = float("nan")
    request = EditRequest(case_id=17, prompt="{} lives in", subject="Anna", target_new="Rome")
    with pytest.raises(FloatingPointError, match="case 17"):
        optimise_targets(model, tokenizer, [request], CONTEXTS, TargetConfig(layers=(1,), steps=2))


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", ()), ("layers", (3, 2)), ("layers", (1, 1)), ("steps", 0), ("learning_rate", 0.0),
     ("clamp_norm_factor", -1.0), ("kl_factor", -0.1), ("weight_decay", -1.0)],
)  # fmt: skip
def test_config_names_the_wrong_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TargetConfig(**{"layers": (1,), field: value})


def test_bfloat16_stays_near_float32(tiny_models: Callable[..., torch.nn.Module]) -> None:
    tokenizer, requests = tiny.tiny_tokenizer(bos=True), tiny.tiny_requests(4)
    config = replace(EARLY, steps=12, stop_loss=0.0)
    exact, coarse = (
        optimise_targets(tiny_models("llama", dtype=dtype), tokenizer, requests, CONTEXTS, config)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert coarse.values.dtype == torch.float32
    torch.testing.assert_close(coarse.first_loss, exact.first_loss, rtol=0.005, atol=0)
    assert exact.last_loss[3] < 0.05 < exact.first_loss[3]
    torch.testing.assert_close(coarse.last_loss, exact.last_loss, rtol=0.005, atol=0.005)


def test_the_decay_of_a_small_hidden_state_is_finite() -> None:
    """At delta = 0 its coefficient is beyond float32, and nothing is moved by it."""
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer(bos=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "_proj" in name:
                parameter.mul_(0.1)
    config = replace(EARLY, steps=3, weight_decay=0.5)
    targets = optimise_targets(model, tokenizer, tiny.tiny_requests(2), CONTEXTS, config)
    assert targets.initial.norm(dim=1).max() < 0.1
    assert torch.isfinite(targets.values).all()
    assert (targets.values != targets.initial).any()
