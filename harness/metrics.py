"""Edit metrics from scored prompts, with bootstrap intervals over records: CounterFact's (ALGORITHMS 8.1)
and KnowEdit's (8.2).

Every prompt is scored once per weight set. A routed cell only chooses, prompt by prompt, between the
outcome under the unedited model and that under the edited one, so it costs no forward.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data import PORTABILITY
from reports.record import Score

KINDS = {"rewrite": "efficacy", "paraphrase": "generalization", "neighborhood": "locality"}
FORCED = {  # KnowEdit: metric -> kind of prompt, and the fields whose ratio is a prompt's share of tokens
    "rewrite_acc": ("rewrite", "tokens_right", "tokens"),
    "rephrase_acc": ("rephrase", "tokens_right", "tokens"),
    **{kind: (kind, "tokens_right", "tokens") for kind in PORTABILITY.values()},
    "relation_specificity": ("relation_specificity", "tokens_agreeing", "tokens"),
    **{f"{kind}_any": (kind, "tokens_right_any", "tokens_any") for kind in PORTABILITY.values()},
}
EXACT = ("rewrite_acc", "rephrase_acc", *PORTABILITY.values())  # these also count whole answers
FORCED_KINDS = tuple(dict.fromkeys(kind for kind, *_ in FORCED.values()))
VIEWS = {"": "success", "_argmax": "argmax", "_overlap": "overlap"}  # of CounterFact's metrics
RESAMPLES = 2000
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Per-record means of one cell: (records, 3), columns as KINDS; and how many prompts each kind has."""

    success: Array
    argmax: Array
    overlap: Array
    prompts: Mapping[str, int]


def tabulate_cell(
    cases: Sequence[Mapping[str, Any]],
    unedited: Sequence[Mapping[str, Any]] | None = None,
    routes: Sequence[str] | None = None,
) -> Table:
    """Outcomes of one cell.

    cases: rows of ``cases.jsonl.gz`` under one weight set; unedited: the same prompts under the unedited
    model, used where ``routes`` says "unedited". Rows of a record must be given together or not: they are
    grouped by ``case_id``, in order of first appearance.
    """
    order: dict[Any, int] = {}
    values: dict[tuple[int, str], list[tuple[float, ...]]] = {}
    for row, shown in zip(cases, shown_rows(cases, unedited, routes), strict=True):
        if row["kind"] not in KINDS:
            continue
        record = order.setdefault(row["case_id"], len(order))
        values.setdefault((record, row["kind"]), []).append(_outcome(shown))
    means = np.array(  # (records, kinds, views)
        [[np.mean(values[record, kind], axis=0) for kind in KINDS] for record in range(len(order))],
        dtype=np.float64,
    )
    prompts = {kind: sum(row["kind"] == kind for row in cases) for kind in KINDS}
    success, argmax, overlap = np.moveaxis(means, -1, 0)
    return Table(success=success, argmax=argmax, overlap=overlap, prompts=prompts)


def shown_rows(
    cases: Sequence[Mapping[str, Any]],
    unedited: Sequence[Mapping[str, Any]] | None = None,
    routes: Sequence[str] | None = None,
) -> Sequence[Mapping[str, Any]]:
    """The outcomes that a cell shows: its own, or the unedited model's where a prompt is routed there."""
    if routes is None:
        return cases
    assert unedited is not None
    shown = [plain if route == "unedited" else row
             for row, plain, route in zip(cases, unedited, routes, strict=True)]  # fmt: skip
    assert all(a["prompt"] == b["prompt"] for a, b in zip(cases, shown, strict=True))
    return shown


def _outcome(row: Mapping[str, Any]) -> tuple[float, ...]:
    """(success, argmax, overlap) of one prompt: likelier than the other answer (a tie is no success), all
    of its tokens predicted, the share of them that is."""
    right, other = ("true", "new") if row["kind"] == "neighborhood" else ("new", "true")
    likelier = row[f"nll_{right}"] < row[f"nll_{other}"]
    return likelier, row[f"argmax_{right}"], row[f"tokens_right_{right}"] / row[f"tokens_{right}"]


def harmonic_mean(rates: Array) -> Array:
    """Harmonic mean over the last axis; 0 where a rate is 0."""
    positive = (rates > 0).all(axis=-1)
    inverse = np.where(rates > 0, 1 / np.where(rates > 0, rates, 1), np.inf).mean(axis=-1)
    return np.where(positive, 1 / inverse, 0.0)


