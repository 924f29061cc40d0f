"""``python -m harness.ledger RUN|DIR show|verify|rollback|replay|export``: the record of changes.

RUN is a run folder, DIR one that harness.edit made. It reads run.json or manifest.json and the deltas, and
makes weights again without any forward. docs/ledger.md says what each action checks and writes.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.arguments import OneLineParser, one_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from editors import LowRank
    from harness.grid import Merge
    from harness.models import LoadedModel
    from harness.replay import Replay, Weights
    from harness.served import Manifest
    from harness.spec import RunSpec

SHOWN = 12  # characters of a digest
CELLS = ("baseline", "+MM")
Delta = dict[str, "Tensor | LowRank"]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Batches that were made one after another."""

    name: str  # of the folder below deltas/
    editor: str
    merge: "Merge | None"  # of the merged chain; None: unmerged

    @property
    def cell(self) -> str:
        return CELLS[self.merge is not None]


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A folder of changes, read; nothing in it is written."""

    folder: Path
    info: Mapping[str, Any]
    spec: "RunSpec"
    model: Mapping[str, Any]  # name, revision and digest of the unedited model
    batches: Sequence[Sequence[int | str]]  # case ids by batch
    manifest: "Manifest | None" = None  # of a folder that harness.edit made

    @classmethod
    def open(cls, folder: Path) -> "Ledger":
        """Raises ValueError in one line if the folder holds no record that can be read."""
        from harness.served import MANIFEST, Manifest
        from harness.spec import RunSpec

        if (folder / MANIFEST).is_file():
            made = Manifest.read(folder)
            return cls(
                folder=folder, info=made.info, spec=made.spec, model=made.info["model"],
                batches=made.info["batches"], manifest=made,
            )  # fmt: skip
        path = folder / "run.json"
        if not path.is_file():
            raise ValueError(
                f"{str(folder)!r} holds no run: it has no run.json; give a run folder, or one of harness.edit"
            )
        try:
            info = json.loads(path.read_text("utf-8"))
            spec = RunSpec.from_json(info["spec"])
            ids, model = info["provenance"]["case_ids"], info["provenance"]["model"]
            if len(ids) != spec.edits or not isinstance(info["run_id"], str):
                raise ValueError(f"{len(ids)} case ids for {spec.edits} edits")
            _ = model["digest"], model["revision"]
        except KeyError as error:
            raise ValueError(
                f"{path} has no field {error}: it stopped early, or is of another version; let it go on, "
                "or give another run folder"
            ) from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; give another run folder") from None
        size = spec.batch_size
        batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        return cls(folder=folder, info=info, spec=spec, model=model, batches=batches)

    @cached_property
    def chains(self) -> list[Chain]:
        """All chains of the run in the order of its editors."""
        from harness.grid import NO_MERGE, merges_of, needs_unmerged, weights_id

        found = []
        for editor in self.spec.editors:
            if needs_unmerged(self.spec):
                found.append(Chain(name=editor, editor=editor, merge=None))
            if self.spec.chain == "merged" and editor not in NO_MERGE:
                for merge in merges_of(self.spec):
                    name = weights_id(self.spec, editor, merge)
                    found.append(Chain(name=name, editor=editor, merge=merge))
        return found

    def of_editor(self, editor: str | None) -> list[Chain]:
        """The chains of one editor, of all with None; ValueError if the run has no such editor."""
        if editor is not None and editor not in self.spec.editors:
            raise ValueError(
                f"the run has no editor {editor!r}; known: {', '.join(self.spec.editors)}; give one of them"
            )
        return [chain for chain in self.chains if editor in (None, chain.editor)]

    def case_ids(self, batch: int) -> list[int | str]:
        """Those of one batch (from 1), as run.json or the manifest has them."""
        return list(self.batches[batch - 1])

    def path(self, chain: Chain, batch: int) -> Path:
        """File of one batch's change."""
        from harness.deltas import delta_path

        return delta_path(self.folder, chain.name, batch)

    def entry(self, chain: Chain, batch: int) -> tuple[Delta, dict[str, Any]]:
        """One batch's change as it is stored, and its metadata; ValueError if it cannot be read."""
        from harness.deltas import stored_delta

        path = self.path(chain, batch)
        try:
            delta, metadata = stored_delta(path)
            ids = json.loads(metadata["case_ids"])
            _ = metadata["editor"], metadata["digest_before"], metadata["digest_after"]
        except KeyError as error:
            raise ValueError(f"{path} has no {error}") from None
        except ValueError as error:
            raise ValueError(str(error)) from None
        return delta, metadata | {"case_ids": ids}


