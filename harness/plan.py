"""What a run will need, before it, from the model's config alone; and after it, beside what it took.

``harness.budget`` does the arithmetic; here is what it is about: the model's sizes, counted on a copy without
weights, the lengths of the texts, and the speed of this machine.
"""

import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from editors.sites import sites_for
from editors.targets import Passes
from harness import onednn, scoring, stats
from harness.budget import Budget, Fact, Machine, Need, Rates, Shape, Work, predict
from harness.data import EditCase, KnowEditCase, Selection, load_dataset, select
from harness.folder import RunFolder
from harness.grid import merges_of, weights_id
from harness.models import MODELS, LoadedModel, find_model, model_config
from harness.run import OWN_TOKENS, TOKENS_PER_WIDTH, WEIGHT_VERSIONS, WORKING_BYTES
from harness.spec import RunSpec

if TYPE_CHECKING:
    from harness.capability import Suite

FACTOR = 2  # within which times were right on a machine that did nothing else; docs/plan.md
ARTICLE_TOKENS = 700  # of a Wikipedia article: 20 GB of text in 6.4 million articles

COUNTED_TEXTS = 1000  # of a corpus; the others are taken to be like them

Count = Callable[[Sequence[str]], list[int]]  # texts -> how many tokens each has


# -- the model ----------------------------------------------------------------------------------------------


def empty_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a config without weights: its parameters have shapes only."""
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = make(config, dtype=dtype)
    return model


def shape_of(model: PreTrainedModel, spec: RunSpec) -> Shape:
    """A model's sizes, with or without its weights; ValueError if an editor's layers are not in it."""
    sites, config = sites_for(model), model.config
    blocks = sites.blocks(model)
    edited: dict[str, dict[str, tuple[int, int]]] = {}
    for name in spec.editors:
        editor = spec.editor(name)
        try:
            sites.check_layers(model, editor.config.layers)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        edited[name] = {}
        for parameter in editor.parameters(sites):
            size = tuple(model.get_parameter(parameter).shape)
            d_out, d_in = size if len(size) == 2 else (*size, 1)
            flipped = sites.transposed and len(size) == 2
            edited[name][parameter] = (d_in, d_out) if flipped else (d_out, d_in)
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=len(blocks),
        block=sum(p.numel() for p in blocks.parameters() if p.dim() > 1) // len(blocks),
        inner=model.get_parameter(sites.weight_name(0)).numel() // width,
        width=width,
        heads=heads * head_width,
        cache=2 * head_width * (getattr(config, "num_key_value_heads", None) or heads),
        vocabulary=config.vocab_size,
        context=stats.context_length(model),
        edited=edited,
    )


# -- its texts ----------------------------------------------------------------------------------------------


def counter(tokenizer: PreTrainedTokenizerBase | None) -> Count:
    """How many tokens texts have; without a tokenizer, one for four characters begun."""
    if tokenizer is None:
        return lambda texts: [-(-len(text) // 4) for text in texts]
    return lambda texts: [len(ids) for ids in tokenizer(list(texts))["input_ids"]] if texts else []


def work_of(
    spec: RunSpec,
    selection: Selection,
    tokenizer: PreTrainedTokenizerBase | None,
    shape: Shape,
    suite: "Suite | None" = None,
) -> Work:
    """The texts of a run, counted; without a tokenizer, estimated."""
    count = counter(tokenizer)
    cases = selection.cases
    queries = [query for case in cases for query in _queries(case)]
    prompts = sorted({prompt for prompt, _ in queries})
    lengths = dict(zip(prompts, count(prompts), strict=True))
    targets = _target_tokens({answer for _, some in queries for answer in some}, count)
    scored: dict[int, list[tuple[int, ...]]] = {}  # prompt length -> tokens of the answers of each prompt
    for prompt, some in dict.fromkeys(queries):
        scored.setdefault(lengths[prompt], []).append(tuple(targets[answer] for answer in some))
    texts = sum(len(case.generation_prompts[: spec.generation_prompts]) for case in cases)
    tasks = count(list(_task_texts(suite))) if suite else []
    corpus, sampled = _corpus_tokens(spec, count, shape)
    return Work(
        facts=tuple(_facts(cases, count)),
        prompts=len(queries),
        prompt_tokens=sum(length * len(rows) + _padded(rows) for length, rows in scored.items()),
        prompt_passes=sum(
            2 * -(-len(rows) * length // scoring.PASS_TOKENS) for length, rows in scored.items()
        ),
        answers=sum(1 + sum(row) - len(row) for rows in scored.values() for row in rows),
        texts=texts if spec.generation else 0,
        tasks=len(suite.items) if suite else 0,
        task_tokens=sum(tasks),
        task_longest=max(tasks, default=0),
        corpus=corpus,
        sampled=sampled,
        routed=len(prompts) + len(cases) + len(selection.unrelated) if spec.routes else 0,
        counted=tokenizer is not None,
    )


def _queries(case: EditCase) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Scored prompts with the answers whose tokens are looked at."""
    if isinstance(case, KnowEditCase):
        yield from ((probe.prompt, probe.answers) for some in case.probes.values() for probe in some)
    else:
        answers = case.request.target_new, case.target_true
        yield from ((prompt, answers) for some in case.prompts.values() for prompt in some)


