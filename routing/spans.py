"""Where in a query the name of its subject may stand, when no known name does."""

import re
from collections import defaultdict
from collections.abc import Iterable

from routing.reading import Edit, Reading, template
from routing.text import FUNCTION_WORDS, Span, capitalised

_HEAD = re.compile(
    r"^(.+?)(?:,|\s(?:is|was|are|were|has|had|have|can|will|who|which|that|whose)\b|'s\b)", re.DOTALL
)
_LEADING = re.compile(r"[\s\"'(,;:]*")


class Templates:
    """The prompts of the edits without their subjects: what a query leaves beside one of them is a name."""

    def __init__(self) -> None:
        self._openings: defaultdict[str, set[str]] = defaultdict(set)  # after the subject -> before it

    def add(self, edits: Iterable[Edit]) -> None:
        for edit in edits:
            found = template(edit)
            if found and (found[0] + found[1]).strip():
                before, after = found
                self._openings[after.casefold()].add(before.casefold())

    def span(self, reading: Reading) -> Span | None:
        """Of the sentence asked, what stands in the place of a subject in the closest-fitting template."""
        question = reading.question.casefold()
        if len(question) != len(reading.question):
            return None
        ends = [match.start() for match in re.finditer(r"(?<=\w)\b", question)] + [len(question)]
        for end in ends:
            openings = [
                before
                for before in self._openings.get(question[end:], ())
                if question.startswith(before) and len(before) < end
            ]
            if openings:
                start = len(max(openings, key=len))
                return _trimmed(reading, Span(reading.asked.start + start, reading.asked.start + end))
        return None


def candidate_spans(reading: Reading, templates: Templates) -> list[Span]:
    """Likely names in the sentence asked, the likeliest first: the place of a subject in a template, then
    runs of capitalised words, the longest first, then what stands before the verb.
    """
    found = [span for span in (templates.span(reading),) if span is not None]
    runs = capitalised(reading.text, reading.asked)
    found += sorted(runs, key=lambda span: (span.start - span.end, span))
    if not found and (head := _HEAD.match(reading.question)):
        words = head.group(1).casefold().split()
        if not all(word in FUNCTION_WORDS for word in words):
            found.append(_trimmed(reading, Span(reading.asked.start, reading.asked.start + head.end(1))))
    return list(dict.fromkeys(span for span in found if span.start < span.end))


def _trimmed(reading: Reading, span: Span) -> Span:
    part = reading.text[span.start : span.end]
    lead = _LEADING.match(part)
    return Span(span.start + (lead.end() if lead else 0), span.start + len(part.rstrip(" \t\n,;:\"'")))
