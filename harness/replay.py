"""The weights of a run's cells, made again from the stored changes without any forward."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editors.sites import sites_for
from harness.deltas import delta_path, read_delta
from harness.grid import Merge, weights_id
from harness.keys import keys_path, read_keys
from harness.spec import RunSpec
from merging import MergeChain

Weights = dict[str, Tensor]


def edited_parameters(spec: RunSpec, model: PreTrainedModel) -> list[str]:
    """All parameters that some editor of a run may change, each once, in the order of the editors."""
    sites = sites_for(model)
    return list(dict.fromkeys(n for e in spec.editors for n in spec.editor(e).parameters(sites)))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A run folder's changes, on the unedited weights they were made on."""

    folder: Path
    spec: RunSpec
    base: Weights  # parameter name -> unedited weight, of all parameters that any editor changes
    device: torch.device  # where changes are multiplied out: that of the editing, wherever weights are kept

    def history(
        self, editor: str, merge: Merge | None, batches: Sequence[int] | None = None
    ) -> Iterator[Weights]:
        """The weights after every batch, merged or unmerged (None).

        batches: only the changes of these, added in this order; all of them by default.
        """
        if batches is None:
            batches = range(1, self.spec.num_batches + 1)
        name = weights_id(self.spec, editor, merge) if self.spec.chain == "merged" else editor
        steps = Steps(self, name, merge)
        for batch in batches:
            yield steps.step(batch, self.delta(name, batch))

    def released(self, editor: str, merge: Merge | None, weights: Weights) -> tuple[Weights, dict[str, Any]]:
        """Weights as they are evaluated, and what the editor notes of it."""
        if merge is not None:
            return weights, {}
        return self.spec.editor(editor).released(self.base, weights)

    def delta(self, chain: str, batch: int, before: str | None = None) -> dict[str, Tensor]:
        """A stored change; ValueError if it does not follow on weights of the digest given."""
        path = delta_path(self.folder, chain, batch)
        delta, metadata = read_delta(path, self.device)
        if before is not None and metadata["digest_before"] != before:
            raise ValueError(f"{path} was made on other weights than those before it; use --fresh")
        return delta


def added(weights: Weights, delta: Mapping[str, Tensor]) -> Weights:
    """Weights and a change of some of them."""
    return weights | {name: weights[name] + change.to(weights[name].device) for name, change in delta.items()}


class Steps:
    """What a chain's changes make of the unedited weights, one batch at a time."""

    def __init__(self, replay: Replay, chain: str, merge: Merge | None) -> None:
        """chain: name of the folder of the changes."""
        self._replay, self._chain = replay, chain
        self._merging: MergeChain | None = None
        self._keyed = False
        if merge is not None:
            merger = replay.spec.build_merger(merge.merger, merge.pruning_ratio)
            self._merging = MergeChain(merger, replay.base, replay.spec.chain)  # type: ignore[arg-type]
            self._keyed = merger.needs_keys
        self.weights: Weights = dict(replay.base)  # after the last batch

    def step(self, batch: int, delta: Mapping[str, Tensor]) -> Weights:
        """The weights after a batch's change; its keys are read where the merger needs them."""
        if self._merging is None:
            self.weights = added(self.weights, delta)
            return self.weights
        keys = None
        if self._keyed:
            device = next(iter(self.weights.values())).device
            keys = read_keys(keys_path(self._replay.folder, self._chain, batch), device)
        self.weights = self._merging.step(delta, keys)
        return self.weights
