"""The oracle's FT and UltraEdit against the models' own losses, finite differences and hand-written Adam."""

import math

import pytest
import torch

from benchmarks import reference, tiny
from benchmarks.reference import FeatureHistory


@pytest.fixture
def build(tiny_models, tiny_tokenizer):
    """A fresh float64 model, always of the same weights, and its tokenizer."""
    return lambda model_type: (tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True))


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def check_changes(before, model, deltas):
    for name, value in model.named_parameters():
        expected = before[name] + deltas.get(name, 0)
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-15)
    assert all(delta.dtype is torch.float64 for delta in deltas.values())


def labelled_loss(model, ids, labels):
    """A model's own loss, in float64: mean cross-entropy over the labels that are not -100."""
    logits = model(torch.tensor([ids])).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]))


def own_loss(model, tokenizer, request, objective):
    """Mean over the target's tokens; each behind the ones before it, or each behind the bare prompt."""
    prompt = tokenizer.encode(request.prompt.replace("{}", request.subject))
    target = tokenizer.encode(" " + request.target_new, add_special_tokens=False)
    ignored = [-100] * len(prompt)
    if objective == "target_new":
        return labelled_loss(model, prompt + target, ignored + target)
    losses = [labelled_loss(model, [*prompt, token], [*ignored, token]) for token in target]
    return torch.stack(losses).mean()


# FT


def adam_by_hand(model, tokenizer, requests, names, *, layer_steps, size, objective, lr, decay, limit):
    """Epochs over minibatches with Adam written out, weight decay in the gradient, then the limit."""
    values = {name: model.get_parameter(name) for name in names}
    start = {name: value.detach().clone() for name, value in values.items()}
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = {name: torch.zeros_like(value) for name, value in start.items()}
    count = 0
    for _ in range(layer_steps):
        for at in range(0, len(requests), size):
            part = requests[at : at + size]
            loss = sum(own_loss(model, tokenizer, request, objective) for request in part) / len(part)
            gradients = torch.autograd.grad(loss, list(values.values()))
            count += 1
            with torch.no_grad():
                for (name, value), gradient in zip(values.items(), gradients, strict=True):
                    g = gradient + decay * value
                    first[name] = 0.9 * first[name] + 0.1 * g
                    second[name] = 0.999 * second[name] + 0.001 * g * g
                    step = first[name] / (1 - 0.9**count)
                    new = value - lr * step / ((second[name] / (1 - 0.999**count)).sqrt() + 1e-8)
                    value.copy_(torch.minimum(torch.maximum(new, start[name] - limit), start[name] + limit))
    return {name: value.detach() - start[name] for name, value in values.items()}


@pytest.mark.parametrize("objective", ["prompt_last", "target_new"])
@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama", "phi"])
def test_ft_is_adam_on_the_whole_projection(model_type, objective, build, requests):
    (model, tokenizer), some = build(model_type), requests(3)
    before = weights(model)
    deltas = reference.ft_batch(
        model, tokenizer, some, layer=2, steps=3, lr=0.01, weight_decay=0.1, norm_constraint=0.02,
        objective=objective, minibatch=2,
    )  # fmt: skip
    check_changes(before, model, deltas)
    path = reference.weight_name(model, 2).removesuffix("weight")
    assert set(deltas) == {name for name in before if name.startswith(path)}
    assert len(deltas) == (1 if model_type == "llama" else 2)
    expected = adam_by_hand(
        *build(model_type), some, list(deltas), layer_steps=3, size=2, objective=objective, lr=0.01,
        decay=0.1, limit=0.02,
    )  # fmt: skip
    for name, delta in deltas.items():
        torch.testing.assert_close(delta, expected[name], rtol=1e-6, atol=1e-10)
        assert delta.abs().max().item() == pytest.approx(0.02)
        assert ((delta.abs() - 0.02).abs() < 1e-12).any() and (delta.abs() < 0.019).any()


def test_the_objectives_agree_on_one_token_and_only_there(build, requests):
    model, tokenizer = build("llama")
    one, three = requests(2)
    losses = {
        (request.case_id, objective): reference.target_nll(model, tokenizer, request, objective)
        for request in (one, three)
        for objective in ("prompt_last", "target_new")
    }
    assert torch.equal(losses[0, "prompt_last"], losses[0, "target_new"])
    assert losses[1, "prompt_last"].shape == losses[1, "target_new"].shape == (3,)
    assert losses[1, "prompt_last"][0].item() == pytest.approx(losses[1, "target_new"][0].item())
    assert not torch.allclose(losses[1, "prompt_last"][1:], losses[1, "target_new"][1:], atol=1e-2)
    for (case, objective), nll in losses.items():
        request = (one, three)[case]
        expected = own_loss(model, tokenizer, request, objective).item()
        assert nll.mean().item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="masked"):
        reference.target_nll(model, tokenizer, one, "masked")


