"""Target values made once for all editors that ask for the same ones on the same weights."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors import EditRequest
from editors.contexts import Contexts
from editors.sites import Place
from editors.targets import Passes, TargetConfig, Targets, optimise_targets


class KeptTargets:
    """A source of target values that optimises each once.

    They are kept, on the CPU, by all that ``optimise_targets`` reads besides the model and its tokenizer, and
    by what ``weights`` says of the model's weights; where that is None nothing is kept.
    """

    def __init__(self, weights: Callable[[], Hashable], passes: Passes | None = None) -> None:
        """passes: how many rows run together; lowered where the device's memory is out."""
        self.weights, self.passes = weights, passes or Passes()
        self.saved_seconds = 0.0  # that taking kept ones has spared
        self._kept: dict[tuple[Any, ...], tuple[Targets, torch.device, float]] = {}

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        contexts: Contexts,
        config: TargetConfig,
        *,
        layer: int | None = None,
        places: tuple[Place, ...] = ("block",),
        nll_factor: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Targets:
        """As ``optimise_targets``."""
        layer = config.layers[-1] if layer is None else layer
        fields = (field.name for field in dataclasses.fields(TargetConfig) if field.name != "layers")
        settings = tuple(getattr(config, name) for name in fields)
        weights = self.weights()
        key = (weights, tuple(requests), contexts, settings, layer, places, nll_factor)
        if weights is not None and key in self._kept:
            kept, device, seconds = self._kept[key]
            self.saved_seconds += seconds
            return _on(kept, device)
        start = time.perf_counter()
        targets = optimise_targets(
            model, tokenizer, requests, contexts, config,
            layer=layer, places=places, nll_factor=nll_factor, progress=progress, passes=self.passes,
        )  # fmt: skip
        if weights is not None:
            seconds = time.perf_counter() - start
            self._kept[key] = _on(targets, torch.device("cpu")), targets.values.device, seconds
        return targets


def _on(targets: Targets, device: torch.device) -> Targets:
    return Targets(*(tensor.to(device) for tensor in vars(targets).values()))