def load_base(ledger: Ledger, device: str | None) -> tuple["LoadedModel", "Replay"]:
    """The run's unedited model, and its changes to be made again on it.

    The replay's weights are those that were edited: float32 where the model has less (as edit_in_float32).
    """
    import torch

    from harness.models import load_model
    from harness.replay import Replay, edited_parameters

    device = _present_device(device or ledger.spec.device)
    loaded = load_model(
        ledger.spec.model, _source(ledger), dtype=getattr(torch, ledger.spec.dtype), device=device
    )
    half = (torch.bfloat16, torch.float16)
    base: Weights = {}
    for name in edited_parameters(ledger.spec, loaded.model):
        weight = loaded.model.get_parameter(name).data
        base[name] = weight.float() if weight.dtype in half else weight
    return loaded, Replay(folder=ledger.folder, spec=ledger.spec, base=base, device=torch.device(device))


def _source(ledger: Ledger) -> Any:
    """Where the model is, at the commit that the run found."""
    from harness.models import find_model

    source = find_model(ledger.spec.model)
    return replace(source, revision=source.revision or ledger.model["revision"])


def _present_device(name: str) -> str:
    import torch

    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise ValueError(f"unknown device {name!r}; known: cpu, cuda, cuda:1 ...; give one of them")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not there; give --device cpu, which may round otherwise (docs/ledger.md)"
        )
    return name


def other_model(ledger: Ledger, loaded: "LoadedModel") -> str | None:
    """What is wrong with the unedited model, if anything."""
    recorded = ledger.model["digest"]
    if loaded.digest == recorded:
        return None
    return (
        f"model {ledger.spec.model!r} has the weights {loaded.digest[:SHOWN]}, the run was made on "
        f"{str(recorded)[:SHOWN]}"
    )


def problems(ledger: Ledger, chain: Chain, replay: "Replay | None", last: int | None = None) -> Iterator[str]:
    """All that is wrong with a chain's batches up to ``last``, one line each.

    replay: None where the unedited weights are others, so that nothing can be replayed. Replaying ends at
    the first wrong batch; of the later ones what they say is still checked.
    """
    from harness.deltas import multiplied_out
    from harness.models import tensors_digest
    from harness.replay import Steps

    steps = None if replay is None else Steps(replay, chain.name, chain.merge)
    weights = None if steps is None else steps.weights
    before = None if weights is None else tensors_digest(weights)
    for batch in range(1, (len(ledger.batches) if last is None else last) + 1):
        path = ledger.path(chain, batch)
        try:
            delta, metadata = ledger.entry(chain, batch)
        except ValueError as error:
            yield str(error)
            weights = before = None
            continue
        wanted = ledger.case_ids(batch)
        if metadata["editor"] != chain.editor:
            yield f"{path} is of editor {metadata['editor']!r}, not {chain.editor!r}"
        if metadata["case_ids"] != wanted:
            yield f"{path} names cases {_first(metadata['case_ids'])}, run.json {_first(wanted)}"
        if metadata.get("run", ledger.info["run_id"]) != ledger.info["run_id"]:
            yield f"{path} is of run {metadata['run']}, not {ledger.info['run_id']}"
        if before not in (None, metadata["digest_before"]):
            yield f"{path} was made on weights {metadata['digest_before'][:SHOWN]}, not {before[:SHOWN]}"
            weights = None
        before = metadata["digest_after"]
        if weights is None or steps is None:
            continue
        if odd := [n for n, c in delta.items() if n not in weights or _shape(c) != tuple(weights[n].shape)]:
            yield f"{path} changes {odd[0]}, which the run's editors do not edit in that shape"
            weights = None
            continue
        device = next(iter(weights.values())).device
        try:
            weights = steps.step(batch, multiplied_out(delta, device))
        except ValueError as error:  # of the keys that its merger needs
            yield str(error)
            weights = None
            continue
        found = tensors_digest(weights)
        if found != before:
            yield f"{path} gives weights {found[:SHOWN]}, not {before[:SHOWN]}"
            weights = None


