import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

import routing.topk as topk
from routing import ROUTERS, Decision, TopK, TopKConfig


def lookup(vectors: dict[str, Sequence[float]]) -> Callable[[Sequence[str]], Tensor]:
    return lambda texts: torch.tensor([vectors[text] for text in texts], dtype=torch.float32)


def at(cosine: float, axis: int = 1) -> list[float]:
    """A unit vector of that cosine to the query (1, 0, 0, 0)."""
    vector = [cosine, 0.0, 0.0, 0.0]
    vector[axis] = math.sqrt(1 - cosine**2)
    return vector


def routed(corpus: Sequence[tuple[str | None, float]], k: int) -> Decision:
    """The decision on a query with these cosines to a corpus of labelled texts."""
    vectors = {f"text {i}": at(cosine, 1 + i % 3) for i, (_, cosine) in enumerate(corpus)}
    router = TopK(TopKConfig(top_k=k), lookup({"query": [1.0, 0, 0, 0], **vectors}))
    for i, (expert, _) in enumerate(corpus):
        router.add(expert, [f"text {i}"])
    (decision,) = router.route(["query"])
    return decision


def random_router(seed: int, positives: int, negatives: int, d: int, coarse: bool, k: int = 2) -> TopK:
    """Integer texts; with coarse coordinates many embeddings are equal or equally near."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(200, d, generator=generator)
    if coarse:
        vectors = vectors.sign()
    router = TopK(TopKConfig(top_k=k), lambda texts: vectors[[int(text) for text in texts]])
    router.add(None, [str(i) for i in range(negatives)])
    router.add("edited", [str(i) for i in range(negatives, negatives + positives)])
    return router


queries = [str(i) for i in range(100, 200)]
sizes = st.integers(0, 40)


@given(st.integers(0, 2**32), sizes, sizes, st.integers(1, 6), st.booleans())
def test_two_neighbours_decide_as_one(
    seed: int, positives: int, negatives: int, d: int, coarse: bool
) -> None:
    decisions = random_router(seed, positives, negatives, d, coarse).route_many(queries, (1, 2))
    assert [one.expert for one in decisions[1]] == [two.expert for two in decisions[2]]


@given(
    st.lists(st.tuples(st.booleans(), st.floats(-0.99, 0.99)), min_size=2, max_size=12),
    st.integers(1, 12),
)
def test_score_minimises_the_weighted_logistic_loss(corpus: list[tuple[bool, float]], k: int) -> None:
    decision = routed([("edited" if positive else None, cosine) for positive, cosine in corpus], k)
    nearest = [corpus[i] for i in decision.nearest]
    assert len(nearest) == min(k, len(corpus))
    dropped = [cosine for i, (_, cosine) in enumerate(corpus) if i not in decision.nearest]
    assert min(cosine for _, cosine in nearest) >= max(dropped, default=-1) - 1e-6

    def loss(s: float) -> float:
        return sum(
            math.exp(1 + cosine) * math.log1p(math.exp(-s if positive else s)) for positive, cosine in nearest
        )

    best = minimize_scalar(loss, bounds=(-10, 10), method="bounded", options={"xatol": 1e-9}).x
    assert decision.score == pytest.approx(best, abs=1e-4)
    assert (decision.expert == "edited") == (decision.score >= 0)


def test_score_is_the_log_ratio_of_weights() -> None:
    decision = routed([("edited", 0.7), (None, 0.4), (None, 0.1)], 2)
    assert decision.score == pytest.approx(0.3, abs=1e-6)
    assert decision.nearest == (0, 1)
    three = routed([("edited", 0.7), (None, 0.4), (None, 0.1)], 3)
    expected = math.log(math.exp(1.7) / (math.exp(1.4) + math.exp(1.1)))
    assert three.score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("lead", "expert"), [(0.68, None), (0.70, "edited")])
def test_one_positive_beats_two_negatives_from_a_lead_of_log_two_on(lead: float, expert: str | None) -> None:
    assert math.log(2) == pytest.approx(0.693, abs=1e-3)
    assert routed([(None, 0.1), ("edited", 0.1 + lead), (None, 0.1)], 3).expert == expert


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("order", [("edited", None, None, "edited"), (None, None, "edited", "edited")])
def test_ties_go_to_the_edited_model(order: tuple[str | None, ...], k: int) -> None:
    decision = routed([(expert, 0.5) for expert in order], k)
    assert decision.expert == "edited"
    assert (decision.score == 0) == (k == 4)
    by_rank = sorted(range(4), key=lambda i: (order[i] is None, i))
    assert decision.nearest == tuple(by_rank[:k])


def test_ties_beyond_the_spare_candidates_are_found_in_order() -> None:
    corpus: list[tuple[str | None, float]] = [(None, 0.5)] * 30 + [("edited", 0.5)] * 3
    assert routed(corpus, 5).nearest == (30, 31, 32, 0, 1)


def test_the_smallest_differences_of_embeddings_still_rank() -> None:
    negatives_nearer = 0
    for cosine in torch.linspace(0.1, 0.45, 60).tolist():
        vectors = {"query": [1.0, 0, 0, 0], "edit": at(cosine), "other": at(cosine + 6e-8)}
        router = TopK(TopKConfig(), lookup(vectors))
        router.add("edited", ["edit"])
        router.add(None, ["other"])
        edit, other = (float(unit[0, 0]) for unit in router._parts)  # their exact cosines
        (decision,) = router.route(["query"])
        assert (decision.expert is None) == (other > edit)
        negatives_nearer += other > edit
    assert negatives_nearer > 20


def test_an_edit_request_is_routed_to_its_edit() -> None:
    router = random_router(9, 60, 60, 16, coarse=False)
    for i, decision in enumerate(router.route([str(i) for i in range(60, 100)])):
        assert decision.expert == "edited"
        assert decision.nearest[0] == 60 + i


def test_the_expert_with_the_largest_weight_among_the_positives_answers() -> None:
    corpus = [("first", 0.5), ("second", 0.6), (None, 0.9), ("first", 0.55)]
    assert routed(corpus, 1).expert is None
    assert routed(corpus, 2).expert is None
    assert routed(corpus, 3).expert == "second"
    assert routed(corpus, 4).expert == "second"


def test_the_corpus_grows() -> None:
    router = TopK(TopKConfig(), lookup({"query": [1.0, 0], "far": [0.0, 1], "near": [2.0, 1]}))
    assert router.route(["query"]) == [Decision(expert=None, score=-10.0, nearest=())]
    router.add(None, ["far"])
    assert router.route(["query"]) == [Decision(expert=None, score=-10.0, nearest=(0,))]
    router.add("edited", [])
    router.add("edited", ["near"])
    (decision,) = router.route(["query"])
    assert (decision.expert, decision.nearest) == ("edited", (1, 0))
    router = TopK(TopKConfig(), lookup({"query": [1.0, 0], "near": [2.0, 1]}))
    router.add("edited", ["near"])
    assert router.route(["query"]) == [Decision(expert="edited", score=10.0, nearest=(0,))]


@given(
    st.integers(0, 2**32), st.integers(1, 40), sizes, st.integers(1, 300), st.integers(1, 7), st.booleans()
)
def test_chunks_of_queries_and_several_k_do_not_change_decisions(
    seed: int, positives: int, negatives: int, cells: int, chunk: int, coarse: bool
) -> None:
    router = random_router(seed, positives, negatives, 24, coarse, k=3)
    together = router.route_many(queries, (1, 3, 200))
    assert together[3] == router.route(queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_CELLS", cells)
        patch.setattr(topk, "_QUERIES", chunk)
        assert router.route_many(queries, (1, 3, 200)) == together
    assert [router.route([query])[0] for query in queries[:5]] == together[3][:5]


def test_the_search_is_exact() -> None:
    router = random_router(10, 50, 50, 8, coarse=False, k=4)
    vectors = router._embed([str(i) for i in range(200)]).double()
    vectors /= vectors.norm(dim=1, keepdim=True)
    cosines = (vectors[100:] @ vectors[:100].T).numpy()
    expected = np.argsort(-cosines, axis=1)[:, :4]
    assert [decision.nearest for decision in router.route(queries)] == [
        tuple(row) for row in expected.tolist()
    ]


@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-2, 1e-4, 0.0], ids=str)
@pytest.mark.parametrize("fast", [True, False], ids=["8 bits", "float32"])
def test_a_rough_search_first_finds_the_same_neighbours(
    spread: float, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On crowds of texts that 8 bits cannot tell apart, equal ones included."""
    monkeypatch.setattr(topk, "_eight_bits_are_fast", lambda: fast)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(30, 24, generator=generator).repeat(60, 1)
    vectors = centres + spread * torch.randn(1800, 24, generator=generator)
    router = TopK(TopKConfig(), lambda texts: vectors[[int(text) for text in texts]])
    router.add("edited", [str(i) for i in range(800)])
    router.add(None, [str(i) for i in range(800, 1600)])
    assert (router._rough_corpus() is not None) == fast
    asked = [str(i) for i in range(1500, 1800)]
    exact = torch.nn.functional.normalize(vectors, dim=1).double()
    exact = exact[1500:] @ exact[:1600].T
    for k in (1, 2, 7):
        for row, decision in zip(exact, router.route_many(asked, (k,))[k], strict=True):
            found = row[list(decision.nearest)]
            torch.testing.assert_close(found, row.topk(k).values, rtol=0, atol=1e-12)


