"""The oracle's closed-form editors: what their equations promise, and where they meet each other."""

import math

import pytest
import torch

from benchmarks import reference
from benchmarks.reference import KeyMemory, TargetSettings

FOUR = ("gpt2", "gptj", "llama", "starcoder2")  # Conv1D, Linear with and without bias
LAYERS = (1, 3)
SETTINGS = TargetSettings(steps=3, lr=0.1, clamp=0.75)
BARE = [["{}"]]


def covariance(layer):
    a = torch.randn(48, 150, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
    return a @ a.T / 150


@pytest.fixture
def build(tiny_models, tiny_tokenizer):
    """A fresh float64 model, always of the same weights, and its tokenizer."""
    return lambda model_type: (tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True))


def moved(states, seed=1):
    """States moved by a seeded step: target values without the cost of finding them."""
    generator = torch.Generator().manual_seed(seed)
    return states + 0.3 * torch.randn(states.shape, generator=generator, dtype=torch.float64)


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def check_changes(before, model, deltas, layers):
    """The deltas are all that changed, in the stored shape, in float64."""
    assert set(deltas) == {reference.weight_name(model, layer) for layer in layers}
    for name, value in model.named_parameters():
        expected = before[name].double() + deltas.get(name, 0)
        torch.testing.assert_close(value.detach().double(), expected, rtol=0, atol=1e-15)
    assert all(delta.dtype is torch.float64 for delta in deltas.values())


def flattened(templates):
    return [template for group in templates for template in group]


def as_linear(model, delta):
    return delta.T if reference.architecture(model).transposed else delta


# PMET