def _shape(change: "Tensor | LowRank") -> tuple[int, ...]:
    from editors import LowRank

    if isinstance(change, LowRank):
        return (change.left.shape[0], change.right.shape[1])
    return tuple(change.shape)


def strays(ledger: Ledger) -> Iterator[str]:
    """Files below deltas/ that belong to no batch of the run."""
    known = {
        ledger.path(chain, batch) for chain in ledger.chains for batch in range(1, len(ledger.batches) + 1)
    }
    for path in sorted((ledger.folder / "deltas").rglob("*.safetensors")):
        if path not in known:
            yield f"{path} belongs to no batch of the run"


# -- the actions --------------------------------------------------------------------------------------------


def show(args: argparse.Namespace) -> int:
    """Print a table of the batches of every chain."""
    ledger = Ledger.open(args.run)
    for chain in ledger.of_editor(args.editor):
        print(_chain_table(ledger, chain))
    return 0


def _chain_table(ledger: Ledger, chain: Chain) -> str:
    """Markdown: a heading, a line per batch, and what cannot be read."""
    from tabulate import tabulate

    headers = (
        "batch", "edits", "cases", "parameters", "rank or density", "Frobenius norm", "before", "after",
        "bytes",
    )  # fmt: skip
    rows: list[list[str | None]] = []
    notes: list[str] = []
    names: list[str] = []
    for batch in range(1, len(ledger.batches) + 1):
        path = ledger.path(chain, batch)
        size = f"{path.stat().st_size:,}" if path.is_file() else None
        try:
            delta, said = ledger.entry(chain, batch)
        except ValueError as error:
            notes.append(one_line(str(error)))
            rows.append([str(batch), *[None] * 7, size])
            continue
        names += [name for name in delta if name not in names]
        rows.append([
            str(batch), str(len(said["case_ids"])), _cell_text(_first(said["case_ids"])), str(len(delta)),
            _form(delta), f"{_norm(delta):.4g}", _cell_text(said["digest_before"][:SHOWN]),
            _cell_text(said["digest_after"][:SHOWN]), size,
        ])  # fmt: skip
    align = ("right", "right", "left", "right", "left", "right", "left", "left", "right")
    table = tabulate(
        rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True, missingval="–"
    )  # fmt: skip
    of = "unmerged" if chain.merge is None else f"merged by {chain.merge} after every batch"
    changed = f"\nParameters: {', '.join(map(_cell_text, names))}\n" if names else ""
    return "\n".join([f"## {chain.name} ({of})\n", table, changed, *(f"- {note}\n" for note in notes)])


def _first(ids: Sequence[Any], count: int = 3) -> str:
    """The first few case ids."""
    return ", ".join(str(i) for i in ids[:count]) + (", ..." if len(ids) > count else "")


def _cell_text(text: str) -> str:
    """A text from a file, in one cell of a Markdown table."""
    text = one_line(text)
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|")):
        text = text.replace(mark, safe)
    return text


def _form(delta: Delta) -> str:
    """Ranks of the factors, and the share of other entries that are not zero."""
    from editors import LowRank

    ranks = {change.left.shape[1] for change in delta.values() if isinstance(change, LowRank)}
    whole = [change for change in delta.values() if not isinstance(change, LowRank)]
    parts = []
    if ranks:
        low, high = min(ranks), max(ranks)
        parts.append(f"rank {low}" if low == high else f"rank {low} to {high}")
    if whole:
        share = sum(int(c.count_nonzero()) for c in whole) / max(1, sum(c.numel() for c in whole))
        parts.append(f"density {100 * share:.1f} %")
    return ", ".join(parts)


def _norm(delta: Delta) -> float:
    """Frobenius norm over all parameters; of factors without multiplying them out: |QRB| = |RB|."""
    import torch

    from editors import LowRank

    total = 0.0
    for change in delta.values():
        if isinstance(change, LowRank):
            reduced = torch.linalg.qr(change.left.double(), mode="r").R @ change.right.double()
        else:
            reduced = change.double()
        total += float(reduced.square().sum())
    return math.sqrt(total)


