"""What routers do with prompts of which it is known where they should go, and how calibrated they are.

The prompts are made elsewhere; here are their kinds, the shares in records of slice "probes", and the rows
of ``cases.jsonl.gz`` whose kind is "probe:KIND".
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from reports.cells import Cell, Table, linked, number_cell, value_cell
from reports.drilldown import CASES_FILE
from reports.load import Run
from reports.names import PAPER_ROUTER
from reports.notes import text_of
from reports.record import Score
from reports.rows import Row

SLICE = "probes"
PREFIX = "probe:"  # of a row's kind


class Kind(NamedTuple):
    """What is known of all probes of a kind."""

    to_edited: bool  # where they should go
    title: str
    meaning: str


KINDS: dict[str, Kind] = {
    "rewrite": Kind(True, "Rewrite", "the edit's own prompt"),
    "paraphrase": Kind(True, "Paraphrase", "the record's paraphrases, noisy or clean"),
    "paraphrase_noisy": Kind(True, "noisy", "paraphrases with an unrelated sentence in front"),
    "paraphrase_clean": Kind(True, "clean", "paraphrases without one"),
    "alias": Kind(True, "Alias", "the edit's prompt under another name of its subject"),
    "hop": Kind(True, "Hop", "a question whose answer follows from the edited fact"),
    "chat": Kind(True, "Chat", "the edited fact asked for as a user would"),
    "neighborhood": Kind(False, "Neighbour", "the edited relation of another subject"),
    "distracting": Kind(False, "Distracting", "the edit as a statement, then a neighbour's prompt"),
    "distracting_other": Kind(False, "Distracting, not edited", "the same of a record that is not edited"),
    "same_subject": Kind(False, "Same subject", "another relation of an edited subject, as the data asks it"),
    "same_subject_completion": Kind(
        False, "Same subject, completion", "an edited subject in another relation's prompt"
    ),
    "noise_neighborhood": Kind(False, "Neighbour, noisy", "an unrelated sentence, then a neighbour's prompt"),
    "noise_same_subject": Kind(
        False, "Same subject, noisy", "an unrelated sentence, then another relation of an edited subject"
    ),
    "chat_same_subject": Kind(
        False, "Same subject, chat", "another relation of an edited subject asked for as a user would"
    ),
    "chat_other": Kind(False, "Chat, not edited", "the same questions about subjects that are not edited"),
    "task": Kind(False, "General task", "prompts of general tasks"),
    "text": Kind(False, "Plain text", "sentences of plain text"),
}
UNION = "paraphrase"  # holds the prompts of two other kinds, so it is left out where kinds are pooled


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Prompts whose scores are alike."""

    predicted: float  # mean probability that a prompt should go to the edited model
    observed: float  # share that should
    count: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How well a router's scores are probabilities."""

    bins: tuple[Bin, ...]  # by rising probability; those without prompts are left out
    error: float  # expected calibration error: |predicted - observed| of the bins, by their counts
    brier: float  # mean squared difference between the probability and where the prompt should go

    @property
    def count(self) -> int:
        """Prompts in all bins."""
        return sum(one.count for one in self.bins)


