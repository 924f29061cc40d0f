"""What a cell costs: time per edit and per sample, and memory, from the timings in `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from reports.load import Run
from reports.names import COST_COLUMNS
from reports.record import Score
from reports.rows import Row, rows_of
from reports.seeds import Pool, seed_interval


def cost_scores(pool: Pool, row: Row) -> dict[str, Score]:
    """The columns of table 7 that are known of a row, means over the runs of a pool."""
    costs = [_costs(run, row) for run in pool.runs]
    scores = {}
    for name in COST_COLUMNS:
        values = [value for cost in costs if (value := cost[name]) is not None]
        if values:
            low, high = seed_interval(values)
            scores[name] = Score(
                metric=name, value=fmean(values), low=low, high=high, n=len(values), protocol="timing"
            )
    return scores


def _costs(run: Run, row: Row) -> dict[str, float | None]:
    """Merging adds to the time of an edit and routing to that of a sample; None where a part is unknown."""
    own, weights = _entry(run, row.editor), _weights(run, row)
    edit, inference = _number(own, "edit_seconds_per_edit"), _number(own, "inference_seconds_per_sample")
    if weights != row.editor:
        inference = _number(_entry(run, weights), "inference_seconds_per_sample") or inference
        if row.chain == "merged":  # each batch was merged as it was edited
            edit = _number(_entry(run, weights), "edit_seconds_per_edit")
        else:
            edit = _sum(edit, _number(_timings(run), f"merge {weights}"), run.edits)
    if row.is_routed:
        inference = _sum(inference, _number(_timings(run), "route"), _prompts_routed(run))
    memory = _number(own, "peak_memory_bytes")
    return {
        "edit_seconds": edit,
        "inference_seconds": inference,
        "memory_gb": None if memory is None else memory / 1e9,
    }


def _sum(seconds: float | None, total: float | None, parts: int) -> float | None:
    """Seconds and a part of a total."""
    return None if seconds is None or total is None or not parts else seconds + total / parts


def _prompts_routed(run: Run) -> int:
    """How many prompts the routing stage decided; 0 where the records do not tell."""
    if run.spec.get("generation"):
        return 0  # prompts of texts are routed too and counted nowhere
    row = next((row for row in rows_of(run) if row.is_routed and _routes(row)), None)
    return sum(score.n for score in _routes(row)) if row is not None else 0


def _routes(row: Row) -> Sequence[Score]:
    """The routing shares of everything that a row has, each prompt once for every time it was decided."""
    return [
        score
        for record in row.records
        if record.slice == "overall" or record.slice.startswith("task:")
        for score in record.scores
        if score.metric.startswith("route_")
    ]


def _weights(run: Run, row: Row) -> str:
    """The name of the weights that a row reads, as `run.json` has it."""
    if not row.is_merged:
        return row.editor
    return run.weights_name(row.editor, row.merger, row.pruning_ratio)


def _timings(run: Run) -> dict[str, Any]:
    timings = run.info.get("timings")
    return timings if isinstance(timings, dict) else {}


def _entry(run: Run, name: str) -> dict[str, Any]:
    costs = run.info.get("per_editor")
    entry = costs.get(name) if isinstance(costs, dict) else None
    return entry if isinstance(entry, dict) else {}


def _number(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
