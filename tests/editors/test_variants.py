"""The mathematics that sets each closed-form editor apart from MEMIT, on its own terms."""

import math
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import reference, tiny
from editors import EDITORS, LowRank, dense
from editors.contexts import Contexts
from editors.linalg import cholesky, equality_right, relative_change_mask, restrained_change
from editors.prune import Prune, PruneConfig
from editors.targets import TargetConfig, optimise_targets

CONTEXTS = Contexts(tuple(tuple(group) for group in tiny.TEMPLATES))
FLAT = Contexts((CONTEXTS.templates,))
MEMIT: dict[str, Any] = {"layers": (1, 2, 3), "steps": 5, "covariance_weight": 50.0}


def covariance(layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    samples = torch.randn(200, 48, generator=generator, dtype=torch.float64)
    return samples.T @ samples / 200


def start(name: str, model: Any, contexts: Contexts = CONTEXTS, **fields: Any) -> Any:
    config, kind = EDITORS[name]
    stream = kind(config(**fields)).start(model, tiny.tiny_tokenizer(bos=True), covariance=covariance, seed=0)
    stream.contexts = contexts
    return stream


def two_batches(name: str, model_type: str = "llama", **fields: Any) -> list[dict[str, Tensor]]:
    stream = start(name, tiny.tiny_model(model_type), **fields)
    requests = tiny.tiny_requests(6)
    return [{n: dense(d) for n, d in stream.edit(part).items()} for part in (requests[:3], requests[3:])]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- EMMET ----------------------------------------------------------------------------------------------


def test_emmet_without_ridge_maps_keys_to_their_targets_exactly() -> None:
    moment, keys, residual = covariance(1), random(48, 5), random(32, 5, seed=1)
    change = residual @ equality_right(cholesky(moment), keys, 0.0).T
    torch.testing.assert_close(change @ keys, residual, rtol=0, atol=1e-10)
    inverse = torch.linalg.inv(moment)
    soft = residual @ torch.linalg.inv(keys.T @ inverse @ keys + 0.1 * torch.eye(5)) @ keys.T @ inverse
    torch.testing.assert_close(residual @ equality_right(cholesky(moment), keys, 0.1).T, soft)


def test_emmet_does_not_soften_a_single_edit() -> None:
    request = tiny.tiny_requests(1)
    hard, soft = (
        start("emmet", tiny.tiny_model("llama"), **MEMIT, ridge=ridge).edit(request) for ridge in (0.0, 5.0)
    )
    assert same([{n: dense(d) for n, d in hard.items()}], [{n: dense(d) for n, d in soft.items()}])
    assert not same(two_batches("emmet", **MEMIT, ridge=0.0), two_batches("emmet", **MEMIT, ridge=5.0))


def test_emmet_adds_the_identity_weight() -> None:
    plain = start("emmet", tiny.tiny_model("llama"), **MEMIT)
    heavy = start("emmet", tiny.tiny_model("llama"), **MEMIT, identity_weight=3.0)
    keys = random(48, 2)
    torch.testing.assert_close(
        heavy.preserved(1, keys), plain.preserved(1, keys) + 3 * torch.eye(48, dtype=torch.float64)
    )


# -- RECT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_rect_that_keeps_everything_is_memit(model_type: str, walk: bool) -> None:
    fields = MEMIT | {"kept_share": 1.0, "prune_during_walk": walk}
    assert same(two_batches("memit", model_type, **MEMIT), two_batches("rect", model_type, **fields))


def test_rect_keeps_the_relatively_largest_changes_whole() -> None:
    model = tiny.tiny_model("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    request = tiny.tiny_requests(3)
    pruned = start("rect", model, **MEMIT).edit(request)
    whole = start("memit", tiny.tiny_model("llama"), **MEMIT).edit(request)
    for name, delta in pruned.items():
        change, full = dense(delta), dense(whole[name])
        kept = change != 0
        assert kept.sum() == round(0.4 * change.numel())
        assert torch.equal(change[kept], full[kept])
        ratio = full.abs() / (before[name].abs() + 1e-8)
        assert ratio[kept].min() >= ratio[~kept].max()


def test_pruning_during_the_walk_changes_the_layers_above() -> None:
    last, walk = (two_batches("rect", **MEMIT, prune_during_walk=flag)[0] for flag in (False, True))
    names = sorted(last)
    assert torch.equal(last[names[0]], walk[names[0]])
    assert not torch.equal(last[names[1]], walk[names[1]])


def test_the_mask_counts_exactly_and_ties_go_to_the_lowest_index() -> None:
    change = torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, -1.0]])
    mask = relative_change_mask(change, torch.ones(2, 3), 0.5)
    assert mask.tolist() == [[True, True, True], [False, False, False]]
    assert not relative_change_mask(change, torch.ones(2, 3), 0.01).any()
    assert relative_change_mask(change, torch.zeros(2, 3), 1.0).all()


