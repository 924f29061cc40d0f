"""KnowEdit: reading and choosing records, argmax along forced answers, shares and their intervals."""

import copy
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.reference import forced_prediction, knowedit_rates
from benchmarks.tiny import tiny_knowedit_records, tiny_model, tiny_records, tiny_tokenizer
from editors.tokens import target_ids
from harness import scoring, tune
from harness.data import (
    KNOWEDIT_FILES,
    KNOWEDIT_HUB,
    NO_SUBJECT,
    KnowEditCase,
    Probe,
    hub_file,
    load_dataset,
    local_copy,
    select,
    to_knowedit_case,
)
from harness.metrics import EXACT, FORCED, FORCED_KINDS, forced_scores, forced_shares, route_scores
from harness.probes import batch_probes, probe_fields
from harness.scoring import Prediction, predict
from harness.spec import resolve

Row = dict[str, Any]
Write = Callable[..., Path]


def record(**changes: Any) -> Row:
    return {
        "case_id": 7,
        "subject": "GNOME Chess",
        "prompt": "What type of game is GNOME Chess?",
        "target_new": " board game",
        "ground_truth": ["chess", "video game"],
        "rephrase_prompt": "GNOME Chess is what type of game? ",
        "locality": {
            "Relation_Specificity": [
                {"prompt": "GNOME Chess license", "ground_truth": ["GPL", "free"]},
                {"prompt": "GNOME Chess platform", "ground_truth": ["Linux"]},
            ]
        },
        "portability": {
            "Reasoning": [
                {"prompt": "One plays it on a", "ground_truth": [["board", "chessboard"], ["table"]]},
                {"prompt": "Nobody knows", "ground_truth": " "},
            ],
            "Subject_Aliasing": [{"prompt": "What is glChess?", "ground_truth": "board game"}],
        },
    } | changes


def case_of(**changes: Any) -> KnowEditCase:
    case = to_knowedit_case(record(**changes), 1)
    assert case is not None
    return case


def ids(cases: Any) -> list[int | str]:
    return [case.case_id for case in cases]


# -- one record ---------------------------------------------------------------------------------------------


def test_a_record_becomes_a_case() -> None:
    case = case_of()
    assert (case.case_id, case.request.case_id) == (7, 7)
    assert case.request.prompt == "What type of game is {}?"
    assert case.request.subject == "GNOME Chess"
    assert case.request.target_new == "board game"
    assert case.rewrite_prompt == "What type of game is GNOME Chess?"
    assert (case.target_true, case.truths) == ("chess", ("chess", "video game"))
    assert case.probes == {
        "rewrite": (Probe("What type of game is GNOME Chess?", ("board game",)),),
        "rephrase": (Probe("GNOME Chess is what type of game?", ("board game",)),),
        "portability_reasoning": (Probe("One plays it on a", ("board", "chessboard", "table")),),
        "portability_subject_aliasing": (Probe("What is glChess?", ("board game",)),),
        "relation_specificity": (
            Probe("GNOME Chess license", ("GPL",)),
            Probe("GNOME Chess platform", ("Linux",)),
        ),
    }
    assert case.prompts == {kind: tuple(p.prompt for p in probes) for kind, probes in case.probes.items()}
    assert case.unrelated_prompts == ("GNOME Chess license", "GNOME Chess platform")
    assert case.left_out == {"blank answer": 1}


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "found"),
    [
        ("Who knows Ada?", "Ada", "Who knows {}?", "Ada"),
        ("Ada, said Ada, is Ada", "Ada", "{}, said Ada, is Ada", "Ada"),
        ("ada is what Ada is", "Ada", "ada is what {} is", "Ada"),  # spelled alike comes first
        ("Who knows ADA or aDa?", "Ada", "Who knows {} or aDa?", "ADA"),  # as the prompt spells it
        ("Who made C++ (1985)?", "c++ (1985)", "Who made {}?", "C++ (1985)"),  # no pattern
        ("Who knows Ada?", " Ada\n", "Who knows {}?", "Ada"),
    ],
)
def test_the_subject_is_marked_once_and_filling_it_in_gives_the_prompt_back(
    prompt: str, subject: str, template: str, found: str
) -> None:
    case = case_of(prompt=prompt, subject=subject)
    assert (case.request.prompt, case.request.subject) == (template, found)
    assert case.rewrite_prompt == prompt


