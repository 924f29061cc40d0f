"""Tables as rows of cells, made of records. No metric is computed here.

What is missing is a dash, never zero; what failed says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from reports.load import Run
from reports.published import Published, planned_edits, published_for
from reports.record import Score
from reports.rows import Row, baseline_of, rows_of

MISSING = "–"

EDITOR_NAMES = {
    "none": "",
    "ft": "FT",
    "rome": "ROME",
    "r-rome": "R-ROME",
    "memit": "MEMIT",
    "memit-seq": "MEMIT-seq",
    "memit+blue": "MEMIT-BLUE",
    "pmet": "PMET",
    "rect": "RECT",
    "prune": "PRUNE",
    "emmet": "EMMET",
    "alphaedit": "AlphaEdit",
    "alphaedit+blue": "AlphaEdit-BLUE",
    "ultraedit": "UltraEdit",
}

COUNTERFACT_COLUMNS = {
    "score": "Score",
    "efficacy": "Efficacy",
    "generalization": "Generalization",
    "locality": "Locality",
    "fluency": "Fluency",
    "consistency": "Consistency",
}
KNOWEDIT_COLUMNS = {
    "rewrite_acc": "Rewrite",
    "rephrase_acc": "Rephrase",
    "portability_reasoning": "Reasoning",
    "portability_subject_aliasing": "Subject aliasing",
    "portability_logical_generalization": "Logical generalization",
    "relation_specificity": "Relation specificity",
}
OPTIONAL_COLUMNS = ("fluency", "consistency")
ROUTING_COLUMNS = {
    "route_rewrite": "Rewrite",
    "route_paraphrase": "Paraphrase",
    "route_neighborhood": "Neighborhood",
}
KNOWEDIT_ROUTING_COLUMNS = {
    f"route_{name.removesuffix('_acc')}": title for name, title in KNOWEDIT_COLUMNS.items()
}
KNOWEDIT_ANY_COLUMNS = {
    f"{name}_any": title for name, title in KNOWEDIT_COLUMNS.items() if name.startswith("portability")
}

TASK_NAMES = {
    "seqmmr_sst": "SST",
    "seqmmr_mmlu": "MMLU",
    "seqmmr_mrpc": "MRPC",
    "seqmmr_cola": "CoLA",
    "seqmmr_rte": "RTE",
    "seqmmr_nli": "NLI",
    "seqmmr_rte_legacy": "RTE, inverted labels",
}
TASK_METRICS = {
    "f1_weighted": "weighted F1 of the likelier answer, in percent",
    "f1_generated": "weighted F1 of the generated answer, in percent",
    "gold_margin": "log-probability of the right answer less that of the best other, in nats",
    "agreement": "answers equal to those of the unedited model, in percent",
    "route_task": "records that the router sends to the edited model, in percent",
}

COST_CELLS = ("baseline", "+MM+R")
PAPER_HEADER = "Paper (same columns)"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell, its parts apart so that each format can set them its own way."""

    text: str
    interval: str = ""  # "80.2, 87.5"
    difference: str = ""  # "+3.2"
    mark: Literal["", "best", "second"] = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table before it is rendered."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()  # rows, from 0, before which a rule or a gap belongs


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is shown of one run."""

    title: str
    facts: tuple[tuple[str, str], ...]  # (what, value)
    warnings: tuple[str, ...]
    tables: tuple[Table, ...]


def build_report(run: Run, *, paper: bool = False, digits: int = 1) -> Report:
    """Every table for which the run has records, with the published figures beside ours if `paper`."""
    rows = rows_of(run)
    published = published_for(run, rows) if paper else None
    tables = [
        main_table(rows, digits=digits, published=published),
        *any_answer_tables(rows, digits=digits),
        *differences_tables(rows, digits=digits),
        *modules_tables(rows, digits=digits, published=published),
        *routing_tables(rows, digits=digits, published=published),
        *ability_tables(rows, digits=digits),
        *cost_tables(run, published=published),
    ]
    notes = run.info.get("notes")
    return Report(
        title=run.path.resolve().name,
        facts=tuple(describe(run)),
        warnings=tuple(map(str, notes)) if isinstance(notes, list) else (),
        tables=tuple(tables),
    )


def main_table(rows: Sequence[Row], *, digits: int = 1, published: Published | None = None) -> Table:
    """Unedited, then each editor's cells; a column per metric, the best and second best edited row marked."""
    columns = _main_columns(rows)
    body = [
        [_metric_cell(row, "overall", name, rows, digits, interval=True) for name in columns] for row in rows
    ]
    marked = [_mark(column, [not row.is_unedited for row in rows]) for column in zip(*body, strict=True)]
    lines = [[*_labels(row), *cells] for row, cells in zip(rows, zip(*marked, strict=True), strict=True)]
    headers = ["Editor", "Cell", *columns.values()]
    notes = [*_reading_notes(lines), *_size_notes(rows, columns), *_progress_notes(rows), *_error_notes(rows)]
    if published is not None:
        printed = [[published.find(row, "overall", name) for name in columns] for row in rows]
        if published.figures:
            headers.append(PAPER_HEADER)
            lines = [[*line, _paper_cell(values)] for line, values in zip(lines, printed, strict=True)]
        notes += published.notes
    return Table(
        title="Results in percent",
        headers=tuple(headers),
        rows=tuple(map(tuple, lines)),
        notes=tuple(notes),
        groups=_groups(rows),
    )


