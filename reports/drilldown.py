"""The cases behind a score, inside the HTML report: which records made it, and of which prompts.

A page carries the final outcome of every prompt under every weight set of a run with `cases.jsonl.gz`.
Its script (`drilldown.js`) shows them where a link of `cases_link` is followed, and makes the score anew
from them. Nothing is fetched.

Columns and texts that repeat are kept once, floats shortened, all of it gzipped and in base64: 11 kB per
1,000 rows (a prompt under one weight set) of a synthetic run of 122,000 with random likelihoods, 8 kB of a
real one of 34,000; script and style are 16 kB.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from reports.load import Run
from reports.record import GRID, Record

CASES_FILE = "cases.jsonl.gz"
TEXT_FIELDS = ("prompt", "text")  # kept as positions among the texts
FIELDS = (
    *("case_id", "batch", "index", *TEXT_FIELDS),
    *("nll_new", "nll_true", "argmax_new", "argmax_true"),
    *("tokens_new", "tokens_true", "tokens_right_new", "tokens_right_true"),
    *("tokens", "tokens_right", "tokens_any", "tokens_right_any", "tokens_agreeing"),
    *("gold", "pred", "pred_generated", "choice_logprobs"),
    *("route", "route_score", "routes"),
)
"""What of a row is kept, beside its weights, kind and edits."""

NAMED = {"weights", "edits_applied", "kind", "case_id", "batch", "index", "prompt"}
Row = dict[str, Any]

_PANEL = """\
<dialog>
<form method="dialog"><h2></h2><button>Close</button></form>
<p class="from"></p>
<p class="sum" role="status"></p>
<p class="by"></p>
<div class="tools">
<label>Find <input type="search" autofocus></label>
<label>Show <select>
<option value="">all records</option>
<option value="right">successes: every prompt counts</option>
<option value="wrong">failures: some prompt does not</option>
</select></label>
<label>Order <select>
<option value="">as edited</option>
<option value="lowest">lowest value first</option>
<option value="highest">highest value first</option>
</select></label>
<output></output>
</div>
<div class="records"></div>
</dialog>"""


def cases_link(
    *,
    run_id: str,
    editor: str,
    cell: str,
    slice: str,
    metric: str,
    **setting: Any,
) -> str:
    """The address, inside the page, of the cases behind one score; setting: of ``GRID``."""
    ask = {"run_id": run_id, "editor": editor, "cell": cell, "slice": slice, "metric": metric}
    ask |= {name: value for name, value in _setting(setting).items() if value is not None}
    return f"#cases?{urlencode(ask)}"


def drilldown_html(run: Run) -> str:
    """A run's cases with all that shows them, as one section of a page; empty where it has none."""
    if not (run.path / CASES_FILE).is_file():
        return ""
    packed = base64.b64encode(_gzipped(json.dumps(_data(run), separators=(",", ":"), allow_nan=False)))
    lines = (
        f'<section class="cases" data-run="{escape(run.records[0].run_id)}" data-name="{escape(run.name)}">',
        f"<style>\n{_asset('drilldown.css')}</style>",
        "<p><small>A value that is a link opens the records and prompts behind it.</small></p>",
        _PANEL,
        f'<script type="application/octet-stream;base64">{packed.decode()}</script>',
        f'<script>(() => {{\n"use strict";\n{_asset("drilldown.js")}}})();</script>',
        "</section>",
    )
    return "\n".join(lines) + "\n"


@cache
def _asset(name: str) -> str:
    return (files("reports") / name).read_text(encoding="utf-8")


def _gzipped(text: str) -> bytes:
    """Bytes that depend on the text alone."""
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
        file.write(text.encode())
    return packed.getvalue()


