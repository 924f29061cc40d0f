from __future__ import annotations

import pytest

from reports.published import printed_figures
from reports.seeds import pools_of
from reports.verdicts import summary_table, verdict_table, verdicts

SPEC = {"batch_size": 200, "num_batches": 10, "select": "first", "seed": 0}
PAPER = {"model": "llama3-8b-instruct", "dataset": "counterfact", "edits_applied": 2000}


@pytest.fixture
def paper_run(record, make_run):
    """A constructed run of the paper's main setting: MEMIT's Score as given, 0.04 below to 0.03 above."""

    def make(value=0.80, name="run", records=(), spec=None, **fields):
        fields = PAPER | fields
        given = [record("memit", cell, value, **fields) for cell in ("baseline", "+MM", "+R", "+MM+R")]
        return make_run([*given, *records], name=name, spec=SPEC | (spec or {}))

    return make


def judge(*runs, numbers=(1,)):
    return verdicts(pools_of(runs), numbers)


def verdict(given, table, row, column):
    (found,) = (
        v for v in given if (v.printed.table, v.printed.row, v.printed.column) == (table, row, column)
    )
    return found


def test_every_figure_of_the_tables_shown_has_a_verdict(paper_run):
    given = judge(paper_run(), numbers=(1, 9))
    # the setting is also that of tables 6 and 8
    assert {v.printed for v in given} == {p for p in printed_figures() if p.table in (1, 6, 8, 9)}


def test_agrees_inside_the_interval_and_differs_outside(paper_run):
    given = judge(paper_run(0.80))  # interval 76 to 83
    inside = verdict(given, 1, "MEMIT", "score")
    assert (inside.printed.value, inside.reason, inside.agrees) == (78.37, "", True)
    assert inside.difference == pytest.approx(1.63)
    outside = verdict(given, 1, "MEMIT", "locality")
    assert (outside.printed.value, outside.agrees) == (64.02, False)
    assert outside.difference == pytest.approx(15.98)


def test_a_rounded_figure_agrees_with_what_rounds_to_it(paper_run, record, score):
    def judged(value):
        exact = score("score", value, low=value, high=value)
        run = paper_run(records=[record("none", "unedited", scores=(exact,), **PAPER)], name=f"{value}")
        return verdict(judge(run), 1, "Unedited", "score")

    assert judged(0.128749).agrees and not judged(0.128751).agrees  # 12.87 is printed


def test_knowedits_figures_are_those_of_table_2(record, score, make_run):
    fields = {"model": "llama3-8b", "dataset": "knowedit-zsre", "edits_applied": 1000}
    scores = (score("rewrite_acc", 0.71), score("portability_reasoning", 0.9))
    run = make_run([record(scores=scores, **fields)], spec={"batch_size": 100, "num_batches": 10})
    given = judge(run, numbers=())
    assert {v.printed.table for v in given} == {2}
    assert verdict(given, 2, "MEMIT", "rewrite_acc").agrees
    assert not verdict(given, 2, "MEMIT", "reasoning_acc").agrees
    assert "without base or instruct; this run has the base weights" in " ".join(
        verdict_table(2, given).notes
    )


def test_the_papers_units(paper_run, record, score):
    scores = (score("fluency", 6.1421, low=6.1, high=6.2),)
    run = paper_run(records=[record("memit-seq", scores=scores, **PAPER)])
    (found,) = (v for v in judge(run) if v.row and v.row.editor == "memit-seq" and not v.reason)
    assert (found.printed.value, found.agrees) == (614.21, True)


def test_routing_is_compared_by_its_complement(paper_run, record, score):
    routes = tuple(score(f"route_{kind}", 0.42) for kind in ("rewrite", "paraphrase", "neighborhood"))
    run = paper_run(records=[record("rect", "+R", scores=routes, **PAPER)])
    found = [v for v in judge(run) if v.printed.table == 6 and not v.reason]
    (kept,) = (v for v in found if v.printed.column == "neighborhood_prompt")
    assert kept.ours.value == pytest.approx(58) and kept.agrees
    assert (kept.ours.low, kept.ours.high) == (pytest.approx(55), pytest.approx(62))


