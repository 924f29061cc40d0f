"""The oracle against hand computations by other means."""

import math

import pytest
import torch

from benchmarks import reference, tiny
from benchmarks.reference import KeyMemory, TargetSettings
from editors.api import EditRequest

FOUR = ("gpt2", "gptj", "llama", "qwen2")
LAYERS = (1, 2, 3)
SETTINGS = {"layer": 2, "lr": 0.5, "clamp": 4.0, "kl": 0.0625, "decay": 0.5}


def manual_losses(model, tokenizer, request, templates, delta, h_init, *, layer, kl, decay):
    """NLL, KL and decay with every row alone, unpadded, delta entering the next block's input."""
    device = model.device

    def log_p(ids, position):
        def shift(_module, args, kwargs):
            hidden = args[0].clone()
            hidden[0, position] += delta
            return (hidden, *args[1:]), kwargs

        above = reference.architecture(model).block.format(layer + 1)
        handle = model.get_submodule(above).register_forward_pre_hook(shift, with_kwargs=True)
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=device)).logits[0]
        handle.remove()
        return logits.log_softmax(-1)

    ids = tokenizer.encode(" " + request.target_new, add_special_tokens=False)
    nlls = []
    for template in [t for group in templates for t in group]:
        head, tail = template.replace("{}", request.prompt).split("{}")
        text_ids = tokenizer.encode(head + request.subject + tail)
        position = len(tokenizer.encode(head + request.subject)) - 1
        p = log_p(text_ids + ids, position)  # last target token included: must not matter
        nlls.append(-sum(p[len(text_ids) - 1 + t, i] for t, i in enumerate(ids)) / len(ids))
    kl_ids = tokenizer.encode(f"{request.subject} is a")
    position = len(tokenizer.encode(request.subject)) - 1
    now = log_p(kl_ids, position)[position]
    with torch.no_grad():
        first = model(torch.tensor([kl_ids], device=device)).logits[0, position].log_softmax(-1)
    divergence = torch.nn.functional.kl_div(first, now, log_target=True, reduction="sum")
    return (
        sum(nlls).item() / len(nlls),
        kl * divergence.item(),
        decay * (delta.norm() / h_init.pow(2).sum()).item(),
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_losses_equal_a_manual_computation(model_type, bos, tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=bos)
    for request in requests(2):
        result = reference.target_value(model, tokenizer, request, templates, steps=2, **SETTINGS)
        for step, delta in enumerate((torch.zeros_like(result.delta), result.delta)):
            expected = manual_losses(
                model, tokenizer, request, templates, delta, result.h_init, layer=2, kl=0.0625, decay=0.5
            )
            assert result.parts[step] == pytest.approx(expected, rel=1e-9, abs=1e-9)
            assert result.losses[step] == pytest.approx(sum(expected), rel=1e-9)
        assert result.updates == 1


@pytest.mark.parametrize("model_type", FOUR)
def test_first_step_has_no_kl_no_decay_and_follows_the_nll_gradient(
    model_type, tiny_models, tiny_tokenizer, requests, templates
):
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True)
    request = requests(2)[1]
    settings = SETTINGS | {"lr": 1e-3}
    result = reference.target_value(model, tokenizer, request, templates, steps=2, **settings)
    assert result.parts[0][1] == pytest.approx(0, abs=1e-12)
    assert result.parts[0][2] == 0

    for coordinate in (0, 7, 31):
        values = []
        for sign in (1, -1):
            delta = torch.zeros_like(result.delta)
            delta[coordinate] = sign * 1e-3
            values.append(
                manual_losses(
                    model, tokenizer, request, templates, delta, result.h_init, layer=2, kl=0, decay=0
                )[0]
            )
        slope = (values[0] - values[1]) / 2e-3
        assert result.delta[coordinate].item() == pytest.approx(-1e-3 * math.copysign(1, slope), rel=1e-3)


