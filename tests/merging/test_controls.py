from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging import MERGERS, Keys, MergeChain
from merging.controls import entries_of_energy, uniform

Batches = list[dict[str, Tensor]]
SHAPES = {"a": (6, 9), "b": (4, 5), "bias": (5,)}


def setting(seed: int, batches: int = 4) -> tuple[dict[str, Tensor], Batches]:
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    deltas = [
        {name: torch.randn(shape, generator=generator) * 1e-2 for name, shape in SHAPES.items()}
        for _ in range(batches)
    ]
    return base, deltas


def chain(name: str, base: dict[str, Tensor], kind: str = "shadow", **choice: Any) -> MergeChain:
    config, merger = MERGERS[name]
    return MergeChain(merger(config(**choice)), base, kind)  # type: ignore[arg-type]


def made_up_keys(base: dict[str, Tensor], seed: int) -> dict[str, Keys]:
    generator = torch.Generator().manual_seed(seed)
    keys = {}
    for name in ("a", "b"):
        inputs = torch.randn(3, base[name].shape[1], generator=generator)
        keys[name] = Keys(inputs=inputs, solved=inputs / 2, transposed=False)
    return keys


def literal(name: str, tau: Tensor) -> Tensor:
    """f(tau) in float64 by the definition, where it does not draw."""
    tau = tau.double()
    if name == "ema":
        return 0.3 * tau
    if name == "low-rank":
        if tau.ndim == 1:
            return tau
        u, s, v = np.linalg.svd(tau.numpy(), full_matrices=False)
        rank = max(1, round(0.5 * min(tau.shape)))
        return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank])
    assert name == "energy"
    kept = torch.zeros_like(tau).flatten()
    for i in tau.abs().flatten().argsort(descending=True).tolist():
        kept[i] = tau.flatten()[i]
        if kept.square().sum() >= 0.7 * tau.square().sum():
            break
    return kept.view(tau.shape)


CHOICES: dict[str, dict[str, Any]] = {
    "ema": {"rate": 0.3},
    "low-rank": {"rank_share": 0.5},
    "energy": {"energy": 0.7},
}


@pytest.mark.parametrize("kind", ["shadow", "merged"])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("seed", range(4))
def test_what_one_task_vector_decides_is_the_literal_recursion(name: str, kind: str, seed: int) -> None:
    base, deltas = setting(seed)
    steps = chain(name, base, kind, **CHOICES[name])
    edited = merged = {name: weight.double() for name, weight in base.items()}
    for delta in deltas:
        before = merged if kind == "merged" else edited
        edited = {w: before[w] + delta[w].double() for w in base}
        merged = {w: merged[w] + literal(name, edited[w] - merged[w]) for w in base}
        got = steps.step(delta)
        for w in base:
            torch.testing.assert_close(got[w].double(), merged[w], rtol=0, atol=1e-6)
        edited, merged = ({w: t.double() for w, t in one.items()} for one in (steps.edited, got))


@pytest.mark.parametrize("kind", ["shadow", "merged"])
def test_shrinkage_is_that_part_of_the_way_from_the_unedited_weights(kind: str) -> None:
    base, deltas = setting(1)
    steps = chain("shrink", base, kind, scale=0.7)
    change = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in base}
    for delta in deltas:
        got = steps.step(delta)
        for name in base:
            change[name] = (0.7 * change[name] if kind == "merged" else change[name]) + delta[name].double()
            torch.testing.assert_close(got[name].double(), base[name] + 0.7 * change[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("shrink", {"scale": 1.0}), ("ema", {"rate": 1.0}), ("random", {"pruning_ratio": 0.0}),
        ("dare", {"pruning_ratio": 0.0}), ("self-aware", {"pruning_ratio": 0.0}),
    ],
)  # fmt: skip
def test_at_full_strength_the_merged_weights_are_the_edited_ones_bit_for_bit(
    name: str, choice: dict[str, Any]
) -> None:
    base, deltas = setting(2)
    steps = chain(name, base, **choice)
    for delta in deltas:
        merged = steps.step(delta)
        assert all(torch.equal(merged[w], steps.edited[w]) for w in base)


@pytest.mark.parametrize("name", sorted(MERGERS))
def test_every_merger_keeps_what_it_is_given_and_answers_in_full_precision(name: str) -> None:
    base, deltas = setting(3, 2)
    base["a"] = base["a"].bfloat16()
    base["untouched"] = torch.ones(2, dtype=torch.float16)
    copies = [{k: v.clone() for k, v in mapping.items()} for mapping in (base, *deltas)]
    steps = chain(name, base)
    merged = [steps.step(delta, made_up_keys(base, i)) for i, delta in enumerate(deltas)]
    for given_one, copy in zip((base, *deltas), copies, strict=True):
        assert all(torch.equal(given_one[k], copy[k]) for k in copy)
    for weights in merged:
        assert set(weights) == set(base)
        assert weights["untouched"] is base["untouched"]
        assert weights["a"].dtype == weights["b"].dtype == torch.float32
        assert all(weights[k].shape == base[k].shape for k in base)
    assert not torch.equal(merged[0]["b"], merged[1]["b"])


