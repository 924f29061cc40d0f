"""Routers compared, and the calibrated one fitted, on the half of the records where everything is chosen.

Nothing here reads the half that is reported. Relations are held out in turn, so that a figure says what a
router does with relations that it was not fitted on.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from harness.data import EditCase, load_dataset, select
from harness.paths import read_lines
from harness.route_probes import RouteProbe
from harness.routers import subjects_of
from routing import Decision, Embed, Subject, build
from routing.calibrated import COEFFICIENTS, MODELS, Coefficients
from routing.features import FEATURES, Comparison, Pairs
from routing.reading import Edit, masked, read
from routing.subjects import SubjectIndex
from routing.text import normal
from routing.wordings import WORDINGS, read_wordings
from studies.records import EDITS, related

SIZES = (1000, 300, 100)  # of the corpora that a fit pools, the largest first
WORDED = ("rewrite", "paraphrase_clean", "chat")  # probes that show how a relation may be worded
SEEN = 2  # probes that word it so; what is seen once has noise of its record in it
TRAINED_ON = "the half of CounterFact where everything is chosen, with 1,000, 300 and 100 records edited"
# What the models weigh; chosen with relations held out.
CHOSEN = {"named": ("relation", "bare", "question"), "similar": ("prompt", "unrelated", "question")}
# Cost of a wrong decision on all probes of a kind together; of kinds not named, one.
COSTS = {
    "paraphrase": 0.0, "paraphrase_noisy": 20.0, "paraphrase_clean": 10.0, "chat": 5.0, "neighborhood": 2.0,
}  # fmt: skip
ROUNDS = 4  # of choosing each probe's edit and fitting again
RIDGE = 0.05  # inverse of scikit-learn's C, a probe of mean weight
FOLDS = 8  # groups of relations held out in turn; the smallest share one


@dataclass(frozen=True)
class Corpus:
    """The records that a router knows."""

    edited: Sequence[EditCase]
    unrelated: Sequence[str]

    @classmethod
    def of(cls, records: Path, edits: int) -> "Corpus":
        """The first so many records of a file, and as many unrelated prompts."""
        selection, _ = select(load_dataset(str(records)), edits=edits, negatives=None, order="first", seed=0)
        return cls(selection.cases, selection.unrelated)

    def fill(self, router: Any, *, aliases: bool = False) -> None:
        """Adds it to a router; aliases: with those that the records give."""
        subjects = subjects_of(self.edited, aliases=aliases)
        router.add("edited", [case.rewrite_prompt for case in self.edited], subjects)
        router.add(None, self.unrelated)


def decisions(
    router: str,
    settings: Mapping[str, Mapping[str, Any]],
    records: Path,
    texts: Sequence[str],
    embed: Embed,
    edits: int = EDITS,
    aliases: bool = False,
) -> list[Decision]:
    """What a router by name decides on each text."""
    made = build(router, embed, settings)
    Corpus.of(records, edits).fill(made, aliases=aliases)
    return made.route(texts)


@dataclass(frozen=True)
class Compared:
    """Probes with the edits of one corpus that they may ask for."""

    probes: Sequence[RouteProbe]
    folds: NDArray[np.int64]  # (probes,) group of the relation of the probe's record
    pairs: Pairs
    own: NDArray[np.bool_]  # (pairs,) whether the edit is that of the probe's record
    unrelated: float  # mean cosine to the nearest unrelated text


def relation_folds(records: Path) -> list[set[str]]:
    """Relations held out together: those that share a template, and all small ones."""
    lines = read_lines(records)
    sizes = Counter(line["requested_rewrite"]["relation_id"] for line in lines)
    groups = sorted(related(lines), key=lambda g: (-sum(sizes[r] for r in g), min(g)))
    left = set(sizes).difference(*groups)
    return [*groups[: FOLDS - 1], left.union(*groups[FOLDS - 1 :])]


def compare(records: Path, probes: Sequence[RouteProbe], embed: Embed, edits: int) -> Compared:
    """Features of all pairs, each in a space of wordings that was found without the relation of the probe.

    Left out are probes whose record is edited, but not in this corpus. Probes of no record are spread.
    """
    corpus, folds = Corpus.of(records, edits), relation_folds(records)
    place = {case.case_id: i for i, case in enumerate(corpus.edited)}
    relations = {case.case_id: case.relation_id for case in load_dataset(str(records)).cases}
    edited = {case.case_id for case in Corpus.of(records, max(SIZES)).edited}
    kept: list[RouteProbe] = []
    numbers: list[int] = []
    parts: list[tuple[int, Pairs]] = []
    for number, fold in enumerate(folds):
        comparison = Comparison(
            "calibrated", embed, indexed_from=10**6, unrelated=0.0, wordings=read_wordings(without=fold)
        )
        corpus.fill(comparison)
        of_fold = [
            probe
            for probe in probes
            if (
                probe.index % len(folds) == number
                if probe.case_id is None
                else relations[probe.case_id] in fold
                and (probe.case_id in place or probe.case_id not in edited)
            )
        ]
        if of_fold:
            parts.append((len(kept), comparison.pairs([probe.prompt for probe in of_fold])))
            kept += of_fold
            numbers += [number] * len(of_fold)
    pairs = Pairs(
        query=np.concatenate([start + part.query for start, part in parts]),
        place=np.concatenate([part.place for _, part in parts]),
        named=np.concatenate([part.named for _, part in parts]),
        features=np.concatenate([part.features for _, part in parts]),
    )
    unrelated = float(pairs.features[:, FEATURES.index("unrelated")].mean())
    own = np.array([-1 if p.case_id is None or not p.to_edited else place.get(p.case_id, -1) for p in kept])
    return Compared(kept, np.array(numbers), pairs, own[pairs.query] == pairs.place, unrelated)


def fit(compared: Sequence[Compared], encoder: str, trained_on: str) -> Coefficients:
    """Coefficients from probes over one or several corpora.

    Each probe stands for one pair: its own edit where it asks for one, else the edit that it is likeliest to
    be taken to ask for, chosen anew after each fit.
    """
    unrelated = float(np.mean([part.unrelated for part in compared]))
    weights: dict[str, dict[str, float]] = {
        "named": {"relation": 1.0},
        "similar": {"name": 1.0, "intercept": -1.0},
    }
    found = Coefficients(encoder=encoder, trained_on=trained_on, unrelated=unrelated, weights=weights)
    for _ in range(ROUNDS):
        chosen = [_representatives(part, found) for part in compared]
        features = np.concatenate(
            [part.pairs.features[rows] for part, rows in zip(compared, chosen, strict=True)]
        )
        named = np.concatenate([part.pairs.named[rows] for part, rows in zip(compared, chosen, strict=True)])
        asked = np.concatenate(
            [
                np.array([part.probes[q].to_edited for q in part.pairs.query[rows].tolist()], dtype=bool)
                for part, rows in zip(compared, chosen, strict=True)
            ]
        )
        costs = np.concatenate([_costs(part, rows) for part, rows in zip(compared, chosen, strict=True)])
        costs /= costs.mean()
        fitted = {
            model: _logistic(features[of], asked[of], costs[of], CHOSEN[model])
            for model, of in zip(MODELS, (named, ~named), strict=True)
        }
        found = replace(found, weights=fitted)
    return found


def _representatives(part: Compared, coefficients: Coefficients) -> NDArray[np.int64]:
    """One pair of each probe: its own edit, else that with the largest log-odds."""
    pairs, odds = part.pairs, coefficients.log_odds(part.pairs)
    order = np.lexsort((-odds, ~part.own, pairs.query))
    return order[np.flatnonzero(np.diff(pairs.query[order], prepend=-1))]


def _costs(part: Compared, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each probe, the cost of its kind shared among those of the kind."""
    kinds = [part.probes[query].kind for query in part.pairs.query[rows].tolist()]
    counts = Counter(kinds)
    return np.array([COSTS.get(kind, 1.0) / counts[kind] for kind in kinds])


