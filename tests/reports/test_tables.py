from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reports.cells import Cell
from reports.notes import describe
from reports.rows import rows_of
from reports.tables import (
    any_answer_tables,
    build_report,
    cost_tables,
    differences_tables,
    forgetting_tables,
    main_table,
    modules_tables,
    routing_tables,
    views_tables,
)

together = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)


def column(table, number):
    return [(row[number].text, row[number].mark) for row in table.rows]


def test_best_is_bold_second_underlined_and_ties_share(record, make_run):
    values = {"baseline": 0.80, "+MM": 0.90, "+R": 0.9004, "+MM+R": 0.85}
    records = [record("none", "unedited", 0.99), *(record("memit", c, v) for c, v in values.items())]
    table = main_table(rows_of(make_run(records)))
    expected = [("99.0", ""), ("80.0", ""), ("90.0", "best"), ("90.0", "best"), ("85.0", "second")]
    assert column(table, 2) == expected


def test_missing_is_a_dash_and_never_marked(record, score, make_run):
    records = [record(scores=(score("efficacy", 0.0),)), record("memit", "+R", error="boom")]
    table = main_table(
        rows_of(make_run(records, spec={"editors": ["memit"], "cells": ["baseline", "+MM", "+R"]}))
    )
    assert column(table, 3) == [("0.0", "best"), ("–", ""), ("failed", "")]
    assert column(table, 2) == [("–", ""), ("–", ""), ("failed", "")]


@given(values=st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=4), digits=st.integers(0, 3))
@together
def test_marks_hold_for_any_values(record, values, digits, tmp_path_factory):
    from reports.load import Run

    cells = ("baseline", "+MM", "+R", "+MM+R")
    pairs = zip(cells, values, strict=False)
    records = tuple(
        record("memit", c, v) if v is not None else record("memit", c, error="x") for c, v in pairs
    )
    run = Run(path=tmp_path_factory.getbasetemp(), info={}, records=records)
    cells_shown = [row[2] for row in main_table(rows_of(run), digits=digits).rows]
    shown = sorted({float(cell.text) for cell in cells_shown if cell.text != "failed"}, reverse=True)
    for cell in cells_shown:
        rank = shown.index(float(cell.text)) if cell.text != "failed" else 9
        assert cell.mark == {0: "best", 1: "second"}.get(rank, "")


def test_intervals_and_differences(ablation, make_run):
    table = main_table(rows_of(make_run(ablation)))
    assert table.headers == ("Editor", "Cell", "Score", "Efficacy", "Generalization", "Locality")
    assert table.rows[0][:3] == (
        Cell(text=""),
        Cell(text="unedited"),
        Cell(text="33.3", interval="29.3, 36.3"),
    )
    assert table.rows[4][2] == Cell(text="84.1", interval="80.1, 87.1", difference="+4.1", mark="best")
    assert table.groups == (1, 5)


def test_a_record_without_difference_shows_that_of_the_values(record, make_run):
    records = [record(value=0.80), record("memit", "+MM", 0.75), record("rect", "+MM", 0.9)]
    cells = [row[2] for row in main_table(rows_of(make_run(records))).rows]
    assert [cell.difference for cell in cells] == ["", "-5.0", ""]


def test_a_difference_that_rounds_to_zero_has_no_minus(record, score, make_run):
    change = (score("score", 0.8, difference=-0.0001),)
    records = [record(value=0.8), record("memit", "+MM", scores=change)]
    assert main_table(rows_of(make_run(records))).rows[1][2].difference == "+0.0"


def test_errors_are_shown_and_named(ablation, record, make_run):
    records = [*ablation, record("ft", "+MM", error="not applicable: FT keeps no deltas")]
    table = main_table(rows_of(make_run(records)))
    assert [cell.text for cell in table.rows[2][2:]] == ["failed"] * 4
    assert [cell.text for cell in table.rows[-1][2:]] == ["n/a"] * 4
    assert "MEMIT +MM: RuntimeError: out of memory at 100% of {x}_y & z" in table.notes
    assert "FT +MM: not applicable: FT keeps no deltas" in table.notes


def test_several_ratios_and_top_ks_are_rows(record, make_run):
    records = [record(value=0.8), *(record("memit", "+MM", 0.7, pruning_ratio=r) for r in (0.5, 0.85))]
    records += [record("memit", "+R", 0.7, top_k=k) for k in (2, 3)]
    table = main_table(rows_of(make_run(records)))
    assert [row[1].text for row in table.rows] == [
        "baseline",
        "+MM (r=0.5)",
        "+MM (r=0.85)",
        "+R (k=2)",
        "+R (k=3)",
    ]


def test_rows_after_different_numbers_of_edits_are_named(record, make_run):
    records = [record(value=0.8, edits_applied=200), record("memit", "+MM", 0.8)]
    notes = main_table(rows_of(make_run(records))).notes
    assert (
        "Rows were scored after different numbers of edits: MEMIT +MM after 100; MEMIT baseline after 200."
        in notes
    )