def any_answer_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """KnowEdit's portability where any given answer is right; none where that changes no figure."""
    columns = {name: title for name, title in KNOWEDIT_ANY_COLUMNS.items() if name in _present(rows)}
    if not any(_aliases_matter(row, columns) for row in rows):
        return []
    lines = []
    for row in rows:
        cells = [_metric_cell(row, "overall", name, rows, digits, interval=True) for name in columns]
        lines.append((*_labels(row), *cells))
    return [
        Table(
            title="Portability with any of the given answers, in percent",
            headers=("Editor", "Cell", *columns.values()),
            rows=tuple(lines),
            notes=(
                "Of several answers to a prompt the one with the largest share counts; the table of results "
                "has the first.",
                *_reading_notes(lines),
            ),
            groups=_groups(rows),
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
    columns = _main_columns(rows)
    lines, shown = [], []
    for row in rows:
        record = row.at("overall")
        scores = [
            record.score(name) if record is not None and record.error is None else None for name in columns
        ]
        if any(score is not None and score.difference_low is not None for score in scores):
            lines.append((*_labels(row), *(_difference_cell(score, digits) for score in scores)))
            shown.append(row)
    if not lines:
        return []
    return [
        Table(
            title="Differences to the baseline cell, in points",
            headers=("Editor", "Cell", *columns.values()),
            rows=tuple(lines),
            notes=("Brackets: 95 % interval, paired bootstrap over cases.",),
            groups=_groups(shown),
        )
    ]


def modules_tables(
    rows: Sequence[Row], *, digits: int = 1, published: Published | None = None
) -> list[Table]:
    """One table per editor: a row per batch and one overall, a column per cell."""
    columns = _main_columns(rows)
    metric = next(iter(columns))
    numbers = {
        int(r.slice.removeprefix("batch:"))
        for row in rows
        for r in row.records
        if r.slice.startswith("batch:")
    }
    slices = {f"batch:{k}": f"@{k}" for k in sorted(numbers)} | {"overall": "Overall"}
    tables = []
    for editor in dict.fromkeys(row.editor for row in rows if not row.is_unedited):
        cells = [row for row in rows if row.editor == editor]
        columns_of_cells: list[tuple[str, list[Cell]]] = []
        for row in cells:
            ours = [_metric_cell(row, slice_, metric, rows, digits, interval=False) for slice_ in slices]
            columns_of_cells.append((row.label, ours))
            printed = [published.find(row, slice_, metric) if published else None for slice_ in slices]
            if any(value is not None for value in printed):
                columns_of_cells.append((f"{row.label}, paper", [_paper_cell([value]) for value in printed]))
        headers, bodies = zip(*columns_of_cells, strict=True)
        labels = [Cell(text=label) for label in slices.values()]
        failed = any(cell.text == "failed" for body in bodies for cell in body)
        tables.append(
            Table(
                title=f"{_name(editor)}: {columns[metric]} per batch, in percent",
                headers=("Batch", *headers),
                rows=tuple(zip(labels, *bodies, strict=True)),
                notes=_reading_notes(bodies)
                + (("Errors are named below the first table.",) if failed else ()),
                groups=(len(slices) - 1,) if len(slices) > 1 else (),
            )
        )
    return tables


def routing_tables(
    rows: Sequence[Row], *, digits: int = 1, published: Published | None = None
) -> list[Table]:
    """The share of prompts sent to the edited model, per encoder and top-k; cells that agree share a row."""
    present = _present(rows)
    columns = KNOWEDIT_ROUTING_COLUMNS if "rewrite_acc" in present else ROUTING_COLUMNS
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        record = row.at("overall")
        scores = [record.score(name) for name in columns] if record is not None else []
        if any(score is not None for score in scores):
            key = (row.encoder, row.top_k, *(_value_cell(score, digits) for score in scores))
            groups.setdefault(key, []).append(row)
    if not groups:
        return []
    headers = ["Encoder", "Top-k", "Cells", *columns.values()]
    lines = []
    for (encoder, top_k, *cells), members in groups.items():
        alone = sum(other[:2] == (encoder, top_k) for other in groups) == 1
        names = "all" if alone else ", ".join(f"{_name(row.editor)} {row.cell}" for row in members)
        line = [Cell(text=_text(encoder)), Cell(text=_text(top_k)), Cell(text=names), *cells]
        if published is not None and published.routing:
            line.append(_paper_cell(published.routing.get(top_k, ())))
        lines.append(tuple(line))
    if published is not None and published.routing:
        headers.append(PAPER_HEADER)
    notes = _reading_notes(lines)
    return [
        Table(
            title="Prompts that the router sends to the edited model, in percent",
            headers=tuple(headers),
            rows=tuple(lines),
            notes=notes + (published.routing_notes if published is not None else ()),
        )
    ]


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
                lines.append((*_labels(row), *cells))
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
                groups=_groups(shown),
            )
        )
    return tables


