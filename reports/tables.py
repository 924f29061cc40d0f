"""The tables of one run, made of its records. No metric is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from reports.cells import (
    FAILED,
    MISSING,
    Cell,
    Table,
    difference_cell,
    groups,
    labels,
    linked,
    mark,
    metric_cell,
    number_cell,
    reading_notes,
    signed,
    value_cell,
    without_scores,
)
from reports.load import Run
from reports.names import (
    COUNTERFACT_COLUMNS,
    COUNTERFACT_VIEWS,
    KNOWEDIT_ANY_COLUMNS,
    KNOWEDIT_COLUMNS,
    KNOWEDIT_ROUTING_COLUMNS,
    KNOWEDIT_VIEWS,
    OPTIONAL_COLUMNS,
    PAPER_ROUTER,
    ROUTING_COLUMNS,
    TASK_METRICS,
    TASK_NAMES,
    name_of,
)
from reports.notes import describe, error_notes, progress_notes, size_notes, text_of, warnings_of
from reports.record import Score
from reports.rows import Row, metrics_of, rows_of

if TYPE_CHECKING:
    from reports.figures import Figure


@dataclass(frozen=True, kw_only=True)
class Report:
    """One part of a document: all that is shown of one run, or of several together."""

    title: str
    facts: tuple[tuple[str, str], ...]  # (what, value)
    warnings: tuple[str, ...]
    tables: tuple[Table, ...]
    figures: tuple[Figure, ...] = ()
    folder: str = ""  # of its figures, in the folder of the document's
    cases: str = ""  # the cases behind the values, as part of a page


def build_report(run: Run, *, digits: int = 1) -> Report:
    """The short report of one run, as the terminal shows it when the run ends."""
    rows = rows_of(run)
    tables = (
        main_table(rows, digits=digits),
        *modules_tables(rows, digits=digits),
        *routing_tables(rows, digits=digits),
        *ability_tables(rows, digits=digits)[:1],
        *cost_tables(run),
    )
    return Report(title=run.name, facts=tuple(describe(run)), warnings=tuple(warnings_of(run)), tables=tables)


def run_tables(run: Run, rows: Sequence[Row], *, digits: int = 1) -> tuple[Table, ...]:
    """What a full report shows of one run beside the tables in the paper's layout."""
    return (
        main_table(rows, digits=digits),
        *differences_tables(rows, digits=digits),
        *views_tables(rows, digits=digits),
        *any_answer_tables(rows, digits=digits),
        *forgetting_tables(rows, digits=digits),
        *ability_tables(rows, digits=digits),
        *cost_tables(run),
    )


def main_table(rows: Sequence[Row], *, digits: int = 1) -> Table:
    """Unedited, then each editor's cells; a column per metric, the best and second best edited row marked."""
    columns = columns_of(rows)
    lines = [
        (*labels(row), *cells) for row, cells in zip(rows, marked_body(rows, columns, digits), strict=True)
    ]
    notes = (*reading_notes(lines), *size_notes(rows, columns), *progress_notes(rows), *error_notes(rows))
    return Table(
        title="Results in percent",
        headers=("Editor", "Cell", *columns.values()),
        rows=tuple(lines),
        notes=notes,
        groups=groups(rows),
    )


def marked_body(rows: Sequence[Row], columns: Iterable[str], digits: int) -> list[tuple[Cell, ...]]:
    """The final scores of the rows, the best and the second best edited row of each metric marked."""
    body = [
        [metric_cell(row, "overall", name, rows, digits, interval=True) for name in columns] for row in rows
    ]
    edited = [not row.is_unedited for row in rows]
    return list(zip(*(mark(column, edited) for column in zip(*body, strict=True)), strict=True))


