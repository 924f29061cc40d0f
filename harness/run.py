"""Carry out a grid: edit once per chain, score each weight set once, and read every cell off the outcomes."""

import gc
import json
import platform
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonlines
import torch
from torch import Tensor

from editors import EDITORS, EditStream, dense
from editors.sites import sites_for
from harness import onednn
from harness.data import load_dataset, select
from harness.deltas import delta_path, read_delta, read_state, state_path, write_delta, write_state
from harness.encoders import encoder
from harness.grid import NO_MERGE, Cell, cells_of, merge_ratios, needs_unmerged, weights_id
from harness.metrics import Table, edit_scores, resampling_counts, route_scores, tabulate_cell
from harness.models import (
    MODELS,
    edit_in_float32,
    find_model,
    load_model,
    model_config,
    tensors_digest,
    weights_in_place,
)
from harness.paths import cache_folder, read_lines, write_json, write_lines_gz
from harness.progress import Display, Stage
from harness.scoring import Query, score
from harness.spec import CORPORA, RunSpec, hyperparameter_source
from harness.stats import Covariance, covariances, load_corpus, read_texts
from merging import MERGERS
from merging.chain import shadow_chain
from reports.record import SCHEMA_VERSION, Record, Score
from reports.render import write_reports
from routing import ROUTERS

Weights = dict[str, Tensor]
Row = dict[str, Any]
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "datasets", "lm_eval", "sentence-transformers")


class SpecMismatch(ValueError):
    """A run folder holds another spec."""


def run_grid(
    spec: RunSpec, *, out: Path, data: str | None = None, fresh: bool = False, display: Display | None = None
) -> int:
    """Carry out a spec in a run folder; returns how many cells failed.

    An existing folder of the same spec is continued where it stopped (``fresh``: begun anew). Raises
    ValueError in one line, before any model is loaded, for wrong names, files or sizes.
    """
    return _Run(spec, out, data, fresh, display or Display()).carry_out()