def _data(run: Run) -> dict[str, Any]:
    """What the script unpacks: records with their scores, and the rows as parts of equal weights and kind.

    A part's fields name columns by position, its columns texts likewise.
    """
    texts: dict[Any, int] = {}
    columns: dict[str, int] = {}  # as JSON
    parts = []
    for (weights, edits, kind), rows in _final_rows(run).items():
        fields = {}
        for name in FIELDS:
            column = [row.get(name) for row in rows]
            if all(value is None for value in column):
                continue
            if name in TEXT_FIELDS:
                column = [texts.setdefault(text, len(texts)) for text in column]
            fields[name] = columns.setdefault(json.dumps(column), len(columns))
        parts.append(
            {"weights": weights, "edits_applied": edits, "kind": kind, "rows": len(rows), "fields": fields}
        )
    return {
        "records": list(_scores(run)),
        "parts": parts,
        "columns": [json.loads(column) for column in columns],
        "texts": list(texts),
    }


def _final_rows(run: Run) -> dict[tuple[str, int, str], list[Row]]:
    """(weights, edits, kind) -> shortened rows, for each weight set those after most edits."""
    found: dict[str, tuple[int, dict[str, list[Row]]]] = {}  # weights -> edits, rows by kind
    for row in _read_rows(run):
        edits = row["edits_applied"]
        if row["weights"] not in found or found[row["weights"]][0] < edits:
            found[row["weights"]] = (edits, {})
        most, kinds = found[row["weights"]]
        if edits == most:
            kinds.setdefault(row["kind"], []).append(_shortened(row))
    return {
        (weights, edits, kind): rows
        for weights, (edits, kinds) in found.items()
        for kind, rows in kinds.items()
    }


def _read_rows(run: Run) -> Iterator[Row]:
    path = run.path / CASES_FILE
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield _row(line, number)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error


def _row(line: str, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if not isinstance(row, dict) or not row.keys() >= NAMED:
        raise ValueError(f"line {number} has not all of {', '.join(sorted(NAMED))}")
    return row


def _shortened(row: Mapping[str, Any]) -> Row:
    """What is kept of a row; likelihoods that differ still do."""
    short = {name: _short(row[name]) for name in FIELDS if name in row}
    pair = [name for name in ("nll_new", "nll_true") if name in row]
    if len({short[name] for name in pair}) < len({row[name] for name in pair}):
        short |= {name: row[name] for name in pair}
    return short


def _short(value: Any) -> Any:
    """Floats with 4 significant digits; those of lists, whose differences count, with 4 decimals."""
    if isinstance(value, list):
        return [round(each, 4) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _scores(run: Run) -> Iterator[dict[str, Any]]:
    """The final scores of every slice, with the setting as links name it and the weights that answered."""
    final: dict[tuple[object, ...], Record] = {}
    for record in run.records:
        own = {name: getattr(record, name) for name in GRID}
        key = (record.editor, record.cell, *own.values(), record.slice)
        if record.error is None and (key not in final or final[key].edits_applied <= record.edits_applied):
            final[key] = record
    first = next((record for record in final.values() if "R" in record.cell), None)
    for record in final.values():
        weights = "unedited" if record.cell == "unedited" else record.editor
        if "MM" in record.cell:
            weights = run.weights_name(record.editor, record.merger, record.pruning_ratio)
        if record.slice == "probes":  # which no weights answer
            weights = "probes"
        routed = "R" in record.cell
        leads = routed and first is not None and (record.router, record.top_k) == (first.router, first.top_k)
        yield {
            "editor": record.editor,
            "cell": record.cell,
            "slice": record.slice,
            **_setting({name: getattr(record, name) for name in GRID}),
            "weights": weights,
            "route": run.route_name(record.router, record.top_k) if routed else None,
            "has_route_score": leads,
            "scores": {score.metric: [float(f"{score.value:.8g}"), score.n] for score in record.scores},
        }


def _setting(values: Mapping[str, Any]) -> dict[str, str | None]:
    """A cell's setting as links name it."""
    told = {name: values.get(name) for name in GRID}
    return {
        name: None if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in told.items()
    }
