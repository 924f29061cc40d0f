"""Mergers of the same edits, scored and compared in pairs, alone and with routers: the tables of the page."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from harness.capability import Suite, load_suite
from harness.metrics import harmonic_mean, resampling_counts, shown_rows, tabulate_cell, task_values
from reports.figures import CELL_STYLES, RATIO_STYLES, Figure, Panel, Point, Series, batches_figure
from reports.names import EDITOR_NAMES, TASK_NAMES
from routing import Embed
from studies.edits import BASELINE, UNEDITED, Edited, Row, Way, make_edits
from studies.routers import decisions
from tasks import SIX

EDITORS = ("memit", "alphaedit")
CHOSEN_WITH = "memit"  # the editor whose edits of the choosing half the settings are chosen on
BASE, PAPER = Way(BASELINE), Way("self-aware")
SHRUNK = Way.of("shrink", scale=0.8)  # the best shrinkage of the choosing half
BEST = Way("refit")
CONTROLS = tuple(Way(name) for name in ("ema", "ties", "dare", "random", "low-rank", "energy"))
REPORTED = (BASE, PAPER, SHRUNK, *CONTROLS, BEST)
ALSO = {"alphaedit": (Way.of("refit", forgotten=0),)}  # where it is not what `refit` does
TRIED = (
    BASE, PAPER, *(Way.of("shrink", scale=scale) for scale in (0.7, 0.8, 0.85, 0.9)), BEST,
    Way.of("refit", scale=0.9), Way.of("refit", ridge=500),
)  # fmt: skip
COMPARED = (BASE, PAPER, SHRUNK, BEST)  # over all orders; the others over the first one
ROUTERS = ("topk", "subject&relation", "calibrated")
ORACLE = "oracle"
COLUMNS = ("efficacy", "generalization", "locality", "Score")
Array = NDArray[np.float64]
Sent = Sequence[bool]  # of every prompt, whether it goes to the edited model


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Success of every scored edit of one or several runs of the same records."""

    record: NDArray[np.int64]  # (edits,), which record; a run's order of them does not matter
    batch: NDArray[np.int64]  # (edits,), from 1
    success: Array  # (edits, 3), as harness.metrics.Table has it

    @classmethod
    def of(cls, runs: Sequence[Sequence[Row]]) -> "Outcomes":
        """runs: for each its rows under one weight set, as ``cases.jsonl.gz`` has them."""
        records = {
            case_id: i for i, case_id in enumerate(dict.fromkeys(r["case_id"] for rows in runs for r in rows))
        }
        edits = [dict.fromkeys((row["case_id"], row["batch"]) for row in rows) for rows in runs]
        return cls(
            record=np.array([records[case_id] for some in edits for case_id, _ in some]),
            batch=np.array([batch for some in edits for _, batch in some]),
            success=np.concatenate([tabulate_cell(rows).success for rows in runs]),
        )

    def rates(self, counts: Array, batch: int | None = None) -> Array:
        """(resamples, 4) efficacy, generalization, locality and Score, of all or of one batch's edits.

        counts: (resamples, records), how often each record is drawn; all its edits are drawn together.
        """
        some = slice(None) if batch is None else self.batch == batch
        weights = counts[:, self.record[some]]
        with np.errstate(invalid="ignore"):  # a resample may have no record of a batch
            rates = weights @ self.success[some] / weights.sum(axis=1, keepdims=True)
        return np.column_stack([rates, harmonic_mean(rates)])


@dataclass(frozen=True)
class Value:
    """A figure in percent, its difference to another one, and that one's 95 % interval."""

    value: float
    difference: float
    low: float
    high: float

    @property
    def change(self) -> str:
        return f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def compare(
    outcomes: Outcomes, other: Outcomes, *, batch: int | None = None, seed: int = 0
) -> dict[str, Value]:
    """One way to merge beside another on the same edits: paired, records resampled, orders pooled."""
    records = int(outcomes.record.max()) + 1
    once = np.ones((1, records))
    drawn = resampling_counts(records, seed)
    values = outcomes.rates(once, batch)[0]
    differences = values - other.rates(once, batch)[0]
    spread = outcomes.rates(drawn, batch) - other.rates(drawn, batch)
    low, high = np.nanquantile(spread, (0.025, 0.975), axis=0)
    return {
        name: Value(*(float(100 * figure[i]) for figure in (values, differences, low, high)))
        for i, name in enumerate(COLUMNS)
    }