def test_decay_has_no_gradient_at_zero_delta(tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models("llama", dtype=torch.float64), tiny_tokenizer(bos=True)
    request = requests(1)[0]
    without, heavy = (
        reference.target_value(model, tokenizer, request, templates, steps=2, **(SETTINGS | {"decay": decay}))
        for decay in (0.0, 1e6)
    )
    assert torch.isfinite(heavy.delta).all()
    assert torch.equal(without.delta, heavy.delta)


def test_training_mode_and_gradients_do_not_matter_and_are_put_back(
    tiny_models, tiny_tokenizer, requests, templates
):
    model, tokenizer = tiny_models("gpt2"), tiny_tokenizer(bos=False)
    assert model.config.resid_pdrop > 0
    request = requests(1)[0]

    def run():
        return reference.target_value(model, tokenizer, request, templates, steps=4, **SETTINGS)

    calm = run()
    model.train()
    model.transformer.wte.requires_grad_(False)
    with torch.no_grad():
        noisy = run()
    assert torch.equal(calm.z, noisy.z)
    assert model.training
    assert model.transformer.h[0].mlp.training
    assert not model.transformer.wte.weight.requires_grad
    assert model.transformer.h[0].mlp.c_proj.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_clamp_and_early_stop(tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models("qwen2", dtype=torch.float64), tiny_tokenizer(bos=False)
    request = requests(1)[0]

    one = reference.target_value(model, tokenizer, request, templates, steps=1, **SETTINGS)
    assert (one.updates, len(one.losses)) == (0, 1)
    assert torch.equal(one.z, one.h_init)

    short = reference.target_value(
        model, tokenizer, request, templates, steps=6, **(SETTINGS | {"clamp": 0.1})
    )
    assert (short.updates, len(short.losses)) == (5, 6)
    assert short.delta.norm().item() == pytest.approx(0.1 * short.h_init.norm().item())

    easy = requests(4)[3]
    stopped = reference.target_value(
        model, tokenizer, easy, templates, steps=40, **(SETTINGS | {"decay": 1e-3, "kl": 0.0})
    )
    assert stopped.losses[-1] < 0.05 <= min(stopped.losses[:-1])
    assert stopped.updates == len(stopped.losses) - 1 < 39
    assert stopped.probability > 0.9
    torch.testing.assert_close(stopped.z, stopped.h_init + stopped.delta)


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_loss_layer_is_the_logits_when_last_and_never_below_the_edited_one(
    model_type, tiny_models, tiny_tokenizer, requests, templates
):
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True)
    request = requests(1)[0]
    own, last, low, same = (
        reference.target_value(
            model, tokenizer, request, templates, steps=3, loss_layer=loss_layer, **SETTINGS
        )
        for loss_layer in (None, 4, 0, 2)
    )
    torch.testing.assert_close(own.z, last.z)
    assert torch.equal(low.z, same.z)
    assert not torch.allclose(low.z, last.z)


def test_float32_and_float64_agree(tiny_models, tiny_tokenizer, requests, templates):
    tokenizer = tiny_tokenizer(bos=True)
    for model_type in FOUR:
        single, double = (
            reference.target_value(
                tiny_models(model_type, dtype=dtype),
                tokenizer,
                requests(1)[0],
                templates,
                steps=5,
                **(SETTINGS | {"lr": 0.05}),
            )
            for dtype in (torch.float32, torch.float64)
        )
        assert single.z.dtype is torch.float32
        assert double.z.dtype is torch.float64
        assert single.losses == pytest.approx(double.losses, rel=1e-4)


@pytest.mark.parametrize("bos", [False, True])
def test_subject_index_agrees_with_the_offsets_of_the_full_text(bos, tiny_tokenizer, requests, templates):
    tokenizer = tiny_tokenizer(bos=bos)
    for request in requests(12):
        for template in [t for group in templates for t in group]:
            prompt = template.replace("{}", request.prompt)
            end = prompt.index("{}") + len(request.subject)
            encoded = tokenizer(prompt.replace("{}", request.subject), return_offsets_mapping=True)
            inside = [
                i for i, (start, stop) in enumerate(encoded["offset_mapping"]) if start < end and stop > start
            ]
            assert reference.subject_last_index(tokenizer, prompt, request.subject) == inside[-1]


def test_token_places_with_and_without_bos(tiny_tokenizer):
    plain, with_bos = tiny_tokenizer(bos=False), tiny_tokenizer(bos=True)
    assert reference.encode(with_bos, "in Rome") == [0, *reference.encode(plain, "in Rome")]
    assert reference.target_ids(with_bos, "Rome") == reference.target_ids(plain, " Rome")
    assert len(reference.target_ids(with_bos, "Rome")) == 1
    assert len(reference.target_ids(with_bos, "Rome in Lima")) == 3
    for prompt, subject in (("{} plays", "Zoe"), ("The river of {}'s town", "Anna Kim")):
        index = reference.subject_last_index(plain, prompt, subject)
        assert reference.subject_last_index(with_bos, prompt, subject) == index + 1
        ids = reference.encode(plain, reference.filled(prompt, subject))
        assert plain.decode(ids[: index + 1]).endswith(subject)


def test_braces_in_a_subject_are_left_alone():
    assert reference.filled("{} plays", "A {b} C") == "A {b} C plays"


def test_padding_is_on_the_right_without_a_pad_token(tiny_tokenizer):
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.padding_side = "left"
    batch = reference.padded(tokenizer, [[5, 6, 7], [8]], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("model_type", FOUR)
def test_keys_are_averaged_in_groups_and_fed_to_the_projection(
    model_type, tiny_models, tiny_tokenizer, requests, templates
):
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True)
    some = requests(3)
    alone = {t: reference.keys(model, tokenizer, some, [[t]], 1) for group in templates for t in group}
    expected = alone["{}"] / 2 + sum(alone[t] for t in templates[1]) / 10
    found = reference.keys(model, tokenizer, some, templates, 1)
    assert found.shape == (48, 3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model_type", FOUR)
def test_block_states_are_h_init(model_type, tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True)
    some = requests(2)
    states = reference.block_states(model, tokenizer, some, 2)
    assert states.shape == (32, 2)
    for column, request in enumerate(some):
        result = reference.target_value(model, tokenizer, request, templates, steps=1, **SETTINGS)
        torch.testing.assert_close(states[:, column], result.h_init)  # unpadded against padded


def test_covariance_counts_every_position_once(tiny_models, tiny_tokenizer):
    model, tokenizer = tiny_models("gpt2", dtype=torch.float64), tiny_tokenizer(bos=True)
    texts = ["Rome", "", "The old town in winter", "Anna Kim speaks French and Latin"]
    seen = []
    handle = model.transformer.h[1].mlp.c_proj.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0])
    )
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer.encode(text)[:6]]))
    handle.remove()
    stacked = torch.cat([inputs[0] for inputs in seen])
    found = reference.covariance(model, tokenizer, texts, 1, max_length=6)
    torch.testing.assert_close(found, stacked.T @ stacked / len(stacked))
    assert found.dtype is torch.float64
    with pytest.raises(ValueError, match="no tokens"):
        reference.covariance(model, tiny_tokenizer(bos=False), [""], 1, max_length=6)


