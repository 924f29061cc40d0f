"""Rates, intervals and differences against literal recomputations."""

import math
import random
import warnings
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.reference import counterfact_rates
from harness.metrics import (
    KINDS,
    RESAMPLES,
    edit_scores,
    harmonic_mean,
    resampling_counts,
    route_scores,
    tabulate_cell,
)

Row = dict[str, Any]
METRICS = ("efficacy", "generalization", "locality")


def made_up(records: int = 12, *, seed: int = 0, better: float = 0.0) -> list[Row]:
    """Rows with ties, unequal numbers of prompts, and case ids that are numbers and texts."""
    draw = random.Random(seed)
    shape = random.Random(99)  # prompts are the same for every seed
    rows = []
    for record in range(records):
        case_id: int | str = record if record % 2 else f"case {record}"
        for kind, most in (("rewrite", 1), ("paraphrase", 3), ("neighborhood", 5)):
            for index in range(shape.randint(1, most)):
                new, true = draw.randint(1, 6) - better, float(draw.randint(1, 6))  # whole numbers tie
                row: Row = {
                    "case_id": case_id, "kind": kind, "index": index,
                    "prompt": f"{record} {kind} {index}", "nll_new": new, "nll_true": true,
                }  # fmt: skip
                for which in ("new", "true"):
                    tokens = draw.randint(1, 3)
                    right = draw.randint(0, tokens)
                    row |= {f"tokens_{which}": tokens, f"tokens_right_{which}": right}
                    row[f"argmax_{which}"] = right == tokens
                rows.append(row)
    return rows


def grouped(rows: list[Row]) -> list[list[Row]]:
    records: dict[Any, list[Row]] = {}
    for row in rows:
        records.setdefault(row["case_id"], []).append(row)
    return list(records.values())


def values(
    rows: list[Row], baseline: list[Row] | None = None, seed: int = 0, **kwargs: Any
) -> dict[str, Any]:
    table = tabulate_cell(rows, **kwargs)
    base = tabulate_cell(baseline) if baseline is not None else None
    scores = edit_scores(table, base, resampling_counts(len(table.success), 0))
    return {score.metric: score for score in scores}


@pytest.mark.parametrize("seed", range(5))
def test_rates_equal_the_literal_ones(seed: int) -> None:
    rows = made_up(seed=seed)
    assert any(row["nll_new"] == row["nll_true"] for row in rows)
    found = values(rows)
    wanted = counterfact_rates(grouped(rows))
    assert found.keys() == wanted.keys()
    for metric, value in wanted.items():
        assert found[metric].value == pytest.approx(value, abs=1e-12), metric


def one(kind: str, new: float, true: float, *, case: int = 0, hit: bool = False) -> Row:
    return {
        "case_id": case, "kind": kind, "index": 0, "prompt": kind, "nll_new": new, "nll_true": true,
        "argmax_new": hit, "argmax_true": not hit, "tokens_new": 2, "tokens_true": 4,
        "tokens_right_new": 2 * hit, "tokens_right_true": 4 - hit,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("new", "true", "wanted"), [(1.0, 2.0, (1, 1, 0)), (2.0, 1.0, (0, 0, 1)), (1.0, 1.0, (0, 0, 0))]
)
def test_a_tie_is_a_failure_of_all_three(new: float, true: float, wanted: tuple[int, ...]) -> None:
    found = values([one(kind, new, true) for kind in KINDS])
    assert tuple(found[metric].value for metric in METRICS) == wanted
    assert found["score"].value == 0


@pytest.mark.parametrize("hit", [True, False])
def test_argmax_is_of_the_new_target_but_for_neighbours_of_the_true_one(hit: bool) -> None:
    found = values([one(kind, 1, 1, hit=hit) for kind in KINDS])
    assert [found[f"{metric}_argmax"].value for metric in METRICS] == [hit, hit, not hit]
    assert [found[f"{metric}_overlap"].value for metric in METRICS] == [hit, hit, 1 - hit / 4]


def test_means_are_inside_records_first() -> None:
    """One record with one good paraphrase, one with three bad ones: a half, not a quarter."""
    rows = [one("rewrite", 0, 1, case=case) for case in (0, 1)]
    rows += [one("neighborhood", 1, 0, case=case) for case in (0, 1)]
    rows += [one("paraphrase", 0, 1, case=0), *[one("paraphrase", 1, 0, case=1)] * 3]
    found = values(rows)
    assert found["generalization"].value == 0.5
    assert found["generalization"].n == 4
    assert found["efficacy"].n == 2
    assert found["score"].n == 2  # records


def test_the_score_is_the_harmonic_mean_of_the_unrounded_rates() -> None:
    found = values(made_up(37, seed=3))
    three = [found[metric].value for metric in METRICS]
    assert found["score"].value == pytest.approx(stats.hmean(three), abs=1e-12)


def test_the_harmonic_mean_of_a_zero_is_zero_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = np.array([[0.0, 0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.2, 0.4, 0.8]])
        found = harmonic_mean(rates)
    assert found.tolist() == pytest.approx([0, 0, 1, 3 / (5 + 2.5 + 1.25)])


def test_metrics_come_in_the_order_of_the_tables() -> None:
    names = list(values(made_up()))
    assert names[:4] == ["efficacy", "generalization", "locality", "score"]
    assert names[4:] == [f"{metric}_{view}" for view in ("argmax", "overlap") for metric in METRICS]


