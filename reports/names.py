"""What editors, metrics and tasks are called in tables."""

from __future__ import annotations

from collections.abc import Sequence

EDITOR_NAMES = {
    "none": "",
    "ft": "FT",
    "rome": "ROME",
    "r-rome": "R-ROME",
    "memit": "MEMIT",
    "memit-seq": "MEMIT-seq",
    "memit+blue": "MEMIT-BLUE",
    "pmet": "PMET",
    "rect": "RECT",
    "prune": "PRUNE",
    "emmet": "EMMET",
    "alphaedit": "AlphaEdit",
    "alphaedit+blue": "AlphaEdit-BLUE",
    "ultraedit": "UltraEdit",
}

PAPER_MERGER, PAPER_ROUTER = "self-aware", "topk"
"""What the paper's cells are made with, and those of versions that knew no other."""

COUNTERFACT_COLUMNS = {
    "score": "Score",
    "efficacy": "Efficacy",
    "generalization": "Generalization",
    "locality": "Locality",
    "fluency": "Fluency (bits)",
    "consistency": "Consistency",
}
KNOWEDIT_COLUMNS = {
    "rewrite_acc": "Rewrite",
    "rephrase_acc": "Rephrase",
    "portability_reasoning": "Reasoning",
    "portability_subject_aliasing": "Subject aliasing",
    "portability_logical_generalization": "Logical generalization",
    "relation_specificity": "Relation specificity",
}
OPTIONAL_COLUMNS = ("fluency", "consistency")  # shown where some record has them

ROUTING_COLUMNS = {
    "route_rewrite": "Rewrite",
    "route_paraphrase": "Paraphrase",
    "route_neighborhood": "Neighborhood",
}
KNOWEDIT_ROUTING_COLUMNS = {
    f"route_{name.removesuffix('_acc')}": title for name, title in KNOWEDIT_COLUMNS.items()
}
UNRELATED_ROUTES = ("route_neighborhood", "route_relation_specificity")  # right when not sent

KNOWEDIT_ANY_COLUMNS = {
    f"{name}_any": title for name, title in KNOWEDIT_COLUMNS.items() if name.startswith("portability")
}
COUNTERFACT_VIEWS = {"_argmax": "exact", "_overlap": "overlap"}
KNOWEDIT_VIEWS = {"_exact": "exact"}  # the leading one is the overlap

TASK_NAMES = {
    "seqmmr_sst": "SST",
    "seqmmr_mmlu": "MMLU",
    "seqmmr_mrpc": "MRPC",
    "seqmmr_cola": "CoLA",
    "seqmmr_rte": "RTE",
    "seqmmr_nli": "NLI",
    "seqmmr_rte_legacy": "RTE, inverted labels",
}
TASK_METRICS = {
    "f1_weighted": "weighted F1 of the likelier answer, in percent",
    "f1_generated": "weighted F1 of the generated answer, in percent",
    "gold_margin": "log-probability of the right answer less that of the best other, in nats",
    "agreement": "answers equal to those of the unedited model, in percent",
    "route_task": "records that the router sends to the edited model, in percent",
}

COST_COLUMNS = {
    "edit_seconds": "Edit (s per edit)",
    "inference_seconds": "Inference (s per sample)",
    "memory_gb": "Peak memory (GB)",
}

UNITS = {
    "fluency": (1.0, 2),
    "gold_margin": (1.0, 1),
    "edit_seconds": (1.0, 2),
    "inference_seconds": (1.0, 2),
    "memory_gb": (1.0, 1),
}
"""Metric that is no share -> (what a value is multiplied by, decimals beyond those of shares)."""


def name_of(editor: str) -> str:
    """An editor's name; empty for the unedited model."""
    return EDITOR_NAMES.get(editor, editor)


def weights_name(
    editor: str,
    merger: str | None,
    ratio: float | None,
    mergers: Sequence[str | None],
    ratios: Sequence[float | None],
) -> str:
    """Name of merged weights in a run's cases: EDITOR+MM, and behind it what is not the first of the run.

    merger: None in records of versions that knew one alone. mergers, ratios: of the run, in its order.
    """
    name = f"{editor}+MM"
    if merger is not None and merger not in mergers[:1]:
        name += f"@{merger}"
    return name if ratio is None or ratio in ratios[:1] else f"{name}@{ratio:g}"


def route_name(router: str | None, top_k: int | None, routers: Sequence[str | None]) -> str:
    """Name of a route in a run's cases: K of the first router, ROUTER or ROUTER@K of the others.

    router: None in records of versions that knew one alone. routers: of the run, in its order.
    """
    if router is None or (router in routers[:1] and top_k is not None):
        return str(top_k)
    return router if top_k is None else f"{router}@{top_k}"
