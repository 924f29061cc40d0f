"""What a query says of whom: folded spellings with their offsets, sentences, names, the sentence asked.

The lists of words are English; in other languages names are still found by their spelling, and the sentence
asked is the last one.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "ʼ": "'", "`": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", "–": "-"}
)
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)  # scripts that write words without spaces (Thai, Lao, Burmese, Khmer, kana, Han) or with endings (Hangul)
_HALVES = re.compile(r"[\ud800-\udfff]")
_TITLE = re.compile(
    r"\b(?:dr|mr|mrs|ms|st|ste|mt|ft|sr|jr|vs|prof|gen|col|lt|sgt|capt|rev|hon|gov|sen)\.$", re.IGNORECASE
)
_INITIAL = re.compile(r"(?:^|[\s(\"'.])[^\W\d_]\.$")
_BREAK = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\s*\n\s*|(?<=[。！？])")
_WORD = re.compile(r"[^\W_](?:[^\W_]|[\u0300-\u036f]|['.&/-](?=[^\W_]))*")
_LISTS = """
joins: of the de la le les du des del della di da do dos das von van der den zu zur ten ter af av al
el ibn bin bint y e and for on in at to
functions: a about after all also an and answer any are as at be been before both but by can could
did do does during each every few find for from give had has have he her here hers him his how i if
in into is it its let list many may me might more most much must my name no nor not now of on once
one only or other our out over own please question same shall she should since so some such tell
than that the their them then there these they this those through thus to too under until up us very
was we were what when where whether which while who whom whose why will with would yes yet you your
pronouns: it its he him his she her hers they them their theirs this that these those there
instructions: answer reply respond explain complete give tell use keep be please think write just
limit provide state no return choose pick select do say
"""
_JOINS, FUNCTION_WORDS, _PRONOUNS, _INSTRUCTIONS = (
    frozenset(part.split()) for part in re.split(r"\n?\w+: ", _LISTS)[1:]
)


class Span(NamedTuple):
    """Characters of a text, from ``start`` up to but not including ``end``."""

    start: int
    end: int


def normal(text: str) -> str:
    """Compatibility forms composed (NFKC), typographic quotes and hyphens as on a typewriter; halves of
    characters, which no text may hold, replaced.
    """
    if text.isascii():
        return text
    return _HALVES.sub("\ufffd", unicodedata.normalize("NFKC", text).translate(_PLAIN))


def folded(text: str, *, diacritics: bool = True) -> tuple[str, Sequence[int]]:
    """A normal text without case, white space as single spaces; and where in it each character stood.

    diacritics: False drops those of Latin, Greek and Cyrillic letters.
    returns: the spelling, and for each of its characters, and for its end, the offset in ``text``.
    """
    if text.isascii() and "  " not in text and not re.search(r"[\t\n\r\f\v]", text):
        return text.lower(), range(len(text) + 1)
    characters: list[str] = []
    offsets: list[int] = []
    for offset, character in enumerate(text):
        if character.isspace():
            spelled = " " if characters and characters[-1] != " " else ""
        else:
            spelled = character.casefold()
            if not (diacritics or spelled.isascii()):
                decomposed = unicodedata.normalize("NFD", spelled)
                kept = "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f")
                spelled = unicodedata.normalize("NFC", kept)
        characters += spelled
        offsets += [offset] * len(spelled)
    return "".join(characters), [*offsets, len(text)]


def is_boundary(text: str, at: int) -> bool:
    """Whether a name may begin or end before this character."""
    if at <= 0 or at >= len(text):
        return True
    before, after = text[at - 1], text[at]
    if not (_in_word(before) and _in_word(after)):
        return True
    return bool(_UNSPACED.match(before) or _UNSPACED.match(after)) and not unicodedata.combining(after)


def _in_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


def sentences(text: str, whole: Iterable[Span] = ()) -> list[Span]:
    """The sentences of a text in order, without the white space around them.

    whole: names; no sentence ends within one.
    """
    names = list(whole)
    found: list[Span] = []
    start = 0
    for gap in _BREAK.finditer(text):
        inside = any(name.start < gap.start() <= name.end for name in names)
        if not (inside or _is_abbreviated(text, start, gap, names)):
            found.append(_stripped(text, start, gap.start()))
            start = gap.end()
    found.append(_stripped(text, start, len(text)))
    return [sentence for sentence in found if sentence.start < sentence.end]


def _is_abbreviated(text: str, start: int, gap: re.Match[str], names: Sequence[Span]) -> bool:
    """Whether the full stop before a gap only shortens a word; a known name has its own initials in it."""
    if "\n" in gap.group():
        return False
    if _TITLE.search(text, start, gap.start()):
        return True
    before_name = any(name.start == gap.end() for name in names)
    return bool(_INITIAL.search(text, start, gap.start())) and not before_name


def _stripped(text: str, start: int, end: int) -> Span:
    part = text[start:end]
    return Span(start + len(part) - len(part.lstrip()), end - len(part) + len(part.rstrip()))


def capitalised(text: str, within: Span) -> list[Span]:
    """Names by their capitals: runs of capitalised words and numbers, small words between them included."""
    words = [Span(*match.span()) for match in _WORD.finditer(text, *within)]
    runs: list[Span] = []
    pending = False  # words since the last run may belong to it
    for word in words:
        spelled = text[word.start : word.end]
        opening = word is words[0] and spelled.casefold() in FUNCTION_WORDS
        if _is_capital(spelled) and not opening and spelled != "I":
            joined = runs and pending and _joined(text[runs[-1].end : word.start])
            if joined:
                runs[-1] = Span(runs[-1].start, word.end)
            else:
                runs.append(word)
            pending = True
        elif spelled not in _JOINS:
            pending = False
    return [run for run in runs if any(c.isalpha() and c.isupper() for c in text[run.start : run.end])]


def _is_capital(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit() or any(c.isupper() for c in word[1:])


def _joined(gap: str) -> bool:
    return not set(gap) & set(',;:!?()"') and gap.count(".") <= 1


def asked(text: str, names: Sequence[Span] = ()) -> Span:
    """The part of a text that asks: its last sentence, which a language model continues.

    A last sentence that names nothing and refers back ("It is located in") is asked together with those it
    refers to; one that only says how to answer ("Answer briefly.") is left out.

    names: known names in the text, which no sentence divides.
    """
    parts = sentences(text, names) or [Span(0, len(text))]
    last = len(parts) - 1
    first = last
    while first > 0 and (_instructs(text, parts, first, names) or _refers_back(text, parts[first], names)):
        first -= 1
    while last > first and _instructs(text, parts, last, names):
        last -= 1
    return Span(parts[first].start, parts[last].end)


def _refers_back(text: str, part: Span, names: Sequence[Span]) -> bool:
    words = {word.casefold() for word in _WORD.findall(text, *part)}
    return bool(words & _PRONOUNS) and not _names(text, part, names)


def _names(text: str, part: Span, names: Sequence[Span]) -> bool:
    return any(part.start <= name.start < part.end for name in names) or bool(capitalised(text, part))


def _instructs(text: str, parts: Sequence[Span], at: int, names: Sequence[Span]) -> bool:
    """Whether a sentence only says how to answer.

    It is complete and names nothing but perhaps its first word; and it begins as instructions do, or the one
    before it is a question.
    """
    part = parts[at]
    words = [Span(*match.span()) for match in _WORD.finditer(text, *part)]
    if not words:
        return True
    first = words[0]
    if text[part.end - 1] not in ".:!" or _names(text, Span(first.end, part.end), names):
        return False
    if any(part.start <= name.start < part.end for name in names):
        return False
    begins = text[first.start : first.end].casefold() in _INSTRUCTIONS
    return begins or (at > 0 and text[parts[at - 1].end - 1] == "?")
