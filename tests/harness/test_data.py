"""Reading, checking and choosing records."""

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from benchmarks.tiny import tiny_records
from harness import data
from harness.data import (
    COUNTERFACT_FILES,
    COUNTERFACT_HUB,
    Dataset,
    hub_records,
    load_dataset,
    local_copy,
    select,
    to_case,
)

Write = Callable[..., Path]


def record(case_id: int | str = 7, **rewrite: Any) -> dict[str, Any]:
    return {
        "case_id": case_id,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "subject": "Danielle Darrieux",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
        }
        | rewrite,
        "paraphrase_prompts": ["Darrieux is a native speaker of", "Danielle Darrieux speaks"],
        "neighborhood_prompts": ["The native language of Montesquieu is"],
        "generation_prompts": [],
    }


def without(path: str) -> dict[str, Any]:
    """The record without one field, named by dots."""
    changed = copy.deepcopy(record())
    *parents, last = path.split(".")
    inner = changed
    for name in parents:
        inner = inner[name]
    del inner[last]
    return changed


def having(path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record())
    *parents, last = path.split(".")
    inner = changed
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return changed


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- one record ---------------------------------------------------------------------------------------------


def test_a_record_becomes_a_case() -> None:
    case = to_case(record(), 1)
    assert case.case_id == 7
    assert case.request.case_id == 7
    assert case.request.prompt == "The mother tongue of {} is"
    assert case.request.target_new == "English"
    assert case.target_true == "French"
    assert case.rewrite_prompt == "The mother tongue of Danielle Darrieux is"
    assert case.prompts == {
        "rewrite": ("The mother tongue of Danielle Darrieux is",),
        "paraphrase": ("Darrieux is a native speaker of", "Danielle Darrieux speaks"),
        "neighborhood": ("The native language of Montesquieu is",),
    }
    assert case.generation_prompts == ()


def test_a_record_without_id_is_known_by_its_position() -> None:
    assert to_case(without("case_id"), 12).case_id == 12


@pytest.mark.parametrize(
    "field",
    [
        "requested_rewrite",
        "requested_rewrite.prompt",
        "requested_rewrite.subject",
        "requested_rewrite.target_new",
        "requested_rewrite.target_true",
        "requested_rewrite.target_new.str",
        "requested_rewrite.target_true.str",
        "paraphrase_prompts",
        "neighborhood_prompts",
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ValueError, match="case 7") as error:
        to_case(without(field), 1)
    named = field.removesuffix(".str").rpartition(".")[2]
    assert named in one_line(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("requested_rewrite", "a text"),
        ("requested_rewrite", None),
        ("requested_rewrite.prompt", 3),
        ("requested_rewrite.prompt", "no place for the subject"),
        ("requested_rewrite.prompt", "{} and {} are"),
        ("requested_rewrite.prompt", ""),
        ("requested_rewrite.subject", ["a"]),
        ("requested_rewrite.subject", ""),
        ("requested_rewrite.subject", "  "),
        ("requested_rewrite.target_new", "English"),
        ("requested_rewrite.target_new.str", ""),
        ("requested_rewrite.target_new.str", " \t"),
        ("requested_rewrite.target_new.str", 5),
        ("requested_rewrite.target_new.str", None),
        ("requested_rewrite.target_true", None),
        ("requested_rewrite.target_true.str", ""),
        ("requested_rewrite.target_true.str", ["French"]),
        ("paraphrase_prompts", []),
        ("paraphrase_prompts", "one text"),
        ("paraphrase_prompts", ["fine", ""]),
        ("paraphrase_prompts", ["fine", 3]),
        ("paraphrase_prompts", None),
        ("neighborhood_prompts", []),
        ("neighborhood_prompts", {"a": "b"}),
        ("neighborhood_prompts", [" "]),
        ("generation_prompts", "one text"),
        ("generation_prompts", [None]),
    ],
)
def test_a_wrong_value_is_named_with_its_case(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="case 7") as error:
        to_case(having(field, value), 1)
    assert field.removesuffix(".str").rpartition(".")[2] in one_line(error)


