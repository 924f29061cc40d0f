"""Run folders: `run.json` and `records.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jsonlines

from reports.names import route_name, weights_name
from reports.record import Record

RUN_FILE = "run.json"
RECORDS_FILE = "records.jsonl"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder as read."""

    path: Path
    info: dict[str, Any]  # run.json; empty where the folder has none
    records: tuple[Record, ...]  # one per identity, in the order in which they were last written

    @property
    def spec(self) -> dict[str, Any]:
        """The resolved spec of `run.json`."""
        return self._part("spec")

    @property
    def provenance(self) -> dict[str, Any]:
        """What the run was made of, as `run.json` says."""
        return self._part("provenance")

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def edits(self) -> int:
        """The edits of the whole run, as the spec says; without a spec those applied."""
        batch_size, batches = self.spec.get("batch_size"), self.spec.get("num_batches")
        if isinstance(batch_size, int) and isinstance(batches, int):
            return batch_size * batches
        return max(record.edits_applied for record in self.records)

    def weights_name(self, editor: str, merger: str | None, ratio: float | None) -> str:
        """Name of merged weights in the run's cases."""
        mergers, ratios = self._values("merger"), self._values("pruning_ratio")
        return weights_name(editor, merger, ratio, mergers or [merger], ratios or [ratio])

    def route_name(self, router: str | None, top_k: int | None) -> str:
        """Name of a route in the run's cases."""
        return route_name(router, top_k, self._values("router") or [router])

    def _values(self, name: str) -> list[Any]:
        """A field of the spec that holds several values, or held one in older versions; else nothing."""
        value = self.spec.get(name)
        return value if isinstance(value, list) else [] if value is None else [value]

    def _part(self, name: str) -> dict[str, Any]:
        part = self.info.get(name)
        return part if isinstance(part, dict) else {}


def load_run(folder: Path) -> Run:
    """Read a run folder; of records with one identity (a resumed run) the last is kept."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}")
    latest: dict[tuple[object, ...], Record] = {}
    path = folder / RECORDS_FILE
    for record in read_records(path) if path.is_file() else ():
        latest.pop(record.identity, None)
        latest[record.identity] = record
    if not latest:
        raise ValueError(f"{folder} holds no records; is it a run folder, and has its run scored anything?")
    return Run(path=folder, info=_read_info(folder / RUN_FILE), records=tuple(latest.values()))


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file in file order; a broken line is a ValueError naming file and line."""
    with jsonlines.open(path) as reader:
        for number in count(1):
            try:
                record = Record.from_json(reader.read(type=dict))
            except EOFError:
                return
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            yield record


def newest_run(folder: Path) -> Path:
    """The run folder under `folder` that was written to last."""
    written = {
        path.parent: path.stat().st_mtime_ns
        for name in (RUN_FILE, RECORDS_FILE)
        for path in folder.glob(f"*/{name}")
    }
    if not written:
        raise FileNotFoundError(f"no run under {folder}/; name a run folder, or make one with the ablation")
    return max(written, key=lambda run: (written[run], run.name))


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path}: not a JSON object")
    return info
