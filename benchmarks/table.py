"""The page of the docs and the table of the terminal, from the JSON of one machine or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from benchmarks.measure import Result, shown
from benchmarks.parts import ON_CPU, PARTS

FIELDS = ("name", "value", "unit", "baseline", "ratio", "repeats", "device", "setting")
COLUMNS = ("part", "target", "measured", "baseline", "ratio", "met")
ABSENT = "–"
INTRO = """\
# Benchmarks

What the harness does beside a slow baseline that does the same one by one, written from the equations
(`benchmarks/reference/`). Both sides run in one process on one machine, and their results are compared.
Figures are medians over repeats after a warm-up; the ratio is baseline over measured. `@gpu` marks a part on
a GPU. `nox -s bench -- --out FILE` measures; `nox -s bench -- --table FILE ...` makes this page of what it
wrote, one file a machine."""

TRIED = """\
## Choices that were measured

- `--dtype bfloat16`, the default on a GPU: Score of the default run 84.1 (MEMIT) and 84.6 (AlphaEdit),
  against 83.0 and 85.4 in float32; with +MM+R 84.3 and 85.3, against 84.6 and 86.4. All differences are
  within the 95 % intervals (3 points to either side).
- `torch.compile` on a CPU, not used: forward and backward of one block on 1,024 tokens (SmolLM2-135M,
  float32, one thread) took 160 ms, 190 ms without it, and 95 ms with weights packed by oneDNN, which it
  cannot trace. It took 23 s to compile and 8 s more for the next shape; a step of an optimisation has
  several, as finished edits leave it.
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a part must reach: at most a value, in its unit, or at least a ratio."""

    text: str
    most: float | None = None
    ratio: float | None = None

    def met(self, row: Mapping[str, Any]) -> bool:
        if self.most is not None:
            return bool(row["value"] <= self.most)
        return row["ratio"] is not None and self.ratio is not None and bool(row["ratio"] >= self.ratio)


_FOUR_CELLS = Target(text="four cells at most 1.6x one", ratio=1 / 1.6)
_MIXED = Target(text="a mixed batch at most 15 % more", ratio=1 / 1.15)
_TENFOLD = Target(text="10x", ratio=10)
TARGETS = {
    "targets": _TENFOLD,
    "targets@gpu": Target(text="20x", ratio=20),
    "covariance": _TENFOLD,
    "covariance@gpu": _TENFOLD,
    "scoring": Target(text="6x", ratio=6),
    "merge": Target(text="0.25 s", most=0.25),
    "merge@gpu": Target(text="5 ms", most=0.005),
    "router": Target(text="6 ms a query", most=6),
    "router-decision": Target(text="20 us a query", most=20),
    "grid": _FOUR_CELLS,
    "grid@gpu": _FOUR_CELLS,
    "routed-forward": _MIXED,
    "routed-forward@gpu": _MIXED,
    "memory@gpu": Target(text="22 GB", most=22),
}


def terminal(results: Sequence[Result]) -> str:
    """The table, and under it the settings."""
    rows = [result.as_json() for result in results]
    return f"{_table(rows, 'simple')}\n\n{_settings(rows)}"


def page(reports: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown page; of a part that several machines measured, the first one's rows are taken."""
    machines = "\n".join(f"- {_machine(report)}" for report in reports)
    rows = merged(reports)
    return f"{INTRO}\n\n{machines}\n\n{_table(rows, 'pipe')}\n\n{_settings(rows)}\n\n{TRIED}"


def merged(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of all parts, on a CPU and on a GPU, of each those of the first report that measured it."""
    rows: list[Mapping[str, Any]] = []
    for name in (f"{part}{mark}" for part in ON_CPU for mark in ("", "@gpu")):
        found = [[row for row in report["results"] if row["name"] == name] for report in reports]
        measured = [some for some in found if any(row["value"] is not None for row in some)]
        rows += next(iter(measured or filter(None, found)), [])
    return rows


def check(report: Any, source: str) -> Mapping[str, Any]:
    """A report as ``--out`` writes it; ValueError naming the file if it is something else."""
    if not isinstance(report, Mapping) or not {"machine", "versions", "commit", "results"} <= report.keys():
        raise ValueError(f"{source} is no report of benchmarks; give a file that --out wrote")
    for row in report["results"]:
        if not isinstance(row, Mapping) or not set(FIELDS) <= row.keys() or row["name"] not in PARTS:
            raise ValueError(f"{source}: {row!r:.60} is no result of a benchmark; make the file anew")
    return report


def _table(rows: Sequence[Mapping[str, Any]], style: str) -> str:
    body = [
        (
            row["name"],
            TARGETS[row["name"]].text if row["name"] in TARGETS else ABSENT,
            _figure(row["value"], row["unit"]) if row["value"] is not None else "not measured",
            _figure(row["baseline"], row["unit"]),
            _figure(row["ratio"], "x"),
            _met(row),
        )
        for row in rows
    ]
    return tabulate(body, headers=COLUMNS, tablefmt=style, disable_numparse=True)


def _settings(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"- **{row['name']}** ({row['device']}"
        + (f", {row['repeats']} repeats" if row["repeats"] > 1 else "")
        + f"): {row['setting']}."
        for row in rows
    )


def _met(row: Mapping[str, Any]) -> str:
    target = TARGETS.get(row["name"])
    if target is None or row["value"] is None:
        return ABSENT
    return "yes" if target.met(row) else "**no**"


def _figure(value: float | None, unit: str) -> str:
    """A figure and its unit."""
    if value is None:
        return ABSENT
    return f"{shown(value)}x" if unit == "x" else f"{shown(value)} {unit}"


def _machine(report: Mapping[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    commit, dash, dirty = (report["commit"] or "unknown").partition("-")
    parts = [
        f"{machine['processor']}, cores: {machine['cores']}, threads: {machine['threads']}",
        f"{machine['memory_gb']} GB",
        machine["gpu"] or "no GPU",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commit {commit[:12]}{dash}{dirty}",
    ]
    return "; ".join(parts)
