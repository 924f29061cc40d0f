"""Prompts that test a router: of every kind it is known whether the edited model should answer.

Nothing here is answered by a model. What an edited record gives beside its scored prompts stands in
``EditCase.route_prompts``; the rest is made from prompts, subjects and a table of questions.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from harness.data import EditCase, KnowEditCase
from harness.fields import find_subject
from harness.metrics import route_scores
from reports.probes import KINDS, PREFIX
from reports.record import Score

QUESTIONS_FILE = Path(__file__).parent / "facts" / "questions.json"
SHARED = 3  # records of each of two relations from which a template counts as shared
SENTENCE_END = re.compile(
    r"(?:[?!…]|(?<!\.[A-Z])\.|\.(?!\s+[a-z]))['\")\]]*\s+|\n+"
)  # not in "the U.S. state"
LEAST_SENTENCE = 40  # characters; a shorter one mostly ends at an initial or an abbreviation
MOST = {  # prompts of one record, a seeded sample where it has more
    "paraphrase": 4, "paraphrase_noisy": 4, "paraphrase_clean": 4, "alias": 3, "hop": 3, "chat": 2,
    "neighborhood": 4, "distracting": 3, "same_subject": 3, "same_subject_completion": 2,
}  # fmt: skip
OF_OTHERS = ("distracting_other", "chat_other")  # made of records that are not edited

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RouteProbe:
    """One prompt for a router, and where it should go."""

    kind: str  # of KINDS
    prompt: str
    to_edited: bool  # where it should go
    case_id: int | str | None  # of the record it was made of; None: of none
    index: int  # within kind and record


@dataclass(frozen=True)
class _Questions:
    """The table of questions by Wikidata relation."""

    asked_of: Mapping[str, Sequence[str]]  # sort of subject -> relations that make sense of it
    alike: Sequence[Sequence[str]]  # relations too close to each other to count as different
    relations: Mapping[str, Mapping[str, Any]]  # relation -> sort of its subjects, and its questions


@cache
def _questions() -> _Questions:
    return _Questions(**json.loads(QUESTIONS_FILE.read_text(encoding="utf-8")))


def route_probes(
    batch_cases: Sequence[EditCase],
    others: Sequence[EditCase],
    *,
    tasks: Sequence[str] = (),
    texts: Sequence[str] = (),
    seed: int,
) -> list[RouteProbe]:
    """Probes of all kinds that the records allow, in the order of ``KINDS``; the same for the same seed.

    batch_cases: the edited records. others: records that are not edited, whose prompts are not in the
    router's corpus; as many of them are used as are edited. tasks: prompts of general tasks. texts: plain
    sentences, also used as noise. A kind holds no prompt twice. Left out as ambiguous: prompts that should
    go to the unedited model but ask for the fact of another edited record, and questions on other relations
    of subjects that are edited in several.
    """
    makers = _Makers(batch_cases, others, texts, seed)
    kept = [case for case in others if not makers.is_edited(case)]
    kept = _sample(kept, len(batch_cases), f"{seed} others")
    found: list[RouteProbe] = []
    for kind in KINDS:
        if kind in ("task", "text"):
            given = tasks if kind == "task" else texts
            found += (_probe(kind, prompt, None, i) for i, prompt in enumerate(dict.fromkeys(given)))
            continue
        seen: set[str] = set()
        for case in kept if kind in OF_OTHERS else batch_cases:
            prompts = [prompt for prompt in dict.fromkeys(makers.prompts(kind, case)) if prompt not in seen]
            drawn = _sample(prompts, MOST.get(kind, 1), f"{seed} {kind} {case.case_id}")
            seen.update(drawn)
            found += (_probe(kind, prompt, case.case_id, i) for i, prompt in enumerate(drawn))
    edited = {probe.prompt for probe in found if probe.to_edited}
    return [probe for probe in found if probe.to_edited or probe.prompt not in edited]


def _probe(kind: str, prompt: str, case_id: int | str | None, index: int) -> RouteProbe:
    to_edited = KINDS[kind].to_edited
    return RouteProbe(kind=kind, prompt=prompt, to_edited=to_edited, case_id=case_id, index=index)


def _sample(items: Sequence[T], most: int, seed: str) -> list[T]:
    """At most so many of them, in their order."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), most))]


