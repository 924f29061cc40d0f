"""Every figure that the paper prints beside ours: it agrees, differs, or does not compare, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from reports.cells import Cell, Table, is_not_applicable, linked
from reports.costs import cost_scores
from reports.load import Run
from reports.names import PAPER_MERGER, PAPER_ROUTER, UNRELATED_ROUTES, name_of
from reports.notes import text_of
from reports.published import (
    Printed,
    notes_beside,
    paper_dataset,
    paper_model,
    printed_figures,
    weights_of,
)
from reports.record import Score
from reports.rows import Row
from reports.seeds import Pool, interval_over

TIMED_ON = "RTX A6000"  # the paper's GPU, of table 7

PROTOCOLS = {
    "probability": "by the mean log-probability per token of the two answers",
    "teacher_forced": "by the share of answer tokens predicted under teacher forcing",
    "generated": "on sampled texts",
    "routing": "by the router's decisions",
    "timing": "by the clock",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One printed figure and ours, or why there is none."""

    printed: Printed
    pool: Pool
    row: Row | None = None
    ours: Score | None = None  # in the paper's unit
    reason: str = ""  # why it does not compare; empty where it does

    @property
    def difference(self) -> float:
        """Ours less the printed one, in the paper's unit."""
        assert self.ours is not None
        return self.ours.value - self.printed.value

    @property
    def agrees(self) -> bool:
        """Whether the printed figure, as far as it is rounded, may lie in our interval."""
        assert self.ours is not None
        low, high = self.ours.low, self.ours.high
        low, high = (self.ours.value if end is None else end for end in (low, high))
        half = 0.5 / 10.0**self.printed.places + 1e-9
        return low - half <= self.printed.value <= high + half


def verdicts(pools: Sequence[Pool], numbers: Iterable[int]) -> list[Verdict]:
    """A verdict on every figure of some tables, and of any table with the setting of one of the runs."""
    shown = set(numbers)
    shown |= {p.table for p in printed_figures() for pool in pools if p.edits and not _mismatch(p, pool)}
    found: list[Verdict] = []
    for printed in printed_figures():
        if printed.table in shown:
            found += _judged(printed, pools)
    return found


def verdict_table(number: int, given: Sequence[Verdict]) -> Table | None:
    """The figures of one table that compare; None where none does."""
    compared = [v for v in given if v.printed.table == number and not v.reason]
    if not compared:
        return None
    pools = list({id(v.pool): v.pool for v in compared}.values())
    lines: list[tuple[Cell, ...]] = []
    starts: list[int] = []
    before = ""
    for verdict in compared:
        if lines and verdict.printed.row != before:
            starts.append(len(lines))
        before = verdict.printed.row
        lines.append(_line(verdict, named=len(pools) > 1))
    agreeing = sum(verdict.agrees for verdict in compared)
    notes = [
        f"{agreeing} of {len(compared)} agree: the printed figure lies in our 95 % interval "
        f"{interval_over(pools)}. Difference: ours less the printed one. Unit as printed"
        + ("; fluency is in hundredths of a bit." if number == 1 else ".")
    ]
    for pool in pools:
        own = [verdict for verdict in compared if verdict.pool is pool]
        notes += [*_protocol(pool, own), *notes_beside(number, pool)]
    return Table(
        title=f"Table {number} of the paper beside ours",
        headers=("Printed row", "Column", "Printed", "Our row", "Ours", "Difference", "Verdict"),
        rows=tuple(lines),
        notes=tuple(dict.fromkeys(notes)),
        groups=tuple(starts),
    )


def summary_table(given: Sequence[Verdict]) -> Table | None:
    """How many figures of each table agree, differ or do not compare, and why not; None without verdicts."""
    if not given:
        return None
    lines, notes = [], []
    for number in sorted({verdict.printed.table for verdict in given}):
        own = [verdict for verdict in given if verdict.printed.table == number]
        printed = {verdict.printed for verdict in own}
        compared = {verdict.printed for verdict in own if not verdict.reason}
        agreeing = {verdict.printed for verdict in own if not verdict.reason and verdict.agrees}
        counts = (len(printed), len(agreeing), len(compared) - len(agreeing), len(printed) - len(compared))
        lines.append(tuple(Cell(text=str(count)) for count in (number, *counts)))
        reasons: dict[str, list[str]] = {}
        for verdict in own:
            if verdict.reason:
                reasons.setdefault(verdict.reason, []).append(verdict.printed.row)
        for reason, rows in reasons.items():
            which = "" if len(rows) == len(printed) else f" ({', '.join(dict.fromkeys(rows))})"
            notes.append(f"Table {number}, {len(rows)} of {len(printed)} not comparable{which}: {reason}.")
    if len(given) > len({verdict.printed for verdict in given}):
        notes.insert(0, "A figure that may be several of our rows agrees where one of them does.")
    if 9 in {verdict.printed.table for verdict in given}:
        notes.insert(0, "Table 5 of the paper is a short form of its table 9.")
    return Table(
        title="The paper's figures",
        headers=("Table", "Printed", "Agree", "Differ", "Not comparable"),
        rows=tuple(lines),
        notes=tuple(notes),
    )