def test_a_record_whose_subject_is_not_in_its_prompt_is_none() -> None:
    assert to_knowedit_case(record(subject="glChess"), 1) is None


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a", ("a",)),
        (["a"], ("a",)),
        ([["a", " b "], [], ["c", "a"]], ("a", "b", "c")),
        ([[["a"]], "", "b"], ("a", "b")),
        ("", None),
        ([], None),
        ([[]], None),
        ([["", "a"]], None),  # the forced answer is blank, whatever its aliases
    ],
)
def test_nested_answers_are_reduced_to_the_first_and_blank_ones_left_out(
    given: Any, wanted: tuple[str, ...] | None
) -> None:
    case = case_of(portability={"Reasoning": [{"prompt": "p", "ground_truth": given}]})
    probes = case.probes.get("portability_reasoning")
    assert probes == (None if wanted is None else (Probe("p", wanted),))
    assert case.left_out == ({} if wanted else {"blank answer": 1})


def test_what_may_be_absent() -> None:
    small = {name: record()[name] for name in ("subject", "prompt", "target_new", "ground_truth")}
    case = to_knowedit_case(small, 12)
    assert case is not None
    assert (case.case_id, set(case.probes), case.unrelated_prompts) == (12, {"rewrite"}, ())
    case = case_of(locality={}, portability={"Reasoning": None, "Subject_Aliasing": []})
    assert set(case.probes) == {"rewrite", "rephrase"}
    other = record(rephrase="Which game?", ground_truth="chess")
    del other["rephrase_prompt"]
    case = to_knowedit_case(other, 1)
    assert case is not None
    assert case.probes["rephrase"][0].prompt == "Which game?"
    assert case.truths == ("chess",)


def test_groups_without_a_metric_are_counted_instead() -> None:
    entry = {"prompt": "p", "ground_truth": [["a"]]}
    case = case_of(
        locality=record()["locality"] | {"Forgetfulness": [entry, entry]}, portability={"Guessing": [entry]}
    )
    assert set(case.probes) == {"rewrite", "rephrase", "relation_specificity"}
    assert case.left_out == {"locality Forgetfulness": 2, "portability Guessing": 1}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("subject", None, "subject"),
        ("subject", " ", "subject"),
        ("prompt", ["p"], "prompt"),
        ("prompt", "", "prompt"),
        ("prompt", "Does {} mean GNOME Chess?", "places"),
        ("target_new", 5, "target_new"),
        ("target_new", "\n", "target_new"),
        ("ground_truth", None, "ground_truth"),
        ("ground_truth", [], "ground_truth"),
        ("ground_truth", ["chess", 3], "ground_truth"),
        ("ground_truth", " ", "ground_truth"),
        ("rephrase_prompt", "", "rephrase_prompt"),
        ("rephrase_prompt", ["p"], "rephrase_prompt"),
        ("locality", "text", "locality"),
        ("locality", {"Relation_Specificity": "text"}, "locality.Relation_Specificity"),
        ("portability", [1], "portability"),
        ("portability", {"Reasoning": ["text"]}, "portability.Reasoning[0]"),
        ("portability", {"Reasoning": [{"prompt": "p"}]}, "'ground_truth' is missing"),
        ("portability", {"Reasoning": [{"ground_truth": "a"}]}, "'prompt' is missing"),
        ("portability", {"Reasoning": [{"prompt": " ", "ground_truth": "a"}]}, "Reasoning[0].prompt"),
        ("portability", {"Reasoning": [{"prompt": "p", "ground_truth": 3}]}, "ground_truth"),
        ("portability", {"Reasoning": [{"prompt": "p", "ground_truth": [None]}]}, "ground_truth"),
    ],
)
def test_a_wrong_value_is_named_with_its_case(field: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError, match="case 7") as error:
        to_knowedit_case(record(**{field: value}), 1)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["subject", "prompt", "target_new", "ground_truth"])