def random_covariance(d_in, layer):
    generator = torch.Generator().manual_seed(layer)
    a = torch.randn(d_in, 3 * d_in, generator=generator, dtype=torch.float64)
    return a @ a.T / (3 * d_in)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def wanted(model, tokenizer, some):
    """States moved by a seeded step: target values without the cost of finding them."""
    states = reference.block_states(model, tokenizer, some, LAYERS[-1])
    generator = torch.Generator().manual_seed(1)
    return states + torch.randn(states.shape, generator=generator, dtype=torch.float64).to(states)


@pytest.mark.parametrize("d_ff", [48, 32])
@pytest.mark.parametrize("model_type", FOUR)
def test_memit_with_vanishing_weight_reaches_the_targets(
    model_type, d_ff, tiny_models, tiny_tokenizer, requests
):
    model = tiny_models(model_type, dtype=torch.float64, d_ff=d_ff)
    tokenizer, some = tiny_tokenizer(bos=True), requests(4)
    zs = wanted(model, tokenizer, some)
    before = weights(model)
    deltas = reference.memit_batch(
        model,
        tokenizer,
        some,
        [["{}"]],
        layers=LAYERS,
        covariances=lambda layer: random_covariance(d_ff, layer),
        weight=1e-9,
        zs=zs,
    )
    reached = reference.block_states(model, tokenizer, some, LAYERS[-1])
    torch.testing.assert_close(reached, zs, atol=1e-4, rtol=1e-4)
    assert set(deltas) == {reference.weight_name(model, layer) for layer in LAYERS}
    for name, value in weights(model).items():
        assert torch.equal(value, before[name] + deltas[name] if name in deltas else before[name]), name


