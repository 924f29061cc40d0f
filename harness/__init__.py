"""Composes editors, merging and routing into ablation grids, measures them and keeps the results."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.routed import RoutedModel

__all__ = ["load"]


def load(folder: str | Path, *, device: str | None = None) -> "tuple[RoutedModel, PreTrainedTokenizerBase]":
    """The routed model of a folder that ``harness.edit`` wrote, and its tokenizer.

    device: cpu, cuda ...; by default a GPU if there is one. Raises ValueError in one line if the folder
    cannot be read, was changed, or belongs to another model or encoder than those that are here.
    """
    from harness.served import load_served

    served = load_served(folder, device=device)
    return served.routed, served.tokenizer
