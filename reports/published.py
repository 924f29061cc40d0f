"""The paper's figures, and which of them correspond to a run.

`published.json` holds tables 1 to 9 of the SeqMMR paper as printed. `SeqMMR_X` there
is editor X under +MM+R; table 5 is a short form of table 9.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from reports.load import Run
from reports.record import Record

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
    "FT": ("ft",),
    "PRUNE": ("prune",),
    "PMET": ("pmet",),
    "RECT": ("rect",),
    "MEMIT": ("memit", "memit-seq"),  # the paper does not say which of the two
    "AlphaEdit": ("alphaedit",),
    "Alpha": ("alphaedit",),
}

METRICS = {
    "reasoning_acc": "portability_reasoning",
    "subject_aliasing": "portability_subject_aliasing",
    "logical_generalization": "portability_logical_generalization",
}
"""The paper's column -> our metric, where the names differ."""

UNEDITED_FITS = 0.5  # points; the unedited rows of two copies of one model differ by rounding only


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

    def find(self, record_like: Any, slice_: str, metric: str) -> float | None:
        """The figure for a row of ours; None for a pruning ratio or top-k the paper did not print."""
        ours, paper = record_like, load_published()["router"]
        if "MM" in ours.cell and ours.pruning_ratio not in (None, paper["pruning_ratio"]):
            return None
        if "+R" in ours.cell and ours.top_k not in (None, paper["router_top_k"]):
            return None
        return self.figures.get((ours.editor, ours.cell, slice_, metric))
