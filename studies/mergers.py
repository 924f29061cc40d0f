"""Mergers of finished edits, scored on a fixed part of their records and compared in pairs.

What a run folder holds of an editor (its changes, batch by batch) is merged in any way without editing again.
Every third record is scored, with its rewrite, its paraphrases and three of its neighbours.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor

from editors.api import EditRequest
from editors.sites import device_of, sites_for
from harness import onednn
from harness.data import EditCase, load_dataset, local_copy, prompt_rows, select
from harness.deltas import state_path
from harness.keys import Solver, contexts_of, keyed_layers, keys_path, read_keys, write_keys
from harness.metrics import harmonic_mean, resampling_counts, tabulate_cell
from harness.models import edit_in_float32, find_model, load_model, weights_in_place
from harness.paths import read_lines, write_lines_gz
from harness.replay import Replay, added, edited_parameters
from harness.run import answer_fields, run_grid, statistics_of
from harness.scoring import Query, score
from harness.spec import CELLS, RunSpec, has_ratio, resolve
from merging import MERGERS, Keys, MergeChain, Merger
from reports.names import weights_name
from studies.records import EDITS

EDITORS = ("memit", "alphaedit")
CHOSEN: dict[str, dict[str, Any]] = {"shrink": {"scale": 0.8}}  # on the choosing half; refit: its defaults
REPORTED = ("self-aware", "refit", "shrink", "ema", "ties", "dare", "random", "low-rank", "energy")
ROUTERS = ("topk", "subject&relation", "calibrated")
TRIED = (  # on the choosing half
    "self-aware", "shrink:scale=0.7", "shrink:scale=0.8", "shrink:scale=0.85", "shrink:scale=0.9", "refit",
    "refit:scale=0.9", "refit:ridge=500", "refit:ridge=8000", "refit:anchor=base,ridge=500",
)  # fmt: skip
BATCHES, RATIO = 10, 0.85
PARAGRAPHS, TOKENS = ("wiki_paragraphs*.jsonl",), 120_000  # of the covariance
EVERY, NEIGHBORS = 3, 3  # of a batch's records, and of a record's neighbours, those that are scored
BASELINE = "none"  # in place of a merger: the edited weights
Array = NDArray[np.float64]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to merge: a merger with the fields of its config, or the baseline."""

    merger: str
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Way":
        """From ``NAME`` or ``NAME:FIELD=VALUE,FIELD=VALUE``."""
        name, _, fields = text.partition(":")
        if name not in (BASELINE, *MERGERS):
            raise ValueError(f"unknown merger {name!r}; known: {', '.join((BASELINE, *MERGERS))}")
        pairs = (field.partition("=") for field in fields.split(",") if field)
        return cls(name, {field: yaml.safe_load(value) for field, _, value in pairs})

    def __str__(self) -> str:
        fields = ",".join(f"{name}={value}" for name, value in sorted(self.settings.items()))
        return f"{self.merger}:{fields}" if fields else self.merger


class Edited:
    """An editor's changes in a run folder, on the model they were made on; results are kept in ``work``."""

    def __init__(
        self, folder: Path, editor: str, work: Path, *, batches: int | None = None, data: str | None = None
    ) -> None:
        """batches: only the first so many (of an unfinished run); all by default."""
        info = json.loads((folder / "run.json").read_text())
        self.spec = RunSpec.from_json(info["spec"])
        self.folder, self.editor, self.work = folder, editor, work
        self.run_id: str = info["run_id"]
        self.count = batches or self.spec.num_batches
        selection, _ = select(
            load_dataset(self.spec.dataset, data),
            edits=self.spec.edits, negatives=1, order=self.spec.select, seed=self.spec.seed,
        )  # fmt: skip
        size = self.spec.batch_size
        self.batches = [selection.cases[i * size : (i + 1) * size] for i in range(self.count)]

    @cached_property
    def loaded(self) -> Any:
        """The model, its linear layers packed as in a run."""
        spec = self.spec
        loaded = load_model(
            spec.model, find_model(spec.model), dtype=getattr(torch, spec.dtype), device=spec.device
        )
        names = edited_parameters(spec, loaded.model)
        edit_in_float32(loaded.model, names)
        if onednn.available():
            onednn.pack_linears(loaded.model, leave=set(names))
        return loaded

    @cached_property
    def replay(self) -> Replay:
        """The changes, on the unedited weights."""
        model = self.loaded.model
        names = edited_parameters(self.spec, model)
        base = {name: model.get_parameter(name).detach().clone() for name in names}
        return Replay(folder=self.folder, spec=self.spec, base=base, device=device_of(model))

    def keys(self, batch: int) -> dict[str, Keys]:
        """A batch's keys; those of all batches are taken where the run has none and neither has ``work``."""
        for place in (self.folder, self.work / self.run_id):
            path = keys_path(place, self.editor, batch)
            if path.is_file():
                return read_keys(path, self.replay.device)
        self._take_keys()
        return read_keys(path, self.replay.device)

    def _take_keys(self) -> None:
        loaded, config = self.loaded, self.spec.editor(self.editor).config
        statistics = statistics_of(self.spec, loaded, config.layers, progress=lambda done, total: None)
        solver = Solver(statistics.covariance, self.replay.device)
        contexts = contexts_of(state_path(self.folder, self.editor))
        layers = keyed_layers(list(self.replay.base), sites_for(loaded.model), config.layers)
        weights = dict(self.replay.base)
        for number, cases in enumerate(self.batches, start=1):
            weights = added(weights, self.replay.delta(self.editor, number))
            path = keys_path(self.work / self.run_id, self.editor, number)
            if path.is_file():
                continue
            requests: list[EditRequest] = [case.request for case in cases]
            with weights_in_place(loaded.model, weights):
                write_keys(path, loaded.model, loaded.tokenizer, requests, contexts, layers, solver)

    def merged(self, way: Way) -> dict[str, Tensor]:
        """The weights after the last batch."""
        weights = dict(self.replay.base)
        chain, keyed = None, False
        if way.merger != BASELINE:
            config, kind = MERGERS[way.merger]
            merger: Merger = kind(config(**way.settings))
            chain, keyed = MergeChain(merger, weights), merger.needs_keys
        for batch in range(1, self.count + 1):
            delta = self.replay.delta(self.editor, batch)
            if chain is None:
                weights = added(weights, delta)
            else:
                weights = chain.step(delta, self.keys(batch) if keyed else None)
        return weights


