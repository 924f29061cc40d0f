"""Carry out a grid: edit once per chain, score each weight set once, and read every cell off the outcomes."""

import ctypes
import gc
import json
import logging
import random
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editors import Editor, EditStream, dense
from editors.alphaedit import AlphaEditStream
from editors.closed_form import ClosedFormEditor
from editors.sites import device_of, sites_for, sites_of
from editors.targets import Passes
from harness.cells import RecordMaker, Row
from harness.data import Dataset, EditCase, KnowEditCase, Selection, load_dataset, prompt_rows, select
from harness.deltas import (
    BatchCheckpoint,
    delta_path,
    parts_folder,
    read_state,
    state_path,
    write_delta,
    write_state,
)
from harness.encoders import encoder
from harness.folder import RunFolder, SpecMismatchError, provenance
from harness.generation import Consistency, load_references, sample_texts, text_rows
from harness.grid import (
    NO_MERGE,
    Cell,
    Merge,
    cells_of,
    merges_of,
    needs_keys,
    needs_unmerged,
    route_id,
    weights_id,
)
from harness.kept_targets import KeptTargets
from harness.keys import Solver, keys_path, write_keys
from harness.models import (
    LoadedModel,
    file_digest,
    find_model,
    load_model,
    model_config,
    ready_to_edit,
    tensors_digest,
    weights_in_place,
)
from harness.paths import NotWrittenError, cache_folder, read_lines, write_lines_gz
from harness.probes import batch_probes, probe_fields
from harness.progress import Display, Stage
from harness.replay import Replay, Steps, Weights, edited_parameters
from harness.route_probes import RouteProbe, first_sentence, probe_rows, route_probes
from harness.routers import decide, routers_of
from harness.scoring import Answer, Query, score
from harness.spec import CORPORA, HyperparameterFile, RunSpec
from harness.stats import SAMPLES, Progress, Statistics, gather_statistics, load_corpus, read_texts
from reports.record import Record
from reports.render import write_reports
from routing import Decision

if TYPE_CHECKING:
    from harness.capability import Evaluator, Suite

NOT_APPLICABLE = "not applicable"
OWN_TOKENS = 30_000  # least text sampled for ``self``; docs/statistics.md shows why
TOKENS_PER_WIDTH = 10  # tokens per dimension of a key below which a report says so
WEIGHT_VERSIONS = 8  # of the edited matrices that are alive at once: unedited, edited, merged, differences
PROBE_TEXTS = 500  # plain sentences that routers are probed with
WORKING_BYTES = 8 * 2**30  # of an accelerator's memory left free for passes and solves
logger = logging.getLogger(__name__)
Routes = dict[str, list[tuple[str, float]]]  # name of a route -> (route, score) of every scored prompt
Outcomes = dict[int, list[Row]]  # batches in the weights -> every prompt scored with them


