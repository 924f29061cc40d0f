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
from harness.grid import weights_id
from harness.spec import RunSpec
from merging import MERGERS
from merging.chain import shadow_chain

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
        self, editor: str, ratio: float | None, batches: Sequence[int] | None = None
    ) -> Iterator[Weights]:
        """The weights after every batch, merged at a pruning ratio or unmerged (None).

        batches: only the changes of these, added in this order; all of them by default.
        """
        if batches is None:
            batches = range(1, self.spec.num_batches + 1)
        if ratio is not None and self.spec.chain == "shadow":
            deltas = (self.delta(editor, batch) for batch in batches)
            yield from shadow_chain(self._merger(ratio), self.base, deltas)
            return
        weights = self.base
        for batch in batches:
            weights = self.after(weights, self.delta(weights_id(self.spec, editor, ratio), batch), ratio)
            yield weights

    def released(self, editor: str, ratio: float | None, weights: Weights) -> tuple[Weights, dict[str, Any]]:
        """Weights as they are evaluated, and what the editor notes of it."""
        if ratio is not None:
            return weights, {}
        return self.spec.editor(editor).released(self.base, weights)

    def delta(self, chain: str, batch: int, before: str | None = None) -> dict[str, Tensor]:
        """A stored change; ValueError if it does not follow on weights of the digest given."""
        path = delta_path(self.folder, chain, batch)
        delta, metadata = read_delta(path, self.device)
        if before is not None and metadata["digest_before"] != before:
            raise ValueError(f"{path} was made on other weights than those before it; use --fresh")
        return delta

    def after(self, weights: Weights, delta: Mapping[str, Tensor], ratio: float | None) -> Weights:
        """Weights after one batch's change, merged under the merged chain."""
        delta = {name: change.to(weights[name].device) for name, change in delta.items()}
        if ratio is None:
            return weights | {name: weights[name] + change for name, change in delta.items()}
        merged: Weights = self._merger(ratio).merge({name: weights[name] for name in delta}, [delta])
        return weights | merged

    def _merger(self, ratio: float) -> Any:
        config, kind = MERGERS[self.spec.merger]
        return kind(config(pruning_ratio=ratio))
