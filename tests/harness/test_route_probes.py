"""Prompts for routers: of each kind the right ones, the same each time, and what they are scored as."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from editors import EditRequest
from harness.data import EditCase, to_case, to_knowedit_case
from harness.metrics import resampling_counts
from harness.route_probes import (
    MOST,
    QUESTIONS_FILE,
    RouteProbe,
    _near,
    _noise,
    _Subjects,
    first_sentence,
    probe_rows,
    probe_scores,
    route_probes,
)
from reports.probes import KINDS

CITIES = ("Aba", "Bel", "Cor", "Dun", "Esk", "Fyn", "Gor", "Hov")
TEXTS = ("The weather was fine on that day.", "A dog barked at the river.", "Nothing else happened.")


def case(
    case_id: int,
    subject: str,
    prompt: str = "{} was born in",
    relation: str | None = "P19",
    *,
    paraphrases: Sequence[str] | None = None,
    neighbors: Sequence[str] = ("Nobody was born in", "Somebody was born in"),
    **more: Sequence[str],
) -> EditCase:
    return EditCase(
        case_id=case_id,
        request=EditRequest(case_id=case_id, prompt=prompt, subject=subject, target_new=CITIES[case_id % 8]),
        target_true="Rome",
        paraphrase_prompts=tuple(
            (f"It rained. {subject} came from", f"{subject} comes from")
            if paraphrases is None
            else paraphrases
        ),
        neighborhood_prompts=tuple(neighbors),
        relation_id=relation,
        route_prompts={kind: tuple(prompts) for kind, prompts in more.items()},
    )


def by_kind(probes: Sequence[RouteProbe]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for probe in probes:
        found.setdefault(probe.kind, []).append(probe.prompt)
    return found


def make(edited: Sequence[EditCase], others: Sequence[EditCase] = (), **more: Any) -> dict[str, list[str]]:
    return by_kind(route_probes(edited, others, **{"seed": 0, **more}))


# -- kinds --------------------------------------------------------------------------------------------------


def test_prompts_of_a_record_go_to_their_kinds() -> None:
    found = make(
        [
            case(
                1,
                "Ann Ox",
                alias=["Annie was born in", "ann ox was born in"],
                hop=["What river flows through the birthplace of Ann Ox?"],
                same_subject=["Who is the mother of Ann Ox?"],
            )
        ],
        tasks=["Review: good\nSentiment:", "Review: good\nSentiment:"],
        texts=TEXTS,
    )
    assert found["rewrite"] == ["Ann Ox was born in"]
    assert found["paraphrase"] == ["It rained. Ann Ox came from", "Ann Ox comes from"]
    assert found["paraphrase_noisy"] == ["It rained. Ann Ox came from"]
    assert found["paraphrase_clean"] == ["Ann Ox comes from"]
    assert found["alias"] == ["Annie was born in"]  # the other is the subject itself
    assert found["hop"] == ["What river flows through the birthplace of Ann Ox?"]
    assert found["same_subject"] == ["Who is the mother of Ann Ox?"]
    assert found["neighborhood"] == ["Nobody was born in", "Somebody was born in"]
    assert found["distracting"] == [
        "Ann Ox was born in Bel. Nobody was born in",
        "Ann Ox was born in Bel. Somebody was born in",
    ]
    assert found["task"] == ["Review: good\nSentiment:"]
    assert found["text"] == list(TEXTS)
    assert found["noise_neighborhood"][0] in {
        f"{t} {p} was born in" for t in TEXTS for p in ("Nobody", "Somebody")
    }
    assert found["noise_same_subject"][0] in {f"{t} Who is the mother of Ann Ox?" for t in TEXTS}
    assert found.keys() - KINDS.keys() == set()


def test_every_probe_says_where_it_should_go() -> None:
    probes = route_probes([case(1, "Ann Ox")], [case(2, "Bob Yak")], tasks=["a"], texts=TEXTS, seed=0)
    assert all(probe.to_edited == KINDS[probe.kind].to_edited for probe in probes)
    of_others = {probe.kind for probe in probes if probe.case_id == 2}
    assert of_others == {"distracting_other", "chat_other"}
    assert {probe.kind for probe in probes if probe.case_id is None} == {"task", "text"}
    assert [kind for kind in KINDS if any(probe.kind == kind for probe in probes)] == list(
        dict.fromkeys(probe.kind for probe in probes)
    )


@pytest.mark.parametrize(
    ("prompt", "noisy"),
    [
        ("Ann Ox came from", False),
        ("It rained. Ann Ox came from", True),
        ("Is it so? Ann Ox came from", True),
        ("(He left in 1999.) Ann Ox came from", True),
        ("Category:Roads\nAnn Ox came from", True),
        ("The hometown of Ann Ox is", False),
        ("The U.S. state from which Ann Ox comes is", False),
        ("Which place is home to Ann Ox? It is", False),
        ("It rained. She came from", False),  # no subject, so nothing is known
    ],
)
def test_a_sentence_before_the_subjects_own_is_noise(prompt: str, noisy: bool) -> None:
    assert (_noise(prompt, "Ann Ox") > 0) == noisy


def test_a_neighbor_that_asks_an_edited_fact_is_left_out() -> None:
    edited = [
        case(1, "Ann Ox", neighbors=["BOB YAK was born in", "Bob Yak comes from", "Cy Asp was born in"]),
        case(2, "Bob Yak", neighbors=["Bob Yakson was born in"]),
    ]
    found = make(edited, texts=TEXTS)
    assert found["neighborhood"] == ["Cy Asp was born in", "Bob Yakson was born in"]
    assert found["distracting"] == [
        "Ann Ox was born in Bel. Cy Asp was born in",
        "Bob Yak was born in Cor. Bob Yakson was born in",
    ]
    assert not any("Bob Yak comes" in prompt for prompt in found["noise_neighborhood"])


def test_the_neighbor_of_an_edit_of_another_relation_stays() -> None:
    edited = [
        case(1, "Ann Ox", neighbors=["Bob Yak was born in"]),
        case(2, "Bob Yak", "{} speaks", "P1412", paraphrases=["Bob Yak uses the language"]),
    ]
    assert "Bob Yak was born in" in make(edited)["neighborhood"]


def test_other_relations_get_the_edited_subject_but_never_a_near_one() -> None:
    others = [
        case(10, "Cy Asp", "{} speaks", "P1412"),
        case(11, "Di Emu", "The mother tongue of {} is", "P103"),
        case(12, "Eel Bay", "{} is located in", "P17"),  # not of a person
        case(13, "Flo Gnu", "{} died in", "P20"),
    ]
    edited = [case(1, "Ann Ox", "{} is a native speaker of", "P103"), case(2, "Bob Yak")]
    found = route_probes(edited, others, seed=0)
    mine = {
        case_id: {p.prompt for p in found if (p.kind, p.case_id) == ("same_subject_completion", case_id)}
        for case_id in (1, 2)
    }
    assert mine[1] <= {"Ann Ox died in", "Ann Ox was born in"}  # P1412 is near P103
    assert len(mine[1]) == 2
    assert mine[2] <= {
        "Bob Yak speaks", "Bob Yak died in", "The mother tongue of Bob Yak is",
        "Bob Yak is a native speaker of",
    }  # fmt: skip
    asked = json.loads(QUESTIONS_FILE.read_text("utf-8"))["relations"]
    (chat,) = [p.prompt for p in found if p.kind == "chat_same_subject" and p.case_id == 1]
    assert "Ann Ox" in chat
    assert chat.replace("Ann Ox", "{}") not in asked["P103"]["questions"] + asked["P1412"]["questions"]


def test_relations_that_share_a_template_are_near() -> None:
    cases = [case(i, f"S{i}", "{} is from", "P19" if i < 3 else "P27") for i in range(6)]
    assert _near(cases)["P19"] >= {"P19", "P27"}
    assert "P27" not in _near(cases[:5]).get("P19", set())  # two records may be wrong about it


def test_a_subject_that_is_edited_twice_is_not_asked_what_may_be_edited() -> None:
    edited = [
        case(1, "Ann Ox", same_subject=["Where did Ann Ox die?"]),
        case(2, "Ann Ox", "{} died in", "P20", same_subject=["Where was Ann Ox born?"]),
    ]
    found = make(edited, [case(10, "Cy Asp"), case(11, "Di Emu", "{} died in", "P20")])
    assert "same_subject" not in found
    assert "same_subject_completion" not in found
    questions = json.loads(QUESTIONS_FILE.read_text("utf-8"))["relations"]
    taken = {q.replace("{}", "Ann Ox") for name in ("P19", "P20") for q in questions[name]["questions"]}
    assert not taken & set(found["chat_same_subject"])
    assert set(found["chat"]) <= taken


def test_records_that_are_not_edited_hold_no_edited_subject() -> None:
    edited = [case(1, "Ann Ox"), case(2, "Bob Yak")]
    others = [
        case(10, "ann ox", "{} died in", "P20"),
        case(11, "Cy Asp", neighbors=["The son of Bob Yak was born in"]),
        case(12, "Di Emu"),
    ]
    found = route_probes(edited, others, seed=0)
    told = {(p.kind, p.case_id) for p in found if p.case_id in (10, 11, 12)}
    assert told == {("distracting_other", 12), ("chat_other", 11), ("chat_other", 12)}
    assert not any("Ann Ox" in p.prompt for p in found if p.kind == "chat_other")


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("ANN ox's hat", True),
        ("Ann Oxford", False),
        ("Ann, Ox", True),
        ("Joann Ox", False),
        ("ann ann ox", True),
        ("!", False),
        ("", False),
    ],
)
def test_subjects_are_found_as_words(text: str, there: bool) -> None:
    assert _Subjects(["Ann Ox", "!"]).in_text(text) == there


def test_a_prompt_of_the_other_label_is_left_out() -> None:
    found = make([case(1, "Ann Ox", hop=["Nobody was born in"])])
    assert found["hop"] == ["Nobody was born in"]
    assert found["neighborhood"] == ["Somebody was born in"]


def test_relations_that_the_table_does_not_know_have_no_chat() -> None:
    found = make([case(1, "Ann Ox", relation=None), case(2, "Bob Yak", "{} likes", "P9999")])
    assert not {"chat", "chat_same_subject", "same_subject_completion"} & found.keys()


def test_knowedits_records() -> None:
    record = {
        "case_id": 3, "subject": "Ann Ox", "prompt": "Where was Ann Ox born?", "target_new": "Bel",
        "ground_truth": ["Rome"], "rephrase_prompt": "What is the birthplace of Ann Ox?",
        "locality": {"Relation_Specificity": [
            {"prompt": "The mother of Ann Ox is", "ground_truth": ["Eve"]},
            {"prompt": "Ann Ox place of birth", "ground_truth": ["Rome"]},
        ]},
        "portability": {
            "Reasoning": [{"prompt": "In which country was Ann Ox born?", "ground_truth": "Bellia"}],
            "Logical_Generalization": [{"prompt": "Who was born in Bel?", "ground_truth": "Ann Ox"}],
            "Subject_Aliasing": [{"prompt": "Where was Annie born?", "ground_truth": "Bel"}],
        },
    }  # fmt: skip
    made = to_knowedit_case(record, 0)
    assert made is not None
    assert make([made]) == {
        "rewrite": ["Where was Ann Ox born?"],
        "paraphrase": ["What is the birthplace of Ann Ox?"],
        "paraphrase_clean": ["What is the birthplace of Ann Ox?"],
        "alias": ["Where was Annie born?"],
        "hop": ["In which country was Ann Ox born?", "Who was born in Bel?"],
        "same_subject": ["The mother of Ann Ox is"],  # the other asks the edited fact
    }


# -- any records --------------------------------------------------------------------------------------------


@st.composite
def files(draw: st.DrawFn) -> tuple[list[EditCase], list[EditCase]]:
    relations = {
        "P19": "{} was born in",
        "P20": "{} died in",
        "P103": "{} is a native speaker of",
        "P17": "{} is in",
    }
    names = [f"{a} {b}" for a in ("Ann", "Bob", "Cy", "Di", "Eve") for b in ("Ox", "Yak", "Emu")]
    chosen = draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(sorted(relations))),
                           min_size=2, max_size=14, unique=True))  # fmt: skip
    cases = [
        case(i, name, relations[relation], relation, neighbors=[relations[relation].replace("{}", other)
             for other in draw(st.lists(st.sampled_from(names), min_size=1, max_size=6))])
        for i, (name, relation) in enumerate(chosen)
    ]  # fmt: skip
    edited = draw(st.integers(1, len(cases)))
    return cases[:edited], cases[edited:]


@settings(max_examples=25, deadline=None)
@given(files(), st.integers(0, 3))
def test_what_holds_for_all_probes(found: tuple[list[EditCase], list[EditCase]], seed: int) -> None:
    edited, others = found
    probes = route_probes(edited, others, tasks=["a", "b"], texts=TEXTS, seed=seed)
    assert probes == route_probes(edited, others, tasks=["a", "b"], texts=TEXTS, seed=seed)
    kinds = Counter((probe.kind, probe.prompt) for probe in probes)
    assert set(kinds.values()) == {1}
    keys = Counter((probe.kind, probe.case_id, probe.index) for probe in probes)
    assert set(keys.values()) == {1}
    of_record = Counter((probe.kind, probe.case_id) for probe in probes if probe.case_id is not None)
    assert all(count <= MOST.get(kind, 1) for (kind, _), count in of_record.items())
    labels: dict[str, set[bool]] = {}
    for probe in probes:
        labels.setdefault(probe.prompt, set()).add(probe.to_edited)
    assert all(len(label) == 1 for label in labels.values())
    asking = {one.rewrite_prompt for one in edited}
    assert not any(p.prompt in asking or any(p.prompt.endswith(f". {a}") for a in asking)
                   for p in probes if not p.to_edited)  # fmt: skip


def test_another_seed_draws_others() -> None:
    edited = [case(i, f"S{i}", neighbors=[f"N{i}{j} was born in" for j in range(9)]) for i in range(8)]
    first, second = (make(edited, seed=seed)["neighborhood"] for seed in (0, 1))
    assert len(first) == len(second) == 8 * MOST["neighborhood"]
    assert first != second


def test_a_record_has_its_probes_whatever_else_is_edited() -> None:
    cases = [case(i, f"S{i}", neighbors=[f"N{i}{j} was born in" for j in range(9)]) for i in range(8)]
    few, many = (route_probes(cases[:n], (), seed=0) for n in (2, 8))
    assert [p for p in many if p.case_id in (0, 1)] == few


# -- the table of questions ---------------------------------------------------------------------------------


def test_the_table_of_questions_is_complete() -> None:
    table = json.loads(QUESTIONS_FILE.read_text("utf-8"))
    relations = table["relations"]
    assert len(relations) == 34
    for name, relation in relations.items():
        assert len(relation["questions"]) in (2, 3), name
        assert all(question.count("{}") == 1 for question in relation["questions"]), name
        others = set(table["asked_of"][relation["subjects"]]) - {name}
        for group in table["alike"]:
            others -= set(group) if name in group else set()
        assert others, f"nothing else can be asked of the subjects of {name}"
    named = {name for names in (*table["asked_of"].values(), *table["alike"]) for name in names}
    assert named <= relations.keys()


@pytest.mark.parametrize(
    ("paragraph", "sentence"),
    [
        ("J. R. R. Tolkien was an English writer and philologist. He wrote.",
         "J. R. R. Tolkien was an English writer and philologist."),
        ("Short one.", "Short one."),
        ('He said that this was "enough of it for one day." Then he left.',
         'He said that this was "enough of it for one day."'),
    ],
)  # fmt: skip
def test_first_sentences(paragraph: str, sentence: str) -> None:
    assert first_sentence(paragraph) == sentence


# -- scores and rows ----------------------------------------------------------------------------------------


def test_scores_equal_those_by_hand() -> None:
    def probe(kind: str, case_id: int | None, index: int) -> RouteProbe:
        return RouteProbe(
            kind=kind, prompt=f"{kind} {case_id} {index}", to_edited=KINDS[kind].to_edited,
            case_id=case_id, index=index,
        )  # fmt: skip

    probes = [probe("chat", 1, 0), probe("chat", 1, 1), probe("chat", 2, 0), probe("chat", 3, 0)]
    probes += [probe("text", None, i) for i in range(5)]
    sent = [True, False, True, True, False, False, True, False, False]
    scores = {score.metric: score for score in probe_scores(probes, sent, 4)}
    assert list(scores) == ["route_chat", "route_text"]
    for metric, values in (("route_chat", [0.5, 1, 1]), ("route_text", [0, 0, 1, 0, 0])):
        drawn = resampling_counts(len(values), 4) @ np.array(values) / len(values)
        assert scores[metric].value == pytest.approx(np.mean(values))
        assert (scores[metric].low, scores[metric].high) == pytest.approx(
            tuple(np.quantile(drawn, (0.025, 0.975)))
        )
        assert scores[metric].protocol == "routing"
    assert (scores["route_chat"].n, scores["route_text"].n) == (4, 5)


def test_rows_name_the_probes() -> None:
    probes = route_probes([case(1, "Ann Ox")], (), texts=TEXTS[:1], seed=0)
    rows = probe_rows(probes, 100)
    assert rows[0] == {
        "weights": "probes", "edits_applied": 100, "case_id": 1, "batch": None, "kind": "probe:rewrite",
        "index": 0, "prompt": "Ann Ox was born in", "to_edited": True,
    }  # fmt: skip
    assert len(rows) == len(probes)


# -- the schemas' optional fields ---------------------------------------------------------------------------


def test_probes_of_a_record_as_the_file_has_it() -> None:
    record = {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "{} was born in", "subject": "Ann Ox", "relation_id": "P19",
            "target_new": {"str": "Bel"}, "target_true": {"str": "Rome"},
        },
        "paraphrase_prompts": ["Ann Ox comes from"],
        "neighborhood_prompts": ["Cy Asp was born in"],
        "alternative_subject": "Annie",
        "portability": {"New Question": "In which country was Ann Ox born?"},
        "unrelated_relation": {"question": "Who is the mother of Ann Ox?"},
    }  # fmt: skip
    found = make([to_case(record, 1)])
    assert found["alias"] == ["Annie was born in"]
    assert found["hop"] == ["In which country was Ann Ox born?"]
    assert found["same_subject"] == ["Who is the mother of Ann Ox?"]
