"""One result record: what was measured on one slice of one cell.

A record is complete by itself and knows nothing of how the run happened. `load.py`
reads older versions through `upgrade`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

SCHEMA_VERSION = 1

GRID = ("merger", "pruning_ratio", "router", "top_k")
"""What tells cells of one name apart: of each a run may have several values, its spec lists them."""

CELLS = ("baseline", "+MM", "+R", "+MM+R")
"""The cells of an editor, in the order in which tables show them."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric on one slice."""

    metric: str
    value: float  # fraction in [0, 1] unless the metric says otherwise
    low: float | None  # 95 % interval over cases
    high: float | None
    n: int  # what was scored
    protocol: str  # "probability", "teacher_forced", "generated", "log_probability", "routing"
    difference: float | None = None  # same slice of the editor's baseline cell; tasks: unedited model
    difference_low: float | None = None  # its 95 % interval, paired over cases
    difference_high: float | None = None

    def __post_init__(self) -> None:
        for name in ("value", "low", "high", "difference", "difference_low", "difference_high"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            if not _is_number(number) or not math.isfinite(number):
                raise ValueError(f"{self.metric}: {name} is {number!r}, not a finite number")

    def to_json(self) -> dict[str, Any]:
        """Plain data; a difference that was not measured is left out."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in data.items() if value is not None or key in ("low", "high")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Score:
        """The inverse of `to_json`; a missing or unknown field is a ValueError."""
        _check_fields(cls, data)
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The scores of one slice under one cell, or the error that took their place."""

    schema_version: int = SCHEMA_VERSION
    run_id: str  # digest of the resolved spec
    model: str
    dataset: str
    editor: str  # "none" for the unedited model
    cell: str  # "unedited", "baseline", "+MM", "+R", "+MM+R"
    chain: str | None
    pruning_ratio: float | None  # of a merger that has one
    top_k: int | None  # of a router that has one
    encoder: str | None
    seed: int | None
    edits_applied: int  # edits in the weights when scored
    slice: str  # "overall", "batch:K" (K from 1), "task:NAME", "probes" (of the router)
    spec: Mapping[str, Any] | str  # or the digest of run.json's
    provenance: Mapping[str, Any] | str  # likewise
    scores: tuple[Score, ...]
    seconds: float
    error: str | None = None
    merger: str | None = None  # of merged cells; None in records of versions that knew one alone
    router: str | None = None  # of routed cells; likewise

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells this record from the others of a run folder; equal ones replace each other."""
        setting = (self.merger, self.pruning_ratio, self.router, self.top_k, self.encoder, self.chain)
        return (self.run_id, self.editor, self.cell, *setting, self.slice, self.edits_applied)

    def score(self, metric: str) -> Score | None:
        """The score of that metric, if this record has one."""
        return next((score for score in self.scores if score.metric == metric), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for one line of `records.jsonl`."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("spec", "provenance"):
            data[name] = data[name] if isinstance(data[name], str) else dict(data[name])
        return data | {"scores": [score.to_json() for score in self.scores]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of `to_json`, also for older versions; a missing or unknown field is a ValueError."""
        data = upgrade(data)
        _check_fields(cls, data)
        if not isinstance(data["scores"], list):
            raise ValueError(f"Record: scores is {data['scores']!r}, not a list")
        return cls(**data | {"scores": tuple(Score.from_json(score) for score in data["scores"])})


def upgrade(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same record in the present version. There is only version 1 so far."""
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}; this version reads {SCHEMA_VERSION}")
    return dict(data)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _has_type(value: object, annotation: str) -> bool:
    """Whether a JSON value fits a field's annotation, as written in the classes above."""
    kinds = annotation.split(" | ")
    if value is None:
        return "None" in kinds
    if isinstance(value, dict):
        return kinds[0].startswith("Mapping")
    if isinstance(value, list):
        return kinds[0].startswith("tuple")
    if _is_number(value):
        return "float" in kinds or ("int" in kinds and isinstance(value, int))
    return "str" in kinds and isinstance(value, str)


def _check_fields(cls: type[Score] | type[Record], data: object) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__}: not a JSON object: {data!r}")
    known = {field.name: field for field in fields(cls)}
    if unknown := sorted(data.keys() - known.keys()):
        raise ValueError(f"{cls.__name__}: unknown fields {unknown}; known: {sorted(known)}")
    required = {name for name, field in known.items() if field.default is MISSING}
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{cls.__name__}: missing fields {missing}")
    for name, value in data.items():
        if not _has_type(value, str(known[name].type)):
            raise ValueError(f"{cls.__name__}: {name} is {value!r}, not {known[name].type}")
