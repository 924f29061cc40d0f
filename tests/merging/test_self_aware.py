import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import merging.self_aware as self_aware
from merging import MERGERS, SelfAware, SelfAwareConfig
from merging.self_aware import row_magnitude_mask, top_magnitude_mask

# few distinct values, so that ties are common, beside arbitrary ones
entries = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]), st.floats(-1e6, 1e6, width=32))


@st.composite
def tensors_and_counts(draw: st.DrawFn) -> tuple[Tensor, int]:
    values = draw(st.lists(entries, min_size=1, max_size=60))
    return torch.tensor(values, dtype=torch.float32), draw(st.integers(0, len(values)))


def expected_mask(tensor: Tensor, keep: int) -> Tensor:
    """By a whole sort: largest magnitude first, then lowest flat index."""
    magnitudes = np.abs(tensor.double().numpy().ravel())
    order = np.lexsort((np.arange(len(magnitudes)), -magnitudes))
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[torch.from_numpy(order[:keep])] = True
    return mask.view(tensor.shape)


def literal_scores(tensor: Tensor) -> Tensor:
    """SeqMMR's softmax(Normalize(tau * tau)) over the whole tensor, in float64."""
    squares = tensor.double().flatten() ** 2
    return torch.softmax((squares - squares.min()) / (squares.max() - squares.min()), 0).view(tensor.shape)


@given(tensors_and_counts())
def test_mask_is_the_sorted_selection(case: tuple[Tensor, int]) -> None:
    tensor, keep = case
    mask = top_magnitude_mask(tensor, keep)
    assert torch.equal(mask, expected_mask(tensor, keep))
    assert torch.equal(mask, top_magnitude_mask(-tensor, keep))
    assert torch.equal(row_magnitude_mask(tensor[None], keep), mask[None])


@given(tensors_and_counts(), st.integers(1, 9), st.integers(0, 9))
def test_bracketing_and_chunking_do_not_change_the_mask(
    case: tuple[Tensor, int], chunk: int, slack: int
) -> None:
    tensor, keep = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_aware, "_CHUNK", chunk)
        patch.setattr(self_aware, "_SAMPLE", 4)  # anything above 16 entries is bracketed, often wrongly
        patch.setattr(self_aware, "_SLACK", slack / 3)
        assert torch.equal(top_magnitude_mask(tensor, keep), expected_mask(tensor, keep))


@given(tensors_and_counts(), st.integers(1, 9), st.sampled_from([1.0, 0.5]))
def test_merged_weights_are_those_of_the_mask(case: tuple[Tensor, int], chunk: int, scale: float) -> None:
    """Also where only some of the entries at the threshold are kept, in one chunk or in several."""
    delta, keep = case
    base = torch.linspace(-3, 3, delta.numel())
    kept = torch.where(expected_mask(delta, keep), delta, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_aware, "_CHUNK", chunk)
        assert torch.equal(self_aware._add_top(base, delta, keep, scale), base + scale * kept)


