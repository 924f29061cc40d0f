"""What a router sees of a query and of an edit: the sentence asked, the names in it, the rest."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from routing.api import Subject
from routing.subjects import Found, SubjectIndex
from routing.text import FUNCTION_WORDS, Span, asked, folded, is_boundary, normal

_TOKEN = re.compile(r"\w+")
MASK = "it"  # stands for a subject where only what is asked of it counts


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One text of an expert's corpus."""

    place: int  # corpus position
    expert: str
    prompt: str
    subject: Subject


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A query and the edited subjects in it."""

    text: str  # in its normal form
    asked: Span
    found: tuple[Found, ...]  # in the sentence asked, longest first
    earlier: tuple[Found, ...]  # in those before it, likewise

    @property
    def question(self) -> str:
        """The sentence asked."""
        return self.text[self.asked.start : self.asked.end]

    def masked(self, span: Span) -> str:
        """The sentence asked without a name in it."""
        return self.text[self.asked.start : span.start] + MASK + self.text[span.end : self.asked.end]


def read(text: str, index: SubjectIndex) -> Reading:
    """A query as the routers see it."""
    text = normal(text)
    names = sorted(index.find(text), key=lambda name: (name.span.start - name.span.end, name.span))
    part = asked(text, [name.span for name in names])
    inside = tuple(name for name in names if part.start <= name.span.start < part.end)
    earlier = tuple(name for name in names if name.span.start < part.start)
    return Reading(text=text, asked=part, found=inside, earlier=earlier)


class Edits:
    """The experts' texts of a corpus whose positions count the unrelated ones too."""

    def __init__(self, router: str) -> None:
        """router: its name, for errors."""
        self._router = router
        self._size = 0
        self.experts: dict[int, str] = {}  # by corpus position

    def take(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None
    ) -> list[Edit]:
        """New texts; their edits. Raises ValueError where an expert's texts come without their subjects."""
        first = self._size
        if expert is None:
            self._size += len(texts)
            return []
        if texts and (subjects is None or len(subjects) != len(texts)):
            given = "none" if not subjects else len(subjects)
            raise ValueError(
                f"router {self._router!r} needs the subject of every edit: {len(texts)} texts came with "
                f"{given}; give one Subject a text, or take router 'topk'"
            )
        self._size += len(texts)
        self.experts |= dict.fromkeys(range(first, self._size), expert)
        return [
            Edit(place=first + i, expert=expert, prompt=normal(text), subject=subject)
            for i, (text, subject) in enumerate(zip(texts, subjects or (), strict=True))
        ]


def template(edit: Edit) -> tuple[str, str] | None:
    """What an edit's prompt says before and after its subject; None if that does not stand in it."""
    spelled, offsets = folded(edit.prompt, diacritics=False)
    name = folded(" ".join(normal(edit.subject.name).split()), diacritics=False)[0]
    at = spelled.find(name) if name else -1
    while at >= 0:
        start, end = offsets[at], offsets[at + len(name)]
        if is_boundary(edit.prompt, start) and is_boundary(edit.prompt, end):
            return edit.prompt[:start], edit.prompt[end:]
        at = spelled.find(name, at + 1)
    return None


def masked(edit: Edit) -> str:
    """An edit's prompt without its subject."""
    return MASK.join(template(edit) or (edit.prompt,))


def is_bare(text: str) -> bool:
    """Whether a prompt without its name has no words that tell one relation from another ("it, of")."""
    return all(word in FUNCTION_WORDS or word == "part" for word in _TOKEN.findall(text.casefold()))
