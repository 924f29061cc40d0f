"""From scored prompts to records: every cell is read off the outcomes of two weight sets and the routes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.grid import Cell
from harness.metrics import edit_scores, resampling_counts, route_scores, tabulate_cell
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

    def unedited(self, rows: Sequence[Row]) -> Iterator[Record]:
        """Records of the unedited model."""
        for part, index, started in self._slices(rows):
            scores = edit_scores(tabulate_cell([rows[i] for i in index]), None, self._counts(rows, index))
            yield self._record(None, part, scores, started)

    def cell(
        self,
        cell: Cell,
        rows: Sequence[Row],
        *,
        unedited: Sequence[Row],
        baseline: Sequence[Row] | None,
        routes: Sequence[str] | None,
    ) -> Iterator[Record]:
        """Records of one cell: pooled, then batch by batch.

        rows, unedited, baseline: the same prompts under the cell's, no and the baseline's edits (None: no
        differences); routes: of the same prompts (None: not routed).
        """
        for part, index, started in self._slices(rows):
            own = [rows[i] for i in index]
            chosen = None if routes is None else [routes[i] for i in index]
            table = tabulate_cell(own, [unedited[i] for i in index], chosen)
            base = None if baseline is None else tabulate_cell([baseline[i] for i in index])
            scores = edit_scores(table, base, self._counts(rows, index))
            if chosen is not None:
                scores += route_scores(own, chosen, self.spec.seed)
            yield self._record(cell, part, scores, started)

    def error(self, cell: Cell, text: str) -> Record:
        """The record of a cell that has no scores."""
        return self._record(cell, "overall", [], time.perf_counter(), error=text)

    def _slices(self, rows: Sequence[Row]) -> Iterator[tuple[str, list[int], float]]:
        """(slice, row numbers, start time), the pooled one first."""
        for number in range(self.spec.num_batches + 1):
            index = [i for i, row in enumerate(rows) if number in (0, row["batch"])]
            yield "overall" if number == 0 else f"batch:{number}", index, time.perf_counter()

    def _counts(self, rows: Sequence[Row], index: Sequence[int]) -> Any:
        return resampling_counts(len({rows[i]["case_id"] for i in index}), self.spec.seed)

    def _record(
        self, cell: Cell | None, part: str, scores: Sequence[Score], started: float, error: str | None = None
    ) -> Record:
        spec = self.spec
        ratio = cell.pruning_ratio if cell else None
        top_k = cell.top_k if cell else None
        return Record(
            run_id=self.run_id,
            model=spec.model,
            dataset=spec.dataset,
            editor=cell.editor if cell else "none",
            cell=cell.name if cell else "unedited",
            chain=None if ratio is None else spec.chain,
            pruning_ratio=ratio,
            top_k=top_k,
            encoder=None if top_k is None else spec.encoder,
            seed=spec.seed,
            edits_applied=spec.edits if cell else 0,
            slice=part,
            scores=tuple(scores),
            seconds=time.perf_counter() - started,
            spec=self.run_id,
            provenance={"model": self.model_digest, "data": self.data_digest},
            error=error,
        )
