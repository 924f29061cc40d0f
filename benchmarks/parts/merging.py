"""Merging of one matrix: the exact selection, against a sort by the literal score."""

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.measure import Result, agreement, apart, compared, repeated
from merging import MERGERS
from merging.self_aware import top_magnitude_mask

RATIO = 0.85


def merge(repeats: int, *, rows: int = 4096, columns: int = 14336, device: str) -> list[Result]:
    """Task vector, mask and merged weights, from the weights before and after a batch."""
    draw = torch.Generator(device).manual_seed(0)
    before = 0.02 * torch.randn(rows, columns, generator=draw, device=device)
    after = before + 1e-3 * torch.randn(rows, columns, generator=draw, device=device)
    config, kind = MERGERS["self-aware"]
    merger = kind(config(pruning_ratio=RATIO))

    def exact() -> Tensor:
        merged: dict[str, Tensor] = merger.merge({"weight": before}, [{"weight": after - before}])
        return merged["weight"]

    def literal() -> Tensor:
        return reference.merge_literal(before, after - before, ratio=RATIO)

    same = agreement("merged weights", apart(exact(), literal()), 0)
    entries = before.numel()
    kept = int(top_magnitude_mask(after - before, merger.config.kept(entries)).sum())
    if kept != round((1 - RATIO) * entries):
        raise RuntimeError(f"{kept:,} of {entries:,} entries are kept")
    fast = repeated(exact, repeats)
    slow = repeated(literal, repeats)
    setting = (
        f"{rows} x {columns} float32, ratio {RATIO}: exactly {kept:,} of {entries:,} entries kept; baseline: "
        f"softmax of the normalised squares in float64, sorted; {same}"
    )
    return [compared("merge", "s", before.device, fast, slow, setting)]
