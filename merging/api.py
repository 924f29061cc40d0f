"""What a merger is given and what it gives back: mappings of parameter name to tensor, nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]  # parameter name -> tensor, in the parameter's stored shape


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What one edited weight is given at the edited subjects of a batch."""

    inputs: Tensor  # (edits, d_in), float32 at least
    transposed: bool  # whether the weight is stored as (d_in, d_out), as GPT-2's are


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of edits as a merger sees it. All mappings are in float32 at least."""

    edited: Weights  # M_t: the weights the editor left behind
    merged: Weights  # M~_{t-1}: what was merged before
    delta: Weights  # Delta_t: what the editor added; may name fewer parameters
    task: Weights  # tau_t = M_t - M~_{t-1}, of the parameters that differ
    keys: Mapping[str, Keys] = field(default_factory=dict)  # empty for a merger that needs none


class MergeStream(Protocol):
    """A merger on one model's weights, batch after batch."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """M~_t under every name of ``batch.merged``; parameters that nothing changed are the tensors given.

        Nothing given is written to. Half-precision weights come back in float32, so that nothing small is
        lost; casting back is the caller's.
        """
        ...


class Merger(Protocol):
    """A rule for how much of the batches' changes to keep."""

    needs_keys: ClassVar[bool]  # whether ``Batch.keys`` must be there, and the covariance

    def start(self, base: Weights, covariance: Callable[[str], Tensor] | None = None) -> MergeStream:
        """Begin at the weights before any edit, M_0 = M~_0.

        covariance: parameter name -> (d_in, d_in), the uncentered second moment of the keys it should
        preserve; only asked for by a merger that needs keys.
        """
        ...


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor itself, or its float32 copy where it is in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
