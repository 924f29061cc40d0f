"""Plain ways to keep less of a change, to compare a method with: the controls.

All but shrinkage look at one task vector tau_t = M_t - M~_{t-1} and return M~_t = M~_{t-1} + f(tau_t). In the
shadow chain what f left out is part of the next task vector.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from merging.api import Batch, Weights, checked_share, finite, full_precision
from merging.self_aware import kept_entries, top_magnitude_mask


@dataclass(frozen=True, kw_only=True)
class ShrinkConfig:
    """A part of the way from the unedited to the edited weights."""

    scale: float = 0.85  # s

    def __post_init__(self) -> None:
        checked_share("scale", self.scale, zero=False)


class Shrink:
    """M~_t = W_0 + s (M_t - W_0)."""

    needs_keys: ClassVar[bool] = False

    def __init__(self, config: ShrinkConfig) -> None:
        self.config = config

    def start(self, base: Weights) -> "ShrinkStream":
        return ShrinkStream(self.config, base)


class ShrinkStream:
    """Shrinkage toward the weights it began at."""

    def __init__(self, config: ShrinkConfig, base: Weights) -> None:
        self.config, self.base = config, dict(base)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        merged = dict(batch.merged)
        for name in batch.task:
            edited = finite(name, batch.edited[name])
            # written as lerp does it, a scale of 1 gives the edited weights bit for bit
            merged[name] = torch.lerp(full_precision(self.base[name]), edited, self.config.scale)
        return merged


class TaskMerger(ABC):
    """A merger that keeps a part of each task vector and forgets the batch; subclasses say which part."""

    needs_keys: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def start(self, base: Weights) -> "TaskStream":
        return TaskStream(self)

    def given(self, batch: Batch) -> Weights:
        """What it keeps a part of."""
        return batch.task

    @abstractmethod
    def kept(self, task: Tensor, name: str, batch: int) -> Tensor:
        """f(tau) of one parameter, of tau's shape; batch: counted from 1."""


class TaskStream:
    """M~_t = M~_{t-1} + f(tau_t), and how many batches there were."""

    def __init__(self, merger: TaskMerger) -> None:
        self.merger, self.batches = merger, 0

    def step(self, batch: Batch) -> dict[str, Tensor]:
        self.batches += 1
        merged = dict(batch.merged)
        for name, task in self.merger.given(batch).items():
            kept = self.merger.kept(finite(name, task), name, self.batches)
            merged[name] = full_precision(merged[name]) + kept
        return merged


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An exponential moving average of the edited weights."""

    rate: float = 0.6  # a

    def __post_init__(self) -> None:
        checked_share("rate", self.rate, zero=False)


class Ema(TaskMerger):
    """M~_t = M~_{t-1} + a (M_t - M~_{t-1})."""

    config: EmaConfig

    def kept(self, task: Tensor, name: str, batch: int) -> Tensor:
        return self.config.rate * task


@dataclass(frozen=True, kw_only=True)
class RandomConfig:
    """As many entries as self-aware pruning keeps, but any."""

    pruning_ratio: float = 0.85  # share of entries dropped
    seed: int = 0

    def __post_init__(self) -> None:
        checked_share("pruning_ratio", self.pruning_ratio)


class Random(TaskMerger):
    """Keeps exactly round((1 - r) D) entries of each matrix, drawn at random, as they are."""

    config: RandomConfig

    def kept(self, task: Tensor, name: str, batch: int) -> Tensor:
        drawn = uniform(task, f"{self.config.seed}/{batch}/{name}")
        mask = top_magnitude_mask(drawn, kept_entries(self.config.pruning_ratio, task.numel()))
        return task * mask


@dataclass(frozen=True, kw_only=True)
class DareConfig:
    """Drop and rescale (DARE, Yu et al. 2023, arXiv 2311.03099)."""

    pruning_ratio: float = 0.85  # p, the chance of an entry to be dropped
    seed: int = 0

    def __post_init__(self) -> None:
        checked_share("pruning_ratio", self.pruning_ratio, one=False)


class Dare(TaskMerger):
    """Drops every entry with chance p and multiplies the others by 1 / (1 - p), so that the mean stays.

    Of what the batch added, M~_t = M~_{t-1} + f(Delta_t): the task vector of the shadow chain has the errors
    of all earlier draws in it, which each draw would multiply by p / (1 - p) in square.
    """

    config: DareConfig

    def given(self, batch: Batch) -> Weights:
        return batch.delta

    def kept(self, task: Tensor, name: str, batch: int) -> Tensor:
        ratio = self.config.pruning_ratio
        drawn = uniform(task, f"{self.config.seed}/{batch}/{name}")
        return task * (drawn >= ratio) / (1 - ratio)


def uniform(like: Tensor, key: str) -> Tensor:
    """Numbers in [0, 1) of a tensor's shape on its device, float32; the key decides them, not the device."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """The strongest directions of a task vector."""

    rank_share: float = 0.15  # of the matrix's full rank; one direction at least

    def __post_init__(self) -> None:
        checked_share("rank_share", self.rank_share)


class LowRank(TaskMerger):
    """The best approximation of tau of rank round(share * min(rows, columns)), at least 1 (Eckart, Young).

    In tau's precision. A tensor that is no matrix is kept whole.
    """

    config: LowRankConfig

    def kept(self, task: Tensor, name: str, batch: int) -> Tensor:
        if task.ndim != 2:
            return task
        rank = max(1, round(self.config.rank_share * min(task.shape)))
        left, values, right = torch.linalg.svd(task, full_matrices=False)
        nearest: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
        return nearest


@dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    """The fewest entries that hold a share of a task vector's squared norm."""

    energy: float = 0.9

    def __post_init__(self) -> None:
        checked_share("energy", self.energy, zero=False)


class Energy(TaskMerger):
    """Keeps a matrix's largest entries until they hold the share of its squared norm, and no more."""

    config: EnergyConfig

    def kept(self, task: Tensor, name: str, batch: int) -> Tensor:
        return task * top_magnitude_mask(task, entries_of_energy(task, self.config.energy))


def entries_of_energy(tensor: Tensor, share: float) -> int:
    """How many of a tensor's largest entries hold at least a share of its squared norm; in float64."""
    squares = tensor.flatten().double().square().sort(descending=True).values
    held = squares.cumsum(0)
    if not held.numel() or not held[-1]:
        return 0
    return int((held < share * held[-1]).count_nonzero()) + 1
