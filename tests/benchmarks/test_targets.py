"""The oracle's targets of ROME and PMET against computations row by row, without padding."""

import math

import pytest
import torch

from benchmarks import reference, tiny
from benchmarks.reference import TargetSettings

PARALLEL = ("gptj", "phi", "gpt_neox")  # blocks that add attention and MLP to the same stream
LAYER = 2


def by_hand(model, tokenizer, request, templates, moved):
    """Unweighted NLL and KL, and whether every target token is the most likely one, each row alone.

    ``moved``: (module path inside the block, vector to add to its output)
    """
    block = model.get_submodule(reference.architecture(model).block.format(LAYER))

    def log_p(ids, position, moved):
        handles = []
        for path, delta in moved:
            step = torch.zeros(1, len(ids), len(delta), dtype=delta.dtype)
            step[0, position] = delta
            add = lambda _module, _args, out, step=step: out + step
            handles.append(block.get_submodule(path).register_forward_hook(add))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for handle in handles:
            handle.remove()
        return logits.log_softmax(-1)

    ids = tokenizer.encode(" " + request.target_new, add_special_tokens=False)
    nlls, right = [], []
    for template in templates:
        head, tail = template.replace("{}", request.prompt).split("{}")
        text = tokenizer.encode(head + request.subject + tail)
        p = log_p(text + ids, len(tokenizer.encode(head + request.subject)) - 1, moved)[len(text) - 1 : -1]
        nlls.append(torch.nn.functional.nll_loss(p, torch.tensor(ids)).item())
        right += (p.argmax(-1) == torch.tensor(ids)).tolist()
    row, position = tokenizer.encode(f"{request.subject} is a"), len(tokenizer.encode(request.subject)) - 1
    now, first = log_p(row, position, moved)[position], log_p(row, position, [])[position]
    divergence = torch.nn.functional.kl_div(first, now, log_target=True, reduction="sum").item()
    return math.fsum(nlls) / len(nlls), divergence, all(right)


def flat(templates):
    return [template for group in templates for template in group]


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_romes_losses_and_its_start(model_type, tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True)
    path = reference.architecture(model).projection
    request = requests(2)[1]
    settings = TargetSettings(steps=2, lr=0.5, clamp=4.0, kl=0.25, decay=0.5)
    found = reference.rome_target(model, tokenizer, request, flat(templates), layer=LAYER, settings=settings)
    start = reference.mlp_outputs(model, tokenizer, [request], LAYER)[:, 0]
    torch.testing.assert_close(found.h_init, start)
    torch.testing.assert_close(found.z, start + found.delta)
    for step, delta in enumerate((torch.zeros_like(found.delta), found.delta)):
        nll, divergence, _ = by_hand(model, tokenizer, request, flat(templates), [(path, delta)])
        decay = 0.5 * delta.norm().item() / start.pow(2).sum().item()
        assert found.parts[step] == pytest.approx((nll, 0.25 * divergence, decay), rel=1e-9, abs=1e-9)
        assert found.losses[step] == pytest.approx(nll + 0.25 * divergence + decay, rel=1e-9)


