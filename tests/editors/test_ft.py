"""Fine-tuning against the literal loop: one forward a prompt, through the whole model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import reference, tiny
from editors import EditRequest, dense
from editors.ft import Ft, FtConfig
from editors.sites import SITES, sites_for
from harness.models import edit_in_float32

MODEL_TYPES = ("gpt2", "gptj", "llama", "qwen3")
LAYERS = (1, 3)


def start(model, tokenizer, **fields):  # type: ignore[no-untyped-def]
    def covariance(layer: int) -> Tensor:
        raise AssertionError("fine-tuning reads no covariance")

    editor = Ft(FtConfig(**{"layers": LAYERS, "steps": 4, "learning_rate": 5e-3} | fields))
    assert editor.statistics() == ()
    return editor.start(model, tokenizer, covariance=covariance, seed=0)


def batches(size: int = 3) -> Iterator[list[EditRequest]]:
    requests = tiny.tiny_requests(3 * size)
    yield from (requests[i : i + size] for i in range(0, 3 * size, size))


def weights(model) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"objective": "target_new", "minibatch": 2, "weight_decay": 0.1},
        {"norm_constraint": 4e-3, "minibatch": 1},
        {"objective": "target_new", "stop_loss": 6.0, "minibatch": 2, "steps": 12},
    ],
    ids=["plain", "decay", "constrained", "stops"],
)
def test_three_batches_equal_the_literal_loop(model_type: str, fields: dict[str, Any]) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    model, other = (tiny.tiny_model(model_type, dtype=torch.float64) for _ in range(2))
    fields = {"steps": 4, "minibatch": 64} | fields
    editing = start(model, tokenizer, layers=(2,), learning_rate=1e-2, **fields)
    for batch in batches():
        deltas = editing.edit(batch)
        expected = reference.ft_batch(other, tokenizer, batch, layer=2, lr=1e-2, **fields)
        assert set(deltas) == set(expected)
        for name, delta in deltas.items():
            torch.testing.assert_close(dense(delta), expected[name], rtol=1e-6, atol=1e-9)
        assert (1 < editing.notes()["epochs"] < fields["steps"]) == ("stop_loss" in fields)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_several_layers_are_trained_together(model_type: str) -> None:
    """Three edits in minibatches of two and one; the notes weight their losses so."""
    tokenizer, batch = tiny.tiny_tokenizer(bos=True), next(batches())
    model, other = (tiny.tiny_model(model_type, dtype=torch.float64) for _ in range(2))
    editing = start(model, tokenizer, steps=3, minibatch=2)
    deltas = editing.edit(batch)
    before = weights(other)
    trained = [other.get_parameter(name) for name in deltas]
    assert len({name.split(".")[2] for name in deltas}) == 2
    adam = torch.optim.Adam(trained, lr=5e-3)
    mean = 0.0
    for i in range(6):
        part = [batch[:2], batch[2:]][i % 2]
        loss = sum(reference.target_nll(other, tokenizer, one, "prompt_last").mean() for one in part)
        mean += loss.item() / 3 if i >= 4 else 0
        adam.zero_grad()
        (loss / len(part)).backward()
        adam.step()
    for name, value in zip(deltas, trained, strict=True):
        torch.testing.assert_close(deltas[name], value.detach() - before[name], rtol=1e-6, atol=1e-9)
    assert editing.notes() == {"epochs": 3, "mean_loss": pytest.approx(mean, rel=1e-9)}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_deltas_are_what_changed_and_nothing_else_is_touched(model_type: str) -> None:
    model, tokenizer = tiny.tiny_model(model_type), tiny.tiny_tokenizer(bos=False)
    editing = start(model, tokenizer)
    model.train()
    model.get_parameter(sites_for(model).weight_name(4)).requires_grad_(False)
    takes = {name: value.requires_grad for name, value in model.named_parameters()}
    for batch in batches():
        before = weights(model)
        deltas = editing.edit(batch)
        after = weights(model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(deltas) == set(Ft(editing.config).parameters(sites_for(model)))
        assert all(torch.equal(before[name] + deltas[name], after[name]) for name in deltas)
    assert model.training
    assert takes == {name: value.requires_grad for name, value in model.named_parameters()}
    assert all(value.grad is None for value in model.parameters())


def test_weights_that_take_no_gradient_are_trained_and_left_so() -> None:
    model, tokenizer = tiny.tiny_model("llama").requires_grad_(False), tiny.tiny_tokenizer(bos=True)
    with torch.no_grad():
        deltas = start(model, tokenizer).edit(next(batches()))
    assert all(delta.abs().max() > 0 for delta in deltas.values())
    assert not any(value.requires_grad for value in model.parameters())


def test_dropout_plays_no_part() -> None:
    tokenizer, found = tiny.tiny_tokenizer(bos=True), []
    for training in (False, True):
        model = tiny.tiny_model("gpt2").train(training)
        assert model.config.resid_pdrop > 0
        found.append(start(model, tokenizer).edit(next(batches())))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_bias_is_trained_where_the_architecture_has_one() -> None:
    names = lambda kind: Ft(FtConfig(layers=(2, 4))).parameters(SITES[kind])
    assert names("llama") == ("model.layers.2.mlp.down_proj.weight", "model.layers.4.mlp.down_proj.weight")
    at = "transformer.h.{}.mlp.c_proj"
    assert names("gpt2") == tuple(f"{at.format(i)}.{kind}" for i in (2, 4) for kind in ("weight", "bias"))
    base = {"a": torch.zeros(2)}
    released, notes = Ft(FtConfig(layers=(1,))).released(base, {"a": torch.ones(2)})
    assert released["a"].sum() == 2 and notes == {}


def test_the_norm_constraint_holds_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step itself goes beyond the limit, what a forward sees never does; each batch starts anew."""
    limit = 1e-3
    model, tokenizer = tiny.tiny_model("gpt2", dtype=torch.float64), tiny.tiny_tokenizer(bos=True)
    editing = start(model, tokenizer, norm_constraint=limit, minibatch=1)
    names = Ft(editing.config).parameters(sites_for(model))
    before: dict[str, Tensor] = {}
    seen: list[float] = []
    stepped: list[float] = []

    def moved() -> float:
        return max((model.get_parameter(n) - before[n]).abs().max().item() for n in names)

    step = torch.optim.Adam.step

    def noted(self: torch.optim.Adam) -> None:
        seen.append(moved())
        step(self)
        stepped.append(moved())

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    for batch in batches():
        before = weights(model)
        seen.clear()
        deltas = editing.edit(batch)
        assert seen[0] == 0 and len(seen) == 12
        assert max(seen) <= limit * (1 + 1e-9) and max(stepped) > 1.1 * limit
        assert max(delta.abs().max().item() for delta in deltas.values()) <= limit * (1 + 1e-9)
    assert max(stepped) > limit


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_objectives_agree_for_one_token_alone(tokens: int) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    length = lambda request: len(tokenizer(f" {request.target_new}", add_special_tokens=False)["input_ids"])
    requests = [request for request in tiny.tiny_requests(9) if length(request) == tokens]
    assert len(requests) == 3
    ends = []
    for objective in ("prompt_last", "target_new"):
        model = tiny.tiny_model("llama", dtype=torch.float64)
        ends.append(start(model, tokenizer, objective=objective).edit(requests))
    near = [torch.allclose(ends[0][name], ends[1][name], rtol=1e-6, atol=1e-9) for name in ends[0]]
    assert all(near) if tokens == 1 else not any(near)


