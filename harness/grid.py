"""The grid: which weight sets a spec needs, and which cells are read off which of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from harness.spec import RunSpec

NO_MERGE = ("prune",)  # editors that already restrain their whole change; their +MM cells do not apply


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of a table: an editor's weights, merged or not, routed or not."""

    name: str  # "baseline", "+MM", "+R", "+MM+R"
    editor: str
    pruning_ratio: float | None  # None: unmerged weights
    top_k: int | None  # None: not routed


def weights_id(spec: RunSpec, editor: str, pruning_ratio: float | None) -> str:
    """Name of a weight set in ``cases.jsonl.gz``."""
    if pruning_ratio is None:
        return editor
    mark = "" if pruning_ratio == spec.pruning_ratio[0] else f"@{pruning_ratio:g}"
    return f"{editor}+MM{mark}"


def cells_of(spec: RunSpec, editor: str) -> Iterator[Cell]:
    """All cells of one editor in the order of the tables."""
    for name in ("baseline", "+MM", "+R", "+MM+R"):
        if name not in spec.cells:
            continue
        for ratio in spec.pruning_ratio if "MM" in name else (None,):
            for k in spec.top_k if "R" in name else (None,):
                yield Cell(name=name, editor=editor, pruning_ratio=ratio, top_k=k)


def merge_ratios(spec: RunSpec) -> tuple[float, ...]:
    """The pruning ratios whose merged weights some cell needs."""
    return spec.pruning_ratio if spec.merges else ()


def needs_unmerged(spec: RunSpec) -> bool:
    """Whether some cell needs an editor's unmerged weights, or the shadow chain runs through them."""
    return spec.chain == "shadow" or "baseline" in spec.cells or "+R" in spec.cells
