from __future__ import annotations

import pytest

from reports.cells import Cell
from reports.paper import layouts
from reports.seeds import pools_of


def tables(*runs, **options):
    return {table.title.split(":")[0]: table for table in tables_of(*runs, **options)}


def tables_of(*runs, **options):
    return [layout.table for layout in layouts(pools_of(runs), **options)]


def column(table, number=0):
    return [row[number].text for row in table.rows]


@pytest.fixture
def sized(record, make_run):
    """`sized(editor, value, name=..., ...)`: a run with the unedited model, a baseline and a +MM+R cell."""

    def make(editor, value, name, size=20, batches=5, seed=0, spec=None, **fields):
        fields = {"edits_applied": size * batches, "seed": seed} | fields
        records = [
            record("none", "unedited", 0.3, **fields | {"edits_applied": 0}),
            record(editor, "baseline", value, **fields),
            record(editor, "+MM+R", value + 0.05, **fields),
        ]
        plain = {"batch_size": size, "num_batches": batches, "seed": seed, "select": "first"}
        return make_run(records, name=name, spec=plain | {"editors": [editor]} | (spec or {}))

    return make


def test_one_run_has_a_table_for_what_it_has(ablation, make_run):
    found = layouts(pools_of([make_run(ablation)]))
    assert [layout.numbers for layout in found] == [(1,), (5, 9), (6,), (8,)]
    first, memit, routing, alphaedit = (layout.table for layout in found)
    assert first.headers == ("Method", "Score", "Efficacy", "Generalization", "Locality")
    assert column(first) == ["Unedited", "MEMIT", "MEMIT +MM+R", "AlphaEdit", "AlphaEdit +MM+R"]
    assert first.rows[2][1] == Cell(text="84.1", interval="80.1, 87.1", mark="best")
    assert memit.title == "Tables 5 and 9: MEMIT, Score per batch, in percent"
    assert alphaedit.title == "Table 8: AlphaEdit, Score per batch, in percent"
    assert column(memit, 2) == ["failed"] * 3
    assert routing.headers == ("Top-k", "Editing request", "Paraphrase prompt", "Neighborhood prompt")
    # 54.5 % of the neighborhood prompts are sent to the edited model
    assert [[cell.text for cell in row] for row in routing.rows] == [["2", "100.0", "96.9", "45.5"]]


def test_editors_of_several_runs_share_a_table(sized):
    both = [sized("memit", 0.7, "a"), sized("alphaedit", 0.8, "b")]
    (first,) = (table for table in tables_of(*both) if table.title.startswith("Table 1:"))
    assert column(first) == ["Unedited", "MEMIT", "MEMIT +MM+R", "AlphaEdit", "AlphaEdit +MM+R"]
    assert first.rows[4][1].mark == "best"
    assert "a: selection first, seed 0." in first.notes and "b: selection first, seed 0." in first.notes


@pytest.mark.parametrize(
    "other",
    [
        {"size": 10},
        {"batches": 6},
        {"seed": 1},
        {"model": "gpt2"},
        {"dataset": "counterfact"},
        {"spec": {"select": "random"}},
        {"spec": {"data_digest": "other"}},
    ],
)
def test_another_setting_has_a_table_of_its_own(sized, other):
    both = [sized("memit", 0.7, "a"), sized("alphaedit", 0.8, "b", **other)]
    first, second = (table for table in tables_of(*both) if table.title.startswith("Table 1:"))
    assert column(first) == ["Unedited", "MEMIT", "MEMIT +MM+R"]
    assert column(second) == ["Unedited", "AlphaEdit", "AlphaEdit +MM+R"]
    if "data_digest" not in other.get("spec", {}):
        assert first.title != second.title


def test_one_editor_twice_is_told_apart_by_run_or_setting(sized):
    chains = [sized("memit", 0.7, "a"), sized("memit", 0.8, "b", spec={"stats": "other"})]
    first = tables(*chains)["Table 1"]
    assert column(first) == ["Unedited"] + [f"MEMIT{cell} ({run})" for run in "ab" for cell in ("", " +MM+R")]
    ratios = [sized("memit", 0.7, "c"), sized("memit", 0.8, "d", pruning_ratio=0.5, spec={"ratio": 0.5})]
    assert "MEMIT +MM+R (r=0.5)" in column(tables(*ratios)["Table 1"])