@pytest.mark.parametrize("ties", [False, True])
def test_mask_of_a_tensor_beyond_the_sample_size(ties: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(1100, 1000, generator=generator) * torch.rand(1000, generator=generator) ** 3
    if ties:
        tensor = (tensor * 4).round()
    assert tensor.numel() > 4 * self_aware._SAMPLE
    for keep in (1, round(0.15 * tensor.numel()), tensor.numel() - 1):
        assert torch.equal(top_magnitude_mask(tensor, keep), expected_mask(tensor, keep))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_mask_of_other_dtypes_and_strides(dtype: torch.dtype) -> None:
    tensor = torch.randn(13, 7, generator=torch.Generator().manual_seed(2)).to(dtype).T
    assert torch.equal(top_magnitude_mask(tensor, 30), expected_mask(tensor, 30))


@given(st.integers(0, 2**32), st.integers(2, 200), st.floats(0.01, 1))
def test_mask_selects_what_the_literal_formula_scores_highest(seed: int, size: int, share: float) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    keep = SelfAwareConfig(pruning_ratio=1 - share).kept(size)
    scores = literal_scores(tensor)
    # tiny magnitudes round to one score even in float64; what was kept scores at least what was dropped
    mask = top_magnitude_mask(tensor, keep)
    assert int(mask.sum()) == keep
    if 0 < keep < size:
        assert scores[mask].min() >= scores[~mask].max()
    big = tensor.abs() > 1e-3
    if 0 < keep <= int(big.sum()):
        assert set(scores.topk(keep).indices.tolist()) == set(mask.nonzero().flatten().tolist())


def test_scores_normalised_by_row_select_otherwise() -> None:
    tau = torch.tensor([[1.0, 0.9], [10.0, 5.0]])
    by_row = torch.stack([literal_scores(row) for row in tau])
    assert by_row[0, 0] == by_row[1, 0]
    assert by_row[0, 1] == by_row[1, 1]  # 0.9 ties with 5
    assert top_magnitude_mask(tau, 2).tolist() == [[False, False], [True, True]]
    assert row_magnitude_mask(tau, 1).tolist() == [[True, False], [True, False]]
    assert literal_scores(tau).flatten().argsort(descending=True)[:2].tolist() == [2, 3]


def test_scopes_differ_in_who_competes() -> None:
    base = {"a": torch.zeros(2, 2), "b": torch.zeros(1, 2)}
    delta = {"b": torch.tensor([[7.0, 6.0]]), "a": torch.tensor([[1.0, 0.9], [10.0, 5.0]])}

    def kept(scope: self_aware.Scope) -> dict[str, list[list[float]]]:
        merger = SelfAware(SelfAwareConfig(pruning_ratio=0.5, scope=scope))
        return {name: weight.tolist() for name, weight in merger.merge(base, [delta]).items()}

    assert kept("layer") == {"a": [[0, 0], [10, 5]], "b": [[7, 0]]}
    assert kept("global") == {"a": [[0, 0], [10, 0]], "b": [[7, 6]]}
    assert kept("row") == {"a": [[1, 0], [10, 0]], "b": [[7, 0]]}


def test_global_ties_go_by_name_whatever_the_order_of_the_mapping() -> None:
    merger = SelfAware(SelfAwareConfig(pruning_ratio=0.5, scope="global"))
    base = {"b": torch.zeros(2), "a": torch.zeros(2)}
    merged = merger.merge(base, [{"b": torch.ones(2), "a": torch.ones(2)}])
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([1, 1], [0, 0])


@pytest.mark.parametrize("scope", ["layer", "global", "row"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_extreme_ratios(scope: self_aware.Scope, ratio: float) -> None:
    generator = torch.Generator().manual_seed(3)
    base = {name: torch.randn(5, 4, generator=generator) for name in "ab"}
    delta = {name: torch.randn(5, 4, generator=generator) * 1e-3 for name in "ab"}
    merged = SelfAware(SelfAwareConfig(pruning_ratio=ratio, scope=scope)).merge(base, [delta])
    for name, weight in merged.items():
        assert torch.equal(weight, base[name] if ratio else base[name] + delta[name])


def test_deltas_are_pruned_one_by_one_and_nothing_given_is_written_to() -> None:
    generator = torch.Generator().manual_seed(4)
    base = {"w": torch.randn(6, 5, generator=generator), "untouched": torch.ones(2)}
    deltas = [{"w": torch.randn(6, 5, generator=generator)} for _ in range(2)]
    before = base["w"].clone()
    merger = SelfAware(SelfAwareConfig(pruning_ratio=0.8, scale=0.5))
    merged = merger.merge(base, deltas)
    assert torch.equal(base["w"], before)
    assert merged["untouched"] is base["untouched"]
    assert torch.equal(merged["w"], merger.merge(merger.merge(base, deltas[:1]), deltas[1:])["w"])
    by_hand = before
    for delta in deltas:
        by_hand = torch.where(expected_mask(delta["w"], 6), by_hand + 0.5 * delta["w"], by_hand)
    assert torch.equal(merged["w"], by_hand)


def test_half_precision_weights_are_merged_in_float32() -> None:
    base = torch.ones(4, dtype=torch.bfloat16)
    delta = torch.tensor([1e-5, 2e-5, 3e-5, 4e-5])  # all below the spacing of bfloat16 at 1
    merged = SelfAware(SelfAwareConfig(pruning_ratio=0.5)).merge({"w": base}, [{"w": delta}])["w"]
    assert merged.dtype == torch.float32
    assert torch.equal(merged, torch.tensor([1.0, 1.0, 1 + 3e-5, 1 + 4e-5]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_delta_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"'w\.7' has entries that are not finite"):
        SelfAware(SelfAwareConfig()).merge({"w.7": torch.zeros(3)}, [{"w.7": torch.tensor([0.0, bad, 1.0])}])


def test_deltas_that_do_not_fit_are_refused() -> None:
    merger = SelfAware(SelfAwareConfig())
    with pytest.raises(ValueError, match="'x', which is not among"):
        merger.merge({"w": torch.zeros(3)}, [{"x": torch.zeros(3)}])
    with pytest.raises(ValueError, match=r"'w' has shape \(1, 3\)"):
        merger.merge({"w": torch.zeros(3)}, [{"w": torch.zeros(1, 3)}])
    for mask in (top_magnitude_mask, row_magnitude_mask):
        with pytest.raises(ValueError, match="keep is 4"):
            mask(torch.zeros(1, 3), 4)


@pytest.mark.parametrize(
    "choice",
    [{"pruning_ratio": 1.1}, {"pruning_ratio": float("nan")}, {"scope": "column"}, {"scale": 0.0}],
)
def test_config_refuses(choice: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(choice))):
        SelfAwareConfig(**choice)  # type: ignore[arg-type]


def test_defaults_are_the_papers() -> None:
    config_type, merger_type = MERGERS["self-aware"]
    config = config_type()
    assert (config.pruning_ratio, config.scope, config.scale) == (0.85, "layer", 1.0)
    assert config.kept(4096 * 14336) == round(0.15 * 4096 * 14336)
    assert isinstance(merger_type(config), SelfAware)
