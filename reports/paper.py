"""Tables in the layout of the SeqMMR paper's, over all the runs given; numbered as there.

Tables 1 and 2: results of one setting (CounterFact's schema, KnowEdit's). 3: several batch sizes or numbers
of edits. 4: several models. 5, 8, 9: the score batch by batch. 6: routing. 7: cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from reports.cells import (
    FAILED,
    Cell,
    Table,
    is_not_applicable,
    mark,
    metric_cell,
    reading_notes,
    value_cell,
    without_scores,
)
from reports.costs import cost_scores
from reports.names import (
    COST_COLUMNS,
    KNOWEDIT_ROUTING_COLUMNS,
    OPTIONAL_COLUMNS,
    PAPER_ROUTER,
    UNRELATED_ROUTES,
    name_of,
)
from reports.notes import size_notes, text_of
from reports.rows import Row, labels_of, metrics_of
from reports.seeds import Pool, interval_over
from reports.tables import columns_of, modules_table, routing_lines

CELLS = ("baseline", "+MM+R")  # of tables 1 to 4 and 7
ROUTING_COLUMNS = {
    "route_rewrite": "Editing request",
    "route_paraphrase": "Paraphrase prompt",
    "route_neighborhood": "Neighborhood prompt",
}
MODULES = {"memit": (5, 9), "memit-seq": (5, 9), "alphaedit": (8,)}  # the paper's MEMIT may be either
UNNUMBERED = 99


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table and the paper's tables whose layout it has; none for an editor that the paper leaves out."""

    numbers: tuple[int, ...]
    table: Table

    @property
    def place(self) -> int:
        """Its place among the others."""
        return min(self.numbers, default=UNNUMBERED)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of some runs, as a table over several runs names it."""

    pool: Pool
    row: Row
    method: str


def layouts(pools: Sequence[Pool], *, digits: int = 1) -> list[Layout]:
    """Every table for which the runs have records, in the order of the numbers.

    Of several pruning ratios and top-k the first of the spec stands in all of them but table 6.
    """
    leading = [replace(pool, rows=_leading(pool)) for pool in pools]
    found = [
        *_results(leading, digits),
        *_sizes(leading, digits),
        *_models(leading, digits),
        *_modules(leading, digits),
        *_routing(pools, digits),
        *_costs(leading),
    ]
    return sorted(found, key=lambda layout: layout.place)


def _results(pools: Sequence[Pool], digits: int) -> Iterator[Layout]:
    """Tables 1 and 2: one for each setting."""
    for members, title in _settings(pools):
        knowedit = _is_knowedit(members)
        number = 2 if knowedit else 1
        lines = [*_unedited(members), *_lines(members)]
        columns = columns_of([line.row for line in lines])
        columns.pop("rephrase_acc", None)  # the paper has no such column
        body = [_scores(line.row, columns, digits) for line in lines]
        edited = [not line.row.is_unedited for line in lines]
        marked = zip(*(mark(column, edited) for column in zip(*body, strict=True)), strict=True)
        rows = [(Cell(text=line.method), *cells) for line, cells in zip(lines, marked, strict=True)]
        table = Table(
            title=f"Table {number}: {title}, in percent",
            headers=("Method", *columns.values()),
            rows=tuple(rows),
            notes=_notes(members, rows, columns, lines),
            groups=_starts(lines),
        )
        yield Layout(numbers=(number,), table=table)


def _sizes(pools: Sequence[Pool], digits: int) -> Iterator[Layout]:
    """Table 3: runs of one model and dataset in at least two sizes."""
    for members in _grouped(pools, lambda pool: (pool.model, pool.dataset)):
        if len({_size(pool) for pool in members}) < 2:
            continue
        ordered = sorted(members, key=_size)
        lines = _lines(ordered, lambda pool: (pool.batch_size, pool.edits))
        columns = _rates(lines)
        rows = [
            (
                Cell(text=line.method),
                Cell(text=text_of(line.pool.batch_size)),
                Cell(text=f"{line.pool.edits:,}"),
                *_scores(line.row, columns, digits),
            )
            for line in lines
        ]
        table = Table(
            title=f"Table 3: {members[0].model}, {members[0].dataset}, several sizes, in percent",
            headers=("Method", "Batch size", "Edits", *columns.values()),
            rows=tuple(rows),
            notes=_notes(ordered, rows, {}, lines),
            groups=_changes([_size(line.pool) for line in lines]),
        )
        yield Layout(numbers=(3,), table=table)


def _models(pools: Sequence[Pool], digits: int) -> Iterator[Layout]:
    """Table 4: runs of at least two models on one dataset."""
    for members in _grouped(pools, lambda pool: pool.dataset):
        models = list(dict.fromkeys(pool.model for pool in members))
        if len(models) < 2:
            continue
        ordered = sorted(members, key=lambda pool: models.index(pool.model))
        lines = _lines(ordered, lambda pool: pool.model)
        columns = _rates(lines)
        rows = [
            (Cell(text=line.pool.model), Cell(text=line.method), *_scores(line.row, columns, digits))
            for line in lines
        ]
        sizes = "; ".join(dict.fromkeys(f"{pool.model}: {_edits(pool)}" for pool in ordered))
        table = Table(
            title=f"Table 4: {members[0].dataset}, several models, in percent",
            headers=("Model", "Method", *columns.values()),
            rows=tuple(rows),
            notes=(f"{sizes}.", *_notes(ordered, rows, {}, lines)),
            groups=_changes([line.pool.model for line in lines]),
        )
        yield Layout(numbers=(4,), table=table)


def _modules(pools: Sequence[Pool], digits: int) -> Iterator[Layout]:
    """Tables 5, 8 and 9, and others like them: an editor's cells batch by batch."""
    most: dict[Hashable, tuple[Pool, str, int]] = {}
    for pool in pools:
        for editor, cells in Counter(row.editor for row in pool.rows if not row.is_unedited).items():
            key = (editor, pool.experiment(editor))
            if key not in most or cells > most[key][2]:
                most[key] = (pool, editor, cells)
    editors = [editor for _, editor, _ in most.values()]
    for pool, editor, _ in most.values():
        table = modules_table(editor, pool.rows, digits=digits)
        numbers = () if _is_knowedit([pool]) else MODULES.get(editor, ())
        title = f"{_numbered(numbers)}{table.title.replace(': ', ', ', 1)}" if numbers else table.title
        notes = [*table.notes, *pool.notes(), *_setting_notes([pool])]
        if 5 in numbers:
            notes.append("Table 5 of the paper is the columns baseline, +MM and +MM+R of its table 9.")
        if editors.count(editor) > 1:
            title = f"{title} ({pool.name})"
        yield Layout(numbers=numbers, table=replace(table, title=title, notes=tuple(notes)))