def test_it_stops_at_a_low_loss_and_says_so() -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=True)
    told: list[tuple[str, int, int]] = []
    config = FtConfig(layers=LAYERS, steps=60, learning_rate=2e-2, objective="target_new", stop_loss=0.1)
    editing = Ft(config).start(
        model, tokenizer, covariance=lambda layer: torch.empty(0), seed=0,
        progress=lambda *at: told.append(at),
    )  # fmt: skip
    assert editing.notes() == {}
    batch = next(batches())
    editing.edit(batch)
    notes = editing.notes()
    assert 2 < notes["epochs"] < 60 and notes["mean_loss"] < 0.1
    assert told == [("epochs", i, 60) for i in [*range(1, notes["epochs"]), 60]]
    # Below the stop loss from the start: one epoch and no step.
    deltas = editing.edit(batch)
    assert editing.notes()["epochs"] == 1
    assert not any(delta.any() for delta in deltas.values())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_edit_raises_the_targets_probability(model_type: str) -> None:
    model, tokenizer = tiny.tiny_model(model_type), tiny.tiny_tokenizer(bos=False)
    batch = next(batches())
    likely = lambda request: torch.exp(-reference.target_nll(model, tokenizer, request)).detach()
    before = [likely(request) for request in batch]
    start(model, tokenizer, steps=25, objective="target_new").edit(batch)
    for request, earlier in zip(batch, before, strict=True):
        assert (likely(request) > 2 * earlier).all()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_bfloat16_model_is_trained_in_float32(model_type: str) -> None:
    tokenizer, batch = tiny.tiny_tokenizer(bos=True), next(batches())
    found, notes = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.tiny_model(model_type, dtype=torch.bfloat16).to(dtype)
        names = Ft(FtConfig(layers=LAYERS)).parameters(sites_for(model))
        edit_in_float32(model, list(names))
        before = weights(model)
        editing = start(model, tokenizer, objective="target_new", learning_rate=1e-4, steps=3)
        deltas = editing.edit(batch)
        after = weights(model)
        for name, delta in deltas.items():
            assert delta.dtype == after[name].dtype == torch.float32
            assert torch.equal(before[name] + delta, after[name])
        assert all(torch.equal(before[n], after[n]) for n in before if n not in deltas)
        found.append(torch.cat([delta.flatten() for delta in deltas.values()]))
        notes.append(editing.notes())
    # Adam's steps are the gradient's signs; where the gradient is not near zero they are the same.
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.9
    assert notes[0]["mean_loss"] == pytest.approx(notes[1]["mean_loss"], rel=0.02)


