"""Figures made of records, for reports and papers. No metric is computed here; only the retention curves are
means over batches of what the records have.

What is drawn is settled without matplotlib, which is imported when something is drawn. What failed says so in
the picture or its legend; what does not apply to an editor is named in the caption.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.cells import FAILED, MISSING, NOT_APPLICABLE, without_scores
from reports.load import Run
from reports.names import COUNTERFACT_COLUMNS, KNOWEDIT_COLUMNS, OPTIONAL_COLUMNS, TASK_NAMES, name_of
from reports.probes import KINDS, Calibration, TradeOff
from reports.record import GRID, Record, Score
from reports.rows import Row, metrics_of, rows_of

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure


MISSING_NOTE = "Figures are left out: matplotlib is not installed (python -m pip install -e '.[figures]')."

ABILITY = {
    "f1_weighted": ("ability", "Figure 2: general ability (weighted F1)"),
    "f1_generated": ("ability-generated", "Figure 2: general ability (weighted F1 of the generated answer)"),
}
"""Metric -> name and title of its figure."""

PROTOCOLS = {
    "probability": "the share of prompts whose right answer is the likelier of two",
    "teacher_forced": "the share of answer tokens predicted under teacher forcing",
    "log_probability": "the answer is the choice with the largest log-probability",
    "generated": "the answer is read from generated text",
}

INTERVALS = "Bands and lines through markers: 95 % bootstrap intervals over cases."

COLUMN, TEXT = 3.4, 7.0  # widths in a paper, inches
SPAN = 40  # points that a vertical axis covers at least
MOST_LINES = 4
SMALLEST = 5.0  # pt, of a number in a square
OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
}
Style = tuple[str, str]  # colour, marker
CELL_STYLES: dict[str, Style] = {
    "unedited": (OKABE_ITO["black"], "|"),
    "baseline": (OKABE_ITO["vermilion"], "o"),
    "+MM": (OKABE_ITO["orange"], "s"),
    "+R": (OKABE_ITO["green"], "^"),
    "+MM+R": (OKABE_ITO["blue"], "D"),
}
OTHER_CELL: Style = (OKABE_ITO["purple"], "v")
RATIO_STYLES: tuple[Style, ...] = (
    (OKABE_ITO["sky"], "o"),
    (OKABE_ITO["blue"], "s"),
    (OKABE_ITO["green"], "^"),
    (OKABE_ITO["orange"], "D"),
    (OKABE_ITO["vermilion"], "v"),
    (OKABE_ITO["purple"], "P"),
    (OKABE_ITO["black"], "X"),
)
SETTINGS: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # matplotlib brings the first
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "0.3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.fonttype": "none",
    "svg.hashsalt": "seqmmr",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure before it is drawn."""

    name: str  # file stem, unique in a report: letters, digits, hyphens
    title: str
    caption: str  # how to read it
    draw: Callable[[], matplotlib.figure.Figure]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value with its 95 % interval, in percent; NaN where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    state: str = ""  # in place of a value: "failed", or a dash

    @property
    def known(self) -> bool:
        return not math.isnan(self.value)


@dataclass(frozen=True, kw_only=True)
class Series:
    """What a line, or dots of one kind, show."""

    label: str
    style: Style
    points: tuple[Point, ...]
    pooled: Point | None = None  # of all batches, drawn apart from the line

    @property
    def known(self) -> bool:
        return any(point.known for point in self.points)

    @property
    def legend(self) -> str:
        return self.label if self.known else f"{self.label}: {self.points[0].state}"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    series: tuple[Series, ...]


Matrix = tuple[tuple[Point, ...], ...]  # a line per edit batch, a column per batch after which it was scored


@dataclass(frozen=True, kw_only=True)
class Content:
    """A run as the figures take it."""

    run: Run
    rows: tuple[Row, ...]
    columns: Mapping[str, str]  # metric -> name, the main one first
    batches: int
    batch_size: int
    cells: Mapping[str, tuple[Row, ...]]  # editor -> its cells, each with the first ratio and top-k
    stems: Mapping[str, str]  # editor -> part of a file name

    @property
    def metric(self) -> str:
        return next(iter(self.columns))

    @property
    def main(self) -> str:
        return self.columns[self.metric]

    def shown(self, editor: str) -> tuple[Row, ...]:
        """The cells that apply to an editor, as many as a figure takes."""
        return tuple(row for row in self.cells[editor] if _state(row) != NOT_APPLICABLE)[:MOST_LINES]


