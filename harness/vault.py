"""``python -m harness.vault list|verify|prune``: the statistics that are kept between runs.

Covariances, AlphaEdit's projectors and the texts sampled for them lie in the cache folder, each file named by
all it depends on: model, tokenizer, parameter, corpus, tokens and precision. docs/statistics.md says what is
checked.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.arguments import OneLineParser, one_line
from harness.paths import cache_folder, read_header

SHOWN = 12  # characters of a digest
DAY = 86400.0
TEXT = re.compile(r"(?P<model>[0-9a-f]{16})(-[0-9a-f]{8})?-[0-9]+-(?P<tokens>[0-9]+)\.jsonl\.gz")
FILES = (
    ("stats", "*.safetensors"), ("stats", ".*.safetensors.*"),
    ("samples", "*.jsonl.gz"), ("samples", ".*.jsonl.gz.*"),
)  # fmt: skip
OTHERS = ("embeddings", "models")  # folders of the cache whose size alone is shown


@dataclass(frozen=True)
class Entry:
    """One file and what its header says; {} if it cannot be read."""

    path: Path
    identity: dict[str, Any]
    said: dict[str, str]

    @property
    def kind(self) -> str:
        if self.path.name.startswith("."):
            return "unfinished"
        if not self.identity:
            return "?"
        if self.path.parent.name == "samples":
            return "text"
        return "projector" if "nullspace_threshold" in self.identity else "covariance"

    @property
    def days(self) -> float:
        """Since it was written."""
        return (time.time() - self.path.stat().st_mtime) / DAY

    def is_of(self, model: str) -> bool:
        """Whether it is of the model whose digest begins so."""
        own = str(self.identity.get("model", ""))
        return bool(own) and own.startswith(model[: len(own)])

    def problem(self) -> str | None:
        """What is wrong with it, in one line; it is read whole."""
        import torch

        from harness.stats import read_kept, read_texts

        if self.kind == "unfinished":  # a write that goes on is younger
            return f"{self.path} was left by a process that was stopped" if self.days > 1 else None
        try:
            if self.path.parent.name == "samples":
                read_texts(str(self.path))
                return None
            tensors, _ = read_kept(self.path)
        except ValueError as error:
            return str(error).partition("; delete it")[0]
        matrix = next(iter(tensors.values()))
        if self.kind == "covariance":
            if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
                return f"statistics file {self.path} is of shape {tuple(matrix.shape)}, not square"
            if not torch.equal(matrix, matrix.T) or matrix.diagonal().min() < 0:
                return f"statistics file {self.path} is no second moment: not symmetric, or below zero"
        return None


def entries() -> Iterator[Entry]:
    """All files, oldest first."""
    paths = {path for folder, pattern in FILES for path in cache_folder(folder).glob(pattern)}
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime, path)):
        yield _entry(path)


def _entry(path: Path) -> Entry:
    if path.parent.name == "samples":
        name = TEXT.fullmatch(path.name)
        said = name.groupdict() if name else {}
        return Entry(path, {"model": said["model"], "corpus": "self"} if said else {}, said)
    try:
        said = read_header(path)
        return Entry(path, dict(json.loads(said["identity"])), said)
    except (ValueError, KeyError, TypeError):
        return Entry(path, {}, {})


def show() -> int:
    """A table of all files."""
    from tabulate import tabulate

    rows = [
        (
            entry.path.stem[:SHOWN],
            entry.kind,
            str(entry.identity.get("model", "?"))[:SHOWN],
            entry.identity.get("parameter", ""),
            entry.identity.get("corpus", "?"),
            str(entry.identity.get("dtype", "")).removeprefix("torch."),
            f"{int(entry.said['tokens']):,}" if entry.said.get("tokens", "").isdigit() else "",
            f"{entry.path.stat().st_size / 1e6:,.1f}",
            f"{entry.days:.0f}",
        )
        for entry in entries()
    ]
    headers = ("file", "kind", "model", "parameter", "corpus", "dtype", "tokens", "MB", "days")
    align = ("left", "left", "left", "left", "left", "left", "right", "right", "right")
    print(tabulate(rows, headers=headers, tablefmt="github", colalign=align if rows else None))
    total = sum(entry.path.stat().st_size for entry in entries())
    print(f"\n{len(rows)} files, {total / 1e6:,.1f} MB in {cache_folder('stats').parent}")
    for name in OTHERS:
        size = sum(path.stat().st_size for path in cache_folder(name).rglob("*") if path.is_file())
        print(f"beside them: {name}, {size / 1e6:,.1f} MB")
    return 0


def verify() -> int:
    """Read every file whole; a line per problem."""
    count = undigested = 0
    problems = []
    for entry in entries():
        count += 1
        undigested += entry.kind in ("covariance", "projector") and "digest" not in entry.said
        problem = entry.problem()
        if problem is not None:
            problems.append(problem)
            print(problem)
    if problems:
        print(f"{len(problems)} of {count} files are broken; harness.vault prune --broken removes them")
        return 1
    older = f"; {undigested} of older versions have no digest of their own" if undigested else ""
    print(f"{count} files verified{older}")
    return 0


def prune(args: argparse.Namespace) -> int:
    """Remove what is selected; ValueError if nothing selects."""
    if not (args.all or args.broken or args.model or args.older_than is not None):
        raise ValueError("prune needs what to remove: --broken, --model DIGEST, --older-than DAYS or --all")
    removed = freed = 0
    for entry in list(entries()):
        if args.model and not entry.is_of(args.model):
            continue
        if args.older_than is not None and entry.days < args.older_than:
            continue
        if args.broken and entry.problem() is None:
            continue
        freed += entry.path.stat().st_size
        removed += 1
        entry.path.unlink()
        what = entry.identity.get("parameter") or entry.identity.get("corpus", "nothing readable")
        print(f"removed {entry.path.name}: {entry.kind} of {what}")
    print(f"{removed} files removed, {freed / 1e6:,.1f} MB")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a file is broken, 2 what was asked for cannot be had."""
    parser = OneLineParser(prog="python -m harness.vault", description="The statistics kept between runs.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="a table of all files")
    actions.add_parser("verify", help="read all of them and check digests and contents; 1 if one is broken")
    pruned = actions.add_parser("prune", help="remove those that all of the given conditions select")
    pruned.add_argument("--broken", action="store_true", help="that verify complains of")
    pruned.add_argument("--model", metavar="DIGEST", help="of this model, by the beginning of its digest")
    pruned.add_argument("--older-than", type=float, metavar="DAYS", help="written so many days ago")
    pruned.add_argument("--all", action="store_true", help="every file")
    args = parser.parse_args(argv)
    try:
        if args.action == "prune":
            return prune(args)
        return verify() if args.action == "verify" else show()
    except (OSError, ValueError) as error:
        print(f"harness.vault: {one_line(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
