"""ROME (Meng et al. 2022, arXiv 2202.05262) and R-ROME (Gupta et al. 2024, arXiv 2403.07175)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.api import Checkpoint, EditRequest, LowRank
from editors.capture import check_written
from editors.closed_form import ClosedFormEditor, ClosedFormStream
from editors.contexts import Contexts, sample_rome_contexts
from editors.linalg import cholesky
from editors.sites import device_of
from editors.targets import TargetConfig, Targets, concatenated


@dataclass(frozen=True, kw_only=True)
class RomeConfig(TargetConfig):
    """delta = (v* - W k0) u^T / (k0 . u) at one layer, u along C^-1 k, k the mean key over templates."""

    clamp_norm_factor: float = 4.0
    use_covariance: bool = True  # False: u along k itself (mom2_adjustment)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) != 1:
            raise ValueError(f"layers {list(self.layers)} must be one; ROME edits one layer")


class RomeStream(ClosedFormStream):
    """The edits of a batch one after the other, each on the model that the one before left.

    Both k0 and W k0 are of the bare prompt. v* is a target for the MLP's output, found over 21 templates.
    """

    config: RomeConfig
    place = "mlp"
    in_place = False  # the sum of a batch's changes is not the sequence of additions to the last bit
    mean_key = False  # True: the mean key stands for the bare prompt's everywhere

    def sample_contexts(self, seed: int) -> Contexts:
        return sample_rome_contexts(self.model, self.tokenizer, seed=seed)

    def target_values(self, requests: Sequence[EditRequest], layer: int) -> Targets:
        return self.target_source(
            self.model, self.tokenizer, requests, self.contexts, self.config, layer=layer, places=("mlp",)
        )

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        """u (d_in, 1), of any length."""
        if not self.config.use_covariance:
            return keys.double()
        if self._factor is None:
            self._factor = cholesky(self.covariance(layer).to(keys.device))
        return torch.cholesky_solve(keys.double(), self._factor)

    _factor: Tensor | None = None

    def _walk(
        self, requests: Sequence[EditRequest], before: Mapping[str, Tensor], checkpoint: Checkpoint
    ) -> dict[str, Tensor | LowRank]:
        """Rank one after rank one; together a change of rank n."""
        (layer,) = self.config.layers
        name = self._name(layer)
        tell = self._tell("target values")
        found: list[Targets] = []
        ranks: list[LowRank] = []
        for i, request in enumerate(requests):
            done = self._kept(checkpoint, i)
            if done is None:
                targets = self.target_values([request], layer)
                done = targets, self._rank_one(request, targets.values[0], layer)
                checkpoint.save(f"edit.{i}", vars(done[0]) | vars(done[1]))
            found.append(done[0])
            ranks.append(done[1])
            self._add(self.model.get_parameter(name), ranks[-1])
            try:
                check_written(self.model, name, before[name])
            except FloatingPointError as error:
                raise FloatingPointError(f"case {request.case_id}: {error}") from None
            tell(i + 1, len(requests))
        self.targets = concatenated(found)
        left = torch.cat([rank.left for rank in ranks], dim=1)
        right = torch.cat([rank.right for rank in ranks], dim=0)
        return {name: LowRank(left, right)}

    def _kept(self, checkpoint: Checkpoint, i: int) -> tuple[Targets, LowRank] | None:
        """Target values and change of a batch's edit that was done before."""
        kept = checkpoint.load(f"edit.{i}")
        if kept is None:
            return None
        placed = {name: tensor.to(device_of(self.model)) for name, tensor in kept.items()}
        rank = LowRank(placed.pop("left"), placed.pop("right"))
        return Targets(**placed), rank

    def _rank_one(self, request: EditRequest, wanted: Tensor, layer: int) -> LowRank:
        """The change of one edit; wanted: v* (d_out,)."""
        rows = self._rows([request], self.contexts)
        mean = rows.keys()  # (d_in, 1)
        direction = self.solve(layer, mean)
        bare = self._rows([request], self.bare)
        key, output = bare.keys(), bare.states(layer, "mlp")
        if self.mean_key:  # W k + b by the linearity of the projection
            output = output + self._product(layer, mean - key)
            key = mean
        residual = (wanted[:, None] - output) / (key.double().T @ direction).to(output.dtype)
        return self._low_rank(residual, direction)

    def _product(self, layer: int, vectors: Tensor) -> Tensor:
        weight = self.model.get_parameter(self._name(layer)).detach().to(vectors.dtype)
        return (weight.T if self.sites.transposed else weight) @ vectors


class RobustRomeStream(RomeStream):
    """The mean key in all three places, so that u^T k0 cannot come near zero."""

    mean_key = True


@dataclass(frozen=True)
class Rome(ClosedFormEditor):
    """ROME, edit after edit."""

    stream = RomeStream
    config: RomeConfig

    def statistics(self) -> tuple[int, ...]:
        """The edited layer, if the covariance is used."""
        return self.config.layers if self.config.use_covariance else ()


@dataclass(frozen=True)
class RobustRome(Rome):
    """R-ROME, edit after edit."""

    stream = RobustRomeStream
