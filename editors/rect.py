"""RECT (Gu et al. 2024, arXiv 2401.04700): only the relatively largest changes of an update are kept."""

from dataclasses import dataclass

from torch import Tensor

from editors.api import LowRank, dense
from editors.closed_form import ClosedFormEditor
from editors.linalg import relative_change_mask
from editors.memit import MemitConfig, MemitStream


@dataclass(frozen=True, kw_only=True)
class RectConfig(MemitConfig):
    """MEMIT's update, pruned per matrix by |delta| / |W|, W the weights before the batch."""

    kept_share: float = 0.4  # rho, share of entries kept at their full value
    prune_during_walk: bool = False  # True: each layer is pruned before the next one is computed

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.kept_share <= 1:
            raise ValueError(f"kept_share is {self.kept_share}; it must be above 0 and at most 1")


class RectStream(MemitStream):
    """The form of the AlphaEdit repository (memit_rect_main.py), with an exact count of kept entries.

    That code adds its epsilon to the signed weight, where it can cancel to zero; here the ratio is
    |delta| / (|W| + 1e-8). The paper itself prunes ROME's update and keeps the largest 20 %.
    """

    config: RectConfig
    in_place = False

    def written(self, name: str, delta: LowRank) -> Tensor | LowRank:
        if not self.config.prune_during_walk:
            return delta
        return self._pruned(self.model.get_parameter(name).detach(), delta)

    def committed(self, name: str, before: Tensor, delta: Tensor | LowRank) -> Tensor | LowRank:
        return delta if self.config.prune_during_walk else self._pruned(before, delta)

    def _pruned(self, weight: Tensor, delta: Tensor | LowRank) -> Tensor:
        change = dense(delta).to(weight)
        return change * relative_change_mask(change, weight, self.config.kept_share)


class Rect(ClosedFormEditor):
    """RECT on MEMIT, batch after batch."""

    stream = RectStream