def test_memit_equals_its_formula_in_one_layer_and_shrinks_with_the_weight(
    tiny_models, tiny_tokenizer, requests, templates
):
    tokenizer, some = tiny_tokenizer(bos=False), requests(5)
    c = random_covariance(48, 3)
    norms = []
    for weight in (0.1, 10.0, 1000.0):
        model = tiny_models("llama", dtype=torch.float64)
        zs = wanted(model, tokenizer, some)
        k = reference.keys(model, tokenizer, some, templates, 3)
        residual = zs - reference.block_states(model, tokenizer, some, 3)
        deltas = reference.memit_batch(
            model, tokenizer, some, templates, layers=[3], covariances=lambda _: c, weight=weight, zs=zs
        )
        y = torch.linalg.solve(weight * c, k)
        expected = residual @ torch.linalg.solve(torch.eye(5).double() + k.T @ y, y.T)
        torch.testing.assert_close(deltas["model.layers.3.mlp.down_proj.weight"], expected)
        norms.append(expected.norm().item())
    assert norms == sorted(norms, reverse=True)


@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_memit_seq_remembers_keys_of_the_edited_model(
    model_type, tiny_models, tiny_tokenizer, requests, templates
):
    tokenizer, some = tiny_tokenizer(bos=False), requests(6)
    shared = {"layers": LAYERS, "covariances": lambda layer: random_covariance(48, layer), "weight": 0.5}
    plain, sequential = (tiny_models(model_type, dtype=torch.float64) for _ in range(2))
    memory = KeyMemory()
    zs = wanted(plain, tokenizer, some[:3])
    first = reference.memit_batch(plain, tokenizer, some[:3], templates, zs=zs, **shared)
    again = reference.memit_seq_batch(
        sequential, tokenizer, some[:3], templates, zs=zs, memory=memory, **shared
    )
    for name, delta in first.items():
        assert torch.equal(delta, again[name])
    for layer in LAYERS:
        k = reference.keys(sequential, tokenizer, some[:3], templates, layer)
        torch.testing.assert_close(memory.moments[layer], k @ k.T)

    held = {layer: moment.clone() for layer, moment in memory.moments.items()}
    zs = wanted(plain, tokenizer, some[3:])
    reference.memit_batch(plain, tokenizer, some[3:], templates, zs=zs, **shared)
    reference.memit_seq_batch(sequential, tokenizer, some[3:], templates, zs=zs, memory=memory, **shared)
    name = reference.weight_name(plain, 1)
    assert not torch.allclose(plain.get_parameter(name), sequential.get_parameter(name))
    k = reference.keys(sequential, tokenizer, some[3:], templates, 1)
    torch.testing.assert_close(memory.moments[1], held[1] + k @ k.T)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_alphaedit_stays_in_the_null_space_and_equals_the_reduced_form(
    model_type, tiny_models, tiny_tokenizer, requests, templates
):
    tokenizer, some = tiny_tokenizer(bos=True), requests(6)
    model = tiny_models(model_type, dtype=torch.float64)
    projector = reference.nullspace_projector(random_covariance(48, 3), 0.8)
    assert 0 < round(projector.trace().item()) < 48
    torch.testing.assert_close(projector @ projector, projector)
    memory = KeyMemory()
    past = None
    for batch in (some[:3], some[3:]):
        zs = wanted(model, tokenizer, batch)
        k = reference.keys(model, tokenizer, batch, templates, 3)
        residual = zs - reference.block_states(model, tokenizer, batch, 3)
        (delta,) = reference.alphaedit_batch(
            model,
            tokenizer,
            batch,
            templates,
            layers=[3],
            projectors=lambda _: projector,
            ridge=10.0,
            memory=memory,
            zs=zs,
        ).values()
        change = delta.T if model_type == "gpt2" else delta
        torch.testing.assert_close(change @ projector, change)
        everything = k if past is None else torch.cat([past, k], dim=1)
        gram = everything.T @ projector @ everything
        inner = torch.linalg.solve(10 * torch.eye(len(gram)).double() + gram, everything.T @ projector @ k)
        torch.testing.assert_close(change, (projector @ (k - everything @ inner) @ residual.T / 10).T)
        past = everything.clone()
        past[:, -3:] = reference.keys(model, tokenizer, batch, templates, 3)


def test_targets_are_found_when_not_given(tiny_models, tiny_tokenizer, requests, templates):
    tokenizer, some = tiny_tokenizer(bos=True), requests(2)
    settings = TargetSettings(steps=3, lr=0.1, clamp=0.75)
    given, found = (tiny_models("llama") for _ in range(2))
    shared = {"layers": LAYERS, "covariances": lambda layer: random_covariance(48, layer), "weight": 0.1}
    zs = reference.target_values(given, tokenizer, some, templates, layer=3, settings=settings)
    one = reference.memit_batch(given, tokenizer, some, templates, zs=zs, **shared)
    two = reference.memit_batch(found, tokenizer, some, templates, settings=settings, **shared)
    for name, delta in one.items():
        assert delta.dtype is torch.float32
        assert torch.equal(delta, two[name])
    with pytest.raises(ValueError, match="neither"):
        reference.memit_batch(given, tokenizer, some, templates, **shared)


