"""The closed forms against direct solves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from editors.linalg import (
    Memory,
    alphaedit_right,
    cholesky,
    null_space,
    remember,
    solve_with_keys,
    weighted_mean,
)

seeds = st.integers(0, 10_000)


def matrices(seed: int, d: int = 12, n: int = 5, m: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance with a wide spectrum (d, d), keys (d, n), earlier keys (d, m)."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    samples = draw(4 * d, d) * torch.logspace(0, -3, d, dtype=torch.float64)
    return samples.T @ samples / len(samples), draw(d, n), draw(d, m)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_woodbury_equals_the_direct_solve(seed: int) -> None:
    covariance, keys, earlier = matrices(seed)
    factor = cholesky(30 * covariance)
    direct = torch.linalg.solve(30 * covariance + keys @ keys.T, keys)
    torch.testing.assert_close(solve_with_keys(factor, keys), direct, rtol=1e-7, atol=1e-9)
    memory = remember(factor, earlier[:, 4:], remember(factor, earlier[:, :4]))
    direct = torch.linalg.solve(30 * covariance + earlier @ earlier.T + keys @ keys.T, keys)
    torch.testing.assert_close(solve_with_keys(factor, keys, memory), direct, rtol=1e-7, atol=1e-9)


def test_an_empty_memory_is_no_memory() -> None:
    covariance, keys, _ = matrices(0)
    factor, nothing = cholesky(covariance), torch.empty(12, 0, dtype=torch.float64)
    assert torch.equal(solve_with_keys(factor, keys, Memory(nothing, nothing)), solve_with_keys(factor, keys))


def test_one_memit_layer_meets_its_residual_as_lambda_goes_to_zero() -> None:
    covariance, keys, _ = matrices(1)
    residual = torch.randn(4, 5, dtype=torch.float64)
    misses = [
        (residual @ solve_with_keys(cholesky(weight * covariance), keys).T @ keys - residual).norm()
        for weight in (100.0, 1.0, 1e-2, 1e-6)
    ]
    assert misses == sorted(misses, reverse=True) and misses[-1] < 1e-3 * residual.norm()


@given(seeds, st.floats(1e-5, 0.3))
@settings(max_examples=25, deadline=None)
def test_the_null_space_is_a_projector_and_smaller_than_its_threshold(seed: int, threshold: float) -> None:
    covariance, keys, _ = matrices(seed)
    space = null_space(covariance, threshold)
    projector = space.project(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(projector @ projector, projector)
    torch.testing.assert_close(projector, projector.T)
    assert space.basis.shape[1] <= 6
    assert (
        space.rank
        == round(projector.trace().item())
        == int((torch.linalg.eigvalsh(covariance) < threshold).sum())
    )
    assert torch.linalg.eigvalsh(projector @ covariance @ projector).max() < threshold
    torch.testing.assert_close(space.project(keys), projector @ keys)


@given(seeds)
@settings(max_examples=25, deadline=None)
def test_the_three_forms_of_alphaedit_agree(seed: int) -> None:
    covariance, keys, earlier = matrices(seed)
    ridge, residual = 0.5, torch.randn(4, 5, dtype=torch.float64)
    space = null_space(covariance, 1e-2)
    projector = space.project(torch.eye(12, dtype=torch.float64))
    for old in (None, earlier):
        gram = keys @ keys.T + (0 if old is None else old @ old.T)
        full = torch.linalg.solve(projector @ gram + ridge * torch.eye(12), projector @ keys @ residual.T).T
        values, vectors = torch.linalg.eigh(covariance)
        basis = vectors[:, values < 1e-2]
        inner = basis.T @ gram @ basis + ridge * torch.eye(basis.shape[1])
        reduced = (basis @ torch.linalg.solve(inner, basis.T @ keys @ residual.T)).T
        mine = residual @ alphaedit_right(space, keys, old, ridge).T
        torch.testing.assert_close(mine, full, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(mine, reduced, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(mine @ projector, mine)


def test_cholesky_adds_jitter_only_where_it_must() -> None:
    covariance, _, _ = matrices(2)
    factor = cholesky(covariance)
    torch.testing.assert_close(factor @ factor.T, covariance, rtol=0, atol=1e-14)
    singular = torch.ones(3, 3)
    factor = cholesky(singular)
    torch.testing.assert_close(factor @ factor.T, singular.double(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="more tokens"):
        cholesky(-torch.eye(3))


def test_the_mean_over_templates_is_taken_by_group() -> None:
    columns = torch.arange(12.0).reshape(1, 2, 6)
    mean = weighted_mean(columns, (0.5, *[0.1] * 5))
    torch.testing.assert_close(mean, torch.tensor([[0.5 * 0 + 0.5 * 3, 0.5 * 6 + 0.5 * 9]]))
