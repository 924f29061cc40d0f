from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports.record import SCHEMA_VERSION, Record, Score, upgrade

finite = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | finite
text = st.text(max_size=8)
scores = st.builds(
    Score,
    metric=text,
    value=finite,
    low=maybe,
    high=maybe,
    n=st.integers(min_value=0),
    protocol=text,
    difference=maybe,
    difference_low=maybe,
    difference_high=maybe,
)
mapping = st.dictionaries(text, st.integers() | text, max_size=3)
records = st.builds(
    Record,
    schema_version=st.just(SCHEMA_VERSION),
    run_id=text,
    model=text,
    dataset=text,
    editor=text,
    cell=text,
    chain=st.none() | text,
    pruning_ratio=maybe,
    top_k=st.none() | st.integers(),
    encoder=st.none() | text,
    seed=st.none() | st.integers(),
    edits_applied=st.integers(min_value=0),
    slice=text,
    spec=mapping | text,
    provenance=mapping | text,
    scores=st.lists(scores, max_size=3).map(tuple),
    seconds=finite,
    error=st.none() | text,
)


@given(records)
def test_round_trip_through_json(record):
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_fields_are_those_of_the_contract(record):
    expected = (
        "schema_version run_id model dataset editor cell chain pruning_ratio top_k encoder seed "
        "edits_applied slice spec provenance scores seconds error merger router"
    )
    assert [field.name for field in fields(Record)] == expected.split()
    assert set(record(value=0.5).to_json()) == set(expected.split())


def test_a_score_without_difference_has_the_contracts_fields_only(score):
    fields_ = {"metric", "value", "low", "high", "n", "protocol"}
    assert set(score("efficacy", 0.5, low=None).to_json()) == fields_


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"colour": "red"}, r"Record: unknown fields \['colour'\]; known: .*'cell'"),
        ({"schema_version": 2}, "schema_version is 2; this version reads 1"),
        ({"schema_version": None}, "schema_version is None"),
        ({"edits_applied": "100"}, "edits_applied is '100', not int"),
        ({"edits_applied": 1.5}, "edits_applied is 1.5, not int"),
        ({"top_k": True}, "top_k is True"),
        ({"model": None}, "model is None, not str"),
        ({"scores": {}}, "scores is {}"),
        ({"scores": [3]}, "Score: not a JSON object: 3"),
        ({"scores": [{"metric": "efficacy"}]}, r"Score: missing fields \['high', 'low', 'n', "),
    ],
)
def test_a_wrong_record_is_refused_with_a_line(record, change, line):
    with pytest.raises(ValueError, match=line):
        Record.from_json(record(value=0.5).to_json() | change)


def test_a_missing_field_is_refused(record):
    data = record().to_json()
    del data["cell"]
    with pytest.raises(ValueError, match=r"missing fields \['cell'\]"):
        Record.from_json(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.5", True])
def test_a_score_is_a_finite_number(score, value):
    with pytest.raises(ValueError, match="efficacy: value is"):
        replace(score("efficacy", 0.5), value=value)


def test_upgrade_leaves_the_present_version_alone(record):
    data = record().to_json()
    assert upgrade(data) == data


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "x"},
        {"slice": "batch:1"},
        {"pruning_ratio": 0.1},
        {"top_k": 7},
        {"encoder": "e"},
        {"chain": "merged"},
        {"edits_applied": 1},
    ],
)
def test_identity_tells_records_apart(record, change):
    assert record(value=0.5).identity == record(value=0.6, seconds=9.0).identity
    assert record().identity != record(**change).identity
