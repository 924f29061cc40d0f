"""Datasets: the embedded facts, CounterFact, KnowEdit, and files in their schemas; selection and checks."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from editors import EditRequest
from harness.fields import (
    case_id_of,
    field_of,
    find_subject,
    name_of,
    no_near_miss,
    prompts_of,
    subject_of,
    text_of,
    whole_text,
)
from harness.paths import is_there, read_lines, shown

FACTS_FILE = Path(__file__).parent / "facts" / "facts.jsonl.gz"
COUNTERFACT_HUB = ("azhx/counterfact", "c01c413f856ee38f5c080c9fc5e87aff478e2ff9")
COUNTERFACT_FILES = ("multi_counterfact.json", "counterfact.json", "counterfact_original*.jsonl")
KNOWEDIT_HUB = (
    "zjunlp/KnowEdit",
    "6d218881e60c7c8be836bd2befd598eb3b318be4",
    "benchmark/ZsRE/ZsRE-test-all.json",
)
KNOWEDIT_FILES = ("knowedit_zsre_test*.jsonl", "ZsRE-test-all.json")
KNOWEDIT_OTHERS = 301  # records that KnowEdit's 1,301 leave beside the paper's 1,000 edits
PORTABILITY = {  # a group's name in the files -> kind of its prompts
    "Reasoning": "portability_reasoning",
    "Subject_Aliasing": "portability_subject_aliasing",
    "Logical_Generalization": "portability_logical_generalization",
}
NO_SUBJECT = "the subject is not in the prompt"
# Fields that are read. Others may stand beside them, but not in the place of one of these, misspelt.
FIELDS = (
    "case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts",
    "relation", "no_subject_relation_conflict", "aliases", "hops", "same_subject", "portability",
    "unrelated_relation", "alternative_subject",
)  # fmt: skip
REWRITE_FIELDS = ("prompt", "subject", "relation_id", "target_new", "target_true")
KNOWEDIT_FIELDS = (
    "case_id", "subject", "prompt", "target_new", "ground_truth", "rephrase_prompt", "rephrase", "locality",
    "portability",
)  # fmt: skip
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EditCase:
    """One record of a benchmark: the edit, and the prompts that test it."""

    case_id: int | str
    request: EditRequest
    target_true: str
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[str, ...]
    generation_prompts: tuple[str, ...] = ()
    relation_id: str | None = None  # with target_id it names the reference texts of consistency
    target_id: str | None = None  # of target_new
    aliases: tuple[str, ...] = ()  # other names of the subject that are given with the edit
    # Kind of harness.route_probes -> prompts that only routers are asked; kinds without any are left out.
    route_prompts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    @property
    def rewrite_prompt(self) -> str:
        """The edit's prompt with the subject filled in."""
        return self.request.prompt.replace("{}", self.request.subject)

    @property
    def prompts(self) -> dict[str, tuple[str, ...]]:
        """Scored prompts by kind."""
        return {
            "rewrite": (self.rewrite_prompt,),
            "paraphrase": self.paraphrase_prompts,
            "neighborhood": self.neighborhood_prompts,
        }

    @property
    def unrelated_prompts(self) -> tuple[str, ...]:
        """What stands for unrelated queries in the router's corpus where this record is not edited."""
        return (self.rewrite_prompt,)