def cost_tables(run: Run, *, published: Published | None = None) -> list[Table]:
    """Seconds per edit, seconds per scored sample and peak memory of each editor."""
    costs = run.info.get("per_editor")
    if not isinstance(costs, dict) or not costs:
        return []
    headers = ["Editor", "Edit (s)", "Inference per sample (s)", "Peak memory (GB)"]
    if published is not None and published.cost:
        headers += [f"{PAPER_HEADER}, {cell}" for cell in COST_CELLS]
    lines = []
    for editor, given in costs.items():
        cost = given if isinstance(given, dict) else {}
        line = [
            Cell(text=_name(editor) or "unedited"),
            _number_cell(cost.get("edit_seconds_per_edit"), 3),
            _number_cell(cost.get("inference_seconds_per_sample"), 3),
            _number_cell(cost.get("peak_memory_bytes"), 2, scale=1e-9),
        ]
        if published is not None and published.cost:
            line += [_paper_cell(published.cost.get((editor, cell), ()), digits=3) for cell in COST_CELLS]
        lines.append(tuple(line))
    notes = published.cost_notes if published is not None else ()
    return [Table(title="Cost per editor", headers=tuple(headers), rows=tuple(lines), notes=notes)]


def describe(run: Run) -> list[tuple[str, str]]:
    """What the run was, as far as `run.json` and the records say."""
    first, spec, provenance = run.records[0], run.spec, run.provenance
    size, batches, edits = spec.get("batch_size"), spec.get("num_batches"), planned_edits(run)
    commit = provenance.get("commit")
    dirty = "with uncommitted changes" if provenance.get("dirty") else None
    limit = spec.get("limit_stats")
    facts = {
        "Model": _list(first.model, run.info.get("model_note"), separator="; "),
        "Dataset": _list(first.dataset, _labelled("selection", spec.get("select"))),
        "Edits": f"{edits:,} ({batches} batches of {size})" if size and batches else f"{edits:,}",
        "Seed": _text(first.seed),
        "Merging": _list(
            spec.get("merger"),
            _labelled("pruning ratio", spec.get("pruning_ratio")),
            _labelled("chain", spec.get("chain")),
        ),
        "Router": _list(
            spec.get("router"),
            _labelled("top-k", spec.get("top_k")),
            _labelled("encoder", spec.get("encoder")),
            _labelled("negatives", spec.get("negatives")),
        ),
        "Statistics": _list(
            spec.get("stats"), f"at most {limit:,} tokens" if isinstance(limit, int) else None
        ),
        "General tasks": _list(*(spec.get("capability") or ())),
        "Device": _list(spec.get("device"), spec.get("dtype")),
        "Commit": _list(commit[:12] if isinstance(commit, str) else None, dirty if commit else None),
        "Status": _text(run.info.get("status")) if run.info.get("status") != "complete" else MISSING,
    }
    return [(what, value) for what, value in facts.items() if value != MISSING]


