"""What the closed-form editors share: targets, then one update a layer, lowest first (ALGORITHMS 3.2).

At layer i of m, with the lower layers already changed: keys K and states H are taken anew, the residual
is R_i = (Z - H) / (m - i), and delta_i = R_i Q_i^T, where Q_i (d_in, n) is the method's own solve.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.api import Covariance, EditRequest, LowRank, Progress, WeightDeltas
from editors.contexts import BARE, Contexts, sample_contexts
from editors.rows import SubjectRows
from editors.sites import sites_for
from editors.targets import TargetConfig, Targets, optimise_targets


class ClosedFormStream(ABC):
    """A model receiving batches of edits by a closed form; subclasses give the solve and their memory.

    A method that remembers the keys of earlier batches takes them on the model as the next batch finds
    it: ``edit`` and ``state`` first settle the batch before. Under the shadow chain that is the model the
    batch left behind, as in the reference codes; under the merged chain it is the merged model.
    """

    remembers = False  # whether earlier batches' keys matter to later ones

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TargetConfig,
        *,
        covariance: Covariance,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.covariance, self.progress = covariance, progress
        self.sites = sites_for(model)
        self.sites.check_layers(model, config.layers)
        self.contexts = sample_contexts(model, tokenizer, seed=seed)
        self.targets: Targets | None = None  # of the last batch, for reports
        self._unsettled: list[EditRequest] = []

    @abstractmethod
    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """Q (d_in, n), float64, for the keys (d_in, n) of one layer."""

    def remember(self, layer: int, keys: Tensor) -> None:  # noqa: B027
        """Take up the keys (d_in, n) of a finished batch at one layer; nothing by default."""

    def memory(self) -> dict[str, Tensor]:
        """The remembered keys by name."""
        return {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take up what ``memory`` returned; nothing by default."""

    def edit(self, requests: Sequence[EditRequest]) -> WeightDeltas:
        """Write one batch into the model.

        Returns low-rank changes in the parameters' stored shapes. Raises FloatingPointError if an update
        is not finite, with the weights as they were before.
        """
        self._settle()
        layers = self.config.layers
        self.targets = optimise_targets(
            self.model, self.tokenizer, requests, self.contexts, self.config,
            progress=self._tell("target values"),
        )  # fmt: skip
        wanted = self.targets.values.T  # (d_out, n)
        rows = SubjectRows(self.model, self.tokenizer, requests, self.contexts, layers[0])
        bare = SubjectRows(self.model, self.tokenizer, requests, Contexts(((BARE,),)), layers[0])
        before: dict[str, Tensor] = {}
        deltas: dict[str, LowRank] = {}
        tell = self._tell("updates")
        try:
            for i, layer in enumerate(layers):
                rows.advance(layer)
                bare.advance(layer)
                residual = (wanted - bare.states(layers[-1])) / (len(layers) - i)
                delta = self._low_rank(residual, self.solve(layer, rows.keys()))
                name = self.sites.weight_name(layer)
                weight = self.model.get_parameter(name)
                before[name] = weight.detach().clone()
                _add(weight, delta)
                if not torch.isfinite(weight).all():
                    raise FloatingPointError(f"the update of {name} is not finite; the batch is undone")
                deltas[name] = delta
                tell(i + 1, len(layers))
        except BaseException:
            with torch.no_grad():
                for name, old in before.items():
                    self.model.get_parameter(name).copy_(old)
            raise
        self._unsettled = list(requests) if self.remembers else []
        return deltas

    def notes(self) -> dict[str, Any]:
        """The context templates, and how the last batch's target values came out."""
        notes: dict[str, Any] = {"contexts": list(self.contexts.templates)}
        if self.targets is not None:
            notes["median_target_probability"] = self.targets.probability.median().item()
            notes["mean_updates"] = self.targets.updates.double().mean().item()
        return notes

    def state(self) -> dict[str, Tensor]:
        """The context templates and the keys remembered so far, the last batch's included."""
        self._settle()
        text = json.dumps(self.contexts.groups).encode()
        return {"contexts": torch.frombuffer(bytearray(text), dtype=torch.uint8), **self.memory()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state; the model's weights are the caller's to restore."""
        groups = json.loads(bytes(state["contexts"].cpu().tolist()))
        self.contexts = Contexts(tuple(tuple(group) for group in groups))
        self.recall({name: tensor for name, tensor in state.items() if name != "contexts"})
        self._unsettled = []

    def _settle(self) -> None:
        if not self._unsettled:
            return
        layers = self.config.layers
        rows = SubjectRows(self.model, self.tokenizer, self._unsettled, self.contexts, layers[0])
        for layer in layers:
            rows.advance(layer)
            self.remember(layer, rows.keys())
        self._unsettled = []

    def _low_rank(self, residual: Tensor, right: Tensor) -> LowRank:
        dtype = residual.dtype
        if self.sites.transposed:
            return LowRank(right.to(dtype).contiguous(), residual.T.contiguous())
        return LowRank(residual.contiguous(), right.T.to(dtype).contiguous())

    def _tell(self, what: str) -> Callable[[int, int], None]:
        progress = self.progress
        return lambda done, total: progress(what, done, total) if progress else None


@dataclass(frozen=True)
class ClosedFormEditor:
    """An editor whose streams are of one class; subclasses name it."""

    stream: ClassVar[type[ClosedFormStream]]
    config: TargetConfig

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        covariance: Covariance,
        seed: int,
        progress: Progress | None = None,
    ) -> ClosedFormStream:
        return self.stream(model, tokenizer, self.config, covariance=covariance, seed=seed, progress=progress)


@torch.no_grad()
def _add(weight: Tensor, delta: LowRank) -> None:
    weight += delta.dense().to(weight)
