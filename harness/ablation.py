"""``python -m harness.ablation``: run the grid and print its table."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from harness.arguments import FLAGS, Flag, OneLineParser, add_flags

RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all cells done, 1 some failed, 2 the arguments are wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s"
    )
    quiet_libraries()
    from harness.progress import Display
    from harness.run import run_grid
    from harness.spec import read_hyperparameters, resolve
    from reports.load import load_run
    from reports.render import to_markdown
    from reports.tables import build_report

    display = Display()
    folder = Path(args.out) if args.out else None
    try:
        if args.resume and not args.out and not args.config:
            raise ValueError("--resume needs the run folder; name it with --out")
        given = _given(args)
        overrides = [*(given.pop("set", None) or []), *(args.set or [])]
        data, out = given.pop("data", None), given.pop("out", None)
        path = given.pop("hyperparameters", None)
        file = read_hyperparameters(path) if path else None
        spec = resolve(given, overrides, file)
        folder = Path(out) if out else _folder(spec.model, spec.dataset)
        failed = run_grid(
            spec, out=folder, data=data, hyperparameters=file, fresh=args.fresh, display=display
        )
    except ValueError as error:
        print(f"harness.ablation: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"harness.ablation: stopped; the same command with --out {folder} goes on", file=sys.stderr)
        return 130
    print(to_markdown([build_report(load_run(folder))]))
    print(f"Run folder: {folder}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.ablation",
        description="Edit a model batch after batch and compare baseline, +MM, +R and +MM+R.",
    )
    add_flags(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="run folder; default: runs/<timestamp>-<model>-<dataset>"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an existing run folder (the default)")
    again.add_argument("--fresh", action="store_true", help="begin anew in an existing run folder")
    parser.add_argument("--config", metavar="FILE", help="YAML with the same names; flags given here win")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries log")
    return parser


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Values of the config file, then those of the command line."""
    given: dict[str, Any] = {}
    if args.config:
        given = _read_config(args.config)
    names = [*FLAGS, "out"]
    given |= {
        name: getattr(args, name) for name in names if getattr(args, name) is not None and name != "set"
    }
    return given


def _read_config(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {path!r} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"config {path!r} is no mapping of flag names to values")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(values.keys() - FLAGS.keys() - {"out"})
    if unknown:
        raise ValueError(f"config {path!r}: unknown name {unknown[0]!r}; known: {', '.join([*FLAGS, 'out'])}")
    return {name: _checked(name, value, path) for name, value in values.items()}


def _checked(name: str, value: Any, path: str) -> Any:
    """A YAML value with the type its flag has on the command line."""
    if value is None:
        return value
    flag = FLAGS.get(name, Flag("the run folder"))
    if flag.kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"config {path!r}: {name} is {value!r}; it takes true or false")
        return value
    values = value if isinstance(value, list) else [value]
    if flag.many is False and isinstance(value, list):
        raise ValueError(f"config {path!r}: {name} is {value!r}; it takes one value")
    try:
        typed = [
            flag.kind(str(v)) for v in values if isinstance(v, str | int | float) and not isinstance(v, bool)
        ]
    except ValueError:
        typed = []
    if len(typed) != len(values):
        raise ValueError(f"config {path!r}: {name} is {value!r}; it takes {flag.kind.__name__} values")
    return typed if flag.many else typed[0]


def _folder(model: str, dataset: str) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    name = "-".join(Path(part).name.removesuffix(".gz").removesuffix(".jsonl") for part in (model, dataset))
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
