"""What is said of a run in words: its facts, and notes under its tables."""

from __future__ import annotations

from collections.abc import Sequence

from reports.cells import MISSING
from reports.load import Run
from reports.names import name_of
from reports.rows import Row


def describe(run: Run) -> list[tuple[str, str]]:
    """What the run was, as far as `run.json` and the records say."""
    first, spec, provenance = run.records[0], run.spec, run.provenance
    size, batches, edits = spec.get("batch_size"), spec.get("num_batches"), run.edits
    commit = provenance.get("commit")
    dirty = "with uncommitted changes" if provenance.get("dirty") else None
    limit = spec.get("limit_stats")
    facts = {
        "Model": _listed(first.model, run.info.get("model_note"), separator="; "),
        "Dataset": _listed(first.dataset, _labelled("selection", spec.get("select"))),
        "Edits": f"{edits:,} ({batches} batches of {size})" if size and batches else f"{edits:,}",
        "Seed": text_of(first.seed),
        "Merging": _listed(
            _named(spec.get("merger")),
            _labelled("pruning ratio", spec.get("pruning_ratio")),
            _labelled("chain", spec.get("chain")),
        ),
        "Router": _listed(
            _named(spec.get("router")),
            _labelled("top-k", spec.get("top_k")),
            _labelled("encoder", spec.get("encoder")),
            _labelled("negatives", spec.get("negatives")),
        ),
        "Statistics": _listed(
            spec.get("stats"), f"at most {limit:,} tokens" if isinstance(limit, int) else None
        ),
        "General tasks": _listed(*(spec.get("capability") or ())),
        "Device": _listed(spec.get("device"), spec.get("dtype")),
        "Digests": _listed(
            f"run {first.run_id[:12]}",
            _short("model", provenance.get("model")),
            _short("dataset", provenance.get("dataset")),
        ),
        "Commit": _listed(commit[:12] if isinstance(commit, str) else None, dirty if commit else None),
        "Status": text_of(run.info.get("status")) if run.info.get("status") != "complete" else MISSING,
    }
    return [(what, value) for what, value in facts.items() if value != MISSING]


def _short(name: str, part: object) -> str | None:
    """The beginning of a digest that the provenance has of something."""
    digest = part.get("digest") if isinstance(part, dict) else None
    return f"{name} {digest[:12]}" if isinstance(digest, str) else None


def warnings_of(run: Run) -> list[str]:
    """What the run itself says a reader must know."""
    notes = run.info.get("notes")
    return list(map(str, notes)) if isinstance(notes, list) else []


def size_notes(rows: Sequence[Row], columns: dict[str, str]) -> list[str]:
    """How many were scored, where all rows agree."""
    parts = []
    for name, title in columns.items():
        records = [record for row in rows if (record := row.at("overall")) is not None]
        sizes = {score.n for record in records if (score := record.score(name)) is not None}
        if len(sizes) == 1:
            parts.append(f"{title} {sizes.pop():,}")
    return [f"Scored: {', '.join(parts)}."] if parts else []


def progress_notes(rows: Sequence[Row]) -> list[str]:
    """A line when rows were scored after different numbers of edits."""
    applied: dict[int, list[str]] = {}
    for row in rows:
        record = row.at("overall")
        if record is not None and record.error is None and not row.is_unedited:
            applied.setdefault(record.edits_applied, []).append(f"{name_of(row.editor)} {row.label}")
    if len(applied) < 2:
        return []
    parts = [f"{', '.join(names)} after {edits:,}" for edits, names in sorted(applied.items())]
    return [f"Rows were scored after different numbers of edits: {'; '.join(parts)}."]


def error_notes(rows: Sequence[Row]) -> list[str]:
    """What failed, and how."""
    notes = []
    for row in rows:
        for error in row.errors():
            text = " ".join(error.split())
            name = f"{name_of(row.editor)} {row.label}".strip()
            notes.append(f"{name}: {text if len(text) <= 400 else text[:399] + '…'}")
    return notes


def text_of(value: object) -> str:
    """A value of a spec in words; a dash for none."""
    if value is None or value == "":
        return MISSING
    return " and ".join(map(text_of, value)) if isinstance(value, list) else str(value)


def _named(value: object) -> str | None:
    return None if text_of(value) == MISSING else text_of(value)


def _labelled(name: str, value: object) -> str | None:
    return None if text_of(value) == MISSING else f"{name} {text_of(value)}"


def _listed(*parts: object, separator: str = ", ") -> str:
    return separator.join(text_of(part) for part in parts if part is not None) or MISSING