def views_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """Other readings of the same answers, each to the right of the leading one; none where there are none."""
    present = metrics_of(rows)
    knowedit = "rewrite_acc" in present
    views = KNOWEDIT_VIEWS if knowedit else COUNTERFACT_VIEWS
    columns: list[tuple[str, str]] = []
    for name, title in columns_of(rows).items():
        others = [(name + suffix, view) for suffix, view in views.items() if name + suffix in present]
        columns += [(name, title), *others] if others else []
    if not columns:
        return []
    lines = tuple(
        (*labels(row), *(_plain_cell(row, "overall", name, digits) for name, _ in columns)) for row in rows
    )
    leading = "its share of tokens that are the most likely" if knowedit else "it is likelier than the other"
    notes = [
        f"Of the answer wanted, under the metric's name: {leading}.",
        "Exact: every token of it is the most likely one, so that greedy generation writes it.",
    ]
    if any(view == "overlap" for _, view in columns):
        notes.append("Overlap: the share of its tokens that are the most likely ones.")
    return [
        Table(
            title="Other views of the same answers, in percent",
            headers=("Editor", "Cell", *(title for _, title in columns)),
            rows=lines,
            notes=(" ".join(notes),),
            groups=groups(rows),
        )
    ]


def _plain_cell(row: Row, slice_: str, metric: str, digits: int) -> Cell:
    """A metric on a slice, the value alone."""
    return replace(metric_cell(row, slice_, metric, (), digits, interval=False), difference="")


def forgetting_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """What batches lose between their own edit and the last one; none where only the end was scored."""
    columns = {name: title for name, title in columns_of(rows).items() if name not in OPTIONAL_COLUMNS}
    edited = [row for row in rows if not row.is_unedited]
    points = sorted({r.edits_applied for row in edited for r in row.records if r.slice == "batch:1"})
    if len(points) < 2:
        return []
    lines = [(*labels(row), *(_forgotten(row, name, points, digits) for name in columns)) for row in edited]
    return [
        Table(
            title="Forgetting, in points",
            headers=("Editor", "Cell", *columns.values()),
            rows=tuple(lines),
            notes=(
                "What a batch scores right after it was edited less what it scores after the last batch, "
                "mean over the batches before the last; below zero: it gained. The scores after every batch "
                "are in the figure.",
            ),
            groups=groups(edited),
        )
    ]


def _forgotten(row: Row, metric: str, points: Sequence[int], digits: int) -> Cell:
    """points: edits applied after batch 1, 2 ... in order."""
    final = row.at("overall")
    if final is None or final.error is not None:
        return without_scores(final)
    losses = []
    for number, edits in enumerate(points[:-1], start=1):
        scores = [
            record.score(metric) if record is not None else None
            for record in (row.after(f"batch:{number}", applied) for applied in (edits, points[-1]))
        ]
        if scores[0] is None or scores[1] is None:
            return Cell(text=MISSING)
        losses.append(scores[0].value - scores[1].value)
    return Cell(text=signed(fmean(losses), digits, metric))


def any_answer_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """KnowEdit's portability where any given answer is right; none where that changes no figure."""
    columns = {name: title for name, title in KNOWEDIT_ANY_COLUMNS.items() if name in metrics_of(rows)}
    if not any(_aliases_matter(row, columns) for row in rows):
        return []
    lines = []
    for row in rows:
        cells = [metric_cell(row, "overall", name, rows, digits, interval=True) for name in columns]
        lines.append((*labels(row), *cells))
    return [
        Table(
            title="Portability with any of the given answers, in percent",
            headers=("Editor", "Cell", *columns.values()),
            rows=tuple(lines),
            notes=(
                "Of several answers to a prompt the one with the largest share counts; the table of results "
                "has the first.",
                *reading_notes(lines),
            ),
            groups=groups(rows),
        )
    ]


def _aliases_matter(row: Row, columns: Iterable[str]) -> bool:
    record = row.at("overall")
    if record is None:
        return False
    pairs = [(record.score(name), record.score(name.removesuffix("_any"))) for name in columns]
    return any(one is not None and other is not None and one.value != other.value for one, other in pairs)


