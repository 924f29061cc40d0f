"""One model with two versions of its edited matrices; every row of a batch is answered by one of them.

The base weights are there once, the edited matrices a second time in the model's dtype. A batch whose rows
all go one way multiplies by one version only; a mixed batch multiplies all its rows by both and keeps of each
row what is its own. So every row is, bit for bit, what the unedited or the merged model alone gives at that
batch shape; a mixed batch costs the second product, a few per cent.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from accelerate.utils import align_module_device  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from editors.sites import device_of
from routing.api import Decision, Router

logger = logging.getLogger(__name__)

Route = Literal["auto", "edited", "unedited"]
_DECIDED = "seqmmr_rows"  # attribute of a cache: the rows its keys and values were made with
_ROUTED = "seqmmr_routed"  # attribute of a model that is routed already
_NO_TEXT = Decision(expert=None, score=-10.0, nearest=())


class _Rows:
    """Which sequences of a batch the edited version answers."""

    def __init__(self, edited: Sequence[bool], *, exact: bool) -> None:
        """exact: the batch has just these rows; else each may stand for several in a row (beams)."""
        self.edited = tuple(bool(row) for row in edited)
        self.exact = exact
        self.any, self.all = any(self.edited), all(self.edited)
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

    def check(self, count: int) -> None:
        """Raise ValueError if a batch of ``count`` rows does not come of these."""
        known = len(self.edited)
        if known == count or (known and not self.exact and count % known == 0):
            return
        raise ValueError(
            f"a batch of {count} rows has a decision on {known}; name one per row: rows([True, False, ...])"
        )

    def mask(self, count: int, device: torch.device) -> Tensor:
        """(count, 1, 1), True where the edited version answers."""
        if (count, device) not in self._masks:
            mask = torch.tensor(self.edited, device=device).repeat_interleave(count // len(self.edited))
            self._masks[count, device] = mask.view(-1, 1, 1)
        return self._masks[count, device]


_EITHER = {"edited": _Rows([True], exact=False), "unedited": _Rows([False], exact=False)}


class _TwoVersions:
    """The forward of one edited projection."""

    def __init__(self, module: nn.Linear | Conv1D, rows: Callable[[], _Rows]) -> None:
        self.module, self.rows = module, rows
        self.base: Callable[[Tensor], Tensor] = module.forward  # whatever it is: packed, offloaded ...

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows()
        if not rows.any:
            return self.base(x)
        if rows.all:
            return self.edited(x)
        if x.dim() != 3:
            raise ValueError(
                f"an edited projection got {tuple(x.shape)}, not (rows, tokens, width); "
                "name one route for all rows: with routed.rows('edited'): ..."
            )
        rows.check(len(x))
        return torch.where(rows.mask(len(x), x.device), self.edited(x), self.base(x))

    def edited(self, x: Tensor) -> Tensor:
        """x W^T + b with the edited version, by the operation the base takes."""
        weight: Tensor = self.module.edited_weight  # type: ignore[assignment]
        bias: Tensor | None = self.module.edited_bias  # type: ignore[assignment]
        if not isinstance(self.module, Conv1D):
            return nn.functional.linear(x, weight, bias)
        assert bias is not None
        return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


class RoutedModel:
    """A model and the edited version of some of its matrices, in place: ``model`` stays what it is for
    transformers, its pipelines and lm-eval.

    The route of a sequence is decided once, from its prompt: ``model.generate`` decides before the first
    step, a forward without a past from the text it is given, and whatever goes on from a cache keeps what
    the cache was filled with (its rows must stay in their order). ``rows`` and ``generate(route=...)``
    override this, ``default_route`` says what happens otherwise. A forward on a prompt with its answer
    appended, as lm-eval scores choices, would be decided from both: ask ``route`` about the prompts and name
    the rows. What ``rows`` names holds in its own thread or asyncio task; others may ask meanwhile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        edited: Mapping[str, Tensor],
        router: Router | None,
    ) -> None:
        """edited: parameter name -> edited value, of weights (and biases) of linear layers; kept in the base
        weight's dtype and on its device. router: None sends everything to them unless a route is named.

        Raises ValueError if a name or a shape is not the model's, or the model is routed already.
        """
        if _ROUTED in vars(model):
            raise ValueError(f"this {type(model).__name__} is routed already; close() that RoutedModel first")
        self._modules = _edited_modules(model, edited)
        self.model, self.tokenizer, self.router = model, tokenizer, router
        self.default_route: Route = "edited" if router is None else "auto"
        self._state: ContextVar[Route | _Rows | None] = ContextVar("rows", default=None)
        self._undo = ExitStack()
        for path, module in self._modules.items():
            with align_module_device(module):  # an offloaded module's weights are elsewhere
                for leaf in ("weight", "bias"):
                    own = getattr(module, leaf)
                    value = edited.get(f"{path}.{leaf}", own)
                    if value is not None:
                        value = value.detach().to(own.device, own.dtype).contiguous()
                    module.register_buffer(f"edited_{leaf}", value, persistent=False)
                    self._undo.callback(delattr, module, f"edited_{leaf}")
            self._replace(module, "forward", _TwoVersions(module, self._current))
        self._replace(model, "forward", self._deciding_forward(model.forward))
        generate: Any = model.generate
        self._replace(model, "generate", self._deciding_generate(generate))
        self._replace(model, "init_continuous_batching", _refuse_packed_rows)
        self._replace(model, _ROUTED, True)

    @property
    def edited(self) -> dict[str, Tensor]:
        """All that is held a second time: parameter name -> edited value, as it multiplies."""
        held = {
            f"{path}.{leaf}": getattr(module, f"edited_{leaf}")
            for path, module in self._modules.items()
            for leaf in ("weight", "bias")
        }
        return {name: value for name, value in held.items() if value is not None}

    def route(self, prompts: Sequence[str]) -> list[Decision]:
        """The router's decision on each prompt, logged; a prompt without text goes to the unedited model."""
        if self.router is None:
            raise ValueError("route 'auto' needs a router and there is none; name 'edited' or 'unedited'")
        written = [prompt for prompt in prompts if prompt.strip()]
        decided = iter(self.router.route(written) if written else [])
        decisions = [next(decided) if prompt.strip() else _NO_TEXT for prompt in prompts]
        for prompt, decision in zip(prompts, decisions, strict=True):
            name = "unedited" if decision.expert is None else "edited"
            logger.info("%s, score %.3f, nearest %s: %.80r", name, decision.score, decision.nearest, prompt)
        return decisions

    @contextmanager
    def rows(self, route: Route | Sequence[bool]) -> Iterator[None]:
        """Let this decide for the forwards and generations inside: a route for all rows, or True for every
        row of the batch (prompt of a generation) that the edited version is to answer.
        """
        state = _known(route) if isinstance(route, str) else _Rows(route, exact=True)
        with self._deciding(state):
            yield

    def generate(
        self, prompts: Sequence[str], route: Route | Sequence[bool] | None = None, **options: Any
    ) -> list[str]:
        """What the model adds to each prompt, without special tokens; several texts a prompt, one after
        another, with ``num_return_sequences``.

        route: as in ``rows``; by default what holds here, else ``default_route``.
        options: those of ``model.generate``.
        """
        if not prompts:
            return []
        state = self._now() if route is None else route
        if state == "auto":
            state = [decision.expert is not None for decision in self.route(prompts)]
        encoded = self.tokenizer(
            list(prompts), return_tensors="pt", padding=len(prompts) > 1, padding_side="left"
        )
        device = device_of(self.model)
        if device.type != "meta":  # offloaded: its hooks take ids from anywhere
            encoded = encoded.to(device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        with nullcontext() if isinstance(state, _Rows) else self.rows(state):
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, **{"pad_token_id": self.tokenizer.pad_token_id} | options
            )
        sequences = out if isinstance(out, Tensor) else out.sequences
        texts: list[str] = self.tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    def close(self) -> None:
        """Give the model back as it was, with the base weights."""
        self._undo.close()

    def __enter__(self) -> "RoutedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deciding_forward(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(plain).parameters)

        @functools.wraps(plain)
        def forward(*args: Any, **more: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | more
            rows = self._rows_of(given)
            with self._deciding(rows):
                out = plain(*args, **more)
            cache = given.get("past_key_values")
            cache = getattr(out, "past_key_values", None) if cache is None else cache
            if isinstance(cache, Cache):
                setattr(cache, _DECIDED, rows)
            return out

        return forward

    def _deciding_generate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(plain).parameters)

        @functools.wraps(plain)
        def generate(*args: Any, **more: Any) -> Any:
            rows = self._rows_of(dict(zip(names, args, strict=False)) | more)
            with self._deciding(_Rows(rows.edited, exact=False)):
                return plain(*args, **more)

        return generate

    def _rows_of(self, given: Mapping[str, Any]) -> _Rows:
        """The rows of a call with these arguments, by what was named or by its prompts."""
        ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
        state = self._now()
        past = given.get("past_key_values")
        if state == "auto" and isinstance(past, Cache) and past.get_seq_length() > 0:
            state = getattr(past, _DECIDED, state)
            if state == "auto":
                raise ValueError(
                    "this cache was filled undecided; name the route: with routed.rows('edited'): ..."
                )
        if state == "auto":
            if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
                raise ValueError(
                    "no token ids to decide the route from; name it: with routed.rows('edited'): ..."
                )
            decisions = self.route(self._texts(ids, given.get("attention_mask")))
            return _Rows([decision.expert is not None for decision in decisions], exact=False)
        if not isinstance(state, _Rows):
            return _EITHER[state]
        batch = given.get("inputs_embeds") if ids is None else ids
        if batch is not None:
            state.check(len(batch))
        return state

    def _texts(self, ids: Tensor, mask: Any) -> list[str]:
        """The text of every row, without padding and special tokens."""
        rows = ids.tolist()
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            rows = [
                [token for token, shown in zip(*row, strict=True) if shown]
                for row in zip(rows, mask.tolist(), strict=True)
            ]
        texts: list[str] = self.tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def _now(self) -> Route | _Rows:
        """What decides here."""
        return self._state.get() or _known(self.default_route)

    def _current(self) -> _Rows:
        """The rows of the forward that is going on."""
        state = self._now()
        if state == "auto":
            raise ValueError(
                "a part of the model was called by itself, without a prompt to decide the route from; "
                "name it: with routed.rows('edited'): ..."
            )
        return state if isinstance(state, _Rows) else _EITHER[state]

    @contextmanager
    def _deciding(self, state: Route | _Rows) -> Iterator[None]:
        token = self._state.set(state)
        try:
            yield
        finally:
            self._state.reset(token)

    def _replace(self, holder: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of this one object until ``close``."""
        if name in vars(holder):
            self._undo.callback(setattr, holder, name, vars(holder)[name])
        else:
            self._undo.callback(delattr, holder, name)
        setattr(holder, name, value)


def _edited_modules(model: PreTrainedModel, edited: Mapping[str, Tensor]) -> dict[str, nn.Linear | Conv1D]:
    """Path -> module of every edited parameter; ValueError if one is not there or of another shape."""
    parameters = dict(model.named_parameters())
    modules: dict[str, nn.Linear | Conv1D] = {}
    for name, value in edited.items():
        if name not in parameters:
            raise ValueError(f"{name!r} is no parameter of this {type(model).__name__}; take another model")
        path, own = name.rpartition(".")[0], parameters[name]
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear | Conv1D) or not own.is_floating_point():
            kind = f"{type(module).__name__} of {own.dtype}"
            raise ValueError(f"{name!r} belongs to a {kind}; only linear layers of floats have two versions")
        if value.shape != own.shape:
            raise ValueError(
                f"{name!r} is edited as {tuple(value.shape)} and {tuple(own.shape)} in this model; "
                "take the model that was edited"
            )
        modules[path] = module
    return modules


def _known(route: Route) -> Route:
    if route not in get_args(Route):
        raise ValueError(f"unknown route {route!r}; known: {', '.join(get_args(Route))}")
    return route


def _refuse_packed_rows(*_: Any, **__: Any) -> Any:
    raise ValueError("continuous batching packs prompts into one row; a routed model needs generate()")