class _Run:
    """One run folder being filled; every step leaves its result on disk and is skipped if it is there."""

    def __init__(self, spec: RunSpec, out: Path, data: str | None, fresh: bool, display: Display) -> None:
        self.spec, self.out, self.display = spec, out, display
        self.source = find_model(spec.model)
        config = model_config(self.source)
        layers = {layer for editor in spec.editors for layer in spec.config(editor).layers}
        count = getattr(config, "num_hidden_layers", None) or config.n_layer
        if max(layers) >= count:
            raise ValueError(f"layers up to {max(layers)} asked, {spec.model} has blocks 0 to {count - 1}")
        self.layers = sorted(layers)
        self.dataset = load_dataset(spec.dataset, data)
        self.selection, self.notes = select(
            self.dataset, edits=spec.edits, negatives=spec.negatives, order=spec.select, seed=spec.seed
        )
        if spec.stats not in CORPORA:
            read_texts(spec.stats)  # refused now if it is broken, not after the model is loaded
        self.embed = (
            encoder(spec.encoder, cache=cache_folder("embeddings"), device=spec.device)
            if spec.routes
            else None
        )
        self.info = self._open(fresh)
        self.batches = [
            self.selection.cases[i : i + spec.batch_size] for i in range(0, spec.edits, spec.batch_size)
        ]
        self.failed = 0

    # -- the folder ---------------------------------------------------------------------------------------

    def _open(self, fresh: bool) -> dict[str, Any]:
        """Create or continue the run folder; its run.json as data."""
        path = self.out / "run.json"
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file, not a folder; give another --out")
        plain = self.spec.as_json() | {"data_digest": self.dataset.digest}
        info: dict[str, Any] = {}
        if path.is_file() and not fresh:
            try:
                info = json.loads(path.read_text("utf-8"))
                then = info["spec"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is broken; give another --out, or --fresh to begin anew") from None
            differ = [
                f"{name}: {then.get(name)!r} there, {plain.get(name)!r} now"
                for name in sorted(then.keys() | plain.keys())
                if then.get(name) != plain.get(name)
            ]
            if differ:
                raise SpecMismatch(
                    f"folder {self.out} holds a run of another spec ({'; '.join(differ)}); "
                    "give another --out, or --fresh to begin anew"
                )
        elif self.out.exists() and any(self.out.iterdir()):
            if not path.is_file():
                raise ValueError(f"folder {self.out} is not empty and holds no run; give another --out")
            _clear(self.out)
        before = info.get("provenance", {})
        info |= {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.spec.digest(),
            "status": "running",
            "spec": plain,
            "model_note": MODELS[self.spec.model].note if self.spec.model in MODELS else None,
            "provenance": self._provenance()
            | {name: before[name] for name in ("model", "statistics") if name in before},
        }
        info.setdefault("timings", {})
        info.setdefault("per_editor", {})
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(path, info)
        except OSError as error:
            raise ValueError(
                f"folder {self.out} cannot be written: {error.strerror}; give another --out"
            ) from None
        return info

    def _provenance(self) -> dict[str, Any]:
        dataset = {
            "name": self.dataset.name, "source": self.dataset.source, "digest": self.dataset.digest,
            "dropped": dict(self.dataset.dropped),
        }  # fmt: skip
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return {
            **_commit(),
            "python": platform.python_version(),
            "packages": versions,
            "machine": {
                "processor": platform.machine(),
                "system": platform.system(),
                "device": _device_name(self.spec),
            },
            "threads": torch.get_num_threads(),
            "dataset": dataset,
            "case_ids": [case.case_id for case in self.selection.cases],
            "negative_ids": [case.case_id for case in self.selection.negatives],
            "hyperparameter_sources": {
                e: hyperparameter_source(self.spec.model, e) for e in self.spec.editors
            },
        }

    def _note(self, **more: Any) -> None:
        self.info |= more
        write_json(self.out / "run.json", self.info)

    # -- the steps ----------------------------------------------------------------------------------------

    def carry_out(self) -> int:
        spec = self.spec
        with self.display.live():
            with self.display.stage(f"load {spec.model}") as stage:
                self.loaded = load_model(
                    spec.model, self.source, dtype=getattr(torch, spec.dtype), device=spec.device
                )
                names = [sites_for(self.loaded.model).weight_name(layer) for layer in self.layers]
                edit_in_float32(self.loaded.model, names)
                packed = onednn.pack_linears(self.loaded.model, leave=set(names)) if onednn.available() else 0
                self.info["provenance"]["onednn_layers"] = packed
                self.base: Weights = {n: self.loaded.model.get_parameter(n).detach().clone() for n in names}
                self._timed("load", stage)
            model = {"name": spec.model, "revision": self.loaded.revision, "digest": self.loaded.digest}
            if (known := self.info["provenance"].get("model", model)) != model:
                raise SpecMismatch(f"folder {self.out} was made with other weights: {known['digest'][:16]}")
            self.info["provenance"]["model"] = model
            self.queries = self._queries()
            self.routes = self._routes() if spec.routes else {}
            self.unedited = self._outcomes("unedited", self.base)
            self._write_records("none", self._unedited_records())
            stats: dict[int, Covariance] | None = None
            for editor in spec.editors:
                try:
                    stats = stats or self._statistics()
                    self._editor(editor, stats)
                except Exception as error:  # whatever it is, the other editors' cells do not depend on it
                    self._fail(editor, error)
                finally:
                    self._restore(self.base)
                    gc.collect()
            self._write_cases()
            self._note(status="failed" if self.failed else "complete", notes=self.notes)
            write_reports(self.out)
        return self.failed

    def _queries(self) -> list[tuple[Row, Query]]:
        """Every scored prompt of every edited record, with what names it in ``cases.jsonl.gz``."""
        queries = []
        for number, batch in enumerate(self.batches, start=1):
            for case in batch:
                for kind, prompts in case.prompts.items():
                    for index, prompt in enumerate(prompts):
                        row = {
                            "case_id": case.case_id,
                            "batch": number,
                            "kind": kind,
                            "index": index,
                            "prompt": prompt,
                        }
                        queries.append((row, Query(prompt, case.request.target_new, case.target_true)))
        return queries

    def _routes(self) -> dict[int, list[tuple[str, float]]]:
        """top-k -> (route, score) of every scored prompt, with the corpus as it is after the last batch."""
        assert self.embed is not None
        spec = self.spec
        config, kind = ROUTERS[spec.router]
        with self.display.stage("route prompts") as stage:
            router = kind(config(top_k=spec.top_k[0]), self.embed)
            router.add("edited", [case.rewrite_prompt for case in self.selection.cases])
            router.add(None, [case.rewrite_prompt for case in self.selection.negatives])
            decisions = router.route_many([row["prompt"] for row, _ in self.queries], spec.top_k)
            self._timed("route", stage)
        return {k: [(d.expert or "unedited", d.score) for d in made] for k, made in decisions.items()}

    def _statistics(self) -> dict[int, Covariance]:
        spec = self.spec
        with self.display.stage("statistics") as stage:
            progress = lambda done, total: stage.update(done / total)
            corpus = load_corpus(
                spec.stats, self.loaded, limit=spec.limit_stats, seed=spec.seed, progress=progress
            )
            found = covariances(self.loaded, self.layers, corpus, limit=spec.limit_stats, progress=progress)
            self._timed("statistics", stage)
        tokens = next(iter(found.values())).tokens
        self.info["provenance"]["statistics"] = {
            "corpus": corpus.name,
            "digest": corpus.digest,
            "tokens": tokens,
        }
        return found

    def _editor(self, editor: str, stats: Mapping[int, Covariance]) -> None:
        """All chains, scores and records of one editor."""
        spec = self.spec
        outcomes: dict[float | None, list[Row]] = {}
        if needs_unmerged(spec):
            weights = self._edit(editor, editor, stats, None)
            if "baseline" in spec.cells or "+R" in spec.cells:
                outcomes[None] = self._outcomes(weights_id(spec, editor, None), weights)
        if editor not in NO_MERGE:
            for ratio in merge_ratios(spec):
                name = weights_id(spec, editor, ratio)
                if spec.chain == "merged":
                    merged = self._edit(editor, name, stats, ratio)
                else:
                    merged = self._merged(editor, ratio)
                outcomes[ratio] = self._outcomes(name, merged)
        self._write_records(editor, self._records(editor, outcomes))

    def _edit(self, editor: str, chain: str, stats: Mapping[int, Covariance], ratio: float | None) -> Weights:
        """Edit batch after batch from the unedited weights; the weights after the last one.

        chain: name of the delta folder; ratio: of the merged chain, None for the unmerged one.
        """
        spec, model = self.spec, self.loaded.model
        weights = dict(self.base)
        done = 0
        while done < len(self.batches) and delta_path(self.out, chain, done + 1).is_file():
            done += 1
        state, settled = read_state(state_path(self.out, chain))
        if done < len(self.batches):
            done = settled if settled <= done else 0  # a state beyond the last delta fits none before it
            state = state if done else {}
        for batch in range(1, done + 1):
            weights = self._after(weights, read_delta(delta_path(self.out, chain, batch)), ratio)
        if done == len(self.batches):
            return weights
        self._restore(self.base)
        with self.display.stage(f"edit with {chain}", total=len(self.batches)) as stage:
            config, kind = EDITORS[editor][0], EDITORS[editor][1]
            current = [done]

            def progress(what: str, part: int, of: int) -> None:
                share = 0.95 * part / of if what == "target values" else 0.95 + 0.05 * part / of
                first = current[0] * spec.batch_size
                stage.update(
                    current[0] + share,
                    f"batch {current[0] + 1} of {len(self.batches)}, {first} of {spec.edits} edits done, {what}",
                )

            stream: EditStream = kind(config(**spec.settings[editor])).start(
                model, self.loaded.tokenizer, covariance=lambda layer: stats[layer].matrix, seed=spec.seed,
                progress=progress,
            )  # fmt: skip
            if state:
                stream.restore(state)
                self._restore(weights)
            start = time.perf_counter()
            for batch, cases in enumerate(self.batches[done:], start=done + 1):
                before = tensors_digest(weights)
                delta = stream.edit([case.request for case in cases])
                weights = self._after(weights, {n: dense(change) for n, change in delta.items()}, ratio)
                if ratio is not None:
                    self._restore(weights)
                write_delta(
                    delta_path(self.out, chain, batch), delta, editor=editor,
                    case_ids=[case.case_id for case in cases],
                    digest_before=before, digest_after=tensors_digest(weights),
                )  # fmt: skip
                if batch < len(self.batches):
                    write_state(state_path(self.out, chain), stream.state(), batch)
                current[0] = batch
                stage.update(batch)
            seconds = time.perf_counter() - start
            edited = (len(self.batches) - done) * spec.batch_size
            self._measured(
                chain, edit_seconds_per_edit=seconds / edited, contexts=list(stream.contexts.templates)
            )
            self._timed(f"edit {chain}", stage)
        return weights

    def _after(self, weights: Weights, delta: Mapping[str, Tensor], ratio: float | None) -> Weights:
        """Weights after one batch's change, merged under the merged chain."""
        delta = {name: change.to(weights[name].device) for name, change in delta.items()}
        if ratio is None:
            return weights | {name: weights[name] + change for name, change in delta.items()}
        return weights | self._merger(ratio).merge({name: weights[name] for name in delta}, [delta])

    def _merged(self, editor: str, ratio: float) -> Weights:
        """The merged weights after the last batch, replayed from the stored deltas without any forward."""
        with self.display.stage(f"merge {editor} at {ratio:g}") as stage:
            deltas = (read_delta(delta_path(self.out, editor, b)) for b in range(1, len(self.batches) + 1))
            merged: Weights = {}
            for merged in shadow_chain(self._merger(ratio), self.base, deltas):  # noqa: B007
                pass
            self._timed(f"merge {weights_id(self.spec, editor, ratio)}", stage)
        return merged

    def _merger(self, ratio: float) -> Any:
        config, kind = MERGERS[self.spec.merger]
        return kind(config(pruning_ratio=ratio))

    def _restore(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.loaded.model.get_parameter(name).copy_(value)

    def _outcomes(self, name: str, weights: Weights) -> list[Row]:
        """Every prompt scored under one weight set, in the model's own precision."""
        path = self.out / "scores" / f"{name}.jsonl.gz"
        if path.is_file():
            return read_lines(path)
        model = self.loaded.model
        cast = {n: value.to(model.dtype) for n, value in weights.items()}
        with self.display.stage(f"score {name}") as stage, weights_in_place(model, cast):
            answers = score(
                model, self.loaded.tokenizer, [query for _, query in self.queries],
                progress=lambda done, total: stage.update(done / total),
            )  # fmt: skip
            seconds = self._timed(f"score {name}", stage)
        edits = 0 if name == "unedited" else self.spec.edits
        rows = [
            {"weights": name, "edits_applied": edits, **row,
             "nll_new": a.new.nll, "nll_true": a.true.nll, "sum_nll_new": a.new.sum_nll,
             "sum_nll_true": a.true.sum_nll, "argmax_new": a.new.argmax, "argmax_true": a.true.argmax}
            for (row, _), a in zip(self.queries, answers, strict=True)
        ]  # fmt: skip
        write_lines_gz(path, rows)
        self._measured(name, inference_seconds_per_sample=seconds / len(rows))
        return rows

    # -- records ------------------------------------------------------------------------------------------

    def _unedited_records(self) -> list[Record]:
        return self._slices("none", "unedited", self.unedited, None, None, None, None)

    def _records(self, editor: str, outcomes: Mapping[float | None, list[Row]]) -> list[Record]:
        records: list[Record] = []
        for cell in cells_of(self.spec, editor):
            if cell.pruning_ratio is not None and editor in NO_MERGE:
                records.append(
                    self._record(cell.editor, cell.name, "overall", (), cell=cell, error="not applicable")
                )
                continue
            rows = outcomes[cell.pruning_ratio]
            baseline = outcomes.get(None) if cell.name != "baseline" else None
            records += self._slices(editor, cell.name, rows, cell, baseline, cell.top_k, cell.pruning_ratio)
        return records

    def _slices(
        self, editor: str, name: str, rows: list[Row], cell: Cell | None, baseline: list[Row] | None,
        top_k: int | None, ratio: float | None,
    ) -> list[Record]:  # fmt: skip
        """Records of one cell: pooled, then batch by batch."""
        started = time.perf_counter()
        routes = [route for route, _ in self.routes[top_k]] if top_k is not None else None
        records = []
        for number in range(len(self.batches) + 1):
            index = [i for i, row in enumerate(rows) if number in (0, row["batch"])]
            pick = lambda values: [values[i] for i in index] if values is not None else None  # noqa: B023
            table = tabulate_cell(pick(rows), pick(self.unedited), pick(routes))
            base: Table | None = tabulate_cell(pick(baseline)) if baseline is not None else None
            counts = resampling_counts(len(table.success), self.spec.seed)
            scores = edit_scores(table, base, counts)
            if routes is not None:
                scores += route_scores(pick(rows), pick(routes), self.spec.seed)
            records.append(
                self._record(
                    editor,
                    name,
                    "overall" if number == 0 else f"batch:{number}",
                    tuple(scores),
                    cell=cell,
                    seconds=time.perf_counter() - started,
                )  # fmt: skip
            )
        return records

    def _record(
        self, editor: str, name: str, part: str, scores: tuple[Score, ...], *, cell: Cell | None = None,
        seconds: float = 0.0, error: str | None = None,
    ) -> Record:  # fmt: skip
        spec = self.spec
        merged = cell is not None and cell.pruning_ratio is not None
        routed = cell is not None and cell.top_k is not None
        return Record(
            run_id=self.info["run_id"], model=spec.model, dataset=spec.dataset, editor=editor, cell=name,
            chain=spec.chain if merged else None, pruning_ratio=cell.pruning_ratio if cell else None,
            top_k=cell.top_k if cell else None, encoder=spec.encoder if routed else None, seed=spec.seed,
            edits_applied=0 if editor == "none" else spec.edits, slice=part, scores=scores, seconds=seconds,
            spec=self.info["run_id"], provenance=self.loaded.digest, error=error,
        )  # fmt: skip

    def _fail(self, editor: str, error: Exception) -> None:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        self.display.say(f"{editor} failed: {text}")
        self.failed += 1
        records = [
            self._record(editor, cell.name, "overall", (), cell=cell, error=text)
            for cell in cells_of(self.spec, editor)
        ]
        self._write_records(editor, records)

    def _write_records(self, editor: str, records: Sequence[Record]) -> None:
        """Replace an editor's lines in records.jsonl by these."""
        path = self.out / "records.jsonl"
        kept: list[dict[str, Any]] = []
        if path.is_file():
            with jsonlines.open(path) as reader:
                kept = [line for line in reader if line["editor"] != editor]
        order = ("none", *self.spec.editors)
        kept += [record.to_json() for record in records]
        kept.sort(key=lambda line: order.index(line["editor"]))
        temporary = path.with_suffix(".part")
        with jsonlines.open(temporary, "w") as writer:
            writer.write_all(kept)
        temporary.replace(path)

    def _write_cases(self) -> None:
        """All scored prompts under all weight sets, with their routes, from the stored parts."""
        write_lines_gz(self.out / "cases.jsonl.gz", self._case_rows())

    def _case_rows(self) -> Iterator[Row]:
        yield from self.unedited
        for editor in self.spec.editors:
            for ratio in (None, *merge_ratios(self.spec)):
                path = self.out / "scores" / f"{weights_id(self.spec, editor, ratio)}.jsonl.gz"
                if not path.is_file():
                    continue
                for i, row in enumerate(read_lines(path)):
                    if self.routes:
                        route, value = self.routes[self.spec.top_k[0]][i]
                        row |= {"route": route, "route_score": value}
                        if len(self.spec.top_k) > 1:
                            row["routes"] = {str(k): self.routes[k][i][0] for k in self.spec.top_k}
                    yield row

    def _timed(self, name: str, stage: Stage) -> float:
        seconds = time.monotonic() - stage.start
        self.info["timings"][name] = round(seconds, 3)
        self._note()
        return seconds

    def _measured(self, chain: str, **values: Any) -> None:
        peak = (
            torch.cuda.max_memory_allocated()
            if self.spec.device.startswith("cuda")
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        entry = self.info["per_editor"].setdefault(chain, {})
        entry |= values | {"peak_memory_bytes": peak}


def _clear(folder: Path) -> None:
    """Remove a run's own files; anything else in the folder is left."""
    import shutil

    for name in ("deltas", "state", "scores"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "records.jsonl", "cases.jsonl.gz", "report.md", "report.tex", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _commit() -> dict[str, Any]:
    """The project's commit and whether the tree differs from it; None outside a checkout."""
    root = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _device_name(spec: RunSpec) -> str:
    return torch.cuda.get_device_name() if spec.device.startswith("cuda") else platform.processor() or "cpu"