def _padded(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that answers of more than one token add to prompts of equal length, padding included."""
    longer = [tokens - 1 for row in rows for tokens in row if tokens > 1]
    return len(longer) * max(longer, default=0)


def _facts(cases: Sequence[EditCase], count: Count) -> Iterator[Fact]:
    requests = [case.request for case in cases]
    whole = count([case.rewrite_prompt for case in cases])
    before = count([request.prompt.partition("{}")[0] + request.subject for request in requests])
    targets = _target_tokens({request.target_new for request in requests}, count)
    for request, tokens, upto in zip(requests, whole, before, strict=True):
        yield Fact(before=upto, behind=max(tokens - upto, 0), target=targets[request.target_new])


def _target_tokens(texts: Iterable[str], count: Count) -> dict[str, int]:
    """Tokens of answers, what stands before every text left out."""
    listed = sorted(texts)
    (special,) = count([""])
    counts = count([f" {text.strip()}" for text in listed])
    return {text: max(tokens - special, 1) for text, tokens in zip(listed, counts, strict=True)}


def _task_texts(suite: "Suite") -> Iterator[str]:
    """What the general tasks put before the model, a prompt of several answers once."""
    requests = [request for task in suite.tasks.values() for request in task.instances]
    for _, text in sorted({(request.request_type, request.args[0]) for request in requests}):
        yield text


def _corpus_tokens(spec: RunSpec, count: Count, shape: Shape) -> tuple[int, int]:
    """Tokens of the statistics, and how many of them are sampled from the model first."""
    if not any(spec.editor(name).statistics() for name in spec.editors):
        return 0, 0
    if spec.stats == "self":
        tokens = spec.limit_stats or max(OWN_TOKENS, TOKENS_PER_WIDTH * shape.inner)
        shipped = spec.model in MODELS and (stats.SAMPLES / f"{spec.model}.jsonl.gz").is_file()
        return tokens, 0 if shipped else tokens
    if spec.stats == "wikipedia":
        tokens = stats.WIKIPEDIA_ARTICLES * ARTICLE_TOKENS
    else:
        texts = stats.read_texts(spec.stats)
        counted = [min(length, shape.context) for length in count(texts[:COUNTED_TEXTS])]
        tokens = sum(counted) * len(texts) // len(counted)
    return min(tokens, spec.limit_stats or tokens), 0


# -- the machine --------------------------------------------------------------------------------------------


def free_memory(device: str) -> int:
    """Bytes that a program could have now: of a GPU, or of the machine's memory."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not a Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_present(device: str) -> bool:
    """Whether a device is on this machine."""
    return device == "cpu" or int(device.partition(":")[2] or 0) < torch.cuda.device_count()


def machine_of(
    spec: RunSpec, shape: Shape, model: PreTrainedModel, passes: Mapping[str, int] | None = None
) -> Machine:
    """What this machine can do for a run; a fraction of a second's work.

    passes: of a run that has chosen them. For a device that is not here, the least that a run can do with.
    """
    if not is_present(spec.device):
        return Machine(rates=None, packs=False, passes=Passes.fitting(model, 0), beside=False)
    packs = spec.device == "cpu" and spec.dtype == "float32" and onednn.available()
    rates = measured_rates(spec, shape, packs=packs)
    if spec.device == "cpu":
        return Machine(rates=rates, packs=packs)
    versions = shape.edited_entries * 4
    own = (shape.parameters - shape.edited_entries) * getattr(torch, spec.dtype).itemsize + versions
    room = free_memory(spec.device) + torch.cuda.memory_reserved(spec.device) - own
    beside = room >= WEIGHT_VERSIONS * versions + WORKING_BYTES
    chosen = Passes(**passes) if passes else Passes.fitting(model, room - beside * versions)
    return Machine(rates=rates, packs=packs, passes=chosen, beside=beside, room=room)


@torch.no_grad()
def measured_rates(spec: RunSpec, shape: Shape, *, packs: bool) -> Rates:
    """The speed of three products of the model's width, of a size that fills the device."""
    device, dtype = torch.device(spec.device), getattr(torch, spec.dtype)
    rows, most = (256, 2048) if device.type == "cpu" else (4096, 4096)
    width, inner = min(shape.width, most), min(shape.inner, most)
    layer = nn.Sequential(nn.Linear(width, inner, bias=False, device=device, dtype=dtype))
    layer.requires_grad_(False)
    if packs:
        pack: Any = onednn.pack_linears
        pack(layer, leave=set())
    states = torch.ones(rows, width, device=device, dtype=dtype)
    keys = torch.ones(rows, inner, device=device)
    precise = keys.double()
    return Rates(
        model=_speed(lambda: layer(states), 2 * rows * width * inner, device),
        single=_speed(lambda: keys.T @ keys, 2 * rows * inner**2, device),
        double=_speed(lambda: precise.T @ precise, 2 * rows * inner**2, device),
    )


def _speed(product: Callable[[], Tensor], operations: int, device: torch.device) -> float:
    """Operations a second over some trials: what other programs leave."""

    def run() -> float:
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = end = run()  # the first one packs and warms up
    trials = 0
    while trials < 2 or (trials < 100 and end - start < 0.3):
        trials, end = trials + 1, run()
    return operations * trials / (end - start)


# -- before a run -------------------------------------------------------------------------------------------


def plan(spec: RunSpec, *, data: str | None) -> str:
    """What a run would need, as it is printed; ValueError for what the run would refuse as well.

    Nothing is loaded but the model's config, its tokenizer where there is a copy of it here, and the data.
    """
    selection, _ = select(
        load_dataset(spec.dataset, data),
        edits=spec.edits, negatives=spec.negatives, order=spec.select, seed=spec.seed,
    )  # fmt: skip
    source = find_model(spec.model)
    model = empty_model(model_config(source), getattr(torch, spec.dtype))
    shape = shape_of(model, spec)
    suite = None
    if spec.capability:
        from harness.capability import load_suite

        suite = load_suite(spec.capability, data)
    work = work_of(spec, selection, _local_tokenizer(source), shape, suite)
    machine = machine_of(spec, shape, model)
    budget = predict(spec, shape, work, machine)
    title = f"{spec.model} ({spec.dtype} on {spec.device}), {spec.edits:,} edits of {spec.dataset}:"
    return "\n".join([title, "", _needs_table(budget), "", *_remarks(spec, work, machine, budget)])


def _local_tokenizer(source: Any) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, if there is a copy of it on this machine."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, local_files_only=True, trust_remote_code=False
        )
        return tokenizer if tokenizer("text")["input_ids"] else None
    except Exception:  # whatever it lacks, the plan does without
        return None


