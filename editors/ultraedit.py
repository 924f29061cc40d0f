"""UltraEdit (Gu et al. 2025, arXiv 2505.14679): one step from inputs and gradients, normalised for life.

Repository XiaojieGu/UltraEdit, class ULTRAEDIT. Every edited linear module gives, at each position that
predicts a token of a target, its input h and the gradient g of the loss by its output. Both are normalised
by the mean and variance of all such features so far, earlier batches included; with the hats,

    v_i = -learning_rate |h^_i|^2 g^_i,        shift = (H^T H + ridge I)^-1 H^T V,

where the rows of H (N, d_in) are the inputs as they are and those of V (N, d_out) are the v_i. The rows of
the repository, all with learning rate 1e-6 and batches of 100: Llama-3-8B-Instruct gate 11-15 and up 18-24;
Qwen2.5-7B gate and up 18-26; GPT-J down 18-26; Mistral-7B down 29-30.

A deviation: the loss is the mean over all answer tokens of the batch; the repository takes minibatches of 10
edits, each with its own mean and its own update of the moments. The normalisation takes a common scale of
the gradients away again. Features are taken at the answer positions, as in the paper; EasyEdit's settings
take every token.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.answers import AnswerPass, AnswerRow, answer_rows, passes_of
from editors.api import (
    NO_CHECKPOINT,
    Checkpoint,
    Covariance,
    EditRequest,
    LowRank,
    Progress,
    ReleasedAsEdited,
    WeightDeltas,
    check_layers,
    dense,
)
from editors.capture import check_written, frozen, inputs_of, outputs_of, undone_on_failure
from editors.sites import Sites, device_of, sites_for

DEVIATION_FLOOR = torch.finfo(torch.float32).eps  # added to a standard deviation, as the published code does


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig:
    """Which MLP projections are edited, by block, and the step.

    shared_statistics: one set of moments for all modules of equal (d_in, d_out), as in the repository;
    otherwise each module has its own.
    """

    gate_layers: tuple[int, ...] = ()  # blocks whose gate projection is edited, ascending
    up_layers: tuple[int, ...] = ()
    down_layers: tuple[int, ...] = ()
    learning_rate: float = 1e-6
    ridge: float = 1.0  # weight of the identity
    shared_statistics: bool = True

    def __post_init__(self) -> None:
        fields = ("gate_layers", "up_layers", "down_layers")
        if not any(getattr(self, name) for name in fields):
            raise ValueError(f"{', '.join(fields)} are all empty; name at least one MLP layer")
        for name in fields:
            if getattr(self, name):
                check_layers(name, getattr(self, name))
        for name in ("learning_rate", "ridge"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def layers(self) -> tuple[int, ...]:
        """All edited blocks, ascending."""
        return tuple(sorted({*self.gate_layers, *self.up_layers, *self.down_layers}))


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of the features seen so far; float64."""

    count: int
    mean: Tensor  # (d,)
    squares: Tensor  # (d,)

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Moments of the rows of (N, d)."""
        mean = features.double().mean(dim=0)
        return cls(len(features), mean, (features.double() - mean).square().sum(dim=0))

    def joined(self, other: Self) -> Self:
        """Moments of both sets of rows (Chan, Golub and LeVeque 1983)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        return type(self)(count, mean, squares)

    def normalised(self, features: Tensor) -> Tensor:
        """(N, d) with the mean taken off, over the sample standard deviation."""
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        return (features.double() - self.mean) / (deviation + DEVIATION_FLOOR)


@dataclass(frozen=True)
class Features:
    """What one module gives at N answer positions, float32 or better."""

    inputs: Tensor  # h (N, d_in)
    gradients: Tensor  # g (N, d_out)

    @property
    def both(self) -> Tensor:
        """[h, g] (N, d_in + d_out)."""
        return torch.cat([self.inputs, self.gradients], dim=1)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.inputs.shape[1], self.gradients.shape[1]


def pseudo_values(features: Features, moments: Moments, learning_rate: float) -> Tensor:
    """V (N, d_out), float64: v_i = -learning_rate |h^_i|^2 g^_i."""
    normalised, d_in = moments.normalised(features.both), features.inputs.shape[1]
    length = normalised[:, :d_in].square().sum(dim=1, keepdim=True)  # |h^|^2
    return -learning_rate * length * normalised[:, d_in:]