def resampling_counts(n: int, seed: int, resamples: int = RESAMPLES) -> Array:
    """(resamples, n) how often each record is drawn; the same for every cell, so differences are paired."""
    generator = np.random.default_rng([seed, n])
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def edit_scores(table: Table, baseline: Table | None, counts: Array) -> list[Score]:
    """All scores of a cell with 95 % percentile-bootstrap intervals, and paired differences to a baseline.

    counts: of ``resampling_counts`` for this many records.
    """
    scores: list[Score] = []
    for suffix, part in VIEWS.items():
        value, drawn = _rates(getattr(table, part), counts)
        base = _rates(getattr(baseline, part), counts) if baseline is not None else None
        for column, (kind, name) in enumerate(KINDS.items()):
            scores.append(
                _score(name + suffix, value[column], drawn[:, column], table.prompts[kind],
                       None if base is None else (base[0][column], base[1][:, column]),
                       protocol="teacher_forced" if suffix else "probability")
            )  # fmt: skip
        if part == "success":
            mean = None if base is None else (harmonic_mean(base[0]), harmonic_mean(base[1]))
            scores.append(
                _score("score", harmonic_mean(value), harmonic_mean(drawn), len(table.success), mean)
            )
    order = ["efficacy", "generalization", "locality", "score"]
    return sorted(scores, key=lambda s: order.index(s.metric) if s.metric in order else len(order))


def _rates(values: Array, counts: Array) -> tuple[Array, Array]:
    return values.mean(axis=0), counts @ values / len(values)


def _score(
    name: str,
    value: Any,
    drawn: Array,
    n: int,
    base: tuple[Any, Array] | None,
    protocol: str = "probability",
) -> Score:
    low, high = np.quantile(drawn, (0.025, 0.975))
    difference = low_d = high_d = None
    if base is not None:
        difference = float(value - base[0])
        low_d, high_d = (float(q) for q in np.quantile(drawn - base[1], (0.025, 0.975)))
    return Score(
        metric=name, value=float(value), low=float(low), high=float(high), n=n,
        protocol=protocol,
        difference=difference, difference_low=low_d, difference_high=high_d,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shares:
    """One KnowEdit metric of one cell: the mean over its prompts of every record that has any."""

    values: Array  # (records with such prompts,)
    prompts: int


def forced_shares(
    cases: Sequence[Mapping[str, Any]],
    unedited: Sequence[Mapping[str, Any]] | None = None,
    routes: Sequence[str] | None = None,
) -> dict[str, Shares]:
    """KnowEdit's metrics by name, those left out that no record has prompts for.

    cases, unedited, routes: as ``tabulate_cell`` takes them.
    """
    values: dict[str, dict[Any, list[float]]] = {}
    for row, shown in zip(cases, shown_rows(cases, unedited, routes), strict=True):
        for metric, (kind, right, tokens) in FORCED.items():
            if kind == row["kind"]:
                share = shown[right] / shown[tokens]
                values.setdefault(metric, {}).setdefault(row["case_id"], []).append(share)
                if metric in EXACT:
                    exact = values.setdefault(f"{metric}_exact", {}).setdefault(row["case_id"], [])
                    exact.append(float(share == 1))
    return {
        metric: Shares(
            values=np.array([np.mean(shares) for shares in values[metric].values()], dtype=np.float64),
            prompts=sum(map(len, values[metric].values())),
        )
        for metric in (*FORCED, *(f"{name}_exact" for name in EXACT))
        if metric in values
    }


def forced_scores(
    shares: Mapping[str, Shares], baseline: Mapping[str, Shares] | None, seed: int
) -> list[Score]:
    """KnowEdit's scores with 95 % percentile-bootstrap intervals, and paired differences to a baseline.

    A metric's intervals resample the records that have it; cells of one run have the same ones.
    """
    scores: list[Score] = []
    for metric, own in shares.items():
        counts = resampling_counts(len(own.values), seed)
        value, drawn = _rates(own.values, counts)
        base = None if baseline is None else _rates(baseline[metric].values, counts)
        scores.append(_score(metric, value, drawn, own.prompts, base, protocol="teacher_forced"))
    return scores


def route_scores(
    cases: Sequence[Mapping[str, Any]], routes: Sequence[str], seed: int, kinds: Iterable[str] = KINDS
) -> list[Score]:
    """Share of prompts of each kind sent to the edited model, per record and then over records."""
    scores: list[Score] = []
    for kind in kinds:
        shares: dict[Any, list[float]] = {}
        for row, route in zip(cases, routes, strict=True):
            if row["kind"] == kind:
                shares.setdefault(row["case_id"], []).append(float(route == "edited"))
        if shares:
            values = np.array([[np.mean(share)] for share in shares.values()])
            value, drawn = _rates(values, resampling_counts(len(values), seed))
            low, high = np.quantile(drawn[:, 0], (0.025, 0.975))
            scores.append(
                Score(metric=f"route_{kind}", value=float(value[0]), low=float(low), high=float(high),
                      n=sum(len(share) for share in shares.values()), protocol="routing")
            )  # fmt: skip
    return scores


def text_scores(
    measures: Mapping[str, Mapping[Any, float]], baseline: Mapping[str, Mapping[Any, float]] | None, seed: int
) -> list[Score]:
    """Scores of generated texts, with intervals over records and paired differences to a baseline.

    measures: metric -> case_id -> value, as ``harness.generation.measured`` gives them.
    """
    scores: list[Score] = []
    for metric, values in measures.items():
        counts = resampling_counts(len(values), seed)
        value, drawn = _rates(np.array(list(values.values())), counts)
        base = None if baseline is None else _rates(np.array([baseline[metric][c] for c in values]), counts)
        scores.append(_score(metric, value, drawn, len(values), base, protocol="generated"))
    return scores


def task_scores(
    rows: Sequence[Mapping[str, Any]], unedited: Sequence[Mapping[str, Any]] | None, seed: int
) -> list[Score]:
    """Scores of one general task, with 95 % intervals over its records (ALGORITHMS 8.3).

    rows: one a record, as ``cases.jsonl.gz`` has them. unedited: of the same records under the unedited
    model, to which the differences are; None where rows are its own. ``gold_margin`` is in nats.
    """
    counts = resampling_counts(len(rows), seed)
    found = task_values(rows, counts)
    before = None if unedited is None else task_values(unedited, counts)
    scores = [
        _score(name, *values, len(rows), None if before is None else before[name],
               protocol="generated" if name == "f1_generated" else "log_probability")
        for name, values in found.items()
    ]  # fmt: skip
    same = _column(rows, "pred") == _column(rows if unedited is None else unedited, "pred")
    agreement = _mean(same.astype(np.float64), counts)
    return [*scores, _score("agreement", *agreement, len(rows), None, protocol="log_probability")]


def task_values(rows: Sequence[Mapping[str, Any]], counts: Array) -> dict[str, tuple[float, Array]]:
    """Metric of one general task -> its value and that of each resample.

    counts: (resamples, records), how often each record is drawn.
    """
    gold, pred = _column(rows, "gold"), _column(rows, "pred")
    margins = np.array([_margin(row["choice_logprobs"], row["gold"]) for row in rows])
    values = {
        "f1_weighted": _f1(gold, pred, counts, weighted=True),
        "f1_macro": _f1(gold, pred, counts, weighted=False),
        "accuracy": _mean((gold == pred).astype(np.float64), counts),
        "gold_margin": _mean(margins, counts),
    }
    if all(row["pred_generated"] is not None for row in rows):
        values["f1_generated"] = _f1(gold, _column(rows, "pred_generated"), counts, weighted=True)
    return values


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.int64]:
    return np.array([row[name] for row in rows], dtype=np.int64)