def _routing(pools: Sequence[Pool], digits: int) -> Iterator[Layout]:
    """Table 6: one for each setting, a line for every encoder and top-k."""
    for members, title in _settings(pools):
        rows = [row for pool in members for row in pool.rows]
        columns = KNOWEDIT_ROUTING_COLUMNS if _is_knowedit(members) else ROUTING_COLUMNS
        found = sorted(
            routing_lines(rows, columns, digits, kept=UNRELATED_ROUTES),
            key=lambda line: (line[0][1] or "", line[0][0], line[0][2] or 0),
        )
        if not found:
            continue
        settings = [setting for setting, *_ in found]
        routers, encoders = (list(dict.fromkeys(text_of(setting[i]) for setting in settings)) for i in (0, 1))
        alike = all(names == "all" for _, names, _ in found)
        headers = ["Router", "Encoder", "Top-k", "Cells", *columns.values()]
        lines = [
            [*(Cell(text=text_of(value)) for value in setting), Cell(text=names), *shares]
            for setting, names, shares in found
        ]
        ours = routers == [PAPER_ROUTER]
        same = (("Router", ours), ("Encoder", len(encoders) < 2), ("Cells", alike))
        left_out = {name for name, out in same if out}
        shown = [i for i, header in enumerate(headers) if header not in left_out]
        last = list(columns.values())[-1].lower().removesuffix(" prompt")
        table = Table(
            title=f"Table 6: routing, {title}, in percent",
            headers=tuple(headers[i] for i in shown),
            rows=tuple(tuple(line[i] for i in shown) for line in lines),
            notes=(
                f"Prompts sent to the edited model; of {last} prompts, those kept on the unedited model.",
                *(f"Encoder: {encoder}." for encoder in encoders if len(encoders) < 2),
                *reading_notes(lines, interval=interval_over(members)),
                *(note for pool in members for note in pool.notes()),
            ),
        )
        yield Layout(numbers=(6,), table=table)