def test_ft_stops_when_the_loss_is_small(build, requests):
    some = requests(2)
    model, tokenizer = build("llama")
    still = reference.ft_batch(model, tokenizer, some, layer=2, stop_loss=1e9)
    assert not any(delta.any() for delta in still.values())
    shared = {"layer": 2, "lr": 0.01, "stop_loss": 0.1, "objective": "target_new"}
    one, other = (reference.ft_batch(*build("llama"), some, steps=steps, **shared) for steps in (200, 300))
    assert all(torch.equal(delta, other[name]) for name, delta in one.items())
    reference.ft_batch(model, tokenizer, some, steps=200, **shared)
    final = [own_loss(model, tokenizer, request, "target_new").item() for request in some]
    assert math.fsum(final) / 2 < 0.1


def test_fts_epoch_mean_weighs_minibatches_by_their_size(build, requests):
    """Three requests in minibatches of two and one; the mean of all lies below the limit, that of two not."""
    model, tokenizer = build("llama")
    losses = {
        request.case_id: own_loss(model, tokenizer, request, "prompt_last").item() for request in requests(6)
    }
    low, middle, *_, high = sorted(requests(6), key=lambda request: losses[request.case_id])
    pair = (losses[low.case_id] + losses[middle.case_id]) / 2
    limit = (2 * pair + losses[high.case_id]) / 3 + 0.01
    assert pair < limit < (pair + losses[high.case_id]) / 2
    shared = {"layer": 2, "lr": 1e-6, "stop_loss": limit, "minibatch": 2}
    one, more = (
        reference.ft_batch(*build("llama"), [low, middle, high], steps=steps, **shared) for steps in (1, 4)
    )
    (delta,) = one.values()
    assert delta.abs().max() > 5e-7  # the minibatch above the limit made its step
    assert all(torch.equal(delta, more[name]) for name, delta in one.items())
    swapped = reference.ft_batch(*build("llama"), [high, middle, low], steps=1, **shared)
    assert not torch.equal(delta, *swapped.values())


def test_ft_leaves_no_trace_but_the_change(build, requests):
    model, tokenizer = build("gpt2")
    model.train()
    model.transformer.wte.requires_grad_(False)
    reference.ft_batch(model, tokenizer, requests(1), layer=1, steps=2)
    assert model.training and not model.transformer.wte.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


# UltraEdit


def modules_of(model, layers=(2, 3)):
    """Two modules of each of these blocks: the MLP's first input projection and its output projection."""
    found = []
    for layer in layers:
        output = reference.weight_name(model, layer).removesuffix(".weight")
        mlp = output.rpartition(".")[0]
        names = [name for name, _ in model.get_submodule(mlp).named_parameters()]
        others = [name.removesuffix(".weight") for name in names if name.endswith("weight")]
        found += [f"{mlp}.{next(name for name in others if not output.endswith(name))}", output]
    return found


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_answer_features_make_up_the_gradient_of_the_last_block(model_type, build, requests):
    """Nothing but the answer positions reaches the loss through the last block's MLP."""
    (model, tokenizer), some = build(model_type), requests(4)
    path = reference.weight_name(model, 4).removesuffix(".weight")
    lengths = [len(reference.target_ids(tokenizer, request.target_new)) for request in some]
    h, g = reference.answer_features(model, tokenizer, some, [path])[path]
    assert (h.shape, g.shape) == ((sum(lengths), 48), (sum(lengths), 32))
    losses = [own_loss(model, tokenizer, request, "target_new") for request in some]
    loss = sum(n * value for n, value in zip(lengths, losses, strict=True)) / sum(lengths)
    (gradient,) = torch.autograd.grad(loss, model.get_parameter(f"{path}.weight"))
    torch.testing.assert_close(h.T @ g if model_type == "gpt2" else g.T @ h, gradient)


def test_answer_features_are_in_the_order_of_requests_and_tokens(build, requests):
    (model, tokenizer), some = build("llama"), requests(3)
    path = "model.layers.2.mlp.up_proj"
    h, g = reference.answer_features(model, tokenizer, some, [path])[path]
    place = 0
    for request in some:
        prompt = reference.encode(tokenizer, reference.filled(request.prompt, request.subject))
        target = reference.target_ids(tokenizer, request.target_new)
        seen = []
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, s=seen: s.append(args[0])
        )
        with torch.no_grad():
            model(torch.tensor([prompt + target]))
        handle.remove()
        for t in range(len(target)):
            torch.testing.assert_close(h[place], seen[0][0, len(prompt) - 1 + t])
            place += 1
    assert place == len(h) == len(g)


@pytest.mark.parametrize("coordinate", [(0, 3), (2, 17), (5, 40)])
def test_answer_gradients_are_differences_of_the_loss(coordinate, build, requests):
    """One output of one answer position moved, the loss of that text alone over all the batch's tokens."""
    (model, tokenizer), some = build("qwen2"), requests(3)
    path, (row, column) = "model.layers.2.mlp.gate_proj", coordinate
    _, g = reference.answer_features(model, tokenizer, some, [path])[path]
    lengths = [len(reference.target_ids(tokenizer, request.target_new)) for request in some]
    place = [(request, t) for request, n in zip(some, lengths, strict=True) for t in range(n)]
    request, t = place[row]
    prompt = reference.encode(tokenizer, reference.filled(request.prompt, request.subject))

    def loss(step):
        def move(_module, _args, out):
            moved = out.clone()
            moved[0, len(prompt) - 1 + t, column] += step
            return moved

        handle = model.get_submodule(path).register_forward_hook(move)
        with torch.no_grad():
            value = own_loss(model, tokenizer, request, "target_new").item()
        handle.remove()
        return value * lengths[some.index(request)] / sum(lengths)

    slope = (8 * (loss(1e-4) - loss(-1e-4)) - (loss(2e-4) - loss(-2e-4))) / 12e-4
    assert g[row, column].item() == pytest.approx(slope, rel=1e-6, abs=1e-11)


