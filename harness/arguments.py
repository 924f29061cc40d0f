"""The flags that describe a run, as INTERFACES names them: one table for command line and config file."""

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Flag:
    """One flag; ``many`` takes several values."""

    help: str
    kind: Callable[[str], Any] = str
    many: bool = False
    metavar: str | None = None


FLAGS: dict[str, Flag] = {
    "model": Flag("preset, hub id (owner/name) or local folder; default: smollm2-135m"),
    "editors": Flag("editing methods; default: memit alphaedit", many=True, metavar="NAME"),
    "cells": Flag("any of baseline +MM +R +MM+R; default: all", many=True, metavar="CELL"),
    "dataset": Flag(
        "facts, counterfact, knowedit-zsre or a JSONL in the schema of one of these; default: by model"
    ),
    "data": Flag(
        "folder or file with local copies of the dataset and the tasks (or SEQMMR_DATA)", metavar="PATH"
    ),
    "select": Flag("first or random records; default: first for counterfact, else random"),
    "stats": Flag("covariance corpus: self, wikipedia or a JSONL with text; default: by model"),
    "limit_stats": Flag("use at most so many tokens of it", kind=int, metavar="N"),
    "batch_size": Flag("edits in a batch; default: by model", kind=int, metavar="N"),
    "num_batches": Flag("batches; default: by model", kind=int, metavar="N"),
    "chain": Flag("shadow or merged: what the next batch edits under merging; default: shadow"),
    "merger": Flag(
        "how changes are merged: self-aware (the paper's), refit, shrink, ema, ties, dare, random, low-rank, "
        "energy; default: self-aware",
        many=True,
        metavar="NAME",
    ),
    "pruning_ratio": Flag(
        "share of a change that is dropped, of mergers that have one; default: 0.85",
        kind=float,
        many=True,
        metavar="R",
    ),
    "router": Flag(
        "how queries are routed: topk (the paper's), calibrated, subject, relation, alias, or several joined "
        "by & and |; default: topk",
        many=True,
        metavar="NAME",
    ),
    "top_k": Flag(
        "nearest texts that decide a route, of routers that have one; default: 2",
        kind=int,
        many=True,
        metavar="K",
    ),
    "encoder": Flag("minilm, openai:MODEL, or a sentence-transformers id or folder; default: minilm"),
    "negatives": Flag(
        "unrelated texts of the router; default: as many as edits, of KnowEdit those of 301 other records",
        kind=int,
        metavar="N",
    ),
    "aliases": Flag("tell the routers the other names of a subject that its record has", kind=bool),
    "probes": Flag("route prompts beyond the scored ones too: aliases, other relations, chat ...", kind=bool),
    "evaluate": Flag("when to score: final (after the last batch) or every-batch; default: final"),
    "capability": Flag(
        "general tasks: six (sst mmlu mrpc cola rte nli), or names of lm-eval tasks; default: none",
        many=True,
        metavar="TASK",
    ),
    "generation": Flag("sample a text for every generation prompt: fluency, consistency", kind=bool),
    "generation_prompts": Flag(
        "sample for at most so many prompts a record; default: all", kind=int, metavar="N"
    ),
    "references": Flag("reference texts of consistency: attribute_snippets.json, or JSONL", metavar="FILE"),
    "seed": Flag("of selection, sampling and intervals; default: 0", kind=int, metavar="N"),
    "dtype": Flag("float32, bfloat16 ...; default: float32 on a CPU, bfloat16 on a GPU"),
    "device": Flag("cpu, cuda, cuda:1 ...; default: cuda if present"),
    "hyperparameters": Flag(
        "YAML with one block per editor; a block replaces the preset's (harness.tune writes such files)",
        metavar="FILE",
    ),
    "set": Flag(
        "override a field of an editor's, merger's or router's config", many=True, metavar="NAME.FIELD=VALUE"
    ),
}


def one_line(text: str) -> str:
    """A complaint as one line, long ones without their middle, nothing in it that a terminal obeys."""
    text = "".join(
        c if c.isprintable() else ascii(c)[1:-1] for c in re.sub(r"\s*[\r\n]\s*", " ", text).strip()
    )
    return text if len(text) <= 2000 else f"{text[:1400]} ... {text[-500:]}"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line; exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; --help lists the flags\n")


def add_flags(parser: argparse.ArgumentParser, names: Iterable[str] = FLAGS) -> None:
    """Add flags of the table, all by default; absent ones are None."""
    for name in names:
        flag = FLAGS[name]
        options: dict[str, Any] = {
            "help": flag.help,
            "type": flag.kind,
            "metavar": flag.metavar,
            "default": None,
        }
        if flag.kind is bool:
            options = {"help": flag.help, "default": None, "action": argparse.BooleanOptionalAction}
        if flag.many:
            options["nargs"] = "+"
        if name == "set":  # given several times, all of them count
            options["action"] = "extend"
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