def run_grid(
    spec: RunSpec,
    *,
    out: Path,
    data: str | None = None,
    hyperparameters: HyperparameterFile | None = None,
    fresh: bool = False,
    display: Display | None = None,
    edits_only: bool = False,
) -> int:
    """Carry out a spec in a run folder; returns how many cells failed.

    hyperparameters: the file the spec was resolved with, to be named as the source of its settings.
    edits_only: nothing is scored and nothing reported; the same call without it goes on from there.
    An existing folder of the same spec is continued where it stopped (``fresh``: begun anew). Raises
    ValueError in one line, before any model is loaded, for wrong names, files or sizes.
    """
    display = display or Display()
    torch.set_float32_matmul_precision("highest")  # no TF32 in keys, statistics and edited matrices
    dataset = load_dataset(spec.dataset, data)
    selection, notes = select(
        dataset, edits=spec.edits, negatives=spec.negatives, order=spec.select, seed=spec.seed
    )
    inputs = {"data_digest": dataset.digest}
    if spec.stats not in CORPORA:
        read_texts(spec.stats)  # refused now if it is broken, not after the model is loaded
        inputs["stats_digest"] = file_digest(Path(spec.stats))
    if spec.generation and not any(case.generation_prompts for case in selection.cases):
        raise ValueError(f"records of {spec.dataset!r} have no generation_prompts; leave out --generation")
    consistency = None
    if spec.references is not None:
        consistency = load_references(spec.references, selection.cases)
        inputs["references_digest"] = file_digest(Path(spec.references))
    suite = _load_suite(spec, data)
    if suite is not None:
        inputs["capability_digest"] = suite.digest
    embed = (
        encoder(spec.encoder, cache=cache_folder("embeddings"), device=spec.device) if spec.routes else None
    )
    source = find_model(spec.model)
    check_layers(spec, model_config(source))
    made_of = provenance(spec, dataset, selection, embed.identity if embed else None)
    if suite is not None:
        made_of["capability"] = suite.facts()
    if hyperparameters is not None:
        made_of["hyperparameter_sources"] |= hyperparameters.sources_of(spec.editors)
        notes += hyperparameters.overlap(dataset, selection)
    opened = RunFolder.open(out, spec, inputs=inputs, provenance=made_of, fresh=fresh)
    with closing(opened) as folder, display.live():
        with display.stage(f"load {spec.model}") as stage:
            loaded = load_model(spec.model, source, dtype=getattr(torch, spec.dtype), device=spec.device)
            run = _Run(spec, folder, display, loaded, selection.cases, suite, consistency)
            run.timed("load", stage)
        if edits_only:
            run.edit_all()
            return 0
        if embed is not None:
            probes = probes_of(spec, dataset, selection, suite) if spec.probes else []
            run.route(embed, selection.unrelated, probes)
        try:
            failed = run.all_editors()
        except SpecMismatchError:
            raise
        except ValueError as error:  # a defect, not a wrong argument
            raise RuntimeError(f"the run stopped: {error}") from error
        folder.note(status="failed" if failed else "complete", notes=[*notes, *run.notes, *folder.notes])
        write_reports(out)
        from harness.plan import compare, comparison  # which needs this module

        folder.note(budget=compare(spec, loaded, selection, suite, folder))
        display.say(comparison(folder.info["budget"]))
    return failed


def _load_suite(spec: RunSpec, data: str | None) -> "Suite | None":
    """The general tasks of a spec with their records; lm-eval is imported only where there are any."""
    if not spec.capability:
        return None
    from harness.capability import load_suite

    return load_suite(spec.capability, data)


def check_layers(spec: RunSpec, config: Any) -> None:
    """Raise ValueError if an editor's layers are not in the model, or not what a merger looks at."""
    count = getattr(config, "num_hidden_layers", None) or config.n_layer
    for name in spec.editors:
        highest = max(spec.editor(name).config.layers)
        if highest >= count:
            raise ValueError(
                f"{name}: layers up to {highest} asked, {spec.model} has blocks 0 to {count - 1}"
            )
    keyed = sorted({merge.merger for merge in merges_of(spec) if needs_keys(spec, merge)})
    sites = sites_of(config.model_type)
    merged = [name for name in spec.editors if name not in NO_MERGE] if keyed else []
    for name in merged:
        changed = spec.editor(name).parameters(sites)
        if not any(sites.weight_name(layer) in changed for layer in range(count)):
            raise ValueError(
                f"merger {keyed[0]!r} needs keys of MLP output projections, and {name} changes none of them "
                f"in {spec.model}; take another merger or another editor"
            )


def _key_width(loaded: LoadedModel, layer: int) -> int:
    """d_in of the edited weights."""
    sites = sites_for(loaded.model)
    shape = loaded.model.get_parameter(sites.weight_name(layer)).shape
    return shape[0] if sites.transposed else shape[1]


def statistics_of(
    spec: RunSpec, loaded: LoadedModel, layers: Sequence[int], *, progress: Progress
) -> Statistics:
    """The statistics of some layers, from the corpus that a spec names."""
    limit = spec.limit_stats
    if limit is None and spec.stats == "self":
        limit = max(OWN_TOKENS, TOKENS_PER_WIDTH * _key_width(loaded, layers[0]))
    corpus = load_corpus(spec.stats, loaded, limit=limit, seed=spec.seed, progress=progress)
    return gather_statistics(loaded, layers, corpus, limit=limit, progress=progress)


def start_stream(
    editor: Editor,
    loaded: LoadedModel,
    *,
    statistics: Statistics | None,
    seed: int,
    progress: Callable[[str, int, int], None],
    targets: KeptTargets,
) -> EditStream:
    """An editor bound to a model; statistics: None for one that names none."""
    shared: dict[str, Any] = {"targets": targets} if isinstance(editor, ClosedFormEditor) else {}
    stream = editor.start(
        loaded.model,
        loaded.tokenizer,
        covariance=_no_covariance if statistics is None else statistics.covariance,
        seed=seed,
        progress=progress,
        **shared,
    )
    if isinstance(stream, AlphaEditStream) and statistics is not None:
        stream.null_space_source = statistics.null_space
    return stream