# -- PRUNE ----------------------------------------------------------------------------------------------


def test_prune_below_its_bound_is_memit_bit_for_bit() -> None:
    assert same(two_batches("memit", **MEMIT), two_batches("prune", **MEMIT))
    weight = {"w": 100 * random(32, 48).float(), "other": torch.zeros(2, 2)}
    edited = {"w": weight["w"] + random(32, 48, seed=1).float(), "other": weight["other"]}
    released, notes = Prune(PruneConfig(**MEMIT)).released(weight, edited)
    assert torch.equal(released["w"], edited["w"]) and released["other"] is weight["other"]
    assert notes == {"singular_values_restrained": {"w": 0}}


@pytest.mark.parametrize("base", [math.e, 2.0, 1.2])
def test_prune_restrains_the_singular_values_above_the_bound(base: float) -> None:
    weight, change = random(20, 30) / 10, random(20, 30, seed=1)
    bound = np.linalg.svd(weight.numpy(), compute_uv=False)[0]
    left, values, right = np.linalg.svd(change.numpy(), full_matrices=False)
    lowered = [
        math.log(v) / math.log(base) - math.log(bound) / math.log(base) + bound if v > bound else v
        for v in values
    ]
    assert 1 < sum(v > bound for v in values) < 20
    found, above = restrained_change(change, weight, base)
    assert above == sum(v > bound for v in values)
    torch.testing.assert_close(found, torch.tensor(left @ np.diag(lowered) @ right))

    editor = Prune(PruneConfig(**MEMIT, log_base=base))
    released, _ = editor.released({"w": weight}, {"w": weight + change})
    torch.testing.assert_close(released["w"], weight + found)
    twice = Prune(PruneConfig(**MEMIT, log_base=base, legacy_double_apply=True))
    doubled, _ = twice.released({"w": weight}, {"w": weight + change})
    torch.testing.assert_close(doubled["w"], weight + change + found)


# -- ROME -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("name", ["rome", "r-rome"])
def test_rome_is_of_rank_one_and_maps_the_key_to_its_target(name: str, model_type: str) -> None:
    model = tiny.tiny_model(model_type, dtype=torch.float64)
    request = tiny.tiny_requests(1)
    stream = start(name, model, FLAT, layers=(2,), steps=5)
    weight = reference.weight_name(model, 2)
    contexts = FLAT if name == "r-rome" else stream.bare
    stream_rows = stream._rows(request, contexts)
    key = stream_rows.keys()
    (delta,) = stream.edit(request).values()
    assert isinstance(delta, LowRank)
    assert torch.linalg.matrix_rank(dense(delta)) == 1
    after = model.get_parameter(weight).detach()
    matrix = after.T if model_type == "gpt2" else after
    bias = model.get_submodule(weight.removesuffix(".weight")).bias
    output = matrix @ key + (0 if bias is None else bias.detach()[:, None])
    torch.testing.assert_close(output[:, 0], stream.targets.values[0], rtol=0, atol=1e-9)


