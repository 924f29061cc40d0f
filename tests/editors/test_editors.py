"""What every editor owes: the shared suite, and the editors against literal one-by-one updates."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import reference, tiny
from editors import EDITORS, EditRequest, LowRank, dense
from editors.api import Covariance
from editors.closed_form import ClosedFormEditor
from editors.contexts import Contexts, sample_contexts, sample_rome_contexts
from editors.linalg import null_space

LAYERS = (1, 2, 3)
CONTEXTS = Contexts(tuple(tuple(group) for group in tiny.TEMPLATES))
ROME_CONTEXTS = Contexts((CONTEXTS.templates,))
CLOSED = sorted(name for name, (_, kind) in EDITORS.items() if issubclass(kind, ClosedFormEditor))
LAMBDA = 50.0
MEMIT = {"layers": LAYERS, "steps": 5, "covariance_weight": LAMBDA}
FIELDS: dict[str, dict[str, Any]] = {
    "rome": {"layers": (2,), "steps": 5},
    "r-rome": {"layers": (2,), "steps": 5},
    "memit": MEMIT,
    "memit-seq": MEMIT,
    "memit+blue": MEMIT | {"layers": (1, 3)},
    "emmet": MEMIT,
    "pmet": MEMIT,
    "rect": MEMIT,
    "prune": MEMIT,
    "alphaedit": {"layers": LAYERS, "steps": 5, "ridge": 0.1},
    "alphaedit+blue": {"layers": (1, 3), "steps": 5, "ridge": 0.1},
    "ft": {"layers": (2,), "steps": 3},
    "ultraedit": {"down_layers": (2, 3)},
}


def covariance(layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    samples = torch.randn(200, 48, generator=generator, dtype=torch.float64)
    samples *= torch.logspace(0, -2, 48, dtype=torch.float64)
    return samples.T @ samples / 200


def stream(name, model, tokenizer, **fields):  # type: ignore[no-untyped-def]
    config, kind = EDITORS[name]
    started = kind(config(**FIELDS[name] | fields)).start(model, tokenizer, covariance=covariance, seed=0)
    started.contexts = ROME_CONTEXTS if "rome" in name else CONTEXTS
    return started


def batches() -> Iterator[list[EditRequest]]:
    requests = tiny.tiny_requests(9)
    yield from (requests[i : i + 3] for i in range(0, 9, 3))


def weights(model) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(params=sorted(EDITORS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_deltas_are_what_changed_and_undo_it(name: str, model_type: str) -> None:
    model, tokenizer = tiny.tiny_model(model_type), tiny.tiny_tokenizer(bos=True)
    editing = stream(name, model, tokenizer)
    before = weights(model)
    for batch in batches():
        start = weights(model)
        deltas = editing.edit(batch)
        after = weights(model)
        changed = {n for n in start if not torch.equal(start[n], after[n])}
        assert changed == set(deltas)
        for n, delta in deltas.items():
            assert torch.equal(start[n] + dense(delta), after[n])
            assert n in EDITORS[name][1](editing.config).parameters(editing.sites)
    for n in changed:
        assert not torch.equal(before[n], after[n])
        torch.testing.assert_close(after[n] - dense(deltas[n]), start[n])


def test_equal_seeds_agree(name: str) -> None:
    ends = []
    for _ in range(2):
        model = tiny.tiny_model("qwen2")
        editing = stream(name, model, tiny.tiny_tokenizer(bos=False))
        for batch in batches():
            editing.edit(batch)
        ends.append(weights(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_a_restored_stream_goes_on_bit_for_bit(name: str) -> None:
    first, second, third = batches()
    tokenizer = tiny.tiny_tokenizer(bos=True)
    model = tiny.tiny_model("llama")
    editing = stream(name, model, tokenizer)
    editing.edit(first)
    editing.edit(second)
    between, state = weights(model), {n: value.clone() for n, value in editing.state().items()}
    expected = editing.edit(third)

    other = tiny.tiny_model("llama")
    again = stream(name, other, tokenizer)
    again.restore(state)
    with torch.no_grad():
        for n, value in other.named_parameters():
            value.copy_(between[n])
    found = again.edit(third)
    assert all(torch.equal(dense(expected[n]), dense(found[n])) for n in expected)


class Stopping:
    """A checkpoint in memory that stops the batch once it has so many parts."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.at = 0

    def load(self, part: str) -> dict[str, Tensor] | None:
        return self.parts.get(part)

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        assert part not in self.parts
        self.parts[part] = {n: tensor.clone() for n, tensor in tensors.items()}
        if len(self.parts) == self.at:
            raise KeyboardInterrupt


