from __future__ import annotations

from itertools import chain
from statistics import harmonic_mean

import pytest

from reports.published import figures, published_for, read_published
from reports.rows import rows_of

PRINTED = read_published()["tables"]
MISMATCHES = {item["where"] for item in read_published()["mismatches"]}


@pytest.fixture
def corresponding(record, make_run):
    """A constructed run of the paper's main setting; `setting` changes the spec, `fields` the records."""

    def make(model="llama3-8b-instruct", unedited=(0.0785, 0.1058, 0.8948), setting=None, **fields):
        fields = {"model": model, "dataset": "counterfact", "edits_applied": 2000} | fields
        records = [record("none", "unedited", 0.1287, **fields | {"edits_applied": 0})]
        scores = records[0].to_json()["scores"]
        for score, value in zip(scores, unedited, strict=False):
            score["value"] = value
        records[0] = type(records[0]).from_json(records[0].to_json() | {"scores": scores})
        for editor in ("memit", "alphaedit"):
            records += [record(editor, cell, 0.8, **fields) for cell in ("baseline", "+MM", "+R", "+MM+R")]
        spec = {"batch_size": 200, "num_batches": 10, "select": "first"} | (setting or {})
        run = make_run(records, spec=spec)
        rows = rows_of(run)
        return rows, published_for(run, rows)

    return make


def row_of(rows, editor, cell):
    return next(row for row in rows if (row.editor, row.cell) == (editor, cell))


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


def test_one_figure_has_one_value():
    seen = {}
    for figure in figures():
        key = (figure.model, figure.dataset, figure.batch_size, figure.edits)
        key += (figure.editor, figure.cell, figure.slice, figure.metric)
        assert seen.setdefault(key, figure.value) == figure.value


def test_the_papers_main_setting(corresponding):
    rows, published = corresponding()
    assert published.find(row_of(rows, "none", "unedited"), "overall", "score") == 12.87
    assert published.find(row_of(rows, "memit", "baseline"), "overall", "locality") == 64.02
    assert published.find(row_of(rows, "memit", "+MM+R"), "overall", "efficacy") == 93.35
    assert published.find(row_of(rows, "memit", "+MM"), "overall", "score") == 81.42
    assert published.find(row_of(rows, "memit", "+MM"), "overall", "efficacy") is None
    assert published.find(row_of(rows, "alphaedit", "+R"), "batch:10", "score") == 91.08
    assert published.find(row_of(rows, "alphaedit", "+MM+R"), "overall", "score") == 90.95
    assert published.routing[2] == pytest.approx((100, 99.98, 42.48))
    assert published.cost["memit", "+MM+R"] == (7.143, 0.59, 40.88)
    notes = " ".join(published.notes)
    assert "tables 1, 8, 9 (LLaMA3-8B, CounterFact, 2,000 edits in batches of 200)" in notes
    assert "The published unedited row fits llama3-8b-instruct" in notes
    assert "encodes with text-embedding-3-small, this run's with minilm" in notes
    assert "This run has the instruct weights." in notes


def test_the_base_weights_are_told_from_the_instruct_ones(corresponding):
    _, published = corresponding(model="meta-llama/Meta-Llama-3-8B", unedited=(0.09, 0.12, 0.88))
    notes = " ".join(published.notes)
    assert "This run has the base weights." in notes
    assert "The published unedited row does not fit meta-llama/Meta-Llama-3-8B" in notes
    assert "9.00 / 12.00 / 88.00 here and 7.85 / 10.58 / 89.48 there (largest difference 1.48" in notes


def test_other_ratios_and_top_ks_have_no_figure(corresponding):
    rows, published = corresponding(pruning_ratio=0.5, top_k=3)
    assert published.find(row_of(rows, "memit", "+MM"), "overall", "score") is None
    assert published.find(row_of(rows, "memit", "+R"), "overall", "score") is None
    assert published.find(row_of(rows, "memit", "baseline"), "overall", "score") == 78.37
    assert any("rows with others have no published figure" in note for note in published.notes)


def test_selection_and_progress_are_named(corresponding):
    _, published = corresponding(setting={"select": "random"}, edits_applied=400)
    notes = " ".join(published.notes)
    assert "this run selected them by 'random'" in notes
    assert "This run has applied 400 edits, the paper 2,000." in notes


@pytest.mark.parametrize(
    ("model", "size", "batches", "editor", "cell", "score"),
    [
        ("llama3-8b", 100, 50, "alphaedit", "+MM+R", 75.96),
        ("llama3-8b", 300, 20, "alphaedit", "baseline", 80.76),
        ("qwen2.5-7b-instruct", 100, 50, "alphaedit", "baseline", 68.49),
        ("gpt-j-6b", 300, 20, "memit", "+MM+R", 83.54),
    ],
)
def test_other_settings_of_the_paper(corresponding, model, size, batches, editor, cell, score):
    rows, published = corresponding(model=model, setting={"batch_size": size, "num_batches": batches})
    assert published.find(row_of(rows, editor, cell), "overall", "score") == score


def test_another_batch_size_corresponds_to_nothing(corresponding):
    _, published = corresponding(setting={"batch_size": 20, "num_batches": 5})
    assert not published.figures
    assert published.notes == (
        "No published figure corresponds: for LLaMA3-8B on CounterFact the paper prints 2,000 edits in "
        "batches of 200, 5,000 edits in batches of 100, 6,000 edits in batches of 300; this run is for 100 "
        "in batches of 20.",
    )


def test_nothing_corresponds_to_the_embedded_default(record, make_run):
    run = make_run([record("none", "unedited", 0.3), record(value=0.9)])
    published = published_for(run, rows_of(run))
    assert not (published.figures or published.routing or published.cost)
    assert published.notes[0].startswith(
        "No published figure corresponds: the paper has none for smollm2-135m on"
    )
    notes = chain(published.routing_notes, published.cost_notes)
    assert all(note.startswith("No published figure corresponds: table ") for note in notes)


def test_knowedit(record, score, make_run):
    fields = {"model": "llama3-8b", "dataset": "knowedit-zsre", "edits_applied": 1000}
    run = make_run(
        [record(scores=(score("rewrite_acc", 0.7),), **fields)], spec={"batch_size": 100, "num_batches": 10}
    )
    rows = rows_of(run)
    published = published_for(run, rows)
    assert published.find(rows[0], "overall", "portability_reasoning") == 54.66
    assert any("without base or instruct; this run has the base weights" in note for note in published.notes)