def test_a_missing_field_is_named(field: str) -> None:
    changed = record()
    del changed[field]
    with pytest.raises(ValueError, match=f"case 7: field '{field}' is missing"):
        to_knowedit_case(changed, 1)


# -- files --------------------------------------------------------------------------------------------------


def test_a_path_is_read_in_the_schema_of_its_records(write_jsonl: Write) -> None:
    found = load_dataset(str(write_jsonl(tiny_knowedit_records(5))))
    assert found.knowedit
    assert ids(found.cases) == [0, 1, 2, 3, 4]
    assert not load_dataset(str(write_jsonl(tiny_records(5)))).knowedit


def test_ids_are_positions_from_zero_and_none_occurs_twice(write_jsonl: Write) -> None:
    records = [{k: v for k, v in r.items() if k != "case_id"} for r in tiny_knowedit_records(3)]
    assert ids(load_dataset(str(write_jsonl(records))).cases) == [0, 1, 2]
    with pytest.raises(ValueError, match="case_id 1 occurs more than once"):
        load_dataset(str(write_jsonl([*tiny_knowedit_records(2), *tiny_knowedit_records(2)[1:]])))


def test_records_without_their_subject_are_counted(write_jsonl: Write) -> None:
    records = tiny_knowedit_records(4)
    records[1]["subject"] = "somebody else"
    found = load_dataset(str(write_jsonl(records)))
    assert (ids(found.cases), found.dropped) == ([0, 2, 3], {NO_SUBJECT: 1})
    _, notes = select(found, edits=2, negatives=None, order="first", seed=0)
    assert f"left out because {NO_SUBJECT}: 1." in notes[0]
    with pytest.raises(ValueError, match="in all 1 records the subject is not in the prompt"):
        load_dataset(str(write_jsonl(records[1:2])))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["knowedit_zsre_test_1301.jsonl", "ZsRE-test-all.json"])
def test_local_copies_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packed: bool
) -> None:
    records = tiny_knowedit_records(3)
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = load_dataset("knowedit-zsre", str(tmp_path))
    assert (found.name, found.source, len(found.cases)) == ("knowedit-zsre", path.name, 3)
    monkeypatch.setenv("SEQMMR_DATA", str(tmp_path))
    assert load_dataset("knowedit-zsre").digest == found.digest


def test_a_folder_without_a_copy_names_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"knowedit_zsre_test\*\.jsonl, ZsRE-test-all\.json"):
        local_copy(str(tmp_path), KNOWEDIT_FILES)


def test_the_named_dataset_must_be_in_its_schema(write_jsonl: Write) -> None:
    path = write_jsonl(tiny_records(2))
    with pytest.raises(ValueError, match="case 0: field 'prompt' is missing"):
        load_dataset("knowedit-zsre", str(path))
    path = write_jsonl(tiny_knowedit_records(2))
    with pytest.raises(ValueError, match="case 0: field 'requested_rewrite' is missing"):
        load_dataset("counterfact", str(path))


def test_the_hub_is_asked_for_one_file_at_its_pinned_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file.json").write_text(json.dumps(tiny_knowedit_records(4)))
    asked: list[Any] = []

    def serve(*args: str, **kwargs: str) -> str:
        asked.append((args, kwargs))
        return str(tmp_path / "file.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", serve)
    found = load_dataset("knowedit-zsre")
    name, revision, file = KNOWEDIT_HUB
    assert asked == [((name, file), {"repo_type": "dataset", "revision": revision})]
    assert found.source == f"{name}@{revision}/{file}"
    assert len(revision) == 40
    assert len(found.cases) == 4


