"""UltraEdit against its literal form, with the moments of all features kept and d_in x d_in solves."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import reference, tiny
from editors import EditRequest, LowRank, dense
from editors.sites import SITES, sites_for
from editors.ultraedit import Moments, UltraEdit, UltraEditConfig, ridge_shift
from harness.models import edit_in_float32

MODEL_TYPES = ("gpt2", "gptj", "llama", "qwen3")
GATED = ("llama", "qwen3")


def fields(model_type: str) -> dict[str, object]:
    gate = {"gate_layers": (1, 2)} if model_type in GATED else {}
    return gate | {"up_layers": (2, 3), "down_layers": (1, 4), "learning_rate": 1e-3}


def start(model, tokenizer, **changed):  # type: ignore[no-untyped-def]
    def covariance(layer: int) -> Tensor:
        raise AssertionError("UltraEdit reads no covariance")

    editor = UltraEdit(UltraEditConfig(**(fields(model.config.model_type) | changed)))
    assert editor.statistics() == ()
    return editor.start(model, tokenizer, covariance=covariance, seed=0)


def batches(size: int = 3) -> Iterator[list[EditRequest]]:
    requests = tiny.tiny_requests(3 * size)
    yield from (requests[i : i + size] for i in range(0, 3 * size, size))


def weights(model) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("shared", "size", "d_ff"), [(True, 3, 48), (False, 3, 48), (True, 3, 32), (True, 27, 48)],
    ids=["shared", "own", "square", "many"],
)  # fmt: skip
def test_three_batches_equal_the_literal_form(model_type: str, shared: bool, size: int, d_ff: int) -> None:
    """``many``: more answer tokens than d_in, which takes the other side of the solve."""
    tokenizer = tiny.tiny_tokenizer(bos=True)
    model, other = (tiny.tiny_model(model_type, dtype=torch.float64, d_ff=d_ff) for _ in range(2))
    editing = start(model, tokenizer, shared_statistics=shared, ridge=0.5)
    names = UltraEdit(editing.config).parameters(sites_for(model))
    history = reference.FeatureHistory()
    for batch in batches(size):
        deltas = editing.edit(batch)
        expected = reference.ultraedit_batch(
            other, tokenizer, batch, modules=[name.removesuffix(".weight") for name in names],
            state=history, learning_rate=1e-3, ridge=0.5, shared=shared,
        )  # fmt: skip
        assert set(deltas) == set(expected)
        assert (editing.notes()["answer_tokens"] > 48) == (size == 27)
        for name, change in expected.items():
            torch.testing.assert_close(dense(deltas[name]), change, rtol=1e-6, atol=1e-9)
            norm = editing.notes()["shift_norms"][name]
            assert norm == pytest.approx(change.norm().item(), rel=1e-6) and norm > 0


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("size", [2, 12, 27])
def test_deltas_are_what_changed_and_nothing_else_is_touched(model_type: str, size: int) -> None:
    """Low-rank where it takes fewer numbers than the weight has."""
    model, tokenizer = tiny.tiny_model(model_type), tiny.tiny_tokenizer(bos=False)
    editing = start(model, tokenizer)
    model.train()
    model.get_parameter(sites_for(model).weight_name(4)).requires_grad_(False)
    takes = {name: value.requires_grad for name, value in model.named_parameters()}
    for batch in batches(size):
        before = weights(model)
        with torch.no_grad():
            deltas = editing.edit(batch)
        after = weights(model)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(deltas) == set(UltraEdit(editing.config).parameters(sites_for(model)))
        rank = editing.notes()["answer_tokens"]
        for name, delta in deltas.items():
            assert torch.equal(before[name] + dense(delta), after[name])
            assert dense(delta).dtype == torch.float32
            assert isinstance(delta, LowRank) == (rank * (32 + 48) < 32 * 48) == (size == 2)
            if isinstance(delta, LowRank):
                assert delta.left.shape[1] == rank
    assert model.training
    assert takes == {name: value.requires_grad for name, value in model.named_parameters()}
    assert all(value.grad is None for value in model.parameters())


def test_dropout_plays_no_part() -> None:
    tokenizer, found = tiny.tiny_tokenizer(bos=True), []
    for training in (False, True):
        model = tiny.tiny_model("gpt2").train(training)
        assert model.config.resid_pdrop > 0
        found.append(start(model, tokenizer).edit(next(batches())))
    assert all(torch.equal(dense(found[0][name]), dense(found[1][name])) for name in found[0])


def test_parameters_layers_and_what_an_architecture_lacks() -> None:
    config = UltraEditConfig(gate_layers=(3,), up_layers=(1, 3), down_layers=(2, 3))
    assert config.layers == (1, 2, 3)
    at = "model.layers.{}.mlp.{}_proj.weight"
    assert UltraEdit(config).parameters(SITES["llama"]) == tuple(
        at.format(*one) for one in [(1, "up"), (2, "down"), (3, "gate"), (3, "up"), (3, "down")]
    )
    with pytest.raises(ValueError, match=r"gate_layers is \[3\].*leave it empty"):
        UltraEdit(config).parameters(SITES["gpt2"])
    with pytest.raises(ValueError, match="up_layers"):
        UltraEdit(UltraEditConfig(up_layers=(1,))).parameters(SITES["phi3"])
    released, notes = UltraEdit(config).released({"a": torch.zeros(2)}, {"a": torch.ones(2)})
    assert released["a"].sum() == 2 and notes == {}


@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_moments_join_to_those_of_all_rows(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [100 + torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in sizes]
    moments = Moments.of(parts[0])
    for part in parts[1:]:
        moments = moments.joined(Moments.of(part))
    every = torch.cat(parts)
    assert moments.count == len(every)
    torch.testing.assert_close(moments.mean, every.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        moments.squares / len(every), every.var(0, unbiased=False), rtol=1e-9, atol=1e-12
    )


@given(st.integers(0, 10_000), st.sampled_from([1, 3, 4, 11, 12, 13, 30]))
@settings(max_examples=25, deadline=None)
def test_both_sides_of_the_solve_agree(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 12, generator=generator, dtype=torch.float64)
    values = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    shift = ridge_shift(inputs, values, 0.3)
    assert isinstance(shift, LowRank) == (n * 17 < 60)
    direct = (
        torch.linalg.inv(inputs.T @ inputs + 0.3 * torch.eye(12, dtype=torch.float64)) @ inputs.T @ values
    )
    torch.testing.assert_close(dense(shift), direct, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_edit_raises_the_targets_probability(model_type: str) -> None:
    model, tokenizer = tiny.tiny_model(model_type), tiny.tiny_tokenizer(bos=False)
    batch = next(batches(4))
    loss = lambda request: reference.target_nll(model, tokenizer, request).mean().item()
    before = [loss(request) for request in batch]
    start(model, tokenizer).edit(batch)
    for request, earlier in zip(batch, before, strict=True):
        assert loss(request) < earlier - 0.1


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_bfloat16_model_is_edited_in_float32(model_type: str) -> None:
    tokenizer, found = tiny.tiny_tokenizer(bos=True), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.tiny_model(model_type, dtype=torch.bfloat16).to(dtype)
        editor = UltraEdit(UltraEditConfig(**fields(model_type)))
        edit_in_float32(model, list(editor.parameters(sites_for(model))))
        editing = start(model, tokenizer)
        for batch in batches():
            before = weights(model)
            deltas = editing.edit(batch)
            after = weights(model)
            for name, delta in deltas.items():
                assert dense(delta).dtype == after[name].dtype == torch.float32
                assert torch.equal(before[name] + dense(delta), after[name])
            assert all(torch.equal(before[n], after[n]) for n in before if n not in deltas)
            found.append(torch.cat([dense(delta).flatten() for delta in deltas.values()]))
        assert all(value.dtype == torch.float64 for value in editing.state().values())
    assert torch.nn.functional.cosine_similarity(found[0], found[3], dim=0) > 0.98


@pytest.mark.parametrize("shared", [True, False])
def test_equal_runs_give_equal_bytes_and_a_restored_stream_goes_on(shared: bool) -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    first, second, third = batches()
    model, other = tiny.tiny_model("llama"), tiny.tiny_model("llama")
    one, two = (start(m, tokenizer, shared_statistics=shared) for m in (model, other))
    for batch in (first, second):
        a, b = one.edit(batch), two.edit(batch)
        assert all(torch.equal(dense(a[name]), dense(b[name])) for name in a)
    state = {name: value.clone() for name, value in two.state().items()}
    fresh = tiny.tiny_model("llama")
    fresh.load_state_dict(other.state_dict())
    again = start(other, tokenizer, shared_statistics=shared)
    again.restore(state)
    forgetful = start(fresh, tokenizer, shared_statistics=shared).edit(third)
    a, b = one.edit(third), again.edit(third)
    assert all(torch.equal(dense(a[name]), dense(b[name])) for name in a)
    assert not any(torch.equal(dense(a[name]), dense(forgetful[name])) for name in a)
    assert all(torch.equal(value, again.state()[name]) for name, value in one.state().items())


def test_passes_change_nothing_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, requests = tiny.tiny_tokenizer(bos=True), tiny.tiny_requests(6)
    found = []
    for most in (1024, 40, 1):
        monkeypatch.setattr("editors.answers.PASS_TOKENS", most)
        model = tiny.tiny_model("llama", dtype=torch.float64)
        editing = start(model, tokenizer)
        told: list[tuple[str, int, int]] = []
        editing.progress = lambda *at, told=told: told.append(at)
        found.append(editing.edit(requests))
        assert [at for at in told if at[0] == "updates"] == [("updates", i, 6) for i in range(1, 7)]
    assert [at for at in told if at[0] == "gradients"] == [("gradients", i, 6) for i in range(1, 7)]
    for other in found[1:]:
        for name, delta in found[0].items():
            torch.testing.assert_close(dense(other[name]), dense(delta), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("how", ["features", "update", "other"])
def test_a_failed_batch_is_undone_with_its_moments(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer(bos=False)
    editing = start(model, tokenizer)
    first, second, _ = batches()
    editing.edit(first)
    before, state = weights(model), editing.state()
    if how == "features":
        broken = model.model.layers[3].mlp.down_proj.weight
        with torch.no_grad():
            broken[0, 0] = before["model.layers.3.mlp.down_proj.weight"][0, 0] = float("nan")
    else:
        calls = 0

        def breaks(inputs: Tensor, values: Tensor, ridge: float) -> Tensor | LowRank:
            nonlocal calls
            calls += 1
            if calls == 4 and how == "other":
                raise RuntimeError("out of memory")
            return ridge_shift(inputs, values * (float("inf") if calls == 4 else 1), ridge)

        monkeypatch.setattr("editors.ultraedit.ridge_shift", breaks)
    kind, words = {
        "features": (FloatingPointError, "is not finite; the batch is undone"),
        "update": (FloatingPointError, "up_proj.weight is not finite; the batch is undone"),
        "other": (RuntimeError, "out of memory"),
    }[how]
    with pytest.raises(kind, match=words):
        editing.edit(second)
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(value, editing.state()[name]) for name, value in state.items())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"down_layers": ()}, "gate_layers, up_layers, down_layers are all empty"),
     ({"up_layers": (3, 2)}, "up_layers"), ({"gate_layers": (-1,)}, "gate_layers"),
     ({"down_layers": (1, 1)}, "down_layers"), ({"learning_rate": 0.0}, "learning_rate"),
     ({"ridge": 0.0}, "ridge")],
)  # fmt: skip
def test_config_names_the_wrong_field(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UltraEditConfig(**({"down_layers": (1,)} | changed))


def test_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[7\].*0 to 4"):
        start(tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False), up_layers=(1, 7))
