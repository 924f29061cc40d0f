"""What a calibrated router weighs: a few comparable numbers of a query and each edit that it may ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from routing.api import Embed, Subject
from routing.reading import Edits, Reading, is_bare, masked, read
from routing.search import TextSearch, directions
from routing.subjects import SubjectIndex
from routing.wordings import WordingSpace, read_wordings

FEATURES = (
    "prompt",  # cosine of the sentence asked and the edit's prompt
    "unrelated",  # cosine of the sentence asked and the nearest unrelated text
    "question",  # whether the sentence asked ends with a question mark
    "relation",  # cosine of both without the name, in the space of wordings; 0 if none is named or it is bare
    "bare",  # whether either of both then says no more than "it is in"; 0 where none is named
)
_NAMED, _NEAR = 8, 3  # edits of named subjects and nearest edits that are compared


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Queries with the edits that they may ask for."""

    query: NDArray[np.int64]  # (pairs,) in order
    place: NDArray[np.int64]  # (pairs,) corpus position of the edit
    named: NDArray[np.bool_]  # (pairs,) whether the edit's subject stands in the sentence asked
    features: NDArray[np.float64]  # (pairs, len(FEATURES))


class Comparison:
    """A corpus of edits and unrelated texts, and what queries have in common with its edits."""

    def __init__(
        self,
        router: str,
        embed: Embed,
        *,
        indexed_from: int,
        unrelated: float,
        wordings: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """router: its name, for errors. unrelated: stands for that feature while there are no such texts.
        wordings: groups of prompts that ask for the same relation; None: those of ``wordings.json``.
        """
        self._embed = embed
        self._space = WordingSpace(embed, wordings or read_wordings())
        self._unrelated = unrelated
        self.edits = Edits(router)
        self._index = SubjectIndex()
        self._prompts, self._relations, self._others = (TextSearch(indexed_from) for _ in range(3))
        self._rows: dict[int, tuple[int, int]] = {}  # corpus position -> rows of its prompt and relation
        self._bare: list[bool] = []  # by row of relations

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        """Extend the corpus, as ``Router.add``."""
        edits = self.edits.take(expert, texts, subjects)
        if expert is None and texts:
            self._others.add(texts, range(len(texts)), self._embed)
        if not edits:
            return
        places = [edit.place for edit in edits]
        prompts = self._prompts.add([edit.prompt for edit in edits], places, self._embed)
        relations = self._relations.add([masked(edit) for edit in edits], places, self._space.embed)
        self._rows |= zip(places, zip(prompts, relations, strict=True), strict=True)
        self._bare += [is_bare(text) for text in self._relations.texts()[len(self._bare) :]]
        for edit in edits:
            self._index.add(edit.place, (edit.subject.name, *edit.subject.aliases))

    def pairs(self, texts: Sequence[str]) -> Pairs:
        """The edits that each text may ask for: those whose subject it names, and the nearest few."""
        readings = [read(text, self._index) for text in texts]
        questions = [reading.question for reading in readings]
        asked = {i: r.masked(r.found[0].span) for i, r in enumerate(readings) if r.found}
        distinct = {text: i for i, text in enumerate(dict.fromkeys([*questions, *asked.values()]))}
        vectors = directions(self._embed, list(distinct))
        by_question = vectors[[distinct[text] for text in questions]]
        near = self._prompts.nearest(by_question, _NEAR)[1].tolist()
        query, place, named = self._candidates(readings, near)
        features = np.zeros((len(query), len(FEATURES)))
        rows = np.array([self._rows[p] for p in place.tolist()])
        features[:, 0] = _cosines(self._prompts, rows[:, 0], by_question[query])
        features[:, 1] = self._unrelated
        if len(self._others):
            features[:, 1] = self._others.nearest(by_question, 1)[0][query, 0]
        features[:, 2] = np.array([text.rstrip("\"')] ").endswith("?") for text in questions])[query]
        if named.any():
            of = query[named].tolist()
            by_relation = self._space.map(vectors[[distinct[asked[i]] for i in of]])
            cosines = _cosines(self._relations, rows[named, 1], by_relation)
            says_little = {i: is_bare(text) for i, text in asked.items()}
            either = zip(of, rows[named, 1].tolist(), strict=True)
            bare = np.array([says_little[i] or self._bare[row] for i, row in either])
            features[named, 3] = np.where(bare, 0.0, cosines)
            features[named, 4] = bare
        return Pairs(query=query, place=place, named=named, features=features)

    def _candidates(
        self, readings: Sequence[Reading], near: Sequence[Sequence[int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Query, place and whether it is named, of each pair; near: rows of prompts by query."""
        found: list[tuple[int, int, bool]] = []
        for i, (reading, rows) in enumerate(zip(readings, near, strict=True)):
            places = [place for name in reading.found for place in reversed(name.places)]
            named = dict.fromkeys(places[:_NAMED], True)
            for row in rows:
                named.setdefault(self._prompts.places[row][-1], False)
            found += [(i, place, is_named) for place, is_named in named.items()]
        query, place, named_ = zip(*found, strict=True)
        return np.array(query), np.array(place), np.array(named_)


def _cosines(search: TextSearch, rows: NDArray[np.int64], queries: torch.Tensor) -> NDArray[np.float64]:
    """(pairs,) of the texts of these rows and (pairs, d) queries, all of unit length."""
    texts = search.vectors()[torch.from_numpy(rows)].double()
    found: NDArray[np.float64] = (texts * queries.double()).sum(1).cpu().numpy()
    return found
