"""Fields of records in files: there, of the right type, not misspelt; complaints name the place."""

import difflib
import re
from collections.abc import Mapping
from functools import cache
from types import UnionType
from typing import Any

from harness.paths import shown


def case_id_of(record: Mapping[str, Any], number: int) -> int | str:
    """A record's ``case_id``, its number where it has none."""
    case_id = record.get("case_id", number)
    if not isinstance(case_id, int | str) or isinstance(case_id, bool):
        raise ValueError(f"record {number}: case_id {shown(case_id)} is neither a number nor a text")
    if isinstance(case_id, str) and not (case_id.strip() and case_id.isprintable()):
        raise ValueError(f"record {number}: case_id {shown(case_id)} is not a text that can be printed")
    return case_id


def name_of(record: Mapping[str, Any], name: str, where: str) -> str | None:
    """A field that may be absent or null, but is a text where it is given."""
    value: str | None = None if record.get(name) is None else field_of(record, name, str, where)
    return value


@cache
def _meant(name: str, known: tuple[str, ...]) -> str | None:
    """The known field that a name is one slip away from, if it is none itself."""
    near = [] if name in known else difflib.get_close_matches(name, known, 1, 0.85)
    return near[0] if near else None


def no_near_miss(record: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise ValueError for a misspelt field, which would be as good as absent without a word."""
    for name in record:
        meant = _meant(name, known)
        if meant is not None and meant not in record:
            raise ValueError(
                f"{where}: unknown field {shown(name)}, {meant!r} is missing; known: {', '.join(known)}"
            )


def field_of(record: Mapping[str, Any], name: str, kind: type | UnionType, where: str) -> Any:
    """A field that must be there, of this type."""
    if name not in record:
        raise ValueError(f"{where}: field {name!r} is missing")
    if not isinstance(record[name], kind):
        wanted = str(kind).replace("|", "or") if isinstance(kind, UnionType) else kind.__name__
        raise ValueError(f"{where}: field {name!r} is {shown(record[name])}, not a {wanted}")
    return record[name]


def subject_of(record: Mapping[str, Any], where: str, place: str) -> str:
    """The field ``subject``; place: as complaints name it."""
    subject = text_of(field_of(record, "subject", str, where), place)
    if "{}" in subject:
        raise ValueError(f"{place}: {shown(subject)} has {{}}, which marks its place in the prompt")
    return subject


def text_of(value: Any, where: str) -> str:
    """A text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {shown(value)} is not a text")
    return whole_text(value, where)


def whole_text(text: str, where: str) -> str:
    """A text that a file can hold as a model can read it."""
    if "\0" in text:
        raise ValueError(f"{where}: {shown(text)} has a null character")
    return text


def prompts_of(record: Mapping[str, Any], name: str, least: int, where: str) -> tuple[str, ...]:
    """A list of at least so many prompts with their subjects written out; empty where it may be absent."""
    values = record.get(name, [])
    if not isinstance(values, list | tuple) or len(values) < least:
        raise ValueError(
            f"{where}: field {name!r} is {shown(values)}; it needs a list of at least {least} prompts"
        )
    prompts = tuple(text_of(value, f"{where}, {name}[{i}]") for i, value in enumerate(values))
    for i, prompt in enumerate(prompts):
        if "{}" in prompt:
            raise ValueError(f"{where}, {name}[{i}]: {shown(prompt)} still has {{}}; write the subject there")
    return prompts


def find_subject(prompt: str, subject: str) -> re.Match[str] | None:
    """The first place of the subject, spelled as it is if it is there so, else in any case of its letters."""
    pattern = re.escape(subject)
    return re.search(pattern, prompt) or re.search(pattern, prompt, re.IGNORECASE)
