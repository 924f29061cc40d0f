import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging import MERGERS, Keys, MergeChain
from merging.refit import repeated, ridge_fit

D_IN, D_OUT, EDITS = 12, 7, 3
Pair = tuple[Tensor, Tensor]  # a batch's change (D_out, D_in) and its keys (edits, D_in)


def covariance(seed: int) -> Tensor:
    keys = torch.randn(D_IN, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return keys @ keys.T / 60


def setting(seed: int, batches: int) -> tuple[Tensor, list[Pair]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(D_OUT, D_IN, generator=generator)
    return base, [
        (torch.randn(D_OUT, D_IN, generator=generator), torch.randn(EDITS, D_IN, generator=generator))
        for _ in range(batches)
    ]


def keys_of(inputs: Tensor, seed: int, transposed: bool = False) -> dict[str, Keys]:
    solved = torch.linalg.solve(covariance(seed), inputs.double().T).T
    return {"w": Keys(inputs=inputs, solved=solved, transposed=transposed)}


def refit(base: Tensor, kind: str = "shadow", **choice: Any) -> MergeChain:
    """Corrects at once, unless told otherwise."""
    config, merger = MERGERS["refit"]
    return MergeChain(merger(config(**{"forgotten": 0.0, **choice})), {"w": base}, kind)  # type: ignore[arg-type]


def least_squares(keys: Tensor, wanted: Tensor, seed: int, ridge: float) -> Tensor:
    """argmin ||D K - V||^2 + ridge tr(D C D^T) by numpy; keys (n, d_in), wanted (n, d_out)."""
    root = np.linalg.cholesky(covariance(seed).numpy())
    rows = np.concatenate([keys.double().numpy(), ridge**0.5 * root.T])
    values = np.concatenate([wanted.double().numpy(), np.zeros((D_IN, D_OUT))])
    return torch.from_numpy(np.linalg.lstsq(rows, values, rcond=None)[0].T)


@pytest.mark.parametrize("kind", ["shadow", "merged"])
@pytest.mark.parametrize("anchor", ["base", "edited"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.sampled_from([0.1, 3.0]), st.sampled_from([1.0, 0.5]))
def test_each_batch_is_the_augmented_least_squares_over_all_so_far(
    anchor: str, kind: str, seed: int, batches: int, ridge: float, scale: float
) -> None:
    base, pairs = setting(seed, batches)
    chain = refit(base, kind, ridge=ridge, anchor=anchor, scale=scale)
    edited = merged = base.double()
    keys, wanted = torch.empty(0, D_IN), torch.empty(0, D_OUT, dtype=torch.float64)
    for delta, inputs in pairs:
        edited = (merged if kind == "merged" else edited) + delta.double()
        change = edited - base.double()
        keys = torch.cat([keys, inputs])
        wanted = torch.cat([wanted, inputs.double() @ change.T])
        if anchor == "base":
            fitted = least_squares(keys, wanted, seed, ridge)
        else:
            fitted = change + least_squares(keys, wanted - keys.double() @ change.T, seed, ridge)
        merged = base.double() + scale * fitted
        got = chain.step({"w": delta}, keys_of(inputs, seed))["w"]
        torch.testing.assert_close(got.double(), merged, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("anchor", ["base", "edited"])
def test_without_a_ridge_every_batch_gets_its_own_response_back(anchor: str) -> None:
    base, pairs = setting(1, 3)
    chain = refit(base, ridge=1e-9, anchor=anchor)
    given_then = []
    for delta, inputs in pairs:
        merged = chain.step({"w": delta}, keys_of(inputs, 1))["w"]
        given_then.append((inputs, (chain.edited["w"] - base) @ inputs.T))
    for inputs, response in given_then:
        torch.testing.assert_close((merged - base) @ inputs.T, response, rtol=1e-3, atol=1e-4)
    assert not torch.allclose((chain.edited["w"] - base) @ pairs[0][1].T, given_then[0][1], atol=0.1)


def test_nothing_smaller_on_preserved_keys_gives_the_same_responses() -> None:
    base, ((delta, inputs),) = setting(2, 1)
    change = (
        refit(base, ridge=1e-9, anchor="base").step({"w": delta}, keys_of(inputs, 2))["w"].double()
        - base.double()
    )

    def size(matrix: Tensor) -> float:
        return float(torch.trace(matrix @ covariance(2) @ matrix.T))

    keys = inputs.double().T
    for seed in range(5):
        other = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(seed)).double()
        other -= other @ keys @ torch.linalg.pinv(keys)  # nothing on the keys
        assert size(change + 0.05 * other) > size(change)
    assert size(change) < size(delta.double())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.permutations(range(EDITS)))
def test_the_order_of_a_batchs_edits_does_not_matter(seed: int, order: list[int]) -> None:
    base, ((delta, inputs),) = setting(seed, 1)
    one = refit(base, anchor="base").step({"w": delta}, keys_of(inputs, seed))["w"]
    other = refit(base, anchor="base").step({"w": delta}, keys_of(inputs[order], seed))["w"]
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("anchor", ["base", "edited"])
def test_a_weight_stored_transposed_is_fitted_as_its_transpose(anchor: str) -> None:
    base, pairs = setting(3, 3)
    base = base[:, :D_OUT].contiguous()  # square, so that no shape tells
    one, other = refit(base, anchor=anchor, ridge=1.0), refit(base.T.contiguous(), anchor=anchor, ridge=1.0)
    for delta, inputs in pairs:
        keys = inputs[:, :D_OUT].contiguous()
        stored = {t: {"w": Keys(inputs=keys, solved=keys / 3, transposed=t)} for t in (False, True)}
        first = one.step({"w": delta[:, :D_OUT]}, stored[False])["w"]
        second = other.step({"w": delta[:, :D_OUT].T}, stored[True])["w"]
        torch.testing.assert_close(first, second.T)


def test_an_edit_made_again_is_the_later_one() -> None:
    base, ((first, inputs), (second, others)) = setting(4, 2)
    others[1] = inputs[2] * (1 + 1e-6)
    chain = refit(base, ridge=1e-6, anchor="base")
    chain.step({"w": first}, keys_of(inputs, 4))
    merged = chain.step({"w": second}, keys_of(others, 4))["w"] - base
    torch.testing.assert_close(merged @ others.T, (first + second) @ others.T, rtol=1e-3, atol=1e-3)
    kept = inputs[:2]
    torch.testing.assert_close(merged @ kept.T, first @ kept.T, rtol=1e-3, atol=1e-3)


def test_an_edit_is_recognised_by_one_weight_and_dropped_at_all() -> None:
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.zeros(2, 4) for name in ("low", "high")}
    deltas = [{name: torch.randn(2, 4, generator=generator) for name in base} for _ in range(2)]
    low = torch.eye(4)[:1]
    config, merger = MERGERS["refit"]
    chain = MergeChain(merger(config(ridge=1e-6, anchor="base")), base)
    for delta, high in zip(deltas, ([1.0, 0, 0, 0], [1.0, 0.2, 0, 0]), strict=True):  # it moved
        inputs = {"low": low, "high": torch.tensor([high])}
        keys = {n: Keys(inputs=k, solved=k, transposed=False) for n, k in inputs.items()}
        merged = chain.step(delta, keys)
    alone = MergeChain(merger(config(ridge=1e-6, anchor="base")), base)
    both = {name: deltas[0][name] + deltas[1][name] for name in base}
    for name, weight in alone.step(both, keys).items():
        torch.testing.assert_close(merged[name], weight)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-4, 1e-2]))
