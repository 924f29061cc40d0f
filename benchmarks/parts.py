"""What is timed: one function a part, each giving results beside their baselines."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import reference
from editors import EditRequest
from editors.contexts import sample_contexts
from editors.targets import TargetConfig, optimise_targets
from harness import onednn
from harness.data import load_dataset, select
from harness.models import LoadedModel, find_model, load_model
from harness.spec import editor_settings

BASELINE_EDITS = 10
EDITS = 100


@dataclass(frozen=True, kw_only=True)
class Result:
    """Medians of one part, in ``unit``; ratio = baseline / value."""

    name: str
    value: float
    unit: str
    baseline: float | None
    repeats: int
    device: str
    setting: str

    @property
    def ratio(self) -> float | None:
        return None if self.baseline is None else self.baseline / self.value

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def smollm2(*, packed: bool) -> LoadedModel:
    """The default model; packed as the harness runs it, or as transformers gives it."""
    loaded = load_model("smollm2-135m", find_model("smollm2-135m"), dtype=torch.float32, device="cpu")
    if packed and onednn.available():
        onednn.pack_linears(loaded.model, leave=set())
    return loaded


def edit_requests(count: int) -> list[EditRequest]:
    """Real CounterFact edits where a local copy is at hand, else the embedded facts."""
    import os

    name = "counterfact" if os.environ.get("SEQMMR_DATA") else "facts"
    dataset = load_dataset(name, None)
    selection, _ = select(dataset, edits=count, negatives=1, order="random", seed=0)
    return [case.request for case in selection.cases]


def spread(requests: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """Some requests, evenly over the order of prompt length."""
    ordered = sorted(requests, key=lambda r: len(r.prompt) + len(r.subject))
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]


def targets(repeats: int) -> list[Result]:
    """Target values of 100 edits together, against one edit after the other with full forwards."""
    fast, plain = smollm2(packed=True), smollm2(packed=False)
    config = TargetConfig(**{
        name: value for name, value in editor_settings("smollm2-135m", ["memit"])["memit"].items()
        if name in TargetConfig.__dataclass_fields__
    })  # fmt: skip
    requests = edit_requests(EDITS)
    contexts = sample_contexts(plain.model, plain.tokenizer, seed=0)
    groups = [list(group) for group in contexts.groups]

    def slow(request: EditRequest) -> object:
        return reference.target_value(
            plain.model, plain.tokenizer, request, groups, layer=config.layers[-1], steps=config.steps,
            lr=config.learning_rate, clamp=config.clamp_norm_factor, kl=config.kl_factor,
            decay=config.weight_decay,
        )  # fmt: skip

    one = spread(requests, BASELINE_EDITS)
    optimise_targets(fast.model, fast.tokenizer, requests[:5], contexts, config)
    slow(one[0])
    baseline = [seconds(lambda request=request: slow(request)) for request in one]
    values = [
        seconds(lambda: optimise_targets(fast.model, fast.tokenizer, requests, contexts, config)) / EDITS
        for _ in range(repeats)
    ]
    threads = torch.get_num_threads()
    setting = (
        f"smollm2-135m float32, {EDITS} edits, {config.steps} steps, {threads} threads; baseline: median of "
        f"{BASELINE_EDITS} edits one by one as loaded, {min(baseline):.1f} to {max(baseline):.1f} s"
    )
    value, slow_value = statistics.median(values), statistics.median(baseline)
    return [
        Result(
            name="targets", value=value, unit="s/edit", baseline=slow_value, repeats=repeats, device="cpu",
            setting=setting,
        )
    ]  # fmt: skip


PARTS: dict[str, Callable[[int], list[Result]]] = {"targets": targets}
