"""The cases on a page are those of the run, and its script makes the scores of harness/metrics.py of them."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from harness.metrics import (
    FORCED_KINDS,
    KINDS,
    edit_scores,
    forced_scores,
    forced_shares,
    resampling_counts,
    route_scores,
    shown_rows,
    tabulate_cell,
    task_route_score,
    task_scores,
)
from reports.drilldown import FIELDS, TEXT_FIELDS, cases_link, drilldown_html
from reports.load import Run, load_run
from reports.record import Record, Score

Row = dict[str, Any]
RUN_ID = 'a"><script>1'
NASTY = "He said </script><b>\"x\" & 'y' </b>\u2028 \N{GRINNING FACE} العربية \\ {} "
RATIOS, TOP_KS, EDITS = (0.85, 0.5), (2, 3), 4
WEIGHTS = {None: "memit", 0.85: "memit+MM", 0.5: "memit+MM@0.5"}
TASK = "task:towns"


def counterfact_row(rng: random.Random, kind: str) -> Row:
    if kind == "generation":
        return {"text": f"{NASTY}{rng.random()}"}
    if kind == TASK:
        logprobs = [rng.uniform(-9, 0) for _ in range(3)]
        pred = logprobs.index(max(logprobs))
        return {
            "gold": rng.randrange(3), "pred": pred, "choice_logprobs": logprobs,
            "pred_generated": rng.randrange(3),
        }  # fmt: skip
    tokens, right = (3, 2), (rng.randint(0, 3), rng.randint(0, 2))
    new, true = 1.23456, rng.choice([1.23456, 1.23457, rng.uniform(0, 3)])  # ties, and what is nearly one
    return {
        "nll_new": new, "nll_true": true, "sum_nll_new": 3 * new, "sum_nll_true": 2 * true,
        "argmax_new": right[0] == 3, "argmax_true": right[1] == 2,
        "tokens_new": tokens[0], "tokens_true": tokens[1],
        "tokens_right_new": right[0], "tokens_right_true": right[1],
    }  # fmt: skip


def knowedit_row(rng: random.Random, kind: str) -> Row:
    row: Row = {"tokens": 3, "tokens_right": rng.randint(0, 3)}
    if kind.startswith("portability"):
        row |= {"tokens_any": 2, "tokens_right_any": rng.randint(0, 2)}
    if kind == "relation_specificity":
        row |= {"tokens_agreeing": rng.randint(0, 3), "predicted": [1, 2, 3]}
    return row


def prompts_of(kinds: Sequence[str]) -> Iterator[Row]:
    """Two batches of two records; of a task two records more."""
    for case in range(EDITS):
        for number, kind in enumerate(kinds):
            for index in range(1 + (number + case) % 3):
                prompt = f"{NASTY}{case} {kind} {index}"
                yield {
                    "case_id": case,
                    "batch": 1 + case // 2,
                    "kind": kind,
                    "index": index,
                    "prompt": prompt,
                }


def make_rows(schema: str) -> list[Row]:
    rng = random.Random(schema)
    kinds = FORCED_KINDS if schema == "knowedit" else (*KINDS, "generation")
    prompts = list(prompts_of(kinds))
    if schema == "counterfact":
        for index in range(5):
            named = {"case_id": f"town {index}", "batch": None, "kind": TASK, "index": index}
            prompts.append({**named, "prompt": f"Which town?\n{index}"})
    make = knowedit_row if schema == "knowedit" else counterfact_row
    routes = [{str(k): rng.choice(["edited", "unedited"]) for k in TOP_KS} for _ in prompts]
    rows: list[Row] = []
    for weights in ("unedited", *WEIGHTS.values()):
        for edits in (0,) if weights == "unedited" else (2, EDITS):
            for prompt, route in zip(prompts, routes, strict=True):
                row = {"weights": weights, "edits_applied": edits, **prompt, **make(rng, prompt["kind"])}
                if weights != "unedited":
                    row |= {"route": route["2"], "route_score": rng.uniform(-1, 1), "routes": route}
                if edits != 2 or prompt["batch"] == 1:
                    rows.append(row)
    return rows


def scores(schema: str, rows: list[Row], unedited: list[Row] | None, routes: list[str] | None) -> list[Score]:
    """As harness/cells.py makes them."""
    if rows[0]["kind"] == TASK:
        found = task_scores(shown_rows(rows, unedited, routes), unedited, 0)
        return found if routes is None else [*found, task_route_score(routes, 0)]
    if schema == "knowedit":
        found, kinds = forced_scores(forced_shares(rows, unedited, routes), None, 0), FORCED_KINDS
    else:
        counts = resampling_counts(len({row["case_id"] for row in rows}), 0)
        found, kinds = edit_scores(tabulate_cell(rows, unedited, routes), None, counts), tuple(KINDS)
    return found if routes is None else [*found, *route_scores(rows, routes, 0, kinds)]


@pytest.fixture(params=["counterfact", "knowedit"])
def schema(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rows(schema: str) -> list[Row]:
    return make_rows(schema)


@pytest.fixture
def run(schema: str, rows: list[Row], record: Callable[..., Record], write_run: Callable[..., Path]) -> Run:
    """All cells of an editor, at two ratios and two top-k, with the records that the rows make."""
    records = []
    cells: list[tuple[str, str, float | None, int | None]] = [("none", "unedited", None, None)]
    for ratio in WEIGHTS:
        cells += [("memit", "+MM" if ratio else "baseline", ratio, None)]
        cells += [("memit", "+MM+R" if ratio else "+R", ratio, k) for k in TOP_KS]
    for editor, cell, ratio, k in cells:
        weights = "unedited" if editor == "none" else WEIGHTS[ratio]
        for slice_ in ("overall", "batch:1", "batch:2", *([TASK] if schema == "counterfact" else [])):

            def part(weights: str, edits: int, slice_: str = slice_) -> list[Row]:
                inside = {"overall": lambda row: row["batch"], TASK: lambda row: row["kind"] == TASK}
                wanted = inside.get(slice_, lambda row: slice_ == f"batch:{row['batch']}")
                named = (row for row in rows if (row["weights"], row["edits_applied"]) == (weights, edits))
                return [row for row in named if wanted(row)]

            own = part(weights, 0 if editor == "none" else EDITS)
            plain = None if editor == "none" else part("unedited", 0)
            routes = None if k is None else [row["routes"][str(k)] for row in own]
            found = scores(schema, own, plain, routes)
            setting = {"run_id": RUN_ID, "pruning_ratio": ratio, "top_k": k, "slice": slice_}
            records.append(record(editor, cell, scores=tuple(found), **setting))
    spec = {"pruning_ratio": list(RATIOS), "top_k": list(TOP_KS)}
    folder = write_run(records, name="a & b", spec=spec)
    write_cases(folder, rows)
    return load_run(folder)


def write_cases(folder: Path, rows: Sequence[Row], time: int = 0) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "cases.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=time))


def packed(html: str) -> bytes:
    (text,) = re.findall(r'<script type="application/octet-stream;base64">([^<]*)</script>', html)
    return base64.b64decode(text, validate=True)


def unpacked(html: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(gzip.decompress(packed(html)))
    return data


def rebuilt(data: dict[str, Any]) -> Iterator[Row]:
    for part in data["parts"]:
        columns = {name: data["columns"][column] for name, column in part["fields"].items()}
        columns |= {
            name: [data["texts"][i] for i in columns[name]] for name in TEXT_FIELDS if name in columns
        }
        for i in range(part["rows"]):
            named = {name: part[name] for name in ("weights", "edits_applied", "kind")}
            yield named | {name: column[i] for name, column in columns.items()}


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("weights", "kind", "case_id", "index"))


def test_the_page_has_the_final_row_of_every_prompt(run: Run, rows: list[Row]) -> None:
    found = {key(row): row for row in rebuilt(unpacked(drilldown_html(run)))}
    final = {key(row): row for row in rows if row["edits_applied"] != 2}
    assert found.keys() == final.keys()
    for name, row in final.items():
        short = found[name]
        shown = ("weights", "edits_applied", "kind", *FIELDS)
        assert short.keys() == {field for field in shown if row.get(field) is not None}
        for field, value in short.items():
            near = isinstance(value, float) or field == "choice_logprobs"
            assert value == (pytest.approx(row[field], rel=1e-3, abs=1e-4) if near else row[field])
        if "nll_new" in row:
            assert order(short) == order(row)


def order(row: Row) -> tuple[bool, bool]:
    return row["nll_new"] < row["nll_true"], row["nll_new"] > row["nll_true"]


def needs_node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; the page's own arithmetic is not checked")
    return node


EVERY_SCORE = """
const data = JSON.parse(require("fs").readFileSync(0));
const found = [];
for (const record of data.records) {
  for (const metric of Object.keys(record.scores)) {
    const ask = new URLSearchParams({ metric });
    for (const name of SETTING) if (record[name] !== null) ask.set(name, record[name]);
    const { value, n } = contributions(data, ask);
    found.push([...SETTING.map((name) => record[name]), metric, value, n]);
  }
}
console.log(JSON.stringify(found));
"""


def test_the_script_makes_the_scores_of_the_records(run: Run) -> None:
    node, html = needs_node(), drilldown_html(run)
    script = html.rpartition("<script>")[2].partition("// The panel.")[0].partition('"use strict";')[2]
    command = [node, "-e", script + EVERY_SCORE]
    done = subprocess.run(
        command, input=json.dumps(unpacked(html)), capture_output=True, encoding="utf-8", check=True
    )
    found = {tuple(names): (value, n) for *names, value, n in json.loads(done.stdout)}
    expected = {
        (r.editor, r.cell, r.slice, r.merger, r.pruning_ratio and f"{r.pruning_ratio:g}", r.router,
         r.top_k and str(r.top_k),
         score.metric): score
        for r in run.records for score in r.scores
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        value, n = found[name]
        assert n == score.n, name
        if score.metric.startswith("f1"):
            assert value is None
        else:
            near = 1e-3 if score.metric == "gold_margin" else 1e-9
            assert value == pytest.approx(score.value, abs=near), name


def test_the_whole_script_parses(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "script.js"
    script.write_text(drilldown_html(run).rpartition("<script>")[2].partition("</script>")[0], "utf-8")
    subprocess.run([needs_node(), "--check", script], check=True)


def test_nothing_of_a_run_is_markup_and_nothing_is_fetched(run: Run) -> None:
    html = drilldown_html(run)
    assert html.count("<script") == html.count("</script") == 2
    assert "He said" not in html and 'data-run="a&quot;&gt;&lt;script&gt;1"' in html
    assert 'data-name="a &amp; b"' in html
    assert "innerHTML" not in html and "insertAdjacent" not in html
    assert not re.search(r"://|\b(?:src|href|id)=|@import|url\(|fetch\(", html)


def test_the_same_cases_are_the_same_bytes(run: Run, rows: list[Row]) -> None:
    html = drilldown_html(run)
    write_cases(run.path, rows, time=1_000_000_000)
    assert drilldown_html(run) == html
    assert packed(html)[4:8] == bytes(4)  # the time in gzip's header


def test_a_run_without_cases_has_no_section(run: Run) -> None:
    (run.path / "cases.jsonl.gz").unlink()
    assert drilldown_html(run) == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(b'{"weights": "memit"}\n', mtime=0), "line 1"),
        (gzip.compress(b"{\n", mtime=0), "line 1"),
        (gzip.compress(b"{}\n" * 9, mtime=0)[:-9], "cases.jsonl.gz"),
        (b"no gzip", "cases.jsonl.gz"),
    ],
    ids=["no fields", "no JSON", "cut off", "not packed"],
)
def test_broken_cases_are_an_error_that_names_the_file(run: Run, content: bytes, said: str) -> None:
    (run.path / "cases.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cases\.jsonl\.gz") as error:
        drilldown_html(run)
    assert said in str(error.value)


def test_a_link_names_a_score() -> None:
    named = {"run_id": RUN_ID, "editor": "memit", "cell": "+MM+R", "slice": "batch:1", "metric": "score"}
    link = cases_link(**named, pruning_ratio=0.5, top_k=2)
    assert link.startswith("#cases?run_id=a%22%3E") and link.endswith("&pruning_ratio=0.5&top_k=2")
    asked = {**named, "pruning_ratio": "0.5", "top_k": "2"}
    assert parse_qs(link.removeprefix("#cases?")) == {name: [value] for name, value in asked.items()}
    assert list(parse_qs(cases_link(**named).removeprefix("#cases?"))) == list(named)