def test_a_cell_that_does_not_apply_has_no_row(record, make_run):
    records = [record("prune", value=0.7), record("prune", "+MM+R", error="not applicable")]
    records += [record("rect", error="out of memory")]
    table = tables(make_run(records))["Table 1"]
    assert column(table) == ["PRUNE", "RECT"] and column(table, 1) == ["70.0", "failed"]


def test_what_is_not_finished_says_so(sized):
    table = tables(sized("memit", 0.7, "a", edits_applied=40))["Table 1"]
    assert "Not finished, edits scored: MEMIT 40 of 100, MEMIT +MM+R 40 of 100." in table.notes
    assert not any("Not finished" in note for note in tables(sized("memit", 0.7, "b"))["Table 1"].notes)


def test_an_unedited_model_that_differs_is_shown_twice(sized, record, make_run):
    other = make_run(
        [record("none", "unedited", 0.4, edits_applied=0), record("rect", value=0.6)],
        name="b",
        spec={"batch_size": 20, "num_batches": 5, "select": "first", "seed": 0},
    )
    assert column(tables(sized("memit", 0.7, "a"), other)["Table 1"])[:2] == ["Unedited (a)", "Unedited (b)"]


def test_several_sizes_are_table_3(sized):
    runs = [sized("memit", 0.8, "b", size=30, batches=4), sized("memit", 0.7, "a")]
    table = tables(*runs)["Table 3"]
    assert table.headers == (
        "Method",
        "Batch size",
        "Edits",
        "Score",
        "Efficacy",
        "Generalization",
        "Locality",
    )
    assert [[cell.text for cell in row[:4]] for row in table.rows] == [
        ["MEMIT", "20", "100", "70.0"],
        ["MEMIT +MM+R", "20", "100", "75.0"],
        ["MEMIT", "30", "120", "80.0"],
        ["MEMIT +MM+R", "30", "120", "85.0"],
    ]
    assert "Table 3" not in tables(sized("memit", 0.7, "c"), sized("rect", 0.7, "d"))
    assert "Table 4" not in tables(*runs)


def test_several_models_are_table_4(sized):
    table = tables(sized("memit", 0.7, "a"), sized("memit", 0.8, "b", model="gpt2", size=30))["Table 4"]
    assert table.headers[:3] == ("Model", "Method", "Score")
    assert [[cell.text for cell in row[:3]] for row in table.rows] == [
        ["smollm2-135m", "MEMIT", "70.0"],
        ["smollm2-135m", "MEMIT +MM+R", "75.0"],
        ["gpt2", "MEMIT", "80.0"],
        ["gpt2", "MEMIT +MM+R", "85.0"],
    ]
    assert "gpt2: 150 edits in batches of 30" in table.notes[0]


def test_knowedit_is_table_2(record, score, make_run):
    names = ("rewrite_acc", "rephrase_acc", "portability_reasoning", "relation_specificity")
    scores = tuple(score(name, 0.7) for name in names)
    run = make_run([record(cell=cell, scores=scores) for cell in ("baseline", "+MM+R")])
    found = {layout.numbers: layout.table for layout in layouts(pools_of([run]))}
    assert found[2,].headers == (
        "Method",
        "Rewrite",
        "Reasoning",
        "Subject aliasing",
        "Logical generalization",
        "Relation specificity",
    )
    assert [cell.text for cell in found[2,].rows[0]] == ["MEMIT", "70.0", "70.0", "–", "–", "70.0"]
    assert found[()].title == "MEMIT: Rewrite per batch, in percent"  # tables 5, 8 and 9 are of the Score


def test_fluency_is_in_bits(record, score, make_run):
    scores = (score("score", 0.7), score("fluency", 6.3544, low=6.2, high=6.5), score("consistency", 0.2415))
    table = tables(make_run([record(scores=scores)]))["Table 1"]
    shown = dict(zip(table.headers, table.rows[0], strict=True))
    assert shown["Fluency (bits)"] == Cell(text="6.354", interval="6.200, 6.500", mark="best")
    assert shown["Consistency"].text == "24.1"  # 24.15 is a tie that no float has