def test_a_very_large_corpus_is_searched_by_an_index() -> None:
    """Well-separated groups: what the index leaves out is far away, so the decisions are the exact ones."""
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, 32, generator=generator).repeat(42, 1)
    vectors = centres + 0.1 * torch.randn(2100, 32, generator=generator)
    routers = []
    for indexed_from in (1000, 10**6):
        config = TopKConfig(indexed_from=indexed_from)
        routers.append(TopK(config, lambda texts: vectors[[int(text) for text in texts]]))
        routers[-1].add("edited", [str(i) for i in range(1000)])
        routers[-1].add(None, [str(i) for i in range(1000, 1500)])
    asked = [str(i) for i in range(1500, 2100)]
    assert routers[0].route(asked) == routers[1].route(asked)
    for router in routers:  # the index takes up what is added later
        router.add("late", [str(i) for i in range(1500, 2100)])
    assert routers[0].route(asked) == routers[1].route(asked)
    assert [routers[0].route([text])[0].nearest[0] for text in asked[:3]] == [1500, 1501, 1502]
    assert routers[1]._index is None


def test_an_index_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    router = TopK(TopKConfig(indexed_from=1), lambda texts: torch.ones(len(texts), 4))
    router.add("edited", ["a"])
    with pytest.raises(ValueError, match=r"pip install 'seqmmr\[index\]'"):
        router.route(["a"])


