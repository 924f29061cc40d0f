"""What every stage of a run needs: time, memory and disk, by arithmetic from sizes, texts and speeds.

Times are a stage's arithmetic over the speed of one product on the machine, and the share of that speed that
finished runs have reached (docs/plan.md). ``harness.plan`` finds out what goes in, and prints what comes out.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from editors import answers
from editors.alphaedit import AlphaEditStream
from editors.closed_form import ClosedFormEditor
from editors.contexts import LENGTH, STARTS
from editors.ft import Ft
from editors.memit import MemitSeqStream
from editors.rect import RectStream
from editors.rome import RomeConfig, RomeStream
from editors.rows import PART_TOKENS
from editors.targets import Passes, TargetConfig
from editors.ultraedit import UltraEdit
from harness import generation, scoring, stats
from harness.grid import NO_MERGE, cells_of, merges_of, needs_keys, needs_unmerged
from harness.spec import RunSpec

SHARES = {  # of the measured speed that a stage reaches on a CPU; docs/plan.md has the runs they are from
    "statistics": 0.7, "targets": 0.85, "keys": 0.7, "scoring": 0.65, "texts": 0.4, "tasks": 0.4,
}  # fmt: skip
CALL_SECONDS = {"cpu": 4e-4, "cuda": 4e-4}  # of one call of a block, however few its tokens
GRADIENT_CALL_SECONDS = {"cpu": 2e-3, "cuda": 4e-4}  # the same in a step of target values
ENCODER_SECONDS = {"cpu": 3.5e-3, "cuda": 4e-4}  # to embed one text
ENTRY_SECONDS = {"cpu": 1.5e-8, "cuda": 1e-9}  # to merge one entry of a matrix
BYTE_SECONDS = 2e-9  # to read a byte of weights and to hash it
LIBRARIES = 800_000_000  # bytes of the process without a model
TOKEN_BYTES = 40  # of one token of a corpus in memory, as text and as a number in a list
ROW_BYTES = {"prompt": 60, "text": 200, "task": 150}  # of a scored row on disk, compressed
RECORD_BYTES, REPORT_BYTES = 1_800, 40_000  # of a line of records.jsonl; of run.json and the tables
METADATA_BYTES = {"delta": 310, "state": 110, "statistics": 560}  # of a file of tensors
TEMPLATE_BYTES = 22  # of a context template in an editor's state
CONTEXT_TOKENS = LENGTH + 1  # of a template before its prompt
TEMPLATES, ROME_TEMPLATES = len(STARTS) + 1, 4 * len(STARTS) + 1
RELEASE_FIELDS = ("log_base", "legacy_double_apply")  # of PRUNE, whose stream is MEMIT's own
TASK_ROWS = 16  # harness.capability's batch; lm-eval is imported only where there are tasks


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes, in numbers, not bytes."""

    parameters: int
    blocks: int
    block: int  # weights of a block's products: multiplications for each token
    inner: int  # weights of its MLP output projection over the width: its d_in
    width: int
    heads: int  # width of all attention heads together
    cache: int  # keys and values of one token in a block's cache
    vocabulary: int
    context: int  # most tokens of a text
    edited: Mapping[str, Mapping[str, tuple[int, int]]]  # editor -> parameter -> (d_out, d_in), 1 of a bias

    @property
    def head(self) -> int:
        """Weights of the product with the vocabulary."""
        return self.width * self.vocabulary

    @property
    def edited_entries(self) -> int:
        """Entries of all parameters that some editor changes, each once."""
        shapes = {name: shape for own in self.edited.values() for name, shape in own.items()}
        return sum(map(math.prod, shapes.values()))

    def entries(self, editor: str) -> int:
        """Entries of the parameters that one editor changes."""
        return sum(map(math.prod, self.edited[editor].values()))


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Tokens of one edit."""

    before: int  # of its prompt up to the subject's last one, which is among them
    behind: int  # of its prompt after it
    target: int

    @property
    def suffix(self) -> int:
        """Tokens that a step of the target's optimisation runs, in each row."""
        return self.behind + self.target


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much text a run goes through, in tokens."""

    facts: tuple[Fact, ...]  # in the order of editing
    prompts: int = 0  # that are scored under every weight set
    prompt_tokens: int = 0
    prompt_passes: int = 0
    answers: int = 0  # tokens at which likelihoods are taken
    texts: int = 0  # that are sampled under every weight set
    tasks: int = 0  # records of general tasks
    task_tokens: int = 0
    task_longest: int = 0
    corpus: int = 0  # of the statistics
    sampled: int = 0  # tokens of it that the model writes itself
    routed: int = 0  # texts that the encoder embeds
    counted: bool = True  # with the model's tokenizer; else estimated from characters


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Floating-point operations a second on a run's device."""

    model: float  # frozen layers, in the model's dtype
    single: float  # float32: keys, statistics, edited weights
    double: float  # float64: solves


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is known of the machine."""

    rates: Rates | None  # None: the run's device is not there
    packs: bool  # whether frozen layers on the CPU have packed copies for oneDNN
    passes: Passes = field(default_factory=Passes)  # how much of the target values runs together
    beside: bool = True  # whether versions of the edited weights are kept on the device, beside the model
    room: int = 0  # bytes of a GPU that the model leaves


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one stage needs: time, memory in all while it runs, and what it leaves on disk."""

    stage: str
    seconds: float | None  # None: not predicted
    cpu: int
    gpu: int | None  # None: the run is on a CPU
    disk: int = 0
    cached: int = 0  # on disk beside the run folder, for later runs


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The stages of a run in their order."""

    stages: tuple[Need, ...]

    @property
    def whole(self) -> Need:
        """Times and disk in all, memory at its peak."""
        seconds = [need.seconds for need in self.stages]
        gpu = [need.gpu for need in self.stages if need.gpu is not None]
        return Need(
            stage="in all",
            seconds=None if None in seconds else sum(filter(None, seconds)),
            cpu=max(need.cpu for need in self.stages),
            gpu=max(gpu) if gpu else None,
            disk=sum(need.disk for need in self.stages),
            cached=sum(need.cached for need in self.stages),
        )


# -- what the stages need -----------------------------------------------------------------------------------


def predict(spec: RunSpec, shape: Shape, work: Work, machine: Machine) -> Budget:
    """The needs of all stages, as if no edit were finished early and no cache held anything."""
    return Budget(stages=tuple(_Stages(spec, shape, work, machine).all()))


class _Stages:
    """The arithmetic, stage after stage; bytes are on the run's device where nothing else is said."""

    def __init__(self, spec: RunSpec, shape: Shape, work: Work, machine: Machine) -> None:
        self.spec, self.shape, self.work = spec, shape, work
        self.known = machine.rates is not None
        self.rates = machine.rates or Rates(model=1, single=1, double=1)
        self.kind = "cuda" if spec.device.startswith("cuda") else "cpu"
        self.size = int(getattr(torch, spec.dtype).itemsize)
        self.precise = max(self.size, 4)  # of edited weights
        n = spec.batch_size
        self.batches = [work.facts[i : i + n] for i in range(0, len(work.facts), n)]
        self.points = range(1, spec.num_batches + 1) if spec.evaluate == "every-batch" else [spec.num_batches]
        frozen = shape.parameters - shape.edited_entries
        self.held = frozen * self.size + shape.edited_entries * self.precise  # on the device
        self.host = LIBRARIES  # of the CPU's memory besides
        self.packs = 4 * (shape.blocks * shape.block + shape.head) if machine.packs else 0
        self.passes, self.beside, self.room = machine.passes, machine.beside, machine.room
        self.sought: set[tuple[Any, ...]] = set()  # target values that are made by then

    def all(self) -> Iterator[Need]:
        """All stages in the order of a run."""
        spec, work = self.spec, self.work
        weights = self.shape.parameters * self.size
        yield self._need("load", weights * BYTE_SECONDS, 0, host=weights if self.kind == "cuda" else 0)
        versions = self.shape.edited_entries * self.precise  # the unedited ones
        self.held, self.host = self.held + self.beside * versions, self.host + (not self.beside) * versions
        if spec.routes:
            yield self._need("route", work.routed * ENCODER_SECONDS[self.kind], 0)
        self.held += self.packs
        yield from self._outcomes("unedited", weight_sets=1, times=1)
        editors = [spec.editor(name) for name in spec.editors]
        keyed = any(needs_keys(spec, merge) for merge in merges_of(spec))
        if layers := sorted({n for e in editors for n in (e.config.layers if keyed else e.statistics())}):
            yield self._statistics(layers)
        self.held += self.packs  # of the products that gradients pass through
        for name in spec.editors:
            merged = 0 if name in NO_MERGE else len(merges_of(spec))
            yield self._edit(name, chains=needs_unmerged(spec) + (merged if spec.chain == "merged" else 0))
            if merged and keyed:
                yield self._keys(name, chains=merged if spec.chain == "merged" else 1)
            if merged:
                yield self._merge(name, merged)
            weight_sets = merged + bool({"baseline", "+R"} & set(spec.cells))
            yield from self._outcomes(
                name, weight_sets=weight_sets, times=sum(self.points) / spec.num_batches
            )
        yield self._need("report", 0.0, 0, disk=self._report_bytes())

    def _need(
        self, stage: str, seconds: float, memory: int, *, versions: int = 0, host: int = 0, disk: int = 0,
        cached: int = 0,
    ) -> Need:  # fmt: skip
        """memory: on the device; versions: of edited weights, where these are kept; host: on the CPU."""
        memory += self.held + self.beside * versions
        host += self.host + (not self.beside) * versions
        return Need(
            stage=stage,
            seconds=seconds if self.known else None,
            cpu=host + memory if self.kind == "cpu" else host,
            gpu=None if self.kind == "cpu" else memory,
            disk=disk,
            cached=cached,
        )

    def _forward(self, share: str, tokens: float, blocks: int, passes: float, head: float = 0) -> float:
        """Seconds of running tokens through some blocks, and some positions through the head."""
        products = tokens * blocks * self.shape.block + head * self.shape.head
        call = (GRADIENT_CALL_SECONDS if share == "targets" else CALL_SECONDS)[self.kind]
        return 2 * products / (self.rates.model * SHARES[share]) + passes * blocks * call

    def _activations(self, tokens: int) -> int:
        """Of tokens that run through a block without a gradient."""
        return tokens * (6 * self.shape.width + 3 * self.shape.inner) * self.size

    def _graph(self, tokens: int) -> int:
        """Of tokens in a block whose gradient is to be taken, the attention's keys and values left out."""
        return tokens * (6 * self.shape.width + 4 * self.shape.inner) * self.size

    def _logits(self, positions: int) -> int:
        """Of positions at the head: logits, their float32 form and its softmax."""
        return positions * self.shape.vocabulary * (self.size + 2 * self.precise)

    # -- scores ---------------------------------------------------------------------------------------------

    def _outcomes(self, name: str, *, weight_sets: int, times: float) -> Iterator[Need]:
        """What is asked of some weight sets; prompts so many times, as there may be several points."""
        if not weight_sets:
            return
        work, shape, size = self.work, self.shape, self.size
        versions = 2 * shape.entries(name) * self.precise if name in shape.edited else 0
        cast = shape.edited_entries * size if size < 4 else 0  # to the model's precision
        tokens = min(scoring.PASS_TOKENS, work.prompt_tokens)
        rows = tokens * work.answers // max(work.prompt_tokens, 1)
        seconds = self._forward("scoring", work.prompt_tokens, shape.blocks, work.prompt_passes, work.answers)
        memory = self._activations(tokens) + self._logits(rows)
        memory += 2 * tokens * shape.cache * shape.blocks * size
        disk = weight_sets * (times * work.prompts * ROW_BYTES["prompt"] + work.texts * ROW_BYTES["text"])
        yield self._need(
            f"score {name}", weight_sets * times * seconds, cast + memory, versions=versions, disk=round(disk)
        )
        if work.texts:
            length, together = generation.TEXT_TOKENS, min(work.texts, generation.PASS_ROWS)
            tokens, passes = work.texts * length, length * -(-work.texts // generation.PASS_ROWS)
            seconds = self._forward("texts", tokens, shape.blocks, passes, head=tokens)
            memory = 2 * together * length * shape.cache * shape.blocks * size + self._logits(together)
            yield self._need(f"texts {name}", weight_sets * seconds, cast + memory, versions=versions)
        if work.tasks:  # lm-eval applies the head to all positions and keeps their logits twice
            tokens, together = work.task_tokens, TASK_ROWS * work.task_longest
            passes = 2 * work.tasks // TASK_ROWS  # the choices, and a generated answer
            seconds = self._forward("tasks", tokens, shape.blocks, passes, head=tokens)
            memory = self._activations(together) + self._logits(together) + together * shape.vocabulary * size
            yield self._need(
                f"general tasks with {name}", weight_sets * seconds, cast + memory, versions=versions,
                disk=weight_sets * work.tasks * ROW_BYTES["task"],
            )  # fmt: skip

    def _report_bytes(self) -> int:
        """All rows once more, and the records; figures are left out."""
        spec, work = self.spec, self.work
        times = sum(self.points) / spec.num_batches
        weight_sets = 1 + len(spec.editors) * (1 + len(merges_of(spec))) * times
        prompts = work.prompts * ROW_BYTES["prompt"] + work.texts * ROW_BYTES["text"]
        cells = 1 + sum(len(list(cells_of(spec, name))) for name in spec.editors)
        records = cells * sum(point + 1 for point in self.points)
        rows = weight_sets * (prompts + work.tasks * ROW_BYTES["task"])
        return round(rows + records * RECORD_BYTES + REPORT_BYTES)

    # -- statistics -----------------------------------------------------------------------------------------

    def _statistics(self, layers: Sequence[int]) -> Need:
        work, shape = self.work, self.shape
        square = shape.inner**2
        reading = self._forward("statistics", work.corpus, layers[-1] + 1, work.corpus / stats.PASS_TOKENS)
        products = 2 * work.corpus * len(layers) * square / (self.rates.single * SHARES["statistics"])
        steps = work.sampled / stats.SAMPLE_BATCH
        writing = self._forward("texts", work.sampled, shape.blocks, steps, head=work.sampled)
        tokens = min(stats.PASS_TOKENS, work.corpus)
        keys = tokens * shape.inner * (self.size + self.precise)
        sums = len(layers) * square * 8 + 2 * square * 8  # in host memory, with what the last step takes
        matrix = {"covariance": (shape.inner, shape.inner)}
        file = file_bytes(matrix, 8, metadata=METADATA_BYTES["statistics"])
        memory = self._activations(tokens) + keys + (len(layers) if self.kind == "cuda" else 1) * square * 4
        return self._need(
            "statistics", reading + products + writing, memory,
            host=work.corpus * TOKEN_BYTES + sums, cached=len(layers) * file,
        )  # fmt: skip

    # -- edits ----------------------------------------------------------------------------------------------

    def _edit(self, name: str, *, chains: int) -> Need:
        """All batches of one editor, as often as there are chains."""
        editor, spec, shape = self.spec.editor(name), self.spec, self.shape
        if isinstance(editor, ClosedFormEditor):
            seconds, shared = self._closed_form(editor)
            memory, host, cached = self._closed_form_bytes(editor)
        else:
            (seconds, memory), shared, host, cached = self._descent(name, editor), 0.0, 0, 0
        changed = shape.entries(name) * self.precise
        written = sum(self._delta_bytes(name, batch) for batch in self.batches)
        seconds += 3 * self._multiplied_out(name)
        seconds += (2 * spec.num_batches * changed + written) * BYTE_SECONDS  # weights are hashed
        return self._need(
            f"edit {name}",
            chains * seconds - shared,
            max(memory, changed),
            versions=2 * changed,  # before and after a batch
            host=host + (changed if self.kind == "cuda" else 0),  # to undo it
            disk=chains * (written + self._state_bytes(name)),
            cached=cached,
        )

    def _closed_form(self, editor: ClosedFormEditor) -> tuple[float, float]:
        """Seconds of all batches, and how many of them target values spare that another editor has made."""
        shape, config, stream = self.shape, editor.config, editor.stream
        layers, templates = config.layers, _templates(editor)
        seconds, found = 0.0, []  # target values by pool, of the first z-layer
        for pool in self._pools(editor):
            passes = self._step_passes(pool, templates)
            tokens = sum(templates * fact.suffix + 1 for fact in pool)
            head = sum(templates * fact.target + 1 for fact in pool)
            before = sum(templates * CONTEXT_TOKENS + (templates + 1) * fact.before for fact in pool)
            values = []
            for height in self._heights(editor):  # no gradient in the last step
                step = self._forward("targets", tokens, height, passes, head)
                prefix = self._forward("targets", before + tokens, shape.blocks, passes)
                values.append((2 * config.steps - 1) * step + prefix)
            passes = 2 * -(-before // PART_TOKENS)
            keys = self._forward("keys", before, layers[-1] + 1 + len(layers), passes)
            seconds += sum(values) + (1 + stream.remembers) * keys
            found.append(values[0])
        first = 9 if issubclass(stream, AlphaEditStream) else 1 / 3  # eigenvectors, or a Cholesky factor
        products = first * shape.inner**3 + sum(4 * shape.inner**2 * len(batch) for batch in self.batches)
        seconds += len(layers) * products / self.rates.double
        return seconds, self._shared(editor, found)

    def _shared(self, editor: ClosedFormEditor, found: Sequence[float]) -> float:
        """Seconds of target values, of those by pool, that an editor before this one has made already.

        On the unedited weights they are the same for equal settings; later, only if the methods are.
        """
        config = editor.config
        names = [field.name for field in fields(TargetConfig) if field.name != "layers"]
        layer = config.layers[0 if editor.stream.own_targets else -1]
        asked = (*(getattr(config, name) for name in names), layer, _templates(editor), editor.stream.place)
        own = [value for name, value in vars(config).items() if name not in RELEASE_FIELDS]
        method = (*asked, editor.stream, *own)
        batch = len(found) // len(self.batches) if _templates(editor) == TEMPLATES else 1
        spared = sum(found) if method in self.sought else sum(found[:batch]) if asked in self.sought else 0.0
        self.sought |= {asked, method}
        return spared

    def _pools(self, editor: ClosedFormEditor) -> list[Sequence[Fact]]:
        """The edits whose target values are found together, in order."""
        size = self.passes.pool if _templates(editor) == TEMPLATES else 1  # ROME's are one by one
        return [batch[i : i + size] for batch in self.batches for i in range(0, len(batch), size)]

    def _heights(self, editor: ClosedFormEditor) -> list[int]:
        """How many blocks a step runs, for every layer with target values."""
        layers = editor.config.layers if editor.stream.own_targets else editor.config.layers[-1:]
        return [self.shape.blocks - 1 - layer + (editor.stream.place != "block") for layer in layers]

    def _step_passes(self, pool: Sequence[Fact], templates: int) -> int:
        """Passes of one step: rows of equal suffix run together, and those of the KL term."""
        tokens, counts = self.passes.step_tokens, Counter(fact.suffix for fact in pool)
        parts = sum(-(-templates * n // max(tokens // suffix, 1)) for suffix, n in counts.items())
        return parts + -(-len(pool) // tokens)

    def _closed_form_bytes(self, editor: ClosedFormEditor) -> tuple[int, int, int]:
        """On the device, on the CPU and in the cache: target values, then what the solves need."""
        shape, size, templates = self.shape, self.size, _templates(editor)
        pool = max(self._pools(editor), key=lambda pool: sum(fact.before for fact in pool))
        before = CONTEXT_TOKENS + max(fact.before for fact in pool)  # padded to the longest
        suffix = max(sum(fact.suffix for fact in pool) // len(pool), 1)
        rows = max(min(self.passes.step_tokens // suffix, templates * len(pool)), 1)  # of a pass
        prefixes = len(pool) * (templates + 1) * before * shape.cache * size
        attention = rows * (before + suffix) * 2 * shape.heads * size
        targets = self._heights(editor)[0] * (prefixes + self._graph(rows * suffix) + attention)
        targets += 2 * self._logits(max(rows, len(pool))) + len(pool) * shape.vocabulary * self.precise

        stream, layers, edits = editor.stream, len(editor.config.layers), self.spec.edits
        square = shape.inner**2 * 8
        product = shape.inner * shape.width * (8 + self.precise)  # a change multiplied out
        if issubclass(stream, AlphaEditStream):  # at most half of the eigenvectors are kept
            spaces, eigen = layers * square // 2, stats.EIGEN_COPIES * square
            near = self.kind == "cpu" or eigen < self.room
            host = spaces + layers * edits * shape.inner * self.precise + (0 if near else eigen)
            return max(targets, eigen if near else square, product), host, spaces
        if isinstance(editor.config, RomeConfig) and not editor.config.use_covariance:
            return max(targets, product), 0, 0
        memory = 2 * edits * shape.inner * 8 if issubclass(stream, MemitSeqStream) else 0
        return max(targets, 2 * square, product), layers * (square + memory), 0

    def _descent(self, name: str, editor: Any) -> tuple[float, int]:
        """Seconds of all batches and memory of the methods that descend on the facts themselves."""
        shape, config = self.shape, editor.config
        trains = isinstance(editor, Ft)  # else one step, which leaves the weights alone
        height, steps = shape.blocks - config.layers[0], config.steps if trains else 1
        size = config.minibatch if trains else self.spec.batch_size
        parts = [batch[i : i + size] for batch in self.batches for i in range(0, len(batch), size)]
        entries, longest, seconds = shape.entries(name), 0, 0.0
        for part in parts:
            tokens = sum(fact.before + fact.suffix - 1 for fact in part)
            head = sum(fact.target for fact in part)
            passes = -(-tokens // answers.PASS_TOKENS)
            seconds += self._forward("targets", tokens, config.layers[0], passes)
            seconds += 2 * steps * self._forward("targets", tokens, height, passes, head)
            seconds += 4 * trains * steps * entries * ENTRY_SECONDS[self.kind]  # Adam
            longest = max(longest, head)
        graph = self._graph(answers.PASS_TOKENS) + answers.PASS_TOKENS * 2 * shape.heads * self.size
        memory = height * graph + 2 * self._logits(longest)
        if trains:  # the gradient and two moments
            return seconds, memory + 3 * entries * self.precise
        features = sum(longest * (d_in + d_out) * (4 + 2 * 8) for d_out, d_in in shape.edited[name].values())
        return seconds, memory + features + longest**2 * 8

    def _keys(self, name: str, chains: int) -> Need:
        """The keys of all batches once more, and what the covariances make of them."""
        shape, layers = self.shape, self.spec.editor(name).config.layers
        before = sum(TEMPLATES * (CONTEXT_TOKENS + fact.before) for batch in self.batches for fact in batch)
        seconds = self._forward("keys", before, layers[-1] + 1 + len(layers), 2 * -(-before // PART_TOKENS))
        solved = len(layers) * (shape.inner**3 / 3 + 2 * shape.inner**2 * self.spec.edits)
        seconds += solved / self.rates.double + self._multiplied_out(name)
        square, stored = shape.inner**2 * 8, 2 * len(layers) * self.spec.edits * shape.inner * self.precise
        return self._need(
            f"keys {name}", chains * seconds, 2 * square, versions=shape.entries(name) * self.precise,
            host=len(layers) * square, disk=chains * stored,
        )  # fmt: skip

    def _merge(self, name: str, ratios: int) -> Need:
        """Replay of the stored changes, once for each ratio."""
        entries = self.shape.entries(name)
        passes = self.spec.num_batches * entries * ENTRY_SECONDS[self.kind]
        changed = entries * self.precise
        seconds = ratios * (self._multiplied_out(name) + passes)
        return self._need(f"merge {name}", seconds, changed, versions=6 * changed)

    def _multiplied_out(self, name: str) -> float:
        """Seconds to multiply all low-rank changes of an editor out, once."""
        rank = 0 if _writes_dense(self.spec.editor(name)) else self.spec.edits
        return 2 * rank * self.shape.entries(name) / self.rates.double

    def _delta_bytes(self, name: str, batch: Sequence[Fact]) -> int:
        """The file of one batch's change."""
        editor = self.spec.editor(name)
        closed = isinstance(editor, ClosedFormEditor)
        rank = len(batch) if closed else sum(fact.target for fact in batch)
        tensors: dict[str, tuple[int, ...]] = {}
        for parameter, (d_out, d_in) in self.shape.edited[name].items():
            if _writes_dense(editor) or (not closed and rank * (d_in + d_out) >= d_in * d_out):
                tensors[parameter] = (d_out, d_in)
            else:
                tensors |= {f"{parameter}.left": (d_out, rank), f"{parameter}.right": (rank, d_in)}
        return file_bytes(tensors, self.precise, metadata=METADATA_BYTES["delta"] + 6 * len(batch))

    def _state_bytes(self, name: str) -> int:
        """The file of an editor's state after the last batch but one."""
        editor, spec = self.spec.editor(name), self.spec
        if isinstance(editor, Ft):
            return METADATA_BYTES["state"]
        if isinstance(editor, UltraEdit):  # counts, means and squares, by shape or by matrix
            shapes = list(self.shape.edited[name].values())
            kinds = set(shapes) if editor.config.shared_statistics else shapes
            return METADATA_BYTES["state"] + sum(16 * sum(shape) + 230 for shape in kinds)
        assert isinstance(editor, ClosedFormEditor)
        tensors: dict[str, tuple[int, ...]] = {}
        if editor.stream.remembers:
            keys = (self.shape.inner, (spec.num_batches - 1) * spec.batch_size)
            tensors = {f"keys.{layer}": keys for layer in editor.config.layers}
        size = 8 if issubclass(editor.stream, MemitSeqStream) else self.precise
        contexts = file_bytes({"contexts": (_templates(editor) * TEMPLATE_BYTES,)}, 1, metadata=0)
        return contexts + file_bytes(tensors, size, metadata=METADATA_BYTES["state"])


def _templates(editor: ClosedFormEditor) -> int:
    """Context templates of every edit."""
    return ROME_TEMPLATES if issubclass(editor.stream, RomeStream) else TEMPLATES


def _writes_dense(editor: Any) -> bool:
    """Whether an editor's changes are whole matrices."""
    if isinstance(editor, ClosedFormEditor):
        return issubclass(editor.stream, RectStream)
    return isinstance(editor, Ft)


def file_bytes(tensors: Mapping[str, tuple[int, ...]], itemsize: int, *, metadata: int) -> int:
    """Size of a safetensors file with about so many bytes of metadata."""
    whole = sum(map(math.prod, tensors.values())) * itemsize
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [whole, whole]}
        for name, shape in tensors.items()
    }
    return 8 + len(json.dumps(header, separators=(",", ":"))) + metadata + whole