def test_layers_out_of_order_are_refused(tiny_models, tiny_tokenizer, requests):
    model, tokenizer, some = tiny_models("llama"), tiny_tokenizer(bos=True), requests(1)
    with pytest.raises(ValueError, match="ascending"):
        reference.memit_batch(
            model,
            tokenizer,
            some,
            [["{}"]],
            layers=[3, 1],
            covariances=lambda layer: random_covariance(48, layer),
            weight=1.0,
            zs=torch.zeros(32, 1),
        )


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.85, 1.0])
def test_literal_mask_is_a_magnitude_mask_of_exact_size(ratio):
    tau = torch.randn(13, 17, generator=torch.Generator().manual_seed(0))
    mask = reference.mask_literal(tau, ratio)
    count = round((1 - ratio) * tau.numel())
    assert int(mask.sum()) == count
    largest = torch.topk(tau.abs().flatten(), count).indices
    assert mask.flatten()[largest].all()


def test_ties_go_to_the_lowest_flat_index():
    tau = torch.tensor([[1.0, -2.0, 2.0], [2.0, -2.0, 0.0]])
    assert reference.mask_literal(tau, 0.5).flatten().tolist() == [False, True, True, True, False, False]
    assert reference.mask_literal(torch.full((2, 2), 3.0), 0.5).flatten().tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_row_wise_normalising_selects_another_set():
    tau = torch.tensor([[1.0, 0.9], [10.0, 5.0]])
    assert reference.mask_literal(tau, 0.5).tolist() == [[False, False], [True, True]]
    assert reference.row_wise_variant(tau, 0.5).tolist() == [[True, False], [True, False]]


def test_merging_keeps_the_chain_identities():
    generator = torch.Generator().manual_seed(3)
    base, *deltas = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(5))
    total = base + sum(deltas)
    torch.testing.assert_close(reference.merge_literal(base, *deltas, ratio=0.0), total)
    torch.testing.assert_close(reference.merge_shadow(base, *deltas, ratio=0.0), total)
    one = reference.merge_literal(base, deltas[0], ratio=0.85)
    assert int((one != base).sum()) == round((1 - 0.85) * 54)
    torch.testing.assert_close(reference.merge_shadow(base, deltas[0], ratio=0.85), one)

    left_over = torch.zeros_like(base)
    for delta in deltas:
        tau = delta + left_over
        left_over = torch.where(reference.mask_literal(tau, 0.85), 0.0, tau)
    torch.testing.assert_close(reference.merge_shadow(base, *deltas, ratio=0.85) + left_over, total)


def test_numeric_route_is_the_log_ratio():
    assert reference.route_numeric([3.0, 2.0, 1.5], [1, -1, -1]) == pytest.approx(math.log(3 / 3.5), abs=1e-6)
    assert reference.route_numeric([7.0, 1.0], [1, -1]) == pytest.approx(math.log(7), abs=1e-6)
    assert reference.route_numeric([2.0, 2.0], [1, -1]) == pytest.approx(0, abs=1e-6)
    assert reference.route_numeric([2.0, 1.0], [1, 1]) == pytest.approx(10, abs=1e-5)
    assert reference.route_numeric([2.0, 1.0], [-1, -1]) == pytest.approx(-10, abs=1e-5)


def test_two_neighbours_decide_as_one():
    generator = torch.Generator().manual_seed(5)
    corpus = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    labels = [1 if i % 2 else -1 for i in range(40)]
    for query in torch.randn(20, 8, generator=generator, dtype=torch.float64):
        betas = reference.similarity_weights(query, corpus)
        assert ((betas >= 1) & (betas <= math.e**2)).all()
        one, two = (reference.route_one(query, corpus, labels, k) for k in (1, 2))
        assert (one > 0) is (two > 0)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("model_type", FOUR)