def verify(args: argparse.Namespace) -> int:
    """Replay from the unedited model and check all that is recorded; 1 if something is wrong."""
    ledger = Ledger.open(args.run)
    chains = ledger.of_editor(args.editor)
    loaded, replay = load_base(ledger, args.device)
    found = 0

    def tell(problem: str) -> None:
        nonlocal found
        found += 1
        print(one_line(problem))

    wrong = other_model(ledger, loaded)
    if wrong is not None:
        tell(wrong)
    for chain in chains:
        for problem in problems(ledger, chain, None if wrong else replay):
            tell(problem)
    if args.editor is None:
        for problem in strays(ledger):
            tell(problem)
    for problem in served_problems(ledger, loaded, None if wrong else replay):
        tell(problem)
    if found:
        return 1
    editors = {chain.editor for chain in chains}
    print(
        f"{_count(len(chains) * len(ledger.batches), 'delta')} of {_count(len(editors), 'editor')} "
        f"verified{_without_digest(ledger, chains)}"
    )
    return 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _without_digest(ledger: Ledger, chains: Sequence[Chain]) -> str:
    """How many files of older versions there are, whose changes were checked by what they give alone."""
    batches = range(1, len(ledger.batches) + 1)
    bare = sum("digest" not in ledger.entry(chain, batch)[1] for chain in chains for batch in batches)
    return f"; {bare} of them have no digest of their own, only the weights they give are checked" * bool(
        bare
    )


def served_problems(ledger: Ledger, loaded: "LoadedModel", replay: "Replay | None") -> Iterator[str]:
    """What is wrong with the files that a folder of harness.edit is served from; nothing of a run.

    replay: None where the unedited weights are others.
    """
    from harness.models import tensors_digest
    from harness.sparse import with_entries

    if ledger.manifest is None:
        return
    try:
        ledger.manifest.corpus()
        entries = ledger.manifest.entries()
    except ValueError as error:
        yield str(error)
        return
    if replay is None:
        return
    try:
        weights = made_again(
            ledger, replay, chosen(ledger, None, None, None), range(1, len(ledger.batches) + 1)
        )
    except (OSError, ValueError) as error:
        yield str(error)
        return
    after = {name: value.to(loaded.model.dtype) for name, value in weights.items()}
    before = {name: loaded.model.get_parameter(name) for name in after}
    if tensors_digest({**before, **dict(with_entries(before, entries))}) != tensors_digest(after):
        yield f"{ledger.folder / ledger.info['weights']} holds other weights than the deltas give"


def rollback(args: argparse.Namespace) -> int:
    """Write the weights after batch K."""
    ledger = Ledger.open(args.run)
    last = len(ledger.batches)
    if not 0 <= args.to <= last:
        raise ValueError(f"--to is {args.to}; the run has batches 1 to {last}, and 0 is the unedited model")
    what = f"the weights after batch {args.to} of {last}" if args.to else "the unedited weights"
    return _write(ledger, args, range(1, args.to + 1), what)


def replay_without(args: argparse.Namespace) -> int:
    """Write the weights that the changes of all batches but some add up to."""
    ledger = Ledger.open(args.run)
    last = len(ledger.batches)
    for batch in args.drop:
        if not 1 <= batch <= last:
            raise ValueError(f"--drop is {batch}; the run has batches 1 to {last}; give one of them")
    dropped = sorted(set(args.drop))
    kept = [batch for batch in range(1, last + 1) if batch not in dropped]
    named = f"batch{'es' * (len(dropped) > 1)} {', '.join(map(str, dropped))}"
    what = (
        f"the weights without the changes of {named}. Later batches were computed with the dropped changes "
        "in place; theirs are added as they were stored, nothing was edited anew"
    )
    return _write(ledger, args, kept, what)


def export(args: argparse.Namespace) -> int:
    """Write the final weights."""
    ledger = Ledger.open(args.run)
    last = len(ledger.batches)
    status = _write(ledger, args, range(1, last + 1), f"the final weights, after all {last} batches")
    if ledger.manifest is not None:
        print(_without_router(ledger.info["check"]))
    return status


def _without_router(check: Mapping[str, Mapping[str, Any]]) -> str:
    """What the last check of a folder says of its weights without the router."""
    from harness.check import COLUMNS, shown_figure

    told = []
    for name, text in COLUMNS.items():
        alone, routed, unedited = (shown_figure(check[v][name]) for v in ("edited", "served", "unedited"))
        told.append(f"{text} {alone} (with the router {routed}, unedited {unedited})")
    return f"Without the router, which a plain checkpoint has not, by the last check: {'; '.join(told)}."


