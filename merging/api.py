"""What a merger is given and what it gives back: mappings of parameter name to tensor, nothing else."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Merger(Protocol):
    """A rule for how much of a change to keep."""

    def merge(self, base: Mapping[str, Tensor], deltas: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Merge changes into weights; nothing given is written to.

        base:    parameter name -> weight, in the parameter's stored shape.
        deltas:  one mapping per change (task vector), oldest first, each with names of ``base`` only
                 and the shapes of ``base``.
        returns: every name of ``base``; parameters that no delta names are the tensors of ``base``
                 themselves, the others are new.

        Half-precision weights are raised to float32, merged and returned in float32, so that nothing
        small is lost; casting back is the caller's. Deltas follow the dtype and device of their weight.
        """
        ...
