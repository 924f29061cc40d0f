"""lm-eval task definitions; ``TASKS_DIR`` is given to its TaskManager."""

from pathlib import Path

TASKS_DIR = Path(__file__).parent

SIX = ("seqmmr_sst", "seqmmr_mmlu", "seqmmr_mrpc", "seqmmr_cola", "seqmmr_rte", "seqmmr_nli")
"""The general-ability tasks of SeqMMR and its lineage, in the order in which reports show them."""

TASKS = (*SIX, "seqmmr_rte_legacy")
"""All tasks of this package; each has a second definition that generates its answer."""


def generated(task: str) -> str:
    """Name of the definition in which the model writes the answer instead of choosing it."""
    return f"{task}_generated"
