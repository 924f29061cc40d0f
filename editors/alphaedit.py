"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355, eq. 14): edits inside the null space of preserved keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.closed_form import ClosedFormEditor, ClosedFormStream
from editors.linalg import NullSpace, alphaedit_right, null_space
from editors.targets import TargetConfig


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(TargetConfig):
    """[P (K K^T + K_p K_p^T) + ridge I] X = P K R^T, delta = X^T; P from the unedited model, once."""

    nullspace_threshold: float = 2e-2  # covariance eigenvalue, absolute; below it counts as unused
    ridge: float = 10.0  # weight of the identity (L2 in the repository; 1 in the paper's eq. 14)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nullspace_threshold", "ridge"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")


class AlphaEditStream(ClosedFormStream):
    """Earlier batches' keys are remembered; the projector stays that of the unedited model."""

    config: AlphaEditConfig
    remembers = True
    null_space_source: Callable[[int, float], NullSpace] | None = (
        None  # by layer and threshold, kept elsewhere
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AlphaEditConfig,
        **start: Any,
    ) -> None:
        super().__init__(model, tokenizer, config, **start)
        self._spaces: dict[int, NullSpace] = {}
        self._keys: dict[int, Tensor] = {}  # layer -> K_p (d_in, m)

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        earlier = self._keys.get(layer)
        return alphaedit_right(
            self.space(layer, keys),
            keys,
            None if earlier is None else earlier.to(keys.device),
            self.config.ridge,
        )

    def space(self, layer: int, keys: Tensor) -> NullSpace:
        """The null space of one layer on the keys' device, made at its first use, kept in host memory."""
        if layer not in self._spaces:
            threshold = self.config.nullspace_threshold
            if self.null_space_source is not None:
                space = self.null_space_source(layer, threshold)
            else:
                space = null_space(self.covariance(layer).to(keys.device), threshold)
            if not space.rank:
                raise ValueError(
                    f"layer {layer}: no covariance eigenvalue is below nullspace_threshold "
                    f"{threshold}; raise it"
                )
            self._spaces[layer] = space.to(torch.device("cpu"))
        return self._spaces[layer].to(keys.device)

    def notes(self) -> dict[str, Any]:
        """Also the share of directions the projector keeps, by layer."""
        shares = {str(layer): space.rank / len(space.basis) for layer, space in self._spaces.items()}
        return super().notes() | {"nullspace_share": shares}

    def remember(self, layer: int, keys: Tensor) -> None:
        earlier = self._keys.get(layer)
        self._keys[layer] = keys.cpu() if earlier is None else torch.cat([earlier, keys.cpu()], dim=1)

    def memory(self) -> dict[str, Tensor]:
        return {f"keys.{layer}": keys for layer, keys in self._keys.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        self._keys = {int(name.removeprefix("keys.")): keys.cpu() for name, keys in memory.items()}


class AlphaEdit(ClosedFormEditor):
    """AlphaEdit, batch after batch."""

    stream = AlphaEditStream
