"""EMMET (Gupta et al. 2024, arXiv 2403.14236): batched edits under an equality constraint."""

from dataclasses import dataclass

from torch import Tensor

from editors.closed_form import ClosedFormEditor
from editors.linalg import equality_right
from editors.memit import MemitConfig, MemitStream


@dataclass(frozen=True, kw_only=True)
class EmmetConfig(MemitConfig):
    """delta = R (K^T C'^-1 K + ridge I)^-1 K^T C'^-1 with C' = covariance_weight C + identity_weight I."""

    identity_weight: float = 0.0  # mu (update_norm_lambda)
    ridge: float = 0.1  # softens the equality of a batch of more than one edit (emmet_lambda)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("identity_weight", "ridge"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


class EmmetStream(MemitStream):
    """With ridge 0 the edited keys map to their targets exactly: (W + delta) K = W K + R."""

    config: EmmetConfig

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        ridge = self.config.ridge if keys.shape[1] > 1 else 0.0
        return equality_right(self._factor(layer, keys), keys, ridge)

    def preserved(self, layer: int, keys: Tensor) -> Tensor:
        weighted = super().preserved(layer, keys)
        weighted.diagonal().add_(self.config.identity_weight)
        return weighted


class Emmet(ClosedFormEditor):
    """EMMET, batch after batch, without memory of earlier keys."""

    stream = EmmetStream
