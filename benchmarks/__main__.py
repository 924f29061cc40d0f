"""``nox -s bench -- [NAME ...] [--out FILE]``: each part timed beside a faithful slow baseline.

Medians over repeats after a warm-up, both sides in this process. The baselines are those of
``benchmarks/reference/``: one edit, one prompt at a time, full forwards. ``--table FILE ...`` measures
nothing and writes the page of the docs from what was measured before.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.measure import Result, not_measured
from benchmarks.parts import ON_CPU, PARTS
from harness.paths import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
MOST_TEXT = 200  # characters of an error in a report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"any of {', '.join(ON_CPU)}, with @gpu behind it for the GPU alone; default: all",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="write docs/benchmarks.md from such files"
    )
    args = parser.parse_args(argv)
    try:
        if args.table:
            write_page(args.table)
            return 0
        names = chosen(args.names)
        if args.repeats < 1:
            raise ValueError(f"--repeats is {args.repeats}; it must be at least 1")
        if args.out and args.out.is_dir():
            raise ValueError(f"--out {str(args.out)!r} is a folder; give a file")
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made_on = machine()
    results: list[Result] = []
    failed = False
    for name in names:
        found, fine = measured(name, args.repeats)
        results += found
        failed |= not fine
        if args.out:  # after every part, so that nothing is lost
            write_text(
                args.out, json.dumps({**made_on, "results": [r.as_json() for r in results]}, indent=2) + "\n"
            )
    from benchmarks.table import terminal

    print(terminal(results))
    return 1 if failed else 0


def chosen(names: Sequence[str]) -> list[str]:
    """The parts of some names, a name without @gpu standing for both; all parts by default."""
    for name in names:
        if name not in PARTS:
            raise ValueError(f"unknown name {name!r}; known: {', '.join(PARTS)}")
    return [part for part in PARTS if not names or part in names or part.removesuffix("@gpu") in names]


def measured(name: str, repeats: int) -> tuple[list[Result], bool]:
    """The results of one part, and whether it went well; an error costs its own row only."""
    start = time.perf_counter()
    try:
        found, fine = PARTS[name](repeats), True
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST_TEXT]
        found, fine = [not_measured(name, text)], False
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return found, fine


def machine() -> dict[str, Any]:
    """What the figures were made on and with."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": {
            "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
        "commit": commit or None,
    }  # fmt: skip


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def write_page(files: Sequence[Path]) -> None:
    """docs/benchmarks.md from the reports of one machine or several; ValueError for a file that is none."""
    from benchmarks.table import check, page

    reports = []
    for file in files:
        try:
            report = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
        reports.append(check(report, str(file)))
    write_text(PAGE, page(reports))


if __name__ == "__main__":
    sys.exit(main())