def _logistic(
    features: NDArray[np.float64], asked: NDArray[np.bool_], costs: NDArray[np.float64], chosen: Sequence[str]
) -> dict[str, float]:
    used = costs > 0
    columns = [FEATURES.index(name) for name in chosen]
    model = LogisticRegression(C=1 / RIDGE, max_iter=2000)
    model.fit(features[used][:, columns], asked[used], sample_weight=costs[used])
    return dict(zip(("intercept", *chosen), map(float, (model.intercept_[0], *model.coef_[0])), strict=True))


def leave_one_relation_out(compared: Sequence[Compared], *, judged: int = 0) -> list[float]:
    """Log-odds of the probes of ``compared[judged]``, each by a fit that saw no probe of its relation."""
    asked = compared[judged]
    scores = np.zeros(len(asked.probes))
    for held_out in sorted(set(asked.folds.tolist())):
        fitted = fit([_only(part, part.folds != held_out) for part in compared], "any", "relations held out")
        scores = np.where(asked.folds == held_out, largest(asked, fitted), scores)
    found: list[float] = scores.tolist()
    return found


def _only(part: Compared, kept: NDArray[np.bool_]) -> Compared:
    """Some of the probes."""
    rows = kept[part.pairs.query]
    number = np.cumsum(kept) - 1
    pairs = Pairs(
        query=number[part.pairs.query[rows]],
        place=part.pairs.place[rows],
        named=part.pairs.named[rows],
        features=part.pairs.features[rows],
    )
    probes = [probe for probe, keep in zip(part.probes, kept, strict=True) if keep]
    return Compared(probes, part.folds[kept], pairs, part.own[rows], part.unrelated)