def test_rome_edits_one_after_the_other() -> None:
    requests = tiny.tiny_requests(3)
    together, apart = (tiny.tiny_model("llama", dtype=torch.float64) for _ in range(2))
    (delta,) = start("rome", together, FLAT, layers=(2,), steps=5).edit(requests).values()
    stream = start("rome", apart, FLAT, layers=(2,), steps=5)
    for request in requests:
        stream.edit([request])
    assert delta.left.shape[1] == 3
    name = reference.weight_name(together, 2)
    torch.testing.assert_close(together.get_parameter(name), apart.get_parameter(name), rtol=0, atol=1e-12)


def test_rome_without_covariance_needs_none() -> None:
    config, kind = EDITORS["rome"]
    assert kind(config(layers=(2,), use_covariance=False)).statistics() == ()
    assert kind(config(layers=(2,))).statistics() == (2,)
    stream = start("rome", tiny.tiny_model("llama"), FLAT, layers=(2,), steps=3, use_covariance=False)
    stream.covariance = None
    (delta,) = stream.edit(tiny.tiny_requests(1)).values()
    key = stream._rows(tiny.tiny_requests(1), FLAT).keys()[:, 0]
    assert torch.linalg.matrix_rank(torch.stack([delta.right[0], key])) == 1  # u lies along k


# -- PMET -----------------------------------------------------------------------------------------------


def test_the_two_vectors_of_pmet_only_meet_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the attention's vector cannot reach the loss, the MLP's is that of an optimisation alone."""
    model, tokenizer = tiny.tiny_model("llama", dtype=torch.float64), tiny.tiny_tokenizer(bos=True)
    config = TargetConfig(layers=(2,), steps=12, clamp_norm_factor=0.5)
    requests = tiny.tiny_requests(3)
    alone = optimise_targets(model, tokenizer, requests, CONTEXTS, config, places=("mlp",))
    both = optimise_targets(model, tokenizer, requests, CONTEXTS, config, places=("mlp", "attention"))
    assert not torch.equal(alone.values, both.values)

    import editors.targets

    adding = editors.targets.added_to_first

    @contextmanager
    def without_attention(module: Any, vectors: Tensor) -> Any:
        silent = module is model.model.layers[2].self_attn.o_proj
        with adding(module, 0 * vectors if silent else vectors):
            yield

    monkeypatch.setattr(editors.targets, "added_to_first", without_attention)
    cut = optimise_targets(model, tokenizer, requests, CONTEXTS, config, places=("mlp", "attention"))
    torch.testing.assert_close(cut.values, alone.values, rtol=0, atol=1e-12)


def test_pmet_finishes_an_edit_once_its_target_is_the_likeliest() -> None:
    model, tokenizer = tiny.tiny_model("llama", dtype=torch.float64), tiny.tiny_tokenizer(bos=True)
    config = TargetConfig(layers=(2,), steps=25, clamp_norm_factor=4.0, kl_factor=0.0, weight_decay=0.0)
    places = ("mlp", "attention")
    ruled, free = (
        optimise_targets(
            model, tokenizer, tiny.tiny_requests(4), CONTEXTS, config, places=places, nll_factor=factor
        )
        for factor in (1.0, None)
    )
    assert (ruled.updates <= free.updates).all() and (ruled.updates < free.updates).any()


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("pmet", "nll_factor", 0.0),
        ("emmet", "ridge", -1.0),
        ("emmet", "identity_weight", -1.0),
        ("rect", "kept_share", 0.0),
        ("rect", "kept_share", 1.5),
        ("prune", "log_base", 1.0),
        ("rome", "layers", (1, 2)),
        ("memit+blue", "layers", (1, 2, 3)),
        ("alphaedit+blue", "layers", (1,)),
    ],
)
def test_configs_name_the_wrong_field(name: str, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        EDITORS[name][0](**{"layers": (1, 2), field: value})