@dataclass(frozen=True)
class Probe:
    """A prompt and the answers that are right after it, the protocol's first."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class KnowEditCase(EditCase):
    """A record of KnowEdit: every prompt has answers of its own (ALGORITHMS 8.2).

    Its rephrased prompt stands among the paraphrases, the prompts of relation specificity among the
    neighborhood; ``target_true`` is the first of ``truths``.
    """

    truths: tuple[str, ...]
    probes: Mapping[str, tuple[Probe, ...]]  # kind -> prompts; kinds without any are left out
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> prompts that are not scored

    @property
    def prompts(self) -> dict[str, tuple[str, ...]]:
        """Scored prompts by kind."""
        return {kind: tuple(probe.prompt for probe in probes) for kind, probes in self.probes.items()}

    @property
    def unrelated_prompts(self) -> tuple[str, ...]:
        """The prompts of relation specificity."""
        return self.neighborhood_prompts


def prompt_rows(
    batches: Sequence[Sequence[EditCase]], prompts: Callable[[EditCase], Mapping[str, Sequence[str]]]
) -> Iterator[tuple[dict[str, Any], EditCase]]:
    """What names every prompt in ``cases.jsonl.gz``, with its record, batch by batch.

    prompts: of a record, by kind.
    """
    for number, batch in enumerate(batches, start=1):
        for case in batch:
            for kind, texts in prompts(case).items():
                for index, prompt in enumerate(texts):
                    row = {
                        "case_id": case.case_id, "batch": number, "kind": kind, "index": index,
                        "prompt": prompt,
                    }  # fmt: skip
                    yield row, case


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """All usable records of a source, with what identifies it."""

    name: str
    source: str  # hub id and revision, or file name
    digest: str  # of all records as read
    cases: tuple[EditCase, ...]
    dropped: Mapping[str, int]  # reason -> records left out

    @property
    def knowedit(self) -> bool:
        """Whether its records are in KnowEdit's schema."""
        return isinstance(self.cases[0], KnowEditCase)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The records a run edits, and those whose prompts stand for unrelated queries."""

    cases: tuple[EditCase, ...]
    negatives: tuple[EditCase, ...]
    unrelated: tuple[str, ...] = ()  # their prompts in the router's corpus


def load_dataset(name: str, data: str | None = None) -> Dataset:
    """A dataset by name or by path.

    data: folder or file with local copies, else the variable SEQMMR_DATA, else the hub.
    Raises ValueError in one line for an unknown name, a missing file or a broken record.
    """
    if data and not is_there(data):
        raise ValueError(f"data folder {shown(data)} does not exist; correct --data or SEQMMR_DATA")
    if name in DATASETS:
        return DATASETS[name](data or os.environ.get("SEQMMR_DATA") or None)
    if is_there(name):
        records = read_lines(Path(name))
        if not records[0].keys() & {"requested_rewrite", "target_new"}:
            raise ValueError(
                f"dataset {Path(name).name}: its first record has the fields {shown(list(records[0]))}; it "
                "needs requested_rewrite (CounterFact's schema) or target_new (KnowEdit's)"
            )
        in_schema = _from_knowedit if _looks_like_knowedit(records[0]) else _from_records
        return in_schema(name, Path(name).name, records)
    raise ValueError(
        f"unknown dataset {shown(name)}; known: {', '.join(DATASETS)}; or give the path of a JSONL file "
        "in CounterFact's or KnowEdit's schema"
    )


def _looks_like_knowedit(record: Mapping[str, Any]) -> bool:
    return "target_new" in record and "requested_rewrite" not in record


def _facts(_: str | None) -> Dataset:
    return _from_records("facts", FACTS_FILE.name, read_lines(FACTS_FILE))


def _counterfact(data: str | None) -> Dataset:
    if data is not None:
        path = local_copy(data, COUNTERFACT_FILES)
        return _from_records("counterfact", path.name, read_lines(path))
    name, revision = COUNTERFACT_HUB
    records = hub_records(name, revision, ("train", "test"))
    records.sort(key=lambda record: record["case_id"])
    return _from_records("counterfact", f"{name}@{revision}", records)


def _knowedit_zsre(data: str | None) -> Dataset:
    if data is not None:
        path = local_copy(data, KNOWEDIT_FILES)
        return _from_knowedit("knowedit-zsre", path.name, read_lines(path))
    name, revision, file = KNOWEDIT_HUB
    return _from_knowedit("knowedit-zsre", f"{name}@{revision}/{file}", read_lines(hub_file(*KNOWEDIT_HUB)))


DATASETS: dict[str, Callable[[str | None], Dataset]] = {
    "facts": _facts,
    "counterfact": _counterfact,
    "knowedit-zsre": _knowedit_zsre,
}


def local_copy(data: str, patterns: Sequence[str]) -> Path:
    """The first file that fits one of the patterns, with or without ``.gz``, or ``data`` itself if a file.

    Raises ValueError naming the folder and the patterns.
    """
    folder = Path(data)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"data folder {shown(data)} does not exist; correct --data or SEQMMR_DATA")
    for pattern in patterns:
        found = sorted([*folder.glob(pattern), *folder.glob(pattern + ".gz")])
        if found:
            return found[0]
    raise ValueError(f"data folder {data!r} has none of {', '.join(patterns)} (with or without .gz)")


def hub_records(name: str, revision: str, splits: Sequence[str]) -> list[dict[str, Any]]:
    """All records of some splits of a dataset on the hub, at a pinned revision."""
    from datasets import load_dataset as load_from_hub

    try:
        return [
            dict(record) for split in splits for record in load_from_hub(name, revision=revision, split=split)
        ]
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_fetched(name, revision, error) from None


def hub_file(name: str, revision: str, file: str) -> Path:
    """A file of a dataset on the hub, at a pinned revision, as it is there."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
    except (OSError, ValueError, RuntimeError) as error:
        raise _not_fetched(name, revision, error) from None