def study(
    halves: Mapping[str, Path], data: str, out: Path, embed: Embed, *, device: str
) -> tuple[dict[str, str], list[Figure]]:
    """The tables of mergers by name, and their figures; edits that ``out`` lacks are made, or gone on with.

    halves: name -> records, "choose" and the orders of those that are reported.
    """
    suite, work = load_suite(SIX, data), out / "work"
    orders = [name for name in halves if name != "choose"]

    def edited(name: str, editor: str) -> Edited:
        order = 0 if name == "choose" else int(name.rpartition("-")[2])
        folder = out / "edits" / f"{name}-{editor}"
        make_edits(halves[name], editor, data, folder, order=order, device=device)
        return Edited(folder, work, data=data)

    chosen_on = [edited("choose", CHOSEN_WITH)]
    parts = {"mergers chosen": merger_table(chosen_on, TRIED, (BASE, SHRUNK))}
    runs = {editor: [edited(name, editor) for name in orders] for editor in EDITORS}
    for editor, own in runs.items():
        every = (*REPORTED, *ALSO.get(editor, ()))
        parts[f"mergers {editor}"] = (
            merger_table(own, COMPARED, (BASE, SHRUNK))
            + "\n\nAll mergers, the first order alone:\n\n"
            + merger_table(own[:1], every, (BASE, SHRUNK))
        )
        parts[f"routed {editor}"] = routed_table(own, [halves[name] for name in orders], embed)
    parts["general tasks"] = task_table(runs[CHOSEN_WITH], suite)
    return parts, [merger_figure(runs)]


def merger_table(runs: Sequence[Edited], ways: Sequence[Way], beside: Sequence[Way]) -> str:
    """Every way to merge over one or several runs of the same records, its Score beside that of others."""
    own = {way: Outcomes.of([run.outcomes(way) for run in runs]) for way in dict.fromkeys((*ways, *beside))}
    rows = []
    for way in ways:
        row = [str(way), *_values(own[way])]
        row += ["" if way == other else compare(own[way], own[other])["Score"].change for other in beside]
        if way != beside[0]:
            batches = np.unique(own[way].batch).tolist()
            found = [compare(own[way], own[beside[0]], batch=batch)["Score"] for batch in batches]
            row += [f"{min(one.difference for one in found):+.1f}", found[-1].change]
        rows.append(row)
    headers = ("merger", *COLUMNS, *(f"Score to {other}" for other in beside), "worst batch", "last batch")
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def routed_table(runs: Sequence[Edited], records: Sequence[Path], embed: Embed) -> str:
    """Routers over the edited and over merged weights; bounds are all-edited and the oracle.

    records: the file of each run's records, whose first are its edits.
    """
    ways = (BASE, PAPER, BEST)
    sent: dict[str, list[Sent]] = {
        router: [
            [found.expert is not None for found in decisions(router, {}, path, run.prompts, embed)]
            for run, path in zip(runs, records, strict=True)
        ]
        for router in ROUTERS
    }
    unedited = [run.outcomes(Way(UNEDITED)) for run in runs]
    sent[ORACLE] = [[row["kind"] != "neighborhood" for row in rows] for rows in unedited]
    sent = {"all edited": [[True] * len(rows) for rows in unedited], **sent}
    rows = []
    for way in ways:
        edited = [run.outcomes(way) for run in runs]
        found = {router: routed(edited, unedited, decided) for router, decided in sent.items()}
        for router, outcomes in found.items():
            beside = compare(outcomes, found["topk"])["Score"]
            rows.append((str(way), router, *_values(outcomes), "" if router == "topk" else beside.change))
    headers = ("merger", "router", *COLUMNS, "Score to topk")
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def routed(
    edited: Sequence[Sequence[Row]], unedited: Sequence[Sequence[Row]], sent: Sequence[Sent]
) -> Outcomes:
    """Outcomes where each prompt is answered by the weights that it is sent to."""
    runs = [
        shown_rows(rows, plain, ["edited" if to_edited else "unedited" for to_edited in decided])
        for rows, plain, decided in zip(edited, unedited, sent, strict=True)
    ]
    return Outcomes.of(runs)


