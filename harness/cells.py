"""From scored prompts to records: every cell is read off the outcomes of two weight sets and the routes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.generation import Consistency, measured
from harness.grid import Cell
from harness.metrics import (
    FORCED_KINDS,
    KINDS,
    edit_scores,
    forced_scores,
    forced_shares,
    resampling_counts,
    route_scores,
    shown_rows,
    tabulate_cell,
    task_route_score,
    task_scores,
    text_scores,
)
from harness.route_probes import RouteProbe, probe_scores
from harness.spec import RunSpec
from reports.record import Record, Score

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RecordMaker:
    """What all records of a run share."""

    spec: RunSpec
    run_id: str
    model_digest: str
    data_digest: str
    knowedit: bool = False  # rows are of KnowEdit's prompts
    consistency: Consistency | None = None  # of generated texts; None: without reference texts

    def unedited(self, rows: Sequence[Row]) -> Iterator[Record]:
        """Records of the unedited model."""
        for part, index, started in self._slices(rows, self.spec.num_batches):
            yield self._record(None, part, self._scores([rows[i] for i in index]), started)

    def cell(
        self,
        cell: Cell,
        rows: Sequence[Row],
        *,
        point: int,
        unedited: Sequence[Row],
        baseline: Sequence[Row] | None,
        routes: Sequence[str] | None,
    ) -> Iterator[Record]:
        """Records of one cell after ``point`` batches: of their records pooled, then batch by batch.

        rows, unedited, baseline: the same prompts under the cell's, no and the baseline's edits (None: no
        differences); routes: of the same prompts (None: not routed).
        """
        for part, index, started in self._slices(rows, point):
            own = [rows[i] for i in index]
            chosen = None if routes is None else [routes[i] for i in index]
            base = None if baseline is None else [baseline[i] for i in index]
            scores = self._scores(own, [unedited[i] for i in index], chosen, base)
            yield self._record(cell, part, scores, started, point=point)

    def tasks(
        self,
        cell: Cell | None,
        rows: Sequence[Row],
        *,
        unedited: Sequence[Row] | None = None,
        routes: Sequence[str] | None = None,
    ) -> Iterator[Record]:
        """Records of one cell's general tasks, a slice each; cell None: of the unedited model.

        rows, unedited: the same records of all tasks under the cell's and no edits; routes: of them.
        """
        for task in dict.fromkeys(row["kind"] for row in rows):
            started = time.perf_counter()
            index = [i for i, row in enumerate(rows) if row["kind"] == task]
            own, before = [rows[i] for i in index], None
            if unedited is not None:
                before = [unedited[i] for i in index]
            if routes is None:
                scores = task_scores(own, before, self.spec.seed)
            else:
                assert before is not None, "a route chooses between two outcomes"
                chosen = [routes[i] for i in index]
                pairs = zip(own, before, chosen, strict=True)
                shown = [edited if route == "edited" else plain for edited, plain, route in pairs]
                scores = task_scores(shown, before, self.spec.seed)
                scores.append(task_route_score(chosen, self.spec.seed))
            yield self._record(cell, task, scores, started)

    def probes(self, cell: Cell, probes: Sequence[RouteProbe], sent: Sequence[bool]) -> Record:
        """The record of what a routed cell's router does with probes; sent: to the edited model."""
        started = time.perf_counter()
        return self._record(cell, "probes", probe_scores(probes, sent, self.spec.seed), started)

    def error(self, cell: Cell | None, text: str, part: str = "overall") -> Record:
        """The record of a slice that has no scores; cell None: of the unedited model."""
        return self._record(cell, part, [], time.perf_counter(), error=text)

    def _slices(self, rows: Sequence[Row], point: int) -> Iterator[tuple[str, list[int], float]]:
        """(slice, row numbers, start time), the pooled one first."""
        for number in range(point + 1):
            index = [i for i, row in enumerate(rows) if number in (0, row["batch"])]
            yield "overall" if number == 0 else f"batch:{number}", index, time.perf_counter()

    def _scores(
        self,
        rows: Sequence[Row],
        unedited: Sequence[Row] | None = None,
        routes: Sequence[str] | None = None,
        baseline: Sequence[Row] | None = None,
    ) -> list[Score]:
        """Scores of the rows of one slice, by the metrics of their schema."""
        seed = self.spec.seed
        if self.knowedit:
            base = None if baseline is None else forced_shares(baseline)
            scores = forced_scores(forced_shares(rows, unedited, routes), base, seed)
        else:
            table = tabulate_cell(rows, unedited, routes)
            before = None if baseline is None else tabulate_cell(baseline)
            counts = resampling_counts(len({row["case_id"] for row in rows}), seed)
            scores = edit_scores(table, before, counts)
        if self.spec.generation:
            texts = measured(shown_rows(rows, unedited, routes), self.consistency)
            base_texts = None if baseline is None else measured(baseline, self.consistency)
            scores += text_scores(texts, base_texts, seed)
        if routes is not None:
            scores += route_scores(rows, routes, seed, FORCED_KINDS if self.knowedit else tuple(KINDS))
        return scores

    def _record(
        self,
        cell: Cell | None,
        part: str,
        scores: Sequence[Score],
        started: float,
        *,
        point: int | None = None,
        error: str | None = None,
    ) -> Record:
        """point: batches in the weights; None: all."""
        spec = self.spec
        batches = spec.num_batches if point is None else point
        merge, route = (cell.merge, cell.route) if cell else (None, None)
        return Record(
            run_id=self.run_id,
            model=spec.model,
            dataset=spec.dataset,
            editor=cell.editor if cell else "none",
            cell=cell.name if cell else "unedited",
            chain=spec.chain if merge else None,
            merger=merge.merger if merge else None,
            pruning_ratio=merge.pruning_ratio if merge else None,
            router=route.router if route else None,
            top_k=route.top_k if route else None,
            encoder=spec.encoder if route else None,
            seed=spec.seed,
            edits_applied=batches * spec.batch_size if cell else 0,
            slice=part,
            scores=tuple(scores),
            seconds=time.perf_counter() - started,
            spec=self.run_id,
            provenance={"model": self.model_digest, "data": self.data_digest},
            error=error,
        )
