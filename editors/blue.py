"""BLUE (Li et al. 2025, arXiv 2502.03748): only the first and the last critical layer are updated.

Each of the two has target values of its own, optimised at that layer on the model with the lower layer
already changed, and takes its whole residual. The rest is the wrapped editor's (repository xpq-tech/BLUE:
memit/memit_main.py and AlphaEdit/AlphaEdit_main.py).
"""

from dataclasses import dataclass

from editors.alphaedit import AlphaEditConfig, AlphaEditStream
from editors.closed_form import ClosedFormEditor
from editors.memit import MemitConfig, MemitStream
from editors.targets import TargetConfig


def _check_boundary(config: TargetConfig) -> None:
    if len(config.layers) != 2:
        raise ValueError(
            f"layers {list(config.layers)} must be two, the first and the last of the critical ones"
        )


@dataclass(frozen=True, kw_only=True)
class MemitBlueConfig(MemitConfig):
    """MEMIT at the boundary; ``layers`` names the first and the last critical layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_boundary(self)


@dataclass(frozen=True, kw_only=True)
class AlphaEditBlueConfig(AlphaEditConfig):
    """AlphaEdit at the boundary; ``layers`` names the first and the last critical layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_boundary(self)


class MemitBlueStream(MemitStream):
    """MEMIT's solve, own target values a layer."""

    own_targets = True


class AlphaEditBlueStream(AlphaEditStream):
    """AlphaEdit's solve and memory, own target values a layer."""

    own_targets = True


class MemitBlue(ClosedFormEditor):
    """MEMIT with the boundary-layer update."""

    stream = MemitBlueStream


class AlphaEditBlue(ClosedFormEditor):
    """AlphaEdit with the boundary-layer update."""

    stream = AlphaEditBlueStream
