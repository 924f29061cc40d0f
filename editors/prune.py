"""PRUNE (Ma et al. 2024, arXiv 2405.16821): the singular values of the whole change are restrained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from editors.closed_form import ClosedFormEditor
from editors.linalg import restrained_change
from editors.memit import MemitConfig, MemitStream


@dataclass(frozen=True, kw_only=True)
class PruneConfig(MemitConfig):
    """Plain MEMIT batch after batch; W_0 + F(W_T - W_0) is what is released."""

    log_base: float = math.e  # of F above sigma_max; PRUNE's code also offers 2, 1.5 and 1.2
    legacy_double_apply: bool = False  # W_T + F(W_T - W_0), as the AlphaEdit repository evaluates it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_base <= 1:
            raise ValueError(f"log_base is {self.log_base}; it must be above 1")


@dataclass(frozen=True)
class Prune(ClosedFormEditor):
    """PRUNE on MEMIT: the stream is MEMIT's own, the restraint acts on a copy after any batch."""

    stream = MemitStream
    config: PruneConfig

    def released(
        self, base: Mapping[str, Tensor], edited: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights with the whole change restrained, and how many singular values were above the bound."""
        released, above = dict(edited), {}
        for name, start in base.items():
            if edited[name] is start:
                continue
            change, count = restrained_change(
                edited[name].double() - start.double(), start, self.config.log_base
            )
            origin = edited[name] if self.config.legacy_double_apply else start
            above[name] = count
            if count or self.config.legacy_double_apply:  # else the weights are MEMIT's, bit for bit
                released[name] = (origin.double() + change).to(start.dtype)
        return released, {"singular_values_restrained": above}