def score_merger(edited: Edited, way: Way) -> list[Row]:
    """Every scored prompt under weights merged in some way, as rows of ``cases.jsonl.gz``; kept on disk."""
    said = json.dumps([edited.run_id, edited.editor, edited.count, EVERY, NEIGHBORS, str(way)])
    path = edited.work / "outcomes" / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.jsonl.gz"
    if path.is_file():
        return list(read_lines(path))
    parts = [batch[::EVERY] for batch in edited.batches]
    found = [(row, Query(row["prompt"], case.request.target_new, case.target_true))
             for row, case in prompt_rows(parts, _prompts)]  # fmt: skip
    loaded = edited.loaded
    cast = {name: weight.to(loaded.model.dtype) for name, weight in edited.merged(way).items()}
    with weights_in_place(loaded.model, cast):
        answers = score(loaded.model, loaded.tokenizer, [query for _, query in found])
    rows: list[Row] = [
        {**row, **answer_fields(answer)} for (row, _), answer in zip(found, answers, strict=True)
    ]
    write_lines_gz(path, rows)
    return rows


def _prompts(case: EditCase) -> dict[str, tuple[str, ...]]:
    return {kind: texts[:NEIGHBORS] if kind == "neighborhood" else texts
            for kind, texts in case.prompts.items()}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Success of every scored edit of one or several runs of the same records."""

    record: NDArray[np.int64]  # (edits,), which record; a run's order of them does not matter
    batch: NDArray[np.int64]  # (edits,), from 1
    success: Array  # (edits, 3), as harness.metrics.Table has it

    @classmethod
    def of(cls, runs: Sequence[Sequence[Row]]) -> "Outcomes":
        """runs: for each its rows under one weight set, of ``score_merger`` or ``cases.jsonl.gz``."""
        records = {
            case_id: i for i, case_id in enumerate(dict.fromkeys(r["case_id"] for rows in runs for r in rows))
        }
        edits = [dict.fromkeys((row["case_id"], row["batch"]) for row in rows) for rows in runs]
        return cls(
            record=np.array([records[case_id] for some in edits for case_id, _ in some]),
            batch=np.array([batch for some in edits for _, batch in some]),
            success=np.concatenate([tabulate_cell(rows).success for rows in runs]),
        )

    def rates(self, counts: Array, batch: int | None = None) -> Array:
        """(resamples, 4) efficacy, generalization, locality and Score, of all or of one batch's edits.

        counts: (resamples, records), how often each record is drawn; all its edits are drawn together.
        """
        some = slice(None) if batch is None else self.batch == batch
        weights = counts[:, self.record[some]]
        rates = weights @ self.success[some] / weights.sum(axis=1, keepdims=True)
        return np.column_stack([rates, harmonic_mean(rates)])


@dataclass(frozen=True)
class Value:
    """A figure in percent, its difference to another way to merge, and that one's 95 % interval."""

    value: float
    difference: float
    low: float
    high: float

    @property
    def change(self) -> str:
        return f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.change})"


COLUMNS = ("efficacy", "generalization", "locality", "Score")


def compare(
    outcomes: Outcomes, other: Outcomes, *, batch: int | None = None, seed: int = 0
) -> dict[str, Value]:
    """One way to merge beside another on the same edits: paired, records resampled, orders pooled."""
    records = int(outcomes.record.max()) + 1
    once = np.ones((1, records))
    drawn = resampling_counts(records, seed)
    values = outcomes.rates(once, batch)[0]
    differences = values - other.rates(once, batch)[0]
    spread = outcomes.rates(drawn, batch) - other.rates(drawn, batch)
    low, high = np.nanquantile(spread, (0.025, 0.975), axis=0)
    return {
        name: Value(*(float(100 * figure[i]) for figure in (values, differences, low, high)))
        for i, name in enumerate(COLUMNS)
    }


