from __future__ import annotations

import pytest

from reports.rows import baseline_of, rows_of


def labels(run):
    return [(row.editor, row.label) for row in rows_of(run)]


def test_unedited_first_then_editors_in_the_specs_order(record, make_run):
    records = [record("alphaedit", "+MM+R", 0.5), record("alphaedit", value=0.5), record("memit", "+R", 0.5)]
    run = make_run([*records, record("none", "unedited", 0.3)], spec={"editors": ["memit", "alphaedit"]})
    assert labels(run) == [
        ("none", "unedited"),
        ("memit", "+R"),
        ("alphaedit", "baseline"),
        ("alphaedit", "+MM+R"),
    ]


def test_what_the_spec_announces_is_a_row(record, make_run):
    run = make_run([record(value=0.5)], spec={"editors": ["memit"], "cells": ["baseline", "+MM"]})
    assert labels(run) == [("memit", "baseline"), ("memit", "+MM")]
    assert rows_of(run)[1].at("overall") is None


@pytest.mark.parametrize(
    ("cell", "changes", "expected"),
    [
        ("+MM", ({}, {"pruning_ratio": 0.5}), ["+MM (r=0.85)", "+MM (r=0.5)"]),
        ("+R", ({}, {"top_k": 3}), ["+R (k=2)", "+R (k=3)"]),
        ("+R", ({}, {"encoder": "e5"}), ["+R (encoder=minilm)", "+R (encoder=e5)"]),
        ("+MM", ({}, {"chain": "merged"}), ["+MM (chain=shadow)", "+MM (chain=merged)"]),
        ("+MM", ({},), ["+MM"]),
        (
            "+MM+R",
            ({}, {"pruning_ratio": 0.5, "top_k": 3}),
            ["+MM+R (r=0.85, k=2)", "+MM+R (r=0.5, k=3)"],
        ),
    ],
)
def test_several_settings_are_told_apart(record, make_run, cell, changes, expected):
    records = [record(value=0.5), *(record("memit", cell, 0.5, **change) for change in changes)]
    assert labels(make_run(records)) == [("memit", "baseline"), *(("memit", label) for label in expected)]


def test_the_scores_after_most_edits_are_final(record, make_run):
    run = make_run([record(value=0.5, edits_applied=100), record(value=0.9, edits_applied=40)])
    assert rows_of(run)[0].at("overall").edits_applied == 100


def test_an_error_written_last_stands_and_one_overtaken_does_not(record, make_run):
    failed = rows_of(make_run([record(value=0.5, edits_applied=40), record(error="late")]))[0]
    assert failed.at("overall").error == "late" and list(failed.errors()) == ["late"]
    assert failed.at("batch:1").error == "late"
    early = record(error="early", edits_applied=0)
    resumed = rows_of(make_run([early, record(value=0.5)], name="resumed"))[0]
    assert resumed.at("overall").error is None and not list(resumed.errors())


def test_the_baseline_of_the_same_chain(record, make_run):
    records = [record(value=0.5, chain=chain) for chain in ("shadow", "merged")]
    rows = rows_of(make_run([*records, record("memit", "+MM", 0.5, chain="merged")]))
    assert baseline_of(rows[-1], rows).chain == "merged"
    assert baseline_of(rows[-1], rows[-1:]) is None
