"""What a run is: every choice resolved and checked before any model is loaded."""

import dataclasses
import hashlib
import json
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from editors import EDITORS, Editor
from harness.data import DATASETS, Dataset, Selection
from harness.models import MODELS
from harness.paths import checked_name, is_there, read_yaml, shown
from merging import MERGERS, Merger
from routing import ROUTERS
from routing import check as check_router
from routing import fields as router_parts
from tasks import SIX, TASKS

HYPERPARAMETERS = Path(__file__).parent / "hyperparameters.yaml"
CELLS = ("baseline", "+MM", "+R", "+MM+R")
CHAINS = ("shadow", "merged")
EVALUATIONS = ("final", "every-batch")
CORPORA = ("self", "wikipedia")
SELECTIONS = ("first", "random")
METHODS = {name: config for table in (EDITORS, MERGERS, ROUTERS) for name, (config, _) in table.items()}
FLAGGED = ("pruning_ratio", "top_k")  # fields of mergers and routers with a flag that takes several values
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One grid: editors x cells on one model and dataset. Equal specs mean equal results on a machine."""

    model: str
    editors: tuple[str, ...]
    cells: tuple[str, ...]
    dataset: str
    select: str
    stats: str
    limit_stats: int | None  # tokens; None: all of a corpus, of ``self`` as many as the harness samples
    batch_size: int
    num_batches: int
    chain: str
    merger: tuple[str, ...]
    pruning_ratio: tuple[float, ...]  # of the mergers that have one
    router: tuple[str, ...]
    top_k: tuple[int, ...]  # of the routers that have one
    encoder: str
    negatives: int | None  # None: as many as edits; KnowEdit: all prompts of 301 other records
    aliases: bool  # give the routers the other names of a subject that its record has
    probes: bool  # route the prompts of harness.route_probes too
    evaluate: str
    capability: tuple[str, ...]  # general tasks; none if empty
    generation: bool  # sample texts: fluency, consistency
    generation_prompts: int | None  # at most so many a record; None: all
    references: str | None  # file of reference texts
    seed: int
    dtype: str
    device: str
    settings: Mapping[str, Mapping[str, Any]]  # editor, merger or router -> the fields of its config

    def __post_init__(self) -> None:
        _known("editor", self.editors, EDITORS)
        _known("cell", self.cells, CELLS)
        _known("chain", (self.chain,), CHAINS)
        _known("merger", self.merger, MERGERS)
        _known("selection", (self.select,), SELECTIONS)
        _known("dtype", (self.dtype,), DTYPES)
        _known("evaluation", (self.evaluate,), EVALUATIONS)
        for name in ("batch_size", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {shown(getattr(self, name))}; it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {shown(self.seed)}; it must be from 0 to 2**63 - 1")
        for name in ("limit_stats", "negatives", "generation_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {shown(value)}; it must be at least 1")
        for name in ("editors", "cells", "merger", "pruning_ratio", "router", "top_k"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {list(values)}; name at least one, and none twice")
        if len(set(self.capability)) < len(self.capability):
            raise ValueError(f"capability is {list(self.capability)}; name no task twice")
        for merger in self.merger:
            for ratio in self.pruning_ratio:
                self.build_merger(merger, ratio if has_ratio(merger) else None)
        for router in self.router:
            for k in self.top_k:
                check_router(router, self.router_settings(k))
        for editor in self.editors:
            self.editor(editor)

    @property
    def edits(self) -> int:
        return self.batch_size * self.num_batches

    @property
    def merges(self) -> bool:
        return any("MM" in cell for cell in self.cells)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the mergers, and of the routers that those of the run are made of."""
        return modules_of(self.merger, self.router)

    @property
    def routes(self) -> bool:
        return any("R" in cell for cell in self.cells)

    def editor(self, name: str) -> Editor:
        """An editor with its settings; raises ValueError naming it if a field is wrong."""
        config, kind = EDITORS[name]
        try:
            return kind(config(**self.settings[name]))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def build_merger(self, name: str, pruning_ratio: float | None) -> Merger:
        """A merger with its settings; raises ValueError naming it if a field is wrong."""
        config, kind = MERGERS[name]
        ratio = {} if pruning_ratio is None else {"pruning_ratio": pruning_ratio}
        try:
            merger: Merger = kind(config(**self.settings.get(name, {}), **ratio))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return merger

    def router_settings(self, top_k: int | None) -> dict[str, dict[str, Any]]:
        """Router -> the fields of its config, as ``routing.build`` takes them."""
        settings = {name: dict(self.settings.get(name, {})) for name in ROUTERS}
        for name, fields in settings.items():
            if top_k is not None and _has_field(ROUTERS[name][0], "top_k"):
                fields["top_k"] = top_k
        return settings

    def as_json(self) -> dict[str, Any]:
        """Plain data with sorted, resolved fields, as run.json holds it."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), sort_keys=True))
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "RunSpec":
        """The inverse of ``as_json``; what run.json has beside the spec's fields is passed over."""
        plain = upgraded(plain)
        fields = {field.name: plain[field.name] for field in dataclasses.fields(cls)}
        settings = {
            editor: {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
            for editor, row in fields.pop("settings").items()
        }
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        return cls(**given, settings=settings)

    def digest(self) -> str:
        """The run id."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:16]


def upgraded(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A spec as run.json has it, from a version that knew one merger and one router, in the present form."""
    if not isinstance(plain.get("merger"), str):
        return dict(plain)
    modules = {"self-aware": {"scale": 1.0, "scope": "layer"}, "topk": {"indexed_from": 1_000_000}}
    several = {name: [plain[name]] for name in ("merger", "router")}
    known = {"aliases": False, "probes": False, **plain, **several}
    return known | {"settings": {**modules, **plain["settings"]}}


def has_ratio(merger: str) -> bool:
    """Whether a merger is run at every pruning ratio."""
    return _has_field(MERGERS[merger][0], "pruning_ratio")


def has_top_k(router: str) -> bool:
    """Whether a router, or one that it is made of, is asked at every top-k."""
    return any(_has_field(ROUTERS[name][0], "top_k") for name in router_parts(router))


def modules_of(mergers: Sequence[str], routers: Sequence[str]) -> tuple[str, ...]:
    """Names of mergers, and of the routers that these are made of, each once."""
    return tuple(dict.fromkeys((*mergers, *(part for router in routers for part in router_parts(router)))))


def _has_field(config: Any, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(config))


def _known(what: str, names: Sequence[str], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {shown(name)}; known: {', '.join(known)}")


def resolve(
    given: Mapping[str, Any],
    overrides: Sequence[str] = (),
    hyperparameters: "HyperparameterFile | None" = None,
) -> RunSpec:
    """A spec from the flags given, everything else by preset of model and dataset.

    given: flag names with underscores; absent or None means by preset.
    overrides: "EDITOR.FIELD=VALUE"; they win over hyperparameters, these over the model's preset.
    Raises ValueError in one line for what is wrong.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str):
                checked_name(name, text)
    model = given.get("model", "smollm2-135m")
    paper = model in MODELS and MODELS[model].paper
    editors = tuple(given.get("editors", ("memit", "alphaedit")))
    _known("editor", editors, EDITORS)
    mergers = tuple(given.get("merger", ("self-aware",)))
    _known("merger", mergers, MERGERS)
    routers = tuple(given.get("router", ("topk",)))
    used = modules_of(mergers, routers)
    dataset = given.get("dataset", "counterfact" if paper else "facts")
    if dataset not in DATASETS and not is_there(dataset):
        raise ValueError(
            f"unknown dataset {dataset!r}; known: {', '.join(DATASETS)}; or give the path of a file"
        )
    stats = given.get("stats", "wikipedia" if paper else "self")
    if stats not in CORPORA and not is_there(stats):
        raise ValueError(
            f"unknown statistics corpus {stats!r}; known: {', '.join(CORPORA)}; or give a JSONL file"
        )
    device = given.get("device") or default_device()
    _check_device(device)
    return RunSpec(
        model=model,
        editors=editors,
        cells=tuple(given.get("cells", CELLS)),
        dataset=dataset,
        select=given.get("select", "first" if dataset == "counterfact" else "random"),
        stats=stats,
        limit_stats=given.get("limit_stats"),
        batch_size=given.get("batch_size", _batch_size(dataset) if paper else 20),
        num_batches=given.get("num_batches", 10 if paper else 5),
        chain=given.get("chain", "shadow"),
        merger=mergers,
        pruning_ratio=tuple(given.get("pruning_ratio", (0.85,))),
        router=routers,
        top_k=tuple(given.get("top_k", (2,))),
        encoder=given.get("encoder", "minilm"),
        negatives=given.get("negatives"),
        aliases=given.get("aliases", False),
        probes=given.get("probes", False),
        evaluate=given.get("evaluate", "final"),
        capability=capability_tasks(given.get("capability", ("none",))),
        generation=given.get("generation", False),
        generation_prompts=_with_generation(given, "generation_prompts"),
        references=_with_generation(given, "references"),
        seed=given.get("seed", 0),
        dtype=given.get("dtype") or ("float32" if device == "cpu" else "bfloat16"),
        device=device,
        settings=editor_settings(
            model, editors, overrides, rows=hyperparameters.rows if hyperparameters else {}, others=used
        ),
    )


def capability_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Task names of ``--capability``, with ``six`` written out; empty for ``none``.

    Raises ValueError for ``none`` beside others and for a name in our namespace that is no task of ours;
    other names are looked up when the tasks are loaded.
    """
    if "none" in names:
        if len(names) > 1:
            raise ValueError(f"capability is {list(names)}; give none alone, or leave it out")
        return ()
    _known("task", [name for name in names if name.startswith("seqmmr_")], TASKS)
    return tuple(task for name in names for task in (SIX if name == "six" else (name,)))


def _with_generation(given: Mapping[str, Any], name: str) -> Any:
    """A flag that says something of generated texts; ValueError if there are none."""
    if name in given and not given.get("generation"):
        raise ValueError(f"{name} is {given[name]!r}, but no texts are generated; add --generation")
    return given.get(name)


def _batch_size(dataset: str) -> int:
    """Of the paper's models: 10 batches are 2,000 edits, of KnowEdit 1,000."""
    return 100 if dataset == "knowedit-zsre" else 200


def default_device() -> str:
    """cuda if present, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_device(name: str) -> None:
    import torch

    match = re.fullmatch(r"cpu|cuda(?::(0|[1-9][0-9]{0,3}))?", name)  # torch takes 300 for 44
    if match is None:
        raise ValueError(f"unknown device {shown(name)}; known: cpu, cuda, cuda:1 ... (solves need float64)")
    count = torch.cuda.device_count()
    if name != "cpu" and int(match[1] or 0) >= count:
        raise ValueError(f"device {name!r} is not there; {count} GPUs are; take cpu, or leave --device out")


@cache
def hyperparameters() -> dict[str, dict[str, dict[str, Any]]]:
    """Model preset -> editor -> fields and source."""
    table: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(HYPERPARAMETERS.read_text("utf-8"))
    return table


def hyperparameter_source(model: str, editor: str) -> str | None:
    """Where the preset's row comes from; None for a model without one."""
    return hyperparameters().get(model, {}).get(editor, {}).get("source")


@dataclass(frozen=True, kw_only=True)
class HyperparameterFile:
    """A file of ``--hyperparameters``, in the form of one model's block in hyperparameters.yaml."""

    name: str
    rows: Mapping[str, Mapping[str, Any]]  # editor -> config fields
    sources: Mapping[str, str]  # editor -> where its row comes from
    tuning: Mapping[str, Any]  # what harness.tune says of its run; empty in a file written by hand

    def sources_of(self, editors: Sequence[str]) -> dict[str, str]:
        """Where the rows of some editors come from, as far as the file has them."""
        return {editor: self.sources[editor] for editor in editors if editor in self.sources}

    def overlap(self, dataset: Dataset, selection: Selection) -> list[str]:
        """What a report must say if the settings were chosen on records that are evaluated now."""
        tuned, data = self.tuning.get("case_ids"), self.tuning.get("dataset")
        if not (isinstance(tuned, list) and isinstance(data, Mapping)):
            return []
        if data.get("digest") != dataset.digest:
            return []
        edited = sum(case.case_id in tuned for case in selection.cases)
        negatives = sum(case.case_id in tuned for case in selection.negatives)
        if not edited + negatives:
            return []
        return [
            f"The settings of {self.name} were chosen on records that are used here: {edited} of the "
            f"{len(selection.cases)} edited ones and {negatives} of the {len(selection.negatives)} unrelated "
            "ones. Figures of those are too good; tune with this run's --select, --seed and sizes."
        ]


def read_hyperparameters(path: str) -> HyperparameterFile:
    """The rows of a YAML file, every field checked; a key ``tuning`` beside the editors is kept as it is.

    Raises ValueError in one line naming file, editor and field for what is wrong.
    """
    where = f"hyperparameters {path!r}"
    table = read_yaml(Path(checked_name("hyperparameters", path)), where)
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is no mapping of editors to their fields; known: {', '.join(EDITORS)}")
    tuning = table.get("tuning") or {}
    if not isinstance(tuning, Mapping):
        raise ValueError(f"{where}: tuning is {shown(tuning)}; it takes a mapping, or leave it out")
    rows: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    for editor, row in table.items():
        if editor == "tuning":
            continue
        if editor not in EDITORS:
            raise ValueError(f"{where}: unknown editor {shown(editor)}; known: {', '.join(EDITORS)}")
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: {editor} is {shown(row)}; it takes a mapping of fields to values")
        fields = {str(field): value for field, value in row.items() if field != "source"}
        try:
            rows[editor] = {
                field: _typed(value, _field_type(editor, field), f"{editor}.{field}")
                for field, value in fields.items()
            }
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        sources[editor] = str(row.get("source") or Path(path).name)
    return HyperparameterFile(name=Path(path).name, rows=rows, sources=sources, tuning=tuning)


def _typed(value: Any, kind: Any, where: str) -> Any:
    """A YAML value as one of a config field's type; ValueError if it is of another."""
    if any(isinstance(v, int) and abs(v) >= 2**63 for v in (value if isinstance(value, list) else [value])):
        raise ValueError(f"{where} is {shown(value)}; its numbers are below 2**63")
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise ValueError(f"{where} is {shown(value)}; it takes a list of whole numbers")
        return tuple(values)
    if not isinstance(value, str | int | float | None) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {shown(value)}; it takes a {getattr(kind, '__name__', kind)}")
    return _parse("none" if value is None else str(value), kind, where)


def editor_settings(
    model: str,
    editors: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    rows: Mapping[str, Mapping[str, Any]] = types.MappingProxyType({}),
    others: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """All config fields of each editor: its row of ``rows``, else the model's row, then the overrides.

    others: mergers and routers, whose fields are the defaults and the overrides; what a flag of its own
    gives (pruning ratio, top-k) is not among them.
    Raises ValueError for an unknown name or field, a value of the wrong type, or missing layers.
    """
    settings: dict[str, dict[str, Any]] = {}
    for editor in editors:
        row = dict(rows[editor] if editor in rows else hyperparameters().get(model, {}).get(editor, {}))
        row.pop("source", None)
        settings[editor] = row
    settings |= {name: {} for name in others}
    for override in overrides:
        name, equals, value = override.partition("=")
        editor, dot, field = name.partition(".")
        if not equals or not dot:
            raise ValueError(f"--set {shown(override)} is not of the form EDITOR.FIELD=VALUE")
        if editor not in settings:
            _known("editor, merger or router", (editor,), METHODS)
            raise ValueError(f"--set {shown(override)}: {editor!r} is not in this run: {', '.join(settings)}")
        if field in FLAGGED and editor not in EDITORS:
            raise ValueError(f"--set {shown(override)}: give it with --{field.replace('_', '-')}")
        settings[editor][field] = _parse(value, _field_type(editor, field), f"--set {shown(override)}")
    for editor in editors:
        fields = dataclasses.fields(EDITORS[editor][0])
        places = [field.name for field in fields if field.name.endswith("layers")]
        if not settings[editor].keys() & set(places):
            raise ValueError(
                f"no hyperparameters for {editor} on {model!r}; name at least the layers: "
                f"--set {editor}.{places[-1]}=3,4,5, or give a file with --hyperparameters "
                "(harness.tune makes one)"
            )
        defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        types_ = get_type_hints(EDITORS[editor][0])
        settings[editor] = {
            name: _plain(value, types_[name]) for name, value in {**defaults, **settings[editor]}.items()
        }
    for name in others:
        defaults = {f.name: f.default for f in dataclasses.fields(METHODS[name]) if f.name not in FLAGGED}
        settings[name] = {**defaults, **settings[name]}
    return settings


def _plain(value: Any, kind: Any) -> Any:
    """A number or list of YAML as a config field of its type holds it."""
    if isinstance(value, list):
        return tuple(value)
    wants_float = kind is float or (get_origin(kind) is types.UnionType and float in get_args(kind))
    return float(value) if wants_float and value is not None else value


def _field_type(editor: str, field: str) -> Any:
    hints = get_type_hints(METHODS[editor])
    if field not in hints:
        raise ValueError(f"unknown field {shown(field)} of {editor}; known: {', '.join(hints)}")
    return hints[field]


def _parse(text: str, kind: Any, where: str) -> Any:
    """A text as a value of a config field's type."""
    origin = get_origin(kind)
    try:
        if origin is tuple:
            return tuple(int(part) for part in text.replace(" ", "").split(",") if part)
        if origin is Literal:
            if text in get_args(kind):
                return text
            raise ValueError(f"known: {', '.join(get_args(kind))}")
        if origin in (types.UnionType,):
            if text.lower() == "none":
                return None
            return _parse(text, next(a for a in get_args(kind) if a is not type(None)), where)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError("it must be finite")
        return value
    except (ValueError, KeyError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{where}: {shown(text)} is not a {name} ({error})") from None