@pytest.mark.parametrize("kind", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_an_unreachable_hub_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("no route to host\n  after 5 tries")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ValueError, match=r"owner/name@01234567 cannot be fetched: no route to host") as error:
        hub_file("owner/name", "0123456789" * 4, "file.json")
    assert "--data or SEQMMR_DATA" in str(error.value)
    assert "\n" not in str(error.value)


# -- selection ----------------------------------------------------------------------------------------------


def many(n: int) -> list[Row]:
    return [
        record(case_id=i, subject=f"Game {i}", prompt=f"What is Game {i}?", locality={
            "Relation_Specificity": [
                {"prompt": f"Game {i} license", "ground_truth": ["GPL"]},
                {"prompt": f"Game {i} platform", "ground_truth": ["Linux"]},
            ]
        })
        for i in range(n)
    ]  # fmt: skip


def test_unrelated_prompts_are_both_locality_prompts_of_301_other_records(write_jsonl: Write) -> None:
    dataset = load_dataset(str(write_jsonl(many(320))))
    found, notes = select(dataset, edits=10, negatives=None, order="random", seed=3)
    assert len(found.negatives) == 301
    assert not set(ids(found.cases)) & set(ids(found.negatives))
    assert found.unrelated == tuple(
        f"Game {i} {what}" for i in ids(found.negatives) for what in ("license", "platform")
    )
    assert [note for note in notes if "router" in note] == []


def test_a_number_of_unrelated_prompts_may_be_asked_for(write_jsonl: Write) -> None:
    dataset = load_dataset(str(write_jsonl(many(20))))
    found, _ = select(dataset, edits=10, negatives=5, order="first", seed=3)
    assert len(found.unrelated) == 5
    assert len(found.negatives) == 3
    found, notes = select(dataset, edits=10, negatives=50, order="first", seed=3)
    assert len(found.unrelated) == 20
    assert "20 unrelated prompts instead of 50" in notes[-1]
    found, notes = select(dataset, edits=10, negatives=None, order="first", seed=3)
    assert len(found.unrelated) == 20
    assert "the 20 unrelated prompts of 10 records instead of 301" in notes[-1]


def test_edits_that_cannot_all_take_are_kept_counted_and_said(write_jsonl: Write) -> None:
    records = many(12)
    records[1]["target_new"] = "video game"  # true already
    records[3] = copy.deepcopy(records[2]) | {"case_id": 3}  # again
    records[5] = copy.deepcopy(records[4]) | {"case_id": 5, "target_new": "card game"}  # another target
    records[11] = copy.deepcopy(records[0]) | {"case_id": 11}  # not edited
    dataset = load_dataset(str(write_jsonl(records)))
    found, notes = select(dataset, edits=10, negatives=None, order="first", seed=0)
    assert ids(found.cases) == list(range(10))
    assert (
        "Of the 10 edited records 1 write what is true already, 1 repeat another edit, 2 contradict"
        in notes[0]
    )
    assert "Prompts of the edited records that are not scored: blank answer 10." in notes[1]
    assert (
        "Of the 2 records whose prompts stand for unrelated queries 1 have a subject that is edited"
        in notes[2]
    )


def test_presets() -> None:
    for model, sizes in (("llama3-8b", (100, 10)), ("gpt2-xl", (100, 10)), ("smollm2-135m", (20, 5))):
        spec = resolve({"model": model, "dataset": "knowedit-zsre", "device": "cpu", "editors": ["memit"]})
        assert (spec.batch_size, spec.num_batches, spec.select) == (*sizes, "random")
    spec = resolve({"model": "llama3-8b", "device": "cpu", "editors": ["memit"]})
    assert (spec.dataset, spec.batch_size, spec.num_batches) == ("counterfact", 200, 10)