def _main_columns(rows: Iterable[Row]) -> dict[str, str]:
    present = _present(rows)
    columns = KNOWEDIT_COLUMNS if "rewrite_acc" in present else COUNTERFACT_COLUMNS
    return {name: title for name, title in columns.items() if name in present or name not in OPTIONAL_COLUMNS}


def _present(rows: Iterable[Row]) -> set[str]:
    """The metrics that some record has."""
    return {score.metric for row in rows for record in row.records for score in record.scores}


def _labels(row: Row) -> tuple[Cell, Cell]:
    return Cell(text=_name(row.editor)), Cell(text=row.label)


def _name(editor: str) -> str:
    return EDITOR_NAMES.get(editor, editor)


def _groups(rows: Sequence[Row]) -> tuple[int, ...]:
    return tuple(i for i in range(1, len(rows)) if rows[i].editor != rows[i - 1].editor)


def _metric_cell(
    row: Row, slice_: str, metric: str, rows: Sequence[Row], digits: int, *, interval: bool
) -> Cell:
    record = row.at(slice_)
    if record is None:
        return Cell(text=MISSING)
    if record.error is not None:
        return Cell(text="n/a" if "not applicable" in record.error.lower() else "failed")
    score = record.score(metric)
    cell = _value_cell(score, digits)
    difference = _difference(score, row, slice_, metric, rows)
    if difference is not None:
        cell = replace(cell, difference=_signed(difference, digits))
    return cell if interval else replace(cell, interval="")


def _task_cell(row: Row, slice_: str, metric: str, digits: int) -> Cell:
    """A general task's score; its difference is to the unedited model."""
    record = row.at(slice_)
    if record is None:
        return Cell(text=MISSING)
    if record.error is not None:
        return Cell(text="n/a" if "not applicable" in record.error.lower() else "failed")
    score = record.score(metric)
    places, scale = (digits + 1, 1.0) if metric == "gold_margin" else (digits, 100.0)
    cell = _value_cell(score, places, scale)
    if metric != "f1_weighted":  # the others' intervals are in the records
        cell = replace(cell, interval="")
    if score is None or score.difference is None:
        return cell
    return replace(cell, difference=_signed(score.difference, places, scale))


def _counted(scores: Iterable[Score]) -> str:
    """How many records, from the fewest to the most."""
    sizes = sorted({score.n for score in scores})
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def _value_cell(score: Score | None, digits: int, scale: float = 100) -> Cell:
    if score is None:
        return Cell(text=MISSING)
    interval = ""
    if score.low is not None and score.high is not None:
        interval = f"{_scaled(score.low, digits, scale)}, {_scaled(score.high, digits, scale)}"
    return Cell(text=_scaled(score.value, digits, scale), interval=interval)


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


