"""The grid: which weight sets a spec needs, and which cells are read off which of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from harness.spec import RunSpec, has_ratio, has_top_k
from reports.names import route_name, weights_name

NO_MERGE = ("prune",)  # editors that already restrain their whole change; their +MM cells do not apply


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How an editor's changes are merged."""

    merger: str
    pruning_ratio: float | None = None  # None: of a merger without one

    def __str__(self) -> str:
        return self.merger if self.pruning_ratio is None else f"{self.merger} at {self.pruning_ratio:g}"


@dataclass(frozen=True, kw_only=True)
class Route:
    """How queries are routed."""

    router: str
    top_k: int | None = None  # None: of a router without one

    def __str__(self) -> str:
        return self.router if self.top_k is None else f"{self.router} with k {self.top_k}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of a table: an editor's weights, merged or not, routed or not."""

    name: str  # "baseline", "+MM", "+R", "+MM+R"
    editor: str
    merge: Merge | None = None  # None: unmerged weights
    route: Route | None = None  # None: not routed


def weights_id(spec: RunSpec, editor: str, merge: Merge | None) -> str:
    """Name of a weight set in ``cases.jsonl.gz``."""
    if merge is None:
        return editor
    return weights_name(editor, merge.merger, merge.pruning_ratio, spec.merger, spec.pruning_ratio)


def route_id(spec: RunSpec, route: Route) -> str:
    """Name of a route in ``routes`` of ``cases.jsonl.gz``."""
    return route_name(route.router, route.top_k, spec.router)


def cells_of(spec: RunSpec, editor: str) -> Iterator[Cell]:
    """All cells of one editor in the order of the tables."""
    for name in ("baseline", "+MM", "+R", "+MM+R"):
        if name not in spec.cells:
            continue
        for merge in merges_of(spec) if "MM" in name else (None,):
            for route in routes_of(spec) if "R" in name else (None,):
                yield Cell(name=name, editor=editor, merge=merge, route=route)


def merges_of(spec: RunSpec) -> tuple[Merge, ...]:
    """How weights are merged that some cell needs; none if no cell is merged."""
    if not spec.merges:
        return ()
    return tuple(
        Merge(merger=merger, pruning_ratio=ratio)
        for merger in spec.merger
        for ratio in (spec.pruning_ratio if has_ratio(merger) else (None,))
    )


def routes_of(spec: RunSpec) -> tuple[Route, ...]:
    """How queries are routed in some cell; none if no cell is routed."""
    if not spec.routes:
        return ()
    return tuple(
        Route(router=router, top_k=k)
        for router in spec.router
        for k in (spec.top_k if has_top_k(router) else (None,))
    )


def needs_keys(spec: RunSpec, merge: Merge) -> bool:
    """Whether a merger looks at the keys of the edits."""
    return spec.build_merger(merge.merger, merge.pruning_ratio).needs_keys


def needs_unmerged(spec: RunSpec) -> bool:
    """Whether some cell needs an editor's unmerged weights, or the shadow chain runs through them."""
    return spec.chain == "shadow" or "baseline" in spec.cells or "+R" in spec.cells