# Finding ours


def _judged(printed: Printed, pools: Sequence[Pool]) -> Iterator[Verdict]:
    """One verdict for every row of ours that the figure may be, else one that says why there is none."""
    apart = {id(pool): _mismatch(printed, pool) for pool in pools}
    nearest = min(len(reasons) for reasons in apart.values())
    near = [pool for pool in pools if len(apart[id(pool)]) == nearest]
    if nearest:
        reason = f"other {', '.join(apart[id(near[0])])}"
        yield Verdict(printed=printed, pool=near[0], reason=_of_run(reason, near[0], pools))
        return
    tried = [verdict for pool in near for verdict in _tried(printed, pool)]
    compared = [verdict for verdict in tried if not verdict.reason]
    yield from compared or [replace(tried[0], reason=_of_run(tried[0].reason, tried[0].pool, pools))]


def _of_run(reason: str, pool: Pool, pools: Sequence[Pool]) -> str:
    return f"{pool.name}: {reason}" if len(pools) > 1 else reason


def _mismatch(printed: Printed, pool: Pool) -> list[str]:
    """In what a run is not that of a printed figure."""
    sides = {
        "model": (printed.model, paper_model(pool), pool.model),
        "dataset": (printed.dataset, paper_dataset(pool), pool.dataset),
        "batch size": (printed.batch_size, pool.batch_size, pool.batch_size),
        "number of edits": (printed.edits, pool.edits, pool.edits),
    }
    reasons = []
    for what, (theirs, ours, said) in sides.items():
        if theirs is not None and theirs != ours:
            reasons.append(f"{what} ({_number(theirs)}; here {_number(said)})")
    return reasons


def _tried(printed: Printed, pool: Pool) -> Iterator[Verdict]:
    """One verdict for every row that has the figure's editor and cell."""
    rows = [row for row in pool.rows if _is_row(printed, row)]
    fitting = [row for row in rows if _has_setting(printed, row)]
    if not fitting:
        yield Verdict(printed=printed, pool=pool, reason=_other_setting(printed, rows) or "not run")
    seen = []
    for row in fitting:
        verdict = _compared(printed, pool, row)
        if printed.table == 6:  # one figure, whatever cells the router serves
            if (row.encoder, verdict.ours, verdict.reason) in seen:
                continue
            seen.append((row.encoder, verdict.ours, verdict.reason))
        yield verdict


def _is_row(printed: Printed, row: Row) -> bool:
    if printed.table == 6:
        return row.is_routed
    return row.editor in printed.editors and row.cell == printed.cell


def _has_setting(printed: Printed, row: Row) -> bool:
    return all(
        theirs is None or ours is None or theirs == ours
        for theirs, ours in (
            (PAPER_MERGER, row.merger),
            (printed.pruning_ratio, row.pruning_ratio),
            (PAPER_ROUTER, row.router),
            (printed.top_k, row.top_k),
        )
    )


def _other_setting(printed: Printed, rows: Sequence[Row]) -> str:
    """The settings of rows that are not the figure's; empty where there are no rows."""
    reasons = []
    for name, theirs in (("merger", PAPER_MERGER), ("router", PAPER_ROUTER)):
        ours = [value for row in rows if (value := getattr(row, name)) is not None]
        if ours and theirs not in ours:
            reasons.append(f"{name} (here {text_of(list(dict.fromkeys(ours)))})")
    for what, name in (("pruning ratio", "pruning_ratio"), ("top-k", "top_k")):
        theirs = getattr(printed, name)
        ours = list(dict.fromkeys(getattr(row, name) for row in rows))
        if rows and theirs is not None and theirs not in ours:
            there = "" if printed.table == 6 else f"{theirs}; "  # its rows are named so
            reasons.append(f"{what} ({there}here {text_of(ours)})")
    return f"other {', '.join(reasons)}" if reasons else ""