def test_a_stopped_batch_goes_on_from_its_parts_bit_for_bit(name: str) -> None:
    first, second, _ = batches()
    tokenizer = tiny.tiny_tokenizer(bos=True)
    model = tiny.tiny_model("llama")
    editing = stream(name, model, tokenizer)
    editing.edit(first)
    before = weights(model)
    whole = Stopping()
    expected = editing.edit(second, whole)
    state = editing.state()
    assert len(whole.parts) == {"ft": 0, "ultraedit": 0}.get(
        name, 3 if "rome" in name else 4 if "+blue" in name else 1 + len(LAYERS)
    )

    model = tiny.tiny_model("llama")
    again = stream(name, model, tokenizer)
    again.edit(first)
    checkpoint = Stopping()
    for checkpoint.at in range(1, len(whole.parts) + 1):
        with pytest.raises(KeyboardInterrupt):
            again.edit(second, checkpoint)
        assert all(torch.equal(before[n], value) for n, value in weights(model).items())
    found = again.edit(second, checkpoint)
    assert all(torch.equal(dense(expected[n]), dense(found[n])) for n in expected)
    assert all(torch.equal(value, state[n]) for n, value in again.state().items())


@pytest.mark.parametrize("name", CLOSED)
def test_an_update_that_explodes_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False)
    editing = stream(name, model, tokenizer)
    solve = editing.solve
    monkeypatch.setattr(editing, "solve", lambda layer, keys: solve(layer, keys) * 1e12)
    if "rome" in name:  # its change does not depend on the length of what it solves for
        monkeypatch.setattr(
            editing, "_low_rank", lambda *args: LowRank(torch.full((48, 1), 1e5), torch.full((1, 32), 1e5))
        )
    before = weights(model)
    with pytest.raises(FloatingPointError, match="times as large as the weight; the batch is undone"):
        editing.edit(next(batches()))
    assert all(torch.equal(before[n], value) for n, value in weights(model).items())


@pytest.mark.parametrize("name", CLOSED)
def test_a_failed_batch_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=False)
    editing = stream(name, model, tokenizer)
    solve, last = editing.solve, editing.config.layers[-1]
    monkeypatch.setattr(
        editing, "solve", lambda layer, keys: solve(layer, keys) * (float("nan") if layer == last else 1)
    )
    before = weights(model)
    with pytest.raises(FloatingPointError, match="undone"):
        editing.edit(next(batches()))
    assert all(torch.equal(before[n], value) for n, value in weights(model).items())


def literal(name: str, moment: Covariance) -> Callable[..., dict[str, Tensor]]:
    """The literal update of one batch: (model, tokenizer, requests) -> changes. Holds the method's memory."""
    fields = FIELDS[name]
    settings = reference.TargetSettings(
        steps=5, lr=0.5, clamp=4.0 if "rome" in name else 0.75, kl=0.0625, decay=0.5
    )
    memory = reference.KeyMemory()
    projectors = lambda layer: reference.nullspace_projector(moment(layer), 2e-2)
    shared: dict[str, Any] = {"layers": fields["layers"], "settings": settings}
    weighted = shared | {"covariances": moment, "weight": LAMBDA}
    projected = shared | {"projectors": projectors, "ridge": 0.1, "memory": memory}
    one = {"layer": 2, "covariance": moment(2), "use_covariance": True, "settings": settings}
    batch, more = {
        "memit": (reference.memit_batch, weighted),
        "memit-seq": (reference.memit_seq_batch, weighted | {"memory": memory}),
        "memit+blue": (reference.blue_memit_batch, weighted),
        "emmet": (reference.emmet_batch, weighted),
        "pmet": (reference.pmet_batch, weighted),
        "prune": (reference.memit_batch, weighted),
        "rect": (reference.rect_batch, weighted),
        "alphaedit": (reference.alphaedit_batch, projected),
        "alphaedit+blue": (reference.blue_alphaedit_batch, projected),
        "rome": (reference.rome_batch, one | {"robust": False}),
        "r-rome": (reference.rome_batch, one | {"robust": True}),
    }[name]
    templates: Any = ROME_CONTEXTS.templates if "rome" in name else tiny.TEMPLATES
    return lambda model, tokenizer, requests: batch(model, tokenizer, requests, templates, **more)


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
@pytest.mark.parametrize("square", [False, True], ids=["oblong", "square"])
def test_three_batches_equal_the_literal_updates(name: str, model_type: str, square: bool) -> None:
    """Float64; the literal form forms C_p and solves d_in x d_in systems, one forward a prompt."""
    d_ff = 32 if square else 48
    tokenizer = tiny.tiny_tokenizer(bos=True)
    model, other = (tiny.tiny_model(model_type, dtype=torch.float64, d_ff=d_ff) for _ in range(2))
    moment = lambda layer: covariance(layer)[:d_ff, :d_ff]
    config, kind = EDITORS[name]
    editing = kind(config(**FIELDS[name])).start(model, tokenizer, covariance=moment, seed=0)
    editing.contexts = ROME_CONTEXTS if "rome" in name else CONTEXTS
    expected = literal(name, moment)
    for batch in batches():
        deltas = editing.edit(batch)
        changes = expected(other, tokenizer, batch)
        for n, delta in deltas.items():
            torch.testing.assert_close(dense(delta), changes[n].double(), rtol=1e-6, atol=1e-9)


