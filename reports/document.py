"""Whole reports: the tables in the paper's layout over all runs, then run after run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reports.cells import Table
from reports.drilldown import drilldown_html
from reports.figures import MISSING_NOTE, Figure, available, figures_of, reliability_figure, trade_off_figure
from reports.load import Run
from reports.notes import describe, text_of, warnings_of
from reports.paper import layouts
from reports.probes import (
    Calibration,
    calibration,
    calibration_table,
    confusion_table,
    probe_tables,
    probes_by_router,
    trade_offs,
)
from reports.seeds import Pool, pools_of
from reports.tables import Report, run_tables
from reports.verdicts import summary_table, verdict_table, verdicts

Probed = Mapping[str, Sequence[Mapping[str, Any]]]  # router by name -> the probes as it decided them


def build_reports(
    runs: Sequence[Run],
    *,
    paper: bool = False,
    digits: int = 1,
    figures: bool | None = None,
    cases: bool = False,
) -> list[Report]:
    """The parts of a document: the paper's layout first, then each run.

    paper: put the published figures beside ours; figures: with them (None: where they can be drawn; True:
    ValueError where they cannot); cases: with the cases behind the values, and links to them.
    """
    if figures and not available():
        raise ValueError(MISSING_NOTE)
    drawn = available() if figures is None else figures
    pages: dict[str, str] = {}
    if cases:
        for run in runs:
            pages.setdefault(run.records[0].run_id, drilldown_html(run))
    linked = {run_id for run_id, page in pages.items() if page}
    pools = pools_of({run.path.resolve(): run for run in runs}.values(), linked=linked)
    folders = _folders(runs)
    parts = [
        Report(
            title="Tables in the paper's layout",
            facts=tuple(_facts(pools)),
            warnings=(MISSING_NOTE,) if figures is None and not drawn else (),
            tables=tuple(_paper_tables(pools, paper=paper, digits=digits)),
        )
    ]
    for run, folder in zip(runs, folders, strict=True):
        probed = probes_by_router(run)
        (alone,) = pools_of([run], linked=linked)
        parts.append(
            Report(
                title=run.name,
                facts=tuple(describe(run)),
                warnings=tuple(warnings_of(run)),
                tables=(*run_tables(run, alone.rows, digits=digits), *_probe_tables(alone, probed, digits)),
                figures=(*figures_of(run), *_probe_figures(probed)) if drawn else (),
                folder=folder,
                cases=pages.pop(run.records[0].run_id, ""),
            )
        )
    return parts


def _probe_tables(pool: Pool, found: Probed, digits: int) -> list[Table]:
    """What the routers did with probes, and how sure they were."""
    confusions = [confusion_table(rows, name=name, digits=digits) for name, rows in found.items()]
    tables = [*probe_tables(pool.rows, digits=digits), *(table for table in confusions if table is not None)]
    scored = _calibrations(found)
    return [*tables, calibration_table(scored)] if scored else tables


def _probe_figures(found: Probed) -> list[Figure]:
    scored = _calibrations(found)
    figures = [reliability_figure(scored)] if scored else []
    trades = trade_offs(found)
    return [*figures, trade_off_figure(trades)] if trades else figures


def _calibrations(found: Probed) -> dict[str, Calibration]:
    measured = {name: calibration(rows) for name, rows in found.items()}
    return {name: one for name, one in measured.items() if one is not None}


def _paper_tables(pools: Sequence[Pool], *, paper: bool, digits: int) -> list[Table]:
    """By number; the published figures stand behind the last table of theirs."""
    found = layouts(pools, digits=digits)
    if not paper:
        return [layout.table for layout in found]
    given = verdicts(pools, {number for layout in found for number in layout.numbers})
    places = {number: layout.place for layout in found for number in layout.numbers}
    ranked = [(layout.place, layout.table) for layout in found]
    for number in range(1, 10):
        table = verdict_table(number, given)
        if table is not None:
            ranked.append((places.get(number, number), table))
    ranked.sort(key=lambda item: item[0])
    summary = summary_table(given)
    return [table for _, table in ranked] + ([summary] if summary is not None else [])


def _facts(pools: Sequence[Pool]) -> list[tuple[str, str]]:
    """Which runs the tables are of."""
    facts = []
    for pool in pools:
        if len(pool.runs) > 1:
            listed = ", ".join(
                f"{run.name} (seed {text_of(seed)})" for run, seed in zip(pool.runs, pool.seeds, strict=True)
            )
            facts.append(("Runs of one spec", listed))
        else:
            facts.append(("Run", pool.name))
    return facts


def _folders(runs: Sequence[Run]) -> list[str]:
    """A folder of its own for each run's figures; none where there is one run."""
    if len(runs) == 1:
        return [""]
    folders: list[str] = []
    for run in runs:
        name = plain = re.sub(r"[^A-Za-z0-9._-]+", "-", run.name)
        number = 2
        while name in folders:
            name, number = f"{plain}-{number}", number + 1
        folders.append(name)
    return folders