def available() -> bool:
    """Whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def figures_of(run: Run) -> tuple[Figure, ...]:
    """Every figure for which the run has records."""
    content = _content(run)
    figures = [figure for metric in ABILITY for figure in _ability(content, metric)]
    if content.batches > 1:
        for make in (_ratios, _modules, _forgetting, _retention, _progress):
            for editor in content.cells:
                figures += make(content, editor)
    return tuple(figures)


# What the run has


def _content(run: Run) -> Content:
    rows = rows_of(run)
    present = metrics_of(rows)
    known = KNOWEDIT_COLUMNS if "rewrite_acc" in present else COUNTERFACT_COLUMNS
    columns = {n: title for n, title in known.items() if n in present and n not in OPTIONAL_COLUMNS}
    numbers = [int(r.slice.removeprefix("batch:")) for r in run.records if r.slice.startswith("batch:")]
    batches = max(numbers, default=1) if columns else 1
    size = run.spec.get("batch_size")
    editors = list(dict.fromkeys(row.editor for row in rows if not row.is_unedited))
    return Content(
        run=run,
        rows=rows,
        columns=columns,
        batches=batches,
        batch_size=size if isinstance(size, int) else run.edits // batches,
        cells={editor: _first_settings(run, rows, editor) for editor in editors},
        stems=_stems(editors),
    )


def _first_settings(run: Run, rows: Sequence[Row], editor: str) -> tuple[Row, ...]:
    """One row of each cell of an editor: of the first merger, pruning ratio, router and top-k."""

    def rank(row: Row) -> list[int]:
        places = []
        for name in GRID:
            value, known = getattr(row, name), run.spec.get(name)
            places.append(known.index(value) if isinstance(known, list) and value in known else 0)
        return places

    cells: dict[str, list[Row]] = {}
    for row in rows:
        if row.editor == editor:
            cells.setdefault(row.cell, []).append(row)
    return tuple(min(siblings, key=rank) for siblings in cells.values())


def _stems(editors: Iterable[str]) -> dict[str, str]:
    """A file name's letters, digits and hyphens for each editor, no two alike."""
    stems: dict[str, str] = {}
    for editor in editors:
        stem = plain = re.sub(r"[^A-Za-z0-9]+", "-", editor).strip("-") or "editor"
        number = 2
        while stem in stems.values():
            stem, number = f"{plain}-{number}", number + 1
        stems[editor] = stem
    return stems


def _state(row: Row, slice_: str = "overall") -> str:
    """What stands in place of values; nothing where there may be some."""
    record = row.at(slice_)
    return "" if record is not None and record.error is None else without_scores(record).text


def _point(record: Record | None, metric: str) -> Point:
    score = record.score(metric) if record is not None and record.error is None else None
    if score is None:
        return Point(state=without_scores(record).text)
    low, high = (math.nan if end is None else 100 * end for end in (score.low, score.high))
    return Point(value=100 * score.value, low=low, high=high)


def _bare(point: Point) -> Point:
    """Without its interval."""
    return replace(point, low=math.nan, high=math.nan)


def _of_cell(row: Row, points: Iterable[Point]) -> Series:
    return Series(label=row.cell, style=CELL_STYLES.get(row.cell, OTHER_CELL), points=tuple(points))


def _per_batch(content: Content, row: Row, label: str, style: Style) -> Series:
    """The final main metric of every batch, and of all pooled."""
    numbers = range(1, content.batches + 1)
    return Series(
        label=label,
        style=style,
        points=tuple(_point(row.at(f"batch:{number}"), content.metric) for number in numbers),
        pooled=_point(row.at("overall"), content.metric),
    )


def _every_batch(rows: Iterable[Row]) -> bool:
    """Whether a batch was scored more than once."""
    scored = [(row.cell, r.slice) for row in rows for r in row.records if r.slice.startswith("batch:")]
    return len(set(scored)) < len(scored)


def _history(content: Content, row: Row, metric: str) -> Matrix:
    """A metric after every batch: of all edits so far, then of every edit batch."""
    last = row.at("overall")
    failed = last if last is not None and last.error is not None else None
    found = {(r.slice, r.edits_applied): r for r in row.records if r.error is None}
    numbers = range(1, content.batches + 1)
    return tuple(
        tuple(_point(found.get((slice_, after * content.batch_size), failed), metric) for after in numbers)
        for slice_ in ("overall", *(f"batch:{number}" for number in numbers))
    )


def _retained(matrix: Matrix) -> Iterator[Point]:
    """The mean over edit batches, by how many batches were applied since the edit."""
    for distance in range(len(matrix)):
        points = [matrix[batch][batch + distance] for batch in range(len(matrix) - distance)]
        values = [point.value for point in points if point.known]
        yield Point(value=sum(values) / len(values)) if values else points[0]


# Words