@pytest.mark.parametrize("case_id", [None, 1.5, [1], {"a": 1}, True])
def test_a_case_id_is_a_number_or_a_text(case_id: Any) -> None:
    with pytest.raises(ValueError, match=r"record 3: case_id"):
        to_case(record(case_id), 3)


@pytest.mark.parametrize("new", ["French", " French", "French "])
def test_a_target_that_is_true_already_is_refused(new: str) -> None:
    with pytest.raises(ValueError, match=r"case 7: target_new equals target_true 'French'"):
        to_case(record(target_new={"str": new}), 1)


def test_generation_prompts_may_be_empty_or_absent() -> None:
    assert to_case(record(), 1).generation_prompts == ()
    assert to_case(without("generation_prompts"), 1).generation_prompts == ()


# -- files --------------------------------------------------------------------------------------------------


def test_a_file_is_read_plain_packed_or_as_an_array(tmp_path: Path, write_jsonl: Write) -> None:
    records = tiny_records(4)
    plain = write_jsonl(records)
    packed = tmp_path / "records.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    array = tmp_path / "records.json"
    array.write_text("\n " + json.dumps(records, indent=1))
    found = [load_dataset(str(path)) for path in (plain, packed, array)]
    assert [case.case_id for case in found[0].cases] == [0, 1, 2, 3]
    assert found[0].cases == found[1].cases == found[2].cases
    assert len({dataset.digest for dataset in found}) == 1
    assert [dataset.source for dataset in found] == ["records.jsonl", "records.jsonl.gz", "records.json"]


def test_the_digest_depends_on_every_value_and_the_order(write_jsonl: Write) -> None:
    records = tiny_records(3)
    digests = {load_dataset(str(write_jsonl(records))).digest}
    other = copy.deepcopy(records)
    other[1]["neighborhood_prompts"][0] += "!"
    digests.add(load_dataset(str(write_jsonl(other))).digest)
    digests.add(load_dataset(str(write_jsonl(records[::-1]))).digest)
    assert len(digests) == 3


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n\n".join(json.dumps(r) for r in tiny_records(2)) + "\n\n")
    assert len(load_dataset(str(path)).cases) == 2


def test_a_line_separator_inside_a_text_is_no_line_end(tmp_path: Path) -> None:
    changed = having("requested_rewrite.subject", "Danielle\u2028Darrieux\x85")
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(changed, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_dataset(str(path)).cases[0].request.subject == "Danielle\u2028Darrieux\x85"


PACKED = gzip.compress(json.dumps(record()).encode(), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", json.dumps(record()).encode() + b'\n{"case_id": 2,\n', r"a\.jsonl', line 2: not JSON"),
        ("a.json", b"[{}", r"a\.json' is not JSON"),
        ("a.jsonl", b"", r"a\.jsonl' has no records"),
        ("a.jsonl", b"\n \n", r"a\.jsonl' has no records"),
        ("a.json", b"[]", r"a\.json' has no records"),
        ("a.jsonl", b'{"case_id": "\xe9"}', r"a\.jsonl' is not UTF-8"),
        ("a.jsonl", json.dumps(record()).encode("utf-16"), r"a\.jsonl' is not UTF-8"),
        ("a.jsonl", json.dumps(record()).encode() + b"\n3\n", r"a\.jsonl', record 2: 3 is not an object"),
        ("a.json", b'[{"case_id": 1}, "text"]', r"a\.json', record 2: 'text' is not an object"),
        ("a.jsonl.gz", PACKED[:-20], r"a\.jsonl\.gz' cannot be read"),
        ("a.jsonl.gz", b"not packed at all", r"a\.jsonl\.gz' cannot be read"),
        ("a.jsonl.gz", PACKED[:12] + b"\xff\xff\xff\xff" + PACKED[16:], r"a\.jsonl\.gz' cannot be read"),
    ],
)
def test_a_broken_file_is_named_with_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_dataset(str(path))
    one_line(error)