def test_rome_stops_early_and_is_clamped(tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models("llama", dtype=torch.float64), tiny_tokenizer(bos=False)
    easy = requests(4)[3]
    settings = TargetSettings(steps=60, lr=0.5, clamp=20.0, kl=0.0, decay=1e-3)
    found = reference.rome_target(model, tokenizer, easy, flat(templates), layer=LAYER, settings=settings)
    assert found.losses[-1] < 0.05 <= min(found.losses[:-1])
    short = TargetSettings(steps=4, lr=0.5, clamp=0.1)
    found = reference.rome_target(model, tokenizer, easy, flat(templates), layer=LAYER, settings=short)
    assert found.delta.norm().item() == pytest.approx(0.1 * found.h_init.norm().item())


@pytest.mark.parametrize("model_type", tiny.ALL_TYPES)
def test_pmets_losses_and_its_two_starts(model_type, tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=True)
    parts = reference.architecture(model)
    request = requests(2)[1]
    settings = TargetSettings(steps=2, lr=0.5, clamp=4.0, kl=0.25, decay=0.5)
    found = reference.pmet_target(
        model, tokenizer, request, templates, layer=LAYER, settings=settings, nll_factor=0.7
    )
    start = reference.mlp_outputs(model, tokenizer, [request], LAYER)[:, 0]
    torch.testing.assert_close(found.mlp.h_init, start)
    for step in (0, 1):
        deltas = (step * found.mlp.delta, step * found.attention.delta)
        moved = list(zip((parts.projection, parts.attention), deltas, strict=True))
        nll, divergence, _ = by_hand(model, tokenizer, request, flat(templates), moved)
        decay = 0.5 * sum(
            delta.norm().item() / init.pow(2).sum().item()
            for delta, init in zip(deltas, (start, found.attention.h_init), strict=True)
        )
        expected = (0.7 * nll, 0.25 * divergence, decay)
        assert found.mlp.parts[step] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert found.mlp.losses[step] == pytest.approx(sum(expected), rel=1e-9)
    assert found.mlp.updates == found.attention.updates == 1


@pytest.mark.parametrize("model_type", PARALLEL)
def test_pmets_vectors_are_one_where_blocks_only_add(
    model_type, tiny_models, tiny_tokenizer, requests, templates
):
    """MLP and attention have the same gradient there, so only decay and clamps could part them."""
    model, tokenizer = tiny_models(model_type, dtype=torch.float64), tiny_tokenizer(bos=False)
    settings = TargetSettings(steps=6, lr=0.1, clamp=100.0, decay=0.0)
    free = reference.pmet_target(model, tokenizer, requests(1)[0], templates, layer=LAYER, settings=settings)
    torch.testing.assert_close(free.mlp.delta, free.attention.delta)
    assert not torch.allclose(free.mlp.z, free.attention.z)


def test_pmet_clamps_each_vector_by_its_own_start(tiny_models, tiny_tokenizer, requests, templates):
    model, tokenizer = tiny_models("qwen2", dtype=torch.float64), tiny_tokenizer(bos=True)
    settings = TargetSettings(steps=4, lr=0.5, clamp=0.1)
    found = reference.pmet_target(model, tokenizer, requests(1)[0], templates, layer=LAYER, settings=settings)
    norms = [(part.delta.norm().item(), part.h_init.norm().item()) for part in (found.mlp, found.attention)]
    assert norms[0][1] != pytest.approx(norms[1][1], rel=0.05)
    for delta, init in norms:
        assert delta == pytest.approx(0.1 * init)


def test_pmet_eases_the_loss_after_a_step_in_which_every_token_was_right(
    tiny_models, tiny_tokenizer, requests, templates
):
    model, tokenizer = tiny_models("llama", dtype=torch.float64), tiny_tokenizer(bos=True)
    parts, easy = reference.architecture(model), requests(4)[3]
    factors, rights, divergences = [], [], []
    for steps in range(1, 11):
        settings = TargetSettings(steps=steps, lr=0.5, clamp=4.0, kl=0.5, decay=1e-3)
        found = reference.pmet_target(
            model, tokenizer, easy, templates, layer=LAYER, settings=settings, nll_factor=2.0
        )
        assert found.mlp.updates == steps - 1
        moved = [(parts.projection, found.mlp.delta), (parts.attention, found.attention.delta)]
        nll, divergence, right = by_hand(model, tokenizer, easy, flat(templates), moved)
        factors.append(found.mlp.parts[-1][0] / nll)
        rights.append(right)
        divergences.append(0.5 * divergence)
    assert factors == pytest.approx([2.0, *(0.2 if right else 2.0 for right in rights[:-1])])
    assert True in rights and False in rights[rights.index(True) :]  # eased and put back
    assert all(divergence > 0.01 for right, divergence in zip(rights, divergences, strict=True) if right)


@pytest.mark.parametrize(("kl", "ends"), [(0.0, True), (0.0027, True), (0.0031, False)])
def test_pmet_ends_when_every_token_is_right_and_the_weighted_kl_is_small(
    kl, ends, tiny_models, tiny_tokenizer, requests, templates
):
    model, tokenizer = tiny_models("llama", dtype=torch.float64), tiny_tokenizer(bos=True)
    parts, easy = reference.architecture(model), requests(4)[3]

    def after(steps):
        settings = TargetSettings(steps=steps, lr=0.5, clamp=4.0, kl=kl, decay=1e-3)
        found = reference.pmet_target(model, tokenizer, easy, templates, layer=LAYER, settings=settings)
        moved = [(parts.projection, found.mlp.delta), (parts.attention, found.attention.delta)]
        return found.mlp, by_hand(model, tokenizer, easy, flat(templates), moved)

    right = next(steps for steps in range(1, 20) if after(steps)[1][2])
    first, (_, divergence, _) = after(right)
    assert first.losses[-1] > 0.05
    assert (kl * divergence <= 0.01) is ends and kl * divergence < 0.012
    assert (after(right + 1)[0].updates == right - 1) is ends
