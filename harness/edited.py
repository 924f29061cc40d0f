"""A folder of edited facts: batch after batch into one model, taken back again, and put up to be served.

facts.jsonl says which facts are to be in the weights, and in which batch. A batch is done when its change
lies below deltas/ and was made of just these facts on just the weights that those before it give. What is
not done is edited, whatever stopped it before; so taking a fact back means to edit its batch and all later
ones again without it, and the weights are those of a folder that never had it. The router sends its prompt to
the unedited model from then on (docs/editing.md).
"""

import hashlib
import json
import random
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editors import dense
from editors.sites import device_of
from harness.check import Asked, check, general_queries
from harness.data import Dataset, load_dataset
from harness.deltas import (
    BatchCheckpoint,
    delta_path,
    parts_folder,
    read_state,
    stored_delta,
    write_delta,
    write_state,
)
from harness.digested import content_digest, write_digested
from harness.encoders import CachedEncoder, encoder
from harness.factfile import Fact
from harness.folder import locked, software
from harness.grid import NO_MERGE, merges_of, needs_keys
from harness.kept_targets import KeptTargets
from harness.keys import Solver, keys_path, write_keys
from harness.models import (
    LoadedModel,
    find_model,
    load_model,
    model_config,
    ready_to_edit,
    tensors_digest,
    weights_in_place,
)
from harness.paths import cache_folder, read_lines, shown, write_json, write_text
from harness.progress import Display
from harness.replay import Replay, Weights, added, edited_parameters
from harness.run import (
    check_layers,
    give_back_freed,
    passes_for,
    place_of_weights,
    share_of_batch,
    start_stream,
    statistics_of,
)
from harness.served import MANIFEST, Manifest, RememberedTexts, load_base
from harness.sparse import changed_entries
from harness.spec import RunSpec
from routing import Subject, build