def test_seeds_are_pooled(sized):
    runs = [sized("memit", 0.6 + 0.1 * seed, f"s{seed}", seed=seed) for seed in range(3)]
    (first,) = (table for table in tables_of(*runs) if table.title.startswith("Table 1:"))
    assert first.rows[1][1] == Cell(text="70.0", interval="45.2, 94.8", mark="second")
    assert "over 3 seeds (Student's t)" in first.notes[0]
    assert any("mean over 3 seeds (0, 1, 2) on the same records" in note for note in first.notes)


@pytest.fixture
def timed(record, score, make_run):
    """A run with timings: 100 edits, 5 prompts routed after each of two batches."""

    def make(name="run", **info):
        routes = (score("route_rewrite", 1.0, n=2), score("route_neighborhood", 0.5, n=3))
        records = [record(value=0.7)]
        for cell in ("+R", "+MM+R"):
            records += [record("memit", cell, scores=routes, edits_applied=edits) for edits in (50, 100)]
        cost = {"edit_seconds_per_edit": 2.0, "inference_seconds_per_sample": 0.5, "peak_memory_bytes": 3e9}
        defaults = {
            "spec": {"batch_size": 50, "num_batches": 2, "pruning_ratio": [0.85]},
            "per_editor": {"memit": cost},
            "timings": {"merge memit+MM": 10.0, "route": 1.0},
        }
        return make_run(records, name=name, **defaults | info)

    return make


def test_cost_adds_merging_and_routing(timed):
    table = tables(timed())["Table 7"]
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["MEMIT", "2.000", "0.500", "3.00"],
        ["MEMIT +MM+R", "2.100", "0.600", "3.00"],  # 10 s / 100 edits; 1 s / 10 prompts
    ]


@pytest.mark.parametrize(
    ("info", "edit", "inference"),
    [
        ({"timings": {}}, "–", "–"),
        ({"timings": {"merge memit+MM": 10.0}}, "2.100", "–"),
        ({"spec": {"batch_size": 50, "num_batches": 2, "generation": True}}, "2.100", "–"),
        ({"per_editor": {"memit": {"inference_seconds_per_sample": 0.5}}}, "–", "0.600"),
    ],
)
def test_a_cost_of_which_a_part_is_unknown_is_a_dash(timed, info, edit, inference):
    row = tables(timed(**info))["Table 7"].rows[1]
    assert (row[1].text, row[2].text) == (edit, inference)


def test_no_costs_no_table(timed):
    assert "Table 7" not in tables(timed(per_editor={}))


def test_what_several_runs_measured_stands_once_from_the_one_with_most(sized, record, make_run):
    spec = {"batch_size": 20, "num_batches": 5, "select": "first", "seed": 0, "editors": ["memit"]}
    spec |= {"settings": {"memit": {"steps": 20}}}
    grid = {"pruning_ratio": [0.85, 0.5], "top_k": [2]}
    short = make_run([record(value=0.7)], name="short", spec=spec)
    rows = [record(value=0.7), record(cell="+MM+R", value=0.8, pruning_ratio=0.85, top_k=2)]
    rows += [record(cell="+MM+R", value=0.9, pruning_ratio=0.5, top_k=2)]
    wide = make_run(rows, name="wide", spec=spec | grid)
    alike = make_run([record(value=0.7)], name="alike", spec=spec | {"evaluate": "every-batch"})
    first = tables(short, alike)["Table 1"]
    assert column(first) == ["MEMIT"]
    other = make_run([record(value=0.6)], name="other", spec=spec | {"settings": {"memit": {"steps": 5}}})
    assert column(tables(short, other)["Table 1"]) == ["MEMIT (short)", "MEMIT (other)"]
    table = tables(wide)["Table 1"]
    assert column(table) == ["MEMIT", "MEMIT +MM+R"] and column(table, 1) == ["70.0", "80.0"]
    assert any("first pruning ratio 0.85" in note and "top k" not in note for note in table.notes)
