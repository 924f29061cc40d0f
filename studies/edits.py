"""The edits of the halves, made once and merged in any way; what is asked of the weights is kept on disk.

Every third record is asked, with its rewrite, its paraphrases and three of its neighbours.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from editors.sites import device_of
from harness.capability import Evaluator, Suite
from harness.data import EditCase, load_dataset, local_copy, prompt_rows, select
from harness.deltas import delta_path, state_path
from harness.keys import Solver, keys_path, read_keys, write_keys
from harness.models import find_model, load_model, ready_to_edit, weights_in_place
from harness.paths import read_header, read_lines, write_lines_gz
from harness.replay import Replay, added, edited_parameters
from harness.run import answer_fields, run_grid, statistics_of
from harness.scoring import Query, score
from harness.spec import RunSpec, resolve
from merging import MERGERS, Keys, MergeChain, Merger
from studies.records import EDITS, PARAGRAPHS

BATCHES = 10
TOKENS = 120_000  # of the covariance
EVERY, NEIGHBORS = 3, 3  # of a batch's records, and of a record's neighbours, those that are asked
UNEDITED, BASELINE = "unedited", "none"  # in place of a merger: no edits, and the edited weights
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to merge: a merger with the fields of its config; or none, or not even edits."""

    merger: str
    settings: tuple[tuple[str, Any], ...] = ()  # field and value, sorted

    @classmethod
    def of(cls, merger: str, **settings: Any) -> "Way":
        """With the fields given by name."""
        return cls(merger, tuple(sorted(settings.items())))

    @classmethod
    def parse(cls, text: str) -> "Way":
        """From ``NAME`` or ``NAME:FIELD=VALUE,FIELD=VALUE``."""
        name, _, fields = text.partition(":")
        known = (UNEDITED, BASELINE, *MERGERS)
        if name not in known:
            raise ValueError(f"unknown merger {name!r}; known: {', '.join(known)}")
        pairs = (field.partition("=") for field in fields.split(",") if field)
        return cls.of(name, **{field: yaml.safe_load(value) for field, _, value in pairs})

    @property
    def config(self) -> Any:
        """The merger's config with its defaults, None without a merger; ValueError if a field is wrong."""
        return MERGERS[self.merger][0](**dict(self.settings)) if self.merger in MERGERS else None

    def build(self) -> Merger | None:
        """The merger, None if there is none."""
        return None if self.config is None else MERGERS[self.merger][1](self.config)

    def __str__(self) -> str:
        fields = ",".join(f"{name}={value}" for name, value in self.settings)
        return f"{self.merger}:{fields}" if fields else self.merger


def make_edits(
    records: Path,
    editor: str,
    data: str,
    out: Path,
    *,
    order: int = 0,
    model: str = "smollm2-135m",
    device: str = "cpu",
    overrides: Sequence[str] = (),
) -> None:
    """A run folder with an editor's changes, batch by batch; one that is not finished is gone on with.

    order: the run's seed; overrides: of settings, as ``--set`` takes them.
    """
    given: dict[str, Any] = {
        "model": model, "device": device, "seed": order, "dataset": str(records), "select": "first",
        "stats": str(local_copy(data, PARAGRAPHS)), "limit_stats": TOKENS, "cells": ("baseline",),
        "editors": (editor,), "batch_size": EDITS // BATCHES, "num_batches": BATCHES,
    }  # fmt: skip
    run_grid(resolve(given, overrides), out=out, data=data, edits_only=True)


