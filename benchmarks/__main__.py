"""``nox -s bench -- [NAME ...] [--out FILE]``: each part timed beside a faithful slow baseline.

Medians over repeats after a warm-up, both sides in this process. The baselines are those of
``benchmarks/reference/``: one edit, one prompt at a time, full forwards.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.parts import PARTS, Result

ROOT = Path(__file__).parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(PARTS)}; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in PARTS]
    if unknown:
        print(f"benchmarks: unknown name {unknown[0]!r}; known: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    results: list[Result] = []
    for name in args.names or PARTS:
        results += PARTS[name](args.repeats)
        print(f"{name}: done", file=sys.stderr)
    rows = [(r.name, r.value, r.baseline, r.ratio, r.unit, r.repeats, r.device, r.setting) for r in results]
    headers = ("name", "value", "baseline", "ratio", "unit", "repeats", "device", "setting")
    print(tabulate(rows, headers=headers, floatfmt=".3g", tablefmt="github"))
    if args.out:
        args.out.write_text(json.dumps(report(results), indent=2) + "\n", encoding="utf-8")
    return 0


def report(results: Sequence[Result]) -> dict[str, Any]:
    """The results with machine, versions and commit."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "machine": {
            "processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "commit": commit or None,
        "results": [result.as_json() for result in results],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