def probe_tables(rows: Sequence[Row], *, digits: int = 1) -> list[Table]:
    """Share of every kind sent to the edited model, a row per router, encoder and top-k.

    One table of the kinds that should go there and one of those that should not; none without probes.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        record = row.at(SLICE)
        if record is not None and record.error is None and record.slice == SLICE:
            found.setdefault((row.router or PAPER_ROUTER, row.encoder, row.top_k), row)
    tables = []
    for to_edited, title in (
        (True, "should go there: more is better"),
        (False, "should not: less is better"),
    ):
        kinds = {name: kind for name, kind in KINDS.items() if kind.to_edited == to_edited}
        scores = {setting: _scores(row, kinds) for setting, row in found.items()}
        shown = {
            name: n
            for name in kinds
            if (n := max((s[name].n for s in scores.values() if name in s), default=0))
        }
        if not shown:
            continue
        lines = []
        for setting, row in found.items():
            cells = (
                linked(value_cell(scores[setting].get(name), digits), row, SLICE, f"route_{name}")
                for name in shown
            )
            lines.append((*(Cell(text=text_of(part)) for part in setting), *(_bare(cell) for cell in cells)))
        tables.append(
            Table(
                title=f"Probes sent to the edited model that {title}, in percent",
                headers=("Router", "Encoder", "Top-k", *(KINDS[name].title for name in shown)),
                rows=tuple(lines),
                notes=(" ".join(_meanings(shown)),),
            )
        )
    return tables


def probes_by_router(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The probes of a run's cases as each router decided them, by its name; none where nothing was probed."""
    names: dict[str, str] = {}  # name of a route in the cases -> in words
    for record in run.records:
        if record.slice == SLICE and record.error is None:
            router = record.router or PAPER_ROUTER
            name = run.route_name(record.router, record.top_k)
            names[name] = router if record.top_k is None else f"{router}, k = {record.top_k}"
    path = run.path / CASES_FILE
    if not names or not path.is_file():
        return {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if f'"kind": "{PREFIX}' in line]
    rows = [row for row in rows if row.get("weights") == "probes"]
    return {
        words: [
            row | {"route": row.get("routes", {}).get(name, row["route"]),
                   "route_score": row["route_scores"][name]}
            for row in rows
        ]
        for name, words in names.items()
    }  # fmt: skip


def _scores(row: Row, kinds: Iterable[str]) -> dict[str, Score]:
    record = row.at(SLICE)
    scores = {name: record.score(f"route_{name}") for name in kinds} if record is not None else {}
    return {name: score for name, score in scores.items() if score is not None}


def _bare(cell: Cell) -> Cell:
    return Cell(text=cell.text, link=cell.link)


def _meanings(counts: Mapping[str, int]) -> Iterator[str]:
    for name, n in counts.items():
        yield f"{KINDS[name].title} ({n:,}): {KINDS[name].meaning}."


def confusion_table(cases: Iterable[Mapping[str, Any]], *, name: str = "", digits: int = 1) -> Table | None:
    """Where prompts should go and where they went, by kind and pooled with every kind weighing the same.

    cases: rows of ``cases.jsonl.gz``. name: of the router in the title. None where no probe is routed.
    """
    counts: dict[str, Counter[bool]] = {}
    for row in _probes(cases):
        counts.setdefault(_kind(row), Counter())[row["route"] == "edited"] += 1
    if not counts:
        return None
    lines: list[tuple[Cell, ...]] = []
    starts, right = [], []
    for to_edited, should in ((True, "edited"), (False, "unedited")):
        kinds = [kind for kind in KINDS if kind in counts and KINDS[kind].to_edited == to_edited]
        if not kinds:
            continue
        starts.append(len(lines))
        pooled = [kind for kind in kinds if kind != UNION or len(kinds) == 1]
        share = fmean(counts[kind][True] / counts[kind].total() for kind in pooled)
        right.append(share if to_edited else 1 - share)
        total = sum((counts[kind] for kind in pooled), Counter[bool]())
        lines.append(_confusion_line(should, "all kinds", total, share, digits))
        lines += [
            _confusion_line(
                should, KINDS[kind].title, counts[kind], counts[kind][True] / counts[kind].total(), digits
            )
            for kind in kinds
        ]
    notes = ["All kinds: counts of all prompts; shares with every kind weighing the same."]
    if len(right) == 2:
        notes.append(f"Balanced accuracy of all kinds: {100 * fmean(right):.{digits}f} %.")
    return Table(
        title=f"Where probes should go and where {name or 'the router'} sends them",
        headers=("Should go to", "Kind", "Prompts", "Edited", "Unedited", "Edited (%)", "Unedited (%)"),
        rows=tuple(lines),
        notes=(" ".join(notes),),
        groups=tuple(starts[1:]),
    )


def _confusion_line(
    should: str, kind: str, counts: Counter[bool], share: float, digits: int
) -> tuple[Cell, ...]:
    """share: sent to the edited model."""
    numbers = (counts.total(), counts[True], counts[False])
    shares = (number_cell(part, digits, scale=100) for part in (share, 1 - share))
    return (Cell(text=should), Cell(text=kind), *(Cell(text=f"{n:,}") for n in numbers), *shares)