def test_memit_seq_equals_memit_on_the_first_batch_and_not_on_the_second() -> None:
    tokenizer = tiny.tiny_tokenizer(bos=True)
    plain, sequential = (tiny.tiny_model("llama") for _ in range(2))
    one, other = stream("memit", plain, tokenizer), stream("memit-seq", sequential, tokenizer)
    first, second, _ = batches()
    a, b = one.edit(first), other.edit(first)
    assert all(torch.equal(dense(a[n]), dense(b[n])) for n in a)
    a, b = one.edit(second), other.edit(second)
    assert not any(torch.equal(dense(a[n]), dense(b[n])) for n in a)


def test_alphaedit_changes_nothing_outside_its_null_space() -> None:
    model = tiny.tiny_model("llama", dtype=torch.float64)
    editing = stream("alphaedit", model, tiny.tiny_tokenizer(bos=True))
    for batch in batches():
        for n, delta in editing.edit(batch).items():
            layer = int(n.split(".")[2])
            change = dense(delta)
            torch.testing.assert_close(null_space(covariance(layer), 2e-2).project(change.T).T, change)


def test_alphaedit_without_a_null_space_says_so() -> None:
    editing = stream(
        "alphaedit", tiny.tiny_model("gpt2"), tiny.tiny_tokenizer(bos=True), nullspace_threshold=1e-9
    )
    with pytest.raises(ValueError, match="nullspace_threshold"):
        editing.edit(next(batches()))


def test_contexts_are_short_seeded_and_leave_the_random_state_alone() -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer(bos=True)
    state = torch.get_rng_state()
    contexts = sample_contexts(model, tokenizer, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert contexts == sample_contexts(model, tokenizer, seed=0) != sample_contexts(model, tokenizer, seed=1)
    assert contexts.templates[0] == "{}" and len(contexts.templates) == 6
    assert sum(contexts.weights) == pytest.approx(1)
    for template in contexts.templates[1:]:
        assert template.count("{}") == 1 and template.endswith(". {}")
        assert tiny.BOS not in template and tiny.EOS not in template


def test_rome_contexts_are_one_group_of_two_lengths() -> None:
    model, tokenizer = tiny.tiny_model("llama"), tiny.tiny_tokenizer(bos=False)
    contexts = sample_rome_contexts(model, tokenizer, seed=0)
    assert len(contexts.groups) == 1 and len(contexts.templates) == 21
    assert contexts.weights == (1 / 21,) * 21
    lengths = [len(tokenizer(text.removesuffix(". {}"))["input_ids"]) for text in contexts.templates[1:]]
    assert sum(lengths[:10]) < sum(lengths[10:])
    assert len(set(contexts.templates)) > 11  # the two continuations of a start differ


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"prompt": "no place"}, "0 places"), ({"prompt": "{} {}"}, "2 places"), ({"subject": " "}, "subject"),
     ({"target_new": ""}, "target_new")],
)  # fmt: skip
def test_requests_are_checked(fields: dict[str, str], words: str) -> None:
    good = {"case_id": 3, "prompt": "{} lives in", "subject": "Anna", "target_new": "Rome"}
    with pytest.raises(ValueError, match=f"case 3.*{words}"):
        EditRequest(**(good | fields))
