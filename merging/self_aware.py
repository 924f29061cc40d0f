"""Self-aware pruning of a task vector: keep its largest entries and add them.

SeqMMR scores entry i of a task vector tau by softmax(Normalize(tau * tau))_i and keeps the share 1 - r with
the highest scores. Every step of that score is increasing in abs(tau_i) and shares its constants over the
whole group, so the kept set is the top-k by magnitude. Selecting by magnitude is exact, where the score
computed in float32 is not: its rounding leaves thousands of distinct values for millions of entries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from merging.api import Batch, Weights, checked_scale, checked_share, finite, full_precision

Scope = Literal["layer", "global", "row"]

_CHUNK = 2**18  # entries handled at a time on a CPU; 1 MiB of float32 stays in its cache
_SAMPLE = 2**18  # entries from which the threshold of a larger tensor is bracketed
_SLACK = 6.0  # half-width of the bracket, in standard deviations of the sample's rank


@dataclass(frozen=True, kw_only=True)
class SelfAwareConfig:
    """Pruning by the task vector's own magnitudes, the method of SeqMMR."""

    pruning_ratio: float = 0.85  # r, share of entries dropped
    scope: Scope = "layer"  # entries compete within their matrix, across all matrices, or within their row
    scale: float = 1.0  # factor on the kept entries

    def __post_init__(self) -> None:
        checked_share("pruning_ratio", self.pruning_ratio)
        if self.scope not in get_args(Scope):
            raise ValueError(f"unknown scope {self.scope!r}; known: {sorted(get_args(Scope))}")
        checked_scale("scale", self.scale)

    def kept(self, entries: int) -> int:
        """How many of a group's entries survive, k = round((1 - r) D)."""
        return kept_entries(self.pruning_ratio, entries)


