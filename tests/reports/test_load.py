from __future__ import annotations

import json
import os

import pytest

from reports.load import load_run, newest_run


def test_of_one_identity_the_last_is_kept_and_stands_last(record, write_run):
    first, other = record(error="killed"), record("alphaedit", value=0.7)
    again = record(value=0.9)
    run = load_run(write_run([first, other, again]))
    assert run.records == (other, again)


@pytest.mark.parametrize("line", ["{", "[]", "", '{"schema_version": 1, "colour": 3}'])
def test_a_broken_line_is_named(record, write_run, line):
    folder = write_run([record(value=0.5)])
    path = folder / "records.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2: "):
        load_run(folder)


def test_bytes_that_are_no_text_are_named(record, write_run):
    path = write_run([record(value=0.5)]) / "records.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 1: "):
        load_run(path.parent)


@pytest.mark.parametrize("info", ["{", "[]"])
def test_a_broken_run_file_is_named(record, write_run, info):
    folder = write_run([record(value=0.5)])
    (folder / "run.json").write_text(info)
    with pytest.raises(ValueError, match=r"run\.json: "):
        load_run(folder)


def test_records_suffice(record, write_run):
    folder = write_run([record(value=0.5)])
    (folder / "run.json").unlink()
    run = load_run(folder)
    assert run.info == {} and run.spec == {} and len(run.records) == 1


def test_no_folder_and_no_records(tmp_path, write_run):
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        load_run(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no records"):
        load_run(write_run([]))


def test_the_newest_run_is_the_one_written_last(tmp_path, record, write_run):
    for age, name in ((30, "b"), (10, "a"), (20, "c")):
        for path in write_run([record(value=0.5)], name=name).iterdir():
            os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "notes").mkdir()
    assert newest_run(tmp_path).name == "a"


def test_no_newest_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run under"):
        newest_run(tmp_path / "runs")


def test_what_is_not_an_object_in_run_json_counts_as_absent(record, write_run):
    folder = write_run([record(value=0.5)])
    (folder / "run.json").write_text(json.dumps({"spec": 3}))
    assert load_run(folder).spec == {}
