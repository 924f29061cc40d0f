"""Running part of a model: from one block on, over a fixed batch of rows.

The model's own forward says how its blocks are called (mask, positions, rotary tables); a recording takes
those arguments once, and the blocks are then run directly, as often as their input changes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from editors.sites import Sites

T = TypeVar("T")
R = TypeVar("R")
EXPLODED = 1e6  # times a weight's norm; float32 keeps seven digits, so hardly one of the weight's is left


class _Recorded(Exception):
    pass


@dataclass(frozen=True)
class BlockCalls:
    """How the forward calls the blocks ``first`` to the last on one batch of rows."""

    blocks: nn.ModuleList
    first: int
    hidden: Tensor  # (rows, length, d_model), what enters block ``first``
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]

    def run(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Output of block ``last`` for ``hidden`` (rows, length, d_model) entering block ``first``."""
        for layer in range(first, last + 1):
            args, kwargs = self.arguments[layer - self.first]
            out = self.blocks[layer](hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


def record_calls(model: PreTrainedModel, sites: Sites, *, first: int, **inputs: Any) -> BlockCalls:
    """Run the forward up to block ``first`` and record the calls of that block and all above it.

    inputs: what the model's forward takes. Blocks from ``first`` on are not computed.
    """
    blocks = sites.blocks(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    entering: list[Tensor] = []

    def note(*args: Any, **kwargs: Any) -> Tensor:
        hidden = kwargs.pop("hidden_states") if not args else args[0]
        if not calls:
            entering.append(hidden)
        calls.append((args[1:], kwargs))
        if len(calls) == len(blocks) - first:
            raise _Recorded
        return entering[0]

    recorded = list(blocks)[first:]
    for block in recorded:
        block.forward = note
    try:
        model.base_model(**inputs)
    except _Recorded:
        pass
    finally:
        for block in recorded:
            del block.forward
    assert len(calls) == len(blocks) - first, "the forward did not call every block"
    return BlockCalls(blocks, first, entering[0], tuple(calls))


class CollectedPrefix(DynamicCache):
    """Keeps, of the blocks from one on, the keys and values of the first positions of every row."""

    def __init__(self, first: int, positions: int) -> None:
        super().__init__()
        self.first, self.positions = first, positions
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx >= self.first:
            part = slice(0, self.positions)
            self.kept[layer_idx] = (key_states[:, :, part].clone(), value_states[:, :, part].clone())
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class FixedPrefix(DynamicCache):
    """A constant prefix of keys and values; what is computed behind it is not kept."""

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]], positions: int) -> None:
        super().__init__()
        self.kept, self.positions = kept, positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.kept[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.positions

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.positions + query_length, 0


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first argument of every call of a module while the context lasts."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the output of every call of a module (of a tuple, its first) while the context lasts."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handle = module.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def added_to_first(module: nn.Module, vectors: Tensor) -> Iterator[None]:
    """Add to a module's output (rows, length, d_out), at each row's first position, one of ``vectors``.

    vectors: (rows, d_out), float32 or better; the sum is taken in their precision.
    """

    def move(_: nn.Module, args: Any, out: Tensor) -> Tensor:
        first = out[:, 0].to(vectors.dtype) + vectors
        return torch.cat([first.to(out.dtype)[:, None], out[:, 1:]], dim=1)

    handle = module.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def logits_of(model: PreTrainedModel, sites: Sites, hidden: Tensor) -> Tensor:
    """Logits (..., V) of the last block's output (..., d_model)."""
    return head_logits(model, model.get_submodule(sites.final_norm)(hidden))


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) of normed hidden states (..., d_model): the head, and soft-capping where it is used."""
    logits: Tensor = model.get_output_embeddings()(hidden)  # type: ignore[no-untyped-call]
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def log_probabilities(logits: Tensor) -> Tensor:
    """log p (..., V) in float32 or better."""
    return functional.log_softmax(logits.to(torch.promote_types(torch.float32, logits.dtype)), dim=-1)


def in_halves(part: Sequence[T], run: Callable[[Sequence[T]], R]) -> Iterator[tuple[Sequence[T], R]]:
    """``run`` on a part, or on its halves and so on where the device's memory is out: each with its result.

    Raises MemoryError, which no halving mends, if a single one does not fit.
    """
    try:
        found: R | None = run(part)
    except torch.OutOfMemoryError:
        found = None  # what the frames of the failure held is free only behind this block
    if found is not None:
        yield part, found
        return
    half = check_divisible(len(part))
    yield from in_halves(part[:half], run)
    yield from in_halves(part[half:], run)


def check_divisible(rows: int) -> int:
    """Half of the rows that the device had no memory for; MemoryError if it was one. Frees caches."""
    torch.cuda.empty_cache()
    if rows == 1:
        raise MemoryError(
            "the device's memory is too small for one row more; free some, or give a smaller --dtype or "
            "another --device"
        )
    return rows // 2


@contextmanager
def undone_on_failure(
    model: PreTrainedModel, names: Iterable[str], *, aside: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Give copies of some parameters, and put these back if what the context holds does not end well.

    aside: keep the copies in the host's memory.
    """
    before = {}
    for name in names:
        own = model.get_parameter(name).detach()
        before[name] = own.to(torch.device("cpu") if aside else own.device, copy=True)
    try:
        yield before
    except BaseException:
        put(model, before)
        raise


def check_written(model: PreTrainedModel, name: str, before: Tensor) -> None:
    """Raise FloatingPointError if a parameter is not finite, or its change buries what was there before."""
    weight = model.get_parameter(name).detach()
    if not torch.isfinite(weight).all():
        raise FloatingPointError(f"the update of {name} is not finite; the batch is undone")
    before = before.to(weight.device)
    change, size = (weight - before).norm().item(), before.norm().item()
    if change > EXPLODED * size > 0:
        raise FloatingPointError(
            f"the update of {name} is {change / size:.0e} times as large as the weight; the batch is undone"
        )


@torch.no_grad()
def put(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Write values into a model's parameters by name."""
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradient of any weight while the context lasts."""
    trained = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval()  # type: ignore[no-untyped-call]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(training)


def packed(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Which rows run together: those of similar length, at most so many tokens with padding, at least one."""
    part: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if part and (len(part) + 1) * lengths[row] > tokens:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (rows, longest) and mask of the same shape, 1 on real positions; padding id 0."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
