"""What is timed: one function a part, each giving results beside their baselines, quick ones first."""

from collections.abc import Callable
from functools import partial, wraps

import torch

from benchmarks.measure import Result, not_measured
from benchmarks.parts.answering import routed_forward, router, router_decision, scoring
from benchmarks.parts.editing import covariance, keys, solve, targets
from benchmarks.parts.merging import merge
from benchmarks.parts.whole import grid, memory, memory_of_editing
from benchmarks.subjects import llama3_8b, smollm2

Part = Callable[[int], list[Result]]  # repeats -> one result or several of one name

ON_CPU: dict[str, Part] = {
    "router-decision": partial(router_decision, device="cpu"),
    "solve": lambda n: [r for d_in in (1536, 4096) for r in solve(n, d_in=d_in, n=100, device="cpu")],
    "routed-forward": lambda n: routed_forward(smollm2(), n, rows=16, tokens=32),
    "router": partial(router, device="cpu"),
    "keys": lambda n: keys(smollm2(), n, edits=100, alone=10),
    "memory": lambda n: memory(edits=50, alone=10),
    "merge": partial(merge, device="cpu"),
    "covariance": lambda n: covariance(smollm2(), n, texts=16),
    "scoring": lambda n: scoring(smollm2(), n, records=100, alone=10),
    "grid": partial(grid, device="cpu"),
    "targets": lambda n: targets(smollm2(), n, edits=100, alone=10),
}
ON_GPU: dict[str, Part] = {
    "router-decision": partial(router_decision, device="cuda"),
    "solve": lambda n: solve(n, d_in=14336, n=200, device="cuda"),
    "routed-forward": lambda n: routed_forward(llama3_8b(), n, rows=64, tokens=64),
    "router": partial(router, device="cuda"),
    "keys": lambda n: keys(llama3_8b(), n, edits=200, alone=10),
    "memory": lambda n: memory_of_editing(llama3_8b(), edits=200),
    "merge": partial(merge, device="cuda"),
    "covariance": lambda n: covariance(llama3_8b(), n, texts=128),
    "scoring": lambda n: scoring(llama3_8b(), n, records=100, alone=10),
    "grid": partial(grid, device="cuda"),
    "targets": lambda n: targets(llama3_8b(), n, edits=200, alone=10),
}


def _where_there_is_one(name: str, part: Part) -> Part:
    """The part, where there is a GPU."""

    @wraps(part)
    def measured(repeats: int) -> list[Result]:
        return part(repeats) if torch.cuda.is_available() else [not_measured(name, "no GPU")]

    return measured


PARTS: dict[str, Part] = {
    **ON_CPU,
    **{f"{name}@gpu": _where_there_is_one(f"{name}@gpu", part) for name, part in ON_GPU.items()},
}