def made_again(ledger: Ledger, replay: "Replay", weights_of: Chain, batches: Sequence[int]) -> "Weights":
    """The weights that the changes of some batches give, as they are used."""
    weights = replay.base
    for after in replay.history(weights_of.editor, weights_of.merge, batches):
        weights = after
    return replay.released(weights_of.editor, weights_of.merge, weights)[0]


def chosen(
    ledger: Ledger, editor: str | None, cell: str | None, ratio: float | None, merger: str | None = None
) -> Chain:
    """Which weights are named: the chain they are made of, with how they are merged.

    None stands for the first editor, and for its unmerged weights, of a folder of harness.edit the served.
    """
    from harness.grid import NO_MERGE, merges_of, weights_id

    spec = ledger.spec
    editor = editor or spec.editors[0]
    chains = ledger.of_editor(editor)
    names = {chain.name for chain in chains}
    if cell is None:
        cell = "+MM" if ledger.manifest is not None and spec.merges else "baseline"
    if cell == "baseline":
        for flag, value in (("--pruning-ratio", ratio), ("--merger", merger)):
            if value is not None:
                raise ValueError(f"{flag} {value} is of merged weights; add --cell +MM")
        if editor not in names:
            raise ValueError(f"the run has no unmerged weights of {editor}; give --cell +MM")
        return Chain(name=editor, editor=editor, merge=None)
    if not spec.merges or editor in NO_MERGE:
        raise ValueError(f"the run has no merged weights of {editor}; give --cell baseline")
    if ratio is not None and ratio not in spec.pruning_ratio:
        known = ", ".join(f"{r:g}" for r in spec.pruning_ratio)
        raise ValueError(f"the run has no pruning ratio {ratio:g}; known: {known}; give one of them")
    for merge in merges_of(spec):
        if merger in (None, merge.merger) and ratio in (None, merge.pruning_ratio):
            name = weights_id(spec, editor, merge) if spec.chain == "merged" else editor
            return Chain(name=name, editor=editor, merge=merge)
    asked = " and ".join(str(part) for part in (merger, ratio) if part is not None)
    raise ValueError(
        f"the run has no weights merged by {asked}; known: {', '.join(map(str, merges_of(spec)))}; "
        "give --merger and --pruning-ratio of one of them"
    )


def _write(ledger: Ledger, args: argparse.Namespace, batches: Sequence[int], what: str) -> int:
    """Write the weights that some batches give as a checkpoint; ValueError if anything is not as recorded."""
    from harness.models import weights_digest

    weights_of = chosen(ledger, args.editor, args.cell, args.pruning_ratio, args.merger)
    out: Path = args.out
    if os.path.lexists(out):
        raise ValueError(f"{str(out)!r} exists already; give another --out")
    loaded, replay = load_base(ledger, args.device)
    wrong = other_model(ledger, loaded)
    if wrong is not None:
        raise ValueError(f"{wrong}; give the run the model it was made on")
    if not args.unchecked and batches:
        chain = next(chain for chain in ledger.chains if chain.name == weights_of.name)
        for problem in problems(ledger, chain, replay, max(batches)):
            raise ValueError(f"{problem}; nothing was written, verify shows more (or give --unchecked)")
    weights = made_again(ledger, replay, weights_of, batches)
    if args.sparse:
        return _write_sparse(ledger, args, weights_of, loaded, weights, batches, what)
    for name, value in weights.items():  # exchanged by name; the model's own are gone with the last reference
        parameter = loaded.model.get_parameter(name)
        parameter.data = value.to(parameter.dtype)
    entries = [(batch, ledger.entry(weights_of, batch)[1]) for batch in batches]
    card = _card(
        ledger, weights_of, what, entries, digest=weights_digest(loaded.model), unchecked=args.unchecked
    )
    _save(out, loaded, _tokenizer(ledger), card)
    print(f"{out}: {ledger.spec.model} edited with {weights_of.editor}, cell {weights_of.cell}, {what}")
    return 0