def _needs_table(budget: Budget) -> str:
    """The needs of all stages, rounded."""
    gpu = budget.whole.gpu is not None
    rows = [
        [need.stage, duration(need.seconds), *([amount(need.gpu)] if gpu else []), amount(need.cpu),
         amount(need.disk + need.cached)]
        for need in (*budget.stages, budget.whole)
    ]  # fmt: skip
    return _table(["stage", "time", *(["GPU memory"] if gpu else []), "memory", "disk"], rows)


def _remarks(spec: RunSpec, work: Work, machine: Machine, budget: Budget) -> Iterator[str]:
    """What must be said of a prediction."""
    whole = budget.whole
    if machine.rates is not None:
        speed = f"{machine.rates.model / 1e9:,.0f} GFLOP/s"
        yield f"Times are by this machine's speed now ({speed}), on a CPU right within a factor of {FACTOR}."
        yield "Edits finished early, and statistics and embeddings in the caches, make a run shorter."
    else:
        yield (
            f"{spec.device} is not on this machine: times are not predicted, and GPU memory is the least "
            "that the run can do with; on a larger card it takes more, for larger passes."
        )
    if not work.counted:
        yield "The model's tokenizer is not here: four characters are taken for a token."
    if whole.cached:
        yield f"Of the disk, {amount(whole.cached)} are statistics in the cache."
    for what, device, need in (("GPU memory", spec.device, whole.gpu), ("memory", "cpu", whole.cpu)):
        if need is not None and is_present(device) and need > (free := free_memory(device)):
            yield f"Warning: not enough {what}, about {amount(need)} needed, {amount(free)} free here."


# -- after a run --------------------------------------------------------------------------------------------