def test_settings_are_not_chosen_by_metrics_without_a_score(
    write_jsonl: Write, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tiny_knowedit_records(5))
    assert tune.main(["--model", str(tiny_folder), "--dataset", str(path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "have no Score to choose by" in error
    assert error.count("\n") == 1


# -- argmax along forced answers ----------------------------------------------------------------------------


def make_queries() -> list[tuple[str, str]]:
    queries = []
    for made in tiny_knowedit_records(8):
        case = to_knowedit_case(made, 0)
        assert case is not None
        probes = [probe for some in case.probes.values() for probe in some]
        queries += [(probe.prompt, answer) for probe in probes for answer in probe.answers]
    return [*queries, ("A", "Oslo"), ("A", "the old town"), ("A", "Malmö Zürich Santiago")]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_predictions_equal_one_forward_an_answer(model_type: str, bos: bool) -> None:
    model, tokenizer = tiny_model(model_type, dtype=torch.float64), tiny_tokenizer(bos=bos)
    queries = make_queries()
    assert {1, 3} <= {len(target_ids(tokenizer, answer)) for _, answer in queries}
    found = predict(model, tokenizer, queries)
    for (prompt, answer), prediction in zip(queries, found, strict=True):
        wanted, predicted = forced_prediction(model, tokenizer, prompt, answer)
        assert prediction.answer == tuple(wanted)
        assert prediction.predicted == tuple(predicted)
        assert prediction.right == sum(a == b for a, b in zip(wanted, predicted, strict=True))
    assert len({token for prediction in found for token in prediction.predicted}) > 5


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_the_size_of_a_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    model, tokenizer = tiny_model("qwen2", dtype=torch.float64), tiny_tokenizer(bos=False)
    usual = predict(model, tokenizer, make_queries())
    shapes: list[tuple[int, ...]] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: shapes.append(tuple(args[0].shape))
    )
    monkeypatch.setattr(scoring, "PASS_TOKENS", tokens)
    assert predict(model, tokenizer, make_queries()) == usual
    handle.remove()
    if tokens == 1:
        assert max(rows for rows, _ in shapes) <= 3  # one prompt, its answers


def test_answers_of_one_prompt_share_its_forward_and_equal_queries_are_computed_once() -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer(bos=True)
    rows: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, args, _out: rows.append(args[0].shape[0])
    )
    queries = [("In the old town", answer) for answer in ("Rome", "Oslo", "Rome in Lima", "Rome")]
    told: list[tuple[int, int]] = []
    found = predict(model, tokenizer, queries, progress=lambda *step: told.append(step))
    handle.remove()
    assert rows == [1, 1]  # the prompt, and the one answer of several tokens
    assert found[0] == found[3]
    assert told == [(3, 3)]


def test_logits_that_are_not_finite_are_no_result() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="'In the old town' are not finite"):
        predict(model, tokenizer, [("In the old town", "Rome")])


# -- rows ---------------------------------------------------------------------------------------------------


def rows_of(model: Any, unedited: list[Row] | None = None) -> list[Row]:
    cases = [case for made in tiny_knowedit_records(8) if (case := to_knowedit_case(made, 0))]
    probes = list(batch_probes([cases[:4], cases[4:]]))
    fields = probe_fields(model, tiny_tokenizer(bos=True), probes, unedited=unedited)
    return [row | found for (row, _), found in zip(probes, fields, strict=True)]