def _not_fetched(name: str, revision: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"dataset {name}@{revision[:8]} cannot be fetched: {reason} -- give a local copy with --data "
        "or SEQMMR_DATA"
    )


def _digest(records: Sequence[Mapping[str, Any]]) -> str:
    try:
        return hashlib.sha256(json.dumps(list(records), sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise ValueError("records are nested too deeply; they are flat in both schemas") from None


def _in(source: str, read: Callable[[Mapping[str, Any], int], T], record: Mapping[str, Any], n: int) -> T:
    """A record as ``read`` makes it; what it refuses is said with the source and the remedy."""
    try:
        return read(record, n)
    except ValueError as error:
        raise ValueError(f"dataset {source}: {error}; correct the record, or take it out") from None


def _check_case_ids(source: str, case_ids: Sequence[int | str]) -> None:
    repeated = [case_id for case_id, count in Counter(case_ids).items() if count > 1]
    if repeated:
        raise ValueError(
            f"dataset {source}: case_id {repeated[0]!r} occurs more than once; give each record its own"
        )


def _from_records(name: str, source: str, records: Sequence[Mapping[str, Any]]) -> Dataset:
    digest = _digest(records)
    cases = [_in(source, to_case, record, number) for number, record in enumerate(records, start=1)]
    _check_case_ids(source, [case.case_id for case in cases])
    facts = Counter(_fact(record) for record in records)
    kept = [
        case
        for case, record in zip(cases, records, strict=True)
        if facts[_fact(record)] == 1 and record.get("no_subject_relation_conflict", True)
    ]
    dropped = {"another record edits the same subject and relation": len(cases) - len(kept)}
    if not kept:
        raise ValueError(
            f"dataset {source}: all {len(cases)} records contradict each other (same subject and relation); "
            "leave one of each"
        )
    return Dataset(name=name, source=source, digest=digest, cases=tuple(kept), dropped=dropped)


def _fact(record: Mapping[str, Any]) -> tuple[str, str]:
    rewrite = record["requested_rewrite"]
    relation = record.get("relation") or rewrite.get("relation_id") or rewrite["prompt"]
    return rewrite["subject"].strip(), relation


def _from_knowedit(name: str, source: str, records: Sequence[Mapping[str, Any]]) -> Dataset:
    """Records in KnowEdit's schema. Repeated and contradicting edits stay, as the paper edits them too."""
    found = [_in(source, to_knowedit_case, record, number) for number, record in enumerate(records)]
    cases = tuple(case for case in found if case is not None)
    _check_case_ids(source, [case.case_id for case in cases])
    if not cases:
        raise ValueError(
            f"dataset {source}: in all {len(records)} records {NO_SUBJECT}; write it there as it stands"
        )
    dropped = {NO_SUBJECT: len(records) - len(cases)}
    return Dataset(name=name, source=source, digest=_digest(records), cases=cases, dropped=dropped)


def to_knowedit_case(record: Mapping[str, Any], number: int) -> KnowEditCase | None:
    """A record in KnowEdit's schema as a case; None if its subject is not in its prompt.

    number: its position from 0, used where it has no case id. Raises ValueError naming case and field.
    """
    case_id = case_id_of(record, number)
    where = f"case {case_id}"
    no_near_miss(record, KNOWEDIT_FIELDS, where)
    prompt, target_new = (
        text_of(field_of(record, name, str, where), f"{where}, {name}").strip()
        for name in ("prompt", "target_new")
    )
    subject = subject_of(record, where, f"{where}, subject").strip()
    truths = tuple(_answers(field_of(record, "ground_truth", str | list, where), f"{where}, ground_truth"))
    if not truths:
        raise ValueError(
            f"{where}: field 'ground_truth' is {shown(record['ground_truth'])}; it needs an answer"
        )
    left_out: Counter[str] = Counter()
    probes = {"rewrite": (Probe(prompt, (target_new,)),)} | _knowedit_probes(
        record, target_new, where, left_out
    )
    place = find_subject(prompt, subject)
    if place is None:
        return None
    request = EditRequest(
        case_id=case_id,
        prompt=prompt[: place.start()] + "{}" + prompt[place.end() :],
        subject=place.group(),  # spelled as in the prompt, so that filling it in gives the prompt back
        target_new=target_new,
    )
    return KnowEditCase(
        case_id=case_id,
        request=request,
        target_true=truths[0],
        truths=truths,
        paraphrase_prompts=_prompts_of(probes, "rephrase"),
        neighborhood_prompts=_prompts_of(probes, "relation_specificity"),
        probes=probes,
        left_out=dict(left_out),
        route_prompts=_knowedit_route_prompts(probes, truths),
    )


def _knowedit_route_prompts(
    probes: Mapping[str, tuple[Probe, ...]], truths: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Prompts of portability, and those of relation specificity that do not ask the edited fact itself.

    Those that do have the edit's old answer for theirs.
    """
    others = [p for p in probes.get("relation_specificity", ()) if not {*p.answers} & {*truths}]
    reasoning, logical = PORTABILITY["Reasoning"], PORTABILITY["Logical_Generalization"]
    found = {
        "alias": _prompts_of(probes, PORTABILITY["Subject_Aliasing"]),
        "hop": _prompts_of(probes, reasoning) + _prompts_of(probes, logical),
        "same_subject": tuple(probe.prompt for probe in others),
    }
    return {kind: prompts for kind, prompts in found.items() if prompts}


def _prompts_of(probes: Mapping[str, tuple[Probe, ...]], kind: str) -> tuple[str, ...]:
    return tuple(probe.prompt for probe in probes.get(kind, ()))


def _knowedit_probes(
    record: Mapping[str, Any], target_new: str, where: str, left_out: Counter[str]
) -> dict[str, tuple[Probe, ...]]:
    """The prompts beside the edit's own, by kind; what is not scored is counted in ``left_out``."""
    found: dict[str, tuple[Probe, ...]] = {}
    rephrased = record.get("rephrase_prompt", record.get("rephrase"))
    if rephrased is not None:
        found["rephrase"] = (Probe(text_of(rephrased, f"{where}, rephrase_prompt").strip(), (target_new,)),)
    for group, probes in _groups(record, "portability", where, left_out):
        if group in PORTABILITY:
            found[PORTABILITY[group]] = probes
        else:
            left_out[f"portability {group}"] += len(probes)
    for group, probes in _groups(record, "locality", where, left_out):
        if group == "Relation_Specificity":
            found["relation_specificity"] = tuple(Probe(p.prompt, p.answers[:1]) for p in probes)
        else:
            left_out[f"locality {group}"] += len(probes)
    return {kind: probes for kind, probes in found.items() if probes}


def _groups(
    record: Mapping[str, Any], name: str, where: str, left_out: Counter[str]
) -> Iterator[tuple[str, tuple[Probe, ...]]]:
    """The groups of ``portability`` or ``locality``; prompts whose forced answer is blank are left out."""
    groups = record.get(name)
    if not isinstance(groups, dict | None):
        raise ValueError(f"{where}: field {name!r} is {shown(groups)}, not a dict")
    for own, entries in (groups or {}).items():
        group = shown(own)[1:-1]
        inside = f"{where}, {name}.{group}"
        if not isinstance(entries, list | None):
            raise ValueError(f"{inside} is {shown(entries)}, not a list")
        probes = []
        for i, entry in enumerate(entries or ()):
            at = f"{inside}[{i}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{at} is {shown(entry)}, not a dict")
            prompt = text_of(field_of(entry, "prompt", str, at), f"{at}.prompt").strip()
            given = field_of(entry, "ground_truth", str | list, at)
            answers = tuple(_answers(given, f"{at}.ground_truth"))
            if _first(given).strip():
                probes.append(Probe(prompt, answers))
            else:
                left_out["blank answer"] += 1
        yield group, tuple(probes)


def _answers(given: Any, where: str) -> Iterator[str]:
    """All answers of nested lists that are not blank, each once, in order; the first is the forced one."""
    leaves: list[Any] = [given]
    seen: set[str] = set()
    while leaves:
        leaf = leaves.pop(0)
        if isinstance(leaf, list):
            leaves[:0] = leaf
        elif not isinstance(leaf, str):
            raise ValueError(f"{where}: {shown(leaf)} is not a text")
        elif (answer := whole_text(leaf, where).strip()) and answer not in seen:
            seen.add(answer)
            yield answer


def _first(given: Any) -> str:
    """The first element of nested lists, as the protocol reduces them; empty if there is none."""
    while isinstance(given, list):
        given = given[0] if given else ""
    return str(given)


def to_case(record: Mapping[str, Any], number: int) -> EditCase:
    """A record in CounterFact's schema as a case.

    number: its position, used where it has no case id. Raises ValueError naming case and field.
    """
    case_id = case_id_of(record, number)
    where = f"case {case_id}"
    rewrite = field_of(record, "requested_rewrite", dict, where)
    inside = f"{where}, requested_rewrite"
    no_near_miss(record, FIELDS, where)
    no_near_miss(rewrite, REWRITE_FIELDS, inside)
    target_new, target_true = (
        text_of(field_of(rewrite, name, dict, inside).get("str"), f"{inside}.{name}.str")
        for name in ("target_new", "target_true")
    )
    request = EditRequest(
        case_id=case_id,
        prompt=text_of(field_of(rewrite, "prompt", str, inside), f"{inside}.prompt"),
        subject=subject_of(rewrite, inside, f"{inside}.subject"),
        target_new=target_new,
    )
    if request.target_new.strip() == target_true.strip():
        raise ValueError(
            f"{where}: target_new equals target_true {shown(target_true)}; there is nothing to edit"
        )
    for name, kind in (("relation", str), ("no_subject_relation_conflict", bool)):
        if name in record:
            field_of(record, name, kind, where)
    aliases = _texts_of(record, "aliases", where)
    return EditCase(
        case_id=case_id,
        request=request,
        target_true=target_true,
        paraphrase_prompts=prompts_of(record, "paraphrase_prompts", 1, where),
        neighborhood_prompts=prompts_of(record, "neighborhood_prompts", 1, where),
        generation_prompts=prompts_of(record, "generation_prompts", 0, where),
        relation_id=name_of(rewrite, "relation_id", inside),
        target_id=name_of(rewrite["target_new"], "id", f"{inside}.target_new"),
        aliases=aliases,
        route_prompts=_route_prompts(record, request, aliases, where),
    )


def _route_prompts(
    record: Mapping[str, Any], request: EditRequest, aliases: Sequence[str], where: str
) -> dict[str, tuple[str, ...]]:
    """From the optional fields of the embedded facts, and from those that EasyEdit adds to CounterFact.

    An alias in place of the subject; questions whose answers follow from the edit; questions about the
    subject's other relations.
    """
    other_name = name_of(record, "alternative_subject", where)
    if other_name is not None:
        other_name = text_of(other_name, f"{where}, alternative_subject")
    names = [*aliases, *([] if other_name is None else [other_name])]
    found = {
        "alias": tuple(request.prompt.replace("{}", name) for name in names),
        "hop": (
            *_listed_prompts(record, "hops", where),
            *_question_of(record, "portability", "New Question", where),
        ),
        "same_subject": (
            *_listed_prompts(record, "same_subject", where),
            *_question_of(record, "unrelated_relation", "question", where),
        ),
    }
    return {kind: prompts for kind, prompts in found.items() if prompts}


def _texts_of(record: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A list of texts that may be absent or null."""
    values = [] if record.get(name) is None else field_of(record, name, list, where)
    return tuple(text_of(value, f"{where}, {name}[{i}]") for i, value in enumerate(values))


def _listed_prompts(record: Mapping[str, Any], name: str, where: str) -> Iterator[str]:
    """The field ``prompt`` of every element of a list that may be absent or null."""
    entries = [] if record.get(name) is None else field_of(record, name, list, where)
    for i, entry in enumerate(entries):
        at = f"{where}, {name}[{i}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{at} is {shown(entry)}, not a dict")
        yield text_of(field_of(entry, "prompt", str, at), f"{at}.prompt")


def _question_of(record: Mapping[str, Any], name: str, key: str, where: str) -> Iterator[str]:
    """One text of a dict; both may be absent or null."""
    entry = {} if record.get(name) is None else field_of(record, name, dict, where)
    no_near_miss(entry, (key,), f"{where}, {name}")
    if entry.get(key) is not None:
        yield text_of(entry[key], f"{where}, {name}.{key}")


def select(
    dataset: Dataset, *, edits: int, negatives: int | None, order: str, seed: int
) -> tuple[Selection, list[str]]:
    """The records to edit, and unrelated ones drawn from the rest; and what a report must say of it.

    order: "first" takes the first records of the file, "random" draws them with the seed.
    negatives: how many others; None: as many as edits, of KnowEdit all unrelated prompts of 301 records.
    Fewer if the data has fewer.
    Raises ValueError if there are not enough records to edit.
    """
    cases = dataset.cases
    if edits > len(cases):
        raise ValueError(
            f"{shown(edits)} edits asked, dataset {dataset.name} has {len(cases)} usable records; "
            "lower --batch-size or --num-batches"
        )
    generator = random.Random(seed)
    chosen = list(range(edits)) if order == "first" else generator.sample(range(len(cases)), edits)
    taken = set(chosen)
    rest = [cases[i] for i in range(len(cases)) if i not in taken]
    edited = tuple(cases[i] for i in chosen)
    if dataset.knowedit:
        return _knowedit_selection(dataset, edited, rest, negatives, generator)
    wanted = edits if negatives is None else negatives
    drawn = tuple(generator.sample(rest, min(wanted, len(rest))))
    notes = []
    if len(drawn) < wanted:
        notes.append(
            f"The router has {len(drawn)} unrelated prompts instead of {wanted}: {dataset.name} has no more "
            "records beside the edited ones."
        )
    unrelated = tuple(prompt for case in drawn for prompt in case.unrelated_prompts)
    return Selection(cases=edited, negatives=drawn, unrelated=unrelated), notes


def _knowedit_selection(
    dataset: Dataset,
    edited: tuple[EditCase, ...],
    rest: Sequence[EditCase],
    negatives: int | None,
    generator: random.Random,
) -> tuple[Selection, list[str]]:
    """Unrelated prompts are those of relation specificity, of 301 other records or ``negatives`` in all."""
    drawn = generator.sample(rest, min(KNOWEDIT_OTHERS, len(rest)) if negatives is None else len(rest))
    pairs = [(case, prompt) for case in drawn for prompt in case.unrelated_prompts][:negatives]
    used = {case.case_id for case, _ in pairs}
    selection = Selection(
        cases=edited,
        negatives=tuple(case for case in drawn if case.case_id in used),
        unrelated=tuple(prompt for _, prompt in pairs),
    )
    notes = list(_knowedit_notes(dataset, selection))
    if negatives is None and len(drawn) < KNOWEDIT_OTHERS:
        notes.append(
            f"The router has the {len(pairs)} unrelated prompts of {len(drawn)} records instead of "
            f"{KNOWEDIT_OTHERS}: {dataset.name} has no more records beside the edited ones."
        )
    elif negatives is not None and len(pairs) < negatives:
        notes.append(
            f"The router has {len(pairs)} unrelated prompts instead of {negatives}: {dataset.name} has no "
            "more in the records beside the edited ones."
        )
    return selection, notes


def _knowedit_notes(dataset: Dataset, selection: Selection) -> Iterator[str]:
    """What a report must say of the records: those left out, and edits that cannot or need not all take."""
    if dataset.dropped[NO_SUBJECT]:
        yield f"Records of {dataset.name} left out because {NO_SUBJECT}: {dataset.dropped[NO_SUBJECT]}."
    cases = [case for case in selection.cases if isinstance(case, KnowEditCase)]
    targets: dict[tuple[str, str], Counter[str]] = {}
    for case in cases:
        key = (case.request.subject, case.rewrite_prompt)
        targets.setdefault(key, Counter())[case.request.target_new] += 1
    counts = {
        "write what is true already": sum(case.request.target_new in case.truths for case in cases),
        "repeat another edit": sum(n - 1 for found in targets.values() for n in found.values()),
        "contradict another edit (same subject and prompt, another target; the later one overwrites)": sum(
            found.total() for found in targets.values() if len(found) > 1
        ),
    }
    told = [f"{count} {what}" for what, count in counts.items() if count]
    if told:
        yield f"Of the {len(cases):,} edited records {', '.join(told)}. All are edited and scored."
    left_out = sum((Counter(case.left_out) for case in cases), Counter[str]())
    if left_out:
        listed = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
        yield f"Prompts of the edited records that are not scored: {listed}."
    subjects = {case.request.subject for case in cases}
    shared = [case for case in selection.negatives if case.request.subject in subjects]
    if shared:
        yield (
            f"Of the {len(selection.negatives)} records whose prompts stand for unrelated queries "
            f"{len(shared)} have a subject that is edited too."
        )