FACTS, REMOVED = "facts.jsonl", "removed.jsonl"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one call asks for."""

    facts: Sequence[Fact] = ()  # to be added
    remove: Sequence[str] = ()  # ids, as texts
    rollback: int | None = None  # keep so many batches
    unrelated: Sequence[str] | None = None  # texts for the unedited model; None: of the embedded facts
    batch_size: int = 1


class Batches:
    """Which facts are in which batch; every change of it is written before anything is edited."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if facts.jsonl is broken."""
        self.path, self.removed_path = folder / FACTS, folder / REMOVED
        self.facts: list[list[Fact]] = []
        self.removed = [
            Fact.from_json(record, f"{self.removed_path}, record {number}", number)
            for number, record in enumerate(_lines(self.removed_path), start=1)
        ]
        for number, record in enumerate(_lines(self.path), start=1):
            where = f"{self.path}, record {number}"
            batch = record.pop("batch", None)
            if not isinstance(batch, int) or batch - len(self.facts) not in (0, 1) or batch < 1:
                raise ValueError(f"{where}: batch is {shown(batch)}; the file was changed, restore it")
            if batch > len(self.facts):
                self.facts.append([])
            self.facts[-1].append(Fact.from_json(record, where, number))

    @property
    def every(self) -> list[Fact]:
        return [fact for batch in self.facts for fact in batch]

    @property
    def in_force(self) -> list[Fact]:
        """Without those whose prompt a later fact gives another target."""
        return list({fact.text: fact for fact in self.every}.values())

    def next_number(self) -> int:
        """The id of the next fact that names none."""
        numbers = [int(name) for fact in self.every if (name := str(fact.id)).isdecimal()]
        return 1 + max(numbers, default=0)

    def change(self, wanted: Wanted, served: Collection[str] = ()) -> list[str]:
        """Take back and add; what is to be said of it. ValueError for what cannot be done.

        served: ids that were in the weights last; to take such a one back again is no mistake.
        """
        said: list[str] = []
        if wanted.rollback is not None:
            if not 0 <= wanted.rollback <= len(self.facts):
                raise ValueError(
                    f"--rollback is {wanted.rollback}; the folder has batches 1 to {len(self.facts)}, and 0 "
                    "takes all back"
                )
            gone = [fact for batch in self.facts[wanted.rollback :] for fact in batch]
            said.append(f"taken back: {len(gone)} facts of {len(self.facts) - wanted.rollback} batches")
            self.removed += gone
            self.facts = self.facts[: wanted.rollback]
        ids = {str(fact.id): fact for fact in self.every}
        for name in wanted.remove:
            if name not in ids and name in served:
                continue  # taken back by a call that was stopped
            if name not in ids:
                few = ", ".join(list(ids)[:10]) + (", ..." if len(ids) > 10 else "")
                raise ValueError(f"--remove is {shown(name)}; the folder has the facts {few or 'none'}")
            said.append(f"taken back: {name} ({ids[name].text} {ids[name].target_new})")
            self.removed.append(ids[name])
        kept = [[fact for fact in batch if str(fact.id) not in wanted.remove] for batch in self.facts]
        self.facts = [batch for batch in kept if batch]
        ids = {str(fact.id): fact for fact in self.every}
        now = {fact.text: fact for fact in self.in_force}
        new: list[Fact] = []
        for fact in wanted.facts:
            known = ids.get(str(fact.id))
            if known is not None and not known.same_edit(fact):
                raise ValueError(
                    f"fact {fact.id!r} is in the folder with other words ({known.text} {known.target_new}); "
                    f"give the new one another id, or --remove {known.id} first"
                )
            if known is not None or (fact.text in now and now[fact.text].same_edit(fact)):
                said.append(f"in the folder already: {fact.id} ({fact.text} {fact.target_new})")
                continue
            if fact.text in now:
                said.append(f"{fact.id} takes the place of {now[fact.text].id} ({now[fact.text].target_new})")
            new.append(fact)
        size = wanted.batch_size
        self.facts += [new[start : start + size] for start in range(0, len(new), size)]
        texts = {fact.text for fact in self.every}
        self.removed = list({fact.text: fact for fact in self.removed if fact.text not in texts}.values())
        return said

    def write(self) -> None:
        """Put all on disk; what is taken back first, so that no fact is ever in neither file."""
        write_text(self.removed_path, "".join(_line(fact.as_json()) for fact in self.removed))
        lines = [
            _line({**fact.as_json(), "batch": number})
            for number, batch in enumerate(self.facts, start=1)
            for fact in batch
        ]
        write_text(self.path, "".join(lines))


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none if it is not there or empty."""
    return read_lines(path) if path.is_file() and path.stat().st_size else []


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def update_folder(
    out: Path, spec: RunSpec, wanted: Wanted, *, display: Display | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Bring a folder to what is asked for; its check, and what is to be said of the facts.

    Raises ValueError in one line, before any model is loaded, for what cannot be done.
    """
    display = display or Display()
    torch.set_float32_matmul_precision("highest")
    with locked(out), display.live():
        manifest = Manifest.read(out) if (out / MANIFEST).is_file() else None
        batches = Batches(out)
        served = [str(id) for batch in manifest.info["batches"] for id in batch] if manifest else []
        said = batches.change(wanted, served)
        if manifest is None and not batches.facts:
            raise ValueError(f"{str(out)!r} has no facts yet; name a file of them: --facts FILE")
        source = find_model(spec.model)
        if manifest is None:
            check_layers(spec, model_config(source))
        embed = encoder(spec.encoder, cache=cache_folder("embeddings"), device=spec.device)
        if manifest is not None and manifest.info["encoder"] != embed.identity:
            raise ValueError(
                f"{str(out)!r} was made with encoder {manifest.info['encoder']!r}, here it is "
                f"{embed.identity!r}; give it the encoder it was made with"
            )
        unrelated = wanted.unrelated
        if unrelated is None and manifest is not None and manifest.info["unrelated_given"]:
            unrelated = manifest.info["unrelated_given"]
        batches.write()
        with display.stage(f"load {spec.model}"):
            if manifest is not None:
                loaded = load_base(manifest, spec.device)
            else:
                dtype = getattr(torch, spec.dtype)
                loaded = load_model(spec.model, source, dtype=dtype, device=spec.device)
        work = _Work(out, spec, display, loaded, batches, manifest)
        work.edit()
        found = work.publish(embed, unrelated)
    return found, said


