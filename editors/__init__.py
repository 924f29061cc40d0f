"""Editing methods: each a frozen config and a stream of batches on one model."""

from collections.abc import Callable
from typing import Any

from editors.alphaedit import AlphaEdit, AlphaEditConfig
from editors.api import Editor, EditRequest, EditStream, LowRank, WeightDeltas, dense
from editors.memit import Memit, MemitConfig, MemitSeq

EDITORS: dict[str, tuple[type, Callable[[Any], Editor]]] = {  # name -> its config and its class
    "memit": (MemitConfig, Memit),
    "memit-seq": (MemitConfig, MemitSeq),
    "alphaedit": (AlphaEditConfig, AlphaEdit),
}

__all__ = ["EDITORS", "EditRequest", "EditStream", "Editor", "LowRank", "WeightDeltas", "dense"]
