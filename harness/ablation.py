"""``python -m harness.ablation``: run the grid and print its table."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.arguments import FLAGS, Flag, OneLineParser, add_flags, one_line

if TYPE_CHECKING:
    from harness.spec import HyperparameterFile, RunSpec

RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run as asked for: of the command line, or of several in a config file."""

    spec: "RunSpec"
    folder: Path
    data: str | None
    hyperparameters: "HyperparameterFile | None"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all cells done, 1 some failed or the disk did, 2 the arguments are wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s"
    )
    quiet_libraries()
    from harness.progress import Display
    from harness.run import run_grid
    from reports.load import load_run
    from reports.render import to_markdown
    from reports.tables import build_report

    display, status = Display(), 0
    try:
        jobs = _jobs(args)
    except ValueError as error:
        return _refused(error)
    if args.plan:
        return _planned(jobs)
    for job in jobs:
        base = job.folder if len(jobs) == 1 else job.folder.parent
        try:
            failed = run_grid(
                job.spec, out=job.folder, data=job.data, hyperparameters=job.hyperparameters,
                fresh=args.fresh, display=display,
            )  # fmt: skip
        except ValueError as error:  # the other runs do not depend on it
            status = _refused(error)
            continue
        except KeyboardInterrupt:
            return _stopped("stopped", base, 130)
        except OSError as error:  # the disk is full, say: the other runs need it too
            logging.getLogger(__name__).info("stopped", exc_info=error)
            return _stopped(f"stopped: {one_line(str(error))}", base, 1)
        print(to_markdown([build_report(load_run(job.folder))]))
        print(f"Run folder: {job.folder}")
        status = max(status, 1 if failed else 0)
    if len(jobs) > 1:
        print(f"All runs: python -m harness.report {' '.join(str(job.folder) for job in jobs)}")
    return status


def _planned(jobs: Sequence[Job]) -> int:
    """Print what each run would need; nothing is made."""
    from harness.plan import plan

    status = 0
    for job in jobs:
        try:
            print(plan(job.spec, data=job.data), end="\n\n" if job is not jobs[-1] else "\n")
        except ValueError as error:
            status = _refused(error)
    return status


def _refused(error: ValueError) -> int:
    print(f"harness.ablation: {one_line(str(error))}", file=sys.stderr)
    return 2


def _stopped(reason: str, base: Path, status: int) -> int:
    print(f"harness.ablation: {reason}; the same command with --out {base} goes on", file=sys.stderr)
    return status


def _jobs(args: argparse.Namespace) -> list[Job]:
    """The runs that the config file and the command line ask for, all of them checked."""
    for name, value in _given(args).items():
        _check_name(name, value)
    for name in ("out", "config"):
        _check_name(name, getattr(args, name))
    if args.resume and not args.out and not args.config:
        raise ValueError("--resume needs the run folder; name it with --out")
    config = _read_config(args.config) if args.config else {}
    runs = config.pop("runs", None) or {"": {}}
    base = args.out or config.get("out")
    jobs = []
    for name, own in runs.items():
        try:
            given = {**config, **own, **_given(args)}
            job = _job(given, [config, own, {"set": args.set}], planned=args.plan)
            if len(runs) > 1:  # else the run itself does it at once
                _check_files(job)
        except ValueError as error:
            where = f"config {args.config!r}, run {name!r}: " if name else ""
            raise ValueError(f"{where}{error}") from None
        if base is None:
            spec = job.spec
            base = _folder(Path(args.config).stem if name else f"{_stem(spec.model)}-{_stem(spec.dataset)}")
        jobs.append(replace(job, folder=Path(base) / name))
    return jobs


def _job(given: dict[str, Any], settings: Sequence[Mapping[str, Any]], *, planned: bool) -> Job:
    """One run from the values that count for it; its folder is not known yet.

    settings: whose ``set`` count, the last ones most. planned: it may name a GPU that is not here.
    """
    from harness.plan import is_present
    from harness.spec import read_hyperparameters, resolve

    overrides = [override for values in settings for override in values.get("set") or ()]
    given.pop("set", None), given.pop("out", None)
    data, path = given.pop("data", None), given.pop("hyperparameters", None)
    file = read_hyperparameters(path) if path else None
    device = given.get("device", "")
    absent = planned and re.fullmatch(r"cuda(:[0-9]{1,4})?", device) and not is_present(device)
    if absent:
        given |= {"device": "cpu", "dtype": given.get("dtype") or "bfloat16"}
    spec = resolve(given, overrides, file)
    if absent:
        spec = replace(spec, device=device)
    return Job(spec=spec, folder=RUNS, data=data, hyperparameters=file)