def test_a_folder_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_dataset(str(tmp_path))


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"unknown dataset 'factz'; known: facts, counterfact") as error:
        load_dataset("factz")
    one_line(error)


def test_a_repeated_case_id_is_named(write_jsonl: Write) -> None:
    records = [record("a"), record("b", subject="Anna"), record("a", subject="Clara")]
    with pytest.raises(ValueError, match=r"records\.jsonl: case_id 'a' occurs more than once"):
        load_dataset(str(write_jsonl(records)))


def test_all_records_of_a_contradiction_are_dropped_and_counted(write_jsonl: Write) -> None:
    records = [
        record(1),
        record(2, prompt="{} speaks the language", target_new={"str": "Latin"}),  # the same relation
        record(3, relation_id="P19"),  # the same subject, another relation
        record(4, subject="Anna"),
    ]
    dataset = load_dataset(str(write_jsonl(records)))
    assert [case.case_id for case in dataset.cases] == [3, 4]
    assert sum(dataset.dropped.values()) == 2


def test_records_marked_as_conflicting_are_dropped_and_counted(write_jsonl: Write) -> None:
    records = [record(1), record(2, subject="Anna") | {"no_subject_relation_conflict": False}]
    dataset = load_dataset(str(write_jsonl(records)))
    assert [case.case_id for case in dataset.cases] == [1]
    assert sum(dataset.dropped.values()) == 1


def test_without_a_relation_the_prompt_tells_contradictions(write_jsonl: Write) -> None:
    records = [record(1), record(2), record(3, prompt="{} speaks")]
    for changed in records:
        del changed["requested_rewrite"]["relation_id"]
    assert [case.case_id for case in load_dataset(str(write_jsonl(records))).cases] == [3]


def test_nothing_but_contradictions_is_refused(write_jsonl: Write) -> None:
    with pytest.raises(ValueError, match=r"all 2 records contradict"):
        load_dataset(str(write_jsonl([record(1), record(2)])))


# -- selection ----------------------------------------------------------------------------------------------


@pytest.fixture
def dataset() -> Dataset:
    cases = tuple(to_case(r, n) for n, r in enumerate(tiny_records(30), start=1))
    return Dataset(name="made up", source="here", digest="0", cases=cases, dropped={})


def ids(cases: tuple[data.EditCase, ...]) -> list[int | str]:
    return [case.case_id for case in cases]


def test_first_takes_the_first_and_draws_the_negatives_from_the_rest(dataset: Dataset) -> None:
    found, notes = select(dataset, edits=10, negatives=None, order="first", seed=0)
    assert ids(found.cases) == list(range(10))
    assert len(set(ids(found.negatives))) == 10
    assert set(ids(found.negatives)) <= set(range(10, 30))
    assert notes == []


@pytest.mark.parametrize("order", ["first", "random"])
def test_equal_seeds_choose_alike_and_others_do_not(dataset: Dataset, order: str) -> None:
    made = [select(dataset, edits=8, negatives=6, order=order, seed=seed)[0] for seed in (3, 3, 4)]
    assert made[0] == made[1]
    assert ids(made[0].negatives) != ids(made[2].negatives)
    assert (ids(made[0].cases) == ids(made[2].cases)) is (order == "first")


@pytest.mark.parametrize("order", ["first", "random"])
@pytest.mark.parametrize("seed", range(5))
def test_no_record_is_edited_and_a_negative(dataset: Dataset, order: str, seed: int) -> None:
    found, _ = select(dataset, edits=15, negatives=15, order=order, seed=seed)
    assert len({*ids(found.cases), *ids(found.negatives)}) == 30