def _values(outcomes: Outcomes) -> list[str]:
    """The four figures in percent."""
    once = np.ones((1, int(outcomes.record.max()) + 1))
    return [f"{100 * value:.1f}" for value in outcomes.rates(once)[0]]


def task_table(runs: Sequence[Edited], suite: Suite) -> str:
    """Weighted F1 on the general tasks, mean over an editor's runs; their mean beside other weights'."""
    ways = (Way(UNEDITED), BASE, BEST)
    found = {way: _f1([run.abilities(way, suite) for run in runs], suite) for way in ways[1:]}
    found[ways[0]] = _f1([runs[0].abilities(ways[0], suite)], suite)  # the same before every run
    rows = []
    for place, way in enumerate(ways):
        value, drawn = found[way]
        row = [str(way), *(f"{100 * one:.1f}" for one in value), f"{100 * value.mean():.1f}"]
        for other, other_drawn in (found[before] for before in ways[:place]):
            spread = (drawn - other_drawn).mean(axis=0)
            low, high = np.quantile(spread, (0.025, 0.975))
            change = (100 * float(x) for x in (value.mean() - other.mean(), low, high))
            row.append(Value(0.0, *change).change)
        rows.append(row)
    headers = ("merger", *(TASK_NAMES[name] for name in suite.names), "mean",
               *(f"mean to {way}" for way in ways[:2]))  # fmt: skip
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def _f1(runs: Sequence[Sequence[Row]], suite: Suite) -> tuple[Array, Array]:
    """Weighted F1 (tasks,) and that of each resample (tasks, resamples), means over the runs.

    All runs are asked the same records, which are drawn together.
    """
    values, drawn = [], []
    for number, name in enumerate(suite.names):
        parts = [[row for row in rows if row["kind"] == f"task:{name}"] for rows in runs]
        counts = resampling_counts(len(parts[0]), number)
        found = [task_values(part, counts)["f1_weighted"] for part in parts]
        values.append(np.mean([value for value, _ in found]))
        drawn.append(np.mean([some for _, some in found], axis=0))
    return np.array(values), np.array(drawn)


def merger_figure(runs: Mapping[str, Sequence[Edited]]) -> Figure:
    """Score of every edit batch at the end, by merger; a panel per editor."""
    panels = []
    styles = (CELL_STYLES["baseline"], CELL_STYLES["+MM"], *RATIO_STYLES[:2])
    for editor, own in runs.items():
        series = []
        for way, style in zip(COMPARED, styles, strict=True):
            outcomes = Outcomes.of([run.outcomes(way) for run in own])
            whole, batches = _score_points(outcomes)
            label = "edited" if way == BASE else str(way)
            series.append(Series(label=label, style=style, points=batches, pooled=whole))
        panels.append(Panel(title=EDITOR_NAMES[editor], series=tuple(series)))
    return batches_figure(
        panels,
        name="mergers",
        title="Score per batch by merger",
        caption="Score of each edit batch and of all batches after the last one, orders pooled. Lines "
        "through the markers on the right: 95 % bootstrap intervals over records.",
        label="Score (%)",
    )


def _score_points(outcomes: Outcomes) -> tuple[Point, tuple[Point, ...]]:
    """Score of all edits with its interval, and of every batch without."""
    records = int(outcomes.record.max()) + 1
    once, drawn = np.ones((1, records)), resampling_counts(records, 0)
    low, high = np.quantile(100 * outcomes.rates(drawn)[:, 3], (0.025, 0.975))
    batches = [100 * float(outcomes.rates(once, b)[0, 3]) for b in np.unique(outcomes.batch).tolist()]
    whole = Point(value=100 * float(outcomes.rates(once)[0, 3]), low=float(low), high=float(high))
    return whole, tuple(Point(value=value) for value in batches)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of some ways to merge what an editor changed in some run folders."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="runs of one editor and the same records")
    parser.add_argument("--work", required=True, type=Path, help="folder for keys and outcomes")
    parser.add_argument("--ways", nargs="+", type=Way.parse, required=True, help="NAME[:FIELD=VALUE,...]")
    parser.add_argument("--beside", nargs="+", type=Way.parse, default=[BASE])
    parser.add_argument("--batches", type=int, help="only the first so many")
    args = parser.parse_args(argv)
    runs = [Edited(folder, args.work, batches=args.batches) for folder in args.folders]
    sys.stdout.write(merger_table(runs, args.ways, args.beside) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