def test_knowedit_has_its_own_columns(record, score, make_run):
    table = main_table(rows_of(make_run([record(scores=(score("rewrite_acc", 0.7),))])))
    assert table.headers[2:4] == ("Rewrite", "Rephrase")
    assert [cell.text for cell in table.rows[0][2:4]] == ["70.0", "–"]


def test_knowedit_routing_has_a_column_for_each_kind_of_prompt(record, score, make_run):
    values = {
        "rewrite_acc": 0.7,
        "route_rewrite": 1.0,
        "route_rephrase": 0.5,
        "route_relation_specificity": 0,
    }
    scores = tuple(score(name, value) for name, value in values.items())
    (table,) = routing_tables(rows_of(make_run([record("memit", "+R", scores=scores)])))
    assert table.headers[3:] == (
        "Rewrite",
        "Rephrase",
        "Reasoning",
        "Subject aliasing",
        "Logical generalization",
        "Relation specificity",
    )
    assert [cell.text for cell in table.rows[0][3:]] == ["100.0", "50.0", "–", "–", "–", "0.0"]


def test_any_of_the_answers_has_a_table_only_where_it_matters(record, score, make_run):
    def tables(alias):
        scores = [score("rewrite_acc", 0.7), score("portability_reasoning", 0.4)]
        scores.append(score("portability_reasoning_any", alias))
        failed = record("memit", "+MM", error="broken")
        run = make_run([record(scores=tuple(scores)), failed], name=f"alias {alias}")
        return any_answer_tables(rows_of(run))

    assert tables(0.4) == []
    (table,) = tables(0.6)
    assert table.headers == ("Editor", "Cell", "Reasoning")
    assert [row[2].text for row in table.rows] == ["60.0", "failed"]


def test_differences_have_paired_intervals(ablation, make_run):
    (table,) = differences_tables(rows_of(make_run(ablation)))
    assert [row[1].text for row in table.rows] == ["+R", "+MM+R", "+MM", "+R", "+MM+R"]
    assert table.rows[1][2] == Cell(text="+4.1", interval="+3.1, +5.1")


def test_no_differences_table_without_paired_intervals(record, make_run):
    assert differences_tables(rows_of(make_run([record(value=0.5), record("memit", "+R", 0.6)]))) == []


def test_modules(ablation, make_run):
    memit, alphaedit = modules_tables(rows_of(make_run(ablation)))
    assert memit.headers == alphaedit.headers == ("Batch", "baseline", "+MM", "+R", "+MM+R")
    assert [row[0].text for row in memit.rows] == ["@1", "@2", "Overall"]
    assert [row[2].text for row in memit.rows] == ["failed"] * 3
    assert alphaedit.rows[1][4] == Cell(text="89.1", difference="+4.1")


def test_batches_are_in_the_order_of_their_numbers(record, make_run):
    records = [record(value=0.5, slice=f"batch:{k}") for k in (10, 2, 1)]
    (table,) = modules_tables(rows_of(make_run(records)))
    assert [row[0].text for row in table.rows] == ["@1", "@2", "@10", "Overall"]


def test_routing_rows_of_cells_that_agree_are_one(ablation, make_run):
    (table,) = routing_tables(rows_of(make_run(ablation)))
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["minilm", "2", "all", "100.0", "96.9", "54.5"]
    ]


def test_routing_rows_that_disagree_name_their_cells(ablation, make_run):
    last = ablation[-3]
    scores = tuple(replace(s, value=0.5) if s.metric == "route_rewrite" else s for s in last.scores)
    (table,) = routing_tables(rows_of(make_run([*ablation, replace(last, scores=scores)])))
    assert [row[2].text for row in table.rows] == ["MEMIT +R, MEMIT +MM+R, AlphaEdit +R", "AlphaEdit +MM+R"]


def test_no_routing_table_without_a_router(record, make_run):
    assert routing_tables(rows_of(make_run([record(value=0.5)]))) == []


def test_costs(record, make_run):
    cost = {"edit_seconds_per_edit": 1.25, "inference_seconds_per_sample": None, "peak_memory_bytes": 2.5e9}
    (table,) = cost_tables(make_run([record(value=0.5)], per_editor={"memit": cost}))
    assert [cell.text for cell in table.rows[0]] == ["MEMIT", "1.250", "–", "2.50"]
    assert cost_tables(make_run([record(value=0.5)], name="none")) == []


def test_other_views_stand_beside_the_leading_one(record, score, make_run):
    values = {"efficacy": 0.9, "efficacy_argmax": 0.5, "efficacy_overlap": 0.6, "locality": 0.7}
    scores = tuple(score(name, value) for name, value in values.items())
    failed = record("memit", "+MM", error="broken")
    (table,) = views_tables(rows_of(make_run([record(scores=scores), failed])))
    assert table.headers == ("Editor", "Cell", "Efficacy", "exact", "overlap")
    assert [cell.text for cell in table.rows[0]] == ["MEMIT", "baseline", "90.0", "50.0", "60.0"]
    assert [cell.text for cell in table.rows[1][2:]] == ["failed"] * 3
    assert views_tables(rows_of(make_run([record(value=0.5)], name="plain"))) == []