def ridge_shift(inputs: Tensor, values: Tensor, ridge: float) -> Tensor | LowRank:
    """X (d_in, d_out) = (H^T H + ridge I)^-1 H^T V, float64; low-rank where that takes fewer numbers.

    inputs: H (N, d_in); values: V (N, d_out). With fewer rows than d_in it is H^T (H H^T + ridge I)^-1 V.
    """
    inputs, values = inputs.double(), values.double()
    (n, d_in), d_out = inputs.shape, values.shape[1]
    gram = inputs @ inputs.T if n < d_in else inputs.T @ inputs
    gram.diagonal().add_(ridge)
    if n >= d_in:
        shift: Tensor = torch.linalg.solve(gram, inputs.T @ values)
        return shift
    low = LowRank(inputs.T, torch.linalg.solve(gram, values))
    return low if n * (d_in + d_out) < d_in * d_out else low.dense()


class UltraEditStream:
    """A model edited batch after batch; the moments of all features outlive the batches."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: UltraEditConfig,
        *,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.tokenizer, self.config, self.progress = model, tokenizer, config, progress
        self.sites = sites_for(model)
        self.sites.check_layers(model, config.layers)
        self.modules = edited_modules(config, self.sites)
        self._moments: dict[str, Moments] = {}  # shape or module -> moments
        self._notes: dict[str, Any] = {}

    def edit(self, requests: Sequence[EditRequest], checkpoint: Checkpoint = NO_CHECKPOINT) -> WeightDeltas:
        """Write one batch into the model, all of it or nothing: no part is kept.

        Returns changes in the parameters' stored shapes. Raises FloatingPointError if a feature or an
        update is not finite, or an update explodes, with the weights and the moments as they were before.
        """
        features = self._features(answer_rows(self.tokenizer, requests, "target_new"))
        moments = self._joined(features)
        deltas: dict[str, Tensor | LowRank] = {}
        norms: dict[str, float] = {}
        with undone_on_failure(self.model, (f"{module}.weight" for module in self.modules)) as before:
            for i, module in enumerate(self.modules):
                name, own = f"{module}.weight", features[module]
                values = pseudo_values(own, moments[self._key(module, own)], self.config.learning_rate)
                weight = self.model.get_parameter(name)
                delta = self._stored(ridge_shift(own.inputs, values, self.config.ridge), weight)
                norms[name] = _add(weight, delta)
                check_written(self.model, name, before[name])
                deltas[name] = delta
                self._tell("updates", i + 1, len(self.modules))
        self._moments = moments
        self._notes = {"answer_tokens": len(features[self.modules[0]].inputs), "shift_norms": norms}
        return deltas

    def notes(self) -> dict[str, Any]:
        """Answer tokens of the last batch, and the norm of its shift by parameter."""
        return dict(self._notes)

    def state(self) -> dict[str, Tensor]:
        """The moments: count, mean and sum of squared deviations, float64."""
        state: dict[str, Tensor] = {}
        for key, moments in self._moments.items():
            state[f"count.{key}"] = torch.tensor(moments.count, dtype=torch.float64)
            state[f"mean.{key}"], state[f"squares.{key}"] = moments.mean, moments.squares
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state; the model's weights are the caller's to restore."""
        device = device_of(self.model)
        self._moments = {}
        for name, count in state.items():
            kind, _, key = name.partition(".")
            if kind == "count":
                mean, squares = state[f"mean.{key}"].to(device), state[f"squares.{key}"].to(device)
                self._moments[key] = Moments(int(count), mean, squares)

    def _features(self, rows: Sequence[AnswerRow]) -> dict[str, Features]:
        """Inputs and gradients of every edited module at all answer positions, in the order of the rows."""
        answers = [len(row.answers) for row in rows]
        total = sum(answers)
        offsets = [sum(answers[:i]) for i in range(len(rows))]
        gathered: dict[str, Features] = {}
        done = 0
        with frozen(self.model):
            for part in passes_of(rows):
                at = [offsets[row] + i for row in part for i in range(answers[row])]
                for module, found in self._pass([rows[row] for row in part], 1 / total).items():
                    if module not in gathered:
                        d_in, d_out = found.shape
                        new = found.inputs.new_empty
                        gathered[module] = Features(new(total, d_in), new(total, d_out))
                    index = torch.tensor(at, device=found.inputs.device)
                    gathered[module].inputs[index] = found.inputs
                    gathered[module].gradients[index] = found.gradients
                done += len(part)
                self._tell("gradients", done, len(rows))
        for module, all_ in gathered.items():
            if not torch.isfinite(all_.both).all():
                raise FloatingPointError(
                    f"an input or a gradient of {module} is not finite; the batch is undone; check the "
                    "model's weights"
                )
        return gathered

    def _pass(self, rows: Sequence[AnswerRow], share: float) -> dict[str, Features]:
        """The features of rows that run together; no gradient of any weight is taken."""
        part = AnswerPass(self.model, rows, [share] * len(rows), self.config.layers[0])
        leaf = part.hidden.detach().requires_grad_()
        modules = [self.model.get_submodule(module) for module in self.modules]
        with ExitStack() as stack, torch.enable_grad():
            inputs = [stack.enter_context(inputs_of(module)) for module in modules]
            outputs = [stack.enter_context(outputs_of(module)) for module in modules]
            loss = part.loss(leaf)
        gradients = torch.autograd.grad(loss, [seen[0] for seen in outputs])
        return {
            module: Features(_precise(part.at_places(seen[0].detach())), _precise(part.at_places(gradient)))
            for module, seen, gradient in zip(self.modules, inputs, gradients, strict=True)
        }

    def _joined(self, features: Mapping[str, Features]) -> dict[str, Moments]:
        """The moments with this batch's features added, module after module."""
        moments = dict(self._moments)
        for module in self.modules:
            key = self._key(module, features[module])
            new = Moments.of(features[module].both)
            moments[key] = moments[key].joined(new) if key in moments else new
        return moments

    def _key(self, module: str, features: Features) -> str:
        """Under which name a module's moments are kept."""
        return "x".join(map(str, features.shape)) if self.config.shared_statistics else module

    def _stored(self, shift: Tensor | LowRank, weight: Tensor) -> Tensor | LowRank:
        """A shift (d_in, d_out) in the weight's stored shape, float32 or better."""
        dtype = torch.promote_types(torch.float32, weight.dtype)
        flip = not self.sites.transposed
        if isinstance(shift, LowRank):
            left, right = (shift.right.T, shift.left.T) if flip else (shift.left, shift.right)
            return LowRank(left.to(dtype).contiguous(), right.to(dtype).contiguous())
        return (shift.T if flip else shift).to(dtype).contiguous()

    def _tell(self, what: str, done: int, total: int) -> None:
        if self.progress:
            self.progress(what, done, total)


