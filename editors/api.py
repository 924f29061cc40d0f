"""What an editor is given, what it gives back, and the protocol between them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.sites import Sites


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to write: ``prompt`` with the subject filled in should continue with ``target_new``."""

    case_id: int | str
    prompt: str  # exactly one {} where the subject stands
    subject: str
    target_new: str

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise ValueError(
                f"case {self.case_id}: prompt {self.prompt!r} has {self.prompt.count('{}')} places "
                "marked {}; it needs exactly one, where the subject stands"
            )
        if not self.subject.strip():
            raise ValueError(f"case {self.case_id}: subject {self.subject!r} is empty")
        if not self.target_new.strip():
            raise ValueError(f"case {self.case_id}: target_new {self.target_new!r} is empty")


@dataclass(frozen=True)
class LowRank:
    """A change of low rank, ``left @ right`` in the parameter's stored shape."""

    left: Tensor  # (rows, rank), float32
    right: Tensor  # (rank, columns), float32

    def dense(self) -> Tensor:
        """The change multiplied out: product in float64, rounded once to the factors' dtype."""
        return (self.left.double() @ self.right.double()).to(self.left.dtype)


WeightDeltas = Mapping[str, Tensor | LowRank]  # parameter name -> change


def dense(delta: Tensor | LowRank) -> Tensor:
    """The change as one tensor of the parameter's stored shape."""
    return delta.dense() if isinstance(delta, LowRank) else delta


class Checkpoint(Protocol):
    """Where a caller keeps the finished parts of one batch, so that a stopped batch goes on from them."""

    def load(self, part: str) -> dict[str, Tensor] | None:
        """A part as it was saved, on the CPU; None if it is still to be made."""
        ...

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None: ...


class _Nothing:
    def load(self, part: str) -> None:
        return None

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        pass


NO_CHECKPOINT: Checkpoint = _Nothing()


class EditStream(Protocol):
    """One model receiving edits in order; owns every cache that outlives a batch."""

    def edit(self, requests: Sequence[EditRequest], checkpoint: Checkpoint = NO_CHECKPOINT) -> WeightDeltas:
        """Write one batch into the model and return what was added to each parameter.

        checkpoint: takes up what is done of the batch, of methods that have such parts. Used again for the
        same batch on the same weights, it leads to the same bytes.
        """
        ...

    def notes(self) -> dict[str, Any]:
        """What a reader of the results should know of this run: context templates, ranks and the like."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that the next batch depends on, besides the model's weights."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state that ``state`` returned; the model's weights are the caller's to restore."""
        ...


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """What every editor that names its blocks has; subclasses add the method's choices."""

    layers: tuple[int, ...]  # edited blocks, ascending

    def __post_init__(self) -> None:
        check_layers("layers", self.layers)


def check_layers(name: str, layers: tuple[int, ...]) -> None:
    """Raise ValueError unless these are block numbers, ascending, at least one."""
    if not layers:
        raise ValueError(f"{name} is empty; name at least one MLP layer")
    if list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise ValueError(f"{name} {list(layers)} must be ascending, not negative, each once")


Covariance = Callable[[int], Tensor]  # layer -> (d_in, d_in), uncentered second moment of the keys
Progress = Callable[[str, int, int], None]  # what, done, of how many


class Editor(Protocol):
    """An editing method with its settings; ``start`` binds it to one model."""

    @property
    def config(self) -> Any:
        """Its settings, a frozen dataclass with ``layers``, the blocks it touches."""
        ...

    def parameters(self, sites: Sites) -> tuple[str, ...]:
        """Names of the parameters it may change, lowest block first."""
        ...

    def statistics(self) -> tuple[int, ...]:
        """Layers whose covariance it asks for."""
        ...

    def released(
        self, base: Mapping[str, Tensor], edited: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights to use, given those before all edits and those the stream left, and notes on them.

        The same weights for all but the methods that restrain the whole change afterwards; the stream
        itself goes on from ``edited``.
        """
        ...

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        covariance: Covariance,
        seed: int,
        progress: Progress | None = None,
    ) -> EditStream: ...


class ReleasedAsEdited:
    """The part of ``Editor`` that all methods share which restrain nothing afterwards."""

    def released(
        self, base: Mapping[str, Tensor], edited: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights as edited."""
        return dict(edited), {}
