"""lm-eval on weights that change: stored answers, records routed between two weight sets, and any cell of a
run folder on lm-eval's own command line.

    python -m harness.lm --model seqmmr --model_args run=RUN,editor=memit,cell=+MM+R --tasks ...

is lm-eval's command with one model more; everything else is as its documentation says.
"""

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor
from transformers import PreTrainedModel

from harness.grid import Cell, Merge, Route, cells_of, merges_of, routes_of
from harness.models import find_model, load_model, ready_to_edit, weights_in_place
from harness.paths import cache_folder
from harness.replay import Replay, edited_parameters
from harness.spec import RunSpec

Router = Callable[[Sequence[str]], list[bool]]  # prompts -> whether the edited weights answer


class Wrapper(LM):  # type: ignore[misc]
    """A model that answers all three kinds of request by way of another one."""

    def __init__(self, inner: LM) -> None:
        super().__init__()
        self.inner = inner

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._answered("loglikelihood", requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._answered("loglikelihood_rolling", requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self._answered("generate_until", requests, disable_tqdm)

    def apply_chat_template(self, *args: Any, **more: Any) -> Any:
        return self.inner.apply_chat_template(*args, **more)

    @property
    def tokenizer_name(self) -> str:
        return str(self.inner.tokenizer_name)

    @abstractmethod
    def _answered(self, method: str, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        """Answers in the order of the requests."""


class AnswerStore(Wrapper):
    """A model that is asked for each answer once per set of weights.

    weights: identifies the weights as they are when it is called; an answer is kept under it, the method
    and the arguments, so that weights that change never get answers of others.
    """

    def __init__(self, inner: LM, weights: Callable[[], str]) -> None:
        super().__init__(inner)
        self._weights = weights
        self._answers: dict[tuple[str, str, str], Any] = {}

    def _answered(self, method: str, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        weights = self._weights()
        keys = [(weights, method, json.dumps(request.args, sort_keys=True)) for request in requests]
        missing = {
            key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers
        }
        if missing:
            ask = getattr(self.inner, method)
            answers = ask(list(missing.values()), disable_tqdm=disable_tqdm)
            self._answers |= dict(zip(missing, answers, strict=True))
        return [self._answers[key] for key in keys]


class RoutedLM(Wrapper):
    """One model with two sets of weights; every record is answered by the one its prompt is routed to.

    All requests of a record (its choices, say) go where its first one goes.
    """

    def __init__(
        self, inner: LM, model: PreTrainedModel, edited: Mapping[str, Tensor], router: Router | None
    ) -> None:
        """edited: parameter name -> edited weight; router: None sends everything to them."""
        super().__init__(inner)
        self._model, self._edited, self._router = model, edited, router

    def _answered(self, method: str, requests: list[Any], disable_tqdm: bool) -> list[Any]:
        records = [(request.task_name, request.doc_id) for request in requests]
        prompts: dict[Any, str] = {}
        for record, request in zip(records, requests, strict=True):
            prompts.setdefault(record, request.args[0])
        sent = [True] * len(prompts) if self._router is None else self._router(list(prompts.values()))
        to_edited = dict(zip(prompts, sent, strict=True))
        answers: list[Any] = [None] * len(requests)
        for edited in (True, False):
            part = [i for i, record in enumerate(records) if to_edited[record] is edited]
            if part:
                with weights_in_place(self._model, self._edited) if edited else nullcontext():
                    ask = getattr(self.inner, method)
                    found = ask([requests[i] for i in part], disable_tqdm=disable_tqdm)
                for i, answer in zip(part, found, strict=True):
                    answers[i] = answer
        return answers


@register_model("seqmmr")
class CellLM(RoutedLM):
    """One cell of a run folder, as lm-eval's ``--model seqmmr``."""

    def __init__(
        self,
        run: str,
        editor: str,
        cell: str = "+MM+R",
        merger: str | None = None,
        pruning_ratio: float | None = None,
        router: str | None = None,
        top_k: int | None = None,
        data: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """run, editor, cell: which; merger, pruning_ratio, router, top_k: where a run has several, by default
        its first;
        data: as of the ablation, where the run's dataset is a local copy; device: by default the run's.

        Raises ValueError if the run has no such cell, or the model or dataset is not what it was made with.
        """
        unknown.pop("max_batch_size", None)  # lm-eval's command line always gives it
        if unknown:
            known = "run, editor, cell, merger, pruning_ratio, router, top_k, data, batch_size, device"
            raise ValueError(f"unknown model argument {min(unknown)!r}; known: {known}")
        from lm_eval.models.huggingface import HFLM

        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval's command line names cuda:0 unless told otherwise
        info = _run_info(Path(run))
        spec = RunSpec.from_json(info["spec"])
        named = {"merger": merger, "pruning_ratio": pruning_ratio, "router": router, "top_k": top_k}
        chosen = _cell(spec, editor, cell, named)
        loaded = load_model(
            spec.model, find_model(spec.model), dtype=getattr(torch, spec.dtype), device=device or spec.device
        )
        if loaded.digest != info["provenance"]["model"]["digest"]:
            raise ValueError(f"{spec.model!r} has other weights than the run {run!r} was made with")
        model = loaded.model
        names = edited_parameters(spec, model)
        ready_to_edit(model, names)
        base = {name: model.get_parameter(name).detach().clone() for name in names}
        replay = Replay(folder=Path(run), spec=spec, base=base, device=model.device)
        *_, last = replay.history(editor, chosen.merge)
        weights, _ = replay.released(editor, chosen.merge, last)
        edited = {name: value.to(model.dtype) for name, value in weights.items()}
        sends = None if chosen.route is None else _router(info, spec, chosen.route, data)
        inner = HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=batch_size or 16)
        super().__init__(inner, model, edited, sends)


def _run_info(run: Path) -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((run / "run.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"run folder {str(run)!r} cannot be read: {error}") from None
    return info


def _cell(spec: RunSpec, editor: str, name: str, named: Mapping[str, Any]) -> Cell:
    """The cell of these names; of several mergers, ratios, routers and top-k the first if none is named."""
    cells = list(cells_of(spec, editor)) if editor in spec.editors else []
    for cell in cells:
        setting = {**vars(cell.merge or Merge(merger="")), **vars(cell.route or Route(router=""))}
        if cell.name == name and all(value in (None, setting[field]) for field, value in named.items()):
            return cell
    asked = ", ".join(str(part) for part in (editor, name, *named.values()) if part is not None)
    raise ValueError(
        f"the run has no cell {asked}; editors: {', '.join(spec.editors)}; cells: {', '.join(spec.cells)}; "
        f"mergers: {', '.join(map(str, merges_of(spec)))}; routers: {', '.join(map(str, routes_of(spec)))}"
    )


def _router(info: Mapping[str, Any], spec: RunSpec, route: Route, data: str | None) -> Router:
    """The run's router as it was after the last batch."""
    from harness.data import load_dataset, select
    from harness.encoders import encoder
    from harness.routers import build_router

    dataset = load_dataset(spec.dataset, data)
    if dataset.digest != info["spec"]["data_digest"]:
        raise ValueError(f"dataset {spec.dataset!r} is not the one the run was made with; name it with data=")
    selection, _ = select(
        dataset, edits=spec.edits, negatives=spec.negatives, order=spec.select, seed=spec.seed
    )
    embed = encoder(spec.encoder, cache=cache_folder("embeddings"), device=spec.device)
    router = build_router(spec, route, embed, selection.cases, selection.unrelated)
    return lambda prompts: [decision.expert is not None for decision in router.route(prompts)]


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
