"""Which model the next batch starts from: the shadow chain, where the unmerged model goes on.

With M_t the unmerged and M~_t the merged weights after batch t, and Delta_t what batch t added:

    M_t = M_{t-1} + Delta_t            M_0 = M~_0, the weights before any edit
    tau_t = M_t - M~_{t-1} = Delta_t + (M_{t-1} - M~_{t-1})
    M~_t = merge(M~_{t-1}, tau_t)

What one batch lost to pruning is part of the next task vector. In the merged chain the editor itself works
on M~_{t-1}, so tau_t = Delta_t and its step is ``merger.merge(merged, [delta])``.
"""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from merging.api import Merger
from merging.self_aware import full_precision


def shadow_step(
    merger: Merger, edited: Mapping[str, Tensor], merged: Mapping[str, Tensor], delta: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One batch of the shadow chain.

    edited, merged: M_{t-1} and M~_{t-1}, the same names.
    delta:          Delta_t, by any of those names.
    returns:        M_t and M~_t; M_t is ``weight + delta`` as the editor added it.

    tau is formed as Delta_t minus (M~ - M): where nothing was pruned before, that is Delta_t bit for bit, so
    a merger that prunes nothing follows the unmerged weights exactly. Elsewhere a kept entry equals M_t up to
    the rounding of tau; since the difference is taken anew from the weights, rounding does not add up.
    """
    after, task = dict(edited), {}
    for name in edited:
        old, behind = full_precision(edited[name]), full_precision(merged[name])
        if name in delta:
            change = delta[name].to(old)
            after[name] = old + change
            task[name] = change - (behind - old)
        elif edited[name] is not merged[name]:
            task[name] = old - behind
    unknown = sorted(set(delta) - set(edited))
    if unknown:
        raise ValueError(f"delta of {unknown}, not among the weights: {sorted(edited)}")
    return after, merger.merge(merged, [task])


def shadow_chain(
    merger: Merger, base: Mapping[str, Tensor], deltas: Iterable[Mapping[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """The merged weights after each batch, M~_1, M~_2, ...

    base:   M_0, parameter name -> weight; only the parameters that the batches change are needed.
    deltas: Delta_1, Delta_2, ... of the unmerged editing run; taken one at a time.
    """
    edited, merged = dict(base), dict(base)
    for delta in deltas:
        edited, merged = shadow_step(merger, edited, merged, delta)
        yield dict(merged)
