from __future__ import annotations

import gzip
import json
import subprocess
import sys

import pytest

from harness.report import main
from reports import document
from reports.figures import MISSING_NOTE


@pytest.fixture
def run(tmp_path):
    """A run folder with one record."""
    record = {
        **dict.fromkeys(("chain", "pruning_ratio", "top_k", "encoder", "error")),
        "schema_version": 1,
        "run_id": "run",
        "model": "smollm2-135m",
        "dataset": "facts",
        "editor": "memit",
        "cell": "baseline",
        "seed": 0,
        "edits_applied": 100,
        "slice": "overall",
        "spec": {},
        "provenance": {},
        "seconds": 1.0,
        "scores": [
            {
                "metric": "score",
                "value": 0.812,
                "low": 0.78,
                "high": 0.84,
                "n": 100,
                "protocol": "probability",
            }
        ],
    }
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "records.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_prints_markdown(run, capsys):
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "| MEMIT    | baseline | **81.2** [78.0, 84.0] |" in out  # the run's own table
    assert "| MEMIT    | **81.2** [78.0, 84.0] |" in out  # the paper's layout


def test_takes_the_newest_run_by_default(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    assert main(["--paper"]) == 0
    out = capsys.readouterr().out
    assert "\n# one\n" in out
    assert "Table 1, 66 of 66 not comparable: other model (LLaMA3-8B; here smollm2-135m)" in out


@pytest.mark.parametrize(
    ("name", "start"), [("markdown", "# Tables"), ("latex", "\\documentclass"), ("html", "<!doctype html>")]
)
def test_writes_a_file(run, tmp_path, capsys, name, start):
    out = tmp_path / "new" / "report"
    assert main([str(run), "--format", name, "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith(start)
    assert capsys.readouterr().out == ""


def test_shows_several_runs(run, capsys):
    assert main([str(run), str(run)]) == 0
    assert capsys.readouterr().out.count("# one") == 2


def test_the_cases_are_in_html_unless_left_out(run, capsys):
    row = {"weights": "memit", "edits_applied": 100, "case_id": 1, "batch": 1, "kind": "rewrite", "index": 0}
    row |= {"prompt": "The tower stands in", "nll_new": 1.0, "nll_true": 2.0}
    with gzip.open(run / "cases.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    assert main([str(run), "--format", "html"]) == 0
    assert "<a href=" in capsys.readouterr().out
    assert main([str(run), "--format", "html", "--no-cases"]) == 0
    page = capsys.readouterr().out
    assert "<a href=" not in page and "<script" not in page


def test_figures_that_cannot_be_drawn(run, capsys, monkeypatch):
    monkeypatch.setattr(document, "available", lambda: False)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.count("matplotlib") == 1
    assert main([str(run), "--no-figures"]) == 0
    assert "matplotlib" not in capsys.readouterr().out
    assert main([str(run), "--figures"]) == 2
    assert capsys.readouterr().err == f"harness.report: {MISSING_NOTE}\n"


@pytest.mark.parametrize("arguments", [["--format", "pdf"], ["--digits", "9"], ["--colour"]])
def test_wrong_flags_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("prepare", ["absent", "empty", "broken", "none"])
def test_says_in_one_line_what_is_wrong(run, tmp_path, capsys, monkeypatch, prepare):
    monkeypatch.chdir(tmp_path)
    if prepare == "empty":
        (run / "records.jsonl").write_text("")
    elif prepare == "broken":
        (run / "records.jsonl").write_text("{\n")
    elif prepare == "none":
        for path in run.iterdir():
            path.unlink()
    named = {"absent": ["nowhere"], "none": []}.get(prepare, [str(run)])
    assert main(named) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    line = {
        "absent": "no run folder at nowhere",
        "empty": "holds no records",
        "broken": "line 1",
        "none": "no run under",
    }
    assert line[prepare] in captured.err


def test_starts_without_torch():
    heavy = "{'torch', 'transformers', 'matplotlib', 'scipy'}"
    code = f"import sys, harness.report; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