def _sentences(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _setting(content: Content, rows: Iterable[Row]) -> str:
    """Model, data, edits, and the choices behind the rows shown."""
    first, edits = content.run.records[0], content.run.edits
    batches = f" in {content.batches} batches" if content.batches > 1 else ""
    parts = [f"Model {first.model}", f"dataset {first.dataset}", f"{edits:,} edits{batches}"]
    shown = list(rows)
    for field in (*GRID, "encoder"):
        name = {"pruning_ratio": "pruning ratio", "top_k": "top-k"}.get(field, field)
        values = dict.fromkeys(value for row in shown if (value := getattr(row, field)) is not None)
        if values:
            parts.append(f"{name} {' or '.join(map(str, values))}")
    return f"{', '.join(parts)}."


def _absent(rows: Iterable[Row], slice_: str = "overall") -> str:
    """Names the cells that do not apply, failed or were not scored."""
    titles = {NOT_APPLICABLE: "Not applicable", FAILED: "Failed", MISSING: "Not scored"}
    cells: dict[str, dict[str, None]] = {state: {} for state in titles}
    for row in rows:
        if state := _state(row, slice_):
            cells[state][f"{name_of(row.editor)} {row.cell}".strip()] = None
    return " ".join(f"{titles[state]}: {', '.join(names)}." for state, names in cells.items() if names)


def _scores(rows: Iterable[Row], metrics: Iterable[str], start: str) -> list[Score]:
    """All scores of these metrics in the slices that begin so."""
    records = [record for row in rows for record in row.records if record.slice.startswith(start)]
    found = (record.score(metric) for metric in metrics for record in records)
    return [score for score in found if score is not None]


def _counted(scores: Iterable[Score]) -> str:
    """How many were scored, from the fewest to the most."""
    sizes = sorted({score.n for score in scores})
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def _protocols(scores: Iterable[Score]) -> str:
    return "; ".join(dict.fromkeys(PROTOCOLS.get(score.protocol, score.protocol) for score in scores))


def _meaning(content: Content, rows: Iterable[Row], metrics: Sequence[str]) -> str:
    """What the metrics are."""
    how = _protocols(_scores(rows, metrics, "batch:"))
    if "score" in metrics:
        return f"Score is the harmonic mean of efficacy, generalization and locality, each {how}."
    agreement = "; relation specificity: of tokens that the unedited model predicts as well"
    names = ", ".join(content.columns[metric] for metric in metrics)
    return f"{names}: {how}{agreement if 'relation_specificity' in metrics else ''}."


def _size(content: Content, rows: Iterable[Row]) -> str:
    """How many were scored in a batch."""
    unit = "records" if content.metric == "score" else "prompts"
    return f"{_counted(_scores(rows, [content.metric], 'batch:'))} {unit}"


def _limits(series: Iterable[Series]) -> tuple[int, int]:
    """Whole tens around the points and their intervals, at least `SPAN` apart."""
    points = [point for one in series for point in (*one.points, one.pooled) if point is not None]
    ends = [end for p in points for end in (p.value, p.low, p.high) if not math.isnan(end)]
    low, high = 10 * math.floor(min(ends) / 10), 10 * math.ceil(max(ends) / 10)
    while high - low < SPAN:
        low, high = max(low - 10, 0), min(high + 10, 100)
    return low, high


def _thinned(numbers: range, most: int) -> range:
    """Evenly spaced numbers, about so many at most: the first, and the last where that can be."""
    step = -(-len(numbers) // most)
    even = (more for more in range(step, 2 * step + 1) if (len(numbers) - 1) % more == 0)
    return numbers[:: next(even, step)]


# The figures


def _ability(content: Content, metric: str) -> Iterator[Figure]:
    """General tasks, a panel per editor (figure 2 of the paper)."""
    records = [r for r in content.run.records if r.slice.startswith("task:") and r.score(metric) is not None]
    slices = tuple(dict.fromkeys(record.slice for record in records))
    if not slices or not content.cells:
        return
    unedited = [row for row in content.rows if row.is_unedited]
    panels: list[Panel] = []
    shown: list[Row] = []
    for editor in content.cells:
        cells = _ability_cells(content.shown(editor))
        series = [
            _of_cell(row, (_point(row.at(slice_), metric) for slice_ in slices))
            for row in (*unedited, *cells)
        ]
        panels.append(Panel(title=name_of(editor), series=tuple(series)))
        shown += cells
    scores = _scores([*unedited, *shown], [metric], "task:")
    tasks = [slice_.removeprefix("task:") for slice_ in slices]
    name, title = ABILITY[metric]
    yield Figure(
        name=name,
        title=title,
        caption=_sentences(
            f"Weighted F1 on general tasks, in percent; {_protocols(scores)}; "
            f"{_counted(scores)} records a task.",
            "Lines through the dots: 95 % bootstrap intervals over records. The black line is the unedited "
            "model, the grey its interval. The horizontal axis runs from 0 to 100.",
            _setting(content, shown),
            _absent([*unedited, *(row for rows in content.cells.values() for row in rows)], slices[0]),
        ),
        draw=partial(_draw_dots, tuple(panels), tuple(TASK_NAMES.get(task, task) for task in tasks)),
    )


def _ability_cells(rows: Sequence[Row]) -> Sequence[Row]:
    """Baseline and +MM+R; all cells where one of these is missing."""
    usual = [row for row in rows if row.cell in ("baseline", "+MM+R")]
    return usual if len(usual) == 2 else rows


def _ratios(content: Content, editor: str) -> Iterator[Figure]:
    """Main metric per batch at several pruning ratios (figure 3 of the paper)."""
    merged = [row for row in content.shown(editor) if row.pruning_ratio is not None]
    if not merged:
        return
    first = merged[-1]  # +MM+R where there is one

    def setting(row: Row) -> tuple[object, ...]:
        return row.editor, row.cell, row.merger, row.router, row.top_k, row.encoder, row.chain

    rows = [row for row in content.rows if setting(row) == setting(first)]
    if len(rows) < 2 or not _scores(rows, [content.metric], "batch:"):
        return
    rows.sort(key=lambda row: row.pruning_ratio or 0)
    whole = [
        _per_batch(content, row, f"{row.pruning_ratio:g}", style)
        for row, style in zip(rows, cycle(RATIO_STYLES), strict=False)
    ]
    widths = [point.high - point.low for one in whole for point in one.points]
    widest = max((width for width in widths if not math.isnan(width)), default=0)
    bare = [
        replace(one, points=tuple(map(_bare, one.points)), pooled=one.pooled and _bare(one.pooled))
        for one in whole
    ]
    yield from _line_figure(
        content,
        [Panel(title=f"{name_of(editor)} {first.cell}", series=tuple(bare))],
        name=f"ratios-{content.stems[editor]}",
        title=f"Figure 3: pruning ratios, {name_of(editor)} {first.cell}",
        caption=[
            f"{content.main} of each edit batch and of all batches, scored after the last one, by pruning "
            f"ratio; {_size(content, rows)} a batch.",
            _meaning(content, rows, [content.metric]),
            f"95 % intervals over cases, not drawn, are at most {widest:.1f} points wide." if widest else "",
        ],
        rows=[replace(first, pruning_ratio=None)],
        absent="",
        ticks=_batch_ticks(content.batches),
        labels=("Edit batch", f"{content.main} (%)"),
        legend_title="Pruning ratio",
    )


def _modules(content: Content, editor: str) -> Iterator[Figure]:
    """Main metric per batch of each cell (tables 5, 8 and 9 of the paper as a picture)."""
    rows = content.shown(editor)
    if not _scores(rows, [content.metric], "batch:"):
        return
    series = [_per_batch(content, row, row.cell, CELL_STYLES.get(row.cell, OTHER_CELL)) for row in rows]
    yield from _line_figure(
        content,
        [Panel(title=name_of(editor), series=tuple(series))],
        name=f"batches-{content.stems[editor]}",
        title=f"{content.main} per batch: {name_of(editor)}",
        caption=[
            f"{content.main} of each edit batch and of all batches, scored after the last one, by cell; "
            f"{_size(content, rows)} a batch.",
            _meaning(content, rows, [content.metric]),
            INTERVALS,
        ],
        rows=rows,
        absent=_absent(content.cells[editor]),
        ticks=_batch_ticks(content.batches),
        labels=("Edit batch", f"{content.main} (%)"),
    )


def _forgetting(content: Content, editor: str) -> Iterator[Figure]:
    """Main metric of every edit batch after every batch."""
    rows = content.shown(editor)
    if not _every_batch(rows):
        return
    matrices = {f"{name_of(editor)} {row.cell}": _history(content, row, content.metric)[1:] for row in rows}
    squares = tuple(_bare(point) for matrix in matrices.values() for line in matrix for point in line)
    if not any(point.known for point in squares):
        return
    limits = _limits([Series(label="", style=OTHER_CELL, points=squares)])
    yield Figure(
        name=f"forgetting-{content.stems[editor]}",
        title=f"Forgetting matrix: {name_of(editor)}",
        caption=_sentences(
            f"{content.main} of an edit batch (row) in the model after each batch (column), in percent: on "
            "the diagonal right after its edit, in the last column at the end of the run; "
            f"{_size(content, rows)} a square. Colours run from {limits[0]} to {limits[1]}.",
            _meaning(content, rows, [content.metric]),
            _setting(content, rows),
            _absent(content.cells[editor]),
        ),
        draw=partial(_draw_matrices, matrices, limits, f"{content.main} (%)"),
    )


def _retention(content: Content, editor: str) -> Iterator[Figure]:
    """Every main metric by how many batches were applied since the edit."""
    rows = content.shown(editor)
    if not _every_batch(rows):
        return
    last = content.batches - 1
    yield from _line_figure(
        content,
        [
            Panel(
                title=title,
                series=tuple(_of_cell(row, _retained(_history(content, row, metric)[1:])) for row in rows),
            )
            for metric, title in content.columns.items()
        ],
        name=f"retention-{content.stems[editor]}",
        title=f"Retention: {name_of(editor)}",
        caption=[
            "Metrics of an edit batch by the number of batches applied since its edit: plain means over "
            f"batches, {content.batches} of them at 0 and one fewer at each step, at {last} only the first. "
            "The last points so rest on few records, those of the first batches; no interval is drawn.",
            _meaning(content, rows, list(content.columns)),
        ],
        rows=rows,
        absent=_absent(content.cells[editor]),
        ticks={number: str(number) for number in _thinned(range(content.batches), 6)},
        labels=("Batches since the edit", "Percent"),
        start=0,
        legend_title=name_of(editor),
    )


def _progress(content: Content, editor: str) -> Iterator[Figure]:
    """Main metric of all edits so far, after every batch."""
    rows = content.shown(editor)
    if not _every_batch(rows):
        return
    numbers = _thinned(range(1, content.batches + 1), 5)
    yield from _line_figure(
        content,
        [
            Panel(
                title=name_of(editor),
                series=tuple(_of_cell(row, _history(content, row, content.metric)[0]) for row in rows),
            )
        ],
        name=f"progress-{content.stems[editor]}",
        title=f"{content.main} of all edits so far: {name_of(editor)}",
        caption=[
            f"{content.main} of all records edited so far, pooled, after every batch, by cell; "
            f"{_size(content, rows)} a batch.",
            _meaning(content, rows, [content.metric]),
            INTERVALS,
        ],
        rows=rows,
        absent=_absent(content.cells[editor]),
        ticks={number: f"{number * content.batch_size:,}" for number in numbers},
        labels=("Edits applied", f"{content.main} (%)"),
    )


def _batch_ticks(batches: int) -> dict[float, str]:
    return {number: f"@{number}" for number in _thinned(range(1, batches + 1), 8)}


def _line_figure(
    content: Content,
    panels: Sequence[Panel],
    *,
    name: str,
    title: str,
    caption: Sequence[str],
    rows: Iterable[Row],
    absent: str,
    ticks: Mapping[float, str],
    labels: tuple[str, str],
    start: int = 1,
    legend_title: str | None = None,
) -> Iterator[Figure]:
    """Lines of a run; no figure where no value is known."""
    if any(one.known for panel in panels for one in panel.series):
        yield _on_one_scale(
            panels,
            name=name,
            title=title,
            caption=caption,
            more=(_setting(content, rows), absent),
            ticks=ticks,
            labels=labels,
            start=start,
            legend_title=legend_title,
        )


def batches_figure(panels: Sequence[Panel], *, name: str, title: str, caption: str, label: str) -> Figure:
    """A line per series from the first batch on, panels on one scale, which the caption states.

    label: of the vertical axis. Raises ValueError where no value is known.
    """
    series = [one for panel in panels for one in panel.series]
    if not any(one.known for one in series):
        raise ValueError("no batch has a value; give at least one")
    ticks = _batch_ticks(max(len(one.points) for one in series))
    labels = ("Edit batch", label)
    return _on_one_scale(panels, name=name, title=title, caption=[caption], ticks=ticks, labels=labels)


def _on_one_scale(
    panels: Sequence[Panel],
    *,
    name: str,
    title: str,
    caption: Sequence[str],
    more: Sequence[str] = (),
    ticks: Mapping[float, str],
    labels: tuple[str, str],
    start: int = 1,
    legend_title: str | None = None,
) -> Figure:
    """Lines on one scale, whose range stands in the caption before what it says more."""
    limits = _limits(one for panel in panels for one in panel.series)
    axis = f"The vertical axis runs from {limits[0]} to {limits[1]}."
    return Figure(
        name=name,
        title=title,
        caption=_sentences(*caption, axis, *more),
        draw=partial(
            _draw_lines,
            panels,
            limits=limits,
            ticks=ticks,
            labels=labels,
            start=start,
            legend_title=legend_title,
        ),
    )


# Drawing


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib's own settings with ours, whatever the user's are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def _grid(count: int, *, wide: int) -> tuple[int, int]:
    """(rows, columns) for so many panels, at most `wide` in a row."""
    rows = -(-count // wide)
    return rows, -(-count // rows)


def _legend(figure: matplotlib.figure.Figure, series: Iterable[Series], title: str | None = None) -> None:
    """One above all panels, in as many columns as fit; series of one label share an entry."""
    from matplotlib.lines import Line2D

    keys: dict[str, Line2D] = {}
    for one in series:
        colour, marker = one.style
        look: dict[str, Any] = {"marker": marker, "linestyle": "-"}
        if not one.known:
            look = {"linestyle": "none"}
        elif marker == "|":
            look = {"marker": marker, "linestyle": "none", "markersize": 9, "markeredgewidth": 1.6}
        keys.setdefault(one.legend, Line2D([], [], color=colour, **look))
    widths = [0.4 + 0.07 * len(label) for label in keys]  # inches, about
    room = figure.get_figwidth()
    columns = len(keys) if sum(widths) <= room else max(int(room // max(widths)), 1)
    figure.legend(list(keys.values()), list(keys), loc="outside upper center", ncols=columns, title=title)


def _draw_dots(panels: Sequence[Panel], tasks: Sequence[str]) -> matplotlib.figure.Figure:
    """A panel per editor: tasks downwards, a dot with its interval per cell."""
    from matplotlib.figure import Figure as Canvas

    rows, columns = _grid(len(panels), wide=4)
    most = max(len(panel.series) for panel in panels)
    height = rows * (0.42 + len(tasks) * (0.08 + 0.06 * most)) + 0.55
    with _settings():
        figure = Canvas(figsize=(COLUMN if columns == 1 else TEXT, height), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.08}).flat
        for number, (axes, panel) in enumerate(zip_longest(places, panels)):
            if panel is None:
                axes.remove()
                continue
            _dots(axes, panel)
            axes.set_title(panel.title)
            axes.set(xlim=(0, 100), xticks=(0, 50, 100) if columns > 2 else (0, 25, 50, 75, 100))
            axes.set_ylim(len(tasks) - 0.5, -0.5)
            axes.set_yticks(range(len(tasks)), tasks if number % columns == 0 else [""] * len(tasks))
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.grid(axis="y", visible=False)
            if number + columns >= len(panels):
                axes.set_xlabel("Weighted F1 (%)")
        order = [*CELL_STYLES]
        known = [one for panel in panels for one in panel.series if one.known]
        known.sort(key=lambda one: order.index(one.label) if one.label in order else len(order))
        _legend(figure, known)
    return figure


def _dots(axes: matplotlib.axes.Axes, panel: Panel) -> None:
    """The unedited model as a line across each task, every other cell as dots at a height of their own."""
    cells = [one for one in panel.series if one.label != "unedited"]
    for one in panel.series:
        colour, marker = one.style
        values = [point.value for point in one.points]
        lows, highs = [point.low for point in one.points], [point.high for point in one.points]
        if one.label == "unedited":
            tasks = range(len(values))
            widths = [high - low for low, high in zip(lows, highs, strict=True)]
            axes.barh(tasks, widths, 0.84, lows, color="0.87", zorder=1)
            tops, bottoms = [task - 0.42 for task in tasks], [task + 0.42 for task in tasks]
            axes.vlines(values, tops, bottoms, color=colour, linewidth=1.2, zorder=2, label=one.label)
            continue
        offset = (cells.index(one) + 0.5) / len(cells) * 0.7 - 0.35
        heights = [task + offset for task in range(len(values))]
        axes.hlines(heights, lows, highs, color=colour, linewidth=1.2, zorder=3)
        axes.plot(values, heights, color=colour, marker=marker, linestyle="none", zorder=4, label=one.label)
        for height, point in zip(heights, one.points, strict=True):
            if not point.known:
                axes.text(1, height, point.state, color=colour, va="center", fontsize=7)


def _draw_lines(
    panels: Sequence[Panel],
    *,
    limits: tuple[int, int],
    ticks: Mapping[float, str],
    labels: tuple[str, str],
    start: int,
    legend_title: str | None,
) -> matplotlib.figure.Figure:
    """Panels on one scale, a line per series from `start`; what is pooled stands to its right."""
    from matplotlib.figure import Figure as Canvas

    rows, columns = _grid(len(panels), wide=4)
    size = (COLUMN, 2.5) if len(panels) == 1 else (TEXT, 1.75 * rows + 0.7)
    low, high = limits
    margin = 0.03 * (high - low)
    with _settings():
        figure = Canvas(figsize=size, layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flat
        for number, (axes, panel) in enumerate(zip_longest(places, panels)):
            if panel is None:
                axes.remove()
                continue
            pooled = _lines(axes, panel, start)
            shown = ticks if pooled is None else {**ticks, pooled: "all"}
            axes.set_title(panel.title)
            axes.set_xticks(list(shown), list(shown.values()))
            axes.set_ylim(low - margin, high + margin)
            axes.set_yticks(range(low, high + 1, 20 if high - low > 60 else 10))
            axes.tick_params(axis="y", labelleft=number % columns == 0)
            if number % columns == 0:
                axes.set_ylabel(labels[1])
            if number + columns >= len(panels):
                axes.set_xlabel(labels[0])
        _legend(figure, panels[0].series, legend_title)
    return figure


def _lines(axes: matplotlib.axes.Axes, panel: Panel, start: int) -> float | None:
    """The panel's lines with their bands; where the pooled values stand, if there are any."""
    known = [one for one in panel.series if one.known]
    count = max(len(one.points) for one in panel.series)
    x = range(start, start + count)
    place, apart = start + 1.1 * count, 0.025 * count
    for index, one in enumerate(known):
        colour, marker = one.style
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4 if count <= 15 else 2.5}
        lows, highs = [point.low for point in one.points], [point.high for point in one.points]
        axes.fill_between(x, lows, highs, color=colour, alpha=0.13, linewidth=0, zorder=2)
        axes.plot(x, [point.value for point in one.points], clip_on=False, zorder=3, label=one.label, **look)
        if one.pooled is not None and one.pooled.known:
            at = place + apart * (index - (len(known) - 1) / 2)
            axes.vlines(at, one.pooled.low, one.pooled.high, color=colour, linewidth=1.2, zorder=3)
            axes.plot(at, one.pooled.value, zorder=4, label=f"_{one.label}, all", **look)
    return place if any(one.pooled is not None and one.pooled.known for one in known) else None


def _draw_matrices(
    matrices: Mapping[str, Matrix], limits: tuple[int, int], label: str
) -> matplotlib.figure.Figure:
    """A panel per cell, edit batches downwards, the batches after which they were scored to the right."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure as Canvas

    count = max(map(len, matrices.values()))
    rows, columns = _grid(len(matrices), wide=4 if count <= 6 else 2)
    width = COLUMN if columns == 1 and count <= 10 else TEXT
    side = min((width - 0.75 - 0.4 * columns) / columns / count, 0.4)  # of a square, inches
    colours = ScalarMappable(Normalize(*limits), colormaps["viridis"].resampled(64))
    with _settings():
        figure = Canvas(figsize=(width, rows * (side * count + 0.6)), layout="compressed")
        places = figure.subplots(rows, columns, squeeze=False).flat
        for number, (axes, item) in enumerate(zip_longest(places, matrices.items())):
            if item is None:
                axes.remove()
                continue
            known = _squares(axes, item[1], colours, size=min(72 * side * 0.42, 8))
            axes.set_title(item[0])
            if known and number % columns == 0:
                axes.set_ylabel("Edit batch")
            if known and number + columns >= len(matrices):
                axes.set_xlabel("Scored after batch")
        bar = figure.colorbar(colours, ax=figure.axes, label=label, aspect=30, fraction=0.05, pad=0.02)
        bar.set_ticks(range(limits[0], limits[1] + 1, 10))
        bar.outline.set_visible(False)
        for solid in bar.ax.collections:  # its colours as shapes, not as an image
            solid.set(rasterized=False, edgecolor="face")
    return figure


def _squares(axes: matplotlib.axes.Axes, matrix: Matrix, colours: Any, *, size: float) -> bool:
    """One matrix with its numbers, as far as they are legible at that size in pt; whether it has any."""
    count = len(matrix)
    ends = (0.5, count + 0.5)
    axes.set(xlim=ends, ylim=ends[::-1], aspect="equal")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, pad=1.5)
    if not any(point.known for line in matrix for point in line):
        axes.set(xticks=(), yticks=())
        axes.text(sum(ends) / 2, sum(ends) / 2, matrix[0][0].state, ha="center", va="center", color="0.4")
        return False
    ticks = _thinned(range(1, count + 1), 10)
    axes.set(xticks=ticks, yticks=ticks)
    edges = [0.5 + number for number in range(count + 1)]
    values = [[point.value for point in line] for line in matrix]
    look: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5 if size >= SMALLEST else 0.2}
    axes.pcolormesh(edges, edges, values, cmap=colours.cmap, norm=colours.norm, **look)
    for batch, line in enumerate(matrix, start=1):
        for after, point in enumerate(line[batch - 1 :], start=batch):
            if size >= SMALLEST or not point.known:
                text = f"{point.value:.0f}" if point.known else point.state
                colour = _legible(colours.to_rgba(point.value)) if point.known else "0.4"
                axes.text(after, batch, text, color=colour, fontsize=size, ha="center", va="center")
    return True


def _legible(background: Sequence[float]) -> str:
    """Black or white, whichever contrasts more (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "white"


def reliability_figure(calibrations: Mapping[str, Calibration]) -> Figure:
    """Where probes should go against what the routers' scores say, a line per router by name.

    Raises ValueError where there is no router.
    """
    if not calibrations:
        raise ValueError("no router has scores of probes; give at least one")
    errors = "; ".join(f"{name} {found.error:.3f}" for name, found in calibrations.items())
    counts = sorted({found.count for found in calibrations.values()})
    return Figure(
        name="reliability",
        title="Reliability of the routers' scores",
        caption=_sentences(
            "Share of probes that should go to the edited model against the probability that the score says, "
            "in bins of equal width; on the dashed line both agree, below it the edited model is chosen "
            "more surely than it should be.",
            "Below: share of the probes in each bin.",
            f"Expected calibration error: {errors}.",
            f"{' to '.join(f'{count:,}' for count in counts[:: max(len(counts) - 1, 1)])} probes.",
        ),
        draw=partial(_draw_reliability, calibrations),
    )


def _draw_reliability(calibrations: Mapping[str, Calibration]) -> matplotlib.figure.Figure:
    """Curves above, histograms below, on one scale of probabilities."""
    from matplotlib.figure import Figure as Canvas

    with _settings():
        figure = Canvas(figsize=(COLUMN, 3.6), layout="constrained")
        curves, counts = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
        curves.plot((0, 1), (0, 1), color="0.5", linestyle="--", linewidth=0.8, zorder=1)
        for (name, found), (colour, marker) in zip(calibrations.items(), cycle(RATIO_STYLES), strict=False):
            x = [one.predicted for one in found.bins]
            look: dict[str, Any] = {"color": colour, "marker": marker, "label": name, "clip_on": False}
            curves.plot(x, [one.observed for one in found.bins], zorder=3, **look)
            shares = [100 * one.count / found.count for one in found.bins]
            counts.vlines(x, 0, shares, color=colour, linewidth=1.2, zorder=2)
            counts.plot(x, shares, linestyle="none", zorder=3, **look)
        curves.set(xlim=(0, 1), ylim=(0, 1), ylabel="Should go to edited")
        ticks = {0: "0", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", 1: "1"}
        curves.set_xticks(list(ticks), list(ticks.values()))
        curves.set_yticks(list(ticks), list(ticks.values()))
        counts.set(ylim=(0, 100), yticks=(0, 50, 100), ylabel="Probes (%)")
        counts.set_xlabel("Probability of the edited model by the score")
        keys, labels = curves.get_legend_handles_labels()
        widest = 0.4 + 0.07 * max(map(len, labels))  # inches, about
        columns = max(min(len(labels), int(COLUMN // widest)), 1)
        figure.legend(keys, labels, loc="outside upper center", ncols=columns)
    return figure


def trade_off_figure(found: Mapping[tuple[str, str], Mapping[str, TradeOff]]) -> Figure:
    """What routers lose of one kind of probes to keep another, a panel a pair of kinds.

    found: (kind that should stay, kind that should go) -> router by name -> what it can do.
    Raises ValueError where there is no router.
    """
    if not any(found.values()):
        raise ValueError("no router has scores of the kinds; give at least one")
    return Figure(
        name="trade-offs",
        title="What routers lose to keep more",
        caption="Share of the probes of a kind that should go to the edited model and do, against that of a "
        "kind that should not and does, as the threshold on the router's score falls. Markers: where the "
        "router itself stands. Prompts are pooled. The upper left corner is right.",
        draw=partial(_draw_trade_offs, found),
    )


def _draw_trade_offs(found: Mapping[tuple[str, str], Mapping[str, TradeOff]]) -> matplotlib.figure.Figure:
    from matplotlib.figure import Figure as Canvas

    with _settings():
        figure = Canvas(figsize=(2 * COLUMN, 3.0), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        names = list(dict.fromkeys(name for routers in found.values() for name in routers))
        styles = dict(zip(names, cycle(RATIO_STYLES), strict=False))
        for axes, ((stay, go), routers) in zip(panels, found.items(), strict=True):
            for name, trade in routers.items():
                colour, marker = styles[name]
                x, y = ([100 * point[i] for point in trade.points] for i in (0, 1))
                axes.plot(x, y, color=colour, drawstyle="steps-post", zorder=2)
                at = [[100 * part] for part in trade.chosen]
                axes.plot(*at, color=colour, marker=marker, label=name, clip_on=False, zorder=3)
            axes.set(xlim=(0, 100), ylim=(0, 100))
            axes.set_xlabel(f"{KINDS[stay].title} sent to edited (%)")
            axes.set_ylabel(f"{KINDS[go].title} sent to edited (%)")
        known = [axes.get_legend_handles_labels() for axes in panels]
        keys = {label: key for pair in known for key, label in zip(*pair, strict=True)}
        figure.legend(list(keys.values()), list(keys), loc="outside upper center", ncols=min(len(keys), 6))
    return figure


# Files


def to_svg(figure: Figure) -> str:
    """An svg element to be put inline in HTML, with ids of its own; the same each time."""
    text = _saved(figure.draw(), "svg", figure.title).decode("utf-8")
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", text[text.index("<svg") :], flags=re.S)
    mark = f"{figure.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r"<[a-z][^>]*>", lambda tag: _marked(tag.group(), mark), text)
    # what the style element said for all elements, and would say for the others of the page
    return text.replace("<svg ", '<svg role="img" style="stroke-linejoin: round; stroke-linecap: butt" ', 1)


def _marked(tag: str, mark: str) -> str:
    """A tag whose id, and the ids that it refers to, begin with the mark."""
    return re.sub(r'(?<=[\s:])(id="|href="#)|(url\(#)', lambda found: f"{found.group()}{mark}", tag)


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write NAME.svg, NAME.pdf and NAME.png of each, every file in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        drawn = figure.draw()
        for kind in ("svg", "pdf", "png"):
            path = folder / f"{figure.name}.{kind}"
            temporary = folder / f".{path.name}.{os.getpid()}"
            try:
                temporary.write_bytes(_saved(drawn, kind, figure.title))
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            paths.append(path)
    return paths


def _saved(drawn: matplotlib.figure.Figure, kind: str, title: str) -> bytes:
    """The bytes of a file, without a date."""
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    buffer = BytesIO()
    with _settings():
        drawn.savefig(buffer, format=kind, dpi=300, metadata={"Title": title, **dates[kind]})
    return buffer.getvalue()
