import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routing.search import TextSearch, directions


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 6), st.integers(1, 9), st.integers(1, 200))
def test_the_nearest_are_found_exactly(seed: int, count: int, d: int, k: int, cells: int) -> None:
    vectors = torch.randn(count + 10, d, generator=torch.Generator().manual_seed(seed))
    search = TextSearch(10**6)
    for start in range(0, count, 7):  # grows between searches
        texts = [str(i) for i in range(start, min(start + 7, count))]
        search.add(texts, range(len(texts)), lambda some: vectors[[int(text) for text in some]])
        search.vectors()
    queries = torch.nn.functional.normalize(vectors[count:], dim=1)
    exact = queries.double() @ search.vectors().double().T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("routing.search._CELLS", cells)
        cosines, rows = search.nearest(queries, k)
    assert cosines.shape == rows.shape == (10, min(k, count))
    torch.testing.assert_close(torch.from_numpy(cosines), exact.topk(min(k, count), dim=1).values)
    torch.testing.assert_close(torch.from_numpy(cosines), exact.gather(1, torch.from_numpy(rows)))


def test_a_text_is_kept_once_with_all_its_places() -> None:
    search, asked = TextSearch(10**6), []

    def embed(texts: object) -> torch.Tensor:
        asked.extend(texts)  # type: ignore[call-overload]
        return torch.ones(len(texts), 3)  # type: ignore[arg-type]

    assert search.add(["a", "b", "a"], [4, 5, 6], embed) == [0, 1, 0]
    assert search.add(["b", "c"], [7, 8], embed) == [1, 2]
    assert (asked, search.texts(), search.places) == (["a", "b", "c"], ["a", "b", "c"], [[4, 6], [5, 7], [8]])
    assert search.nearest(torch.ones(1, 3) / 3**0.5, 2)[1].tolist() == [[0, 1]]  # equal ones by row
    assert TextSearch(1).nearest(torch.ones(2, 3), 4)[0].shape == (2, 0)


def test_a_very_large_corpus_is_searched_by_an_index() -> None:
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(50, 32, generator=generator).repeat(30, 1)
    vectors = centres + 0.1 * torch.randn(1500, 32, generator=generator)
    exact, indexed = TextSearch(10**6), TextSearch(1000)
    for search in (exact, indexed):
        search.add([str(i) for i in range(1400)], range(1400), lambda texts: vectors[[int(t) for t in texts]])
    queries = torch.nn.functional.normalize(vectors[1400:], dim=1)
    assert (exact.nearest(queries, 3)[1] == indexed.nearest(queries, 3)[1]).all()


def test_what_has_no_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="'zero' is zero"):
        directions(lambda texts: torch.tensor([[1.0], [0.0]]), ["one", "zero"])
    with pytest.raises(ValueError, match="2 texts got"):
        directions(lambda texts: torch.ones(1, 4), ["a", "b"])