class _Makers:
    """All prompts of a kind that a record gives, knowing what is edited."""

    def __init__(
        self, batch_cases: Sequence[EditCase], others: Sequence[EditCase], texts: Sequence[str], seed: int
    ) -> None:
        cases = [*batch_cases, *others]
        self._texts, self._seed = texts, seed
        self._templates = _templates(cases)
        self._near = _near(cases)
        edits: defaultdict[str, list[EditCase]] = defaultdict(list)
        for case in batch_cases:
            edits[_folded(case.request.subject)].append(case)
        self._edits = dict(edits)
        self._subjects = _Subjects(edits)
        self._asking = frozenset(self._all_asking(batch_cases, cases))
        self._makers: dict[str, Callable[[EditCase], Iterable[str]]] = {
            "rewrite": lambda case: [case.rewrite_prompt],
            "paraphrase": lambda case: case.paraphrase_prompts,
            "paraphrase_noisy": lambda case: self._paraphrases(case, noisy=True),
            "paraphrase_clean": lambda case: self._paraphrases(case, noisy=False),
            "alias": self._aliases,
            "hop": lambda case: case.route_prompts.get("hop", ()),
            "chat": lambda case: self._chat(case, [_relation(case)]),
            "neighborhood": self._neighbors,
            "distracting": self._distracting,
            "distracting_other": self._distracting_other,
            "same_subject": self._same_subject,
            "same_subject_completion": self._completions,
            "noise_neighborhood": lambda case: self._noisy(case, "neighborhood"),
            "noise_same_subject": lambda case: self._noisy(case, "same_subject", "same_subject_completion"),
            "chat_same_subject": lambda case: self._chat(case, self._other_relations(case)),
            "chat_other": lambda case: self._chat(case, [_relation(case)]),
        }

    def prompts(self, kind: str, case: EditCase) -> Iterable[str]:
        """Of one record, before they are sampled."""
        return self._makers[kind](case)

    def is_edited(self, case: EditCase) -> bool:
        """Whether anything is edited in the record's subject."""
        return _folded(case.request.subject) in self._edits

    def _all_asking(self, batch_cases: Sequence[EditCase], cases: Sequence[EditCase]) -> Iterator[str]:
        """Prompts, case folded, that ask for an edited fact: each subject in its relation's templates."""
        asked: defaultdict[str, set[str]] = defaultdict(set)
        for case in cases:
            for relation in self._near_of(_relation(case)):
                asked[relation].update((case.request.prompt, *_paraphrase_templates(case)))
        for case in batch_cases:
            for template in asked[_relation(case)]:
                yield _folded(template.replace("{}", case.request.subject))

    def _near_of(self, relation: str) -> frozenset[str]:
        return self._near.get(relation, frozenset({relation}))

    def _paraphrases(self, case: EditCase, *, noisy: bool) -> list[str]:
        subject = case.request.subject
        return [prompt for prompt in case.paraphrase_prompts if (_noise(prompt, subject) > 0) == noisy]

    def _aliases(self, case: EditCase) -> list[str]:
        same = _folded(case.rewrite_prompt)
        return [prompt for prompt in case.route_prompts.get("alias", ()) if _folded(prompt) != same]

    def _chat(self, case: EditCase, relations: Iterable[str]) -> list[str]:
        table = _questions().relations
        asked = [q for name in relations if name in table for q in table[name]["questions"]]
        return [question.replace("{}", case.request.subject) for question in asked]

    def _neighbors(self, case: EditCase) -> list[str]:
        # KnowEdit's neighborhood prompts ask other relations of the same subject.
        prompts = () if isinstance(case, KnowEditCase) else case.neighborhood_prompts
        return [prompt for prompt in prompts if _folded(prompt) not in self._asking]

    def _distracting(self, case: EditCase) -> list[str]:
        # To the letter what EasyEdit's field distracting_neighborhood_prompts holds.
        statement = f"{case.rewrite_prompt} {case.request.target_new.strip()}."
        return [f"{statement} {prompt}" for prompt in self._neighbors(case)]

    def _distracting_other(self, case: EditCase) -> list[str]:
        return [prompt for prompt in self._distracting(case) if not self._subjects.in_text(prompt)]

    def _same_subject(self, case: EditCase) -> list[str]:
        if len({_relation(edit) for edit in self._edits[_folded(case.request.subject)]}) > 1:
            return []  # what the question asks may be edited in another record
        prompts = case.route_prompts.get("same_subject", ())
        return [prompt for prompt in prompts if _folded(prompt) not in self._asking]

    def _other_relations(self, case: EditCase) -> list[str]:
        """Relations that make sense of the subject, far from all that are edited in it."""
        table = _questions()
        if _relation(case) not in table.relations:
            return []
        taken: set[str] = set()
        for edit in self._edits[_folded(case.request.subject)]:
            taken |= self._near_of(_relation(edit))
        asked_of = table.asked_of[table.relations[_relation(case)]["subjects"]]
        return [name for name in asked_of if name not in taken]

    def _completions(self, case: EditCase) -> list[str]:
        """One a relation, so that relations with many templates do not outweigh others."""
        found = []
        for name in self._other_relations(case):
            for template in _sample(self._templates.get(name, ()), 1, f"{self._seed} {name} {case.case_id}"):
                found.append(template.replace("{}", case.request.subject))
        return [prompt for prompt in found if _folded(prompt) not in self._asking]

    def _noisy(self, case: EditCase, *kinds: str) -> list[str]:
        """One prompt of these kinds behind one of the texts."""
        prompts = [prompt for kind in kinds for prompt in self.prompts(kind, case)]
        key = f"{self._seed} noise {kinds} {case.case_id}"
        drawn = zip(_sample(self._texts, 1, key), _sample(prompts, 1, key), strict=False)
        return [f"{text.strip()} {prompt}" for text, prompt in drawn]