def differences_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """The differences to the baseline cell with their paired intervals; none where none was measured."""
    columns = columns_of(rows)
    lines, shown = [], []
    for row in rows:
        record = row.at("overall")
        scores = [
            record.score(name) if record is not None and record.error is None else None for name in columns
        ]
        if any(score is not None and score.difference_low is not None for score in scores):
            cells = (difference_cell(score, digits) for score in scores)
            links = (linked(cell, row, "overall", name) for cell, name in zip(cells, columns, strict=True))
            lines.append((*labels(row), *links))
            shown.append(row)
    if not lines:
        return []
    return [
        Table(
            title="Differences to the baseline cell, in points",
            headers=("Editor", "Cell", *columns.values()),
            rows=tuple(lines),
            notes=("Brackets: 95 % interval, paired bootstrap over cases.",),
            groups=groups(shown),
        )
    ]


def modules_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """One table per editor: the leading metric, a row per batch and one overall, a column per cell."""
    editors = dict.fromkeys(row.editor for row in rows if not row.is_unedited)
    return [modules_table(editor, rows, digits=digits) for editor in editors]


def modules_table(editor: str, rows: Sequence[Row], *, digits: int = 1) -> Table:
    """The leading metric of one editor's cells, batch by batch."""
    metric, title = next(iter(columns_of(rows).items()))
    numbers = {
        int(r.slice.removeprefix("batch:"))
        for row in rows
        for r in row.records
        if r.slice.startswith("batch:")
    }
    slices = {f"batch:{k}": f"@{k}" for k in sorted(numbers)} | {"overall": "Overall"}
    cells = [row for row in rows if row.editor == editor]
    lines = [
        (Cell(text=name), *(metric_cell(row, slice_, metric, rows, digits, interval=False) for row in cells))
        for slice_, name in slices.items()
    ]
    failed = any(cell.text == FAILED for line in lines for cell in line)
    return Table(
        title=f"{name_of(editor)}: {title} per batch, in percent",
        headers=("Batch", *(row.label for row in cells)),
        rows=tuple(lines),
        notes=reading_notes(lines) + (("Errors are named below the table of results.",) if failed else ()),
        groups=(len(slices) - 1,) if len(slices) > 1 else (),
    )


def routing_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """The share of prompts sent to the edited model, per encoder and top-k; cells that agree share a row."""
    columns = KNOWEDIT_ROUTING_COLUMNS if "rewrite_acc" in metrics_of(rows) else ROUTING_COLUMNS
    found = list(routing_lines(rows, columns, digits))
    if not found:
        return []
    first = int(
        all(router == PAPER_ROUTER for (router, *_), *_ in found)
    )  # not named where it is the only one
    lines = [
        (*(Cell(text=text_of(value)) for value in setting[first:]), Cell(text=names), *cells)
        for setting, names, cells in found
    ]
    return [
        Table(
            title="Prompts that the router sends to the edited model, in percent",
            headers=(*("Router", "Encoder", "Top-k")[first:], "Cells", *columns.values()),
            rows=tuple(lines),
            notes=reading_notes(lines),
        )
    ]


def routing_lines(
    rows: Sequence[Row], columns: Iterable[str], digits: int, *, kept: Sequence[str] = ()
) -> Iterator[tuple[tuple[str, str | None, int | None], str, tuple[Cell, ...]]]:
    """(router, encoder and top-k, names of the cells that agree, their shares).

    kept: columns that are the share not sent to the edited model.
    """
    found: dict[tuple[Any, ...], list[tuple[Row, tuple[Cell, ...]]]] = {}
    for row in rows:
        record = row.at("overall")
        scores = {name: record.score(name) if record is not None else None for name in columns}
        if all(score is None for score in scores.values()):
            continue
        scores |= {name: _complement(scores[name]) for name in kept if name in scores}
        cells = [value_cell(score, digits) for score in scores.values()]
        links = tuple(linked(cell, row, "overall", name) for cell, name in zip(cells, scores, strict=True))
        setting = (row.router or PAPER_ROUTER, row.encoder, row.top_k)  # older versions knew one router
        found.setdefault((setting, *cells), []).append((row, links))
    for (setting, *_), members in found.items():
        alone = sum(other[0] == setting for other in found) == 1
        names = "all" if alone else ", ".join(f"{name_of(row.editor)} {row.cell}" for row, _ in members)
        yield setting, names, members[0][1]


