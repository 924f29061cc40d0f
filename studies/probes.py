"""The probes of a half of the records, kept beside it."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.capability import load_suite
from harness.data import load_dataset, local_copy, select
from harness.paths import write_text
from harness.route_probes import RouteProbe, first_sentence, route_probes
from harness.stats import read_texts
from studies.records import EDITS, PARAGRAPHS
from tasks import SIX

TASKS, TEXTS = 50, 500  # records of each general task, and plain sentences, of either half


def probes_of(records: Path, data: str, *, half: int) -> list[RouteProbe]:
    """The probes of a file of records whose first ones are edited; made where they are not kept yet.

    half: 0 or 1, which part of the general tasks and of the texts; the halves share none.
    """
    path = records.with_name(f"probes-{records.stem}.jsonl")
    if path.is_file():
        return read_probes(path)
    dataset = load_dataset(str(records))
    selection, _ = select(dataset, edits=EDITS, negatives=None, order="first", seed=0)
    known = {case.case_id for case in (*selection.cases, *selection.negatives)}
    others = [case for case in dataset.cases if case.case_id not in known]
    suite = load_suite(SIX, data)
    by_task = [[item.prompt for item in suite.items if item.task == name] for name in suite.names]
    tasks = [prompt for prompts in by_task for prompt in prompts[half * TASKS :][:TASKS]]
    paragraphs = read_texts(str(local_copy(data, PARAGRAPHS)))
    random.Random(0).shuffle(paragraphs)
    texts = [first_sentence(paragraph) for paragraph in paragraphs[half * TEXTS :][:TEXTS]]
    found = route_probes(selection.cases, others, tasks=tasks, texts=texts, seed=0)
    write_probes(path, found)
    return found


def read_probes(path: Path) -> list[RouteProbe]:
    """Probes of a file of lines."""
    with path.open(encoding="utf-8") as lines:
        return [RouteProbe(**json.loads(line)) for line in lines]


def write_probes(path: Path, probes: Sequence[RouteProbe]) -> None:
    """A file of lines."""
    write_text(path, "".join(json.dumps(asdict(probe), ensure_ascii=False) + "\n" for probe in probes))