def give_back_freed() -> None:
    """Hand freed memory back to the system, where the C library would keep it (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def share_of_batch(what: str, share: float) -> float:
    """How much of a batch is done with a share of a step; what is not updates is nearly all of it."""
    return 0.95 + 0.049 * share if what == "updates" else 0.95 * share


def _no_covariance(layer: int) -> Tensor:
    raise AssertionError(f"the editor names no statistics, yet layer {layer} is asked for")


class _Run:
    """One run folder being filled; every step leaves its result on disk and is skipped if it is there."""

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        display: Display,
        loaded: LoadedModel,
        cases: Sequence[EditCase],
        suite: "Suite | None",
        consistency: Consistency | None,
    ) -> None:
        self.spec, self.folder, self.display, self.loaded = spec, folder, display, loaded
        self.out = folder.path
        self.cases = cases
        self.batches = [cases[i : i + spec.batch_size] for i in range(0, spec.edits, spec.batch_size)]
        self.knowedit = isinstance(cases[0], KnowEditCase)
        self.probes = list(batch_probes(self.batches)) if self.knowedit else []
        self.queries = [] if self.knowedit else list(batch_queries(self.batches))
        self.texts = list(text_rows(self.batches, spec.generation_prompts)) if spec.generation else []
        self.prompts = [*(row for row, _ in self.probes or self.queries), *self.texts]
        last = spec.num_batches
        self.points = range(1, last + 1) if spec.evaluate == "every-batch" else range(last, last + 1)
        self.routes: dict[int, Routes] = {}  # by point, as all outcomes
        self.routing_error: str | None = None
        self.suite = suite
        self.task_routes: Routes = {}
        self.route_probes: Sequence[RouteProbe] = ()
        self.probe_routes: Routes = {}
        self.task_rows: dict[str, list[Row] | str] = {}  # weight set -> outcomes of general tasks, or error
        self._evaluator: Evaluator | None = None
        self.records = RecordMaker(
            spec=spec,
            run_id=folder.info["run_id"],
            model_digest=loaded.digest,
            data_digest=folder.info["spec"]["data_digest"],
            knowedit=self.knowedit,
            consistency=consistency,
        )
        model = {"name": spec.model, "revision": loaded.revision, "digest": loaded.digest}
        folder.same("model", model)
        editors = [spec.editor(name) for name in spec.editors]
        self.merges = merges_of(spec)
        keyed = any(needs_keys(spec, merge) for merge in self.merges)
        self.layers = sorted(
            {layer for e in editors for layer in (e.config.layers if keyed else e.statistics())}
        )
        names = edited_parameters(spec, loaded.model)
        folder.info["provenance"]["onednn_layers"] = ready_to_edit(loaded.model, names)
        folder.info["provenance"]["attention"] = loaded.model.config._attn_implementation
        place = place_of_weights(loaded.model, names)
        self.base: Weights = {n: loaded.model.get_parameter(n).detach().to(place, copy=True) for n in names}
        self.replay = Replay(folder=folder.path, spec=spec, base=self.base, device=device_of(loaded.model))
        self.passes = passes_for(loaded.model, folder.info.get("passes"))
        folder.info["passes"] = asdict(self.passes)
        self.kept_targets = KeptTargets(self._weights_before, self.passes)
        self._before: tuple[str, tuple[int, ...]] | None = None  # digest before a batch, and its versions
        self.statistics: Statistics | None = None
        self._solver: Solver | None = None
        self.notes: list[str] = suite.notes(loaded.tokenizer) if suite else []
        if spec.generation_prompts is not None:
            self.notes.append(
                f"Texts are sampled for {spec.generation_prompts} of a record's generation prompts at most."
            )
        if spec.generation and spec.references is None:
            self.notes.append("Consistency is not available: no reference texts were given (--references).")

    def timed(self, name: str, stage: Stage) -> float:
        """Note how long a stage has taken so far; the seconds."""
        seconds = time.monotonic() - stage.start
        self.folder.info["timings"][name] = round(seconds, 3)
        self.folder.note()
        return seconds

    def route(
        self,
        embed: Callable[[Sequence[str]], Tensor],
        unrelated: Sequence[str],
        probes: Sequence[RouteProbe],
    ) -> None:
        """Decide every scored prompt, with the edits that the corpus has at that point.

        probes: what is only routed, by the routers as they are after the last batch, as the general tasks.
        """
        spec, self.route_probes = self.spec, probes
        try:
            with self.display.stage("route prompts") as stage:
                for point in self.points:
                    routers = routers_of(spec, embed, self.cases[: point * spec.batch_size], unrelated)
                    prompts = [self.prompts[i]["prompt"] for i in self._scored(point)]
                    self.routes[point] = _named(decide(routers, spec, prompts))
                if self.suite is not None:
                    prompts = [item.prompt for item in self.suite.items]
                    self.task_routes = _named(decide(routers, spec, prompts))
                self.timed("route", stage)
                if probes:
                    self.probe_routes = _named(decide(routers, spec, [probe.prompt for probe in probes]))
                    self.timed("route probes", stage)
        except NotWrittenError:
            raise
        except Exception as error:  # the cells without a router do not depend on it
            self.routing_error = self._said("routing", error)

    def _scored(self, point: int) -> list[int]:
        """The prompts scored after so many batches: of the records edited by then; texts at the end only."""
        final = point == self.spec.num_batches
        return [
            i
            for i, row in enumerate(self.prompts)
            if row["batch"] <= point and (final or row["kind"] != "generation")
        ]

    def all_editors(self) -> int:
        """The unedited model, then editor after editor; how many cells failed."""
        order = ("none", *self.spec.editors)
        self.unedited = self._outcomes("unedited", self.base, self.spec.num_batches)
        self._ability("unedited", self.base)
        records = [*self.records.unedited(self.unedited), *self._task_records(None)]
        self.folder.write_records("none", records, order)
        failed = sum(record.error is not None for record in records)
        for editor in self.spec.editors:
            records = list(self._editor(editor))
            failed += sum(record.error not in (None, NOT_APPLICABLE) for record in records)
            self.folder.write_records(editor, records, order)
        write_lines_gz(self.out / "cases.jsonl.gz", self._case_rows())
        return failed

    def edit_all(self) -> None:
        """Every chain of changes, as far as it is not on disk."""
        for editor in self.spec.editors:
            for merge in self.merges if self.spec.chain == "merged" and editor not in NO_MERGE else ():
                self._edit(editor, weights_id(self.spec, editor, merge), merge)
            if needs_unmerged(self.spec):
                self._edit(editor, editor, None)
            self._restore(self.base)

    # -- one editor ---------------------------------------------------------------------------------------

    def _editor(self, editor: str) -> Iterator[Record]:
        """Records of all cells of one editor; a weight set that fails costs only the cells that need it."""
        spec = self.spec
        outcomes: dict[Merge | None, Outcomes | str] = {}
        if spec.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(spec.device)
        for merge in (None, *self.merges):
            if merge is None and not needs_unmerged(spec):
                continue
            if merge is not None and editor in NO_MERGE:
                outcomes[merge] = NOT_APPLICABLE
                continue
            try:
                outcomes[merge] = self._weight_set(editor, merge)
            except (SpecMismatchError, NotWrittenError):
                raise
            except Exception as error:  # whatever it is, the other weight sets do not depend on it
                text = self._said(weights_id(spec, editor, merge), error)
                outcomes[merge] = text
                if merge is None and spec.chain == "shadow":
                    outcomes |= dict.fromkeys(self.merges, text)
                    break
            finally:
                self._restore(self.base)
                gc.collect()
        baseline = outcomes.get(None)
        if isinstance(baseline, str):
            baseline = None
        for cell in cells_of(spec, editor):
            found = outcomes[cell.merge]
            if cell.route is not None and self.routing_error and not isinstance(found, str):
                found = self.routing_error
            if isinstance(found, str):
                yield self.records.error(cell, found)
                continue
            for point, rows in found.items():
                routes = None
                if cell.route is not None:
                    routes = [route for route, _ in self.routes[point][route_id(spec, cell.route)]]
                yield from self.records.cell(
                    cell,
                    rows,
                    point=point,
                    unedited=[self.unedited[i] for i in self._scored(point)],
                    baseline=baseline[point] if baseline and cell.name != "baseline" else None,
                    routes=routes,
                )
            yield from self._task_records(cell)
            yield from self._probe_records(cell)

    def _said(self, what: str, error: Exception) -> str:
        """An error as one line, shown and kept; its traceback is in the log."""
        logger.info("%s failed", what, exc_info=error)
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.display.say(f"{what} failed: {text}")
        return text

    def _weight_set(self, editor: str, merge: Merge | None) -> Outcomes:
        """Outcomes of one editor's weights, merged or unmerged (None), at every point."""
        name = weights_id(self.spec, editor, merge)
        if merge is None:
            self._edit(editor, editor, None)
            if not {"baseline", "+R"} & set(self.spec.cells):
                return {}  # edited only for what is merged from it
        elif self.spec.chain == "merged":
            self._edit(editor, name, merge)
        elif needs_keys(self.spec, merge):
            self._take_keys(editor)
        outcomes: Outcomes = {}
        history, done, seconds = self.replay.history(editor, merge), 0, 0.0
        for point in self.points:
            merging = (
                self.display.stage(f"merge {editor} by {merge}, batch {point}") if merge else nullcontext()
            )
            with merging:
                start = time.monotonic()
                for after in islice(history, point - done):
                    weights = after
                done, seconds = point, seconds + time.monotonic() - start
            shown, notes = self.replay.released(editor, merge, weights)
            if notes:
                self._measured(editor, **notes)
            outcomes[point] = self._outcomes(name, shown, point)
        self._ability(name, shown)
        if merge is not None:
            self.folder.info["timings"][f"merge {name}"] = round(seconds, 3)
            self.folder.note()
        return outcomes

    def _take_keys(self, editor: str) -> None:
        """Store the keys of every batch of the unmerged chain, where they are not stored yet."""
        numbers = range(1, len(self.batches) + 1)
        missing = [batch for batch in numbers if not keys_path(self.out, editor, batch).is_file()]
        if not missing:
            return
        self._gathered()  # while the model is unedited
        with self.display.stage(f"keys {editor}", total=len(missing)) as stage:
            steps = Steps(self.replay, editor, None)
            for batch in range(1, missing[-1] + 1):
                after = steps.step(batch, self.replay.delta(editor, batch))
                if batch in missing:
                    self._restore(after)
                    self._write_keys(editor, editor, batch)
                    stage.update(missing.index(batch) + 1)
            self.timed(f"keys {editor}", stage)

    def _write_keys(self, editor: str, chain: str, batch: int) -> None:
        """Store the keys of one batch on the model as it is."""
        cases = self.batches[batch - 1]
        statistics = self._gathered()
        assert statistics is not None, "a merger that needs keys has statistics gathered"
        if self._solver is None:
            self._solver = Solver(statistics.covariance, device_of(self.loaded.model))
        write_keys(
            keys_path(self.out, chain, batch),
            self.loaded,
            self.spec.editor(editor),
            [case.request for case in cases],
            self._solver,
            state=state_path(self.out, chain),
            run=self.folder.info["run_id"],
            case_ids=json.dumps([case.case_id for case in cases]),
        )

    def _edit(self, editor: str, chain: str, merge: Merge | None) -> None:
        """Edit batch after batch from the unedited weights, as far as that is not done; the deltas stay.

        chain: name of the delta folder; merge: of the merged chain, None for the unmerged one.
        """
        steps, state, done = self._resumed(chain, merge)
        if done == len(self.batches):
            return
        statistics = self._gathered()
        self._restore(self.base)
        with self.display.stage(f"edit with {chain}", total=len(self.batches)) as stage:
            stream = start_stream(
                self.spec.editor(editor),
                self.loaded,
                statistics=statistics,
                seed=self.spec.seed,
                progress=lambda what, part, of: self._tell(stage, what, part / of),
                targets=self.kept_targets,
            )
            if done or state:
                stream.restore(state)
                self._restore(steps.weights)
            else:
                write_state(state_path(self.out, chain), stream.state(), 0)
            start, saved = time.perf_counter(), self.kept_targets.saved_seconds
            for batch in range(done + 1, len(self.batches) + 1):
                stage.update(batch - 1)
                try:
                    self._edit_batch(stream, editor, chain, batch, steps, merge)
                except FloatingPointError as error:
                    kept = f"; those before it are kept: 1 to {batch - 1}" if batch > 1 else ""
                    raise FloatingPointError(f"batch {batch}: {error}{kept}") from error
            seconds = time.perf_counter() - start + self.kept_targets.saved_seconds - saved  # as if alone
            edited = (len(self.batches) - done) * self.spec.batch_size
            self.folder.info["passes"] = asdict(self.passes)
            self._measured(chain, edit_seconds_per_edit=seconds / edited, **stream.notes())
            self.timed(f"edit {chain}", stage)

    def _edit_batch(
        self, stream: EditStream, editor: str, chain: str, batch: int, steps: Steps, merge: Merge | None
    ) -> None:
        """Write one batch (from 1) into the model and onto disk."""
        cases, run_id = self.batches[batch - 1], self.folder.info["run_id"]
        ids, before = [case.case_id for case in cases], tensors_digest(steps.weights)
        checkpoint = BatchCheckpoint(
            parts_folder(self.out, chain, batch),
            {"run": run_id, "case_ids": json.dumps(ids), "digest_before": before},
        )
        self._before = before, self._versions()
        delta = stream.edit([case.request for case in cases], checkpoint)
        if merge is not None and needs_keys(self.spec, merge):  # on the model as the batch left it
            self._write_keys(editor, chain, batch)
        after = steps.step(batch, {name: dense(change) for name, change in delta.items()})
        if merge is not None:
            self._restore(after)
        write_delta(
            delta_path(self.out, chain, batch),
            delta,
            editor=editor,
            case_ids=ids,
            run=run_id,
            digest_before=before,
            digest_after=tensors_digest(after),
        )
        if batch < len(self.batches):
            write_state(state_path(self.out, chain), stream.state(), batch)
        checkpoint.clear()
        give_back_freed()

    def _versions(self) -> tuple[int, ...]:
        """Counters that PyTorch raises whenever an edited parameter is written to."""
        return tuple(self.loaded.model.get_parameter(name)._version for name in self.base)

    def _weights_before(self) -> str | None:
        """The digest of the weights that a batch began on; None once it has changed any."""
        digest, versions = self._before or (None, ())
        return digest if versions == self._versions() else None

    def _resumed(self, chain: str, merge: Merge | None) -> tuple[Steps, dict[str, Tensor], int]:
        """Weights and the editor's state after the batches that are on disk, and how many these are."""
        done = 0
        while done < len(self.batches) and delta_path(self.out, chain, done + 1).is_file():
            done += 1
        state: dict[str, Tensor] = {}
        if done < len(self.batches):
            state, settled = read_state(state_path(self.out, chain))
            if settled > done:  # a state beyond the last delta fits none before it
                state, settled = {}, 0
            done = settled
        steps = Steps(self.replay, chain, merge)
        for batch in range(1, done + 1):
            steps.step(batch, self.replay.delta(chain, batch, before=tensors_digest(steps.weights)))
        return steps, state, done

    def _restore(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.loaded.model.get_parameter(name).copy_(value)

    def _gathered(self) -> Statistics | None:
        """The statistics of all edited layers, gathered at their first use; None if no editor names any."""
        if self.statistics is None and self.layers:
            self.statistics = self._statistics()
        return self.statistics

    def _statistics(self) -> Statistics:
        spec, loaded = self.spec, self.loaded
        with self.display.stage("statistics") as stage:

            def progress(done: int, total: int) -> None:
                stage.update(done / total)

            found = statistics_of(spec, loaded, self.layers, progress=progress)
            self.timed("statistics", stage)
        tokens, width, corpus = found.tokens, _key_width(loaded, self.layers[0]), found.corpus
        if tokens < TOKENS_PER_WIDTH * width:
            self.notes.append(
                f"The statistics are from {tokens:,} tokens, less than {TOKENS_PER_WIDTH} times the "
                f"{width:,} directions of a key: directions not seen look unused."
            )
        self.folder.same("statistics", {"corpus": corpus.name, "digest": corpus.digest, "tokens": tokens})
        return found

    # -- scores -------------------------------------------------------------------------------------------

    def _outcomes(self, name: str, weights: Weights, point: int) -> list[Row]:
        """Every prompt scored under one weight set after so many batches, in the model's own precision."""
        path = self._scores_path(name, point)
        if path.is_file():
            return read_lines(path)
        final = point == self.spec.num_batches
        model = self.loaded.model
        cast = {n: value.to(model.dtype) for n, value in weights.items()}
        what = name if final else f"{name} after batch {point}"
        with self.display.stage(f"score {what}") as stage, weights_in_place(model, cast):
            fields = self._fields(name, point, lambda done, total: stage.update(done / total))
            seconds = self.timed(f"score {what}", stage)
        scored = len(fields)
        if self.texts and final:
            with self.display.stage(f"texts {name}") as stage, weights_in_place(model, cast):
                prompts = {f"{row['case_id']}/{row['index']}": row["prompt"] for row in self.texts}
                tell: Progress = lambda done, total: stage.update(done / total)
                texts = sample_texts(
                    model, self.loaded.tokenizer, prompts, seed=self.spec.seed, progress=tell
                )
                fields += [{"text": text} for text in texts]
                self.timed(f"texts {name}", stage)
        edits = 0 if name == "unedited" else point * self.spec.batch_size
        rows = [
            {"weights": name, "edits_applied": edits, **self.prompts[i], **found}
            for i, found in zip(self._scored(point), fields, strict=True)
        ]
        write_lines_gz(path, rows)
        if name in self.spec.editors and final:
            self._measured(name, inference_seconds_per_sample=seconds / scored)
        return rows

    def _scores_path(self, name: str, point: int) -> Path:
        final = point == self.spec.num_batches
        folder = self.out / "scores" if final else self.out / "scores" / f"after-{point:04d}"
        return folder / f"{name}.jsonl.gz"

    def _fields(self, name: str, point: int, progress: Progress) -> list[Row]:
        """What every prompt's row says under the weights that are in the model, by its schema."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if self.knowedit:
            probes = [(row, probe) for row, probe in self.probes if row["batch"] <= point]
            unedited = None if name == "unedited" else [self.unedited[i] for i in self._scored(point)]
            return probe_fields(model, tokenizer, probes, unedited=unedited, progress=progress)
        queries = [query for row, query in self.queries if row["batch"] <= point]
        return [answer_fields(answer) for answer in score(model, tokenizer, queries, progress=progress)]

    def _ability(self, name: str, weights: Weights) -> None:
        """The general tasks under one weight set; an error costs only their own records."""
        if self.suite is None:
            return
        path = self.out / "scores" / "tasks" / f"{name}.jsonl.gz"
        if path.is_file():
            self.task_rows[name] = read_lines(path)
            return
        from harness.capability import Evaluator

        model = self.loaded.model
        cast = {n: value.to(model.dtype) for n, value in weights.items()}
        try:
            with self.display.stage(f"general tasks with {name}") as stage:
                if self._evaluator is None:
                    self._evaluator = Evaluator(
                        self.suite, model, self.loaded.tokenizer, changing=list(self.base)
                    )
                with weights_in_place(model, cast):
                    found = self._evaluator.rows()
                self.timed(f"general tasks with {name}", stage)
            done = {"weights": name, "edits_applied": 0 if name == "unedited" else self.spec.edits}
            rows = [{**done, **row} for row in found]
            write_lines_gz(path, rows)
            self.task_rows[name] = rows
        except NotWrittenError:
            raise
        except Exception as error:  # the scores of the edits do not depend on it
            self.task_rows[name] = self._said(f"general tasks with {name}", error)

    def _task_records(self, cell: Cell | None) -> Iterator[Record]:
        """Records of a cell's general tasks, read off the stored outcomes; None: of the unedited model."""
        if self.suite is None:
            return
        unedited, rows = self.task_rows["unedited"], self.task_rows["unedited"]
        if cell is not None:
            rows = self.task_rows[weights_id(self.spec, cell.editor, cell.merge)]
        if isinstance(unedited, str) or isinstance(rows, str):
            text = rows if isinstance(rows, str) else f"the unedited model's tasks failed: {unedited}"
            for name in self.suite.names:
                yield self.records.error(cell, text, f"task:{name}")
        elif cell is None:
            yield from self.records.tasks(None, rows)
        else:
            routes = None
            if cell.route is not None:
                routes = [route for route, _ in self.task_routes[route_id(self.spec, cell.route)]]
            yield from self.records.tasks(cell, rows, unedited=unedited, routes=routes)

    def _probe_records(self, cell: Cell) -> Iterator[Record]:
        """The record of a routed cell's probes, which no weights have a part in."""
        if self.route_probes and cell.route is not None:
            sent = [route == "edited" for route, _ in self.probe_routes[route_id(self.spec, cell.route)]]
            yield self.records.probes(cell, self.route_probes, sent)

    def _stored_tasks(self, name: str) -> list[Row]:
        rows = self.task_rows.get(name, [])
        return [] if isinstance(rows, str) else rows

    def _case_rows(self) -> Iterator[Row]:
        """All scored prompts under all weight sets, with their routes, from the stored parts."""
        yield from self.unedited
        yield from self._stored_tasks("unedited")
        edits = self.spec.edits
        yield from self._with_routes(probe_rows(self.route_probes, edits), self.probe_routes)
        for editor in self.spec.editors:
            for merge in (None, *self.merges):
                name = weights_id(self.spec, editor, merge)
                for point in self.points:
                    path = self._scores_path(name, point)
                    if path.is_file():
                        yield from self._with_routes(read_lines(path), self.routes.get(point, {}))
                yield from self._with_routes(self._stored_tasks(name), self.task_routes)

    def _with_routes(self, rows: Sequence[Row], routes: Routes) -> Iterator[Row]:
        """The rows with where they are sent; as they are if nothing is routed."""
        names = list(routes)
        for i, row in enumerate(rows):
            routed: Row = {}
            if row["weights"] == "probes":  # how sure every router is can be compared on these
                routed["route_scores"] = {name: routes[name][i][1] for name in names}
            if names:
                routed["route"], routed["route_score"] = routes[names[0]][i]
            if names[1:]:
                routed["routes"] = {name: routes[name][i][0] for name in names}
            yield row | routed

    def _tell(self, stage: Stage, what: str, share: float) -> None:
        """Progress inside a batch."""
        batch = int(stage.done)
        edits = batch * self.spec.batch_size
        detail = f"batch {batch + 1} of {len(self.batches)}, {edits} of {self.spec.edits} edits done, {what}"
        stage.update(batch + share_of_batch(what, share), detail)

    def _measured(self, name: str, **values: Any) -> None:
        if self.spec.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(self.spec.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        entry = self.folder.info["per_editor"].setdefault(name, {})
        entry |= values | {"peak_memory_bytes": peak}


def place_of_weights(model: PreTrainedModel, names: Sequence[str]) -> torch.device:
    """Where the versions of the edited weights are kept: beside the model if it has room for many of them."""
    device = device_of(model)
    if device.type == "cuda":
        needed = WEIGHT_VERSIONS * sum(model.get_parameter(n).numel() * 4 for n in names)
        if torch.cuda.mem_get_info(device)[0] < needed + WORKING_BYTES:
            return torch.device("cpu")
    return device


def passes_for(model: PreTrainedModel, known: Mapping[str, int] | None) -> Passes:
    """How many rows run together: as the run began with; on a new one, on an accelerator by free memory."""
    if known:
        return Passes(**known)
    device = device_of(model)
    if device.type != "cuda":
        return Passes()
    return Passes.fitting(model, torch.cuda.mem_get_info(device)[0])


def _named(decisions: Mapping[str, Sequence[Decision]]) -> Routes:
    """Decisions as rows have them."""
    return {name: [(d.expert or "unedited", d.score) for d in made] for name, made in decisions.items()}


def probes_of(
    spec: RunSpec, dataset: Dataset, selection: Selection, suite: "Suite | None"
) -> list[RouteProbe]:
    """What the routers are asked beside the scored prompts."""
    known = {case.case_id for case in (*selection.cases, *selection.negatives)}
    others = [case for case in dataset.cases if case.case_id not in known]
    corpus = str(SAMPLES / "smollm2-135m.jsonl.gz") if spec.stats in CORPORA else spec.stats
    texts = [first_sentence(text) for text in read_texts(corpus)]
    random.Random(spec.seed).shuffle(texts)
    return route_probes(
        selection.cases,
        others,
        tasks=[item.prompt for item in suite.items] if suite is not None else (),
        texts=texts[:PROBE_TEXTS],
        seed=spec.seed,
    )


def batch_queries(batches: Sequence[Sequence[EditCase]]) -> Iterator[tuple[Row, Query]]:
    """Every scored prompt of every edited record, with what names it in ``cases.jsonl.gz``."""
    for row, case in prompt_rows(batches, lambda case: case.prompts):
        yield row, Query(row["prompt"], case.request.target_new, case.target_true)


def answer_fields(answer: Answer) -> Row:
    """An answer as ``cases.jsonl.gz`` has it."""
    return {
        "nll_new": answer.new.nll,
        "nll_true": answer.true.nll,
        "sum_nll_new": answer.new.sum_nll,
        "sum_nll_true": answer.true.sum_nll,
        "argmax_new": answer.new.argmax,
        "argmax_true": answer.true.argmax,
        "tokens_new": answer.new.tokens,
        "tokens_true": answer.true.tokens,
        "tokens_right_new": answer.new.tokens_right,
        "tokens_right_true": answer.true.tokens_right,
    }
