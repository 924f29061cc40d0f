"""A query goes to the edited model where it asks for the relation that an edit is about."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from routing.api import Decision, Embed, Subject
from routing.reading import Edits, is_bare, masked, read
from routing.search import TextSearch, directions
from routing.spans import Templates, candidate_spans
from routing.subject import CERTAIN
from routing.subjects import SubjectIndex
from routing.wordings import WordingSpace, read_wordings

SLOPE = 10.0  # of a score, a unit of cosine


@dataclass(frozen=True, kw_only=True)
class RelationConfig:
    """Matching by what is asked."""

    threshold: float = 0.08  # cosine of two prompts without their subjects; chosen on CounterFact records
    wordings: bool = True  # it is taken in the space of wordings (``WordingSpace``), else as embedded
    indexed_from: int = 1_000_000  # different prompts from which the search is approximate

    def __post_init__(self) -> None:
        check_cosine("threshold", self.threshold)
        check_count("indexed_from", self.indexed_from)


def check_cosine(name: str, value: float) -> None:
    """Raises ValueError unless it is from -1 to 1."""
    if not -1 <= value <= 1:
        raise ValueError(f"{name} is {value}; a cosine is from -1 to 1")


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless it is at least 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


class RelationRouter:
    """Router by what is asked: the sentence without its name, against the edits' prompts without theirs.

    Where edited subjects are named, with the prompts of their edits, else with all. Score: ten times the
    cosine beyond the threshold; 0, so edited, where a subject is named and either of both prompts says no
    more than "it, of".
    """

    def __init__(self, config: RelationConfig, embed: Embed) -> None:
        self.config = config
        self._space = WordingSpace(embed, read_wordings())
        self._embed = self._space.embed if config.wordings else embed
        self._edits = Edits("relation")
        self._index = SubjectIndex()
        self._search = TextSearch(config.indexed_from)
        self._templates = Templates()
        self._bare: list[bool] = []  # by row of the search
        self._row: dict[int, int] = {}  # corpus position -> its prompt without a subject

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        edits = self._edits.take(expert, texts, subjects)
        if not edits:
            return
        self._templates.add(edits)
        places = [edit.place for edit in edits]
        rows = self._search.add([masked(edit) for edit in edits], places, self._embed)
        self._row |= zip(places, rows, strict=True)
        self._bare += [is_bare(text) for text in self._search.texts()[len(self._bare) :]]
        for edit in edits:
            self._index.add(edit.place, (edit.subject.name, *edit.subject.aliases))

    def route(self, texts: Sequence[str]) -> list[Decision]:
        if not texts or not len(self._search):
            return [Decision(expert=None, score=-CERTAIN, nearest=()) for _ in texts]
        readings = [read(text, self._index) for text in texts]
        named, questions = [], []
        for reading in readings:
            spans = [name.span for name in reading.found] or candidate_spans(reading, self._templates)
            named.append([place for name in reading.found[:1] for place in reversed(name.places)])
            questions.append(reading.masked(spans[0]) if spans else reading.question)
        vectors = directions(self._embed, questions)
        cosines, rows = self._search.nearest(vectors, 1)
        return [
            self._among(vector, question, places)
            if places
            else self._decision(cosine, self._search.places[row])
            for vector, question, places, cosine, row in zip(
                vectors, questions, named, cosines[:, 0].tolist(), rows[:, 0].tolist(), strict=True
            )
        ]

    def _among(self, vector: torch.Tensor, question: str, places: Sequence[int]) -> Decision:
        """The decision on a query that names the subject of these edits."""
        rows = [self._row[place] for place in places]
        products = self._search.vectors()[rows].double() * vector.double()
        says_little = is_bare(question)
        cosines = [
            self.config.threshold if says_little or self._bare[row] else cosine
            for cosine, row in zip(products.sum(1).tolist(), rows, strict=True)
        ]
        order = sorted(range(len(places)), key=lambda i: -cosines[i])
        return self._decision(cosines[order[0]], [places[i] for i in order])

    def _decision(self, cosine: float, places: Sequence[int]) -> Decision:
        score = SLOPE * (cosine - self.config.threshold)
        expert = self._edits.experts[places[0]] if score >= 0 else None
        return Decision(expert=expert, score=score, nearest=tuple(places[:10]))