class Edited:
    """An editor's changes in a run folder, on the model they were made on; answers are kept in ``work``."""

    def __init__(
        self, folder: Path, work: Path, *, batches: int | None = None, data: str | None = None
    ) -> None:
        """batches: only the first so many (of an unfinished run); all by default."""
        info = json.loads((folder / "run.json").read_text())
        self.spec = RunSpec.from_json(info["spec"])
        (self.editor,) = self.spec.editors
        self.folder, self.work = folder, work
        self.count = batches or self.spec.num_batches
        last = read_header(delta_path(folder, self.editor, self.count))
        self.digest = last["digest_after"]  # of the edited weights
        selection, _ = select(
            load_dataset(self.spec.dataset, data),
            edits=self.spec.edits, negatives=1, order=self.spec.select, seed=self.spec.seed,
        )  # fmt: skip
        size = self.spec.batch_size
        self.batches = [selection.cases[i * size : (i + 1) * size] for i in range(self.count)]
        parts = [batch[::EVERY] for batch in self.batches]
        self._asked = [
            (row, Query(row["prompt"], case.request.target_new, case.target_true))
            for row, case in prompt_rows(parts, _prompts)
        ]

    @property
    def prompts(self) -> list[str]:
        """Those that are asked, in the order of ``outcomes``."""
        return [row["prompt"] for row, _ in self._asked]

    def outcomes(self, way: Way) -> list[Row]:
        """Every prompt under weights merged in some way, as rows of ``cases.jsonl.gz``."""

        def ask() -> list[Row]:
            answers = score(self._loaded.model, self._loaded.tokenizer, [query for _, query in self._asked])
            return [
                {**row, **answer_fields(answer)}
                for (row, _), answer in zip(self._asked, answers, strict=True)
            ]

        return self._kept("outcomes", way, [EVERY, NEIGHBORS], ask)

    def abilities(self, way: Way, suite: Suite) -> list[Row]:
        """The same of every record of the general tasks."""

        def ask() -> list[Row]:
            loaded = self._loaded
            changing = list(self._replay.base)
            return list(Evaluator(suite, loaded.model, loaded.tokenizer, changing=changing).rows())

        return self._kept("tasks", way, [suite.digest], ask)

    def _kept(self, kind: str, way: Way, asked: Sequence[Any], ask: Callable[[], list[Row]]) -> list[Row]:
        """What was asked of some weights, asked now if it is not on disk; ask: of the model as it is."""
        config = None if way.config is None else asdict(way.config)
        said = json.dumps([self.digest, *asked, way.merger, config])
        path = self.work / kind / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.jsonl.gz"
        if path.is_file():
            return list(read_lines(path))
        model = self._loaded.model
        cast = {name: weight.to(model.dtype) for name, weight in self._merged(way).items()}
        with weights_in_place(model, cast):
            rows = ask()
        write_lines_gz(path, rows)
        return rows

    @cached_property
    def _loaded(self) -> Any:
        """The model, its linear layers packed as in a run."""
        spec = self.spec
        loaded = load_model(
            spec.model, find_model(spec.model), dtype=getattr(torch, spec.dtype), device=spec.device
        )
        names = edited_parameters(spec, loaded.model)
        ready_to_edit(loaded.model, names)
        return loaded

    @cached_property
    def _replay(self) -> Replay:
        """The changes, on the unedited weights."""
        model = self._loaded.model
        names = edited_parameters(self.spec, model)
        base = {name: model.get_parameter(name).detach().clone() for name in names}
        return Replay(folder=self.folder, spec=self.spec, base=base, device=device_of(model))

    def _merged(self, way: Way) -> dict[str, Tensor]:
        """The weights after the last batch."""
        weights = dict(self._replay.base)
        if way.merger == UNEDITED:
            return weights
        merger = way.build()
        chain = None if merger is None else MergeChain(merger, weights)
        keyed = merger is not None and merger.needs_keys
        for batch in range(1, self.count + 1):
            delta = self._replay.delta(self.editor, batch)
            if chain is None:
                weights = added(weights, delta)
            else:
                weights = chain.step(delta, self._keys(batch) if keyed else None)
        return weights

    def _keys(self, batch: int) -> dict[str, Keys]:
        """A batch's keys; those of all batches are taken if ``work`` has none of it."""
        path = self._keys_path(batch)
        if not path.is_file():
            self._take_keys()
        return read_keys(path, self._replay.device)

    def _keys_path(self, batch: int) -> Path:
        return keys_path(self.work / self.digest, self.editor, batch)

    def _take_keys(self) -> None:
        loaded, editor = self._loaded, self.spec.editor(self.editor)
        with weights_in_place(loaded.model, self._replay.base):
            statistics = statistics_of(
                self.spec, loaded, editor.config.layers, progress=lambda done, total: None
            )
        solver = Solver(statistics.covariance, self._replay.device)
        weights = dict(self._replay.base)
        for number, cases in enumerate(self.batches, start=1):
            weights = added(weights, self._replay.delta(self.editor, number))
            path = self._keys_path(number)
            if not path.is_file():
                with weights_in_place(loaded.model, weights):
                    write_keys(
                        path, loaded, editor, [case.request for case in cases], solver,
                        state=state_path(self.folder, self.editor),
                    )  # fmt: skip


def _prompts(case: EditCase) -> dict[str, tuple[str, ...]]:
    return {kind: texts[:NEIGHBORS] if kind == "neighborhood" else texts
            for kind, texts in case.prompts.items()}  # fmt: skip
