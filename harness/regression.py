"""``python -m harness.regression``: a small fixed grid compared with the committed figures of its model.

Rates alone would hide small changes, so the mean margins of log-likelihood, taken from the run's cases,
are compared too. A tolerance is stated per metric; docs/regression.md says what it was chosen from.
"""

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harness.arguments import OneLineParser
from harness.paths import read_lines, write_json

REFERENCES = Path(__file__).parent.parent / "configs" / "regression"
TINY = "tiny-gpt2"
COMMON: dict[str, Any] = {"dataset": "facts", "batch_size": 10, "num_batches": 2, "device": "cpu", "seed": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    TINY: {
        "stats": "self", "limit_stats": 4000, "set": [
            "memit.layers=1,2", "memit.steps=10", "memit.covariance_weight=100",
            "alphaedit.layers=1,2", "alphaedit.steps=10", "alphaedit.ridge=1",
        ],
    },
}  # fmt: skip
OTHERS: dict[str, Any] = {"stats": "self", "limit_stats": 20_000, "set": []}
ROUTE_TOLERANCE = 0.01  # a share of prompts; the encoder's last bits may turn a near tie
MARGIN_TOLERANCE = 0.01  # nats, mean over the prompts of a kind; docs/regression.md has what was seen
RATE_TOLERANCE = 1.0  # records of a slice


@dataclass(frozen=True)
class Figure:
    """One compared figure."""

    value: float
    tolerance: float  # largest absolute difference that is no regression


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all within tolerance, 1 some are off, 2 no reference or wrong arguments."""
    parser = OneLineParser(prog="python -m harness.regression", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--update", action="store_true", help="write the reference anew")
    args = parser.parse_args(argv)
    path = REFERENCES / f"{args.model.replace('/', '--')}.json"
    if not args.update and not path.is_file():
        print(
            f"harness.regression: no reference for model {args.model!r}; make it: "
            f"nox -s regression -- --model {args.model} --update",
            file=sys.stderr,
        )
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = figures(args.model, Path(folder))
    except ValueError as error:
        print(f"harness.regression: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"harness.regression: {error}", file=sys.stderr)
        return 1
    if args.update:
        write_json(path, {key: figure.value for key, figure in found.items()})
        print(f"{len(found)} figures written to {path}")
        return 0
    off = differences(json.loads(path.read_text("utf-8")), found)
    if off:
        print(tabulate(off, headers=("figure", "reference", "now", "tolerance"), floatfmt=".4f"))
        print(f"{len(off)} of {len(found)} figures of {args.model} are off")
        return 1
    print(f"all {len(found)} figures of {args.model} are within their tolerance")
    return 0


def figures(model: str, folder: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Figure]:
    """Run the fixed grid; its figures by name.

    changes: flags that replace those of the fixed grid (the tests break it on purpose). Raises ValueError
    for a model that cannot be had, RuntimeError if a cell failed.
    """
    from harness.run import run_grid
    from harness.spec import resolve

    given = {**COMMON, **SETTINGS.get(model, OTHERS), "model": model, **(changes or {})}
    if model == TINY:
        from harness.tiny_gpt2 import build_tiny_gpt2

        given["model"] = str(folder / TINY)
        build_tiny_gpt2(folder / TINY)
    overrides = given.pop("set")
    out = folder / "run"
    failed = run_grid(resolve(given, overrides), out=out)
    if failed:
        raise RuntimeError(f"{failed} cells of the grid failed; see the lines above")
    return read_figures(out)


def read_figures(out: Path) -> dict[str, Figure]:
    """Every score of a run's records, and the mean margins of its weight sets."""
    found: dict[str, Figure] = {}
    spec = json.loads((out / "run.json").read_text("utf-8"))["spec"]
    for record in read_lines(out / "records.jsonl"):
        batches = spec["num_batches"] if record["slice"] == "overall" else 1
        rate = RATE_TOLERANCE / (batches * spec["batch_size"])
        for score in record["scores"]:
            key = f"{record['editor']} {record['cell']} {record['slice']} {score['metric']}"
            found[key] = Figure(score["value"], ROUTE_TOLERANCE if score["protocol"] == "routing" else rate)
    margins: dict[str, list[float]] = defaultdict(list)
    for row in read_lines(out / "cases.jsonl.gz"):
        margins[f"{row['weights']} {row['kind']} margin"].append(row["nll_true"] - row["nll_new"])
    for key, values in margins.items():
        found[key] = Figure(sum(values) / len(values), MARGIN_TOLERANCE)
    return found


def differences(reference: Mapping[str, float], found: Mapping[str, Figure]) -> list[tuple[Any, ...]]:
    """(figure, reference, now, tolerance) of all that are off or on one side only."""
    off: list[tuple[Any, ...]] = []
    for key in sorted(reference.keys() | found.keys()):
        then, now = reference.get(key), found.get(key)
        if then is None or now is None:
            off.append((key, then, now and now.value, now and now.tolerance))
        elif abs(then - now.value) > now.tolerance + 1e-12:
            off.append((key, then, now.value, now.tolerance))
    return off


if __name__ == "__main__":
    sys.exit(main())
