from __future__ import annotations

import gzip

import pytest

from reports import document
from reports.document import build_reports
from reports.figures import MISSING_NOTE
from reports.render import to_html

CASE = (
    '{"weights": "memit", "edits_applied": 100, "case_id": 1, "batch": 1, "kind": "rewrite", "index": 0, '
    '"prompt": "The tower stands in", "nll_new": 1.0, "nll_true": 2.0, "argmax_new": true, '
    '"argmax_true": false}\n'
)


@pytest.fixture
def with_cases(record, make_run):
    """`with_cases(name)`: a run with the cases behind its scores."""

    def make(name="run"):
        records = [record(value=0.5, run_id=name), record("memit", "+R", 0.6, run_id=name)]
        run = make_run(records, name=name)
        with gzip.open(run.path / "cases.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(CASE)
        return run

    return make


def titles(report):
    return [table.title.split(":")[0] for table in report.tables]


def links(report):
    return [cell.link for table in report.tables for row in table.rows for cell in row if cell.link]


def test_the_papers_layout_first_then_each_run(ablation, make_run):
    runs = [make_run(ablation, name=name) for name in ("a", "b")]
    reports = build_reports(runs, figures=False)
    assert [report.title for report in reports] == ["Tables in the paper's layout", "a", "b"]
    assert set(titles(reports[0])) == {"Table 1", "Tables 5 and 9", "Table 6", "Table 8"}
    assert titles(reports[1]) == ["Results in percent", "Differences to the baseline cell, in points"]
    assert reports[0].facts == (("Run", "a"), ("Run", "b"))


def test_published_figures_stand_behind_their_table(record, make_run):
    fields = {"model": "llama3-8b", "dataset": "counterfact", "edits_applied": 2000}
    run = make_run(
        [record(value=0.8, **fields)], spec={"batch_size": 200, "num_batches": 10, "select": "first"}
    )
    (overview, _) = build_reports([run], paper=True, figures=False)
    assert titles(overview) == [
        "Table 1",
        "Table 1 of the paper beside ours",
        "Tables 5 and 9",
        "Table 9 of the paper beside ours",
        "The paper's figures",
    ]


def test_values_lead_to_the_cases_where_a_page_has_them(with_cases, record, make_run):
    run, bare = with_cases(), make_run([record(value=0.5, run_id="bare")], name="bare")
    overview, own, other = build_reports([run, bare], figures=False, cases=True)
    assert own.cases and not other.cases and not links(other)
    assert all("run_id=run" in link for link in links(overview)) and links(overview)
    assert any("cell=%2BR" in link and "metric=score" in link for link in links(own))
    page = to_html([overview, own, other])
    assert page.count(own.cases) == 1 and links(own)[0].replace("&", "&amp;") in page


def test_without_cases_there_is_no_dataset_text(with_cases):
    reports = build_reports([with_cases()], figures=False)
    assert not any(links(report) or report.cases for report in reports)
    page = to_html(reports)
    assert "<script" not in page and "<a " not in page and "tower" not in page


def test_a_run_given_twice_has_its_cases_once(with_cases):
    run = with_cases()
    overview, first, second = build_reports([run, run], figures=False, cases=True)
    assert first.cases and not second.cases
    assert overview.facts == (("Run", "run"),)


def test_pooled_values_lead_nowhere(record, make_run, with_cases):
    runs = []
    for seed in (0, 1):
        run = with_cases(f"s{seed}")
        records = tuple(record(value=0.5 + seed / 10, seed=seed, run_id=f"s{seed}") for _ in (0,))
        info = {"spec": {"seed": seed, "batch_size": 50, "num_batches": 2}}
        runs.append(type(run)(path=run.path, info=info, records=records))
    overview, *own = build_reports(runs, figures=False, cases=True)
    assert overview.facts == (("Runs of one spec", "s0 (seed 0), s1 (seed 1)"),)
    assert not links(overview) and all(links(report) for report in own)


def test_figures_are_left_out_with_a_note_where_they_cannot_be_drawn(ablation, make_run, monkeypatch):
    monkeypatch.setattr(document, "available", lambda: False)
    run = make_run(ablation)
    overview, own = build_reports([run])
    assert overview.warnings == (MISSING_NOTE,) and own.figures == ()
    assert build_reports([run], figures=False)[0].warnings == ()
    with pytest.raises(ValueError, match="matplotlib"):
        build_reports([run], figures=True)


def test_each_of_several_runs_has_a_folder_for_its_figures(ablation, make_run):
    runs = [make_run(ablation, name=name) for name in ("a b", "a-b")]
    assert [report.folder for report in build_reports(runs, figures=False)] == ["", "a-b", "a-b-2"]
    assert build_reports(runs[:1], figures=False)[1].folder == ""