def _write_sparse(
    ledger: Ledger,
    args: argparse.Namespace,
    weights_of: Chain,
    loaded: "LoadedModel",
    weights: Mapping[str, "Tensor"],
    batches: Sequence[int],
    what: str,
) -> int:
    """Write the entries alone that some weights have changed in the unedited model."""
    from harness.digested import write_digested
    from harness.models import tensors_digest
    from harness.sparse import changed_entries

    dtype = loaded.model.dtype
    after = {name: value.to(dtype) for name, value in weights.items()}
    before = {name: loaded.model.get_parameter(name).to(dtype) for name in after}
    entries = changed_entries(before, after)
    said = {
        "base_model_digest": ledger.model["digest"],
        "case_ids": json.dumps([ledger.case_ids(batch) for batch in batches]),
        "cell": weights_of.cell,
        "digest_after": tensors_digest(after),
        "editor": weights_of.editor,
        "merger": json.dumps(weights_of.merge and weights_of.merge.merger),
        "pruning_ratio": json.dumps(weights_of.merge and weights_of.merge.pruning_ratio),
        "run": ledger.info["run_id"],
    }
    write_digested(args.out, entries, said)
    changed = sum(len(tensor) for name, tensor in entries.items() if name.endswith(".values"))
    total = sum(value.numel() for value in after.values())
    print(
        f"{args.out}: {changed:,} of {total:,} entries ({100 * changed / total:.1f} %) that "
        f"{weights_of.editor}, cell {weights_of.cell}, changes in {ledger.spec.model}, {what}"
    )
    return 0


def _tokenizer(ledger: Ledger) -> "PreTrainedTokenizerBase":
    """The model's tokenizer as it is, not as prepared for scoring."""
    from transformers import AutoTokenizer

    source = _source(ledger)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source.path, revision=source.revision, trust_remote_code=False
    )
    return tokenizer


def _save(out: Path, loaded: "LoadedModel", tokenizer: "PreTrainedTokenizerBase", card: str) -> None:
    """A checkpoint in a folder of its own, whole or not at all."""
    from safetensors import SafetensorError

    holder: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        inside = holder / out.name
        inside.mkdir()  # with the permissions of any folder, which mkdtemp's own has not
        loaded.model.save_pretrained(inside)
        tokenizer.save_pretrained(inside)
        (inside / "README.md").write_text(card, encoding="utf-8")
        for path in inside.iterdir():  # safetensors lets nobody else read what it writes
            path.chmod(inside.stat().st_mode & 0o666)
        inside.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{str(out)!r} cannot be written: {reason}; give another --out") from None
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def _card(
    ledger: Ledger,
    weights_of: Chain,
    what: str,
    entries: Sequence[tuple[int, Mapping[str, Any]]],
    *,
    digest: str,
    unchecked: bool,
) -> str:
    """The checkpoint's model card; equal inputs give equal text.

    entries: batch and metadata of the changes that are in the weights; digest: of the checkpoint's weights.
    """
    from tabulate import tabulate

    from harness.models import MODELS

    spec, provenance = ledger.spec, ledger.info["provenance"]
    hub = MODELS[spec.model].hub_id if spec.model in MODELS else spec.model
    front = ["library_name: transformers", "tags: [knowledge-editing]"]
    if hub is not None and not Path(hub).exists():
        front.append(f"base_model: {json.dumps(hub)}")
    facts: list[tuple[str, Any]] = [
        ("model", spec.model),
        ("revision", ledger.model["revision"] or "–"),
        ("digest of the unedited model", ledger.model["digest"]),
        ("digest of this checkpoint", digest),
        ("editor", weights_of.editor),
        ("settings", json.dumps(spec.as_json()["settings"][weights_of.editor], sort_keys=True)),
        ("cell", weights_of.cell),
    ]
    if weights_of.merge is not None:
        ratio = weights_of.merge.pruning_ratio
        pruned = "" if ratio is None else f", pruning ratio {ratio:g}"
        merging = f"{weights_of.merge.merger}{pruned}, {spec.chain} chain"
        facts.append(("merging", merging))
    dataset = provenance.get("dataset", {})
    facts.append(("edits", sum(len(said["case_ids"]) for _, said in entries)))
    if ledger.manifest is None:
        facts.append(("dataset", f"{dataset.get('name', '–')}, digest {dataset.get('digest', '–')}"))
    facts += [
        ("dtype", spec.dtype),
        ("run", ledger.info["run_id"]),
    ]
    note = ledger.info.get("model_note")
    lines = ["---", *front, "---", "", f"# {spec.model}, edited with {weights_of.editor}", ""]
    lines += [f"These are {what}."]
    lines += [f"{note}."] if note else []
    lines += [
        "The recorded digests were not checked when this was written (--unchecked)."
        if unchecked
        else "The recorded digests were checked by replaying when this was written.",
        "",
        tabulate(
            [(name, _cell_text(str(value))) for name, value in facts],
            ("", ""),
            tablefmt="pipe",
            disable_numparse=True,
        ),
        "",
        "The router is not part of this checkpoint: every prompt is answered by these weights, also those "
        "that the cells with +R send to the unedited model.",
        "",
        "## Edits",
        "",
    ]
    if entries:
        rows = [
            [
                str(batch), _cell_text(", ".join(map(str, said["case_ids"]))),
                _cell_text(said["digest_before"]), _cell_text(said["digest_after"]),
            ]
            for batch, said in entries
        ]  # fmt: skip
        headers = ("batch", "case ids", "digest before", "digest after")
        lines += [
            tabulate(rows, headers, tablefmt="pipe", disable_numparse=True),
            "",
            "The digests are of the run's edited parameters in the precision of editing, where the batch was "
            f"made ({'unmerged weights' if weights_of.name == weights_of.editor else 'merged weights'}).",
        ]
        if ledger.manifest is not None:
            lines += [
                "",
                "## Facts",
                "",
                _facts_table(ledger, {i for _, s in entries for i in s["case_ids"]}),
            ]
    else:
        lines.append("None.")
    return "\n".join(lines) + "\n"


