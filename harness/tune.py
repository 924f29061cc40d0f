"""``python -m harness.tune``: settings for a model that has none, chosen on records kept apart.

Per editor: the larger models' defaults, then layer sets x learning rates, then strengths (``harness.tuning``
has the search and the rule of choice). Target values depend on the z-layer, the target settings and the
unedited model alone, so they are optimised once for each and serve every strength and every editor.

The records are drawn with the seed, before anything is computed, from those that an ablation with the same
dataset, --select, --seed, --negatives and number of edits uses neither as edits nor as the router's unrelated
texts: that selection is made by the ablation's own function and left out. An ablation with another seed or
size selects anew and may meet some of them; the file names the records, and such an ablation says how many.
"""

import argparse
import logging
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tabulate import tabulate

from harness.ablation import RUNS, quiet_libraries
from harness.arguments import OneLineParser, add_flags
from harness.data import Dataset, EditCase, Selection, load_dataset, select
from harness.folder import provenance
from harness.models import find_model, load_model, model_config
from harness.paths import write_text
from harness.progress import Display
from harness.spec import CORPORA, HyperparameterFile, RunSpec, resolve
from harness.stats import read_texts
from harness.tuning import (
    LEARNING_RATES,
    OF,
    RULE,
    STRENGTHS,
    Grid,
    Setting,
    Trial,
    Tuner,
    best_of,
    choose,
    layer_sets,
    search,
    strength_field,
)
from reports.record import Score

FLAGS = ("model", "editors", "dataset", "data", "select", "negatives", "stats", "limit_stats", "seed",
         "dtype", "device", "set")  # fmt: skip  # as the ablation's
