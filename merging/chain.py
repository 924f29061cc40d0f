"""From the changes of successive batches to merged weights, under either reading of where a batch starts.

With M_t the unmerged and M~_t the merged weights after batch t, and Delta_t what batch t added:

    shadow chain    M_t = M_{t-1} + Delta_t     the unmerged model goes on           (the default)
    merged chain    M_t = M~_{t-1} + Delta_t    the editor works on the merged model
    tau_t = M_t - M~_{t-1},    M_0 = M~_0, the weights before any edit

In the shadow chain tau_t = Delta_t + (M_{t-1} - M~_{t-1}): what one batch lost to merging is part of the next
task vector. In the merged chain tau_t = Delta_t, and what is lost is gone.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from merging.api import Batch, Keys, Merger, Weights, full_precision

Kind = Literal["shadow", "merged"]


class MergeChain:
    """Merged weights batch after batch; ``edited`` and ``merged`` are M_t and M~_t of the last one."""

    def __init__(self, merger: Merger, base: Weights, kind: Kind = "shadow") -> None:
        """base: M_0, parameter name -> weight; only the parameters that the batches change are needed."""
        self._stream = merger.start(base)
        self._follows = kind == "merged"
        self.edited, self.merged = dict(base), dict(base)

    def step(self, delta: Weights, keys: Mapping[str, Keys] | None = None) -> dict[str, Tensor]:
        """M~_t from what a batch added and, for a merger that needs them, its keys.

        tau is formed as Delta_t minus (M~ - M): where nothing was pruned before, that is Delta_t bit for
        bit, so a merger that prunes nothing follows the unmerged weights exactly. Elsewhere a kept entry
        equals M_t up to the rounding of tau; since the difference is taken anew from the weights, rounding
        does not add up. Raises ValueError for a delta of parameters that are not among the weights.
        """
        unknown = sorted(set(delta) - set(self.edited))
        if unknown:
            raise ValueError(f"delta of {unknown}, not among the weights: {sorted(self.edited)}")
        before = self.merged if self._follows else self.edited
        edited, changes, task = dict(before), {}, {}
        for name in before:
            old = full_precision(before[name])
            if name in delta:
                changes[name] = delta[name].to(old)
                edited[name] = old + changes[name]
            if before[name] is not self.merged[name]:
                behind = full_precision(self.merged[name])
                task[name] = changes[name] - (behind - old) if name in delta else old - behind
            elif name in delta:
                task[name] = changes[name]
        batch = Batch(edited=edited, merged=self.merged, delta=changes, task=task, keys=keys or {})
        self.edited, self.merged = edited, self._stream.step(batch)
        return dict(self.merged)
