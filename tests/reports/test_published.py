from __future__ import annotations

from collections import Counter
from statistics import harmonic_mean

import pytest

from reports.published import notes_beside, printed_figures, read_published
from reports.seeds import pools_of

PRINTED = read_published()["tables"]
MISMATCHES = {item["where"] for item in read_published()["mismatches"]}


def test_scores_are_harmonic_means_of_their_columns():
    odd = set()
    for number in (1, 3, 4):
        for row in PRINTED[f"table_{number}"]["rows"]:
            mean = harmonic_mean([row["efficacy"], row["generalization"], row["locality"]])
            if abs(mean - row["score"]) > 0.011:
                odd.add(f"table_{number}: {row['method']}")
    assert odd == {where for where in MISMATCHES if where.startswith("table_1")} == {"table_1: SeqMMR_PMET"}


def test_printed_differences_are_those_of_the_scores():
    odd = set()
    for number in (5, 8, 9):
        table = PRINTED[f"table_{number}"]
        for row in table["rows"]:
            for cell in ("+MM", "+R", "+MM+R"):
                difference = row.get(f"{cell}_diff_printed")
                if difference is not None and abs(row[cell] - row[table["columns"][1]] - difference) > 0.011:
                    odd.add(f"table_{number}: {row['seq']} {cell}")
    assert odd == {"table_8: @1 +MM", "table_9: @1 +R"} == MISMATCHES - {"table_1: SeqMMR_PMET"}


def test_table_5_is_the_short_form_of_table_9():
    for short, full in zip(PRINTED["table_5"]["rows"], PRINTED["table_9"]["rows"], strict=True):
        assert short.items() <= full.items()


def test_every_number_of_the_tables_is_a_figure():
    names = {"method", "model", "seq", "top_k", "batch_size", "num_edits"}
    for number in (1, 2, 3, 4, 6, 7, 8, 9):
        rows = PRINTED[f"table_{number}"]["rows"]
        cells = [
            value
            for row in rows
            for name, value in row.items()
            if name not in names and not name.endswith("_diff_printed") and value is not None
        ]
        found = [figure.value for figure in printed_figures() if figure.table == number]
        assert Counter(found) == Counter(cells), number


def test_one_figure_has_one_value():
    seen = {}
    for p in printed_figures():
        key = (p.model, p.dataset, p.batch_size, p.edits, p.editors, p.cell, p.slice, p.metric, p.top_k)
        assert seen.setdefault(key, p.value) == p.value


@pytest.mark.parametrize(
    ("table", "row", "column", "expected"),
    [
        (1, "SeqMMR_MEMIT", "efficacy", (("memit", "memit-seq"), "+MM+R", "overall", 93.35, 0.85, 2)),
        (1, "Unedited", "score", (("none",), "unedited", "overall", 12.87, None, None)),
        (2, "MEMIT", "reasoning_acc", (("memit", "memit-seq"), "baseline", "overall", 54.66, None, None)),
        (4, "GPT-J SeqMMR_MEMIT", "score", (("memit", "memit-seq"), "+MM+R", "overall", 83.54, 0.85, 2)),
        (6, "top-k 5", "paraphrase_prompt", ((), "+R", "overall", 98.0, None, 5)),
        (8, "@10", "+R", (("alphaedit",), "+R", "batch:10", 91.08, None, 2)),
        (9, "Overall", "+MM", (("memit", "memit-seq"), "+MM", "overall", 81.42, 0.85, None)),
    ],
)
def test_figures_are_known_by_our_names(table, row, column, expected):
    (p,) = (p for p in printed_figures() if (p.table, p.row, p.column) == (table, row, column))
    assert (p.editors, p.cell, p.slice, p.value, p.pruning_ratio, p.top_k) == expected


@pytest.fixture
def notes(record, make_run):
    """What stands beside table 1 for a constructed run of the paper's main setting."""

    def make(model="llama3-8b-instruct", rates=(0.0785, 0.1058, 0.8948), select="first", **fields):
        fields = {"model": model, "dataset": "counterfact", "edits_applied": 2000} | fields
        unedited = record("none", "unedited", 0.1287, **fields | {"edits_applied": 0}).to_json()
        for score, value in zip(unedited["scores"], rates, strict=False):
            score["value"] = value
        unedited = type(record()).from_json(unedited)
        records = [unedited, *(record("memit", cell, 0.8, **fields) for cell in ("baseline", "+MM+R"))]
        run = make_run(records, spec={"batch_size": 200, "num_batches": 10, "select": select})
        return " ".join(notes_beside(1, *pools_of([run])))

    return make


def test_the_instruct_weights_fit_the_unedited_row(notes):
    said = notes()
    assert "This run has the instruct weights." in said
    assert "The published unedited row fits llama3-8b-instruct" in said
    assert "encodes with text-embedding-3-small, this run's with minilm" in said
    assert "which sequential variant its MEMIT is" in said
    assert "selected" not in said


def test_the_base_weights_do_not(notes):
    said = notes(model="meta-llama/Meta-Llama-3-8B", rates=(0.09, 0.12, 0.88))
    assert "This run has the base weights." in said
    assert "The published unedited row does not fit meta-llama/Meta-Llama-3-8B" in said
    assert "9.00 / 12.00 / 88.00 here and 7.85 / 10.58 / 89.48 there (largest difference 1.48" in said


def test_another_selection_and_chain_are_named(notes):
    said = notes(select="random", chain="merged")
    assert "this run selected them by 'random'" in said
    assert "does not say which chain it merges in" in said
