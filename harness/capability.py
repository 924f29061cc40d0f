"""General ability: what a model with edited weights still scores on lm-eval's tasks (ALGORITHMS 8.3).

Every request is answered once per set of weights. A routed cell only chooses, record by record, between the
stored outcomes of two weight sets, so it costs no forward.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.lm import AnswerStore
from harness.models import tensors_digest, weights_digest
from tasks import TASKS, TASKS_DIR, generated

BATCH_SIZE = 16  # it changes float32 answers by rounding, so it is fixed
FEWSHOT_SEED = 1234  # lm-eval's own
ROUTED_TEXT = "the full prompt as given to the model"

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One record of a task."""

    task: str
    case_id: str
    doc_id: int  # position in the task's test split
    prompt: str  # as given to the model, few-shots included
    choices: tuple[str, ...]
    gold: int  # position of the right choice


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks loaded once, to be evaluated as often as there are weight sets."""

    names: tuple[str, ...]
    tasks: Mapping[str, Any]  # lm-eval's task objects; ours with their generated definitions
    items: tuple[Item, ...]  # in the order of names, then of the records
    digest: str  # of all requests and right answers

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says of it."""
        return {
            "tasks": {name: str(task.VERSION) for name, task in self.tasks.items()},
            "digest": self.digest,
            "batch_size": BATCH_SIZE,
            "routed_text": ROUTED_TEXT,
        }

    def notes(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What a report must say where sums and means of log-probabilities may rank answers differently."""
        notes = []
        for name in self.names:
            choices = {choice for item in self.items if item.task == name for choice in item.choices}
            lengths = {
                len(tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]) for choice in choices
            }
            if name in TASKS and len(lengths) > 1:
                notes.append(
                    f"{name}: its answers have {' and '.join(map(str, sorted(lengths)))} tokens in this "
                    "tokenizer; sums of log-probabilities are compared, the published code compares means."
                )
        return notes


def load_suite(names: Sequence[str], data: str | None = None) -> Suite:
    """The tasks of these names: ours, lm-eval's own multiple-choice tasks and groups, or YAML files of such.

    data: folder with the records of our tasks; a file, or None: the variable SEQMMR_DATA, else the hub.
    Raises ValueError in one line for an unknown task, records that are not there, or another kind of task.
    """
    folder = data if data and not Path(data).is_file() else None
    loaded: dict[str, Any] = {}
    shown: list[str] = []
    with _quiet():
        managers = _Managers(folder)
        for name in names:
            wanted = [name, generated(name)] if name in TASKS else [name]
            found = managers.load(name, wanted)
            loaded |= found
            shown += [name] if name in TASKS else list(found)
        for task in loaded.values():
            task.set_fewshot_seed(FEWSHOT_SEED)
            task.build_all_requests(rank=0, world_size=1)
    if repeated := {name for name in shown if shown.count(name) > 1}:
        raise ValueError(f"task {min(repeated)!r} is asked for twice; leave it, or the group with it, out")
    items = tuple(item for name in shown for item in _items(name, loaded[name]))
    requests = [
        (name, request.request_type, request.args)
        for name, task in loaded.items()
        for request in task.instances
    ]
    golds = [(item.task, item.case_id, item.gold) for item in items]
    digest = hashlib.sha256(json.dumps([requests, golds]).encode()).hexdigest()
    return Suite(names=tuple(shown), tasks=loaded, items=items, digest=digest)


class _Managers:
    """lm-eval's indexes of tasks, each made when first needed: the one of its own tasks takes long."""

    def __init__(self, folder: str | None) -> None:
        self._metadata = {"data": folder} if folder else None
        self._made: dict[bool, TaskManager] = {}

    def load(self, name: str, wanted: list[str]) -> dict[str, Any]:
        """The tasks that a name stands for, by their own names."""
        is_file = name.endswith(".yaml")
        if is_file and not Path(name).is_file():
            raise ValueError(f"task file {name!r} does not exist")
        manager = self._manager(defaults=not (name in TASKS or is_file))
        if not is_file and name not in manager.all_tasks:
            raise ValueError(
                f"unknown task {name!r}; known: six, {', '.join(TASKS)}, the names that "
                "`lm-eval ls tasks` lists, and YAML files of tasks"
            )
        try:
            found: dict[str, Any] = manager.load(wanted)["tasks"]
        except Exception as error:  # whatever the task's own code and data raise
            if name in TASKS and isinstance(error, ValueError):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"task {name!r} cannot be loaded: {reason}") from None
        if name not in TASKS:
            for each, task in found.items():
                if task.OUTPUT_TYPE != "multiple_choice":
                    raise ValueError(f"task {each!r} is {task.OUTPUT_TYPE}; it must be multiple_choice")
        return found

    def _manager(self, *, defaults: bool) -> TaskManager:
        if defaults not in self._made:
            self._made[defaults] = (
                TaskManager()
                if defaults
                else TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=self._metadata)
            )
        return self._made[defaults]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's advice on custom data and on models in memory."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _items(name: str, task: Any) -> Iterator[Item]:
    prompts: dict[int, str] = {}
    docs: dict[int, Any] = {}
    for request in task.instances:
        prompts.setdefault(request.doc_id, request.args[0])
        docs.setdefault(request.doc_id, request.doc)
    for doc_id, doc in docs.items():
        choices = tuple(task.doc_to_choice(doc))
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        if isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise ValueError(f"task {name!r}, record {doc_id}: {gold!r} is not one of its choices")
        case_id = str(doc["id"]) if name in TASKS else str(doc_id)
        yield Item(
            task=name, case_id=case_id, doc_id=doc_id, prompt=prompts[doc_id], choices=choices, gold=gold
        )


class Evaluator:
    """Scores a suite under whatever weights a model has when it is asked."""

    def __init__(
        self,
        suite: Suite,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        changing: Sequence[str] | None = None,
    ) -> None:
        """changing: parameters that may differ between evaluations; None: any may."""
        from lm_eval.models.huggingface import HFLM

        def weights() -> str:
            if changing is None:
                return weights_digest(model)
            return tensors_digest({name: model.get_parameter(name) for name in changing})

        self.suite = suite
        with _quiet():
            inner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
        self.store = AnswerStore(inner, weights)

    def rows(self) -> list[Row]:
        """One row per record, as ``cases.jsonl.gz`` has it, in the order of the suite's items.

        Raises FloatingPointError where a log-probability is not finite.
        """
        from lm_eval.evaluator import evaluate

        for task in self.suite.tasks.values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        loaded = {"tasks": dict(self.suite.tasks), "groups": {}, "group_map": {}}
        found = evaluate(lm=self.store, task_dict=loaded, bootstrap_iters=0)["samples"]
        samples = {name: {s["doc_id"]: s for s in reversed(found[name])} for name in self.suite.tasks}
        return [_row(item, samples) for item in self.suite.items]


def _row(item: Item, samples: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Row:
    answers = samples[item.task][item.doc_id]["filtered_resps"][: len(item.choices)]
    logprobs = [float(logprob) for logprob, _ in answers]
    if not all(map(math.isfinite, logprobs)):
        raise FloatingPointError(f"the log-probabilities of {item.task}, {item.case_id}, are not finite")
    written = samples.get(generated(item.task), {}).get(item.doc_id)
    return {
        "case_id": item.case_id,
        "batch": None,
        "kind": f"task:{item.task}",
        "index": item.doc_id,
        "prompt": item.prompt,
        "gold": item.gold,
        "pred": logprobs.index(max(logprobs)),
        "choice_logprobs": logprobs,
        "pred_generated": None if written is None else written["f1_generated"][1],
    }