# -- routed cells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_routed_cell_joins_prompt_by_prompt(seed: int) -> None:
    edited, unedited = made_up(seed=seed, better=1), made_up(seed=seed + 50)
    draw = random.Random(seed)
    routes = [draw.choice(["edited", "unedited"]) for _ in edited]
    joined = [e if route == "edited" else u for e, u, route in zip(edited, unedited, routes, strict=True)]
    found = values(edited, unedited=unedited, routes=routes)
    for metric, value in counterfact_rates(grouped(joined)).items():
        assert found[metric].value == pytest.approx(value, abs=1e-12), metric


def test_routing_everything_one_way_gives_that_model() -> None:
    edited, unedited = made_up(seed=1), made_up(seed=2)
    for route, rows in (("edited", edited), ("unedited", unedited)):
        assert values(edited, unedited=unedited, routes=[route] * len(edited)) == values(rows)


def test_outcomes_of_other_prompts_are_not_joined() -> None:
    edited, unedited = made_up(), made_up()[::-1]
    with pytest.raises(AssertionError):
        tabulate_cell(edited, unedited, ["unedited"] * len(edited))


def test_routing_shares_are_means_inside_records_first() -> None:
    rows = made_up(9, seed=4)
    draw = random.Random(0)
    routes = [draw.choice(["edited", "unedited"]) for _ in rows]
    found = {score.metric: score for score in route_scores(rows, routes, 0)}
    assert list(found) == ["route_rewrite", "route_paraphrase", "route_neighborhood"]
    for kind in KINDS:
        shares: dict[Any, list[bool]] = {}
        for row, route in zip(rows, routes, strict=True):
            if row["kind"] == kind:
                shares.setdefault(row["case_id"], []).append(route == "edited")
        score = found[f"route_{kind}"]
        assert score.value == pytest.approx(math.fsum(sum(s) / len(s) for s in shares.values()) / len(shares))
        assert score.n == sum(len(share) for share in shares.values())
        assert score.protocol == "routing"
        assert score.low <= score.value <= score.high


def test_routes_must_be_as_many_as_rows() -> None:
    rows = made_up(2)
    with pytest.raises(ValueError, match="argument"):
        route_scores(rows, ["edited"], 0)


# -- intervals ----------------------------------------------------------------------------------------------


def scipy_interval(statistic: Any, *data: Any) -> tuple[float, float]:
    found = stats.bootstrap(
        data, statistic, paired=True, vectorized=True, method="percentile", n_resamples=5_000,
        rng=np.random.default_rng(5),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


RECORDS = 80
STEP = 1.001 / RECORDS  # rates of whole outcomes move in such steps; Monte Carlo error is below one


def test_intervals_agree_with_scipy() -> None:
    rows = made_up(RECORDS, seed=7)
    table = tabulate_cell(rows)
    found = values(rows)
    columns = table.success.T
    for metric, column in zip(METRICS, columns, strict=True):
        assert (found[metric].low, found[metric].high) == pytest.approx(
            scipy_interval(np.mean, column), abs=STEP
        )
    mean = lambda *three, axis=0: stats.hmean([column.mean(axis=axis) for column in three])
    assert (found["score"].low, found["score"].high) == pytest.approx(
        scipy_interval(mean, *columns), abs=STEP
    )


def test_intervals_of_differences_are_paired() -> None:
    baseline = made_up(RECORDS, seed=7)
    cell = [dict(row) for row in baseline]
    for row in cell[::9]:  # a few outcomes turn round
        row["nll_new"], row["nll_true"] = row["nll_true"], row["nll_new"]
    found = values(cell, baseline)
    a, b = tabulate_cell(cell).success, tabulate_cell(baseline).success
    for i, metric in enumerate(METRICS):
        difference = a[:, i] - b[:, i]
        score = found[metric]
        assert score.difference == pytest.approx(difference.mean())
        assert (score.difference_low, score.difference_high) == pytest.approx(
            scipy_interval(np.mean, difference), abs=STEP
        )
        assert score.difference_high - score.difference_low < (score.high - score.low) * 0.9
    mean = lambda *three, axis=0: stats.hmean([column.mean(axis=axis) for column in three])
    both = lambda *six, axis=0: mean(*six[:3], axis=axis) - mean(*six[3:], axis=axis)
    score = found["score"]
    assert score.difference == pytest.approx(both(*a.T, *b.T))
    assert (score.difference_low, score.difference_high) == pytest.approx(
        scipy_interval(both, *a.T, *b.T), abs=STEP
    )


def test_a_cell_equal_to_its_baseline_differs_by_exactly_nothing() -> None:
    rows = made_up()
    for score in values(rows, rows).values():
        assert (score.difference, score.difference_low, score.difference_high) == (0, 0, 0)


def test_without_a_baseline_there_is_no_difference() -> None:
    for score in values(made_up()).values():
        assert (score.difference, score.difference_low, score.difference_high) == (None, None, None)


def test_certain_rates_have_no_width() -> None:
    found = values(
        [one(kind, *((0, 1) if kind != "neighborhood" else (1, 0)), case=c) for kind in KINDS for c in (1, 2)]
    )
    for metric in (*METRICS, "score"):
        assert (found[metric].low, found[metric].value, found[metric].high) == (1, 1, 1)


def test_resampling_is_with_replacement_seeded_and_whole() -> None:
    counts = resampling_counts(10, 3)
    assert counts.shape == (RESAMPLES, 10)
    assert (counts.sum(axis=1) == 10).all()
    assert counts.max() > 1
    assert counts.mean(axis=0) == pytest.approx(np.ones(10), abs=0.1)
    assert (resampling_counts(10, 3) == counts).all()
    assert (resampling_counts(10, 4) != counts).any()