class _Subjects:
    """Finds edited subjects in texts, word by word."""

    def __init__(self, subjects: Iterable[str]) -> None:
        self._by_first: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
        for subject in subjects:
            if words := _words(subject):
                self._by_first[words[0]].add(words)

    def in_text(self, text: str) -> bool:
        """Whether any of them occurs in it."""
        words = _words(text)
        return any(
            words[i : i + len(subject)] == subject
            for i, word in enumerate(words)
            for subject in self._by_first.get(word, ())
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _folded(text: str) -> str:
    return text.strip().casefold()


def _relation(case: EditCase) -> str:
    """Its Wikidata id, or the edit's prompt where the data does not say it."""
    return case.relation_id or case.request.prompt


def _noise(prompt: str, subject: str) -> int:
    """Characters of the sentences before the subject's own; 0 where it is not there.

    Finds 1,186 of the 1,191 noise sentences among the records that were looked at, and nothing else.
    """
    place = find_subject(prompt, subject)
    ends = [] if place is None else list(SENTENCE_END.finditer(prompt, 0, place.start()))
    return ends[-1].end() if ends else 0


def _paraphrase_templates(case: EditCase) -> Iterator[str]:
    for prompt in case.paraphrase_prompts:
        own = prompt[_noise(prompt, case.request.subject) :]
        if place := find_subject(own, case.request.subject):
            yield own[: place.start()] + "{}" + own[place.end() :]


def _templates(cases: Iterable[EditCase]) -> dict[str, list[str]]:
    """The edit prompts of every relation that is known by its id, each once, sorted."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.relation_id is not None:
            found[case.relation_id].add(case.request.prompt)
    return {relation: sorted(templates) for relation, templates in found.items()}


def _near(cases: Iterable[EditCase]) -> dict[str, frozenset[str]]:
    """Relations too close to count as different: by the table, or because they share a template."""
    users: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        users[case.request.prompt.strip()][_relation(case)] += 1
    groups = [frozenset(names) for names in _questions().alike]
    groups += [frozenset(name for name, n in counts.items() if n >= SHARED) for counts in users.values()]
    near: defaultdict[str, frozenset[str]] = defaultdict(frozenset)
    for group in groups:
        for relation in group:
            near[relation] |= group
    return dict(near)


def first_sentence(paragraph: str) -> str:
    """The first sentence of plain text; never so short that it ends at an initial."""
    ends = (end for end in SENTENCE_END.finditer(paragraph) if end.start() >= LEAST_SENTENCE)
    end = next(ends, None)
    return paragraph.strip() if end is None else paragraph[: end.end()].strip()


def probe_rows(probes: Sequence[RouteProbe], edits_applied: int) -> list[Row]:
    """What names every probe in ``cases.jsonl.gz``; a cell adds what its router decided."""
    return [
        {
            "weights": "probes", "edits_applied": edits_applied, "case_id": probe.case_id, "batch": None,
            "kind": PREFIX + probe.kind, "index": probe.index, "prompt": probe.prompt,
            "to_edited": probe.to_edited,
        }
        for probe in probes
    ]  # fmt: skip


def probe_scores(probes: Sequence[RouteProbe], decisions_to_edited: Sequence[bool], seed: int) -> list[Score]:
    """``route_KIND`` of every kind: the share sent to the edited model, with 95 % intervals over records.

    Prompts of no record, those of tasks and plain texts, count as a record each.
    """
    rows = [
        {"kind": probe.kind, "case_id": (probe.case_id, probe.case_id is None and probe.index)}
        for probe in probes
    ]
    routes = ["edited" if sent else "unedited" for sent in decisions_to_edited]
    return route_scores(rows, routes, seed, KINDS)
