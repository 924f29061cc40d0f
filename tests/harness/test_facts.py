"""The embedded dataset: every record of the shipped file."""

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FACTS = Path(__file__).resolve().parents[2] / "harness" / "facts" / "facts.jsonl.gz"
PROMPT_LISTS = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
RELATIONS = {
    "city-country": "P17",
    "country-continent": "P30",
    "us-city-state": "P131",
    "country-language": "P37",
    "airport-country": "P17",
}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    with gzip.open(FACTS, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def truth(records) -> dict[str, dict[str, str]]:
    """Edit prompt of each record's subject -> its true object."""
    return {filled(r): true(r) for r in records}


def subject(record):
    return record["requested_rewrite"]["subject"]


def filled(record):
    return record["requested_rewrite"]["prompt"].format(subject(record))


def new(record):
    return record["requested_rewrite"]["target_new"]["str"]


def true(record):
    return record["requested_rewrite"]["target_true"]["str"]


def subject_of(prompt, record):
    """The subject that fills the record's template to give the prompt."""
    before, after = record["requested_rewrite"]["prompt"].split("{}")
    assert prompt.startswith(before) and prompt.endswith(after), prompt
    return prompt[len(before) : len(prompt) - len(after)]


def bare(name):
    return name.casefold().removeprefix("the ")


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_file_is_small_and_carries_no_time_or_name():
    header = FACTS.read_bytes()[:10]
    assert header[:4] == b"\x1f\x8b\x08\x00"  # gzip, deflate, no flags: no file name
    assert header[4:8] == b"\0\0\0\0"  # no time
    assert FACTS.stat().st_size < 1_500_000


def test_counts(records):
    assert 1_500 <= len(records) <= 2_500
    assert [r["case_id"] for r in records] == list(range(len(records)))
    assert set(Counter(r["relation"] for r in records)) == set(RELATIONS)
    assert sum(len(r["neighborhood_prompts"]) == 10 for r in records) > 1_200


def test_readme_states_the_counts(records):
    readme = (FACTS.parent / "README.md").read_text(encoding="utf-8")
    for relation, count in Counter(r["relation"] for r in records).items():
        assert f"| `{relation}` | {count:,} |" in readme
    assert f"{len(records):,} records" in readme


def test_schema(records):
    for r in records:
        assert set(r) == {
            "case_id",
            "requested_rewrite",
            "relation",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "attribute_prompts",
            "generation_prompts",
            "aliases",
            "hops",
            "same_subject",
            "source",
        }
        rewrite = r["requested_rewrite"]
        assert set(rewrite) == {"prompt", "subject", "relation_id", "target_new", "target_true"}
        assert set(rewrite["target_new"]) == set(rewrite["target_true"]) == {"str"}
        assert rewrite["relation_id"] == RELATIONS[r["relation"]]
        assert len(r["paraphrase_prompts"]) == len(set(r["paraphrase_prompts"])) == 2
        assert 5 <= len(r["neighborhood_prompts"]) <= 10
        assert 1 <= len(r["attribute_prompts"]) <= 10
        assert 2 <= len(r["generation_prompts"]) <= 5
        assert len(r["aliases"]) <= 5
        assert all(set(hop) == {"prompt", "answer_new", "answer_true"} for hop in r["hops"])
        assert all(set(fact) == {"prompt", "answer"} for fact in r["same_subject"])


def test_no_string_is_empty_or_has_loose_spaces(records):
    for r in records:
        for text in strings(r):
            assert text and text == text.strip() and "  " not in text, (r["case_id"], text)
            assert all(char.isprintable() and char != "\ufffd" for char in text), (r["case_id"], text)


def test_only_the_edit_prompt_has_a_placeholder(records):
    for r in records:
        assert r["requested_rewrite"]["prompt"].count("{}") == 1
        rest = {key: value for key, value in r.items() if key != "requested_rewrite"}
        assert not any("{" in text or "}" in text for text in strings(rest))


def test_prompts_about_the_subject_name_it(records):
    for r in records:
        asked = [*r["paraphrase_prompts"], *r["generation_prompts"]]
        asked += [item["prompt"] for item in (*r["hops"], *r["same_subject"])]
        assert all(subject(r) in prompt for prompt in asked), r["case_id"]
        assert filled(r) not in asked
        assert not any(prompt.startswith("the ") for prompt in asked)


def test_targets_differ_and_the_subject_does_not_tell_them(records):
    for r in records:
        a, b = bare(new(r)), bare(true(r))
        assert a not in b and b not in a, r["case_id"]
        for target in (a, b):
            assert f" {target} " not in f" {bare(subject(r))} ", r["case_id"]


def test_each_subject_is_edited_once_per_relation(records):
    pairs = Counter((r["requested_rewrite"]["relation_id"], subject(r)) for r in records)
    assert max(pairs.values()) == 1
    # A city has one true place in the file, whichever relation asks for it.
    cities = Counter(subject(r) for r in records if r["relation"] in ("city-country", "us-city-state"))
    assert max(cities.values()) == 1


def test_targets_come_from_the_objects_of_the_relation(records):
    objects = defaultdict(set)
    for r in records:
        objects[r["relation"]].add(true(r))
    for r in records:
        assert new(r) in objects[r["relation"]], r["case_id"]


def test_targets_are_written_one_way(records):
    names = {name for r in records for name in (new(r), true(r))}
    assert len({bare(name) for name in names}) == len(names)


def test_neighbours_are_other_subjects(records):
    for r in records:
        mine = bare(subject(r))
        prompts = r["neighborhood_prompts"] + r["attribute_prompts"]
        assert len(set(prompts)) == len(prompts), r["case_id"]
        for prompt in prompts:
            other = bare(subject_of(prompt, r))
            assert other not in mine and mine not in other, (r["case_id"], prompt)
            for target in (bare(new(r)), bare(true(r))):
                assert target not in other, (r["case_id"], prompt)


def test_neighbours_have_the_object_that_their_own_record_says(records, truth):
    seen = 0
    for r in records:
        for field, expected in (("neighborhood_prompts", true(r)), ("attribute_prompts", new(r))):
            for prompt in r[field]:
                if prompt in truth:
                    seen += 1
                    assert truth[prompt] == expected, (r["case_id"], prompt)
    assert seen > 1_000


def test_one_prompt_never_stands_for_two_objects(records):
    """A neighbour is no record's subject with another object, nor another record's neighbour with one."""
    objects = defaultdict(set)
    for r in records:
        objects[filled(r)].add(true(r))
        for prompt in r["neighborhood_prompts"]:
            objects[prompt].add(true(r))
        for prompt in r["attribute_prompts"]:
            objects[prompt].add(new(r))
        for fact in r["same_subject"]:
            objects[fact["prompt"]].add(fact["answer"])
    assert [prompt for prompt, found in objects.items() if len(found) > 1] == []


def test_most_city_neighbours_are_never_edited(records, truth):
    prompts = [p for r in records if r["relation"] == "city-country" for p in r["neighborhood_prompts"]]
    assert sum(prompt not in truth for prompt in prompts) > 0.75 * len(prompts)


def test_hops_follow_from_the_target_and_change(records):
    answers = defaultdict(set)
    for r in records:
        for hop in r["hops"]:
            assert hop["answer_new"].casefold() != hop["answer_true"].casefold(), r["case_id"]
            question = hop["prompt"].replace(subject(r), "{}")
            answers[r["relation"], question, new(r)].add(hop["answer_new"])
            answers[r["relation"], question, true(r)].add(hop["answer_true"])
    # The answer depends on the object alone.
    assert [key for key, found in answers.items() if len(found) > 1] == []
    assert sum(bool(r["hops"]) for r in records) > 0.95 * len(records)


def test_same_subject_facts_are_not_edited_elsewhere(records, truth):
    assert not any(fact["prompt"] in truth for r in records for fact in r["same_subject"])


def test_aliases_are_other_names_of_one_subject(records):
    owners = defaultdict(set)
    for r in records:
        for alias in r["aliases"]:
            assert alias.casefold() != subject(r).casefold()
            owners[alias.casefold()].add(subject(r))
    subjects = {subject(r).casefold() for r in records}
    assert all(len(names) == 1 for names in owners.values())
    assert not subjects & set(owners)


def test_relations_are_mixed(records):
    assert len({r["relation"] for r in records[:100]}) == len(RELATIONS)


@pytest.mark.parametrize(
    ("name", "relation", "expected"),
    [
        ("Tokyo", "city-country", "Japan"),
        ("The Hague", "city-country", "the Netherlands"),
        ("Miami", "us-city-state", "Florida"),
        ("Brazil", "country-language", "Portuguese"),
        ("Kenya", "country-continent", "Africa"),
    ],
)
def test_known_facts(records, name, relation, expected):
    assert [true(r) for r in records if subject(r) == name and r["relation"] == relation] == [expected]


@pytest.mark.parametrize(
    "name",
    ["Jerusalem", "Taipei", "Taiwan", "Israel", "Kosovo", "Sevastopol", "Srinagar", "Lhasa", "Pristina"],
)
def test_disputed_places_are_left_out(records, name):
    prompts = [text for r in records for text in strings(r)]
    assert not any(name in prompt for prompt in prompts)
