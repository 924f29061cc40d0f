"""Batched target values against the one-by-one loop."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks import reference, tiny
from editors import EditRequest
from editors.contexts import Contexts
from editors.targets import TargetConfig, optimise_targets

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


def test_passes_and_pools_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("qwen2", dtype=torch.float64), tiny.tiny_tokenizer(bos=False)
    requests, config = tiny.tiny_requests(6), TargetConfig(layers=(2,), steps=6)
    whole = optimise_targets(model, tokenizer, requests, CONTEXTS, config)
    monkeypatch.setattr("editors.targets.STEP_TOKENS", 5)
    monkeypatch.setattr("editors.targets.POOL", 4)
    parts = optimise_targets(model, tokenizer, requests, CONTEXTS, config)
    torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=1e-12)


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
