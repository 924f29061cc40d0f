"""Cells and tables before they are rendered, and how a score is written in a cell.

What is missing is a dash, never zero; what failed says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from reports.drilldown import cases_link
from reports.names import UNITS, name_of
from reports.record import GRID, Record, Score
from reports.rows import Row, baseline_of

MISSING = "–"
FAILED = "failed"
NOT_APPLICABLE = "n/a"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell, its parts apart so that each format can set them its own way."""

    text: str
    interval: str = ""  # "80.2, 87.5"
    difference: str = ""  # "+3.2"
    mark: Literal["", "best", "second"] = ""
    link: str = ""  # where a page leads from the value


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table before it is rendered."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()  # rows, from 0, before which a rule or a gap belongs


def metric_cell(
    row: Row, slice_: str, metric: str, rows: Sequence[Row], digits: int, *, interval: bool
) -> Cell:
    """A metric on a slice, with the difference to the baseline cell among the rows."""
    record = row.at(slice_)
    if record is None or record.error is not None:
        return without_scores(record)
    score = record.score(metric)
    cell = linked(value_cell(score, digits), row, slice_, metric)
    difference = _difference(score, row, slice_, metric, rows)
    if difference is not None:
        cell = replace(cell, difference=signed(difference, digits, metric))
    return cell if interval else replace(cell, interval="")


def without_scores(record: Record | None) -> Cell:
    """The cell of a record that is absent or has an error."""
    if record is None or record.error is None:
        return Cell(text=MISSING)
    return Cell(text=NOT_APPLICABLE if is_not_applicable(record.error) else FAILED)


def is_not_applicable(error: str) -> bool:
    """Whether an error says that the cell does not apply to the editor."""
    return "not applicable" in error.lower()


def value_cell(score: Score | None, digits: int) -> Cell:
    """A score with its interval."""
    if score is None:
        return Cell(text=MISSING)
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f"{scaled(score.low, digits, score.metric)}, {scaled(score.high, digits, score.metric)}"
    return Cell(text=scaled(score.value, digits, score.metric), interval=interval)


def difference_cell(score: Score | None, digits: int) -> Cell:
    """A score's measured difference to the baseline cell, with its interval."""
    if score is None or score.difference is None:
        return Cell(text=MISSING)
    interval = ""
    if score.difference_low is not None and score.difference_high is not None:
        ends = (score.difference_low, score.difference_high)
        interval = ", ".join(signed(end, digits, score.metric) for end in ends)
    return Cell(text=signed(score.difference, digits, score.metric), interval=interval)


def number_cell(value: object, digits: int, *, scale: float = 1) -> Cell:
    """A bare number, or a dash where there is none."""
    return Cell(text=f"{value * scale:.{digits}f}" if isinstance(value, int | float) else MISSING)


def linked(cell: Cell, row: Row, slice_: str, metric: str) -> Cell:
    """The cell with a link to the cases that its value is made of, where a page shows them."""
    if not row.source or cell.text == MISSING:
        return cell
    href = cases_link(
        run_id=row.source,
        editor=row.editor,
        cell=row.cell,
        slice=slice_,
        metric=metric,
        **{name: getattr(row, name) for name in GRID},
    )
    return replace(cell, link=href)


def scaled(value: float, digits: int, metric: str = "") -> str:
    """A value in its metric's unit; by default a fraction as a percentage."""
    scale, more = UNITS.get(metric, (100.0, 0))
    return f"{_rounded(value * scale, digits + more):.{digits + more}f}"


def signed(value: float, digits: int, metric: str = "") -> str:
    """A difference in its metric's unit; by default points."""
    scale, more = UNITS.get(metric, (100.0, 0))
    return f"{_rounded(value * scale, digits + more):+.{digits + more}f}"


def mark(column: Sequence[Cell], eligible: Sequence[bool]) -> list[Cell]:
    """Mark the best and the second best of the eligible cells; those printed alike share a mark."""
    values = [_parsed(cell.text) if may else None for cell, may in zip(column, eligible, strict=True)]
    ranked = sorted({value for value in values if value is not None}, reverse=True)
    marks: dict[float | None, Literal["best", "second"]] = dict(zip(ranked, ("best", "second"), strict=False))
    return [replace(cell, mark=marks.get(value, "")) for cell, value in zip(column, values, strict=True)]


def labels(row: Row) -> tuple[Cell, Cell]:
    """The first two cells of a row: its editor and what tells it from the editor's others."""
    return Cell(text=name_of(row.editor)), Cell(text=row.label)


def groups(rows: Sequence[Row]) -> tuple[int, ...]:
    """Where another editor begins."""
    return tuple(i for i in range(1, len(rows)) if rows[i].editor != rows[i - 1].editor)


def reading_notes(lines: Iterable[Iterable[Cell]], *, interval: str = "over cases") -> tuple[str, ...]:
    """How to read what these cells show; interval: what theirs is over."""
    cells = [cell for line in lines for cell in line]
    notes = []
    if any(cell.interval for cell in cells):
        notes.append(f"Brackets: 95 % interval {interval}.")
    if any(cell.difference for cell in cells):
        notes.append("Parentheses: difference to the baseline cell of the same editor.")
    if any(cell.mark for cell in cells):
        notes.append("Bold: best of the column among edited rows; underlined: second best.")
    return (" ".join(notes),) if notes else ()


def _difference(score: Score | None, row: Row, slice_: str, metric: str, rows: Sequence[Row]) -> float | None:
    """The measured difference; in records without one, that of the two values shown."""
    if score is None or row.is_unedited or row.cell == "baseline":
        return None
    if score.difference is not None:
        return score.difference
    baseline = baseline_of(row, rows)
    record = baseline.at(slice_) if baseline is not None else None
    other = record.score(metric) if record is not None and record.error is None else None
    return score.value - other.value if other is not None else None


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # no minus sign before a zero
