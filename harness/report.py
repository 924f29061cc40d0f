"""`python -m harness.report`: the tables of finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reports.load import load_run, newest_run
from reports.render import RENDERERS, write_text
from reports.tables import build_report

RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the report of some run folders; 2 when one cannot be read."""
    args = _parse(argv)
    try:
        folders = args.runs or [newest_run(RUNS)]
        reports = [build_report(load_run(folder), paper=args.paper, digits=args.digits) for folder in folders]
        text = RENDERERS[args.format](reports)
        if args.out is not None:
            write_text(args.out, text)
    except (OSError, ValueError) as error:
        print(f"harness.report: {error}", file=sys.stderr)
        return 2
    if args.out is None:
        print(text, end="")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m harness.report", description="Tables from run folders.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", type=Path, help="run folders; default: the newest in runs/"
    )
    parser.add_argument(
        "--format", choices=sorted(RENDERERS), default="markdown", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="file to write; default: the terminal")
    parser.add_argument(
        "--paper", action="store_true", help="add the published figures where they correspond"
    )
    parser.add_argument(
        "--digits", type=int, choices=range(5), default=1, help="decimals; default: %(default)s"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