def table(edited: Sequence[Edited], ways: Sequence[Way], against: Way) -> str:
    """Every way to merge beside one of them, over one or several runs of the same records."""
    base = Outcomes.of([score_merger(run, against) for run in edited])
    rows = []
    for way in ways:
        own = Outcomes.of([score_merger(run, way) for run in edited])
        whole = compare(own, base)
        batches = {b: compare(own, base, batch=b)["Score"] for b in np.unique(own.batch).tolist()}
        picked = [batches.get(b) for b in (1, 5, 10)]
        changes = " ".join(f"{value.difference:+.1f}" for value in batches.values())
        rows.append([
            str(way), *(f"{whole[name].value:.1f}" for name in COLUMNS[:3]), str(whole["Score"]),
            *("" if value is None else f"{value.value:.1f}" for value in picked), changes,
        ])  # fmt: skip
    headers = [
        "merger",
        "eff",
        "gen",
        "loc",
        f"Score (to {against})",
        "@1",
        "@5",
        "@10",
        "Score by batch, change",
    ]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def study(halves: Mapping[str, Path], data: str, out: Path, *, device: str) -> dict[str, str]:
    """The tables of mergers by name; runs that ``out`` lacks are made, or gone on with.

    halves: name -> records, "choose" and the orders of those that are reported.
    """
    runs = {name: _run(name, path, data, out / "runs" / name, device) for name, path in halves.items()}
    orders = [run for name, run in runs.items() if name != "choose"]
    parts = {}
    for editor in EDITORS:
        chosen_on = [Edited(runs["choose"], editor, out / "work", data=data)]
        ways = [Way.parse(text) for text in (BASELINE, *TRIED)]
        parts[f"mergers chosen {editor}"] = table(chosen_on, ways, Way(BASELINE, {}))
        parts[f"mergers {editor}"] = _report(orders, editor)
    return parts


def _run(name: str, records: Path, data: str, out: Path, device: str) -> Path:
    """A run folder of one half in one order; of the choosing half the edited weights alone are scored."""
    given: dict[str, Any] = {
        "dataset": str(records), "select": "first", "editors": EDITORS, "device": device, "seed": 0,
        "stats": str(local_copy(data, PARAGRAPHS)), "limit_stats": TOKENS, "cells": ("baseline",),
        "batch_size": EDITS // BATCHES, "num_batches": BATCHES,
    }  # fmt: skip
    overrides = []
    if name != "choose":
        order = int(name.rpartition("-")[2])
        given |= {"seed": order, "cells": CELLS, "merger": REPORTED, "router": ROUTERS}
        given["capability"] = ("none",) if order else ("six",)
        overrides = [f"{m}.{field}={value}" for m, own in CHOSEN.items() for field, value in own.items()]
    if run_grid(resolve(given, overrides), out=out, data=data):
        raise ValueError(f"{out}: cells of the run failed; its records say which, and why")
    return out


def _report(orders: Sequence[Path], editor: str) -> str:
    """Every merger beside the edited weights and beside the shrunk ones, the orders pooled."""
    cases = [list(read_lines(run / "cases.jsonl.gz")) for run in orders]

    def outcomes(weights: str) -> Outcomes:
        return Outcomes.of([[row for row in rows if row["weights"] == weights] for rows in cases])

    names = {"baseline": editor} | {
        merger: weights_name(editor, merger, RATIO if has_ratio(merger) else None, REPORTED, (RATIO,))
        for merger in REPORTED
    }
    own = {name: outcomes(weights) for name, weights in names.items()}
    rows = []
    for name, found in own.items():
        whole, beside = compare(found, own["baseline"]), compare(found, own["shrink"])
        batches = [compare(found, own["baseline"], batch=b + 1)["Score"].difference for b in range(BATCHES)]
        rows.append([
            name, *(f"{whole[column].value:.1f}" for column in COLUMNS[:3]), str(whole["Score"]),
            beside["Score"].change, f"{min(batches):+.1f}",
        ])  # fmt: skip
    headers = ("merger", *COLUMNS[:3], "Score (to baseline)", "to shrink", "worst batch")
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of some ways to merge what one editor changed in some run folders."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, of the same records")
    parser.add_argument("--editor", required=True)
    parser.add_argument("--work", required=True, type=Path, help="folder for keys and outcomes")
    parser.add_argument("--ways", nargs="+", type=Way.parse, required=True, help="NAME[:FIELD=VALUE,...]")
    parser.add_argument("--against", type=Way.parse, default=Way(BASELINE, {}))
    parser.add_argument("--batches", type=int, help="only the first so many")
    args = parser.parse_args(argv)
    runs = [Edited(folder, args.editor, args.work, batches=args.batches) for folder in args.folders]
    sys.stdout.write(table(runs, args.ways, args.against) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
