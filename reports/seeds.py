"""Runs that differ in nothing but the seed, read as one: means over seeds instead of scores over cases."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from reports.load import Run
from reports.names import name_of
from reports.record import GRID, Record, Score
from reports.rows import SETTINGS, Row, labels_of, rows_of

SCOPE = (
    *GRID, "editors", "cells", "settings", "evaluate", "capability", "capability_digest", "generation",
    "generation_prompts", "references", "references_digest",
)  # fmt: skip
"""Fields of a spec that say what else was run or measured, and change no figure of one editor."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """One run, or several of one spec but for the seed."""

    runs: tuple[Run, ...]  # in the order of their seeds
    rows: tuple[Row, ...]  # of one run as they are; of several the means over seeds

    @property
    def name(self) -> str:
        return ", ".join(run.name for run in self.runs)

    @property
    def model(self) -> str:
        return self.runs[0].records[0].model

    @property
    def dataset(self) -> str:
        return self.runs[0].records[0].dataset

    @property
    def batch_size(self) -> int | None:
        size = self.runs[0].spec.get("batch_size")
        return size if isinstance(size, int) else None

    @property
    def edits(self) -> int:
        return self.runs[0].edits

    @property
    def seeds(self) -> tuple[int | None, ...]:
        return tuple(run.records[0].seed for run in self.runs)

    @property
    def select(self) -> str | None:
        select = self.runs[0].spec.get("select")
        return select if isinstance(select, str) else None

    @property
    def setting(self) -> tuple[object, ...]:
        """What runs must share to stand in one table."""
        digest = self.runs[0].spec.get("data_digest")
        return (self.model, self.dataset, digest, self.batch_size, self.edits, self.select, self.seeds)

    @property
    def leading(self) -> dict[str, Any]:
        """The first of the spec's mergers, pruning ratios, routers and top-k, by field."""
        return {name: values[0] for name in GRID if (values := self._listed(name))}

    @property
    def several(self) -> list[str]:
        """Those of these fields of which the spec has several values."""
        return [name for name in GRID if len(self._listed(name)) > 1]

    def experiment(self, editor: str) -> str:
        """All that an editor's figures depend on; equal where two runs measured the same thing."""
        spec = {name: value for name, value in self.runs[0].spec.items() if name not in SCOPE}
        settings = self.runs[0].spec.get("settings")
        names = (editor, *self._listed("merger"), *self._listed("router"))
        own = {name: settings.get(name) for name in names} if isinstance(settings, dict) else None
        return json.dumps([self.setting, spec, self.leading, own], sort_keys=True)

    def _listed(self, name: str) -> list[Any]:
        values = self.runs[0].spec.get(name)
        return values if isinstance(values, list) else []

    def notes(self) -> list[str]:
        """What a reader must know of the means."""
        if len(self.runs) == 1:
            return []
        listed = ", ".join(map(str, self.seeds))
        records = "the same records" if self.select == "first" else "records drawn by each"
        notes = [f"{self.name}: mean over {len(self.runs)} seeds ({listed}) on {records}."]
        counts = {f"{name_of(row.editor)} {row.label}": len(_final(self._members(row))) for row in self.rows}
        fewer = [f"{name.strip()} {count}" for name, count in counts.items() if 0 < count < len(self.runs)]
        return [*notes, f"Scored under fewer seeds: {', '.join(fewer)}."] if fewer else notes

    def _members(self, row: Row) -> list[Row]:
        return [other for run in self.runs for other in rows_of(run) if _key(other) == _key(row)]


def pools_of(runs: Iterable[Run], *, linked: Container[str] = ()) -> list[Pool]:
    """The runs, those of one spec but for the seed together, in the order of the first of each.

    linked: ids of the runs whose cases a page shows.
    """
    pools: list[list[Run]] = []
    for run in runs:
        fitting = (pool for pool in pools if _one_study(pool, run))
        pool = next(fitting, None)
        if pool is None:
            pools.append([run])
        else:
            pool.append(run)
            pool.sort(key=lambda member: member.records[0].seed or 0)
    return [Pool(runs=tuple(pool), rows=_pooled(pool, linked)) for pool in pools]


def seed_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean by Student's t; none of a single value."""
    if len(values) < 2:
        return None, None
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def interval_over(pools: Sequence[Pool]) -> str:
    """What the intervals of these pools are over, for a table's note."""
    counts = {len(pool.runs) for pool in pools}
    if counts == {1}:
        return "over cases"
    if len(counts) == 1:
        return f"over {counts.pop()} seeds (Student's t)"
    return "over seeds (Student's t) where there are several, else over cases"


def _one_study(pool: Sequence[Run], run: Run) -> bool:
    """Whether a run has the pool's spec and a seed of its own."""
    seeds = {member.records[0].seed for member in pool}
    seed = run.records[0].seed
    return bool(run.spec) and seed is not None and seed not in seeds and _study(pool[0]) == _study(run)


def _study(run: Run) -> str:
    """All that a run's figures depend on but the seed."""
    spec = {name: value for name, value in run.spec.items() if name != "seed"}
    first = run.records[0]
    return json.dumps([spec, first.model, first.dataset, run.provenance.get("model")], sort_keys=True)


def _key(row: Row) -> tuple[Any, ...]:
    return (row.editor, row.cell, *(getattr(row, name) for name in SETTINGS))


def _pooled(runs: Sequence[Run], linked: Container[str]) -> tuple[Row, ...]:
    if len(runs) == 1:
        run_id = runs[0].records[0].run_id
        source = run_id if run_id in linked else ""
        return tuple(replace(row, source=source) for row in rows_of(runs[0]))
    members: dict[tuple[Any, ...], list[Row]] = {}
    for run in runs:
        for row in rows_of(run):
            members.setdefault(_key(row), []).append(row)
    rows = [replace(found[0], records=tuple(_mean_records(found))) for found in members.values()]
    return tuple(replace(row, label=label) for row, label in zip(rows, labels_of(rows), strict=True))


def _mean_records(rows: Sequence[Row]) -> Iterator[Record]:
    """One record a slice, as it is at the end."""
    for slice_ in dict.fromkeys(record.slice for row in rows for record in row.records):
        records = _final(rows, slice_)
        if not records:
            yield next(r for row in rows if (r := row.at(slice_)) is not None)
            continue
        metrics = dict.fromkeys(score.metric for record in records for score in record.scores)
        scores = (
            _mean_score([score for record in records if (score := record.score(metric)) is not None])
            for metric in metrics
        )
        yield replace(records[0], run_id="", seed=None, scores=tuple(scores))


def _final(rows: Sequence[Row], slice_: str = "overall") -> list[Record]:
    """Of each seed the final record of a slice, without errors and runs that have not come as far."""
    found = [record for other in rows if (record := other.at(slice_)) is not None and record.error is None]
    furthest = max((record.edits_applied for record in found), default=0)
    return [record for record in found if record.edits_applied == furthest]


def _mean_score(scores: Sequence[Score]) -> Score:
    low, high = seed_interval([score.value for score in scores])
    differences = [score.difference for score in scores if score.difference is not None]
    difference = difference_low = difference_high = None
    if len(differences) == len(scores):
        difference = fmean(differences)
        difference_low, difference_high = seed_interval(differences)
    return replace(
        scores[0],
        value=fmean(score.value for score in scores),
        low=low,
        high=high,
        n=sum(score.n for score in scores),
        difference=difference,
        difference_low=difference_low,
        difference_high=difference_high,
    )