@dataclass(frozen=True)
class UltraEdit(ReleasedAsEdited):
    """UltraEdit, batch after batch."""

    config: UltraEditConfig

    def parameters(self, sites: Sites) -> tuple[str, ...]:
        """Weights of the edited projections, lowest block first; ValueError if the architecture lacks one."""
        return tuple(f"{module}.weight" for module in edited_modules(self.config, sites))

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
    ) -> UltraEditStream:
        """Bind it to a model; it draws nothing and reads no covariance."""
        return UltraEditStream(model, tokenizer, self.config, progress=progress)


def edited_modules(config: UltraEditConfig, sites: Sites) -> tuple[str, ...]:
    """Paths of the edited modules, lowest block first, in a block gate, up, down.

    Raises ValueError if layers are named for a projection that the architecture has not as a module.
    """
    kinds = {"gate_layers": sites.mlp_gate, "up_layers": sites.mlp_up, "down_layers": sites.mlp_projection}
    found: list[tuple[int, str]] = []
    for field, path in kinds.items():
        layers: tuple[int, ...] = getattr(config, field)
        if layers and path is None:
            raise ValueError(
                f"{field} is {list(layers)}, but this architecture has no such projection of its own; "
                "leave it empty"
            )
        found += [(layer, path.format(layer)) for layer in layers if path is not None]
    return tuple(path for _, path in sorted(found, key=lambda one: one[0]))


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(torch.float32, values.dtype))


@torch.no_grad()
def _add(weight: Tensor, delta: Tensor | LowRank) -> float:
    """Add a change to a weight; its Frobenius norm."""
    change = dense(delta)
    weight += change.to(weight)
    return float(change.norm())