@pytest.mark.parametrize("model_type", FOUR)
def test_pmet_gives_each_layer_its_share_by_square_roots(model_type, build, requests, templates):
    (model, tokenizer), some = build(model_type), requests(3)
    before = weights(model)
    zs = moved(reference.mlp_outputs(model, tokenizer, some, 3))
    lower = reference.keys(model, tokenizer, some, templates, 1)
    missing = zs - reference.mlp_outputs(model, tokenizer, some, 3)
    deltas = reference.pmet_batch(
        model, tokenizer, some, templates, layers=LAYERS, covariances=covariance, weight=1e-9, zs=zs
    )
    check_changes(before, model, deltas, LAYERS)
    first = as_linear(model, deltas[reference.weight_name(model, 1)])
    torch.testing.assert_close(first @ lower, missing / math.sqrt(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FOUR)
def test_pmet_with_vanishing_weight_reaches_its_values(model_type, build, requests):
    (model, tokenizer), some = build(model_type), requests(3)
    zs = moved(reference.mlp_outputs(model, tokenizer, some, 3))
    reference.pmet_batch(
        model, tokenizer, some, BARE, layers=LAYERS, covariances=covariance, weight=1e-9, zs=zs
    )
    reached = reference.mlp_outputs(model, tokenizer, some, 3)
    torch.testing.assert_close(reached, zs, rtol=1e-5, atol=1e-5)


def test_pmet_uses_the_values_of_the_mlp_only(build, requests, templates):
    some, models = requests(2), [build("llama") for _ in range(2)]
    shared = {"layers": LAYERS, "covariances": covariance, "weight": 5.0}
    zs = torch.stack(
        [
            reference.pmet_target(*models[0], request, templates, layer=3, settings=SETTINGS).mlp.z
            for request in some
        ],
        dim=1,
    )
    given = reference.pmet_batch(*models[0], some, templates, zs=zs, **shared)
    found = reference.pmet_batch(*models[1], some, templates, settings=SETTINGS, **shared)
    assert all(torch.equal(delta, found[name]) for name, delta in given.items())
    with pytest.raises(ValueError, match="neither"):
        reference.pmet_batch(*models[0], some, templates, **shared)


# ROME


@pytest.mark.parametrize("use_covariance", [False, True])
@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("model_type", FOUR)
def test_romes_change_has_rank_one_and_meets_its_value(
    model_type, robust, use_covariance, build, requests, templates
):
    """Plain: at the bare prompt's key. R-ROME: at the mean key, while the bare prompt misses it."""
    (model, tokenizer), request = build(model_type), requests(1)[0]
    before, flat = weights(model), flattened(templates)
    v = moved(reference.mlp_outputs(model, tokenizer, [request], 2))
    mean = reference.keys(model, tokenizer, [request], [flat], 2)
    c = covariance(2)
    deltas = reference.rome_batch(
        model, tokenizer, [request], flat, layer=2, covariance=c, robust=robust,
        use_covariance=use_covariance, values=v,
    )  # fmt: skip
    check_changes(before, model, deltas, [2])
    delta = as_linear(model, deltas[reference.weight_name(model, 2)])
    assert torch.linalg.matrix_rank(delta, rtol=1e-10) == 1
    direction = torch.linalg.svd(delta).Vh[0]
    wanted = (c.inverse() @ mean if use_covariance else mean)[:, 0]
    assert abs(torch.cosine_similarity(direction, wanted, dim=0)) == pytest.approx(1, abs=1e-10)

    at_bare = reference.mlp_outputs(model, tokenizer, [request], 2)
    at_mean = torch.stack([at_template(model, tokenizer, request, t) for t in flat]).mean(0).unsqueeze(1)
    met, missed = (at_mean, at_bare) if robust else (at_bare, at_mean)
    torch.testing.assert_close(met, v)
    assert not torch.allclose(missed, v, atol=1e-3)


def at_template(model, tokenizer, request, template):
    """The projection's output at the subject inside a template."""
    text = reference.filled(template, request.prompt)
    ids = reference.encode(tokenizer, reference.filled(text, request.subject))
    seen = []
    parts = reference.architecture(model)
    module = model.get_submodule(f"{parts.block.format(2)}.{parts.projection}")
    handle = module.register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return seen[0][0, reference.subject_last_index(tokenizer, text, request.subject)]


def test_rome_edits_one_after_another(build, requests, templates):
    some, flat = requests(3), flattened(templates)
    together, apart = build("gpt2"), build("gpt2")
    shared = {"layer": 2, "covariance": covariance(2), "robust": False, "use_covariance": True}
    before = weights(together[0])
    deltas = reference.rome_batch(*together, some, flat, settings=SETTINGS, **shared)
    check_changes(before, together[0], deltas, [2])
    for request in some:
        target = reference.rome_target(*apart, request, flat, layer=2, settings=SETTINGS).z
        reference.rome_batch(*apart, [request], flat, values=target.unsqueeze(1), **shared)
    name = reference.weight_name(apart[0], 2)
    torch.testing.assert_close(together[0].get_parameter(name), apart[0].get_parameter(name))
    last = reference.mlp_outputs(*together, some[-1:], 2)[:, 0]
    torch.testing.assert_close(last, target)  # of the last request; earlier ones have been moved again
    assert torch.linalg.matrix_rank(deltas[name], rtol=1e-10) == 3


def test_rome_says_what_is_missing(build, requests):
    model, tokenizer = build("llama")
    shared = {"layer": 2, "covariance": None, "robust": False}
    with pytest.raises(ValueError, match="no covariance"):
        reference.rome_batch(model, tokenizer, requests(1), ["{}"], use_covariance=True, **shared)
    with pytest.raises(ValueError, match="neither"):
        reference.rome_batch(model, tokenizer, requests(1), ["{}"], use_covariance=False, **shared)


# EMMET


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("model_type", FOUR)
def test_emmet_without_ridge_meets_the_residual_with_the_least_change(
    model_type, n, build, requests, templates
):
    """The solution of min tr(D C' D^T) with D K = R, found from its own system of equations."""
    (model, tokenizer), some = build(model_type), requests(n)
    before = weights(model)
    k = reference.keys(model, tokenizer, some, templates, 3)
    states = reference.block_states(model, tokenizer, some, 3)
    zs = moved(states)
    deltas = reference.emmet_batch(
        model, tokenizer, some, templates, layers=[3], covariances=covariance, weight=2.0,
        identity_weight=0.3, ridge=0.0 if n > 1 else 5.0, zs=zs,
    )  # fmt: skip
    check_changes(before, model, deltas, [3])
    delta = as_linear(model, deltas[reference.weight_name(model, 3)])
    torch.testing.assert_close(delta @ k, zs - states)
    cost = 2.0 * covariance(3) + 0.3 * torch.eye(48).double()
    system = torch.cat([torch.cat([cost, k], dim=1), torch.cat([k.T, k.new_zeros(n, n)], dim=1)])
    right = torch.cat([k.new_zeros(48, 32), (zs - states).T])
    torch.testing.assert_close(delta, torch.linalg.solve(system, right)[:48].T)


def test_emmets_ridge_makes_it_memit(build, requests, templates):
    some, models = requests(4), [build("gpt2") for _ in range(2)]
    zs = moved(reference.block_states(*models[0], some, 3))
    emmet = reference.emmet_batch(
        *models[0], some, templates, layers=LAYERS, covariances=covariance, weight=2.0,
        identity_weight=0.3, ridge=0.1, zs=zs,
    )  # fmt: skip
    memit = reference.memit_batch(
        *models[1], some, templates, layers=LAYERS, weight=0.1, zs=zs,
        covariances=lambda layer: 2.0 * covariance(layer) + 0.3 * torch.eye(48).double(),
    )  # fmt: skip
    for name, delta in memit.items():
        torch.testing.assert_close(emmet[name], delta)


def test_emmet_of_one_request_is_rome(build, requests):
    request, models = requests(1), [build("llama") for _ in range(2)]
    step = moved(torch.zeros(32, 1).double())
    states = reference.block_states(*models[0], request, 2)
    outputs = reference.mlp_outputs(*models[0], request, 2)
    emmet = reference.emmet_batch(
        *models[0], request, BARE, layers=[2], covariances=covariance, weight=7.0, zs=states + step
    )
    rome = reference.rome_batch(
        *models[1], request, ["{}"], layer=2, covariance=covariance(2), robust=False, use_covariance=True,
        values=outputs + step,
    )  # fmt: skip
    name = reference.weight_name(models[0][0], 2)
    torch.testing.assert_close(emmet[name], rome[name])


# RECT


def test_pruning_keeps_the_largest_relative_changes():
    delta = torch.tensor([[1.0, -4.0, 2.0], [3.0, 0.5, -2.0]])
    weight = torch.tensor([[-1.0, 8.0, 1.0], [6.0, 0.0, -1.0]])  # ratios 1, 0.5, 2, 0.5, 5e7, 2
    kept = reference.rect_prune(delta, weight, 0.5)
    assert kept.tolist() == [[0.0, 0.0, 2.0], [0.0, 0.5, -2.0]]
    assert reference.rect_prune(delta, weight, 0.34).tolist() == [[0.0, 0.0, 2.0], [0.0, 0.5, 0.0]]
    assert reference.rect_prune(delta, weight, 0.8).tolist() == [[1.0, -4.0, 2.0], [0.0, 0.5, -2.0]]
    assert torch.equal(reference.rect_prune(delta, weight, 1.0), delta)
    assert not reference.rect_prune(delta, weight, 0.0).any()


@pytest.mark.parametrize("during_walk", [False, True])
@pytest.mark.parametrize("model_type", FOUR)
def test_rect_that_keeps_all_is_memit(model_type, during_walk, build, requests, templates):
    some, models = requests(3), [build(model_type) for _ in range(2)]
    shared = {"layers": LAYERS, "covariances": covariance, "weight": 5.0}
    shared["zs"] = moved(reference.block_states(*models[0], some, 3))
    before = weights(models[0][0])
    rect = reference.rect_batch(*models[0], some, templates, share=1.0, during_walk=during_walk, **shared)
    check_changes(before, models[0][0], rect, LAYERS)
    memit = reference.memit_batch(*models[1], some, templates, **shared)
    for name, delta in memit.items():
        torch.testing.assert_close(rect[name], delta, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_rect_prunes_at_the_end_or_during_the_walk(model_type, build, requests, templates):
    some, models = requests(3), [build(model_type) for _ in range(3)]
    shared = {"covariances": covariance, "weight": 5.0}
    shared["zs"] = moved(reference.block_states(*models[0], some, 3))
    before = weights(models[0][0])
    lower, upper = (reference.weight_name(models[0][0], layer) for layer in LAYERS)
    memit = reference.memit_batch(*models[0], some, templates, layers=LAYERS, **shared)
    ended, walked = (
        reference.rect_batch(*model, some, templates, layers=LAYERS, during_walk=during_walk, **shared)
        for model, during_walk in zip(models[1:], (False, True), strict=True)
    )
    for name in (lower, upper):
        kept = ended[name] != 0
        assert int(kept.sum()) == int((walked[name] != 0).sum()) == round(0.4 * 48 * 32)
        torch.testing.assert_close(ended[name][kept], memit[name][kept], rtol=1e-9, atol=1e-15)
        ratio = memit[name].abs() / (before[name].abs() + 1e-8)
        assert ratio[kept].min() > ratio[~kept].max()
    torch.testing.assert_close(walked[lower], ended[lower], rtol=0, atol=1e-15)

    model, tokenizer = build(model_type)  # the last layer takes all that is left: MEMIT in it alone
    with torch.no_grad():
        model.get_parameter(lower).add_(ended[lower])
    (alone,) = reference.memit_batch(model, tokenizer, some, templates, layers=[3], **shared).values()
    expected = reference.rect_prune(alone, before[upper], 0.4)
    torch.testing.assert_close(walked[upper], expected, rtol=1e-9, atol=1e-14)
    assert not torch.allclose(walked[upper], ended[upper], atol=1e-6)


# PRUNE


def rectangle(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_prune_leaves_small_changes_alone():
    base, change = 1e6 * rectangle(0, 6, 9), rectangle(1, 6, 9)
    torch.testing.assert_close(reference.prune_weights(base, base + change), base + change)
    doubled = reference.prune_weights(base, base + change, legacy_double_apply=True)
    torch.testing.assert_close(doubled, base + 2 * change)


@pytest.mark.parametrize("log_base", [math.e, 2.0, 1.2])
def test_prune_draws_in_what_exceeds_the_largest_of_the_base(log_base):
    u, v = (torch.linalg.qr(rectangle(seed, 6, 6)).Q for seed in (0, 1))
    base = 3.0 * v @ torch.diag(exact(1.0, 0.9, 0.5, 0.2, 0.1, 0.1)) @ u
    values = exact(50.0, 4.0, 3.0 + 1e-6, 2.9, 0.5, 1e-12)
    restrained = [3.0 + math.log(s / 3.0) / math.log(log_base) if s > 3 else s for s in values.tolist()]
    edited = base + u @ torch.diag(values) @ v
    expected = base + u @ torch.diag(exact(*restrained)) @ v
    torch.testing.assert_close(reference.prune_weights(base, edited, log_base=log_base), expected)
    torch.testing.assert_close(reference.prune_weights(base.T, edited.T, log_base=log_base), expected.T)
    legacy = reference.prune_weights(base, edited, log_base=log_base, legacy_double_apply=True)
    torch.testing.assert_close(legacy, expected - base + edited)


def test_prune_only_shrinks():
    base, change = rectangle(0, 7, 4), rectangle(1, 7, 4)
    for factor in (0.01, 1.0, 30.0):
        pruned = reference.prune_weights(base, base + factor * change) - base
        before, after = (torch.linalg.svdvals(x) for x in (factor * change, pruned))
        largest = torch.linalg.svdvals(base)[0]
        assert largest > 1 and (after <= before + 1e-12).all()  # below one the log is steeper
        torch.testing.assert_close(after[before <= largest], before[before <= largest])
    assert reference.prune_weights(base.float(), base.float()).dtype is torch.float64


# BLUE


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_blue_is_memit_in_one_layer_and_then_in_the_other(model_type, build, requests, templates):
    some, models = requests(2), [build(model_type) for _ in range(2)]
    shared = {"covariances": covariance, "weight": 5.0, "settings": SETTINGS}
    before = weights(models[0][0])
    blue = reference.blue_memit_batch(*models[0], some, templates, layers=LAYERS, **shared)
    check_changes(before, models[0][0], blue, LAYERS)
    for layer in LAYERS:
        ((name, delta),) = reference.memit_batch(
            *models[1], some, templates, layers=[layer], **shared
        ).items()
        torch.testing.assert_close(blue[name], delta, rtol=1e-9, atol=1e-15)


def test_blue_alphaedit_remembers_the_keys_of_both_layers(build, requests, templates):
    some, models = requests(4), [build("gpt2") for _ in range(2)]
    projectors = {layer: reference.nullspace_projector(covariance(layer), 0.8) for layer in LAYERS}
    shared = {"projectors": projectors.get, "ridge": 0.1, "settings": SETTINGS}
    one, other = KeyMemory(), KeyMemory()
    for batch in (some[:2], some[2:]):
        blue = reference.blue_alphaedit_batch(
            *models[0], batch, templates, layers=LAYERS, memory=one, **shared
        )
        for layer in LAYERS:
            ((name, delta),) = reference.alphaedit_batch(
                *models[1], batch, templates, layers=[layer], memory=other, **shared
            ).items()
            torch.testing.assert_close(blue[name], delta, rtol=1e-9, atol=1e-12)
        for layer in LAYERS:
            torch.testing.assert_close(one.moments[layer], other.moments[layer])


@pytest.mark.parametrize("layers", [(3, 1), (1,), (1, 2, 3)])
def test_blue_wants_two_ascending_layers(layers, build, requests):
    with pytest.raises(ValueError, match="two layers"):
        reference.blue_memit_batch(
            *build("llama"), requests(1), BARE, layers=layers, covariances=covariance, weight=1.0,
            settings=SETTINGS,
        )  # fmt: skip
