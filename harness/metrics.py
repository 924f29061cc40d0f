"""Edit metrics of CounterFact from scored prompts, with bootstrap intervals over records (ALGORITHMS 8.1).

Every prompt is scored once per weight set. A routed cell only chooses, prompt by prompt, between the
outcome under the unedited model and that under the edited one, so it costs no forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reports.record import Score

KINDS = {"rewrite": "efficacy", "paraphrase": "generalization", "neighborhood": "locality"}
RESAMPLES = 2000
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Per-record means of one cell: (records, 3), columns as KINDS; and how many prompts each kind has."""

    success: Array
    argmax: Array
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
    values: dict[tuple[int, str], list[tuple[bool, bool]]] = {}
    for i, row in enumerate(cases):
        shown = row
        if routes is not None and routes[i] == "unedited":
            assert unedited is not None and unedited[i]["prompt"] == row["prompt"]
            shown = unedited[i]
        record = order.setdefault(row["case_id"], len(order))
        values.setdefault((record, row["kind"]), []).append(_outcome(shown))
    means = np.array(  # (records, kinds, 2)
        [[np.mean(values[record, kind], axis=0) for kind in KINDS] for record in range(len(order))],
        dtype=np.float64,
    )
    prompts = {kind: sum(row["kind"] == kind for row in cases) for kind in KINDS}
    return Table(success=means[..., 0], argmax=means[..., 1], prompts=prompts)


def _outcome(row: Mapping[str, Any]) -> tuple[bool, bool]:
    """(success, argmax success) of one prompt; a tie is no success."""
    if row["kind"] == "neighborhood":
        return row["nll_true"] < row["nll_new"], row["argmax_true"]
    return row["nll_new"] < row["nll_true"], row["argmax_new"]


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
    for suffix, part in (("", "success"), ("_argmax", "argmax")):
        value, drawn = _rates(getattr(table, part), counts)
        base = _rates(getattr(baseline, part), counts) if baseline is not None else None
        for column, (kind, name) in enumerate(KINDS.items()):
            scores.append(
                _score(name + suffix, value[column], drawn[:, column], table.prompts[kind],
                       None if base is None else (base[0][column], base[1][:, column]))
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


def _score(name: str, value: Any, drawn: Array, n: int, base: tuple[Any, Array] | None) -> Score:
    low, high = np.quantile(drawn, (0.025, 0.975))
    difference = low_d = high_d = None
    if base is not None:
        difference = float(value - base[0])
        low_d, high_d = (float(q) for q in np.quantile(drawn - base[1], (0.025, 0.975)))
    return Score(
        metric=name, value=float(value), low=float(low), high=float(high), n=n,
        protocol="teacher_forced" if name.endswith("_argmax") else "probability",
        difference=difference, difference_low=low_d, difference_high=high_d,
    )  # fmt: skip


def route_scores(cases: Sequence[Mapping[str, Any]], routes: Sequence[str], seed: int) -> list[Score]:
    """Share of prompts of each kind sent to the edited model, per record and then over records."""
    scores: list[Score] = []
    for kind in KINDS:
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