def _margin(logprobs: Sequence[float], gold: int) -> float:
    """By how much the right choice is likelier than the best of the others."""
    return logprobs[gold] - max(value for i, value in enumerate(logprobs) if i != gold)


def _mean(values: Array, counts: Array) -> tuple[float, Array]:
    return float(values.mean()), counts @ values / len(values)


def _f1(
    gold: NDArray[np.int64], pred: NDArray[np.int64], counts: Array, *, weighted: bool
) -> tuple[float, Array]:
    """F1 over classes, weighted by how often each is right, or the mean over those that occur.

    A class that a resample has neither as right nor as predicted does not occur in it.
    """
    weights = np.vstack([np.ones(len(gold)), counts])  # the records themselves, then each resample
    classes = np.union1d(gold, pred)
    right = np.stack([weights @ ((gold == c) & (pred == c)) for c in classes], axis=1)
    support = np.stack([weights @ (gold == c) for c in classes], axis=1)
    both = support + np.stack([weights @ (pred == c) for c in classes], axis=1)
    each = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
    shares = support if weighted else (both > 0).astype(np.float64)
    values = (each * shares).sum(axis=1) / shares.sum(axis=1)
    return float(values[0]), values[1:]


def task_route_score(routes: Sequence[str], seed: int) -> Score:
    """Share of a task's records sent to the edited model."""
    sent = np.array([float(route == "edited") for route in routes])
    share = _mean(sent, resampling_counts(len(sent), seed))
    return _score("route_task", *share, len(sent), None, protocol="routing")
