"""``python -m harness.ask DIR [PROMPT ...]``: what an edited model answers, which weights did, and why."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from harness.arguments import OneLineParser, one_line

if TYPE_CHECKING:
    from harness.served import Served

MAX_TOKENS = 24


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all answered, 2 the arguments or the folder are wrong."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from harness.ablation import quiet_libraries

    quiet_libraries()
    from harness.served import load_served

    try:
        if args.max_tokens < 1:
            raise ValueError(f"--max-tokens is {args.max_tokens}; it must be at least 1")
        served = load_served(args.folder, device=args.device)
        for prompt in args.prompts or _typed():
            found = answered(served, prompt, route=args.route, max_tokens=args.max_tokens)
            print(json.dumps(found, ensure_ascii=False) if args.json else to_text(found), flush=True)
    except (ValueError, OSError) as error:
        print(f"harness.ask: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def answered(
    served: "Served", prompt: str, *, route: str = "auto", max_tokens: int = MAX_TOKENS
) -> dict[str, Any]:
    """Both greedy answers to one prompt, and the router's decision on it.

    route: which weights answer; "auto" is the router's. Raises ValueError for a prompt without text.
    """
    if not prompt.strip():
        raise ValueError(f"prompt {prompt!r} is empty; ask something")
    routed = served.routed
    decision = routed.route([prompt])[0]
    chosen = ("unedited" if decision.expert is None else "edited") if route == "auto" else route
    answers = {
        version: routed.generate(
            [prompt], route=[version == "edited"], max_new_tokens=max_tokens, do_sample=False
        )[0]
        for version in dict.fromkeys((chosen, "unedited"))
    }
    return {
        "prompt": prompt,
        "route": chosen,
        "score": decision.score,
        "nearest": [
            {"fact": one.fact, "text": one.text} for one in map(served.corpus.__getitem__, decision.nearest)
        ],
        "answer": answers[chosen],
        "unedited_answer": answers["unedited"],
    }


def to_text(found: dict[str, Any]) -> str:
    """One prompt's answers as lines."""
    near = [f"{one_line(one['text'])} ({_of(one['fact'])})" for one in found["nearest"]]
    return "\n".join([
        one_line(found["prompt"]),
        f"  {found['route']} (score {found['score']:.3f}): {one_line(found['answer'])}",
        f"  unedited model: {one_line(found['unedited_answer'])}",
        *(f"  near: {text}" for text in near),
    ])  # fmt: skip


def _of(fact: int | str | None) -> str:
    return "unrelated" if fact is None else f"fact {fact}"


def _typed() -> Iterator[str]:
    """Prompts that are typed, or come through a pipe, a line each; blank lines are passed over."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _parser() -> argparse.ArgumentParser:
    from harness.routed import Route

    parser = OneLineParser(
        prog="python -m harness.ask",
        description="Ask an edited model, and the unedited one beside it; without a prompt, line by line.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="made by harness.edit")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*")
    parser.add_argument("--route", choices=get_args(Route), default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", default=MAX_TOKENS, help="default: %(default)s"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if present")
    return parser


if __name__ == "__main__":
    sys.exit(main())