def largest(part: Compared, coefficients: Coefficients) -> list[float]:
    """The score of each probe."""
    odds = coefficients.log_odds(part.pairs)
    starts = np.flatnonzero(np.diff(part.pairs.query, prepend=-1))
    found: list[float] = np.maximum.reduceat(odds, starts).tolist()
    return found


def write(coefficients: Coefficients, path: Path = COEFFICIENTS) -> None:
    """The file that router ``calibrated`` reads; weights to four digits."""
    plain = asdict(coefficients)
    plain["unrelated"] = round(plain["unrelated"], 4)
    plain["weights"] = {
        model: {name: round(weight, 4) for name, weight in weights.items()}
        for model, weights in plain["weights"].items()
    }
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def wordings(records: Path, probes: Sequence[RouteProbe]) -> dict[str, list[str]]:
    """Prompts without their names that ask for the same relation, by relation: of edits and their probes."""
    edited = Corpus.of(records, max(SIZES)).edited
    edits = {case.case_id: (case.relation_id, _edit(place, case)) for place, case in enumerate(edited)}
    index = SubjectIndex()
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for relation, edit in edits.values():
        index.add(edit.place, [edit.subject.name])
        found[str(relation)][masked(edit).strip()] += 1
    for probe in probes:
        if probe.kind not in WORDED or probe.case_id not in edits:
            continue
        relation, edit = edits[probe.case_id]
        reading = read(probe.prompt, index)
        if reading.found and edit.place in reading.found[0].places:
            found[str(relation)][reading.masked(reading.found[0].span).strip()] += 1
    return {
        relation: sorted(text for text, records in found[relation].items() if records >= SEEN)
        for relation in sorted(found)
    }


def _edit(place: int, case: EditCase) -> Edit:
    subject = Subject(name=case.request.subject)
    return Edit(place=place, expert="edited", prompt=normal(case.rewrite_prompt), subject=subject)


def write_wordings(groups: Mapping[str, Sequence[str]], path: Path = WORDINGS) -> None:
    """The file that ``WordingSpace`` is found from."""
    plain = {
        "about": "prompts without their names, by the relation that they ask for",
        "taken_from": "the half of CounterFact where everything is chosen: edits, paraphrases, questions",
        "groups": groups,
    }
    path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def fit_all(records: Path, probes: Sequence[RouteProbe], embed: Embed, encoder: str) -> list[Compared]:
    """Writes both files of router ``calibrated``; returns what its figures are found from."""
    write_wordings(wordings(records, probes))
    compared = [compare(records, probes, embed, edits) for edits in SIZES]
    write(fit(compared, encoder, TRAINED_ON))
    return compared


def cost(
    router: str, settings: Mapping[str, Mapping[str, Any]], records: Path, texts: Sequence[str], embed: Embed
) -> float:
    """Microseconds of the processor a query, asked together; ``embed`` is called too, so give one that knows
    all texts already.
    """
    made = build(router, embed, settings)
    Corpus.of(records, max(SIZES)).fill(made)
    made.route(texts)
    start = time.process_time()
    made.route(texts)
    return (time.process_time() - start) / len(texts) * 1e6
