from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.text import Span, asked, capitalised, folded, normal, sentences


@given(st.text(max_size=60), st.booleans())
def test_folding_knows_where_each_character_stood(text: str, diacritics: bool) -> None:
    text = normal(text)
    spelled, offsets = folded(text, diacritics=diacritics)
    assert len(offsets) == len(spelled) + 1
    assert list(offsets) == sorted(offsets)
    assert offsets[-1] == len(text)
    for character, offset in zip(spelled, offsets, strict=False):
        assert (character == " " and text[offset].isspace()) or character in folded(
            text[offset], diacritics=diacritics
        )[0]
    assert "  " not in spelled


@given(st.text("aB. \n?!'\"", max_size=60))
def test_sentences_are_in_order_and_leave_only_white_space_and_quotes_out(text: str) -> None:
    parts = sentences(text)
    assert all(part.start < part.end for part in parts)
    assert all(one.end <= two.start for one, two in pairwise(parts))
    kept = "".join(text[part.start : part.end] for part in parts)
    assert [c for c in kept if c.isalpha()] == [c for c in text if c.isalpha()]
    part = asked(text)
    assert 0 <= part.start <= part.end <= len(text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("In which city did Naimee Coleman have a job?", ["Naimee Coleman"]),
        ("The capital of Grand Duchy of Finland is", ["Grand Duchy of Finland"]),
        ("J. K. Paasikivi worked in", ["J. K. Paasikivi"]),
        ("Was Charles de Gaulle born in Lille?", ["Charles de Gaulle", "Lille"]),
        ("iPhone 4, created by", ["iPhone 4"]),
        ("tram 75, located in", []),
        ("It is in", []),
        ("Who is The Rock?", ["The Rock"]),
    ],
)
def test_names_by_their_capitals(text: str, names: list[str]) -> None:
    found = capitalised(text, Span(0, len(text)))
    assert [text[start:end] for start, end in found] == names
