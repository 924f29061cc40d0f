import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routing import Decision, Subject, SubjectConfig, SubjectRouter
from routing.subjects import SubjectIndex
from routing.text import normal


def no_embedding(texts: object) -> torch.Tensor:
    raise AssertionError("names need no embedding")


def router(*names: str, **fields: bool) -> SubjectRouter:
    made = SubjectRouter(SubjectConfig(**fields), no_embedding)
    made.add("edited", [f"{name} is" for name in names], [Subject(name=name) for name in names])
    return made


def sent(made: SubjectRouter, text: str) -> tuple[int, ...]:
    (decision,) = made.route([text])
    assert (decision.expert == "edited") == (decision.score >= 0) == bool(decision.nearest)
    return decision.nearest


words = st.text("abcdefgxyzäéßøıİçñΣσς日本", min_size=3, max_size=8).filter(lambda w: w.casefold() != "the")
names = st.lists(words, min_size=1, max_size=4).map(" ".join)
templates = st.sampled_from(
    [
        "{} is in",
        "The capital of {} is",
        "Where was {} born?",
        "({}), of",
        "In {}'s days,",
        "“{}” means",
        "{}",
        "1. {}!",
    ]
)


@given(names, templates, st.lists(names, max_size=4), st.sampled_from([str, str.upper, str.lower, str.title]))
def test_every_subject_is_found_in_any_template(
    name: str, template: str, others: list[str], case: object
) -> None:
    index = SubjectIndex()
    for place, other in enumerate([name, *others]):
        index.add(place, [other])
    text = normal(template.format(case(name)))  # type: ignore[operator]
    found = index.find(text)
    covered = [f for f in found if name.casefold() in text[f.span.start : f.span.end].casefold()]
    assert any(0 in f.places for f in found) or (case is not str and not covered) or len(covered) == 1


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("Mars", "Mars is", True),
        ("Mars", "Marshall is", False),
        ("Mars", "submars", False),
        ("Mars", "Mars's moons", True),
        ("Mars", "Mars’ moons", True),
        ("Mars", "(Mars)", True),
        ("Mars", "Mars-bound", True),
        ("Mars", "mars is", True),
        ("Mars", "MARS IS", True),
        ("Mars", "Mars7", False),
        ("Route 1", "Route 10 is", False),
        ("McDonald's", "McDonald’s is", True),
        ("New York", "New\n York  is", True),
        ("Besançon", "Besanc\u0327on is", True),
        ("Besançon", "Besancon is", True),
        ("Besancon", "Besançon is", True),
        ("Straße", "STRASSE is", True),
        ("İzmir", "izmir is", True),
        ("ﬁnland", "Finland is", True),
        ("Ｍａｒｓ", "Mars is", True),
        ("東京", "私は東京に住む", True),
        ("서울", "서울은 어디", True),
        ("C++", "C++ is", True),
        ("Mars", "\ud800 Mars is", True),
        ("It", "Where is it?", False),
        ("It", "It is a film by", True),
        ("It", "The film is good. It is by", False),
        ("The Who", "the who of it is", False),
        ("The Who", "What did The Who play?", True),
        ("X", "x is", False),
        ("X", "Who owns X?", True),
        ("...", "... is", True),
        ("W. T. Cosgrave", "A noise sentence. W. T. Cosgrave originated from", True),
        ("Yahoo!", "Yahoo! is", True),
        ("Washington, D.C.", "A noise. Washington, D.C. is in", True),
    ],
)
def test_boundaries_case_and_spelling(name: str, text: str, found: bool) -> None:
    assert bool(sent(router(name), text)) is found


def test_diacritics_count_where_they_are_asked_to() -> None:
    assert sent(router("Besançon", diacritics=True), "Besançon is") == (0,)
    assert sent(router("Besançon", diacritics=True), "Besancon is") == ()


def test_the_longest_of_overlapping_names_is_found_and_the_last_of_equal_ones() -> None:
    made = router("York", "New York", "New York City", "York")
    assert sent(made, "New York City is") == (2,)
    assert sent(made, "New York is") == (1,)
    assert sent(made, "York is") == (3, 0)
    assert sent(made, "New York and York") == (1, 3, 0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Mars is red. Venus is", (1,)),
        ("Mars is red. Pluto is", ()),
        ("Where is Mars? It is located in", (0,)),
        ("Where is Mars? Answer briefly.", (0,)),
        ("Mars, please. Where is Pluto?", ()),
        ("Hello! I read about Mars. How large is it?", (0,)),
        ("A noise, Dr. Mars is", (0,)),
        ("A noise\nMars is", (0,)),
        ("Mars is red.\n\nQuestion: how red?\nAnswer:", ()),
    ],
)
def test_only_the_sentence_asked_counts(text: str, found: tuple[int, ...]) -> None:
    made = router("Mars", "Venus")
    assert sent(made, text) == found
    if "Mars is red." in text:
        assert 0 in sent(router("Mars", "Venus", anywhere=True), text)


def test_aliases_are_names() -> None:
    made = SubjectRouter(SubjectConfig(), no_embedding)
    made.add("first", ["Mars is"], [Subject(name="Mars", aliases=("Red Planet", "  "))])
    made.add(None, ["Venus is"])
    assert made.route(["the red planet is"]) == [Decision(expert="first", score=10.0, nearest=(0,))]
    made.add("second", ["Pluto is"], [Subject(name="Pluto")])
    assert made.route(["Pluto is", "Venus is"]) == [
        Decision(expert="second", score=10.0, nearest=(2,)),
        Decision(expert=None, score=-10.0, nearest=()),
    ]
    assert made.route([]) == []


def test_an_edit_without_its_subject_is_refused_in_one_line() -> None:
    made = SubjectRouter(SubjectConfig(), no_embedding)
    made.add("edited", [])
    for subjects in (None, [], [Subject(name="Mars")] * 2):
        with pytest.raises(ValueError, match="needs the subject of every edit: 1 texts came with"):
            made.add("edited", ["Mars is"], subjects)
    assert made.route(["Mars is"])[0].expert is None


@given(st.lists(words, min_size=1, max_size=5), st.text("abc xyz.?! \n'日", max_size=30))
def test_texts_decide_alone(subjects: list[str], text: str) -> None:
    made = router(*subjects)
    texts = [text, *subjects, text]
    assert made.route(texts) == [made.route([one])[0] for one in texts]