def test_rows_name_their_prompts_and_count_tokens() -> None:
    rows = rows_of(tiny_model("gpt2", dtype=torch.float64))
    keys = [(row["case_id"], row["kind"], row["index"]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row["batch"] for row in rows} == {1, 2}
    usual = {"case_id", "batch", "kind", "index", "prompt", "tokens", "tokens_right"}
    for row in rows:
        more = {"relation_specificity": {"tokens_agreeing", "predicted"}}.get(row["kind"], set())
        if row["kind"].startswith("portability"):
            more = {"tokens_any", "tokens_right_any"}
        assert row.keys() == usual | more
        assert 0 <= row["tokens_right"] <= row["tokens"] > 0


def test_the_unedited_model_agrees_with_itself_and_another_one_as_often_as_their_argmax() -> None:
    plain, other = (tiny_model("gpt2", dtype=torch.float64, seed=seed) for seed in (0, 1))
    unedited = rows_of(plain)
    edited = rows_of(other, unedited)
    tokenizer = tiny_tokenizer(bos=True)
    answers = {
        probe.prompt: probe.answers[0]
        for made in tiny_knowedit_records(8)
        if (case := to_knowedit_case(made, 0))
        for probe in case.probes["relation_specificity"]
    }
    seen = 0
    for before, after in zip(unedited, edited, strict=True):
        if before["kind"] == "relation_specificity":
            assert before["tokens_agreeing"] == before["tokens"]
            one, two = (
                forced_prediction(model, tokenizer, before["prompt"], answers[before["prompt"]])[1]
                for model in (plain, other)
            )
            assert after["tokens_agreeing"] == sum(a == b for a, b in zip(one, two, strict=True))
            seen += after["tokens_agreeing"] < after["tokens"]
    assert seen


def test_the_best_answer_counts_beside_the_forced_one(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = [
        Prediction((1, 2, 3), (1, 0, 0)),  # a third
        Prediction((4, 5), (4, 5)),  # all
        Prediction((6, 7, 8, 9), (6, 7, 8, 0)),  # more tokens, a smaller share
    ]
    monkeypatch.setattr("harness.probes.predict", lambda *_, **__: predictions)
    probe = ({"kind": "portability_reasoning"}, Probe("p", ("a", "b", "c")))
    (fields,) = probe_fields(None, None, [probe], unedited=None)  # type: ignore[arg-type]
    assert fields == {"tokens": 3, "tokens_right": 1, "tokens_any": 2, "tokens_right_any": 2}


# -- metrics ------------------------------------------------------------------------------------------------


def made_up(records: int = 30, *, seed: int = 0) -> list[Row]:
    """Rows of records that have one to three groups of portability, or none."""
    draw, shape = random.Random(seed), random.Random(99)
    rows = []
    for case_id in range(records):
        for kind in FORCED_KINDS:
            most = 1 if kind.startswith("re") and kind != "relation_specificity" else 3
            least = 0 if kind.startswith("portability") else 1
            for index in range(shape.randint(least, most)):
                tokens = shape.randint(1, 5)
                row = {
                    "case_id": case_id, "batch": 1, "kind": kind, "index": index,
                    "prompt": f"{case_id} {kind} {index}", "tokens": tokens,
                    "tokens_right": draw.randint(0, tokens), "tokens_agreeing": draw.randint(0, tokens),
                }  # fmt: skip
                if kind.startswith("portability"):
                    row |= {"tokens_any": 4, "tokens_right_any": draw.randint(0, 4)}
                rows.append(row)
    return rows


def scored(rows: list[Row], baseline: list[Row] | None = None, **more: Any) -> dict[str, Any]:
    base = None if baseline is None else forced_shares(baseline)
    return {score.metric: score for score in forced_scores(forced_shares(rows, **more), base, 0)}


@pytest.mark.parametrize("seed", range(4))
def test_shares_equal_the_literal_ones(seed: int) -> None:
    rows = made_up(seed=seed)
    found, wanted = scored(rows), knowedit_rates(rows)
    assert list(found) == [*FORCED, *(f"{name}_exact" for name in EXACT)]
    assert found.keys() == wanted.keys()
    for metric, value in wanted.items():
        assert found[metric].value == pytest.approx(value, abs=1e-12), metric
        kind = FORCED[metric.removesuffix("_exact")][0]
        assert found[metric].n == sum(row["kind"] == kind for row in rows)
        assert found[metric].protocol == "teacher_forced"
        assert found[metric].low <= found[metric].value <= found[metric].high


def test_a_record_without_a_group_does_not_count_in_it() -> None:
    base = {"index": 0, "tokens": 2, "tokens_right": 1, "tokens_any": 2, "tokens_right_any": 2, "prompt": ""}
    rows = [base | {"case_id": case_id, "kind": "rewrite"} for case_id in range(4)]
    rows += [base | {"case_id": 2, "kind": "portability_reasoning"}]
    found = scored(rows)
    assert list(found) == [
        "rewrite_acc", "portability_reasoning", "portability_reasoning_any", "rewrite_acc_exact",
        "portability_reasoning_exact",
    ]  # fmt: skip
    assert found["rewrite_acc_exact"].value == 0
    assert (found["portability_reasoning"].value, found["portability_reasoning"].n) == (0.5, 1)
    assert found["portability_reasoning_any"].value == 1


def test_intervals_resample_the_records_that_have_the_group_and_are_paired() -> None:
    rows, baseline = made_up(80, seed=7), made_up(80, seed=7)
    for row in rows[::9]:
        row["tokens_right"] = row["tokens"]
    found = scored(rows, baseline)
    for metric in ("rewrite_acc", "portability_logical_generalization"):
        own, before = (forced_shares(some)[metric].values for some in (rows, baseline))
        step = 1.5 / len(own) / 5
        for column, low, high in (
            (own, found[metric].low, found[metric].high),
            (own - before, found[metric].difference_low, found[metric].difference_high),
        ):
            interval = stats.bootstrap(
                (column,), np.mean, method="percentile", n_resamples=5_000, rng=np.random.default_rng(5)
            ).confidence_interval
            assert (low, high) == pytest.approx((interval.low, interval.high), abs=2 * step)
        assert found[metric].difference == pytest.approx(np.mean(own - before))


def test_a_prompt_sent_to_the_unedited_model_has_its_outcome() -> None:
    edited, unedited = made_up(seed=1), made_up(seed=2)
    for row in unedited:
        row["tokens_agreeing"] = row["tokens"]
    draw = random.Random(0)
    routes = [draw.choice(["edited", "unedited"]) for _ in edited]
    shown = [a if route == "edited" else b for a, b, route in zip(edited, unedited, routes, strict=True)]
    found = scored(edited, unedited=unedited, routes=routes)
    for metric, value in knowedit_rates(shown).items():
        assert found[metric].value == pytest.approx(value, abs=1e-12)
    away = scored(edited, unedited=unedited, routes=["unedited"] * len(edited))["relation_specificity"]
    assert (away.low, away.value, away.high) == (1, 1, 1)
    names = [score.metric for score in route_scores(edited, routes, 0, FORCED_KINDS)]
    assert names == [f"route_{kind}" for kind in FORCED_KINDS]


# -- the real records ---------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_records_are_read(real_data: str) -> None:
    found = load_dataset("knowedit-zsre", real_data)
    assert (len(found.cases), sum(found.dropped.values())) == (1301, 0)
    kinds = [kind for case in found.cases for kind in case.prompts if kind.startswith("portability")]
    assert [kinds.count(f"portability_{name}") for name in (
        "reasoning", "logical_generalization", "subject_aliasing")] == [771, 267, 263]  # fmt: skip
    assert all(len(case.unrelated_prompts) == 2 for case in found.cases)
    assert all(case.rewrite_prompt == case.prompts["rewrite"][0] for case in found.cases)
    chosen, notes = select(found, edits=1000, negatives=None, order="random", seed=0)
    assert (len(chosen.cases), len(chosen.negatives), len(chosen.unrelated)) == (1000, 301, 602)
    assert "301" in notes[-1]
    _, notes = select(found, edits=1301, negatives=None, order="first", seed=0)
    assert "43 write what is true already, 8 repeat another edit, 20 contradict another edit" in notes[0]


@pytest.mark.data
def test_the_real_wiki_counterfact_is_in_the_schema(real_data: str) -> None:
    path = next(Path(real_data).glob("extra/knowedit_wiki_counterfact*.jsonl"), None)
    if path is None:
        pytest.skip("the folder has no KnowEdit wiki_counterfact")
    found = load_dataset(str(path))
    assert len(found.cases) == 839
    probe = found.cases[0].probes["portability_reasoning"][0]  # type: ignore[attr-defined]
    assert probe.answers == ("Syrian pound", "SYP", "LS", "Syrian lira")
