"""The tables of general ability: a row per cell, a column per task, in each format."""

from collections.abc import Callable
from typing import Any

import pytest

from reports.load import Run
from reports.record import Record, Score
from reports.render import RENDERERS
from reports.rows import rows_of
from reports.tables import ability_tables, build_report

Maker = Callable[..., Any]


@pytest.fixture
def run(record: Maker, score: Maker, make_run: Callable[..., Run]) -> Run:
    """Unedited, baseline and a routed cell on two tasks; one merged cell failed."""

    def scores(value: float, difference: float | None, *more: Score) -> tuple[Score, ...]:
        near = {}
        if difference is not None:
            near = {
                "difference": difference,
                "difference_low": difference - 0.01,
                "difference_high": difference + 0.01,
            }
        choices = {"protocol": "log_probability"}
        return (
            score("f1_weighted", value, **choices, **near),
            score("gold_margin", -0.1234, **choices, **near),
            score("agreement", 0.9, **choices),
            *more,
        )

    records: list[Record] = []
    generated = score("f1_generated", 0.4, protocol="generated")
    route = score("route_task", 0.07, protocol="routing")
    for task in ("task:seqmmr_sst", "task:towns"):
        own = (generated,) if task == "task:seqmmr_sst" else ()
        records += [
            record("none", "unedited", slice=task, scores=scores(0.5, None, *own)),
            record("memit", "baseline", slice=task, scores=scores(0.45, -0.05, *own)),
            record("memit", "+MM", slice=task, error="RuntimeError: out of memory"),
            record("memit", "+R", slice=task, scores=scores(0.5, 0.0, *own, route)),
        ]
    overall = [record("none", "unedited", 0.3), record("memit", "baseline", 0.8), record("memit", "+R", 0.8)]
    return make_run([*overall, *records], spec={"capability": ["seqmmr_sst", "towns"]})


def texts(table: Any) -> list[list[str]]:
    return [[f"{c.text} {c.interval} {c.difference}".strip() for c in row] for row in table.rows]


def test_each_metric_has_a_table(run: Run) -> None:
    tables = {table.title.split(": ")[1].split(",")[0]: table for table in ability_tables(rows_of(run))}
    assert list(tables) == [
        "weighted F1 of the likelier answer",
        "weighted F1 of the generated answer",
        "log-probability of the right answer less that of the best other",
        "answers equal to those of the unedited model",
        "records that the router sends to the edited model",
    ]
    first, written, margin, agreement, routed = tables.values()
    assert all(table.headers == ("Editor", "Cell", "SST", "towns") for table in tables.values())
    assert texts(first) == [
        ["", "unedited", "50.0 46.0, 53.0", "50.0 46.0, 53.0"],
        ["MEMIT", "baseline", "45.0 41.0, 48.0 -5.0", "45.0 41.0, 48.0 -5.0"],
        ["MEMIT", "+MM", "failed", "failed"],
        ["MEMIT", "+R", "50.0 46.0, 53.0 +0.0", "50.0 46.0, 53.0 +0.0"],
    ]
    assert first.groups == (1,)
    assert "100 a task" in first.notes[0]
    assert "points to the unedited model" in first.notes[0]
    assert texts(written)[1] == ["MEMIT", "baseline", "40.0", "–"]
    assert texts(margin)[1] == ["MEMIT", "baseline", "-0.12  -0.05", "-0.12  -0.05"]
    assert "nats" in margin.notes[0]
    assert texts(agreement)[0] == ["", "unedited", "90.0", "90.0"]
    assert texts(routed) == [
        ["MEMIT", "+MM", "failed", "failed"],
        ["MEMIT", "+R", "7.0", "7.0"],
    ]


def test_the_report_shows_them_in_every_format(run: Run) -> None:
    report = build_report(run)
    assert ("General tasks", "seqmmr_sst, towns") in report.facts
    assert "+MM: RuntimeError: out of memory" in " ".join(report.tables[0].notes)
    for render in RENDERERS.values():
        text = render([report], None)
        assert "General ability" in text
        assert "46.0, 53.0" in text
        assert "SST" in text


def test_a_run_without_tasks_has_no_such_table(make_run: Callable[..., Run], ablation: list[Record]) -> None:
    run = make_run(ablation, spec={"capability": []})
    assert ability_tables(rows_of(run)) == []
    assert "General tasks" not in dict(build_report(run).facts)
