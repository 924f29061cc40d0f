"""PMET (Li et al. 2024, arXiv 2308.08742): two target vectors, the residual spread by square roots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from editors.api import EditRequest
from editors.closed_form import ClosedFormEditor
from editors.memit import MemitConfig, MemitStream
from editors.targets import Targets


@dataclass(frozen=True, kw_only=True)
class PmetConfig(MemitConfig):
    """MEMIT's closed form on the MLP's own output, its target found together with one of the attention."""

    nll_factor: float = 1.0  # weight of the NLL until an edit is solved (nll_loss_factor)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nll_factor <= 0:
            raise ValueError(f"nll_factor is {self.nll_factor}; it must be above 0")


class PmetStream(MemitStream):
    """delta_i = (z_mlp - m) / sqrt(m_L - i) K^T (lambda C + K K^T)^-1, m the z-layer's MLP output.

    The attention's vector is optimised beside the MLP's and then dropped, as in the published configs,
    where only MLP weights are edited. No sequential form is published: batches follow each other without
    restoring and without memory of earlier keys.
    """

    config: PmetConfig
    place = "mlp"

    def target_values(self, requests: Sequence[EditRequest], layer: int) -> Targets:
        return self.target_source(
            self.model, self.tokenizer, requests, self.contexts, self.config,
            layer=layer, places=("mlp", "attention"), nll_factor=self.config.nll_factor,
            progress=self._tell_targets(layer),
        )  # fmt: skip

    def spread(self, remaining: int) -> float:
        return math.sqrt(remaining)


class Pmet(ClosedFormEditor):
    """PMET, batch after batch."""

    stream = PmetStream