def _costs(pools: Sequence[Pool]) -> Iterator[Layout]:
    """Table 7: one for each setting."""
    for members, title in _settings(pools):
        lines = _lines(members)
        rows, merged, routed = [], False, False
        for line in lines:
            record = line.row.at("overall")
            scores = cost_scores(line.pool, line.row)
            if record is None or record.error is not None:
                rows.append((Cell(text=line.method), *[without_scores(record)] * len(COST_COLUMNS)))
                continue
            merged, routed = merged or line.row.is_merged, routed or line.row.is_routed
            cells = (value_cell(scores.get(name), 1) for name in COST_COLUMNS)
            rows.append((Cell(text=line.method), *cells))
        if not any(cell.text[:1].isdigit() for _, *cells in rows for cell in cells):
            continue
        notes = []
        if merged:
            notes.append("The time of an edit includes merging under +MM+R.")
        if routed:
            notes.append(
                "The time of a sample includes routing under +MM+R: the routing stage, which also embeds the "
                "edits and the unrelated texts, divided by the prompts it decided. Embeddings kept from an "
                "earlier run make it shorter."
            )
        table = Table(
            title=f"Table 7: cost, {title}",
            headers=("Method", *COST_COLUMNS.values()),
            rows=tuple(rows),
            notes=(
                *notes,
                *reading_notes(rows, interval=interval_over(members)),
                *(note for pool in members for note in pool.notes()),
            ),
            groups=_starts(lines),
        )
        yield Layout(numbers=(7,), table=table)


# Lines


def _lines(pools: Sequence[Pool], apart: Callable[[Pool], Hashable] = lambda _: None) -> list[Line]:
    """Every editor's baseline and +MM+R, side by side from all runs.

    apart: what already tells lines of different runs from each other in the table.
    """
    parts: dict[Hashable, list[Line]] = {}
    for pool in pools:
        for row in pool.rows:
            if row.cell in CELLS and not _is_out(row):
                parts.setdefault(apart(pool), []).append(Line(pool=pool, row=row, method=""))
    named: list[Line] = []
    for lines in parts.values():
        editors = list(dict.fromkeys(line.row.editor for line in lines))
        ordered = sorted(lines, key=lambda line: editors.index(line.row.editor))
        named += _once(_named(ordered))
    return named


def _is_out(row: Row) -> bool:
    """Whether a cell does not apply to its editor; the paper leaves such rows out."""
    record = row.at("overall")
    return record is not None and record.error is not None and is_not_applicable(record.error)


def _unedited(pools: Sequence[Pool]) -> list[Line]:
    """The unedited model, once where the runs agree: from the one that measured most."""
    kept: list[Line] = []
    for pool in pools:
        for row in (row for row in pool.rows if row.is_unedited):
            line = Line(pool=pool, row=row, method="Unedited")
            same = next((i for i, other in enumerate(kept) if _agree(row, other.row)), None)
            if same is None:
                kept.append(line)
            elif _measured(line) > _measured(kept[same]):
                kept[same] = line
    return _with_runs(kept)


def _agree(row: Row, other: Row) -> bool:
    one, two = row.at("overall"), other.at("overall")
    if one is None or two is None:
        return False
    pairs = [(score, two.score(score.metric)) for score in one.scores]
    return all(score.value == same.value for score, same in pairs if same is not None)


def _leading(pool: Pool) -> tuple[Row, ...]:
    """The rows with the first merger, pruning ratio, router and top-k of the spec."""
    rows = [row for row in pool.rows if all(getattr(row, n) in (None, v) for n, v in pool.leading.items())]
    return tuple(replace(row, label=label) for row, label in zip(rows, labels_of(rows), strict=True))


def _once(lines: Sequence[Line]) -> list[Line]:
    """Each row of one and the same experiment once, from the run that measured most."""
    most: dict[Hashable, Line] = {}
    for line in lines:
        row = line.row
        key = (row.editor, row.cell, row.chain, row.encoder, line.pool.experiment(row.editor))
        if key not in most or _measured(line) > _measured(most[key]):
            most[key] = line
    return _with_runs(list(most.values()))


def _measured(line: Line) -> int:
    record = line.row.at("overall")
    return 0 if record is None else len(record.scores)


def _named(lines: Sequence[Line]) -> list[Line]:
    """Each with the editor and what tells it from the others."""
    labels = labels_of([line.row for line in lines])
    named = [
        replace(line, method=f"{name_of(line.row.editor)} {label.removeprefix('baseline')}".strip())
        for line, label in zip(lines, labels, strict=True)
    ]
    return named


