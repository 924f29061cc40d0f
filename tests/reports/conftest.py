"""Builders of records and run folders with figures made up for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from reports.load import Run, load_run
from reports.record import Record, Score

METRICS = ("efficacy", "generalization", "locality", "score")


def _score(metric: str, value: float, **fields: Any) -> Score:
    defaults = {"low": value - 0.04, "high": value + 0.03, "n": 100, "protocol": "probability"}
    return Score(metric=metric, value=value, **defaults | fields)


def _record(
    editor: str = "memit", cell: str = "baseline", value: float | None = None, **fields: Any
) -> Record:
    scores = () if value is None else tuple(_score(metric, value) for metric in METRICS)
    defaults = {
        "run_id": "run",
        "model": "smollm2-135m",
        "dataset": "facts",
        "chain": "shadow" if "MM" in cell else None,
        "pruning_ratio": 0.85 if "MM" in cell else None,
        "top_k": 2 if "+R" in cell else None,
        "encoder": "minilm" if "+R" in cell else None,
        "seed": 0,
        "edits_applied": 0 if editor == "none" else 100,
        "slice": "overall",
        "spec": {},
        "provenance": {},
        "scores": scores,
        "seconds": 1.5,
    }
    return Record(editor=editor, cell=cell, **defaults | fields)


@pytest.fixture
def score() -> Callable[..., Score]:
    return _score


@pytest.fixture
def record() -> Callable[..., Record]:
    return _record


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run(records, name="run", **info)`: a run folder."""

    def write(records: Iterable[Record], name: str = "run", **info: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = (json.dumps(record.to_json()) + "\n" for record in records)
        (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
        (folder / "run.json").write_text(json.dumps({"status": "complete"} | info), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def make_run(write_run: Callable[..., Path]) -> Callable[..., Run]:
    """`make_run(records, **info)`: the same, read."""
    return lambda records, **info: load_run(write_run(records, **info))


@pytest.fixture
def ablation(record: Callable[..., Record], score: Callable[..., Score]) -> list[Record]:
    """Two editors, one of them with a failed cell, two batches."""
    routes = tuple(
        score(f"route_{kind}", value, low=None, high=None, protocol="routing")
        for kind, value in (("rewrite", 1.0), ("paraphrase", 0.969), ("neighborhood", 0.545))
    )
    values = {"baseline": 0.80, "+MM": 0.82, "+R": 0.8, "+MM+R": 0.841}
    records = [record("none", "unedited", 0.333)]
    for editor in ("memit", "alphaedit"):
        for cell, value in values.items():
            if (editor, cell) == ("memit", "+MM"):
                error = "RuntimeError: out of memory\n  at 100% of {x}_y & z"
                records.append(record(editor, cell, error=error))
                continue
            shift = {} if cell == "baseline" else {"difference": value - 0.8}
            interval = {"difference_low": value - 0.81, "difference_high": value - 0.79} if shift else {}
            for slice_, add in (("overall", 0.0), ("batch:1", -0.05), ("batch:2", 0.05)):
                scores = tuple(score(metric, value + add, **shift, **interval) for metric in METRICS)
                scores += routes if "+R" in cell and slice_ == "overall" else ()
                records.append(record(editor, cell, slice=slice_, scores=scores))
    return records
