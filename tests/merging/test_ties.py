import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merging import MERGERS, MergeChain
from merging.self_aware import top_magnitude_mask


def ties(base: dict[str, Tensor], kind: str = "shadow", **choice: object) -> MergeChain:
    config, merger = MERGERS["ties"]
    return MergeChain(merger(config(**choice)), base, kind)  # type: ignore[arg-type]


def slow(deltas: list[Tensor], keep: int, combine: str) -> Tensor:
    """Trim, elect, disjoint merge, entry by entry in float64."""
    trimmed = [(delta * top_magnitude_mask(delta, keep)).double().flatten() for delta in deltas]
    merged = torch.zeros(deltas[0].numel(), dtype=torch.float64)
    for i in range(len(merged)):
        values = [delta[i].item() for delta in trimmed]
        mass = {sign: sum(abs(v) for v in values if v * sign > 0) for sign in (1, -1)}
        if mass[1] == mass[-1]:
            continue
        elected = max(mass, key=mass.__getitem__)
        agreeing = [v for v in values if v * elected > 0]
        merged[i] = sum(agreeing) / (len(agreeing) if combine == "mean" else 1)
    return merged.view(deltas[0].shape)


@pytest.mark.parametrize("kind", ["shadow", "merged"])
@pytest.mark.parametrize("combine", ["sum", "mean"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([0.0, 0.5, 0.85]))
def test_each_batch_is_the_slow_loop_over_all_so_far(
    combine: str, kind: str, seed: int, batches: int, ratio: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(5, 8, generator=generator)}
    deltas = [torch.randn(5, 8, generator=generator) for _ in range(batches)]
    chain = ties(base, kind, pruning_ratio=ratio, combine=combine, scale=0.5)
    for t, delta in enumerate(deltas, start=1):
        merged = chain.step({"w": delta})["w"]
        expected = base["w"] + 0.5 * slow(deltas[:t], round((1 - ratio) * 40), combine)
        torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-5)


def test_by_hand() -> None:
    deltas = [torch.tensor([3.0, -2.0, 1.0, 1.0]), torch.tensor([-1.0, -4.0, -1.0, 0.0])]
    found = {}
    for combine in ("sum", "mean"):
        chain = ties({"w": torch.zeros(4)}, pruning_ratio=0, combine=combine)
        chain.step({"w": deltas[0]})
        found[combine] = chain.step({"w": deltas[1]})["w"].tolist()
    assert found == {"sum": [3, -6, 0, 1], "mean": [3, -3, 0, 1]}


def test_without_trimming_or_conflict_the_sum_is_what_was_edited() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(4, 4, generator=generator)}
    sign = torch.randn(4, 4, generator=generator).sign()
    chain = ties(base, pruning_ratio=0)
    for _ in range(3):
        merged = chain.step({"w": sign * torch.rand(4, 4, generator=generator)})
        torch.testing.assert_close(merged["w"], chain.edited["w"])


def test_a_parameter_that_a_batch_leaves_alone_stays_as_it_was_merged() -> None:
    chain = ties({"w": torch.zeros(2), "v": torch.zeros(2)}, pruning_ratio=0.5)
    first = chain.step({"w": torch.tensor([2.0, 1.0])})
    second = chain.step({"v": torch.tensor([3.0, 4.0])})
    assert second["w"] is first["w"]
    assert (second["w"].tolist(), second["v"].tolist()) == ([2, 0], [0, 4])


def test_an_unknown_way_to_combine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown combine 'median'; known: \['mean', 'sum'\]"):
        MERGERS["ties"][0](combine="median")