class SelfAware:
    """Adds the kept entries of each task vector to the weights: base + scale * Pr * tau.

    Several deltas are pruned each on its own and added in order, so that
    ``merge(base, [a, b]) == merge(merge(base, [a]), [b])``. A kept entry is ``base + delta`` bit for bit
    (at scale 1), a pruned one is ``base``.
    """

    needs_keys: ClassVar[bool] = False

    def __init__(self, config: SelfAwareConfig) -> None:
        self.config = config

    def start(self, base: Weights) -> "SelfAware":
        """The merger itself: it looks at each task vector alone."""
        return self

    def step(self, batch: Batch) -> dict[str, Tensor]:
        return self.merge(batch.merged, [batch.task])

    def merge(self, base: Weights, deltas: Sequence[Weights]) -> dict[str, Tensor]:
        """Merge task vectors, oldest first, into weights; nothing given is written to.

        Half-precision weights are raised to float32 and stay so. Raises ValueError for a delta that names
        no weight, has another shape or entries that are not finite, by parameter name.
        """
        merged = dict(base)
        for delta in deltas:
            matched = {name: _matched(name, change, base) for name, change in delta.items()}
            masks = {} if self.config.scope == "layer" else self._masks(matched)
            for name, change in matched.items():
                weight, scale = full_precision(merged[name]), self.config.scale
                if name in masks:
                    merged[name] = _add_where(weight, change, masks[name], scale)
                else:
                    merged[name] = _add_top(weight, change, self.config.kept(change.numel()), scale)
        return merged

    def _masks(self, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> bool mask of the entries that survive (Pr), where they do not compete in their matrix."""
        config = self.config
        if config.scope == "row":
            return {name: row_magnitude_mask(x, config.kept(x.shape[-1])) for name, x in delta.items()}
        if not delta:
            return {}
        names = sorted(delta)  # the flat index runs through the matrices in order of their names
        sizes = [delta[name].numel() for name in names]
        together = torch.cat([delta[name].flatten() for name in names])
        parts = torch.split(top_magnitude_mask(together, config.kept(sum(sizes))), sizes)
        return {name: part.view(delta[name].shape) for name, part in zip(names, parts, strict=True)}


def kept_entries(pruning_ratio: float, entries: int) -> int:
    """How many entries a pruning ratio r leaves of D, round((1 - r) D)."""
    return round((1 - pruning_ratio) * entries)


def top_magnitude_mask(tensor: Tensor, keep: int) -> Tensor:
    """True at the ``keep`` entries of largest magnitude; among equals the lowest flat index goes first.

    tensor:  any shape, finite, floating.
    returns: bool, same shape and device, exactly ``keep`` times True.

    The keep-th magnitude is found without sorting: a sample brackets it, one pass counts what lies above
    the bracket and collects what lies inside, and it is selected there.
    """
    flat = tensor.flatten()
    if not 0 <= keep <= flat.numel():
        raise ValueError(f"keep is {keep}; the tensor has {flat.numel()} entries")
    if keep in (0, flat.numel()):
        return torch.full(tensor.shape, keep > 0, dtype=torch.bool, device=tensor.device)
    threshold, wanted, ties = _threshold(flat, keep)
    all_ties = wanted == ties
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    for mark, part in zip(_chunks(mask), _chunks(flat), strict=True):
        magnitude = part.abs()
        if all_ties:
            torch.ge(magnitude, threshold, out=mark)
            continue
        torch.gt(magnitude, threshold, out=mark)
        if wanted:  # only the first so many of the entries at the threshold
            first = (magnitude == threshold).nonzero().squeeze(1)[:wanted]
            mark[first] = True
            wanted -= first.numel()
    return mask.view(tensor.shape)


def row_magnitude_mask(tensor: Tensor, keep: int) -> Tensor:
    """True at the ``keep`` entries of largest magnitude of every row; among equals the lowest index first.

    tensor:  (..., columns), finite, floating.
    returns: bool, same shape and device.
    """
    if not 0 <= keep <= tensor.shape[-1]:
        raise ValueError(f"keep is {keep}; the rows have {tensor.shape[-1]} entries")
    order = tensor.abs().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(tensor, dtype=torch.bool).scatter_(-1, order[..., :keep], True)


def _threshold(flat: Tensor, keep: int) -> tuple[Tensor, int, int]:
    """The ``keep``-th largest magnitude, how many entries at it are to be kept, how many there are.

    flat: (entries,), 0 < keep < entries.
    """
    entries = flat.numel()
    candidates, rank = flat, entries - keep + 1  # the rank counts from the smallest
    if entries > 4 * _SAMPLE:
        candidates, rank = _bracketed(flat, keep)
    candidates = candidates.abs()
    threshold = candidates.kthvalue(rank).values
    ties = int((candidates == threshold).count_nonzero())
    larger = int((candidates > threshold).count_nonzero())
    return threshold, candidates.numel() - rank + 1 - larger, ties


def _bracketed(flat: Tensor, keep: int) -> tuple[Tensor, int]:
    """The few magnitudes around the ``keep``-th largest, and its rank among them from the smallest."""
    entries = flat.numel()
    generator = torch.Generator(flat.device).manual_seed(0)  # which sample changes the time, not the result
    places = torch.randint(entries, (_SAMPLE,), generator=generator, device=flat.device)
    sample = flat[places].abs()
    share = 1 - keep / entries
    slack = _SLACK * (_SAMPLE * share * (1 - share)) ** 0.5 + 1
    low = sample.kthvalue(max(1, int(_SAMPLE * share - slack))).values
    high = sample.kthvalue(min(_SAMPLE, int(_SAMPLE * share + slack) + 1)).values
    above, inside = 0, []
    for part in _chunks(flat):
        more, found = _between(part, low, high)
        above += more
        inside.append(found)
    candidates = torch.cat(inside)
    rank = candidates.numel() - (keep - above) + 1
    if not 1 <= rank <= candidates.numel():  # the sample misled
        return flat, entries - keep + 1
    return candidates, rank


def _places_of(part: Tensor, magnitude: Tensor) -> Tensor:
    """Where a magnitude occurs."""
    if part.device.type != "cpu":
        return (part.abs() == magnitude).nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(np.abs(part.numpy()) == magnitude.numpy()))


def _between(part: Tensor, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
    """How many magnitudes are above ``high``, and those in [low, high].

    On a CPU by numpy, whose comparisons and search for few places take a third of torch's time.
    """
    if part.device.type != "cpu":
        magnitude = part.abs()
        reached, beyond = magnitude >= low, magnitude > high
        return int(beyond.count_nonzero()), magnitude[reached.logical_xor_(beyond)]
    magnitudes = np.abs(part.numpy())
    reached_low, reached_high = magnitudes >= low.numpy(), magnitudes > high.numpy()
    above = int(np.count_nonzero(reached_high))
    return above, torch.from_numpy(magnitudes[np.flatnonzero(reached_low ^ reached_high)])


def _chunks(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, _CHUNK) if flat.device.type == "cpu" else (flat,)


def _add_top(base: Tensor, delta: Tensor, keep: int, scale: float) -> Tensor:
    """``base + scale * delta`` at the ``keep`` entries of ``top_magnitude_mask``, ``base`` elsewhere.

    Without the mask: what lies below the threshold is cut to zero on its way.
    """
    flat = delta.flatten()
    if keep == 0:
        return base.clone()
    if keep == flat.numel():
        return torch.add(base, delta, alpha=scale)
    threshold, wanted, ties = _threshold(flat, keep)
    below = torch.nextafter(threshold, torch.zeros_like(threshold)).item()
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    for out, old, change in zip(*map(_chunks, (merged.view(-1), base.flatten(), flat)), strict=True):
        kept = torch.nn.functional.hardshrink(change, below)
        if wanted < ties > 0:  # only the first so many of the entries at the threshold
            at = _places_of(change, threshold)
            kept[at[max(wanted, 0) :]] = 0
            wanted, ties = wanted - at.numel(), ties - at.numel()
        torch.add(old, kept, alpha=scale, out=out)
    return merged


def _add_where(base: Tensor, delta: Tensor, mask: Tensor, scale: float) -> Tensor:
    """``base + scale * delta`` where the mask is set, ``base`` elsewhere."""
    merged = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    flats = (merged.view(-1), base.flatten(), delta.flatten(), mask.flatten())
    for out, old, change, kept in zip(*(_chunks(flat) for flat in flats), strict=True):
        torch.add(old, change * kept, alpha=scale, out=out)
    return merged


def _matched(name: str, delta: Tensor, base: Mapping[str, Tensor]) -> Tensor:
    """The delta in its weight's dtype (float32 at least) and on its device, checked."""
    if name not in base:
        raise ValueError(f"delta of {name!r}, which is not among the weights: {sorted(base)}")
    weight = base[name]
    if delta.shape != weight.shape:
        shapes = f"{tuple(delta.shape)}, its weight {tuple(weight.shape)}"
        raise ValueError(f"delta of {name!r} has shape {shapes}")
    return finite(name, delta.to(weight.device, torch.promote_types(weight.dtype, torch.float32)))