def _complement(score: Score | None) -> Score | None:
    if score is None:
        return None
    low, high = (None if end is None else 1 - end for end in (score.high, score.low))
    return replace(score, value=1 - score.value, low=low, high=high)


def ability_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """One table per metric of the general tasks: a row per cell, a column per task."""
    records = [record for row in rows for record in row.records if record.slice.startswith("task:")]
    columns = {record.slice: record.slice.removeprefix("task:") for record in records}
    tables = []
    for metric, title in TASK_METRICS.items():
        scores = [score for record in records if (score := record.score(metric)) is not None]
        if not scores:
            continue
        lines, shown = [], []
        for row in rows:
            cells = [_task_cell(row, slice_, metric, digits) for slice_ in columns]
            if any(cell.text != MISSING for cell in cells):
                lines.append((*labels(row), *cells))
                shown.append(row)
        notes = []
        if metric == "f1_weighted":
            notes.append(f"Brackets: 95 % interval over records, {_counted(scores)} a task.")
        if any(score.difference is not None for score in scores):
            unit = "nats" if metric == "gold_margin" else "points"
            notes.append(f"Parentheses: difference in {unit} to the unedited model.")
        tables.append(
            Table(
                title=f"General ability: {title}",
                headers=("Editor", "Cell", *(TASK_NAMES.get(name, name) for name in columns.values())),
                rows=tuple(lines),
                notes=(" ".join(notes),) if notes else (),
                groups=groups(shown),
            )
        )
    return tables


def cost_tables(run: Run) -> list[Table]:
    """Seconds per edit, seconds per scored sample and peak memory of each editor."""
    costs = run.info.get("per_editor")
    if not isinstance(costs, dict) or not costs:
        return []
    lines = []
    for editor, given in costs.items():
        cost = given if isinstance(given, dict) else {}
        lines.append(
            (
                Cell(text=name_of(editor) or "unedited"),
                number_cell(cost.get("edit_seconds_per_edit"), 3),
                number_cell(cost.get("inference_seconds_per_sample"), 3),
                number_cell(cost.get("peak_memory_bytes"), 2, scale=1e-9),
            )
        )
    headers = ("Editor", "Edit (s)", "Inference per sample (s)", "Peak memory (GB)")
    return [Table(title="Cost per editor", headers=headers, rows=tuple(lines))]


def columns_of(rows: Iterable[Row]) -> dict[str, str]:
    """The leading metrics of the rows' schema and their titles."""
    present = metrics_of(rows)
    columns = KNOWEDIT_COLUMNS if "rewrite_acc" in present else COUNTERFACT_COLUMNS
    return {name: title for name, title in columns.items() if name in present or name not in OPTIONAL_COLUMNS}


def _task_cell(row: Row, slice_: str, metric: str, digits: int) -> Cell:
    """A general task's score; its difference is to the unedited model."""
    record = row.at(slice_)
    if record is None or record.error is not None:
        return without_scores(record)
    score = record.score(metric)
    cell = linked(value_cell(score, digits), row, slice_, metric)
    if metric != "f1_weighted":  # the others' intervals are in the records
        cell = replace(cell, interval="")
    if score is None or score.difference is None:
        return cell
    return replace(cell, difference=signed(score.difference, digits, metric))


def _counted(scores: Iterable[Score]) -> str:
    """How many records, from the fewest to the most."""
    sizes = sorted({score.n for score in scores})
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