def calibration(cases: Iterable[Mapping[str, Any]], bins: int = 10) -> Calibration | None:
    """Of the scores s of routed probes, with 1 / (1 + exp(-s)) as the probability of the edited model.

    cases: rows of ``cases.jsonl.gz``, a prompt of several kinds counting once in each but ``UNION``. bins:
    of equal width. None where no probe has a score.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    pairs = [
        (0.5 + 0.5 * math.tanh(row["route_score"] / 2), float(row["to_edited"]))  # no overflow
        for row in _probes(cases)
        if row.get("route_score") is not None and _kind(row) != UNION
    ]
    if not pairs:
        return None
    places: dict[int, list[tuple[float, float]]] = {}
    for pair in pairs:
        places.setdefault(min(int(pair[0] * bins), bins - 1), []).append(pair)
    found = tuple(
        Bin(
            predicted=fmean(p for p, _ in places[i]),
            observed=fmean(y for _, y in places[i]),
            count=len(places[i]),
        )
        for i in sorted(places)
    )
    return Calibration(
        bins=found,
        error=sum(one.count * abs(one.predicted - one.observed) for one in found) / len(pairs),
        brier=fmean((p - y) ** 2 for p, y in pairs),
    )


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """What of two kinds a router sends to the edited model as its threshold falls."""

    points: tuple[tuple[float, float], ...]  # (of the kind that should stay, of the kind that should go)
    chosen: tuple[float, float]  # at the router's own threshold


TRADES = (("neighborhood", "alias"), ("same_subject_completion", "paraphrase"))
"""Kinds that are hardest to tell apart: what should stay, what should go."""


def trade_off(cases: Iterable[Mapping[str, Any]], stay: str, go: str) -> TradeOff | None:
    """Shares of two kinds at every threshold on the scores of routed probes, and where the router stands.

    None where one of the kinds has no scores.
    """
    scores: dict[str, list[float]] = {stay: [], go: []}
    sent: dict[str, list[bool]] = {stay: [], go: []}
    for row in _probes(cases):
        kind = _kind(row)
        if kind in scores and row.get("route_score") is not None:
            scores[kind].append(row["route_score"])
            sent[kind].append(row["route"] == "edited")
    if not all(scores.values()):
        return None
    falling = {kind: sorted(values, reverse=True) for kind, values in scores.items()}
    thresholds = sorted({value for values in scores.values() for value in values}, reverse=True)
    points, reached = [(0.0, 0.0)], {stay: 0, go: 0}
    for threshold in thresholds:
        for kind, values in falling.items():
            while reached[kind] < len(values) and values[reached[kind]] >= threshold:
                reached[kind] += 1
        points.append((reached[stay] / len(scores[stay]), reached[go] / len(scores[go])))
    return TradeOff(points=tuple(points), chosen=(fmean(sent[stay]), fmean(sent[go])))


def trade_offs(
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[tuple[str, str], dict[str, TradeOff]]:
    """By the kinds of ``TRADES`` that were probed, what every router can do; found: router -> rows."""
    trades = {
        pair: {name: one for name, rows in found.items() if (one := trade_off(rows, *pair)) is not None}
        for pair in TRADES
    }
    return {pair: routers for pair, routers in trades.items() if routers}


def calibration_table(calibrations: Mapping[str, Calibration]) -> Table:
    """Both errors of every router by name."""
    return Table(
        title="Calibration of the routers' scores on probes",
        headers=("Router", "Prompts", "Expected calibration error", "Brier score"),
        rows=tuple(
            (Cell(text=name), Cell(text=f"{c.count:,}"), number_cell(c.error, 3), number_cell(c.brier, 3))
            for name, c in calibrations.items()
        ),
        notes=("Less is better for both; 0.25 is the Brier score of a router that always says one half.",),
    )


def _probes(cases: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Routed probes of the kinds known here."""
    return (row for row in cases if "route" in row and _kind(row) in KINDS)


def _kind(row: Mapping[str, Any]) -> str:
    kind = str(row["kind"])
    return kind.removeprefix(PREFIX) if kind.startswith(PREFIX) else ""