def test_knowedits_other_view_is_the_exact_answer(record, score, make_run):
    scores = (score("rewrite_acc", 0.9), score("rewrite_acc_exact", 0.4), score("relation_specificity", 0.7))
    (table,) = views_tables(rows_of(make_run([record(scores=scores)])))
    assert table.headers == ("Editor", "Cell", "Rewrite", "exact")
    assert [cell.text for cell in table.rows[0][2:]] == ["90.0", "40.0"]


@pytest.fixture
def every_batch(record):
    """Records after each of three batches: batch b scores what `at` says, so does everything together."""

    def make(at, editor="memit", cell="baseline", without=()):
        records = []
        for t in (1, 2, 3):
            records.append(record(editor, cell, 0.5, edits_applied=20 * t))
            for b in range(1, t + 1):
                if (b, t) not in without:
                    records.append(record(editor, cell, at[b, t], slice=f"batch:{b}", edits_applied=20 * t))
        return records

    return make


LOSING = {(1, 1): 0.9, (1, 2): 0.1, (1, 3): 0.5, (2, 2): 0.8, (2, 3): 0.7, (3, 3): 0.2}


def test_forgetting_is_the_mean_loss_of_the_batches_before_the_last(every_batch, record, make_run):
    records = [*every_batch(LOSING), record("memit", "+R", error="broken")]
    (table,) = forgetting_tables(rows_of(make_run(records)))
    assert table.headers[2:] == ("Score", "Efficacy", "Generalization", "Locality")
    # batch 1 loses 40 points, batch 2 loses 10; the last has nothing after it
    assert [[cell.text for cell in row[2:]] for row in table.rows] == [["+25.0"] * 4, ["failed"] * 4]


def test_forgetting_of_a_batch_that_was_not_scored_is_a_dash(every_batch, make_run):
    (table,) = forgetting_tables(rows_of(make_run(every_batch(LOSING, without={(2, 2)}))))
    assert [cell.text for cell in table.rows[0][2:]] == ["–"] * 4


def test_no_forgetting_where_only_the_end_was_scored(ablation, make_run):
    assert forgetting_tables(rows_of(make_run(ablation))) == []


def test_the_short_report_has_results_batches_routing_and_cost(ablation, make_run):
    cost = {"memit": {"edit_seconds_per_edit": 1.0}}
    titles = [table.title for table in build_report(make_run(ablation, per_editor=cost)).tables]
    assert titles == [
        "Results in percent",
        "MEMIT: Score per batch, in percent",
        "AlphaEdit: Score per batch, in percent",
        "Prompts that the router sends to the edited model, in percent",
        "Cost per editor",
    ]


def test_facts_of_a_full_spec(record, make_run):
    spec = {
        "batch_size": 20,
        "num_batches": 5,
        "select": "random",
        "merger": "self-aware",
        "pruning_ratio": [0.5, 0.85],
        "chain": "shadow",
        "router": "topk",
        "top_k": [2],
        "encoder": "minilm",
        "negatives": 100,
        "stats": "self",
        "limit_stats": 30000,
        "dtype": "float32",
        "device": "cpu",
    }
    provenance = {"commit": "0123456789abcdef", "dirty": True, "model": {"digest": "fedcba9876543210"}}
    info = {"spec": spec, "provenance": provenance, "status": "running"}
    run = make_run(
        [record(value=0.5)], model_note="dequantised from a 4-bit file", notes=["Few negatives."], **info
    )
    assert dict(describe(run)) == {
        "Model": "smollm2-135m; dequantised from a 4-bit file",
        "Dataset": "facts, selection random",
        "Edits": "100 (5 batches of 20)",
        "Seed": "0",
        "Merging": "self-aware, pruning ratio 0.5 and 0.85, chain shadow",
        "Router": "topk, top-k 2, encoder minilm, negatives 100",
        "Statistics": "self, at most 30,000 tokens",
        "Device": "cpu, float32",
        "Digests": "run run, model fedcba987654",
        "Commit": "0123456789ab, with uncommitted changes",
        "Status": "running",
    }
    assert build_report(run).warnings == ("Few negatives.",)


def test_facts_of_an_empty_run_file(record, make_run):
    facts = describe(make_run([record(value=0.5)]))
    wanted = {"Model": "smollm2-135m", "Dataset": "facts", "Edits": "100", "Seed": "0", "Digests": "run run"}
    assert dict(facts) == wanted


@pytest.mark.parametrize("digits", [0, 2])
def test_digits(record, make_run, digits):
    table = main_table(rows_of(make_run([record(value=0.81236)])), digits=digits)
    assert table.rows[0][2].text == f"{81.236:.{digits}f}"
