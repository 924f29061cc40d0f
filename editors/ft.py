"""Fine-tuning of MLP output projections, free or constrained (Zhu et al. 2020, arXiv 2012.00363).

As the baseline of the MEMIT repository (``baselines/ft/ft_main.py``; ALGORITHMS 5.4): Adam on the batch's
own facts, epoch after epoch. Only the blocks from the lowest edited one on are run in a step, and the head
only where a token is predicted; what enters the lowest edited block stays as it is while a batch is
edited, so it is computed once. This changes no result beyond rounding.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.answers import AnswerPass, AnswerRow, Objective, answer_rows, passes_of
from editors.api import (
    NO_CHECKPOINT,
    Checkpoint,
    Covariance,
    EditorConfig,
    EditRequest,
    Progress,
    ReleasedAsEdited,
    WeightDeltas,
)
from editors.capture import check_written, frozen, undone_on_failure
from editors.sites import Sites, sites_for


@dataclass(frozen=True, kw_only=True)
class FtConfig(EditorConfig):
    """Adam on the weight, and on the bias where there is one, of the MLP output projections of ``layers``.

    objective: "prompt_last" asks the prompt's last token for every token of the target, as the reference
    code does; "target_new" predicts each from the ones before it. A bias is trained where the table of
    architectures has one; one that only a model's own config adds (a Llama with ``mlp_bias``) is left alone.
    """

    steps: int = 25  # epochs over a batch, at most (num_steps)
    learning_rate: float = 5e-4  # of Adam (lr)
    weight_decay: float = 0.0  # Adam's L2 form: added to the gradient
    norm_constraint: float | None = None  # largest change of an entry in one batch; None: any
    objective: Objective = "prompt_last"
    stop_loss: float = 1e-2  # no step below it; an epoch whose mean is below it is the last
    minibatch: int = 64  # edits to a step

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "minibatch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("weight_decay", "stop_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.norm_constraint is not None and self.norm_constraint <= 0:
            raise ValueError(f"norm_constraint is {self.norm_constraint}; it must be above 0, or none")
        if self.objective not in get_args(Objective):
            raise ValueError(f"objective is {self.objective!r}; known: {', '.join(get_args(Objective))}")


class FtStream:
    """A model fine-tuned batch after batch; nothing but its weights outlives a batch.

    The edited weights should be float32 or better, whatever the rest of the model is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: FtConfig,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config, self.progress = model, tokenizer, config, progress
        self.sites = sites_for(model)
        self.sites.check_layers(model, config.layers)
        self._notes: dict[str, Any] = {}

    def edit(self, requests: Sequence[EditRequest], checkpoint: Checkpoint = NO_CHECKPOINT) -> WeightDeltas:
        """Write one batch into the model, all of it or nothing: no part is kept.

        Returns changes in the parameters' stored shapes. Raises FloatingPointError if a loss or an update
        is not finite, or an update explodes, with the weights as they were before.
        """
        rows = answer_rows(self.tokenizer, requests, self.config.objective)
        parameters = {name: self.model.get_parameter(name) for name in trained_names(self.config, self.sites)}
        with undone_on_failure(self.model, parameters) as start:
            with frozen(self.model), _trained(parameters.values()):
                self._train(rows, parameters, start)
            return {name: _settled(self.model, name, start[name]) for name in parameters}

    def _train(
        self, rows: Sequence[AnswerRow], parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]
    ) -> None:
        """All epochs of one batch."""
        config = self.config
        size = config.minibatch
        minibatches = [
            (len(rows[i : i + size]), self._passes(rows[i : i + size])) for i in range(0, len(rows), size)
        ]
        adam = torch.optim.Adam(
            parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        for epoch in range(1, config.steps + 1):
            mean = 0.0
            for edits, passes in minibatches:
                loss = _descend(passes, list(parameters.values()))
                if not torch.isfinite(torch.tensor(loss)):
                    raise FloatingPointError(
                        f"the loss of epoch {epoch} is not finite; the batch is undone; check the model's "
                        "weights and the learning rate"
                    )
                mean += loss * edits / len(rows)
                if loss >= config.stop_loss:
                    adam.step()
                    if config.norm_constraint is not None:
                        clamp(parameters, start, config.norm_constraint)
            self._notes = {"epochs": epoch, "mean_loss": mean}
            if mean < config.stop_loss:
                break
            if self.progress:
                self.progress("epochs", epoch, config.steps)
        if self.progress:
            self.progress("epochs", config.steps, config.steps)

    def _passes(self, rows: Sequence[AnswerRow]) -> list[AnswerPass]:
        """One minibatch: the mean over its edits of the mean over an edit's tokens."""
        made: list[AnswerPass] = []
        for part in passes_of(rows):
            together = [rows[i] for i in part]
            shares = [1 / (len(rows) * len(row.answers)) for row in together]
            made.append(AnswerPass(self.model, together, shares, self.config.layers[0]))
        return made

    def notes(self) -> dict[str, Any]:
        """Epochs that the last batch took, and the mean loss in the last of them."""
        return dict(self._notes)

    def state(self) -> dict[str, Tensor]:
        """Nothing: every batch has a new optimiser."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state; the model's weights are the caller's to restore."""


@dataclass(frozen=True)
class Ft(ReleasedAsEdited):
    """Fine-tuning, batch after batch."""

    config: FtConfig

    def parameters(self, sites: Sites) -> tuple[str, ...]:
        """Weight, and bias where the architecture has one, of every edited block."""
        return trained_names(self.config, sites)

    def statistics(self) -> tuple[int, ...]:
        """None: it reads no covariance."""
        return ()

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        covariance: Covariance,
        seed: int,
        progress: Progress | None = None,
    ) -> FtStream:
        """Bind it to a model; it draws nothing and reads no covariance."""
        return FtStream(model, tokenizer, self.config, progress=progress)


def trained_names(config: FtConfig, sites: Sites) -> tuple[str, ...]:
    """Names of the trained parameters, lowest block first."""
    kinds = ("weight", "bias") if sites.mlp_bias else ("weight",)
    return tuple(f"{sites.mlp_projection.format(layer)}.{kind}" for layer in config.layers for kind in kinds)


@torch.no_grad()
def clamp(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], limit: float) -> None:
    """Bring every entry back to at most ``limit`` from its value in ``start``."""
    for name, parameter in parameters.items():
        parameter.clamp_(min=start[name] - limit, max=start[name] + limit)


def _descend(passes: Sequence[AnswerPass], parameters: Sequence[nn.Parameter]) -> float:
    """Leave the gradient of one minibatch's loss in the parameters; the loss."""
    total = 0.0
    for parameter in parameters:
        parameter.grad = None
    for part in passes:
        with torch.enable_grad():
            loss = part.loss(part.hidden)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        total += loss.item()
    return total


@contextmanager
def _trained(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients of these parameters alone while the context lasts; inside ``frozen``."""
    kept = list(parameters)
    for parameter in kept:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def _settled(model: PreTrainedModel, name: str, start: Tensor) -> Tensor:
    """What was added; the parameter becomes exactly the sum of its start and that."""
    parameter = model.get_parameter(name)
    delta = parameter.detach() - start
    parameter.copy_(start + delta)
    check_written(model, name, start)
    return delta
