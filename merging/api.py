"""What a merger is given and what it gives back: mappings of parameter name to tensor, nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]  # parameter name -> tensor, in the parameter's stored shape


@dataclass(frozen=True, kw_only=True)
class Keys:
    """What one edited weight is given at the edited subjects of a batch, on the model right after it.

    Row i is edit i of the batch, the same edit at every weight.
    """

    inputs: Tensor  # K, (edits, d_in), float32 at least
    solved: Tensor  # C^-1 k in each row, (edits, d_in); C is the uncentered second moment of preserved keys
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

    needs_keys: ClassVar[bool]  # whether ``Batch.keys`` must be there

    def start(self, base: Weights) -> MergeStream:
        """Begin at the weights before any edit, M_0 = M~_0."""
        ...


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor itself, or its float32 copy where it is in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def finite(name: str, tensor: Tensor, what: str = "delta") -> Tensor:
    """The tensor itself; raises ValueError, by parameter name, if an entry is not finite."""
    if tensor.numel() and not all(bool(bound.isfinite()) for bound in torch.aminmax(tensor)):
        raise ValueError(f"{what} of {name!r} has entries that are not finite; the edit diverged")
    return tensor


def checked_share(name: str, value: float, *, zero: bool = True, one: bool = True) -> None:
    """Raises ValueError unless a field of a config is a share: in [0, 1], with or without its ends."""
    if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        bounds = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
        raise ValueError(f"{name} is {value}; it must lie in {bounds}")


def checked_scale(name: str, value: float) -> None:
    """Raises ValueError unless a field of a config is a positive finite number."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; it must be positive and finite")
