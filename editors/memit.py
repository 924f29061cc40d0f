"""MEMIT (Meng et al. 2023, arXiv 2210.07229, eq. 14) and its sequential form (AlphaEdit paper, eq. 15)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.closed_form import ClosedFormEditor, ClosedFormStream
from editors.linalg import Memory, cholesky, remember, solve_with_keys
from editors.sites import device_of
from editors.targets import TargetConfig


@dataclass(frozen=True, kw_only=True)
class MemitConfig(TargetConfig):
    """Least-squares insertion of key-value pairs; delta = R K^T (lambda C + K K^T)^-1."""

    covariance_weight: float = 15000.0  # lambda, the weight of preserved keys (mom2_update_weight)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.covariance_weight <= 0:
            raise ValueError(f"covariance_weight is {self.covariance_weight}; it must be above 0")


class MemitStream(ClosedFormStream):
    """Batch after batch without memory of earlier keys, weights never restored."""

    config: MemitConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: MemitConfig,
        **start: Any,
    ) -> None:
        super().__init__(model, tokenizer, config, **start)
        self._factors: dict[int, Tensor] = {}  # layer -> Cholesky factor of lambda C, (d_in, d_in)
        self._memory: dict[int, Memory] = {}

    def solve(self, layer: int, keys: Tensor) -> Tensor:
        memory = self._memory.get(layer)
        return solve_with_keys(
            self._factor(layer, keys), keys, None if memory is None else memory.to(keys.device)
        )

    def _factor(self, layer: int, keys: Tensor) -> Tensor:
        """The Cholesky factor on the keys' device; between its uses it is in the host's memory."""
        if layer not in self._factors:
            self._factors[layer] = cholesky(self.preserved(layer, keys)).cpu()
        return self._factors[layer].to(keys.device)

    def preserved(self, layer: int, keys: Tensor) -> Tensor:
        """A = lambda C (d_in, d_in), float64, a tensor of the caller's own on the keys' device."""
        weighted = self.covariance(layer).to(keys.device, torch.float64, copy=True)
        return weighted.mul_(self.config.covariance_weight)


class MemitSeqStream(MemitStream):
    """Earlier batches' keys are preserved too: lambda C + K_p K_p^T + K K^T."""

    remembers = True

    def remember(self, layer: int, keys: Tensor) -> None:
        memory = self._memory.get(layer)
        if memory is not None:
            memory = memory.to(keys.device)
        self._memory[layer] = remember(self._factor(layer, keys), keys, memory).to(torch.device("cpu"))

    def memory(self) -> dict[str, Tensor]:
        return {f"keys.{layer}": memory.keys for layer, memory in self._memory.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        self._memory = {}
        for name, keys in memory.items():
            layer = int(name.removeprefix("keys."))
            self.remember(layer, keys.to(device_of(self.model)))


class Memit(ClosedFormEditor):
    """MEMIT, batch after batch, without memory of earlier keys."""

    stream = MemitStream


class MemitSeq(ClosedFormEditor):
    """MEMIT that preserves the keys of earlier batches (MEMIT_seq of the AlphaEdit repository)."""

    stream = MemitSeqStream
