"""Files of facts to be edited: JSONL or CSV, a fact a line (docs/editing.md)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from editors import EditRequest
from harness.fields import field_of, find_subject, no_near_miss, prompts_of, subject_of, text_of
from harness.paths import read_csv, read_lines, shown

FIELDS = ("id", "prompt", "subject", "target_new", "target_true", "paraphrases", "unrelated", "aliases")
LISTS = ("paraphrases", "unrelated", "aliases")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact to write, and the prompts that check it."""

    id: int | str
    prompt: str  # exactly one {} where the subject stands
    subject: str
    target_new: str
    target_true: str | None = None  # what the model is thought to say so far
    paraphrases: tuple[str, ...] = ()  # should be continued with target_new too
    unrelated: tuple[str, ...] = ()  # should go on being answered as before
    aliases: tuple[str, ...] = ()  # other names of the subject, for routers that look at it

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def request(self) -> EditRequest:
        return EditRequest(
            case_id=self.id, prompt=self.prompt, subject=self.subject, target_new=self.target_new
        )

    def same_edit(self, other: "Fact") -> bool:
        """Whether both write the same target after the same text."""
        return (self.text, self.target_new) == (other.text, other.target_new)

    def as_json(self) -> dict[str, Any]:
        """Its fields, as a line of a file has them."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], where: str, number: int) -> "Fact":
        """A record with the fields of ``FIELDS``; number: its id if it names none.

        Raises ValueError naming the place and the field for what is wrong.
        """
        given = record.get("id")
        if isinstance(given, bool) or not isinstance(given, int | str | None):
            raise ValueError(f"{where}: id {shown(given)} is neither a number nor a text")
        if isinstance(given, str) and not (given.strip() and given.isprintable()):
            raise ValueError(f"{where}: id {shown(given)} is not a text that can be printed")
        no_near_miss(record, FIELDS, where)
        if unknown := [name for name in record if name not in FIELDS]:
            raise ValueError(f"{where}: unknown field {shown(unknown[0])}; known: {', '.join(FIELDS)}")
        prompt = text_of(field_of(record, "prompt", str, where), f"{where}, prompt").strip()
        subject = subject_of(record, where, f"{where}, subject").strip()
        if "{}" not in prompt:
            place = find_subject(prompt, subject)
            if place is None:
                raise ValueError(
                    f"{where}: subject {shown(subject)} is not in prompt {shown(prompt)}; write it there, or "
                    "{} in its place"
                )
            prompt, subject = prompt[: place.start()] + "{}" + prompt[place.end() :], place.group()
        elif prompt.count("{}") > 1:
            raise ValueError(
                f"{where}: prompt {shown(prompt)} has {{}} {prompt.count('{}')} times; leave one"
            )
        target = text_of(field_of(record, "target_new", str, where), f"{where}, target_new").strip()
        true = record.get("target_true")
        if true is not None:
            true = text_of(true, f"{where}, target_true").strip()
        if true == target:
            raise ValueError(
                f"{where}: target_new equals target_true {shown(target)}; there is nothing to edit"
            )
        lists = {
            name: prompts_of(record, name, 0, where) for name in LISTS if record.get(name) not in (None, [])
        }
        return cls(
            id=number if given is None else given, prompt=prompt, subject=subject, target_new=target,
            target_true=true, **lists,
        )  # fmt: skip


def read_facts(path: Path, first: int = 1) -> list[Fact]:
    """The facts of a JSONL(.gz), JSON or CSV(.gz) file, in its order.

    first: the number from which facts without an id are counted. Raises ValueError naming the file, the
    record and the field for what is wrong; two facts of one id, or of one prompt, are wrong too.
    """
    table = path.name.removesuffix(".gz").endswith(".csv")
    records: Sequence[Mapping[str, Any]] = (
        [_from_cells(row, path, n) for n, row in enumerate(read_csv(path), start=1)]
        if table
        else read_lines(path)
    )
    facts: list[Fact] = []
    places: dict[tuple[str, str], int] = {}
    for number, record in enumerate(records, start=1):
        where = f"facts {path.name}, record {number}"
        fact = Fact.from_json(record, where, first + number - 1)
        for key, what in ((("id", str(fact.id)), f"id {shown(fact.id)}"), (("text", fact.text), "prompt")):
            if key in places:
                raise ValueError(f"{where}: has the {what} of record {places[key]}; leave one of them")
            places[key] = number
        facts.append(fact)
    return facts


def _from_cells(row: Mapping[str, str], path: Path, number: int) -> dict[str, Any]:
    """A row of a CSV as a record: empty cells are absent, lists are lines of a cell or a JSON list."""
    record: dict[str, Any] = {}
    for name, cell in row.items():
        if not cell.strip():
            continue
        record[name] = cell
        if name in LISTS and cell.lstrip().startswith("["):
            try:
                record[name] = json.loads(cell)
            except ValueError:
                raise ValueError(
                    f"facts {path.name}, record {number}: {name} {shown(cell)} is no JSON list; correct it, "
                    "or write one prompt a line in the cell"
                ) from None
        elif name in LISTS:
            record[name] = [line.strip() for line in cell.splitlines() if line.strip()]
    return record
