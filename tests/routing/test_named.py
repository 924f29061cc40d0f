"""Routers by name, and composed."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch

import routing
from routing import Composed, Decision, Router, Subject


class Fixed:
    """A router of given scores."""

    def __init__(self, name: str, scores: Sequence[float]) -> None:
        self.name, self.scores, self.added = name, scores, 0

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        self.added += len(texts)

    def route(self, texts: Sequence[str]) -> list[Decision]:
        return [
            Decision(expert=self.name if score >= 0 else None, score=score, nearest=(i,))
            for i, score in enumerate(self.scores)
        ]


CASES = list(product((-2.0, 0.0, 3.0), (-3.0, 0.0, 1.0), (-1.0, 0.0, 2.0)))


def routed(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    fixed = {
        letter: Fixed(letter, column) for letter, column in zip("abc", zip(*CASES, strict=True), strict=True)
    }
    table = {letter: (object, lambda *_, made=made: made) for letter, made in fixed.items()}
    monkeypatch.setattr("routing.named.ROUTERS", table)
    monkeypatch.setattr("routing.named.dataclasses.fields", lambda kind: [])
    router = routing.build(name, lambda texts: torch.ones(len(texts), 1))
    router.add("edited", ["x"])
    assert [made.added for made in fixed.values()] == [name.count(letter) for letter in "abc"]
    return router.route(["text"] * len(CASES))


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("b", lambda *scores: scores[1]),
        ("a&b", lambda a, b, c: min(a, b)),
        ("a|b", lambda a, b, c: max(a, b)),
        ("a&b|c", lambda a, b, c: max(min(a, b), c)),
        ("a | b & c", lambda a, b, c: max(a, min(b, c))),
        ("a&b&c", lambda *scores: min(scores)),
    ],
)
def test_scores_join_as_the_name_says(name: str, score: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, decision in zip(CASES, routed(name, monkeypatch), strict=True):
        assert decision.score == score(*values)  # type: ignore[operator]
        assert (decision.expert is not None) == (decision.score >= 0)
        if decision.expert:
            assert values["abc".index(decision.expert)] == decision.score


@pytest.mark.parametrize("name", ["", "nearest", "topk&", "topk||subject", "topk & nearest", "TOPK"])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown router .*known: "):
        routing.fields(name)
    with pytest.raises(ValueError, match=r"unknown router .*known: "):
        routing.check(name, {})
    with pytest.raises(ValueError, match=r"unknown router .*known: "):
        routing.build(name, torch.ones)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("topk", {"k": 3}, "router 'topk' has no field 'k'; known: \\['top_k'"),
        ("topk", {"top_k": 0}, "router 'topk': top_k is 0"),
        ("relation", {"threshold": 1.5}, "router 'relation': threshold is 1.5"),
        ("alias", {"spans": 0}, "router 'alias': spans is 0"),
        ("calibrated", {"threshold": float("nan")}, "router 'calibrated': threshold is nan"),
        ("calibrated", {"coefficients": "nowhere.json"}, "nowhere.json' cannot be read"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(name: str, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        routing.check(f"subject|{name}", {name: settings, "subject": {}})
    routing.check("subject", {name: settings})


def test_names_of_parts() -> None:
    assert routing.fields("subject&relation|alias|subject") == ("subject", "relation", "alias")
    assert isinstance(routing.build("topk", torch.ones, {"topk": {"top_k": 3}}), routing.TopK)
    composed: Router = routing.build("topk|topk", torch.ones)
    assert isinstance(composed, Composed)
    assert composed.route([]) == []
