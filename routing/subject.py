"""A query goes to the edited model where it asks about an edited subject, by its name."""

from collections.abc import Sequence
from dataclasses import dataclass

from routing.api import Decision, Embed, Subject
from routing.reading import Edits, read
from routing.subjects import SubjectIndex

CERTAIN = 10.0  # the score of what is or is not there, as log-odds


@dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """Matching by name."""

    anywhere: bool = False  # a subject in an earlier sentence counts as well
    diacritics: bool = False  # names must agree in their diacritics


class SubjectRouter:
    """Router by names: the subjects of the edits, and their aliases where they are given.

    Of several subjects the longest decides, of several edits of it the last one.
    """

    def __init__(self, config: SubjectConfig, embed: Embed) -> None:
        """``embed`` is not used."""
        self.config = config
        self._edits = Edits("subject")
        self._index = SubjectIndex(diacritics=config.diacritics)

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        for edit in self._edits.take(expert, texts, subjects):
            self._index.add(edit.place, (edit.subject.name, *edit.subject.aliases))

    def route(self, texts: Sequence[str]) -> list[Decision]:
        return [self._decide(text) for text in texts]

    def _decide(self, text: str) -> Decision:
        reading = read(text, self._index)
        names = reading.found + (reading.earlier if self.config.anywhere else ())
        places = [place for name in names for place in reversed(name.places)]
        if not places:
            return Decision(expert=None, score=-CERTAIN, nearest=())
        expert = self._edits.experts[places[0]]
        return Decision(expert=expert, score=CERTAIN, nearest=tuple(dict.fromkeys(places)))