RECORDS = 40
Trials = Mapping[str, Sequence[Trial]]  # by editor, in the order made
Chosen = Mapping[str, Trial | None]  # by editor; None: every setting failed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 settings found for all editors, 1 not for all, 2 the arguments are wrong."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    quiet_libraries()
    try:
        plan = make_plan(args)
        display = Display()
        with display.live():
            found = run_plan(plan, display)
    except ValueError as error:
        print(f"harness.tune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("harness.tune: stopped; nothing was written", file=sys.stderr)
        return 130
    print(table(found))
    if any(found.chosen.values()):
        write_text(plan.out, as_yaml(found))
        spec = plan.spec
        print(f"\nSettings: {plan.out}")
        print(
            f"Use them: nox -s ablation -- --model {spec.model} --dataset {spec.dataset} "
            f"--select {spec.select} --seed {spec.seed} --hyperparameters {plan.out}"
        )
    return 0 if all(found.chosen.values()) else 1


# -- before a model is loaded -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything decided before a model is loaded."""

    spec: RunSpec  # of the ablation the settings are for; its settings hold the fields that are not tried
    source: Any
    dataset: Dataset
    cases: tuple[EditCase, ...]
    batch_size: int
    evaluation_edits: int
    grids: tuple[Grid, ...]
    out: Path

    @property
    def layers(self) -> list[int]:
        """All layers of all layer sets."""
        return sorted({layer for grid in self.grids for layers in grid.layers for layer in layers})


def make_plan(args: argparse.Namespace) -> Plan:
    """Check all that can be checked without the model; ValueError in one line for what is wrong."""
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    overrides = given.pop("set", [])
    editors = given.setdefault("editors", ["memit", "alphaedit"])
    _check(args, editors, overrides)
    spec = resolve(given, overrides, _config_defaults(editors, args.layers))
    dataset = load_dataset(spec.dataset, given.get("data"))
    if dataset.knowedit:
        raise ValueError(
            f"dataset {spec.dataset!r} is in KnowEdit's schema, whose metrics have no Score to choose by; "
            "tune on facts or counterfact"
        )
    edits = args.evaluation_edits or spec.edits
    cases = records_apart(dataset, spec, edits=edits, records=args.records)
    if spec.stats not in CORPORA:
        read_texts(spec.stats)
    source = find_model(spec.model)
    config = model_config(source)
    depth = getattr(config, "num_hidden_layers", None) or config.n_layer
    plan = Plan(
        spec=spec, source=source, dataset=dataset, cases=cases, evaluation_edits=edits,
        batch_size=min(args.batch_size or args.records, args.records),
        grids=tuple(_grid(editor, spec, depth, args) for editor in editors),
        out=Path(args.out) if args.out else RUNS / f"{Path(spec.model).name}.yaml",
    )  # fmt: skip
    if plan.layers[-1] >= depth:
        raise ValueError(f"layers up to {plan.layers[-1]} asked, {spec.model} has blocks 0 to {depth - 1}")
    if plan.out.is_dir() or any(parent.is_file() for parent in plan.out.parents):
        raise ValueError(f"--out {str(plan.out)!r} is no file that can be written; give another one")
    return plan


def _check(args: argparse.Namespace, editors: Sequence[str], overrides: Sequence[str]) -> None:
    """Refuse editors that cannot be tuned, numbers below 1, and settings that are tried anyway."""
    for editor in editors:
        strength_field(editor)
    for name in ("records", "batch_size", "evaluation_edits"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for override in overrides:
        editor, _, field = override.partition("=")[0].partition(".")
        if editor in editors and field in ("layers", "learning_rate", strength_field(editor)):
            raise ValueError(
                f"--set {override!r} is what is tried; use --layers, --learning-rates, --strengths"
            )
    for name, _ in args.strengths or ():
        if name is not None and name not in editors:
            raise ValueError(f"--strengths names {name!r}, which is not in this run: {', '.join(editors)}")


def _config_defaults(editors: Sequence[str], layers: Sequence[tuple[int, ...]] | None) -> HyperparameterFile:
    """Rows that name layers alone: all else is the configs' default, the larger models', preset or not."""
    rows = {editor: {"layers": (layers or layer_sets(editor, OF))[0]} for editor in editors}
    return HyperparameterFile(name="", rows=rows, sources={}, tuning={})


def records_apart(dataset: Dataset, spec: RunSpec, *, edits: int, records: int) -> tuple[EditCase, ...]:
    """Records, drawn with the seed, that an ablation of this spec and so many edits does not use.

    Raises ValueError if there are not enough.
    """
    remedy = "lower --records, or --evaluation-edits and --negatives to what the ablation will use"
    if edits > len(dataset.cases):
        raise ValueError(
            f"{edits} edits are left to the ablation, dataset {dataset.name} has {len(dataset.cases)} usable "
            f"records; {remedy}"
        )
    used, _ = select(dataset, edits=edits, negatives=spec.negatives, order=spec.select, seed=spec.seed)
    taken = {case.case_id for case in (*used.cases, *used.negatives)}
    rest = [case for case in dataset.cases if case.case_id not in taken]
    if records > len(rest):
        raise ValueError(
            f"{records} records asked, dataset {dataset.name} has {len(rest)} beside the {len(taken)} left "
            f"to the ablation; {remedy}"
        )
    return tuple(random.Random(f"tune {spec.seed}").sample(rest, records))


def _grid(editor: str, spec: RunSpec, depth: int, args: argparse.Namespace) -> Grid:
    """What is tried for one editor; the starting row has its config's defaults where the flags leave them."""
    usual, field = spec.settings[editor], strength_field(editor)
    layers = tuple(args.layers or layer_sets(editor, depth))
    rates = tuple(args.learning_rates or LEARNING_RATES)
    given: dict[str | None, tuple[float, ...]] = {}
    for name, values in args.strengths or ():
        given[name] = given.get(name, ()) + values
    strengths = given.get(editor) or given.get(None) or STRENGTHS[field]
    for flag, tried in (("--layers", layers), ("--learning-rates", rates), ("--strengths", strengths)):
        if len(set(tried)) < len(tried):
            raise ValueError(f"{flag} {list(tried)}: name none twice")
    start = Setting(
        editor=editor,
        layers=layers[0],
        learning_rate=usual["learning_rate"] if usual["learning_rate"] in rates else rates[0],
        strength=usual[field] if usual[field] in strengths else strengths[0],
    )
    grid = Grid(
        editor=editor, layers=layers, learning_rates=rates, start=start,
        strengths=tuple(sorted(strengths, reverse=True)),
    )  # fmt: skip
    for setting in (*grid.middle, *grid.along(start)):
        setting.config(usual)
    return grid


# -- with the model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came out."""

    plan: Plan
    tuner: Tuner
    unedited: Mapping[str, Score]
    trials: Trials
    chosen: Chosen


def run_plan(plan: Plan, display: Display) -> Found:
    """Load the model, gather the statistics, try everything, choose."""
    spec = plan.spec
    torch.set_float32_matmul_precision("highest")  # no TF32, as in the ablation
    with display.stage(f"load {spec.model}"):
        loaded = load_model(spec.model, plan.source, dtype=getattr(torch, spec.dtype), device=spec.device)
        tuner = Tuner(spec, loaded, plan.cases, layers=plan.layers, batch_size=plan.batch_size)
    with display.stage("statistics") as stage:
        tuner.gather(stage)
    with display.stage("score unedited") as stage:
        unedited = tuner.unedited(stage)
    trials = {grid.editor: _try_all(grid, tuner, display) for grid in plan.grids}
    chosen = {grid.editor: choose(trials[grid.editor], grid.start) for grid in plan.grids}
    return Found(plan=plan, tuner=tuner, unedited=unedited, trials=trials, chosen=chosen)


def _try_all(grid: Grid, tuner: Tuner, display: Display) -> list[Trial]:
    """The trials of one editor, told one by one."""
    with display.stage(f"tune {grid.editor}", grid.most) as stage:

        def attempt(setting: Setting) -> Trial:
            begun = math.floor(stage.done)

            def tell(what: str, share: float) -> None:
                within = {"target values": 0.9 * share, "scoring": 0.9 + 0.09 * share}.get(what, 0.9)
                stage.update(begun + within, f"layers {_spelled(setting.layers)}, {what}")

            trial = tuner.attempt(setting, tell)
            stage.update(begun + 1)
            display.say(f"  {_described(setting)}: {_outcome(trial)}")
            return trial

        return search(grid, attempt)


# -- what is said of it -------------------------------------------------------------------------------------


def table(found: Found) -> str:
    """All settings tried in percent, what was chosen and why, and the records they were tried on."""
    plan = found.plan
    lines: list[tuple[str, ...]] = [("unedited", "", "", "", *_percent(found.unedited), "")]
    for grid in plan.grids:
        for trial in found.trials[grid.editor]:
            marks = _marks(trial, grid.start, found.chosen[grid.editor])
            lines.append((*_cells(trial), " and ".join(marks)))
    headers = ("Editor", "Layers", "Learning rate", "Strength", "Efficacy", "Generalization", "Locality",
               "Score", "")  # fmt: skip
    fields = ", ".join(f"{strength_field(grid.editor)} of {grid.editor}" for grid in plan.grids)
    said = [
        f"Strength: {fields}. Brackets: 95 % interval over records.",
        f"Chosen: {RULE[0].lower()}{RULE[1:]}",
        *(f"{editor}: {_reason(found, editor)}" for editor in found.chosen),
        *_warnings(found),
        f"Records of {plan.dataset.name}: {' '.join(str(case.case_id) for case in plan.cases)}",
    ]
    shown = tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True)
    return "\n".join([shown, "", *(f"- {line}" for line in said)])


def _warnings(found: Found) -> list[str]:
    """What keeps a choice from meaning much: failures, and edits that do not take."""
    said: list[str] = []
    for editor, trials in found.trials.items():
        failures = [trial.failure for trial in trials if trial.failure is not None]
        said += [f"{editor}: {failures.count(text)} failed: {text}" for text in dict.fromkeys(failures)]
        best = best_of(trials)
        if best and best.value("score") - found.unedited["score"].value <= best.deviation:
            said.append(
                f"{editor}: no Score is above the unedited model's by more than a standard error; the "
                "choice means little. Try smaller strengths, other layers or more records."
            )
    return said


def _reason(found: Found, editor: str) -> str:
    best, chosen = best_of(found.trials[editor]), found.chosen[editor]
    if best is None or chosen is None:
        return "every setting failed."
    return (
        f"best Score {100 * best.value('score'):.1f}, standard error {100 * best.deviation:.1f}; chosen: "
        f"{_described(chosen.setting)}, Score {100 * chosen.value('score'):.1f}."
    )


def _described(setting: Setting) -> str:
    return (
        f"layers {_spelled(setting.layers)}, learning rate {setting.learning_rate:g}, "
        f"{strength_field(setting.editor)} {setting.strength:g}"
    )


def _spelled(layers: Sequence[int]) -> str:
    """4-8; or 4,8 where blocks are left out."""
    if len(layers) > 1 and tuple(layers) == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def _cells(trial: Trial) -> tuple[str, ...]:
    setting = trial.setting
    named = (setting.editor, _spelled(setting.layers), f"{setting.learning_rate:g}", f"{setting.strength:g}")
    if trial.failure is not None:
        return (*named, "", "", "", "failed")
    return (*named, *_percent(trial.scores))


def _outcome(trial: Trial) -> str:
    """One trial's outcome in words."""
    if trial.failure is not None:
        return f"failed: {trial.failure}"
    *rates, overall = _percent(trial.scores)
    return f"{' / '.join(rates)}, Score {overall}"


def _percent(scores: Mapping[str, Score]) -> tuple[str, ...]:
    """Efficacy, generalization, locality, and Score with its interval."""
    low, high = _interval(scores)
    return (
        *(f"{100 * scores[name].value:.1f}" for name in ("efficacy", "generalization", "locality")),
        f"{100 * scores['score'].value:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
    )


def _interval(scores: Mapping[str, Score]) -> tuple[float, float]:
    found = scores["score"]
    assert found.low is not None and found.high is not None
    return found.low, found.high


def _marks(trial: Trial, start: Setting, chosen: Trial | None) -> list[str]:
    is_chosen = chosen is not None and trial.setting == chosen.setting
    return [mark for mark, holds in (("start", trial.setting == start), ("chosen", is_chosen)) if holds]


def as_yaml(found: Found) -> str:
    """The file: one block per editor as --hyperparameters reads it, and how they were found."""
    plan, loaded = found.plan, found.tuner.loaded
    spec = plan.spec
    blocks: dict[str, Any] = {}
    for editor, trial in found.chosen.items():
        if trial is not None:
            fields = vars(trial.setting.config(spec.settings[editor]))
            blocks[editor] = {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}
            blocks[editor]["source"] = (
                f"tuned by harness.tune: {len(plan.cases)} records of {plan.dataset.name}, seed {spec.seed}, "
                f"batches of {plan.batch_size}; {len(found.trials[editor])} settings, "
                f"{_reason(found, editor)} Rule: {RULE[0].lower()}{RULE[1:]}"
            )
    made_of = provenance(spec, plan.dataset, Selection(cases=plan.cases, negatives=()), None)
    blocks["tuning"] = {
        "model": {
            "name": spec.model,
            "revision": loaded.revision,
            "digest": loaded.digest,
            "dtype": spec.dtype,
            "device": spec.device,
        },
        "dataset": made_of["dataset"],
        "case_ids": made_of["case_ids"],
        "batch_size": plan.batch_size,
        "left_to_the_ablation": {
            "select": spec.select,
            "seed": spec.seed,
            "edits": plan.evaluation_edits,
            "negatives": spec.negatives,
        },
        "statistics": {
            "corpus": found.tuner.statistics.corpus.name,
            "digest": found.tuner.statistics.corpus.digest,
            "tokens": found.tuner.statistics.tokens,
        },
        **{name: made_of[name] for name in ("commit", "dirty", "python", "packages", "machine", "threads")},
        "unedited": _values(found.unedited),
        "settings": [
            _tried(trial, grid.start, found.chosen[grid.editor])
            for grid in plan.grids
            for trial in found.trials[grid.editor]
        ],
    }
    head = (
        f"# Settings for {spec.model}, found by `python -m harness.tune`. An ablation takes them with\n"
        "# --hyperparameters FILE; the block `tuning` says how they were found and sets nothing.\n"
    )
    return head + yaml.safe_dump(
        blocks, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


def _tried(trial: Trial, start: Setting, chosen: Trial | None) -> dict[str, Any]:
    """One setting as the file has it; rates to six digits."""
    setting = trial.setting
    row: dict[str, Any] = {
        "editor": setting.editor,
        "layers": list(setting.layers),
        "learning_rate": setting.learning_rate,
        strength_field(setting.editor): setting.strength,
    }
    if trial.failure is not None:
        row["failure"] = trial.failure
    else:
        row |= _values(trial.scores) | {"score_standard_error": round(trial.deviation, 6)}
    if trial.target_probability is not None:
        row["target_probability"] = round(trial.target_probability, 6)
    return row | dict.fromkeys(_marks(trial, start, chosen), True)


def _values(scores: Mapping[str, Score]) -> dict[str, Any]:
    values: dict[str, Any] = {metric: round(found.value, 6) for metric, found in scores.items()}
    return values | {"score_95": [round(bound, 6) for bound in _interval(scores)]}


# -- the command line ---------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.tune",
        description="Find layers, learning rate and covariance weight or ridge for a model without a preset.",
    )
    add_flags(parser, FLAGS)
    values = "; ".join(f"{name} {' '.join(f'{v:g}' for v in found)}" for name, found in STRENGTHS.items())
    rates = " ".join(f"{rate:g}" for rate in LEARNING_RATES)
    many: dict[str, Any] = {"nargs": "+", "default": None}
    for flag, options in {
        "--records": {"type": int, "default": RECORDS, "metavar": "N",
                      "help": "records to try settings on; default: %(default)s"},
        "--batch-size": {"type": int, "metavar": "N",
                         "help": "edits written at once into the unedited model; default: all records"},
        "--evaluation-edits": {"type": int, "metavar": "N",
                               "help": "edits of the ablation to leave records to; default: by model"},
        "--layers": many | {"type": _layer_set, "metavar": "SET",
                            "help": "layer sets, as 4-8 or 4,6,8; default: windows by depth"},
        "--learning-rates": many | {"type": _finite, "metavar": "R",
                                    "help": f"of the target values; default: {rates}"},
        "--strengths": many | {"type": _strengths, "metavar": "[EDITOR=]V,V",
                               "help": f"of one editor or of all; default: {values}"},
        "--out": {"metavar": "FILE", "help": "YAML, written anew; default: runs/MODEL.yaml"},
    }.items():  # fmt: skip
        parser.add_argument(flag, **options)
    return parser


def _layer_set(text: str) -> tuple[int, ...]:
    """4-8 or 4,6,8 as blocks."""
    first, dash, last = text.partition("-")
    try:
        found = tuple(range(int(first), int(last) + 1)) if dash else tuple(map(int, text.split(",")))
    except ValueError:
        found = ()
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no layer set; write 4-8 or 4,6,8")
    return found


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def _strengths(text: str) -> tuple[str | None, tuple[float, ...]]:
    """memit=15000,2000 or 15000,2000 as the editor (None: all) and its values."""
    editor, equals, values = text.rpartition("=")
    return editor if equals else None, tuple(_finite(value) for value in values.split(","))


if __name__ == "__main__":
    sys.exit(main())