def test_equal_runs_give_equal_bytes_and_a_stream_goes_on() -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    first, second, third = batches()
    model, other = tiny.tiny_model("qwen3"), tiny.tiny_model("qwen3")
    one, two = start(model, tokenizer), start(other, tokenizer)
    for batch in (first, second):
        a, b = one.edit(batch), two.edit(batch)
        assert all(torch.equal(a[name], b[name]) for name in a)
    again = start(other, tokenizer)
    again.restore(two.state())
    a, b = one.edit(third), again.edit(third)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_passes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, batch = tiny.tiny_tokenizer(bos=True), tiny.tiny_requests(6)
    found = []
    for most in (1024, 40, 1):
        monkeypatch.setattr("editors.answers.PASS_TOKENS", most)
        model = tiny.tiny_model("llama", dtype=torch.float64)
        found.append(start(model, tokenizer, objective="target_new", minibatch=4).edit(batch))
    for other in found[1:]:
        for name, delta in found[0].items():
            torch.testing.assert_close(other[name], delta, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("how", ["loss", "update", "other"])
def test_a_failed_batch_is_undone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False)
    editing = start(model, tokenizer)
    step = torch.optim.Adam.step
    steps = 0

    def breaks(self: torch.optim.Adam) -> None:
        nonlocal steps
        step(self)
        steps += 1
        if how == "other" and steps == 2:
            raise RuntimeError("out of memory")
        if (how, steps) in {("loss", 2), ("update", 4)}:
            model.get_parameter("transformer.h.3.mlp.c_proj.bias").data[0] = float("nan")

    monkeypatch.setattr(torch.optim.Adam, "step", breaks)
    before = weights(model)
    kind = RuntimeError if how == "other" else FloatingPointError
    words = {"loss": "loss of epoch 3 is not finite.*undone", "update": "c_proj.bias is not finite.*undone"}
    with pytest.raises(kind, match=words.get(how, "memory")):
        editing.edit(next(batches()))
    assert steps == (4 if how == "update" else 2)
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", ()), ("layers", (3, 2)), ("steps", 0), ("learning_rate", 0.0), ("weight_decay", -1.0),
     ("norm_constraint", 0.0), ("objective", "target_old"), ("stop_loss", -0.1), ("minibatch", 0)],
)  # fmt: skip
def test_config_names_the_wrong_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        FtConfig(**{"layers": (1,), field: value})


def test_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[7\].*0 to 4"):
        start(tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False), layers=(1, 7))
