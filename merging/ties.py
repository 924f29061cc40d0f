"""TIES merging (Yadav et al. 2023, arXiv 2306.01708) of the changes of all batches so far.

Each batch's change is trimmed to its largest entries; an entry's sign is elected by the summed magnitudes
for and against it; and of the trimmed values only those of the elected sign are put together.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from merging.api import Batch, Weights, checked_scale, checked_share, finite, full_precision
from merging.self_aware import kept_entries, top_magnitude_mask

Combine = Literal["sum", "mean"]


@dataclass(frozen=True, kw_only=True)
class TiesConfig:
    """How much of each batch's change is kept, and how the batches are put together.

    The paper merges models trained apart, by the mean. Batches of edits follow one another and each adds
    to what the others wrote, so their natural counterpart is the sum: with nothing trimmed and no
    conflict of signs it gives the edited weights.
    """

    pruning_ratio: float = 0.85  # share of entries of a batch's change that are trimmed
    combine: Combine = "sum"  # of the values that have the elected sign
    scale: float = 1.0  # lambda, on the merged change

    def __post_init__(self) -> None:
        checked_share("pruning_ratio", self.pruning_ratio)
        if self.combine not in get_args(Combine):
            raise ValueError(f"unknown combine {self.combine!r}; known: {sorted(get_args(Combine))}")
        checked_scale("scale", self.scale)


class Ties:
    """M~_t = W_0 + lambda TIES(Delta_1 .. Delta_t), entries competing within their matrix."""

    needs_keys: ClassVar[bool] = False

    def __init__(self, config: TiesConfig) -> None:
        self.config = config

    def start(self, base: Weights) -> "TiesStream":
        return TiesStream(self.config, base)


@dataclass
class _Votes:
    """What the trimmed changes of all batches say of each entry of one parameter."""

    up: Tensor  # sum of the positive values
    down: Tensor  # of the magnitudes of the negative ones
    ups: Tensor  # how many are positive, int32
    downs: Tensor


class TiesStream:
    """Sums and counts for either sign, which is all that the election and the mean need."""

    def __init__(self, config: TiesConfig, base: Weights) -> None:
        self.config, self.base = config, dict(base)
        self._votes: dict[str, _Votes] = {}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        merged = dict(batch.merged)
        for name, delta in batch.delta.items():
            keep = kept_entries(self.config.pruning_ratio, delta.numel())
            kept = finite(name, delta) * top_magnitude_mask(delta, keep)
            if name not in self._votes:
                zero = torch.zeros_like(kept)
                self._votes[name] = _Votes(zero, zero, zero.int(), zero.int())
            votes = self._votes[name]
            votes.up, votes.ups = votes.up + kept.clamp(min=0), votes.ups + (kept > 0)
            votes.down, votes.downs = votes.down - kept.clamp(max=0), votes.downs + (kept < 0)
            merged[name] = full_precision(self.base[name]) + self.config.scale * self._combined(votes)
        return merged

    def _combined(self, votes: _Votes) -> Tensor:
        """The elected entries; where neither sign prevails there is no change."""
        up, down = votes.up, votes.down
        prevails = up > down
        if self.config.combine == "mean":
            up, down = up / votes.ups.clamp(min=1), down / votes.downs.clamp(min=1)
        chosen = torch.where(prevails, up, -down)
        return torch.where(votes.up == votes.down, 0.0, chosen)
