"""``python -m harness.edit``: write the facts of a file into a model, check each, and take edits back."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.arguments import FLAGS, OneLineParser, add_flags, one_line

if TYPE_CHECKING:
    from harness.served import Manifest
    from harness.spec import RunSpec

# Those that say how a folder is made; on a folder that is there they may only repeat what it was made with.
MAKING = (
    "model", "stats", "limit_stats", "encoder", "negatives", "seed", "dtype", "device",
    "hyperparameters", "set",
)  # fmt: skip
SINGLE = ("merger", "pruning_ratio", "router", "top_k")  # of which a folder has one


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 every fact took, 1 one did not or the work stopped, 2 the arguments are wrong."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s"
    )
    from harness.ablation import quiet_libraries

    quiet_libraries()
    from harness.check import to_markdown
    from harness.edited import update_folder

    try:
        spec, wanted = _asked(args)
        found, said = update_folder(args.out, spec, wanted)
    except ValueError as error:
        print(f"harness.edit: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _stopped("stopped", args.out, 130)
    except (OSError, FloatingPointError, MemoryError) as error:
        logging.getLogger(__name__).info("stopped", exc_info=error)
        return _stopped(f"stopped: {one_line(str(error))}", args.out, 1)
    for line in said:
        print(f"- {one_line(line)}")
    print(f"\n{to_markdown(found)}\n\nFolder: {args.out} (ask it: python -m harness.ask {args.out})")
    return 0 if all(row["took"] for row in found["facts"]) else 1


def _stopped(reason: str, out: Path, status: int) -> int:
    print(f"harness.edit: {reason}; python -m harness.edit --out {out} goes on", file=sys.stderr)
    return status


def _asked(args: argparse.Namespace) -> "tuple[RunSpec, Any]":
    """What the arguments ask for, checked; ValueError in one line if they are wrong."""
    from harness.edited import Batches, Wanted
    from harness.factfile import read_facts
    from harness.paths import checked_name
    from harness.served import MANIFEST, Manifest
    from harness.stats import read_texts

    checked_name("--out", str(args.out))
    there = Manifest.read(args.out) if (args.out / MANIFEST).is_file() else None
    spec = _spec(args, there)
    facts = read_facts(args.facts, Batches(args.out).next_number()) if args.facts else []
    wanted = Wanted(
        facts=facts,
        remove=args.remove or (),
        rollback=args.rollback,
        unrelated=read_texts(args.unrelated) if args.unrelated else None,
        batch_size=spec.batch_size if args.batch_size is None else args.batch_size,
    )
    if wanted.batch_size < 1:
        raise ValueError(f"--batch-size is {wanted.batch_size}; it must be at least 1")
    return spec, wanted


def _spec(args: argparse.Namespace, there: "Manifest | None") -> "RunSpec":
    """The spec of a folder; of one that is there, its own, if nothing else is asked for."""
    from harness.grid import NO_MERGE
    from harness.spec import editor_settings, read_hyperparameters, resolve

    given: dict[str, Any] = {name: getattr(args, name) for name in MAKING if getattr(args, name) is not None}
    given |= {name: (getattr(args, name),) for name in SINGLE if getattr(args, name) is not None}
    if args.editor is not None:
        given["editors"] = (args.editor,)
    overrides, path = given.pop("set", ()), given.pop("hyperparameters", None)
    file = read_hyperparameters(path) if path else None
    if there is None:
        editors = given.setdefault("editors", ("alphaedit",))
        given["cells"] = ("+R",) if editors[0] in NO_MERGE else ("+MM+R",)
        return resolve(
            {**given, "dataset": "facts", "num_batches": 1, "batch_size": args.batch_size}, overrides, file
        )
    spec = there.spec
    if overrides or file:
        rows = file.rows if file else {}
        given["settings"] = editor_settings(
            spec.model, spec.editors, overrides, rows=rows, others=spec.modules
        )
    differ = [
        f"{name}: {getattr(spec, name)!r} there, {value!r} now"
        for name, value in given.items()
        if getattr(spec, name) != value
    ]
    if differ:
        raise ValueError(
            f"folder {str(args.out)!r} was made otherwise ({'; '.join(differ)}); give another --out"
        )
    return spec


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m harness.edit",
        description="Write facts into a model, check each of them, and take them back (docs/editing.md).",
    )
    parser.add_argument("--facts", type=Path, metavar="FILE", help="JSONL or CSV, a fact a line")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="made, or continued")
    parser.add_argument("--editor", metavar="NAME", help="editing method; default: alphaedit")
    parser.add_argument("--remove", nargs="+", metavar="ID", help="take these facts back")
    parser.add_argument("--rollback", type=int, metavar="K", help="take back all batches after K")
    parser.add_argument(
        "--unrelated", metavar="FILE",
        help="JSONL with text: queries for the unedited model; default: prompts of the embedded facts",
    )  # fmt: skip
    add_flags(parser, ("batch_size", *MAKING))
    for name in SINGLE:
        flag = FLAGS[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=flag.kind, metavar=flag.metavar, help=flag.help
        )
    parser.add_argument("--verbose", action="store_true", help="show what the libraries log")
    return parser


if __name__ == "__main__":
    sys.exit(main())