class _Work:
    """One call's work on a folder."""

    def __init__(
        self, out: Path, spec: RunSpec, display: Display, loaded: LoadedModel, batches: Batches,
        manifest: Manifest | None,
    ) -> None:  # fmt: skip
        self.out, self.spec, self.display, self.loaded, self.batches = out, spec, display, loaded, batches
        self.editor = spec.editors[0]
        self.merge = None if self.editor in NO_MERGE else merges_of(spec)[0]
        self.keyed = self.merge is not None and needs_keys(spec, self.merge)
        self.info = dict(manifest.info) if manifest else {}
        names = edited_parameters(spec, loaded.model)
        ready_to_edit(loaded.model, names)
        place = place_of_weights(loaded.model, names)
        self.base: Weights = {n: loaded.model.get_parameter(n).detach().to(place, copy=True) for n in names}
        self.replay = Replay(folder=out, spec=spec, base=self.base, device=device_of(loaded.model))
        self.passes = passes_for(loaded.model, self.info.get("passes"))
        self.seconds: dict[str, float] = {}

    # -- editing ------------------------------------------------------------------------------------------

    def edit(self) -> None:
        """Edit what is not done."""
        done, weights = self._done()
        self._remove_after(done)
        total = len(self.batches.facts)
        if done == total:
            return
        kind: Any = self.spec.editor(self.editor)
        statistics, layers = None, kind.config.layers if self.keyed else kind.statistics()
        if layers:
            with self.display.stage("statistics") as stage:
                statistics = statistics_of(
                    self.spec, self.loaded, layers, progress=lambda n, of: stage.update(n / of)
                )
        start = time.monotonic()
        with self.display.stage("edit", total=total - done) as stage:

            def tell(what: str, part: int, of: int) -> None:
                stage.update(int(stage.done) + share_of_batch(what, part / of), what)

            stream = start_stream(
                kind, self.loaded, statistics=statistics, seed=self.spec.seed, progress=tell,
                targets=KeptTargets(lambda: None, self.passes),
            )  # fmt: skip
            if done or self._state_path(0).is_file():
                state, _ = read_state(self._state_path(done))
                stream.restore(state)
            else:
                write_state(self._state_path(0), stream.state(), 0)
            self._put(weights)
            solver = Solver(statistics.covariance, device_of(self.loaded.model)) if statistics else None
            for number in range(done + 1, total + 1):
                stage.update(number - done - 1)
                weights = self._edit_batch(stream, number, weights, solver)
        self.seconds["edit"] = round(time.monotonic() - start, 3)
        self.info["passes"] = asdict(self.passes)

    def _edit_batch(self, stream: Any, number: int, weights: Weights, solver: Solver | None) -> Weights:
        facts = self.batches.facts[number - 1]
        ids, before = [fact.id for fact in facts], tensors_digest(weights)
        made_of = {"run": self.spec.digest(), "facts": _digest(facts), "digest_before": before}
        checkpoint = BatchCheckpoint(parts_folder(self.out, self.editor, number), made_of)
        try:
            delta = stream.edit([fact.request for fact in facts], checkpoint)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"batch {number} ({_few(ids)}): {error}; --remove takes facts out"
            ) from error
        after = added(weights, {name: dense(change) for name, change in delta.items()})
        if self.keyed:
            assert solver is not None, "a merger that needs keys has statistics gathered"
            write_keys(
                self._keys_path(number),
                self.loaded,
                self.spec.editor(self.editor),
                [fact.request for fact in facts],
                solver,
                state=self._state_path(0),
                facts=made_of["facts"],
                digest_before=before,
            )
        path = delta_path(self.out, self.editor, number)
        write_state(self._state_path(number), stream.state(), number)
        write_delta(
            path, delta, editor=self.editor, case_ids=ids, **made_of, digest_after=tensors_digest(after)
        )
        checkpoint.clear()
        give_back_freed()
        return after

    def _done(self) -> tuple[int, Weights]:
        """How many batches are as they should be, and the unmerged weights after them."""
        done, weights = 0, dict(self.base)
        for number, facts in enumerate(self.batches.facts, start=1):
            path = delta_path(self.out, self.editor, number)
            needed = [path, self._state_path(number), *([self._keys_path(number)] if self.keyed else [])]
            if not all(one.is_file() for one in needed):
                break
            said = stored_delta(path)[1]
            if said.get("facts") != _digest(facts) or said["digest_before"] != tensors_digest(weights):
                break
            weights = added(weights, self.replay.delta(self.editor, number))
            done = number
        return done, weights

    def _remove_after(self, done: int) -> None:
        """Remove what later batches left that are no longer as they should be."""
        for path in (self.out / "deltas").rglob("batch-*.safetensors"):
            if int(path.stem.removeprefix("batch-")) > done:
                number = int(path.stem.removeprefix("batch-"))
                path.unlink()
                self._state_path(number).unlink(missing_ok=True)
                self._keys_path(number).unlink(missing_ok=True)

    def _state_path(self, number: int) -> Path:
        return self.out / "state" / self.editor / f"after-{number:04d}.safetensors"

    def _keys_path(self, number: int) -> Path:
        return keys_path(self.out, self.editor, number)

    def _put(self, weights: Weights) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self.loaded.model.get_parameter(name).copy_(value)

    # -- what is served -----------------------------------------------------------------------------------

    def publish(self, embed: CachedEncoder, given: Sequence[str] | None) -> dict[str, Any]:
        """Write what is served, and check it; the check."""
        self._put(self.base)
        model, spec = self.loaded.model, self.spec
        with self.display.stage("merge"):
            weights = self.base
            for after in self.replay.history(self.editor, self.merge, range(1, len(self.batches.facts) + 1)):
                weights = after
            weights, _ = self.replay.released(self.editor, self.merge, weights)
            cast = {name: value.to(model.dtype) for name, value in weights.items()}
            base = {name: value.to(model.dtype) for name, value in self.base.items()}
            entries = changed_entries(base, cast)
        facts, embedded = self.batches.every, load_dataset("facts")
        texts = [(fact.text, fact.id) for fact in self.batches.in_force]
        unrelated = list(given) if given is not None else drawn(embedded, facts, spec)
        unrelated += [fact.text for fact in self.batches.removed]
        corpus: list[tuple[str, int | str | None]] = [*texts, *((text, None) for text in unrelated)]
        known = RememberedTexts(embed)
        subjects = [Subject(name=fact.subject, aliases=fact.aliases) for fact in self.batches.in_force]
        router = build(spec.router[0], known, spec.router_settings(spec.top_k[0]))
        router.add("edited", [text for text, _ in texts], subjects)
        router.add(None, unrelated)
        weights_file = self._put_away("edits", entries, {"model": self.loaded.digest})
        said = {
            "encoder": embed.identity,
            "texts": json.dumps(corpus),
            "subjects": json.dumps([[subject.name, *subject.aliases] for subject in subjects]),
            "embedded": json.dumps(list(known.vectors)),
        }
        vectors = torch.stack(list(known.vectors.values())) if known.vectors else torch.empty(0, 0)
        router_file = self._put_away("router", {"vectors": vectors}, said)
        with self.display.stage("check") as stage:
            found = check(
                model,
                self.loaded.tokenizer,
                Asked(
                    facts=self.batches.in_force,
                    general=general_queries(embedded, facts, unrelated),
                ),
                unedited=lambda: weights_in_place(model, base),
                edited=lambda: weights_in_place(model, cast),
                route=router.route,
                progress=stage.update,
            )
        write_json(self.out / "check.json", found)
        self._write_manifest(embed, weights_file, router_file, given, found["summary"])
        for path in self.out.glob("*.safetensors"):
            if path.name not in (weights_file, router_file):
                path.unlink()
        for parts in (self.out / "state" / self.editor).glob("batch-*"):
            shutil.rmtree(parts)  # of batches that are no longer wanted
        return found

    def _put_away(self, what: str, tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> str:
        """Write a file under a name of its content, beside the one that is still served; the name."""
        name = f"{what}-{content_digest(tensors, said)[:16]}.safetensors"
        write_digested(self.out / name, tensors, said)
        return name

    def _write_manifest(
        self, embed: CachedEncoder, weights: str, router: str, given: Sequence[str] | None,
        summary: Mapping[str, Any],
    ) -> None:  # fmt: skip
        model = {
            "name": self.spec.model, "revision": self.loaded.revision, "digest": self.loaded.digest,
            "tokenizer_digest": self.loaded.tokenizer_digest,
        }  # fmt: skip
        write_json(self.out / MANIFEST, {
            **self.info,
            "schema_version": SCHEMA_VERSION,
            "run_id": self.spec.digest(),
            "spec": self.spec.as_json(),
            "model": model,
            "encoder": embed.identity,
            "batches": [[fact.id for fact in batch] for batch in self.batches.facts],
            "weights": weights,
            "router": router,
            "unrelated_given": None if given is None else list(given),
            "check": summary,
            "provenance": software(self.spec.device),
        })  # fmt: skip


def drawn(dataset: Dataset, facts: Sequence[Fact], spec: RunSpec) -> list[str]:
    """As many prompts of the embedded facts as there are edits, none about an edited subject.

    They are the first of one seeded order, so that more facts only add to them.
    """
    cases = list(dataset.cases)
    random.Random(spec.seed).shuffle(cases)
    subjects = {fact.subject for fact in facts}
    texts = [case.rewrite_prompt for case in cases if case.request.subject not in subjects]
    return texts[: spec.negatives or len(facts)]


def _digest(facts: Sequence[Fact]) -> str:
    """Of what a batch edits."""
    told = [[fact.id, fact.prompt, fact.subject, fact.target_new] for fact in facts]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _few(ids: Sequence[int | str]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