@pytest.mark.parametrize("name", sorted(MERGERS))
def test_every_merger_gives_the_same_again(name: str) -> None:
    base, deltas = setting(4)
    one, other = chain(name, base), chain(name, base)
    for i, delta in enumerate(deltas):
        first, second = (steps.step(delta, made_up_keys(base, i)) for steps in (one, other))
        assert all(torch.equal(first[k], second[k]) for k in base)


@pytest.mark.parametrize("name", sorted(MERGERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_merger_refuses_what_is_not_finite(name: str, bad: float) -> None:
    base, (delta,) = setting(5, 1)
    delta["b"][1, 2] = bad
    with pytest.raises(ValueError, match="'b' has entries that are not finite"):
        chain(name, base).step(delta, made_up_keys(base, 0))


@pytest.mark.parametrize("name", sorted(MERGERS))
def test_every_mergers_defaults_are_accepted_and_its_config_named_by_field(name: str) -> None:
    config, merger = MERGERS[name]
    assert merger(config()).needs_keys == (name == "refit")
    for field in ("pruning_ratio", "scale", "rate", "rank_share", "energy", "ridge", "repeat"):
        if hasattr(config(), field):
            for value in (-0.5, float("nan"), float("inf")):
                with pytest.raises(ValueError, match=f"^{field} is {value}"):
                    config(**{field: value})


def test_dare_cannot_drop_everything() -> None:
    with pytest.raises(ValueError, match=r"pruning_ratio is 1; it must lie in \[0, 1\)"):
        MERGERS["dare"][0](pruning_ratio=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 1))
def test_random_keeps_as_many_entries_as_self_aware_as_they_are(seed: int, ratio: float) -> None:
    base, (delta,) = setting(seed, 1)
    merged = chain("random", base, pruning_ratio=ratio, seed=seed).step(delta)
    for name in base:
        kept = merged[name] != base[name]
        assert int(kept.sum()) == round((1 - ratio) * base[name].numel())
        assert torch.equal(merged[name], torch.where(kept, base[name] + delta[name], base[name]))


def test_what_is_drawn_differs_by_seed_batch_and_parameter() -> None:
    base = {name: torch.zeros(20, 20) for name in "ab"}
    ones = {name: torch.ones(20, 20) for name in "ab"}

    def masks(name: str, seed: int) -> list[Tensor]:
        steps = chain(name, base, "merged", pruning_ratio=0.5, seed=seed)
        before, found = base, []
        for _ in range(2):
            merged = steps.step(ones)
            found += [merged[k] != before[k] for k in "ab"]
            before = merged
        return found

    for name in ("random", "dare"):
        drawn = masks(name, 0) + masks(name, 1)
        assert all(torch.equal(a, b) for a, b in zip(drawn[:4], masks(name, 0), strict=True))
        for i, one in enumerate(drawn):
            for other in drawn[i + 1 :]:
                assert 0.35 < float((one == other).float().mean()) < 0.65


def test_dare_drops_by_chance_and_keeps_the_mean() -> None:
    base, delta = {"w": torch.zeros(300, 300)}, {"w": torch.full((300, 300), 3.0)}
    merged = chain("dare", base, pruning_ratio=0.75).step(delta)["w"]
    assert set(merged.flatten().tolist()) == {0, 12}
    assert float(merged.mean()) == pytest.approx(3, rel=0.03)
    drawn = uniform(delta["w"], "0/1/w")
    assert torch.equal(merged, torch.where(drawn < 0.75, 0.0, 12.0))


@pytest.mark.parametrize("kind", ["shadow", "merged"])
def test_dares_errors_add_up_and_do_not_multiply(kind: str) -> None:
    base = {"w": torch.zeros(100, 100)}
    steps = chain("dare", base, kind, pruning_ratio=0.8)
    for batch in range(1, 11):
        off = steps.step({"w": torch.ones(100, 100)})["w"] - batch
        assert float(off.square().mean()) == pytest.approx(batch * 0.8 / 0.2, rel=0.1)


def test_drawn_numbers_are_those_of_the_key_for_good() -> None:
    drawn = uniform(torch.zeros(2, 2), "0/1/model.w")
    torch.testing.assert_close(drawn, torch.tensor([[0.5234, 0.5764], [0.3737, 0.9854]]), rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.floats(0.01, 1))
def test_energy_is_reached_and_not_without_the_last_entry(values: list[float], share: float) -> None:
    tensor = torch.tensor(values)
    keep = entries_of_energy(tensor, share)
    squares = np.sort(np.square(np.array(tensor.tolist())))[::-1]
    if squares.sum() == 0:
        assert keep == 0
        return
    assert squares[:keep].sum() >= share * squares.sum() * (1 - 1e-12)
    assert squares[: keep - 1].sum() < share * squares.sum() * (1 + 1e-12)
