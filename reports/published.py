"""The figures that the SeqMMR paper prints, under our names, and what must be said beside them.

`published.json` holds tables 1 to 9 as printed. `SeqMMR_X` there is editor X under +MM+R; table 5 is a short
form of table 9 and left out here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from reports.seeds import Pool

MODELS = {
    "llama3-8b": "LLaMA3-8B",
    "llama3-8b-instruct": "LLaMA3-8B",
    "meta-llama-3-8b": "LLaMA3-8B",
    "meta-llama-3-8b-instruct": "LLaMA3-8B",
    "qwen2.5-7b": "Qwen-2.5",
    "qwen2.5-7b-instruct": "Qwen-2.5",
    "gpt-j-6b": "GPT-J",
}
"""Our preset, or the last part of a hub id, in lower case -> the paper's name."""

DATASETS = {"counterfact": "CounterFact", "knowedit-zsre": "KnowEdit-ZsRE"}

EDITORS = {
    "Unedited": ("none",),
    "FT": ("ft",),
    "PRUNE": ("prune",),
    "PMET": ("pmet",),
    "RECT": ("rect",),
    "MEMIT": ("memit", "memit-seq"),  # the paper does not say which of the two
    "AlphaEdit": ("alphaedit",),
    "Alpha": ("alphaedit",),
}

METRICS = {
    "score": "score",
    "efficacy": "efficacy",
    "generalization": "generalization",
    "locality": "locality",
    "fluency": "fluency",
    "consistency": "consistency",
    "rewrite_acc": "rewrite_acc",
    "reasoning_acc": "portability_reasoning",
    "subject_aliasing": "portability_subject_aliasing",
    "logical_generalization": "portability_logical_generalization",
    "relation_specificity": "relation_specificity",
    "editing_request": "route_rewrite",
    "paraphrase_prompt": "route_paraphrase",
    "neighborhood_prompt": "route_neighborhood",  # printed: those not sent to the edited model
    "edit_time_s": "edit_seconds",
    "inference_time_s": "inference_seconds",
    "gpu_memory_gb": "memory_gb",
}
"""The paper's column -> our metric."""

ROUTED_EDITS = 2000  # of table 6
UNEDITED_FITS = 0.5  # points: two runs of one model on the same prompts differ by rounding only


@dataclass(frozen=True, kw_only=True)
class Printed:
    """One printed figure and what it was printed for; None: the table does not say, or it does not matter."""

    table: int
    model: str | None
    dataset: str | None
    batch_size: int | None
    edits: int | None
    row: str  # as printed
    column: str
    editors: tuple[str, ...]  # ours that it may be; none: of the router alone
    cell: str
    slice: str
    metric: str
    value: float
    places: int = 2
    scale: float = 100  # by which ours is multiplied
    pruning_ratio: float | None = None
    top_k: int | None = None