def test_fewer_negatives_than_wanted_are_said(dataset: Dataset) -> None:
    found, notes = select(dataset, edits=25, negatives=None, order="random", seed=0)
    assert len(found.negatives) == 5
    assert len(notes) == 1
    assert "5 unrelated prompts instead of 25" in notes[0]


def test_all_records_can_be_edited(dataset: Dataset) -> None:
    found, notes = select(dataset, edits=30, negatives=3, order="random", seed=0)
    assert sorted(ids(found.cases)) == list(range(30))
    assert found.negatives == ()
    assert "0 unrelated prompts instead of 3" in notes[0]


def test_more_edits_than_records_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"31 edits asked, dataset made up has 30 usable records") as error:
        select(dataset, edits=31, negatives=1, order="first", seed=0)
    assert "--num-batches" in one_line(error)


# -- local copies -------------------------------------------------------------------------------------------


def counterfact(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Dataset:
    """Reading ``counterfact`` where the hub must not be asked."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    return load_dataset("counterfact", **kwargs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "name", ["multi_counterfact.json", "counterfact.json", "counterfact_original_829.jsonl"]
)
def test_local_copies_are_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, packed: bool
) -> None:
    records = tiny_records(3)
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = counterfact(monkeypatch, data=str(tmp_path))
    assert (found.name, found.source, len(found.cases)) == ("counterfact", path.name, 3)
    assert counterfact(monkeypatch, data=str(path)).digest == found.digest
    monkeypatch.setenv("SEQMMR_DATA", str(tmp_path))
    assert counterfact(monkeypatch).digest == found.digest


def test_the_flag_comes_before_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_jsonl: Write
) -> None:
    write_jsonl(tiny_records(2), "one/counterfact.json")
    write_jsonl(tiny_records(5), "two/counterfact.json")
    monkeypatch.setenv("SEQMMR_DATA", str(tmp_path / "one"))
    assert len(counterfact(monkeypatch, data=str(tmp_path / "two")).cases) == 5


def test_the_first_pattern_that_fits_wins(tmp_path: Path) -> None:
    names = ["counterfact_original_829.jsonl", "counterfact.json.gz", "multi_counterfact.json"]
    for name in names:
        (tmp_path / name).touch()
        assert local_copy(str(tmp_path), COUNTERFACT_FILES).name == name


def test_a_derived_set_is_used_only_where_its_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_jsonl: Write
) -> None:
    path = write_jsonl(tiny_records(2), "counterfact_reconstructed.jsonl")
    with pytest.raises(ValueError, match=r"has none of multi_counterfact\.json") as error:
        counterfact(monkeypatch, data=str(tmp_path))
    assert "\n" not in str(error.value)
    assert counterfact(monkeypatch, data=str(path)).source == path.name


def test_a_missing_data_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist; correct --data or SEQMMR_DATA"):
        counterfact(monkeypatch, data=str(tmp_path / "nowhere"))


# -- the hub ------------------------------------------------------------------------------------------------


def test_the_hub_is_read_at_its_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    records = tiny_records(6)
    asked: list[tuple[str, str, str]] = []

    def serve(name: str, *, revision: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, revision, split))
        return records[1::2] if split == "train" else records[::2]

    monkeypatch.setattr(datasets, "load_dataset", serve)
    monkeypatch.setenv("SEQMMR_DATA", "")  # set to nothing is not set
    found = load_dataset("counterfact")
    assert asked == [(*COUNTERFACT_HUB, "train"), (*COUNTERFACT_HUB, "test")]
    assert ids(found.cases) == list(range(6))  # the file's order, whatever the splits'
    assert found.source == "@".join(COUNTERFACT_HUB)
    assert len(COUNTERFACT_HUB[1]) == 40


@pytest.mark.parametrize("kind", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_an_unreachable_hub_is_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("no route to host\n  after 5 tries")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"owner/name@01234567 cannot be fetched: no route to host") as error:
        hub_records("owner/name", "0123456789" * 4, ("train",))
    assert "--data or SEQMMR_DATA" in one_line(error)


# -- the real records ---------------------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_records_are_read(real_data: str) -> None:
    found = load_dataset("counterfact", real_data)
    assert found.source.startswith("counterfact_original")
    assert len(found.cases) == 786
    assert sum(found.dropped.values()) == 829 - 786
    assert all(len(case.paraphrase_prompts) == 2 for case in found.cases)


def test_the_embedded_facts_ignore_the_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMMR_DATA", "/nowhere")
    assert len(load_dataset("facts").cases) > 1000


# -- prompts that only routers are asked --------------------------------------------------------------------


def test_optional_fields_become_prompts_for_routers() -> None:
    more = {
        "aliases": ["Mademoiselle D.", "Danielle"],
        "hops": [{"prompt": "The king of the country whose language she speaks is", "answer_new": "a"}],
        "same_subject": [{"prompt": "Danielle Darrieux was born in", "answer": "b"}],
        "portability": {"New Question": "Who else speaks it?", "New Answer": "c"},
        "unrelated_relation": {"relation_id": "mother", "question": "Who is her mother?", "object": "d"},
        "alternative_subject": "Darrieux",
    }
    case = to_case(record() | more, 1)
    assert case.aliases == (
        "Mademoiselle D.",
        "Danielle",
    )  # the alternative subject is not given with the edit
    assert case.route_prompts == {
        "alias": tuple(
            f"The mother tongue of {name} is" for name in ("Mademoiselle D.", "Danielle", "Darrieux")
        ),
        "hop": ("The king of the country whose language she speaks is", "Who else speaks it?"),
        "same_subject": ("Danielle Darrieux was born in", "Who is her mother?"),
    }
    assert case.prompts == to_case(record(), 1).prompts
    none = to_case(record() | dict.fromkeys(more), 1)
    assert none == to_case(record(), 1)
    assert (none.aliases, none.route_prompts) == ((), {})
    assert hash(case) != hash(none)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("aliases", "Danielle", "field 'aliases' is 'Danielle', not a list"),
        ("aliases", ["fine", " "], "aliases[1]: ' ' is not a text"),
        ("aliases", ["fine", None], "aliases[1]: None is not a text"),
        ("hops", {"prompt": "a"}, "field 'hops' is {'prompt': 'a'}, not a list"),
        ("hops", ["a"], "hops[0] is 'a', not a dict"),
        ("hops", [{"answer": "a"}], "hops[0]: field 'prompt' is missing"),
        ("same_subject", [{"prompt": "a"}, {"prompt": 3}], "same_subject[1]: field 'prompt' is 3, not a str"),
        ("same_subject", [{"prompt": ""}], "same_subject[0].prompt: '' is not a text"),
        ("portability", ["a"], "field 'portability' is ['a'], not a dict"),
        ("portability", {"New Question": 3}, "portability.New Question: 3 is not a text"),
        ("portability", {"New question": "a"}, "'New Question' is missing"),
        ("unrelated_relation", {"question": " "}, "unrelated_relation.question: ' ' is not a text"),
        ("unrelated_relation", "a", "field 'unrelated_relation' is 'a', not a dict"),
        ("alternative_subject", ["a"], "field 'alternative_subject' is ['a'], not a str"),
        ("alternative_subject", "", "alternative_subject: '' is not a text"),
        ("alternative_subjet", "a", "'alternative_subject' is missing"),
    ],
)
def test_a_broken_optional_field_is_named_with_its_case(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match="case 7") as error:
        to_case(record() | {field: value}, 1)
    assert said in one_line(error)


def test_the_embedded_facts_have_prompts_for_routers() -> None:
    cases = load_dataset("facts").cases
    counts = {kind: sum(len(case.route_prompts.get(kind, ())) for case in cases) for kind in ("alias", "hop")}
    assert counts == {"alias": 204, "hop": 4376}
    assert sum(len(case.aliases) for case in cases) == 204