def compare(
    spec: RunSpec, loaded: LoadedModel, selection: Selection, suite: "Suite | None", folder: RunFolder
) -> list[dict[str, Any]]:
    """Prediction and outcome of every stage of a finished run, and last of all of it.

    Of memory only the peak of the whole run is known.
    """
    info = folder.info
    shape = shape_of(loaded.model, spec)
    work = work_of(spec, selection, loaded.tokenizer, shape, suite)
    budget = predict(spec, shape, work, machine_of(spec, shape, loaded.model, info.get("passes")))
    merges = (None, *merges_of(spec))
    owners = {weights_id(spec, name, merge): name for name in spec.editors for merge in merges}
    owners["unedited"] = "unedited"
    seconds: Counter[str] = Counter()
    for name, value in info["timings"].items():
        seconds[_stage_of(name, owners)] += value
    disk: Counter[str] = Counter()
    for path in filter(Path.is_file, folder.path.rglob("*")):
        disk[_stage_of_file(path.relative_to(folder.path).parts, owners)] += path.stat().st_size
    rows = [_row(need, seconds.get(need.stage), disk[need.stage]) for need in budget.stages]
    whole = _row(budget.whole, sum(seconds.values()), sum(disk.values()))
    gpu = None
    if spec.device.startswith("cuda"):
        noted = [row["peak_memory_bytes"] for row in info["per_editor"].values()]
        gpu = max([torch.cuda.max_memory_allocated(spec.device), *noted])
    cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [*rows, whole | {"cpu_memory_bytes": cpu, "gpu_memory_bytes": gpu}]


def _row(need: Need, seconds: float | None, disk: int) -> dict[str, Any]:
    return {
        "stage": need.stage,
        "predicted_seconds": None if need.seconds is None else round(need.seconds, 3),
        "seconds": None if seconds is None else round(seconds, 3),
        "predicted_disk_bytes": need.disk,
        "disk_bytes": disk,
        "predicted_cpu_memory_bytes": need.cpu,
        "predicted_gpu_memory_bytes": need.gpu,
    }


def _stage_of(timing: str, owners: Mapping[str, str]) -> str:
    """The stage that a timing of ``run.json`` belongs to; owners: weight set -> editor."""
    for kind in ("score", "texts", "general tasks with", "edit", "keys", "merge"):
        if timing.startswith(f"{kind} "):
            weights = timing.removeprefix(f"{kind} ").partition(" after batch ")[0]
            return f"{kind} {owners.get(weights, weights)}"
    return timing


def _stage_of_file(parts: Sequence[str], owners: Mapping[str, str]) -> str:
    """The stage that left a file; parts: of its path in the run folder."""
    kinds = {"deltas": "edit", "keys": "keys", "state": "edit", "scores": "score"}
    if parts[0] not in kinds:
        return "report"
    kind = "general tasks with" if parts[:2] == ("scores", "tasks") else kinds[parts[0]]
    name = (parts[-1] if parts[0] == "scores" else parts[1]).partition(".")[0]
    return f"{kind} {owners.get(name, name)}"


def comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """What ``compare`` returned, as it is printed."""
    table = [
        [row["stage"], duration(row["predicted_seconds"]), duration(row["seconds"]),
         amount(row["predicted_disk_bytes"]), amount(row["disk_bytes"])]
        for row in rows
    ]  # fmt: skip
    lines = [_table(["stage", "predicted", "took", "disk predicted", "used"], table)]
    for what, kind in (("GPU memory", "gpu"), ("memory", "cpu")):
        predicted, peak = rows[-1][f"predicted_{kind}_memory_bytes"], rows[-1][f"{kind}_memory_bytes"]
        if peak is not None:
            lines.append(f"Most {what}: {amount(predicted)} predicted, {amount(peak)} used.")
    return "\n".join(lines)


# -- as text ------------------------------------------------------------------------------------------------


def duration(seconds: float | None) -> str:
    """A time with the two digits that a prediction has."""
    if seconds is None:
        return "–"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{_rounded(seconds / length)} {unit}"
    return f"{_rounded(seconds)} s" if seconds >= 1 else "< 1 s"


def amount(size: int | None) -> str:
    """Bytes with the two digits that a prediction has."""
    if size is None:
        return "–"
    for unit, length in (("GB", 10**9), ("MB", 10**6)):
        if size >= length:
            return f"{_rounded(size / length)} {unit}"
    return "< 1 MB" if size else "0"


def _rounded(value: float) -> str:
    return f"{float(f'{value:.2g}'):,g}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