def _facts_table(ledger: Ledger, ids: Collection[int | str]) -> str:
    """Markdown: what each of some facts of a folder writes."""
    from tabulate import tabulate

    from harness.edited import Batches

    rows = [
        [str(fact.id), *map(_cell_text, (fact.text, fact.target_new))]
        for fact in Batches(ledger.folder).every
        if fact.id in ids
    ]
    return tabulate(rows, ("id", "prompt", "target"), tablefmt="pipe", disable_numparse=True)


# -- the command line ---------------------------------------------------------------------------------------

ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "show": show,
    "verify": verify,
    "rollback": rollback,
    "replay": replay_without,
    "export": export,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the record is wrong, 2 what was asked for cannot be had."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.action != "show":
        from harness.ablation import quiet_libraries

        quiet_libraries()
    try:
        return ACTIONS[args.action](args)
    except (OSError, ValueError) as error:
        print(f"harness.ledger: {one_line(str(error))}", file=sys.stderr)
        return 2


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m harness.ledger",
        description="The record of a run's changes: look at it, check it, take weights out of it.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or one that harness.edit made")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    added = {}
    for name, text in (
        ("show", "a table of the batches of every editor"),
        ("verify", "replay from the unedited model and check every digest; 1 if one is wrong"),
        ("rollback", "write the weights after a batch as a plain transformers checkpoint"),
        ("replay", "write the final weights without the changes of some batches"),
        ("export", "write the final weights"),
    ):
        added[name] = actions.add_parser(name, help=text, description=text)
        every = name in ("show", "verify")
        added[name].add_argument(
            "--editor", metavar="NAME", help="default: all" if every else "default: the run's first"
        )
    added["rollback"].add_argument("--to", type=int, metavar="K", required=True, help="0: the unedited model")
    added["replay"].add_argument(
        "--drop", type=int, metavar="K", required=True, action="append", help="a batch; may be repeated"
    )
    for name in ("rollback", "replay", "export"):
        added[name].add_argument("--out", type=Path, metavar="PATH", required=True, help="is made")
        added[name].add_argument(
            "--sparse", action="store_true", help="a safetensors file of the changed entries alone"
        )
        added[name].add_argument(
            "--cell", choices=CELLS, help="default: baseline; of a folder of harness.edit what it serves"
        )
        added[name].add_argument("--merger", metavar="NAME", help="of +MM; default: the run's first")
        added[name].add_argument(
            "--pruning-ratio", type=float, metavar="R", help="of +MM; default: the run's first"
        )
        added[name].add_argument(
            "--unchecked", action="store_true", help="write even where replayed digests are others"
        )
    for name in ("verify", "rollback", "replay", "export"):
        added[name].add_argument("--device", help="default: the run's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
