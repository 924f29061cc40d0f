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

from editors.api import (
    NO_CHECKPOINT,
    Checkpoint,
    Covariance,
    EditRequest,
    LowRank,
    Progress,
    ReleasedAsEdited,
    WeightDeltas,
    dense,
)
from editors.capture import check_written, put, undone_on_failure
from editors.contexts import BARE, Contexts, sample_contexts
from editors.rows import SubjectRows, subject_keys
from editors.sites import Place, Sites, device_of, sites_for
from editors.targets import TargetConfig, Targets, TargetSource, optimise_targets


class ClosedFormStream(ABC):
    """A model receiving batches of edits by a closed form; subclasses give the solve and their memory.

    A method that remembers the keys of earlier batches takes them on the model as the next batch finds
    it: ``edit`` and ``state`` first settle the batch before. Under the shadow chain that is the model the
    batch left behind, as in the reference codes; under the merged chain it is the merged model.
    """

    remembers: ClassVar[bool] = False  # whether earlier batches' keys matter to later ones
    place: ClassVar[Place] = "block"  # whose output at the z-layer the target values are for
    own_targets: ClassVar[bool] = False  # True: each layer is the z-layer of target values of its own
    bare: ClassVar[Contexts] = Contexts(((BARE,),))
    in_place: ClassVar[bool] = True  # whether walking the layers leaves what is committed, to the last bit

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: TargetConfig,
        *,
        covariance: Covariance,
        seed: int,
        progress: Progress | None = None,
        targets: TargetSource = optimise_targets,
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.covariance, self.progress, self.target_source = covariance, progress, targets
        self.sites = sites_for(model)
        self.sites.check_layers(model, config.layers)
        self.contexts = self.sample_contexts(seed)
        self.targets: Targets | None = None  # of the last batch, for reports
        self._unsettled: list[EditRequest] = []

    # -- what a method chooses ----------------------------------------------------------------------------

    @abstractmethod
    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """Q (d_in, n), float64, for the keys (d_in, n) of one layer."""

    def sample_contexts(self, seed: int) -> Contexts:
        """The context templates, sampled from the unedited model."""
        return sample_contexts(self.model, self.tokenizer, seed=seed)

    def target_values(self, requests: Sequence[EditRequest], layer: int) -> Targets:
        """Target values of a batch for the output at ``layer``, on the model as it is."""
        return self.target_source(
            self.model, self.tokenizer, requests, self.contexts, self.config,
            layer=layer, progress=self._tell_targets(layer),
        )  # fmt: skip

    def spread(self, remaining: int) -> float:
        """What the residual is divided by at a layer, of so many layers still to change."""
        return 1.0 if self.own_targets else remaining

    def written(self, name: str, delta: LowRank) -> Tensor | LowRank:
        """The change to write at one layer before the next one is computed."""
        return delta

    def committed(self, name: str, before: Tensor, delta: Tensor | LowRank) -> Tensor | LowRank:
        """The change to leave behind after all layers, given the weight before the batch."""
        return delta

    def remember(self, layer: int, keys: Tensor) -> None:  # noqa: B027
        """Take up the keys (d_in, n) of a finished batch at one layer; nothing by default."""

    def memory(self) -> dict[str, Tensor]:
        """The remembered keys by name."""
        return {}

    def recall(self, memory: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Take up what ``memory`` returned; nothing by default."""

    # -- what all share -----------------------------------------------------------------------------------

    def edit(self, requests: Sequence[EditRequest], checkpoint: Checkpoint = NO_CHECKPOINT) -> WeightDeltas:
        """Write one batch into the model.

        Returns the changes in the parameters' stored shapes, low-rank where the method's are. Raises
        FloatingPointError if an update is not finite or explodes, with the weights as they were before.
        checkpoint: holds the target values and each layer's update as they are done.
        """
        self._settle()
        layers = self.config.layers
        device = device_of(self.model)
        with undone_on_failure(self.model, map(self._name, layers), aside=True) as before:
            deltas = self._walk(requests, before, checkpoint)
            final = {n: self.committed(n, before[n].to(device), delta) for n, delta in deltas.items()}
            if not self.in_place:
                put(self.model, before)
                for name, delta in final.items():
                    self._add(self.model.get_parameter(name), delta)
        self._unsettled = list(requests) if self.remembers else []
        return final

    def _walk(
        self, requests: Sequence[EditRequest], before: Mapping[str, Tensor], checkpoint: Checkpoint
    ) -> dict[str, Tensor | LowRank]:
        """Change layer after layer in place, from the weights before the batch; the changes."""
        layers = self.config.layers
        rows = self._rows(requests, self.contexts)
        bare = self._rows(requests, self.bare)
        deltas: dict[str, Tensor | LowRank] = {}
        tell = self._tell("updates")
        for i, layer in enumerate(layers):
            z_layer = layer if self.own_targets else layers[-1]
            if i == 0 or self.own_targets:
                part = f"targets.{z_layer}"
                self.targets = self._kept_targets(checkpoint, part)
                if self.targets is None:
                    self.targets = self.target_values(requests, z_layer)
                    checkpoint.save(part, vars(self.targets))
            assert self.targets is not None
            name = self._name(layer)
            rows.advance(layer)
            bare.advance(layer)
            delta = self._kept_update(checkpoint, layer)
            if delta is None:
                residual = self.targets.values.T - bare.states(z_layer, self.place)  # (d_out, n)
                residual = residual / self.spread(len(layers) - i)
                delta = self.written(name, self._low_rank(residual, self.solve(layer, rows.keys())))
                update = vars(delta) if isinstance(delta, LowRank) else {"dense": delta}
                checkpoint.save(f"update.{layer}", update)
            self._add(self.model.get_parameter(name), delta)
            check_written(self.model, name, before[name])
            deltas[name] = delta
            if z_layer == layers[-1]:
                tell(i + 1, len(layers))
        return deltas

    def _kept_targets(self, checkpoint: Checkpoint, part: str) -> Targets | None:
        kept = checkpoint.load(part)
        device = device_of(self.model)
        return None if kept is None else Targets(**{name: t.to(device) for name, t in kept.items()})

    def _kept_update(self, checkpoint: Checkpoint, layer: int) -> Tensor | LowRank | None:
        kept = checkpoint.load(f"update.{layer}")
        if kept is None:
            return None
        device = device_of(self.model)
        placed = {name: tensor.to(device) for name, tensor in kept.items()}
        return placed["dense"] if "dense" in placed else LowRank(**placed)

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
        for layer, keys in subject_keys(self.model, self.tokenizer, self._unsettled, self.contexts, layers):
            self.remember(layer, keys)
        self._unsettled = []

    def _rows(self, requests: Sequence[EditRequest], contexts: Contexts) -> SubjectRows:
        return SubjectRows(self.model, self.tokenizer, requests, contexts, self.config.layers[0])

    def _name(self, layer: int) -> str:
        return self.sites.weight_name(layer)

    @torch.no_grad()
    def _add(self, weight: Tensor, delta: Tensor | LowRank) -> None:
        weight += dense(delta).to(weight)

    def _low_rank(self, residual: Tensor, right: Tensor) -> LowRank:
        dtype = residual.dtype
        if self.sites.transposed:
            return LowRank(right.to(dtype).contiguous(), residual.T.contiguous())
        return LowRank(residual.contiguous(), right.T.to(dtype).contiguous())

    def _tell_targets(self, layer: int) -> Callable[[int, int], None]:
        """Progress of target values; of layers with own ones each is a part."""
        tell = self._tell("target values")
        parts = self.config.layers if self.own_targets else (layer,)
        before = parts.index(layer)
        return lambda done, total: tell(before * total + done, len(parts) * total)

    def _tell(self, what: str) -> Callable[[int, int], None]:
        progress = self.progress
        return lambda done, total: progress(what, done, total) if progress else None


@dataclass(frozen=True)
class ClosedFormEditor(ReleasedAsEdited):
    """An editor whose streams are of one class; subclasses name it."""

    stream: ClassVar[type[ClosedFormStream]]
    config: TargetConfig

    def parameters(self, sites: Sites) -> tuple[str, ...]:
        """The MLP output projections of the layers."""
        return tuple(sites.weight_name(layer) for layer in self.config.layers)

    def statistics(self) -> tuple[int, ...]:
        """All edited layers."""
        return self.config.layers

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        covariance: Covariance,
        seed: int,
        progress: Progress | None = None,
        targets: TargetSource = optimise_targets,
    ) -> ClosedFormStream:
        """Bind to a model; ``targets`` replaces the optimisation of target values, to reuse some."""
        return self.stream(
            model, tokenizer, self.config,
            covariance=covariance, seed=seed, progress=progress, targets=targets,
        )  # fmt: skip
