"""A query goes to the edited model where it names an edited subject by a similar name."""

from collections.abc import Sequence
from dataclasses import dataclass

from routing.api import Decision, Embed, Subject
from routing.reading import Edits, read
from routing.relation import SLOPE, check_cosine, check_count
from routing.search import TextSearch, directions
from routing.spans import Templates, candidate_spans
from routing.subject import CERTAIN
from routing.subjects import SubjectIndex


@dataclass(frozen=True, kw_only=True)
class AliasConfig:
    """Matching by similar names."""

    threshold: float = 0.75  # cosine of two names; chosen on CounterFact records
    spans: int = 2  # names of a query that are looked at
    indexed_from: int = 1_000_000  # different names from which the search is approximate

    def __post_init__(self) -> None:
        check_cosine("threshold", self.threshold)
        check_count("spans", self.spans)
        check_count("indexed_from", self.indexed_from)


class AliasRouter:
    """Router by similar names: what may be a name in the sentence asked, against the edited subjects' names.

    Score: ten times the cosine beyond the threshold.
    """

    def __init__(self, config: AliasConfig, embed: Embed) -> None:
        self.config = config
        self._embed = embed
        self._edits = Edits("alias")
        self._index = SubjectIndex()
        self._search = TextSearch(config.indexed_from)
        self._templates = Templates()

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        edits = self._edits.take(expert, texts, subjects)
        self._templates.add(edits)
        names = [(name, edit.place) for edit in edits for name in (edit.subject.name, *edit.subject.aliases)]
        if names:
            self._search.add([name for name, _ in names], [place for _, place in names], self._embed)
        for edit in edits:
            self._index.add(edit.place, (edit.subject.name, *edit.subject.aliases))

    def route(self, texts: Sequence[str]) -> list[Decision]:
        decisions = [Decision(expert=None, score=-CERTAIN, nearest=()) for _ in texts]
        if not len(self._search):
            return decisions
        asked: list[tuple[int, str]] = []
        for i, text in enumerate(texts):
            reading = read(text, self._index)
            spans = [name.span for name in reading.found] + candidate_spans(reading, self._templates)
            asked += [(i, reading.text[start:end]) for start, end in spans[: self.config.spans]]
        if not asked:
            return decisions
        cosines, rows = self._search.nearest(directions(self._embed, [name for _, name in asked]), 5)
        for (i, _), cosine, found in zip(asked, cosines[:, 0].tolist(), rows.tolist(), strict=True):
            score = SLOPE * (cosine - self.config.threshold)
            if score > decisions[i].score:
                places = tuple(dict.fromkeys(p for row in found for p in reversed(self._search.places[row])))
                expert = self._edits.experts[places[0]] if score >= 0 else None
                decisions[i] = Decision(expert=expert, score=score, nearest=places[:10])
        return decisions
