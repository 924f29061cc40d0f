"""The records of a run, grouped into the rows that tables show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reports.load import Run
from reports.record import CELLS, Record

SETTINGS = {
    "merger": "merger", "pruning_ratio": "r", "router": "router", "top_k": "k", "encoder": "encoder",
    "chain": "chain",
}  # fmt: skip
"""Field that tells rows of one cell apart -> its name in a label."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of one editor under one setting, with its records in the order written."""

    editor: str
    cell: str
    merger: str | None = None
    pruning_ratio: float | None = None
    router: str | None = None
    top_k: int | None = None
    encoder: str | None = None
    chain: str | None = None
    label: str = ""  # the cell, and what tells it from its siblings
    records: tuple[Record, ...] = ()
    source: str = ""  # id of the run whose cases a page shows; empty where it shows none

    @property
    def is_unedited(self) -> bool:
        return self.cell == "unedited"

    @property
    def is_merged(self) -> bool:
        return "MM" in self.cell

    @property
    def is_routed(self) -> bool:
        return "R" in self.cell

    def at(self, slice_: str) -> Record | None:
        """The final record of a slice: its error if that came last, else the scores after most edits.

        A batch that was never reached because the whole cell failed has the cell's error.
        """
        written = [record for record in self.records if record.slice == slice_]
        if not written:
            overall = self.at("overall") if slice_ != "overall" else None
            return overall if overall is not None and overall.error is not None else None
        if written[-1].error is not None:
            return written[-1]
        return max((r for r in written if r.error is None), key=lambda record: record.edits_applied)

    def after(self, slice_: str, edits: int) -> Record | None:
        """The record of a slice after so many edits; None where it was not scored then, or failed."""
        found = [r for r in self.records if (r.slice, r.edits_applied) == (slice_, edits) and r.error is None]
        return found[-1] if found else None

    def errors(self) -> Iterator[str]:
        """The distinct error texts that stand, in the order written."""
        slices = dict.fromkeys(record.slice for record in self.records)
        final = (self.at(slice_) for slice_ in slices)
        yield from dict.fromkeys(
            record.error for record in final if record is not None and record.error is not None
        )


def rows_of(run: Run) -> tuple[Row, ...]:
    """Unedited first, then every editor's cells; what the spec announces but nobody scored is a row too."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in run.records:
        key = (record.editor, record.cell, *(getattr(record, name) for name in SETTINGS))
        groups.setdefault(key, []).append(record)
    rows = [
        Row(editor=editor, cell=cell, records=tuple(records), **dict(zip(SETTINGS, values, strict=True)))
        for (editor, cell, *values), records in groups.items()
    ]
    known = {(row.editor, row.cell) for row in rows}
    rows += [Row(editor=e, cell=c) for e, c in _announced(run) if (e, c) not in known]
    editors = _in_order(_spec_list(run, "editors"), (row.editor for row in rows))
    cells = _in_order(("unedited", *CELLS), (row.cell for row in rows))
    rows.sort(key=lambda row: (not row.is_unedited, editors.index(row.editor), cells.index(row.cell)))
    return tuple(replace(row, label=label) for row, label in zip(rows, labels_of(rows), strict=True))


def labels_of(rows: Sequence[Row]) -> list[str]:
    """Each row's cell, with the settings of which these rows hold several values."""
    seen = {name: {getattr(row, name) for row in rows} - {None} for name in SETTINGS}
    shown = [name for name, values in seen.items() if len(values) > 1]
    labels = []
    for row in rows:
        parts = [f"{SETTINGS[name]}={getattr(row, name)}" for name in shown if getattr(row, name) is not None]
        labels.append(f"{row.cell} ({', '.join(parts)})" if parts else row.cell)
    return labels


def metrics_of(rows: Iterable[Row]) -> set[str]:
    """The metrics that some record has."""
    return {score.metric for row in rows for record in row.records for score in record.scores}


def baseline_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The baseline row of the same editor, of the same chain where there are several."""
    found = [other for other in rows if other.editor == row.editor and other.cell == "baseline"]
    return next((other for other in found if other.chain == row.chain), found[0] if found else None)


def _announced(run: Run) -> Iterator[tuple[str, str]]:
    for editor in _spec_list(run, "editors"):
        for cell in _spec_list(run, "cells"):
            yield editor, cell


def _spec_list(run: Run, name: str) -> tuple[str, ...]:
    value = run.spec.get(name)
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _in_order(first: Iterable[str], rest: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*first, *rest)))
