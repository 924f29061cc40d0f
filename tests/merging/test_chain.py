import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from merging import MergeChain, SelfAware, SelfAwareConfig, preserved_key_drift
from merging.self_aware import top_magnitude_mask

Batches = list[dict[str, Tensor]]


def shadow_chain(merger: SelfAware, base: dict[str, Tensor], deltas: Batches) -> Batches:
    """The merged weights after each batch."""
    chain = MergeChain(merger, base)
    return [chain.step(delta) for delta in deltas]


def setting(seed: int, batches: int, size: float = 1e-2) -> tuple[dict[str, Tensor], Batches]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (6, 9), "b": (4, 5)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    deltas = [
        {name: torch.randn(shape, generator=generator) * size for name, shape in shapes.items()}
        for _ in range(batches)
    ]
    return base, deltas


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).flatten().tolist()


def merger(ratio: float) -> SelfAware:
    return SelfAware(SelfAwareConfig(pruning_ratio=ratio))


@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(1e-8, 1e3))
def test_without_pruning_both_chains_are_the_unmerged_weights_bit_for_bit(
    seed: int, batches: int, size: float
) -> None:
    base, deltas = setting(seed, batches, size)
    unmerged = {name: weight.clone() for name, weight in base.items()}
    follows = dict(base)
    for delta, shadowed in zip(deltas, shadow_chain(merger(0), base, deltas), strict=True):
        follows = merger(0).merge(follows, [delta])
        for name in base:
            unmerged[name] += delta[name]  # as an editor writes
            assert bits(shadowed[name]) == bits(unmerged[name]) == bits(follows[name])


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_pruning_everything_leaves_the_base(seed: int, batches: int) -> None:
    base, deltas = setting(seed, batches)
    for merged in shadow_chain(merger(1), base, deltas):
        assert all(torch.equal(merged[name], base[name]) for name in base)


@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(0, 1))
def test_merged_and_residual_make_the_unmerged_weights(seed: int, batches: int, ratio: float) -> None:
    base, deltas = setting(seed, batches)
    unmerged, previous = dict(base), dict(base)
    for delta, merged in zip(deltas, shadow_chain(merger(ratio), base, deltas), strict=True):
        for name in base:
            unmerged[name] = unmerged[name] + delta[name]
            task = unmerged[name].double() - previous[name].double()  # tau_t = M_t - M~_{t-1}
            moved = merged[name] != previous[name]
            assert int(moved.sum()) <= SelfAwareConfig(pruning_ratio=ratio).kept(task.numel())
            residual = torch.where(moved, 0.0, task)  # e_t = (1 - Pr) tau_t
            torch.testing.assert_close(
                merged[name].double() + residual, unmerged[name].double(), rtol=0, atol=1e-6
            )
        previous = merged


def test_what_was_pruned_competes_in_the_next_batch_and_in_the_merged_chain_is_gone() -> None:
    base = {"w": torch.zeros(4)}
    deltas = [{"w": torch.tensor([4.0, 3.0, 0.0, 0.0])}, {"w": torch.tensor([0.0, 0.0, 1.0, 2.0])}]
    shadow = [merged["w"].tolist() for merged in shadow_chain(merger(0.75), base, deltas)]
    assert shadow == [[4, 0, 0, 0], [4, 3, 0, 0]]
    assert merger(0.75).merge(base, deltas)["w"].tolist() == [4, 0, 0, 2]


def test_first_step_selects_by_the_batchs_own_delta_as_in_the_merged_chain() -> None:
    base, (delta,) = setting(5, 1)
    delta["b"] = torch.full_like(base["b"], 1e-3)  # all tied, which differences of rounded weights are not
    (merged,) = shadow_chain(merger(0.85), base, [delta])
    for name, weight in base.items():
        mask = top_magnitude_mask(delta[name], round(0.15 * weight.numel()))
        assert torch.equal(merged[name], torch.where(mask, weight + delta[name], weight))
        assert torch.equal(merged[name], merger(0.85).merge(base, [delta])[name])


def test_a_parameter_that_a_batch_leaves_alone_still_catches_up() -> None:
    base = {"w": torch.zeros(2), "v": torch.zeros(2)}
    deltas = [{"w": torch.tensor([2.0, 1.0])}, {"v": torch.tensor([3.0, 4.0])}]
    *_, last = shadow_chain(merger(0.5), base, deltas)
    assert last["w"].tolist() == [2, 1]
    assert last["v"].tolist() == [0, 4]


def test_earlier_results_are_not_overwritten() -> None:
    base, deltas = setting(6, 3)
    chain = shadow_chain(merger(0.5), base, deltas)
    steps = MergeChain(merger(0.5), base)
    for delta, expected in zip(deltas, chain, strict=True):
        merged = steps.step(delta)
        assert all(torch.equal(merged[name], expected[name]) for name in base)
    assert not torch.equal(chain[0]["a"], chain[1]["a"])


@pytest.mark.parametrize("kind", ["shadow", "merged"])
def test_a_chain_is_the_literal_recursion(kind: str) -> None:
    base, deltas = setting(9, 4)
    chain = MergeChain(merger(0.7), base, kind)  # type: ignore[arg-type]
    edited = merged = base
    for delta in deltas:
        before = merged if kind == "merged" else edited
        edited = {name: before[name] + delta[name] for name in base}
        task = {name: edited[name].double() - merged[name].double() for name in base}
        got = chain.step(delta)
        for name in base:
            kept = top_magnitude_mask(task[name], round(0.3 * task[name].numel()))
            expected = torch.where(kept, edited[name], merged[name])
            torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-6)
        merged = got


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="'x'"):
        MergeChain(merger(0), {"w": torch.zeros(1)}).step({"x": torch.zeros(1)})


def test_drift_is_the_root_of_the_ratio_of_traces() -> None:
    generator = torch.Generator().manual_seed(7)
    tau, weight, keys = (torch.randn(shape, generator=generator) for shape in ((3, 5), (3, 5), (5, 40)))
    covariance = keys @ keys.T / 40
    direct = ((tau @ keys).square().sum() / (weight @ keys).square().sum()).sqrt()
    assert preserved_key_drift(tau, weight, covariance) == pytest.approx(float(direct), rel=1e-5)
    assert preserved_key_drift(weight, weight, covariance) == 1
    with pytest.raises(ValueError, match="preserved key"):
        preserved_key_drift(tau, weight * 0, covariance)


def test_pruning_breaks_the_null_space_of_a_projected_update() -> None:
    generator = torch.Generator().manual_seed(8)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    covariance = basis[:, :3] @ basis[:, :3].T
    weight = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    projected = torch.randn(6, 8, generator=generator, dtype=torch.float64) @ basis[:, 3:] @ basis[:, 3:].T
    assert preserved_key_drift(projected, weight, covariance) < 1e-7
    pruned = torch.where(top_magnitude_mask(projected, 12), projected, 0.0)
    assert preserved_key_drift(pruned, weight, covariance) > 0.05