def test_scores_equal_the_models_own_loss(model_type, bos, tiny_models, tiny_tokenizer):
    model, tokenizer = tiny_models(model_type), tiny_tokenizer(bos=bos)
    prompt, target = "The mother tongue of Anna Kim is", "Rome in Lima"
    ids = tokenizer.encode(f"{prompt} {target}")
    labels = [-100] * (len(ids) - 3) + ids[-3:]
    with torch.no_grad():
        out = model(torch.tensor([ids]), labels=torch.tensor([labels]))
    found = reference.likelihood(model, tokenizer, prompt, target)
    assert found.nll == pytest.approx(out.loss.item(), rel=1e-5)
    assert found.sum_nll == pytest.approx(3 * found.nll)
    assert found.argmax == (out.logits[0, -4:-1].argmax(-1).tolist() == ids[-3:])


def test_argmax_flag_is_set_for_the_models_own_continuation(tiny_models, tiny_tokenizer):
    model, tokenizer = tiny_models("gpt2"), tiny_tokenizer(bos=False)
    hits = 0
    for prompt in ("In Rome", "Anna plays", "The old town of", "Zoe is", "They lives in", "It"):
        ids = tokenizer.encode(prompt)
        with torch.no_grad():
            best = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        text = tokenizer.decode([best])
        if reference.target_ids(tokenizer, text) == [best]:
            hits += 1
            assert reference.likelihood(model, tokenizer, prompt, text).argmax
    if not hits:
        pytest.skip("no continuation is a word of its own")


def test_record_rows_and_rates(tiny_models, tiny_tokenizer, requests):
    model, tokenizer = tiny_models("llama"), tiny_tokenizer(bos=True)
    request = requests(1)[0]
    record = {
        "requested_rewrite": {
            "prompt": request.prompt,
            "subject": request.subject,
            "target_new": {"str": "Rome"},
            "target_true": {"str": "the old town"},
        },
        "paraphrase_prompts": ["a", "b"],
        "neighborhood_prompts": ["c", "d", "e"],
    }
    rows = reference.score_record(model, tokenizer, record)
    assert [(row["kind"], row["index"]) for row in rows] == [
        ("rewrite", 0),
        ("paraphrase", 0),
        ("paraphrase", 1),
        ("neighborhood", 0),
        ("neighborhood", 1),
        ("neighborhood", 2),
    ]
    assert rows[0]["prompt"] == request.prompt.replace("{}", request.subject)
    assert rows[1]["nll_new"] == reference.likelihood(model, tokenizer, "a", "Rome").nll
    assert rows[1]["sum_nll_true"] == reference.likelihood(model, tokenizer, "a", "the old town").sum_nll


def row(kind, new, true, argmax_new=False, argmax_true=False):
    return {
        "kind": kind,
        "nll_new": new,
        "nll_true": true,
        "argmax_new": argmax_new,
        "argmax_true": argmax_true,
        "tokens_new": 2,
        "tokens_true": 4,
        "tokens_right_new": 2 if argmax_new else 1,
        "tokens_right_true": 4 if argmax_true else 1,
    }


def test_rates_average_records_and_count_ties_as_failures():
    first = [
        row("rewrite", 1, 2, argmax_new=True),
        row("paraphrase", 1, 2),
        row("paraphrase", 2, 2),
        *[row("neighborhood", 2, 1, argmax_true=True)] * 3,
        row("neighborhood", 2, 2),
    ]
    second = [row("rewrite", 2, 2), row("paraphrase", 1, 2), row("neighborhood", 2, 1)]
    rates = reference.counterfact_rates([first, second])
    assert rates["efficacy"] == 0.5
    assert rates["generalization"] == 0.75
    assert rates["locality"] == pytest.approx(0.875)
    assert rates["efficacy_argmax"] == 0.5
    assert rates["locality_argmax"] == pytest.approx(0.375)
    assert rates["efficacy_overlap"] == 0.75
    assert rates["locality_overlap"] == pytest.approx((3.25 / 4 + 0.25) / 2)
    assert rates["score"] == pytest.approx(3 / (2 + 4 / 3 + 8 / 7))
    none = reference.counterfact_rates([[row("rewrite", 2, 1), *second[1:]]])
    assert none["score"] == 0


def test_unknown_model_type_is_refused(tiny_models):
    model = tiny_models("llama")
    model.config.model_type = "bert"
    with pytest.raises(ValueError, match="bert"):
        reference.architecture(model)


def test_request_with_two_places_is_refused():
    with pytest.raises(ValueError, match="exactly one"):
        EditRequest(case_id=0, prompt="{} {}", subject="a", target_new="b")
