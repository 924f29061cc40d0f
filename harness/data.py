"""Datasets: the embedded facts, CounterFact, and files in CounterFact's schema; selection and checks."""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editors import EditRequest
from harness.paths import read_lines

FACTS_FILE = Path(__file__).parent / "facts" / "facts.jsonl.gz"
COUNTERFACT_HUB = ("azhx/counterfact", "c01c413f856ee38f5c080c9fc5e87aff478e2ff9")
COUNTERFACT_FILES = ("multi_counterfact.json", "counterfact.json", "counterfact_original*.jsonl")


@dataclass(frozen=True, kw_only=True)
class EditCase:
    """One record of a benchmark: the edit, and the prompts that test it."""

    case_id: int | str
    request: EditRequest
    target_true: str
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[str, ...]
    generation_prompts: tuple[str, ...] = ()

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


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """All usable records of a source, with what identifies it."""

    name: str
    source: str  # hub id and revision, or file name
    digest: str  # of all records as read
    cases: tuple[EditCase, ...]
    dropped: Mapping[str, int]  # reason -> records left out


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The records a run edits, and those whose prompts stand for unrelated queries."""

    cases: tuple[EditCase, ...]
    negatives: tuple[EditCase, ...]


def load_dataset(name: str, data: str | None = None) -> Dataset:
    """A dataset by name or by path.

    data: folder or file with local copies, else the variable SEQMMR_DATA, else the hub.
    Raises ValueError in one line for an unknown name, a missing file or a broken record.
    """
    if name in DATASETS:
        return DATASETS[name](data or os.environ.get("SEQMMR_DATA") or None)
    if Path(name).exists():
        return _from_records(name, Path(name).name, read_lines(Path(name)))
    raise ValueError(
        f"unknown dataset {name!r}; known: {', '.join(DATASETS)}; or give the path of a JSONL file "
        "in CounterFact's schema"
    )


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


DATASETS: dict[str, Callable[[str | None], Dataset]] = {"facts": _facts, "counterfact": _counterfact}


def local_copy(data: str, patterns: Sequence[str]) -> Path:
    """The first file that fits one of the patterns, with or without ``.gz``, or ``data`` itself if a file.

    Raises ValueError naming the folder and the patterns.
    """
    folder = Path(data)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"data folder {data!r} does not exist; correct --data or SEQMMR_DATA")
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
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"dataset {name}@{revision[:8]} cannot be fetched: {reason} -- give a local copy with --data "
            "or SEQMMR_DATA"
        ) from None


def _from_records(name: str, source: str, records: Sequence[Mapping[str, Any]]) -> Dataset:
    digest = hashlib.sha256(json.dumps(list(records), sort_keys=True).encode()).hexdigest()
    cases = [to_case(record, number) for number, record in enumerate(records, start=1)]
    repeated = [case_id for case_id, count in Counter(case.case_id for case in cases).items() if count > 1]
    if repeated:
        raise ValueError(f"dataset {source}: case_id {repeated[0]!r} occurs more than once")
    facts = Counter(_fact(record) for record in records)
    kept = [
        case
        for case, record in zip(cases, records, strict=True)
        if facts[_fact(record)] == 1 and record.get("no_subject_relation_conflict", True)
    ]
    dropped = {"another record edits the same subject and relation": len(cases) - len(kept)}
    if not kept:
        raise ValueError(f"dataset {source}: all {len(cases)} records contradict each other")
    return Dataset(name=name, source=source, digest=digest, cases=tuple(kept), dropped=dropped)


def _fact(record: Mapping[str, Any]) -> tuple[str, str]:
    rewrite = record["requested_rewrite"]
    relation = record.get("relation") or rewrite.get("relation_id") or rewrite["prompt"]
    return rewrite["subject"], str(relation)


def to_case(record: Mapping[str, Any], number: int) -> EditCase:
    """A record in CounterFact's schema as a case.

    number: its position, used where it has no case id. Raises ValueError naming case and field.
    """
    case_id = record.get("case_id", number)
    where = f"case {case_id}"
    if not isinstance(case_id, int | str) or isinstance(case_id, bool):
        raise ValueError(f"record {number}: case_id {case_id!r} is neither a number nor a text")
    rewrite = _field(record, "requested_rewrite", dict, where)
    inside = f"{where}, requested_rewrite"
    target_new, target_true = (
        _text(_field(rewrite, name, dict, inside).get("str"), f"{inside}.{name}.str")
        for name in ("target_new", "target_true")
    )
    request = EditRequest(
        case_id=case_id,
        prompt=_field(rewrite, "prompt", str, inside),
        subject=_field(rewrite, "subject", str, inside),
        target_new=target_new,
    )
    if request.target_new.strip() == target_true.strip():
        raise ValueError(f"{where}: target_new equals target_true {target_true!r}; there is nothing to edit")
    return EditCase(
        case_id=case_id,
        request=request,
        target_true=target_true,
        paraphrase_prompts=_prompts(record, "paraphrase_prompts", 1, where),
        neighborhood_prompts=_prompts(record, "neighborhood_prompts", 1, where),
        generation_prompts=_prompts(record, "generation_prompts", 0, where),
    )


def _field(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing")
    if not isinstance(record[name], kind):
        raise ValueError(f"{where}: field {name!r} is {record[name]!r}, not a {kind.__name__}")
    return record[name]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {value!r} is not a text")
    return value


def _prompts(record: Mapping[str, Any], name: str, least: int, where: str) -> tuple[str, ...]:
    values = record.get(name, [])
    if not isinstance(values, list | tuple) or len(values) < least:
        raise ValueError(
            f"{where}: field {name!r} is {values!r}; it needs a list of at least {least} prompts"
        )
    return tuple(_text(value, f"{where}, {name}[{i}]") for i, value in enumerate(values))


def select(
    dataset: Dataset, *, edits: int, negatives: int | None, order: str, seed: int
) -> tuple[Selection, list[str]]:
    """The records to edit, and unrelated ones drawn from the rest; and what a report must say of it.

    order: "first" takes the first records of the file, "random" draws them with the seed.
    negatives: how many others; None: as many as edits. Fewer if the data has fewer.
    Raises ValueError if there are not enough records to edit.
    """
    cases = dataset.cases
    if edits > len(cases):
        raise ValueError(
            f"{edits} edits asked, dataset {dataset.name} has {len(cases)} usable records; "
            "lower --batch-size or --num-batches"
        )
    generator = random.Random(seed)
    chosen = list(range(edits)) if order == "first" else generator.sample(range(len(cases)), edits)
    taken = set(chosen)
    rest = [i for i in range(len(cases)) if i not in taken]
    wanted = edits if negatives is None else negatives
    drawn = generator.sample(rest, min(wanted, len(rest)))
    notes = []
    if len(drawn) < wanted:
        notes.append(
            f"The router has {len(drawn)} unrelated prompts instead of {wanted}: {dataset.name} has no more "
            "records beside the edited ones."
        )
    selection = Selection(cases=tuple(cases[i] for i in chosen), negatives=tuple(cases[i] for i in drawn))
    return selection, notes