def _check_files(job: Job) -> None:
    """Raise ValueError for files and sizes that the run would refuse when its turn comes."""
    from harness.data import load_dataset, select
    from harness.generation import load_references
    from harness.spec import CORPORA
    from harness.stats import read_texts

    spec = job.spec
    selection, _ = select(
        load_dataset(spec.dataset, job.data), edits=spec.edits, negatives=spec.negatives, order=spec.select,
        seed=spec.seed,
    )  # fmt: skip
    if spec.stats not in CORPORA:
        read_texts(spec.stats)
    if spec.references is not None:
        load_references(spec.references, selection.cases)


def _check_name(flag: str, value: Any) -> None:
    """Raise ValueError if a text, or one of several, cannot be the name of anything."""
    from harness.paths import checked_name

    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            checked_name(f"--{flag.replace('_', '-')}", text)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.ablation",
        description="Edit a model batch after batch and compare baseline, +MM, +R and +MM+R.",
    )
    add_flags(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="run folder; default: runs/<timestamp>-<model>-<dataset>"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print what the run would need (time, memory, disk), and end"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an existing run folder (the default)")
    again.add_argument("--fresh", action="store_true", help="begin anew in an existing run folder")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with the same names, of one run or several; flags given here win",
    )
    parser.add_argument("--verbose", action="store_true", help="show what the libraries log")
    return parser


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the command line."""
    return {name: value for name in FLAGS if (value := getattr(args, name)) is not None}


def _read_config(path: str) -> dict[str, Any]:
    """A config file's values by flag name; under ``runs``, if it has several: name -> its own values."""
    from harness.paths import checked_name, read_yaml, shown

    values = read_yaml(Path(path), f"config {path!r}")
    if not isinstance(values, Mapping):
        raise ValueError(f"config {path!r} is no mapping of flag names to values; known: {', '.join(FLAGS)}")
    config = _checked_names({name: value for name, value in values.items() if name != "runs"}, path)
    if "runs" in values:
        runs = values["runs"]
        named = isinstance(runs, Mapping) and all(isinstance(own, Mapping) for own in runs.values())
        if not runs or not named:
            raise ValueError(
                f"config {path!r}: runs is {shown(runs)}; it takes a mapping of names to mappings of flags"
            )
        for name in runs:
            if not isinstance(name, str) or not name or Path(name).name != name or name == "..":
                raise ValueError(
                    f"config {path!r}: a run is named {shown(name)}; it takes the name of a folder"
                )
            checked_name(f"config {path!r}: the name of a run", name)
        config["runs"] = {name: _checked_names(own, path) for name, own in runs.items()}
        if any("out" in own for own in config["runs"].values()):
            raise ValueError(f"config {path!r}: out belongs beside runs; each has a folder of its name in it")
    return config


def _checked_names(values: Mapping[Any, Any], path: str) -> dict[str, Any]:
    from harness.paths import shown

    named: dict[str, Any] = {}
    for given, value in values.items():
        name = given.replace("-", "_") if isinstance(given, str) else given
        if name not in FLAGS and name != "out":
            known = ", ".join([*FLAGS, "out", "runs"])
            raise ValueError(f"config {path!r}: unknown name {shown(given)}; known: {known}")
        if name in named:
            raise ValueError(f"config {path!r}: {name} is given twice, with - and with _; leave one")
        named[name] = value
    checked = {name: _checked(name, value, path) for name, value in named.items()}
    return {name: value for name, value in checked.items() if value is not None}


def _checked(name: str, value: Any, path: str) -> Any:
    """A YAML value with the type its flag has on the command line."""
    from harness.paths import checked_name, shown

    if value is None:
        return value
    flag = FLAGS.get(name, Flag("the run folder"))
    if flag.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"config {path!r}: {name} is {shown(value)}; it takes true or false")
        return value
    values = value if isinstance(value, list) else [value]
    if flag.many is False and isinstance(value, list):
        raise ValueError(f"config {path!r}: {name} is {shown(value)}; it takes one value")
    try:
        typed = [
            flag.kind(str(v)) for v in values if isinstance(v, str | int | float) and not isinstance(v, bool)
        ]
    except ValueError:
        typed = []
    if len(typed) != len(values):
        raise ValueError(f"config {path!r}: {name} is {shown(value)}; it takes {flag.kind.__name__} values")
    for text in typed:
        if isinstance(text, str):
            checked_name(f"config {path!r}: {name}", text)
    return typed if flag.many else typed[0]


def _stem(name: str) -> str:
    return Path(name).name.removesuffix(".gz").removesuffix(".jsonl")[:60]


def _folder(name: str) -> Path:
    """A new folder under runs/."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    folder, number = RUNS / f"{stamp}-{name}", 2
    while folder.exists():
        folder, number = RUNS / f"{stamp}-{name}-{number}", number + 1
    return folder


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars off the display."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is first imported; lm-eval offers no switch
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
