"""The paper's figures, and which of them correspond to a run.

`published.json` holds tables 1 to 9 of the SeqMMR paper as printed. `SeqMMR_X` there
is editor X under +MM+R; table 5 is a short form of table 9.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from reports.load import Run
from reports.rows import Row

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
}
"""The paper's column -> our metric."""

UNEDITED_FITS = 0.5  # points: two runs of one model on the same prompts differ by rounding only


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One printed figure and what it was printed for."""

    table: int
    model: str
    dataset: str
    batch_size: int
    edits: int
    editor: str  # ours; "none" for the unedited model
    cell: str
    slice: str
    metric: str
    value: float  # percent


@dataclass(frozen=True, kw_only=True)
class Published:
    """The figures that stand beside one run, and notes on how far they correspond."""

    figures: Mapping[tuple[str, str, str, str], float]  # (editor, cell, slice, metric) -> percent
    routing: Mapping[int, tuple[float, float, float]]  # top-k -> percent sent to the edited model
    cost: Mapping[tuple[str, str], tuple[float, float, float]]  # (editor, cell) -> seconds, seconds, GB
    notes: tuple[str, ...]
    routing_notes: tuple[str, ...]
    cost_notes: tuple[str, ...]

    def find(self, row: Row, slice_: str, metric: str) -> float | None:
        """The figure for a row of ours; None for a pruning ratio or top-k that the paper did not print."""
        paper = read_published()["router"]
        if "+MM" in row.cell and row.pruning_ratio not in (None, paper["pruning_ratio"]):
            return None
        if "+R" in row.cell and row.top_k not in (None, paper["router_top_k"]):
            return None
        return self.figures.get((row.editor, row.cell, slice_, metric))


@cache
def read_published() -> dict[str, Any]:
    """`published.json`, as printed in the paper."""
    text = (files("reports") / "published.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def figures() -> Iterator[Figure]:
    """Every figure of tables 1-4, 8 and 9, under our names."""
    tables = read_published()["tables"]
    for number in (1, 2, 3, 4):
        table = tables[f"table_{number}"]
        for row in table["rows"]:
            model = row.get("model", table["setting"].get("model"))
            setting = table["setting"] | table["setting"].get(model, {}) | row
            yield from _method_row(number, model, setting, row)
    for number in (8, 9):
        table = tables[f"table_{number}"]
        method = table["columns"][1]
        for row in table["rows"]:
            for column, cell in ((method, "baseline"), ("+MM", "+MM"), ("+R", "+R"), ("+MM+R", "+MM+R")):
                for editor in EDITORS[method]:
                    yield Figure(
                        table=number,
                        model=table["setting"]["model"],
                        dataset=table["setting"]["dataset"],
                        batch_size=table["setting"]["batch_size"],
                        edits=table["setting"]["batch_size"] * table["setting"]["num_batches"],
                        editor=editor,
                        cell=cell,
                        slice="overall" if row["seq"] == "Overall" else row["seq"].replace("@", "batch:"),
                        metric="score",
                        value=row[column],
                    )


def _method_row(
    number: int, model: str, setting: Mapping[str, Any], row: Mapping[str, Any]
) -> Iterator[Figure]:
    editors, cell = _method(row["method"])
    for column, metric in METRICS.items():
        if row.get(column) is None:
            continue
        for editor in editors:
            yield Figure(
                table=number,
                model=model,
                dataset=setting["dataset"],
                batch_size=setting["batch_size"],
                edits=setting["num_edits"],
                editor=editor,
                cell=cell,
                slice="overall",
                metric=metric,
                value=row[column],
            )


def _method(name: str) -> tuple[tuple[str, ...], str]:
    if name == "Unedited":
        return EDITORS[name], "unedited"
    editor, merged = name.removeprefix("SeqMMR_"), name.startswith("SeqMMR_")
    return EDITORS[editor], "+MM+R" if merged else "baseline"


def published_for(run: Run, rows: tuple[Row, ...]) -> Published:
    """The figures that correspond to a run in model, dataset, batch size and number of edits."""
    model = MODELS.get(_model(run).lower())
    dataset = DATASETS.get(run.records[0].dataset)
    batch_size, edits = run.spec.get("batch_size"), planned_edits(run)
    known = [figure for figure in figures() if (figure.model, figure.dataset) == (model, dataset)]
    matching = [figure for figure in known if (figure.batch_size, figure.edits) == (batch_size, edits)]
    if matching:
        notes = _setting_notes(run, rows, matching)
    elif known:
        settings = dict.fromkeys((f.batch_size, f.edits) for f in known)
        printed = ", ".join(f"{total:,} edits in batches of {size}" for size, total in settings)
        ours = f"{edits:,} in batches of {batch_size if batch_size is not None else 'unknown size'}"
        notes = [
            f"No published figure corresponds: for {model} on {dataset} the paper prints {printed}; "
            f"this run is for {ours}."
        ]
    else:
        notes = [
            f"No published figure corresponds: the paper has none for {run.records[0].model} on "
            f"{run.records[0].dataset}. It prints LLaMA3-8B, Qwen-2.5 (7B) and GPT-J (6B) on CounterFact, "
            "and LLaMA3-8B on KnowEdit-ZsRE."
        ]
    routing, routing_notes = _routing(run, rows, dataset, edits)
    cost, cost_notes = _cost(model)
    return Published(
        # The printed pooled Score of tables 1 and 8 or 9 is the same figure.
        figures={(f.editor, f.cell, f.slice, f.metric): f.value for f in matching},
        routing=routing,
        cost=cost,
        notes=tuple(notes),
        routing_notes=tuple(routing_notes),
        cost_notes=tuple(cost_notes),
    )


def planned_edits(run: Run) -> int:
    """The edits of the whole run, as the spec says; without a spec those applied."""
    batch_size, batches = run.spec.get("batch_size"), run.spec.get("num_batches")
    if isinstance(batch_size, int) and isinstance(batches, int):
        return batch_size * batches
    return max(record.edits_applied for record in run.records)


def _model(run: Run) -> str:
    return run.records[0].model.rstrip("/").rpartition("/")[2]


def _setting_notes(run: Run, rows: tuple[Row, ...], matching: list[Figure]) -> list[str]:
    first = matching[0]
    tables = ", ".join(str(number) for number in sorted({figure.table for figure in matching}))
    notes = [
        f"Published figures: SeqMMR paper, table{'s' if ',' in tables else ''} {tables} ({first.model}, "
        f"{first.dataset}, {first.edits:,} edits in batches of {first.batch_size}); its SeqMMR_X is editor X "
        "under +MM+R. They stand at two decimals, as printed."
    ]
    applied = max(record.edits_applied for record in run.records)
    if applied != first.edits:
        notes.append(f"This run has applied {applied:,} edits, the paper {first.edits:,}.")
    notes += _weights_notes(run, rows, first)
    paper = read_published()["router"]
    ratios = {row.pruning_ratio for row in rows if row.pruning_ratio is not None}
    top_ks = {row.top_k for row in rows if row.top_k is not None}
    if ratios - {paper["pruning_ratio"]} or top_ks - {paper["router_top_k"]}:
        notes.append(
            f"The paper's cells use pruning ratio {paper['pruning_ratio']} and top-k "
            f"{paper['router_top_k']}; rows with others have no published figure."
        )
    notes += _encoder_notes(rows)
    if any(row.chain == "merged" for row in rows):
        notes.append("The paper does not say which chain it merges in; its figures stand beside both.")
    editors = {row.editor for row in rows}
    if editors & set(EDITORS["MEMIT"]):
        notes.append(
            "The paper does not say which sequential variant its MEMIT is; ours are memit and memit-seq."
        )
    if "pmet" in editors and first.dataset == "CounterFact" and 1 in {figure.table for figure in matching}:
        notes.append(
            "The Score printed for SeqMMR_PMET, 79.33, is not the harmonic mean of its columns, 79.73."
        )
    select = run.spec.get("select")
    if first.dataset == "CounterFact" and select not in (None, "first"):
        notes.append(
            f"The paper's records are the first of the dataset; this run selected them by {select!r}."
        )
    return notes


def _weights_notes(run: Run, rows: tuple[Row, ...], first: Figure) -> list[str]:
    instruct = _model(run).lower().endswith("-instruct")
    ours = "the instruct weights" if instruct else "the base weights"
    if (first.model, first.dataset) != ("LLaMA3-8B", "CounterFact"):
        return [f"The paper says {first.model} without base or instruct; this run has {ours}."]
    notes = [
        "The paper says LLaMA3-8B, but its unedited row equals that of the AlphaEdit paper, whose code takes "
        "Meta-Llama-3-8B-Instruct and the first 2,000 records: llama3-8b-instruct is the model to compare "
        f"with. This run has {ours}."
    ]
    return notes + _unedited_note(run, rows)


def _unedited_note(run: Run, rows: tuple[Row, ...]) -> list[str]:
    """Whether our unedited row is the published one; it is printed for the first 2,000 records only."""
    record = next((row.at("overall") for row in rows if row.is_unedited), None)
    printed = {f.metric: f.value for f in figures() if f.table == 1 and f.cell == "unedited"}
    names = ("efficacy", "generalization", "locality")
    scores = {name: record.score(name) if record is not None else None for name in names}
    ours = {name: 100 * score.value for name, score in scores.items() if score is not None}
    if len(ours) < len(names) or planned_edits(run) != 2000:
        return []
    distance = max(abs(ours[name] - printed[name]) for name in names)
    verdict = "fits" if distance <= UNEDITED_FITS else "does not fit"
    listed = " / ".join(f"{ours[name]:.2f}" for name in names)
    theirs = " / ".join(f"{printed[name]:.2f}" for name in names)
    return [
        f"The published unedited row {verdict} {run.records[0].model}: efficacy / generalization / locality "
        f"are {listed} here and {theirs} there (largest difference {distance:.2f} points; it fits up to "
        f"{UNEDITED_FITS})."
    ]


def _encoder_notes(rows: tuple[Row, ...]) -> list[str]:
    theirs = read_published()["router"]["embedding_model"].split(" ")[0]
    others = sorted({row.encoder for row in rows if row.encoder is not None and theirs not in row.encoder})
    return (
        [f"The paper's router encodes with {theirs}, this run's with {', '.join(others)}."] if others else []
    )


def _routing(
    run: Run, rows: tuple[Row, ...], dataset: str | None, edits: int
) -> tuple[dict[int, tuple[float, float, float]], list[str]]:
    if dataset != "CounterFact" or edits != 2000:
        return {}, [
            "No published figure corresponds: table 6 of the paper is for CounterFact and 2,000 edits."
        ]
    table = read_published()["tables"]["table_6"]
    shares = {
        row["top_k"]: (row["editing_request"], row["paraphrase_prompt"], 100 - row["neighborhood_prompt"])
        for row in table["rows"]
    }
    note = (
        "Published figures: SeqMMR paper, table 6, whose last column (neighborhood prompts sent to the "
        "unedited model) stands here as its complement."
    )
    return shares, [note, *_encoder_notes(rows)]


def _cost(model: str | None) -> tuple[dict[tuple[str, str], tuple[float, float, float]], list[str]]:
    if model != "LLaMA3-8B":
        return {}, ["No published figure corresponds: table 7 of the paper is for LLaMA3-8B."]
    table = read_published()["tables"]["table_7"]
    cost = {}
    for row in table["rows"]:
        editors, cell = _method(row["method"])
        for editor in editors:
            cost[editor, cell] = (row["edit_time_s"], row["inference_time_s"], row["gpu_memory_gb"])
    return cost, [f"Published figures: SeqMMR paper, table 7, on {table['setting']['hardware']}."]
