"""Records of the tasks: local files, else the same records of GLUE and MMLU from the hub.

A list is balanced over its labels; its first ten records are for few-shots, the next hundred are the test.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset

FEWSHOT, TEST = slice(0, 10), slice(10, 110)
MEMBERSHIP = Path(__file__).parent / "membership.json"  # per data set: where records 0 to 109 come from
GLUE = ("nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c")
MMLU = ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")

Record = dict[str, Any]
FIELDS: dict[str, tuple[str, ...]] = {  # texts of a record
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "cola": ("sentence",),
    "rte": ("sentence1", "sentence2"),
    "nli": ("sentence1", "sentence2"),
    "mmlu": ("subject", "question", "choices"),
}
GLUE_SPLITS = {
    "sst2": ("sst2", "validation"),
    "mrpc": ("mrpc", "validation"),
    "cola": ("cola", "validation"),
    "rte": ("rte", "validation"),
    "nli": ("rte", "train"),  # the lineage's "NLI" is not MNLI
}


def load(name: str, data: str | None = None, **_: Any) -> DatasetDict:
    """The splits ``fewshot`` (10 records) and ``test`` (100) of one data set; lm-eval calls this.

    name: a key of FIELDS. data: folder with ``glue_NAME.jsonl`` or ``.jsonl.gz``, else the variable
    SEQMMR_DATA, else the hub. Raises ValueError in one line for a missing or broken file.
    """
    records = list(records_of(name, data))
    return DatasetDict(
        fewshot=Dataset.from_list(records[FEWSHOT]),
        test=Dataset.from_list(records[TEST]),
    )


def records_of(name: str, data: str | None = None) -> list[Record]:
    """Records 0 to 109: id, texts, label."""
    folder = data or os.environ.get("SEQMMR_DATA") or None
    if folder is None:
        return _from_hub(name)
    path = _local(folder, name)
    records = _read(path)
    if len(records) < TEST.stop:
        raise ValueError(
            f"file {path.name!r} has {len(records)} records; the task takes records {TEST.start} to "
            f"{TEST.stop - 1}"
        )
    return [
        _checked(record, name, f"{path.name!r}, record {i}") for i, record in enumerate(records[: TEST.stop])
    ]


def _local(folder: str, name: str) -> Path:
    if not Path(folder).is_dir():
        wrong = "is a file" if Path(folder).is_file() else "does not exist"
        raise ValueError(f"data folder {folder!r} {wrong}; correct --data or SEQMMR_DATA")
    for file in (f"glue_{name}.jsonl", f"glue_{name}.jsonl.gz"):
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ValueError(
        f"data folder {folder!r} has no glue_{name}.jsonl (or .jsonl.gz); put it there, or give neither "
        "--data nor SEQMMR_DATA to fetch the records from the hub"
    )


def _read(path: Path) -> list[Record]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"file {str(path)!r} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"file {path.name!r}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"file {path.name!r}, line {number}: {record!r} is not an object")
        records.append(record)
    return records


def _checked(record: Mapping[str, Any], name: str, where: str) -> Record:
    """Id, texts and label of a record; ValueError naming what is wrong with one of them."""
    labels = 4 if name == "mmlu" else 2
    for field in FIELDS[name]:
        value = record.get(field)
        texts = value if field == "choices" else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: field {field!r} is {value!r}, not a text")
        if field == "choices" and len(texts) != labels:
            raise ValueError(f"{where}: {len(texts)} choices, not {labels}")
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < labels:
        raise ValueError(f"{where}: label is {label!r}; it must be from 0 to {labels - 1}")
    if not isinstance(record.get("id"), str | int):
        raise ValueError(f"{where}: id is {record.get('id')!r}, neither a text nor a number")
    return {"id": str(record["id"]), **{field: record[field] for field in FIELDS[name]}, "label": label}


# -- the hub ------------------------------------------------------------------------------------------------


def _from_hub(name: str) -> list[Record]:
    """The records that the local files hold, picked from GLUE or MMLU by what MEMBERSHIP says of them."""
    members: Sequence[Any] = json.loads(MEMBERSHIP.read_text("utf-8"))[name]
    if name == "mmlu":
        rows = _fetch(*MMLU, "all", ("test", "validation", "dev"))
        return _pick_mmlu(rows, members)
    config, split = GLUE_SPLITS[name]
    return _pick_glue(name, _fetch(*GLUE, config, (split,)), members)


def _pick_glue(name: str, rows: Iterable[Mapping[str, Any]], members: Sequence[Any]) -> list[Record]:
    """members: (GLUE's idx, label) in order."""
    by_index = {row["idx"]: row for row in rows}

    def record(row: Mapping[str, Any]) -> Record:
        label = 1 - row["label"] if name == "nli" else row["label"]  # GLUE's RTE has 0 for entailment
        return {field: row[field] for field in FIELDS[name]} | {"label": label}

    return _picked(name, members, lambda member: by_index.get(member[0]), record)


def _pick_mmlu(rows: Iterable[Mapping[str, Any]], members: Sequence[Any]) -> list[Record]:
    """members: (subject, SHA-1 of the question, label) in order."""
    by_question = {(row["subject"], hashlib.sha1(row["question"].encode()).hexdigest()): row for row in rows}  # noqa: S324

    def record(row: Mapping[str, Any]) -> Record:
        return {field: row[field] for field in FIELDS["mmlu"]} | {"label": row["answer"]}

    return _picked("mmlu", members, lambda member: by_question.get((member[0], member[1])), record)


def _picked(
    name: str,
    members: Sequence[Any],
    find: Callable[[Any], Mapping[str, Any] | None],
    record: Callable[[Mapping[str, Any]], Record],
) -> list[Record]:
    """The members in order; ValueError if the hub's data is not what the membership was made from."""
    records = []
    for i, member in enumerate(members):
        row = find(member)
        found = None if row is None else record(row)
        if found is None or found["label"] != member[-1]:
            raise ValueError(
                f"record {i} of {name} is not in the hub's data, or has another label there; give a local "
                f"glue_{name}.jsonl with --data or SEQMMR_DATA"
            )
        records.append(_checked({"id": f"{name}-{i}", **found}, name, f"{name}, record {i}"))
    return records


def _fetch(path: str, revision: str, config: str, splits: Sequence[str]) -> list[Record]:
    try:
        return [
            dict(row)
            for split in splits
            for row in load_dataset(path, config, split=split, revision=revision)
        ]
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}@{revision[:8]} ({config}) cannot be fetched: {reason} -- give local copies with --data "
            "or SEQMMR_DATA"
        ) from None
