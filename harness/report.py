"""`python -m harness.report`: the tables of finished runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.arguments import OneLineParser
from reports.document import build_reports
from reports.load import load_run, newest_run
from reports.render import RENDERERS, write_report

RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write the report of some run folders; 2 when one cannot be read."""
    args = _parse(argv)
    try:
        folders = args.runs or [newest_run(RUNS)]
        reports = build_reports(
            [load_run(folder) for folder in folders],
            paper=args.paper,
            digits=args.digits,
            figures=args.figures,
            cases=args.cases and args.format == "html",
        )
        if args.out is not None:
            write_report(args.out, reports, args.format)
            return 0
        text = RENDERERS[args.format](reports, None)
    except (OSError, ValueError) as error:
        print(f"harness.report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m harness.report",
        description="Tables and figures from run folders: all runs in the paper's layout, then run by run.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", type=Path, help="run folders; default: the newest in runs/"
    )
    parser.add_argument(
        "--format", choices=sorted(RENDERERS), default="markdown", help="default: %(default)s"
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help="file to write; default: the terminal")
    parser.add_argument(
        "--paper", action="store_true", help="say of every published figure whether ours agrees with it"
    )
    parser.add_argument(
        "--digits", type=int, choices=range(5), default=1, help="decimals; default: %(default)s"
    )
    parser.add_argument(
        "--figures",
        action=argparse.BooleanOptionalAction,
        help="with figures, where there is a file or a page to put them; default: if matplotlib is installed",
    )
    parser.add_argument(
        "--no-cases", dest="cases", action="store_false", help="leave the scored prompts out of HTML"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