@cache
def read_published() -> dict[str, Any]:
    """`published.json`, as printed in the paper."""
    text = (files("reports") / "published.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


@cache
def printed_figures() -> tuple[Printed, ...]:
    """Every figure of the tables, in the order printed."""
    return (*_methods(), *_routing(), *_costs(), *_modules())


def paper_model(pool: Pool) -> str | None:
    """The paper's name for the model of some runs."""
    return MODELS.get(_last_part(pool.model))


def paper_dataset(pool: Pool) -> str | None:
    """The paper's name for the dataset of some runs."""
    return DATASETS.get(pool.dataset)


def _methods() -> Iterator[Printed]:
    """Tables 1 to 4."""
    for number in (1, 2, 3, 4):
        table = read_published()["tables"][f"table_{number}"]
        for row in table["rows"]:
            model = row.get("model", table["setting"].get("model"))
            setting = table["setting"] | table["setting"].get(model, {}) | row
            size, edits = setting["batch_size"], setting["num_edits"]
            name = row["method"]
            if number == 3:
                name = f"{name}, {edits:,} edits in batches of {size}"
            elif number == 4:
                name = f"{model} {name}"
            editors, cell = _method(row["method"])
            for column, metric in METRICS.items():
                if row.get(column) is not None:
                    yield Printed(
                        table=number,
                        model=model,
                        dataset=setting["dataset"],
                        batch_size=size,
                        edits=edits,
                        row=name,
                        column=column,
                        editors=editors,
                        cell=cell,
                        slice="overall",
                        metric=metric,
                        value=row[column],
                        **_settings(cell),
                    )


def _routing() -> Iterator[Printed]:
    """Table 6."""
    table = read_published()["tables"]["table_6"]
    for row in table["rows"]:
        for column in table["columns"][1:]:
            yield Printed(
                table=6,
                model=None,
                dataset=table["setting"]["dataset"],
                batch_size=None,
                edits=ROUTED_EDITS,
                row=f"top-k {row['top_k']}",
                column=column,
                editors=(),
                cell="+R",
                slice="overall",
                metric=METRICS[column],
                value=row[column],
                top_k=row["top_k"],
            )


def _costs() -> Iterator[Printed]:
    """Table 7."""
    table = read_published()["tables"]["table_7"]
    for row in table["rows"]:
        editors, cell = _method(row["method"])
        for column in table["columns"][1:]:
            yield Printed(
                table=7,
                model=table["setting"]["model"],
                dataset=None,
                batch_size=None,
                edits=None,
                row=row["method"],
                column=column,
                editors=editors,
                cell=cell,
                slice="overall",
                metric=METRICS[column],
                value=row[column],
                places=2 if column == "gpu_memory_gb" else 3,
                scale=1,
                **_settings(cell),
            )


def _modules() -> Iterator[Printed]:
    """Tables 8 and 9."""
    for number in (8, 9):
        table = read_published()["tables"][f"table_{number}"]
        method, setting = table["columns"][1], table["setting"]
        for row in table["rows"]:
            for column in (method, "+MM", "+R", "+MM+R"):
                cell = "baseline" if column == method else column
                yield Printed(
                    table=number,
                    model=setting["model"],
                    dataset=setting["dataset"],
                    batch_size=setting["batch_size"],
                    edits=setting["batch_size"] * setting["num_batches"],
                    row=row["seq"],
                    column=column,
                    editors=EDITORS[method],
                    cell=cell,
                    slice="overall" if row["seq"] == "Overall" else row["seq"].replace("@", "batch:"),
                    metric="score",
                    value=row[column],
                    **_settings(cell),
                )


def _method(name: str) -> tuple[tuple[str, ...], str]:
    if name == "Unedited":
        return EDITORS[name], "unedited"
    editor, merged = name.removeprefix("SeqMMR_"), name.startswith("SeqMMR_")
    return EDITORS[editor], "+MM+R" if merged else "baseline"


def _settings(cell: str) -> dict[str, Any]:
    """The paper's pruning ratio and top-k, where a cell has them."""
    paper = read_published()["router"]
    return {
        "pruning_ratio": paper["pruning_ratio"] if "MM" in cell else None,
        "top_k": paper["router_top_k"] if "+R" in cell else None,
    }


# Notes


def notes_beside(number: int, pool: Pool) -> list[str]:
    """What must be said of runs that stand beside a table of the paper."""
    if number == 6:
        return ["The last column is the share kept on the unedited model.", *_encoder_notes(pool)]
    if number == 7:
        table = read_published()["tables"]["table_7"]
        return [f"The paper's times are from {table['setting']['hardware']}.", *_weights_notes(pool)]
    notes = [*_weights_notes(pool), *(_unedited_notes(pool) if number == 1 else ()), *_encoder_notes(pool)]
    if any(row.chain == "merged" for row in pool.rows):
        notes.append("The paper does not say which chain it merges in; its figures stand beside both.")
    editors = {row.editor for row in pool.rows}
    if number != 8 and editors & set(EDITORS["MEMIT"]):
        notes.append(
            "The paper does not say which sequential variant its MEMIT is; ours are memit and memit-seq."
        )
    if number == 1 and "pmet" in editors:
        notes.append(
            "The Score printed for SeqMMR_PMET, 79.33, is not the harmonic mean of its columns, 79.73."
        )
    if paper_dataset(pool) == "CounterFact" and pool.select not in (None, "first"):
        notes.append(
            f"The paper's records are the first of the dataset; this run selected them by {pool.select!r}."
        )
    return notes


def weights_of(pool: Pool) -> str:
    """Whether some runs have a model's base or its instruct weights."""
    return "the instruct weights" if _last_part(pool.model).endswith("-instruct") else "the base weights"


def _weights_notes(pool: Pool) -> list[str]:
    model, ours = paper_model(pool), weights_of(pool)
    if model == "GPT-J":
        return []
    if (model, paper_dataset(pool)) != ("LLaMA3-8B", "CounterFact"):
        return [f"The paper says {model} without base or instruct; this run has {ours}."]
    return [
        "The paper says LLaMA3-8B, but its unedited row equals that of the AlphaEdit paper, whose code takes "
        "Meta-Llama-3-8B-Instruct and the first 2,000 records: llama3-8b-instruct is the model to compare "
        f"with. This run has {ours}."
    ]


def _unedited_notes(pool: Pool) -> list[str]:
    """Whether our unedited row is the published one, from whatever weights."""
    names = ("efficacy", "generalization", "locality")
    printed = {p.metric: p.value for p in printed_figures() if p.table == 1 and p.cell == "unedited"}
    record = next((row.at("overall") for row in pool.rows if row.is_unedited), None)
    scores = {name: record.score(name) if record is not None else None for name in names}
    ours = {name: 100 * score.value for name, score in scores.items() if score is not None}
    if len(ours) < len(names):
        return []
    distance = max(abs(ours[name] - printed[name]) for name in names)
    verdict = "fits" if distance <= UNEDITED_FITS else "does not fit"
    return [
        f"The published unedited row {verdict} {pool.model}: efficacy / generalization / locality are "
        f"{_listed(ours, names)} here and {_listed(printed, names)} there (largest difference "
        f"{distance:.2f} points; it fits up to {UNEDITED_FITS})."
    ]


def _listed(values: Mapping[str, float], names: Sequence[str]) -> str:
    return " / ".join(f"{values[name]:.2f}" for name in names)


def _encoder_notes(pool: Pool) -> list[str]:
    theirs = read_published()["router"]["embedding_model"].split(" ")[0]
    others = {row.encoder for row in pool.rows if row.encoder is not None and theirs not in row.encoder}
    if not others:
        return []
    return [f"The paper's router encodes with {theirs}, this run's with {', '.join(sorted(others))}."]


def _last_part(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()
