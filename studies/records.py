"""Two halves of CounterFact that share no subject and no relation: one to choose on, one to report.

Relations that share a template ("The language of {} is" asks for P364 and for P407) stay on the same side.
Each half edits 1,000 records: all original ones, filled up with derived ones; as many others are at hand as
unrelated texts. The half to report comes in three orders of the same records.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.data import local_copy
from harness.paths import read_lines, write_text

PARAGRAPHS = ("wiki_paragraphs*.jsonl",)  # of Wikipedia, in the folder of data
EDITS, OTHERS = 1000, 2000
ORDERS = (0, 1, 2)
SHARED = 3  # records of each of two relations from which a template counts as shared
ORIGINALS, DERIVED = ("counterfact_original*.jsonl",), ("counterfact_reconstructed*.jsonl",)
Record = Mapping[str, Any]


def halves(data: str) -> tuple[list[Record], list[Record]]:
    """Records to choose on and records to report, the edited ones first."""
    originals = {record["case_id"]: record for record in read_lines(local_copy(data, ORIGINALS))}
    records = [
        {**record, **originals.get(record["case_id"], {})}
        for record in read_lines(local_copy(data, DERIVED))
        if record["no_subject_relation_conflict"] and len(record["neighborhood_prompts"]) == 10
    ]
    chosen, reported = _sides(records)
    report = _side(records, reported, set(), seed=1)
    choose = _side(records, chosen, {_subject(record) for record in report}, seed=0)
    return choose, report


def _sides(records: Sequence[Record]) -> tuple[set[str], set[str]]:
    """The relations of each half: groups of them, largest first, to the half with fewer originals."""
    originals = Counter(_relation(r) for r in records if r["source"] == "original")
    sides: tuple[set[str], set[str]] = set(), set()
    for group in sorted(related(records), key=lambda g: (-sum(originals[r] for r in g), min(g))):
        sizes = [sum(originals[r] for r in side) for side in sides]
        sides[sizes.index(min(sizes))].update(group)
    return sides


def related(records: Iterable[Record]) -> list[set[str]]:
    """Relations in groups that share no template with each other."""
    users: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        users[record["requested_rewrite"]["prompt"].strip()][_relation(record)] += 1
    groups: list[set[str]] = []
    for counts in users.values():
        joined = {relation for relation, count in counts.items() if count >= SHARED}
        if joined:
            joined = joined.union(*(group for group in groups if group & joined))
            groups = [group for group in groups if not group & joined] + [joined]
    return groups


def _side(records: Sequence[Record], relations: set[str], taken: set[str], seed: int) -> list[Record]:
    pool = [r for r in records if _relation(r) in relations and _subject(r) not in taken]
    generator = random.Random(seed)
    generator.shuffle(pool)
    pool.sort(key=lambda record: record["source"] != "original")  # stable: shuffled within
    edited, others = pool[:EDITS], pool[EDITS : EDITS + OTHERS]
    generator.shuffle(edited)
    return [*edited, *others]


def write_halves(data: str, folder: Path) -> dict[str, Path]:
    """``choose.jsonl`` and ``report-ORDER.jsonl`` by name, made where they are missing."""
    paths = {name: folder / f"{name}.jsonl" for name in ("choose", *(f"report-{n}" for n in ORDERS))}
    if all(path.is_file() for path in paths.values()):
        return paths
    choose, report = halves(data)
    _write(paths["choose"], choose)
    for order in ORDERS:
        edited = report[:EDITS]
        random.Random(order).shuffle(edited)
        _write(paths[f"report-{order}"], [*edited, *report[EDITS:]])
    return paths


def _write(path: Path, records: Iterable[Record]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _relation(record: Record) -> str:
    return str(record["requested_rewrite"]["relation_id"])


def _subject(record: Record) -> str:
    return str(record["requested_rewrite"]["subject"]).strip().casefold()
