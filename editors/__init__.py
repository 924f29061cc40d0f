"""Editing methods: each a frozen config and a stream of batches on one model."""

from collections.abc import Callable
from typing import Any

from editors.alphaedit import AlphaEdit, AlphaEditConfig
from editors.api import Editor, EditRequest, EditStream, LowRank, WeightDeltas, dense
from editors.blue import AlphaEditBlue, AlphaEditBlueConfig, MemitBlue, MemitBlueConfig
from editors.emmet import Emmet, EmmetConfig
from editors.ft import Ft, FtConfig
from editors.memit import Memit, MemitConfig, MemitSeq
from editors.pmet import Pmet, PmetConfig
from editors.prune import Prune, PruneConfig
from editors.rect import Rect, RectConfig
from editors.rome import RobustRome, Rome, RomeConfig
from editors.ultraedit import UltraEdit, UltraEditConfig

EDITORS: dict[str, tuple[type, Callable[[Any], Editor]]] = {  # name -> its config and its class
    "ft": (FtConfig, Ft),
    "rome": (RomeConfig, Rome),
    "r-rome": (RomeConfig, RobustRome),
    "memit": (MemitConfig, Memit),
    "memit-seq": (MemitConfig, MemitSeq),
    "memit+blue": (MemitBlueConfig, MemitBlue),
    "emmet": (EmmetConfig, Emmet),
    "pmet": (PmetConfig, Pmet),
    "rect": (RectConfig, Rect),
    "prune": (PruneConfig, Prune),
    "alphaedit": (AlphaEditConfig, AlphaEdit),
    "alphaedit+blue": (AlphaEditBlueConfig, AlphaEditBlue),
    "ultraedit": (UltraEditConfig, UltraEdit),
}

__all__ = ["EDITORS", "EditRequest", "EditStream", "Editor", "LowRank", "WeightDeltas", "dense"]