def _with_runs(lines: Sequence[Line]) -> list[Line]:
    """The names of the runs behind methods that are named alike."""
    methods = [line.method for line in lines]
    return [
        replace(line, method=f"{line.method} ({line.pool.name})") if methods.count(line.method) > 1 else line
        for line in lines
    ]


def _scores(row: Row, columns: Iterable[str], digits: int) -> list[Cell]:
    cells = (metric_cell(row, "overall", name, (), digits, interval=True) for name in columns)
    return [replace(cell, difference="") for cell in cells]


def _rates(lines: Sequence[Line]) -> dict[str, str]:
    """The columns of tables 3 and 4."""
    columns = columns_of([line.row for line in lines])
    return {name: title for name, title in columns.items() if name not in ("rephrase_acc", *OPTIONAL_COLUMNS)}


def _starts(lines: Sequence[Line]) -> tuple[int, ...]:
    return _changes([line.row.editor for line in lines])


def _changes(values: Sequence[object]) -> tuple[int, ...]:
    """Where a value is another than the one before it."""
    return tuple(i for i in range(1, len(values)) if values[i] != values[i - 1])


# In words


def _grouped(pools: Sequence[Pool], key: Callable[[Pool], Hashable]) -> list[list[Pool]]:
    groups: dict[Hashable, list[Pool]] = {}
    for pool in pools:
        groups.setdefault(key(pool), []).append(pool)
    return list(groups.values())


def _settings(pools: Sequence[Pool]) -> list[tuple[list[Pool], str]]:
    """The runs that share a table, with what the table's title says of them."""
    settings = _grouped(pools, lambda pool: pool.setting)
    titles = [f"{pool.model}, {pool.dataset}, {_edits(pool)}" for pool, *_ in settings]
    return [
        (members, title if titles.count(title) == 1 else f"{title}, {_choice(members[0])}")
        for members, title in zip(settings, titles, strict=True)
    ]


def _is_knowedit(pools: Sequence[Pool]) -> bool:
    return any("rewrite_acc" in metrics_of(pool.rows) for pool in pools)


def _size(pool: Pool) -> tuple[int, int]:
    return pool.edits, pool.batch_size or 0


def _edits(pool: Pool) -> str:
    size = f" in batches of {pool.batch_size:,}" if pool.batch_size else ""
    return f"{pool.edits:,} edits{size}"


def _choice(pool: Pool) -> str:
    """The selection and the seeds."""
    seeds = ", ".join(text_of(seed) for seed in pool.seeds)
    return f"selection {text_of(pool.select)}, seed{'s' if len(pool.seeds) > 1 else ''} {seeds}"


def _numbered(numbers: Sequence[int]) -> str:
    return f"Table{'s' if len(numbers) > 1 else ''} {' and '.join(map(str, numbers))}: "


def _setting_notes(pools: Sequence[Pool]) -> list[str]:
    """Which of several mergers, pruning ratios, routers and top-k stand in a table."""
    notes = []
    for pool in pools:
        several = [f"{name.replace('_', ' ')} {pool.leading[name]}" for name in pool.several]
        if several:
            notes.append(
                f"{pool.name}: the first {' and '.join(several)}; the others are in the part of that run."
            )
    return notes


def _notes(
    pools: Sequence[Pool], rows: Sequence[Sequence[Cell]], columns: dict[str, str], lines: Sequence[Line]
) -> tuple[str, ...]:
    """How to read a table of results, and where it is from. columns: those whose sizes are named."""
    failed = any(cell.text == FAILED for row in rows for cell in row)
    unfinished = [
        f"{line.method} {record.edits_applied:,} of {line.pool.edits:,}"
        for line in lines
        if (record := line.row.at("overall")) is not None
        and record.error is None
        and not line.row.is_unedited
        and record.edits_applied != line.pool.edits
    ]
    return (
        *reading_notes(rows, interval=interval_over(pools)),
        *size_notes([line.row for line in lines], columns),
        *(f"{pool.name}: {_choice(pool)}." for pool in pools if len(pool.runs) == 1),
        *(note for pool in pools for note in pool.notes()),
        *_setting_notes(pools),
        *(
            ("What several of these runs measured stands once, from the run that measured most.",)
            if len(pools) > 1
            else ()
        ),
        *((f"Not finished, edits scored: {', '.join(unfinished)}.",) if unfinished else ()),
        *(("Errors are named in the part of their run.",) if failed else ()),
    )
