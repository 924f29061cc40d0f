"""The closed forms as pure functions: tensors in, tensors out, solves in float64.

Shapes share letters: ``d_in``, ``d_out``, ``n`` keys of this batch, ``m`` keys of earlier batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric positive definite matrix, in float64.

    matrix: (d, d). Only if it is not positive definite to rounding, a jitter of 1e-12, 1e-11 .. 1e-6 of
    its mean diagonal is added, the smallest that serves. Raises ValueError if none does.
    """
    matrix = matrix.double()
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return factor
    mean = matrix.diagonal().mean()
    for power in range(-12, -5):
        jitter = 10.0**power * mean
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * torch.eye(len(matrix)).to(matrix))
        if not failed:
            return factor
    raise ValueError(
        "the covariance is not positive definite even with a jitter of 1e-6 of its mean diagonal; "
        "gather it from more tokens"
    )


@dataclass(frozen=True)
class Memory:
    """Keys of earlier batches K_p (d_in, m) and A^-1 K_p, float64."""

    keys: Tensor
    solved: Tensor

    def to(self, device: torch.device) -> "Memory":
        """The same on another device."""
        return Memory(self.keys.to(device), self.solved.to(device))


def solve_with_keys(factor: Tensor, keys: Tensor, memory: Memory | None = None) -> Tensor:
    """(A + K_p K_p^T + K K^T)^-1 K by Woodbury, with A given as its Cholesky factor (ALGORITHMS 3.3).

    factor: (d_in, d_in), lower, float64; keys: (d_in, n). Returns (d_in, n), float64.
    """
    keys = keys.double()
    solved = torch.cholesky_solve(keys, factor)  # A^-1 K
    if memory is not None and memory.keys.shape[1]:
        inner = memory.keys.T @ memory.solved
        inner.diagonal().add_(1.0)
        solved = solved - memory.solved @ torch.linalg.solve(inner, memory.keys.T @ solved)
    inner = keys.T @ solved
    inner.diagonal().add_(1.0)
    solution: Tensor = torch.linalg.solve(inner.T, solved.T).T
    return solution


def remember(factor: Tensor, keys: Tensor, memory: Memory | None = None) -> Memory:
    """The memory with further keys (d_in, n) added to it."""
    keys = keys.double()
    solved = torch.cholesky_solve(keys, factor)
    if memory is None:
        return Memory(keys, solved)
    return Memory(torch.cat([memory.keys, keys], dim=1), torch.cat([memory.solved, solved], dim=1))


@dataclass(frozen=True)
class NullSpace:
    """Projector P onto the directions that preserved keys hardly use, held by its smaller side.

    basis: (d_in, r), orthonormal columns, float64; they span range(P), or its complement.
    """

    basis: Tensor
    complement: bool

    def to(self, device: torch.device) -> "NullSpace":
        """The same on another device."""
        return NullSpace(self.basis.to(device), self.complement)

    @property
    def rank(self) -> int:
        """Rank of P."""
        d_in, columns = self.basis.shape
        return d_in - columns if self.complement else columns

    def project(self, vectors: Tensor) -> Tensor:
        """P applied to the columns of (d_in, n), in float64."""
        vectors = vectors.double()
        part = self.basis @ (self.basis.T @ vectors)
        return vectors - part if self.complement else part


def null_space(covariance: Tensor, threshold: float) -> NullSpace:
    """Projector onto the eigenvectors whose eigenvalue is strictly below the threshold (ALGORITHMS 4).

    covariance: (d_in, d_in), symmetric, uncentered second moment of the keys.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
    below = eigenvalues < threshold
    complement = bool(below.sum() > len(below) // 2)
    return NullSpace(eigenvectors[:, ~below if complement else below].contiguous(), complement)


def alphaedit_right(space: NullSpace, keys: Tensor, earlier: Tensor | None, ridge: float) -> Tensor:
    """Q with delta = R Q^T for AlphaEdit, solved in the span of the keys seen so far (ALGORITHMS 4).

    Q = (P K - P K_a (ridge I + K_a^T P K_a)^-1 K_a^T P K) / ridge, with K_a = [K_p, K].

    keys: (d_in, n); earlier: K_p (d_in, m) or None; returns (d_in, n), float64.
    """
    every = keys.double() if earlier is None else torch.cat([earlier.double(), keys.double()], dim=1)
    projected = space.project(every)  # P K_a
    mine = projected[:, -keys.shape[1] :]  # P K
    gram = every.T @ projected
    gram = (gram + gram.T) / 2
    overlap = gram[:, -keys.shape[1] :].clone()  # K_a^T P K
    gram.diagonal().add_(ridge)
    return (mine - projected @ torch.cholesky_solve(overlap, torch.linalg.cholesky(gram))) / ridge


def equality_right(factor: Tensor, keys: Tensor, ridge: float) -> Tensor:
    """Q with delta = R Q^T for EMMET: Q = Y (K^T Y + ridge I)^-1, Y = A^-1 K (ALGORITHMS 5.5).

    factor: lower Cholesky factor of A (d_in, d_in), float64; keys: (d_in, n). Returns (d_in, n), float64.
    """
    keys = keys.double()
    solved = torch.cholesky_solve(keys, factor)
    inner = keys.T @ solved
    inner.diagonal().add_(ridge)
    right: Tensor = torch.linalg.solve(inner.T, solved.T).T
    return right


def relative_change_mask(change: Tensor, weight: Tensor, share: float) -> Tensor:
    """True at the round(share * entries) entries with the largest |change| / (|weight| + 1e-8).

    Exact count; ties go to the lowest flat index (RECT, ALGORITHMS 5.2).
    """
    ratio = (change.abs() / (weight.abs() + 1e-8)).flatten()
    keep = round(share * ratio.numel())
    if keep == 0:
        return torch.zeros_like(change, dtype=torch.bool)
    threshold = ratio.kthvalue(ratio.numel() - keep + 1).values
    mask = ratio > threshold
    ties = (ratio == threshold).nonzero().flatten()
    mask[ties[: keep - int(mask.sum())]] = True
    return mask.reshape(change.shape)


def restrained_change(change: Tensor, weight: Tensor, log_base: float) -> tuple[Tensor, int]:
    """A change with its singular values above sigma_1(weight) restrained (PRUNE, ALGORITHMS 5.3).

    Above, sigma becomes log_a(sigma) - log_a(sigma_1) + sigma_1; at or below, it stays.
    change, weight: (rows, columns). Returns the change in float64, and how many values were above.
    """
    bound = torch.linalg.matrix_norm(weight.double(), ord=2)
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    lowered = (values / bound).log() / math.log(log_base) + bound
    restrained = torch.where(values > bound, lowered, values)
    return (left * restrained) @ right, int((values > bound).sum())


def weighted_mean(columns: Tensor, weights: Sequence[float]) -> Tensor:
    """Mean of keys over templates.

    columns: (d_in, n, templates); weights: one per template, summing to 1. Returns (d_in, n).
    """
    return columns @ torch.tensor(weights, dtype=columns.dtype, device=columns.device)