@pytest.mark.parametrize(
    ("changes", "row", "reason"),
    [
        ({"model": "gpt2"}, "MEMIT", "other model (LLaMA3-8B; here gpt2)"),
        ({"dataset": "facts"}, "MEMIT", "other dataset (CounterFact; here facts)"),
        ({"spec": {"batch_size": 400, "num_batches": 5}}, "MEMIT", "other batch size (200; here 400)"),
        ({"spec": {"num_batches": 5}}, "MEMIT", "other number of edits (2,000; here 1,000)"),
        ({"edits_applied": 400}, "MEMIT", "not finished, 400 of 2,000 edits"),
        ({"pruning_ratio": 0.5}, "SeqMMR_MEMIT", "other pruning ratio (0.85; here 0.5)"),
        ({"top_k": 3}, "SeqMMR_MEMIT", "other top-k (2; here 3)"),
        ({}, "FT", "not run"),
        ({}, "RECT", "failed"),
        ({}, "PMET", "not applicable"),
        ({}, "SeqMMR_RECT", "not run"),
    ],
)
def test_what_does_not_compare_says_why(paper_run, record, changes, row, reason):
    failed = [
        record("rect", error="RuntimeError: out of memory", **PAPER),
        record("pmet", error="not applicable", **PAPER),
    ]
    assert verdict(judge(paper_run(records=failed, **changes)), 1, row, "score").reason == reason


def test_what_was_not_measured_says_so(paper_run):
    assert verdict(judge(paper_run()), 1, "MEMIT", "fluency").reason == "fluency not measured"


def test_other_machines_times_do_not_compare(paper_run):
    found = verdict(judge(paper_run(spec={"device": "cpu"}), numbers=(7,)), 7, "MEMIT", "edit_time_s")
    assert found.reason == "other machine (RTX A6000; here cpu)"


def test_the_run_that_corresponds_is_found_among_others(paper_run):
    other = paper_run(name="small", spec={"num_batches": 5})
    found = verdict(judge(other, paper_run(name="whole")), 1, "MEMIT", "score")
    assert found.pool.name == "whole" and not found.reason
    missing = verdict(judge(other, paper_run(name="again")), 1, "FT", "score")
    assert missing.reason == "again: not run"


def test_each_of_our_rows_that_a_figure_may_be_is_compared(paper_run, record):
    run = paper_run(records=[record("memit-seq", value=0.7, **PAPER)])
    found = [v for v in judge(run) if (v.printed.row, v.printed.column) == ("MEMIT", "score")]
    assert [(v.row.editor, v.agrees) for v in found] == [("memit", True), ("memit-seq", False)]


def test_seeds_are_judged_by_their_own_interval(paper_run):
    runs = [paper_run(0.80 + 0.001 * s, name=f"s{s}", seed=s, spec={"seed": s}) for s in range(3)]
    assert not verdict(judge(*runs), 1, "MEMIT", "score").agrees
    assert verdict(judge(runs[0]), 1, "MEMIT", "score").agrees


def test_the_table_has_verdict_and_protocol(paper_run):
    table = verdict_table(1, judge(paper_run()))
    assert [[cell.text for cell in row] for row in table.rows[:2]] == [
        ["MEMIT", "score", "78.37", "MEMIT baseline", "80.00", "+1.63", "agrees"],
        ["MEMIT", "efficacy", "89.35", "MEMIT baseline", "80.00", "-9.35", "differs"],
    ]
    assert table.rows[0][4].interval == "76.00, 83.00"
    notes = " ".join(table.notes)
    assert "1 of 8 agree" in notes and "over cases" in notes
    assert "llama3-8b-instruct (the instruct weights" in notes and "selection first" in notes
    assert "chain shadow" in notes and "encoder minilm" in notes and "seed 0" in notes
    assert "score of 100" in notes and "log-probability" in notes
    assert verdict_table(1, judge(paper_run(name="other", model="gpt2"))) is None


def test_the_summary_counts_and_collapses_equal_reasons(paper_run):
    table = summary_table(judge(paper_run(model="gpt2"), numbers=(1, 2)))
    assert [[cell.text for cell in row] for row in table.rows[:2]] == [
        ["1", "66", "0", "0", "66"],
        ["2", "24", "0", "0", "24"],
    ]
    assert table.notes[0] == "Table 1, 66 of 66 not comparable: other model (LLaMA3-8B; here gpt2)."
    own = summary_table(judge(paper_run(name="own")))
    assert [cell.text for cell in own.rows[0]] == ["1", "66", "1", "7", "58"]
    assert any(
        note.startswith("Table 1, 54 of 66 not comparable (Unedited, FT, PRUNE, PMET") for note in own.notes
    )