def _compared(printed: Printed, pool: Pool, row: Row) -> Verdict:
    verdict = Verdict(printed=printed, pool=pool, row=row)
    record = row.at(printed.slice)
    if record is None:
        return replace(verdict, reason="not scored")
    if record.error is not None:
        reason = "not applicable" if is_not_applicable(record.error) else "failed"
        return replace(verdict, reason=reason)
    if printed.edits is not None and not row.is_unedited and record.edits_applied != printed.edits:
        return replace(verdict, reason=f"not finished, {record.edits_applied:,} of {printed.edits:,} edits")
    if printed.table == 7:
        if any(TIMED_ON not in _gpu(run) for run in pool.runs):
            return replace(verdict, reason=f"other machine ({TIMED_ON}; here {_machines(pool)})")
        score = cost_scores(pool, row).get(printed.metric)
    else:
        score = record.score(printed.metric)
    if score is None:
        return replace(verdict, reason=f"{printed.column} not measured")
    return replace(verdict, ours=_in_their_unit(score, printed))


def _in_their_unit(score: Score, printed: Printed) -> Score:
    ends = [score.value, score.low, score.high]
    if score.metric in UNRELATED_ROUTES:
        ends = [None if end is None else 1 - end for end in (score.value, score.high, score.low)]
    value, low, high = (None if end is None else end * printed.scale for end in ends)
    assert value is not None
    return replace(score, value=value, low=low, high=high)


def _gpu(run: Run) -> str:
    machine = run.provenance.get("machine")
    gpu = machine.get("gpu") if isinstance(machine, dict) else None
    return str(gpu or run.spec.get("device") or "unknown")


def _machines(pool: Pool) -> str:
    return " and ".join(dict.fromkeys(map(_gpu, pool.runs)))


# In words


def _line(verdict: Verdict, *, named: bool) -> tuple[Cell, ...]:
    printed, row, ours = verdict.printed, verdict.row, verdict.ours
    assert row is not None and ours is not None
    places = printed.places
    interval = f"{ours.low:.{places}f}, {ours.high:.{places}f}" if None not in (ours.low, ours.high) else ""
    name = f"{name_of(row.editor)} {row.label}".strip()
    if printed.table == 6:
        name = text_of(row.encoder)
    cell = Cell(text=f"{ours.value:.{places}f}", interval=interval)
    if printed.table != 7:  # costs are made of no cases
        cell = linked(cell, row, printed.slice, printed.metric)
    return (
        Cell(text=printed.row),
        Cell(text=printed.column),
        Cell(text=f"{printed.value:.{places}f}"),
        Cell(text=f"{name} ({verdict.pool.name})" if named else name),
        cell,
        Cell(text=f"{round(verdict.difference, places) + 0.0:+.{places}f}"),
        Cell(text="agrees" if verdict.agrees else "differs"),
    )


def _protocol(pool: Pool, compared: Sequence[Verdict]) -> list[str]:
    """How ours were measured."""
    spec, provenance = pool.runs[0].spec, pool.runs[0].provenance
    data = provenance.get("dataset")
    source = f" from {data['source']}" if isinstance(data, dict) and data.get("source") else ""
    seeds = ", ".join(map(str, pool.seeds))
    parts = [
        f"{pool.model} ({weights_of(pool)}, {text_of(spec.get('dtype'))})",
        f"{pool.dataset}{source}, selection {text_of(pool.select)}",
        f"{pool.edits:,} edits in batches of {text_of(pool.batch_size)}",
        f"seed{'s' if len(pool.seeds) > 1 else ''} {seeds}",
    ]
    rows = [verdict.row for verdict in compared if verdict.row is not None]
    if any(row.is_merged for row in rows):
        chains = sorted({row.chain for row in rows if row.chain})
        parts.append(f"merging {PAPER_MERGER}, chain {' and '.join(chains) or 'unknown'}")
    encoders = sorted({row.encoder for row in rows if row.encoder})
    if encoders:
        unrelated = provenance.get("negative_ids")
        count = f", unrelated texts from {len(unrelated):,} records" if isinstance(unrelated, list) else ""
        parts.append(f"router {PAPER_ROUTER}, encoder {' and '.join(encoders)}{count}")
    scored: dict[str, dict[str, list[int]]] = {}
    for verdict in compared:
        if verdict.ours is not None:
            per_cell = verdict.printed.table in (8, 9)  # their columns are cells
            name = verdict.printed.metric if per_cell else verdict.printed.column
            sizes = scored.setdefault(verdict.ours.protocol, {}).setdefault(name, [])
            sizes.append(verdict.ours.n)
    measured = [
        f"{', '.join(f'{column} of {_span(sizes)}' for column, sizes in columns.items())} "
        f"{PROTOCOLS.get(protocol, protocol)}"
        for protocol, columns in scored.items()
    ]
    return [f"{pool.name}: {'; '.join(parts)}.", f"Measured in {pool.name}: {'; '.join(measured)}."]


def _span(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else text_of(value)