def merged(moments, batch):
    """Count, mean and sum of squares of deviations, one batch more (Chan, Golub and LeVeque 1979)."""
    n, mean, deviations = moments
    m, other = len(batch), batch.mean(dim=0)
    step = other - mean
    own = (batch - other).pow(2).sum(dim=0)
    return n + m, mean + step * m / (n + m), deviations + own + step.pow(2) * n * m / (n + m)


def test_moments_over_everything_are_those_of_merged_batches():
    generator = torch.Generator().manual_seed(0)
    history, running = FeatureHistory(), (0, torch.zeros(6).double(), torch.zeros(6).double())
    for size in (1, 5, 2, 11):
        batch = 3 + size * torch.randn(size, 6, generator=generator, dtype=torch.float64)
        history.add("a", batch)
        history.add((3, 3), batch[:1])
        running = merged(running, batch)
        count, mean, variance = history.moments("a")
        assert count == running[0]
        torch.testing.assert_close(mean, running[1])
        torch.testing.assert_close(variance, running[2] / running[0])
        if size == 1:
            assert not variance.any()
    assert history.moments((3, 3))[0] == 4


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "phi3"])
def test_ultraedit_equals_its_dual_form_with_running_moments(model_type, shared, build, requests):
    """Two batches; (H^T H + ridge I)^-1 H^T V = H^T (H H^T + ridge I)^-1 V."""
    (model, tokenizer), some, state = build(model_type), requests(6), FeatureHistory()
    modules = modules_of(model)
    running = {}
    for batch in (some[:4], some[4:]):
        features = reference.answer_features(model, tokenizer, batch, modules)
        keys = {}
        for path in modules:  # all first, and only then any shift
            h, g = features[path]
            keys[path] = (h.shape[1], g.shape[1]) if shared else path
            zero = torch.zeros(h.shape[1] + g.shape[1]).double()
            running[keys[path]] = merged(running.get(keys[path], (0, zero, zero)), torch.cat([h, g], dim=1))
        before = weights(model)
        deltas = reference.ultraedit_batch(
            model, tokenizer, batch, modules=modules, state=state, learning_rate=1e-3, ridge=2.0,
            shared=shared,
        )  # fmt: skip
        check_changes(before, model, deltas)
        assert list(deltas) == [f"{path}.weight" for path in modules]
        for path in modules:
            h, g = features[path]
            count, mean, deviations = running[keys[path]]
            scale = (deviations / (count - 1)).sqrt() + torch.finfo(torch.float32).eps
            h_hat, g_hat = ((torch.cat([h, g], dim=1) - mean) / scale).split([h.shape[1], g.shape[1]], dim=1)
            v = -1e-3 * (h_hat * h_hat).sum(dim=1, keepdim=True) * g_hat
            shift = h.T @ torch.linalg.solve(h @ h.T + 2.0 * torch.eye(len(h)).double(), v)
            expected = shift if model_type == "gpt2" else shift.T
            torch.testing.assert_close(deltas[f"{path}.weight"], expected, rtol=1e-8, atol=1e-12)
    assert len(state.features) == (2 if shared else 4)


def test_shared_moments_depend_on_the_other_modules_and_own_ones_do_not(build, requests):
    some, path = requests(3), "model.layers.3.mlp.down_proj"
    deltas = {
        (shared, modules): reference.ultraedit_batch(
            *build("llama"), some, modules=modules, state=FeatureHistory(), shared=shared
        )[f"{path}.weight"]
        for shared in (False, True)
        for modules in ((path,), ("model.layers.2.mlp.down_proj", path))
    }
    alone, with_other, shared_alone, shared_with_other = deltas.values()
    torch.testing.assert_close(alone, with_other, rtol=1e-9, atol=0)
    torch.testing.assert_close(alone, shared_alone, rtol=1e-9, atol=0)
    assert not torch.allclose(alone, shared_with_other, rtol=1e-2)


def test_ultraedit_is_linear_in_its_learning_rate_and_leaves_no_trace(build, requests):
    some, found = requests(3), []
    for rate in (1e-4, 3e-4):
        model, tokenizer = build("gpt2")
        model.train()
        found.append(
            reference.ultraedit_batch(
                model, tokenizer, some, modules=modules_of(model), state=FeatureHistory(), shared=True,
                learning_rate=rate,
            )
        )  # fmt: skip
        assert model.training
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, delta in found[0].items():
        torch.testing.assert_close(3 * delta, found[1][name])