def test_only_directions_count() -> None:
    router = random_router(11, 30, 30, 8, coarse=False)
    embed = router._embed
    scaled = TopK(TopKConfig(), lambda texts: embed(texts) * 2.0 ** torch.arange(len(texts))[:, None].fmod(9))
    scaled.add(None, [str(i) for i in range(30)])
    scaled.add("edited", [str(i) for i in range(30, 60)])
    assert scaled.route(queries) == router.route(queries)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_embedding_without_direction_is_refused_with_its_text(bad: float) -> None:
    router = TopK(TopKConfig(), lookup({"good": [1.0, 0.0], "bad": [bad, 0.0]}))
    with pytest.raises(ValueError, match="'bad'"):
        router.add("edited", ["good", "bad"])


def test_embeddings_that_do_not_fit_are_refused() -> None:
    router = TopK(TopKConfig(), lookup({"two": [1.0, 0.0], "three": [1.0, 0.0, 0.0]}))
    router.add(None, ["two"])
    with pytest.raises(ValueError, match="3 dimensions, those of the corpus 2"):
        router.route(["three"])
    with pytest.raises(ValueError, match="2 texts"):
        TopK(TopKConfig(), lambda texts: torch.ones(1, 4)).add(None, ["a", "b"])
    with pytest.raises(ValueError, match="ks is"):
        router.route_many(["two"], (2, 0))
    with pytest.raises(ValueError, match="top_k is 0"):
        TopKConfig(top_k=0)
    assert router.route([]) == []


def test_the_default_is_the_papers() -> None:
    config_type, router_type = ROUTERS["topk"]
    assert config_type().top_k == 2
    assert router_type is TopK