def test_repeats_are_what_the_distance_says(seed: int, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    earlier = torch.randn(6, 5, generator=generator)
    noise = torch.randn(6, 5, generator=generator)
    later = earlier[::2] + noise[::2] * torch.tensor([1e-6, 1e-3, 1.0])[:, None]
    expected = [
        any(float((a - b).double().norm() / a.double().norm()) <= tolerance for b in later) for a in earlier
    ]
    assert repeated(earlier, later, tolerance).tolist() == expected


def test_a_parameter_without_keys_follows_the_edited_weights() -> None:
    base, pairs = setting(6, 2)
    config, merger = MERGERS["refit"]
    chain = MergeChain(merger(config()), {"w": base, "bias": torch.zeros(D_OUT)})
    for delta, inputs in pairs:
        merged = chain.step({"w": delta, "bias": torch.ones(D_OUT)}, keys_of(inputs, 6))
        assert torch.equal(merged["bias"], chain.edited["bias"])


def test_keys_of_the_first_batches_still_count_where_a_later_one_leaves_the_weight_alone() -> None:
    base, ((delta, inputs), (_, others)) = setting(7, 2)
    config, merger = MERGERS["refit"]
    chain = MergeChain(merger(config(ridge=0.5, anchor="base")), {"w": base, "v": torch.zeros(2)})
    chain.step({"w": delta}, keys_of(inputs, 7))
    merged = chain.step({"v": torch.ones(2)}, keys_of(others, 7))["w"]
    keys = torch.cat([inputs, others])
    expected = base + least_squares(keys, keys @ delta.T, 7, 0.5)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_fitted_is_refused_in_a_line() -> None:
    base, ((delta, inputs),) = setting(8, 1)
    with pytest.raises(ValueError, match="without its keys"):
        refit(base).step({"w": delta})
    inputs[0, 0] = float("nan")
    with pytest.raises(ValueError, match="key of 'w' has entries that are not finite"):
        refit(base).step({"w": delta}, {"w": Keys(inputs=inputs, solved=inputs, transposed=False)})
    same = torch.ones(3, D_IN)
    with pytest.raises(ValueError, match="ridge is 1e-300; the keys of 3 edits are too alike"):
        ridge_fit(same, same, torch.ones(3, D_OUT), 1e-300)
    with pytest.raises(ValueError, match=r"unknown anchor 'last'; known: \['base', 'edited'\]"):
        MERGERS["refit"][0](anchor="last")
    with pytest.raises(ValueError, match=r"forgotten is -0.1; it must be a share, 0 or more"):
        MERGERS["refit"][0](forgotten=-0.1)


def test_anchored_at_the_edited_weights_one_batch_is_left_as_it_is() -> None:
    base, ((delta, inputs),) = setting(10, 1)
    chain = refit(base, anchor="edited", ridge=5.0)
    torch.testing.assert_close(chain.step({"w": delta}, keys_of(inputs, 10))["w"], chain.edited["w"])


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_nothing_is_corrected_until_a_share_of_the_responses_is_forgotten(scale: float) -> None:
    base, pairs = setting(12, 4)
    pairs = [(0.3 * delta if batch else delta, inputs) for batch, (delta, inputs) in enumerate(pairs)]
    change = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    keys, given_then = torch.empty(0, D_IN, dtype=torch.float64), torch.empty(0, D_OUT, dtype=torch.float64)
    shares = []
    for delta, inputs in pairs:
        change += delta.double()
        keys = torch.cat([keys, inputs.double()])
        given_then = torch.cat([given_then, inputs.double() @ change.T])
        shares.append(float((given_then - keys @ change.T).norm() / given_then.norm()))
    assert shares == sorted(shares)
    threshold = (shares[1] + shares[2]) / 2
    gated = refit(base, forgotten=threshold, ridge=1.0, scale=scale)
    always = refit(base, ridge=1.0, scale=scale)
    for batch, (delta, inputs) in enumerate(pairs):
        own = gated.step({"w": delta}, keys_of(inputs, 12))["w"]
        corrected = always.step({"w": delta}, keys_of(inputs, 12))["w"]
        if shares[batch] >= threshold:
            assert torch.equal(own, corrected)
        elif scale == 1:
            assert torch.equal(own, gated.edited["w"])
        else:
            torch.testing.assert_close(own, base + scale * (gated.edited["w"] - base))
    assert not torch.allclose(corrected, base + scale * (always.edited["w"] - base), atol=1e-3)


def test_what_is_forgotten_is_one_share_of_all_weights_together() -> None:
    """The second weight alone is below the threshold, the first and both together are above it."""
    base, pairs = setting(14, 2)
    config, merger = MERGERS["refit"]
    sizes = {"much": 1.0, "little": 0.05}  # by which the second batch changes them
    weights = {name: base.clone() for name in sizes}

    def steps(forgotten: float) -> tuple[dict[str, Tensor], MergeChain]:
        chain = MergeChain(merger(config(forgotten=forgotten, ridge=1.0)), weights)
        for batch, (delta, inputs) in enumerate(pairs):
            keys = keys_of(inputs, 14)["w"]
            changes = {name: delta * (size if batch else 1.0) for name, size in sizes.items()}
            merged = chain.step(changes, dict.fromkeys(sizes, keys))
        return merged, chain

    (first, keys), (second, others) = pairs
    given, moved = {}, {}
    for name, size in sizes.items():
        both = (first + size * second).double()
        responses = [keys.double() @ first.double().T, others.double() @ both.T]
        given[name] = sum(float(part.square().sum()) for part in responses)
        moved[name] = float((keys.double() @ (size * second.double()).T).square().sum())
    alone = {name: (moved[name] / given[name]) ** 0.5 for name in sizes}
    share = (sum(moved.values()) / sum(given.values())) ** 0.5
    assert alone["little"] < share < alone["much"]
    for forgotten, corrected in ((0.999 * share, True), (1.001 * share, False)):
        merged, chain = steps(forgotten)
        for name in sizes:
            assert torch.equal(merged[name], chain.edited[name]) != corrected


@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_anchored_at_the_edited_weights_it_is_memits_solve_of_all_batches_together(ridge: float) -> None:
    base, pairs = setting(11, 3)
    chain = refit(base, anchor="edited", ridge=ridge)
    change = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    wanted = []
    for residual, inputs in pairs:
        keys = keys_of(inputs, 11)
        k, y = inputs.double(), keys["w"].solved
        aimed = residual[:, :EDITS].double()
        delta = aimed @ torch.linalg.solve(k @ y.T + ridge * torch.eye(EDITS), y)
        wanted.append(change @ k.T + aimed)
        change = change + delta
        merged = chain.step({"w": delta.float()}, keys)["w"]
    k = torch.cat([inputs for _, inputs in pairs]).double()
    y = torch.linalg.solve(covariance(11), k.T)
    system = k @ y + ridge * torch.eye(len(k))
    together = torch.cat(wanted, dim=1) @ torch.linalg.solve(system, y.T)
    torch.testing.assert_close(merged.double() - base.double(), together, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("anchor", ["base", "edited"])
def test_neither_form_depends_on_how_preserved_keys_are_scaled_beside_the_ridge(anchor: str) -> None:
    base, pairs = setting(9, 2)
    found = []
    for factor in (1.0, 4.0):  # lambda C stays
        chain = refit(base, ridge=8.0 / factor, anchor=anchor)
        for delta, inputs in pairs:
            keys = Keys(inputs=inputs, solved=inputs / factor, transposed=False)
            merged = chain.step({"w": delta}, {"w": keys})["w"]
        found.append(merged)
    for one, other in itertools.pairwise(found):
        torch.testing.assert_close(one, other)
