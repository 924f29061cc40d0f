from __future__ import annotations

import pytest

from reports.seeds import pools_of, seed_interval


@pytest.fixture
def seeded(record, make_run):
    """`seeded(seed, value, ...)`: a run of one editor's baseline and +R cells."""

    def make(seed, value, spec=None, records=(), **fields):
        given = [
            record("memit", "baseline", value, seed=seed, **fields),
            record("memit", "+R", value + 0.1, seed=seed, **fields),
        ]
        spec = {"seed": seed, "batch_size": 50, "num_batches": 2, "select": "random"} | (spec or {})
        return make_run(records or given, name=f"seed-{seed}-{value}", spec=spec)

    return make


def score_of(pool, cell, metric="efficacy"):
    row = next(row for row in pool.rows if row.cell == cell)
    return row.at("overall").score(metric)


def test_the_interval_is_students(seeded):
    # Student's t with 2 degrees of freedom: 4.302653 at 97.5 % (any table of it)
    low, high = seed_interval([0.6, 0.7, 0.8])
    half = 4.302653 * 0.1 / 3**0.5
    assert (low, high) == (pytest.approx(0.7 - half, abs=1e-6), pytest.approx(0.7 + half, abs=1e-6))
    assert seed_interval([0.6]) == (None, None)


def test_runs_of_one_spec_are_a_mean_over_seeds(seeded):
    (pool,) = pools_of([seeded(2, 0.8), seeded(0, 0.6), seeded(1, 0.7)])
    assert pool.seeds == (0, 1, 2)
    score = score_of(pool, "baseline")
    assert score.value == pytest.approx(0.7) and score.n == 300
    assert score.high - score.low == pytest.approx(2 * 4.302653 * 0.1 / 3**0.5, abs=1e-6)
    (note,) = pool.notes()
    assert "mean over 3 seeds (0, 1, 2) on records drawn by each" in note


@pytest.mark.parametrize("other", [{"batch_size": 25}, {"pruning_ratio": [0.5]}, {"settings": {"memit": 1}}])
def test_another_spec_is_never_pooled(seeded, other):
    pools = pools_of([seeded(0, 0.6), seeded(1, 0.7, spec=other)])
    assert [len(pool.runs) for pool in pools] == [1, 1]
    assert score_of(pools[0], "baseline").low == pytest.approx(0.56)


def test_the_same_seed_again_is_no_second_seed(seeded):
    assert [len(pool.runs) for pool in pools_of([seeded(0, 0.6), seeded(0, 0.7)])] == [1, 1]


def test_other_weights_are_never_pooled(record, make_run):
    runs = [
        make_run(
            [record(value=0.5, seed=seed)],
            name=f"run-{seed}",
            spec={"seed": seed},
            provenance={"model": {"name": "folder", "digest": f"{seed}"}},
        )
        for seed in (0, 1)
    ]
    assert len(pools_of(runs)) == 2


def test_runs_without_a_spec_stand_alone(record, make_run):
    runs = [make_run([record(value=0.5, seed=seed)], name=f"run-{seed}") for seed in (0, 1)]
    assert len(pools_of(runs)) == 2


def test_differences_are_pooled_as_pairs(seeded, record, score):
    runs = []
    for seed, change in ((0, 0.02), (1, 0.06)):
        scores = (score("efficacy", 0.5 + 0.2 * seed, difference=change),)
        runs.append(seeded(seed, 0.5, records=[record("memit", "+R", scores=scores, seed=seed)]))
    difference = score_of(*pools_of(runs), "+R")
    assert difference.difference == pytest.approx(0.04)
    half = 12.706205 * 0.02  # t of 1 degree of freedom, times the standard error
    assert difference.difference_low == pytest.approx(0.04 - half, abs=1e-6)


def test_what_failed_or_is_unfinished_in_one_seed_is_left_out_and_said(seeded, record):
    whole = seeded(0, 0.6)
    failed = [record("memit", "baseline", 0.7, seed=1), record("memit", "+R", seed=1, error="broken")]
    unfinished = [record("memit", "baseline", 0.9, seed=2, edits_applied=50)]
    (pool,) = pools_of([whole, seeded(1, 0, records=failed), seeded(2, 0, records=unfinished)])
    assert score_of(pool, "baseline").value == pytest.approx(0.65)
    assert score_of(pool, "+R").value == pytest.approx(0.7)
    assert score_of(pool, "+R").low is None
    assert pool.notes()[1] == "Scored under fewer seeds: MEMIT baseline 2, MEMIT +R 1."


def test_what_failed_in_all_seeds_says_so(seeded, record):
    runs = [seeded(s, 0, records=[record("memit", "+R", seed=s, error=f"broken {s}")]) for s in (0, 1)]
    (pool,) = pools_of(runs)
    assert pool.rows[0].at("overall").error == "broken 0"
