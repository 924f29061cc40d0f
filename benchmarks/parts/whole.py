"""A whole grid beside one cell of it, and the memory that editing takes."""

import gc
import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Result, compared, each, peak_bytes
from benchmarks.subjects import Subject, random_covariance
from editors.memit import Memit
from editors.targets import Passes, optimise_targets
from harness.paths import cache_folder, read_lines
from harness.progress import Display
from harness.run import run_grid
from harness.spec import CELLS, resolve

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "model": "smollm2-135m", "editors": ["memit"], "dataset": "facts", "batch_size": 10, "num_batches": 2,
}  # fmt: skip
MIB = 2**20
BUDGET = 22e9  # bytes of GPU memory in which an 8B model is to be edited


def grid(
    repeats: int, *, device: str, given: Mapping[str, Any] = SMALL, overrides: Sequence[str] = ()
) -> list[Result]:
    """All four cells of one editor, against a run of the baseline cell alone."""

    def once(out: Path, cells: Sequence[str]) -> None:
        spec = resolve({**given, "device": device, "cells": list(cells)}, overrides)
        with _no_embeddings_kept():
            failed = run_grid(spec, out=out, display=Display(io.StringIO()))
        if failed:
            raise RuntimeError(f"{failed} cells of the grid failed")

    fast: list[float] = []
    slow: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        once(folder / "warm-up", CELLS)  # leaves the statistics in the cache
        for turn in range(repeats):  # in turn, so that both meet the same machine
            slow += each(lambda out: once(out, CELLS[:1]), [folder / f"one-{turn}"])[0]
            fast += each(lambda out: once(out, CELLS), [folder / f"four-{turn}"])[0]
        one, four = (_baseline_scores(folder / f"{which}-0") for which in ("one", "four"))
    if one != four and device == "cpu":  # sums on a GPU have no fixed order
        raise RuntimeError("the baseline cell's records are not the same in both runs")
    times = statistics.median(fast) / statistics.median(slow)
    spec = resolve({**given, "device": device}, overrides)
    setting = (
        f"{Path(spec.model).name} {spec.dtype}, {spec.editors[0]}, {spec.edits} edits of "
        f"{Path(spec.dataset).stem} in batches of {spec.batch_size}, statistics from the cache, embeddings "
        f"anew; baseline: the baseline cell alone; four cells take {times:.2f} times as long, its records "
        f"are equal {'in both' if one == four else 'but for rounding'}"
    )
    return [compared("grid", "s", torch.device(device), fast, slow, setting)]


def _baseline_scores(run: Path) -> list[Any]:
    records = read_lines(run / "records.jsonl")
    return [(record["slice"], record["scores"]) for record in records if record["cell"] == "baseline"]


@contextmanager
def _no_embeddings_kept() -> Iterator[None]:
    """The user's cache, but for the embeddings."""
    before = os.environ.get("SEQMMR_CACHE")
    with tempfile.TemporaryDirectory() as name:
        for kind in ("models", "samples", "stats"):
            Path(name, kind).symlink_to(cache_folder(kind), target_is_directory=True)
        os.environ["SEQMMR_CACHE"] = name
        try:
            yield
        finally:
            if before is None:
                del os.environ["SEQMMR_CACHE"]
            else:
                os.environ["SEQMMR_CACHE"] = before


def memory(
    *, edits: int, alone: int, steps: int = 3, model: str = "smollm2-135m", overrides: Sequence[str] = ()
) -> list[Result]:
    """Peak memory of a process that loads the model and edits one batch, against the one-by-one loop's."""
    harness, loop = (
        _peak(side, "--model", model, "--edits", count, "--steps", steps, "--set", *overrides) / MIB
        for side, count in (("harness", edits), ("reference", alone))
    )
    setting = (
        f"{Path(model).name} float32, MEMIT, one batch of {edits} edits, {steps} steps of each optimisation "
        f"(more take no more memory), the whole process; baseline: the loop on {alone} edits, of which it "
        "holds one at a time; one run of either"
    )
    return [compared("memory", "MiB", torch.device("cpu"), [harness], [loop], setting)]


def _peak(*arguments: object) -> int:
    command = [sys.executable, "-m", "benchmarks.edit_once", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout.split()[-1])


def memory_of_editing(subject: Subject, *, edits: int, budget: float = BUDGET) -> list[Result]:
    """Peak memory of writing one batch into a model that is loaded, on a GPU with so many bytes."""
    config, model = subject.config, subject.fast
    moment = random_covariance(model.config.intermediate_size)
    gpu = subject.device.type == "cuda"
    with _at_most(budget, subject.device):
        held = torch.cuda.memory_allocated() if gpu else 0
        passes = Passes.fitting(model, int(budget) - held)
        source: Any = partial(optimise_targets, passes=passes)
        stream = Memit(config).start(
            model, subject.tokenizer, covariance=lambda layer: moment, seed=0, targets=source
        )
        stream.contexts = subject.contexts
        stream.edit(subject.requests(edits))
        peak = torch.cuda.max_memory_allocated() if gpu else peak_bytes()
    setting = (
        f"{subject.name}, MEMIT, one batch of {edits} edits of {subject.data}, {config.steps} steps, "
        f"{len(config.layers)} matrices edited in float32, statistics on the host; {held / 1e9:.1f} GB "
        f"before editing; passes of {passes.step_tokens:,} tokens and pools of {passes.pool} edits, as for a "
        f"GPU with {budget / 1e9:.0f} GB, to which PyTorch is held; one run; the paper: 38.5 to 40.9 GB"
    )
    return [compared("memory", "GB", subject.device, [peak / 1e9], [], setting)]


@contextmanager
def _at_most(budget: float, device: torch.device) -> Iterator[None]:
    """Let PyTorch take so many bytes of a GPU's memory, and count its peak anew."""
    gc.collect()
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