def _difference_cell(score: Score | None, digits: int) -> Cell:
    if score is None or score.difference is None:
        return Cell(text=MISSING)
    interval = ""
    if score.difference_low is not None and score.difference_high is not None:
        interval = f"{_signed(score.difference_low, digits)}, {_signed(score.difference_high, digits)}"
    return Cell(text=_signed(score.difference, digits), interval=interval)


def _mark(column: Sequence[Cell], eligible: Sequence[bool]) -> list[Cell]:
    """Mark the best and the second best of the eligible cells; those printed alike share a mark."""
    values = [_parsed(cell.text) if may else None for cell, may in zip(column, eligible, strict=True)]
    ranked = sorted({value for value in values if value is not None}, reverse=True)
    marks: dict[float | None, Literal["best", "second"]] = dict(zip(ranked, ("best", "second"), strict=False))
    return [replace(cell, mark=marks.get(value, "")) for cell, value in zip(column, values, strict=True)]


def _parsed(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _paper_cell(values: Sequence[float | None], digits: int = 2) -> Cell:
    if all(value is None for value in values):
        return Cell(text=MISSING)
    return Cell(text=" / ".join(MISSING if value is None else f"{value:.{digits}f}" for value in values))


def _number_cell(value: object, digits: int, *, scale: float = 1) -> Cell:
    return Cell(text=f"{value * scale:.{digits}f}" if isinstance(value, int | float) else MISSING)


def _scaled(value: float, digits: int, scale: float = 100) -> str:
    """The value times the scale; by default a fraction as a percentage."""
    return f"{_rounded(value, digits, scale):.{digits}f}"


def _signed(value: float, digits: int, scale: float = 100) -> str:
    return f"{_rounded(value, digits, scale):+.{digits}f}"


def _rounded(value: float, digits: int, scale: float) -> float:
    return round(scale * value, digits) + 0.0  # no minus sign before a zero


def _reading_notes(lines: Iterable[Iterable[Cell]]) -> tuple[str, ...]:
    """How to read what these cells show."""
    cells = [cell for line in lines for cell in line]
    notes = []
    if any(cell.interval for cell in cells):
        notes.append("Brackets: 95 % interval over cases.")
    if any(cell.difference for cell in cells):
        notes.append("Parentheses: difference in points to the baseline cell of the same editor.")
    if any(cell.mark for cell in cells):
        notes.append("Bold: best of the column among edited rows; underlined: second best.")
    return (" ".join(notes),) if notes else ()


def _size_notes(rows: Sequence[Row], columns: dict[str, str]) -> list[str]:
    """How many were scored, where all rows agree."""
    parts = []
    for name, title in columns.items():
        records = [record for row in rows if (record := row.at("overall")) is not None]
        sizes = {score.n for record in records if (score := record.score(name)) is not None}
        if len(sizes) == 1:
            parts.append(f"{title} {sizes.pop():,}")
    return [f"Scored: {', '.join(parts)}."] if parts else []


def _progress_notes(rows: Sequence[Row]) -> list[str]:
    """A line when rows were scored after different numbers of edits."""
    applied: dict[int, list[str]] = {}
    for row in rows:
        record = row.at("overall")
        if record is not None and record.error is None and not row.is_unedited:
            applied.setdefault(record.edits_applied, []).append(f"{_name(row.editor)} {row.label}")
    if len(applied) < 2:
        return []
    parts = [f"{', '.join(names)} after {edits:,}" for edits, names in sorted(applied.items())]
    return [f"Rows were scored after different numbers of edits: {'; '.join(parts)}."]


def _error_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for row in rows:
        for error in row.errors():
            text = " ".join(error.split())
            name = f"{_name(row.editor)} {row.label}".strip()
            notes.append(f"{name}: {text if len(text) <= 400 else text[:399] + '…'}")
    return notes


def _text(value: object) -> str:
    if value is None or value == "":
        return MISSING
    return " and ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _labelled(name: str, value: object) -> str | None:
    return None if _text(value) == MISSING else f"{name} {_text(value)}"


def _list(*parts: object, separator: str = ", ") -> str:
    return separator.join(_text(part) for part in parts if part is not None) or MISSING
