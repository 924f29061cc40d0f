"""Made-up bad inputs: records, files, configs and settings either work or are refused in one line.

SEQMMR_FUZZ says how many of each are tried (``nox -s soak``: 10,000); every run tries the same ones.
"""

import copy
import datetime
import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from benchmarks.tiny import tiny_knowedit_records, tiny_records
from editors import EDITORS
from harness import ablation, data
from harness.arguments import FLAGS
from harness.data import KnowEditCase, load_dataset, select
from harness.generation import load_references
from harness.spec import RunSpec, read_hyperparameters, resolve
from harness.stats import read_texts

fuzz = settings(
    max_examples=int(os.environ.get("SEQMMR_FUZZ", "200")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working folder, far from any hub."""
    found = tmp_path_factory.mktemp("fuzz")

    def refuse(*_: Any) -> None:
        raise ValueError("the hub is far away")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        patch.setattr(data, "hub_records", refuse)
        patch.setattr(data, "hub_file", refuse)
        facts = load_dataset("facts")
        patch.setitem(data.DATASETS, "facts", lambda _: facts)
        patch.delenv("SEQMMR_DATA", raising=False)
        yield found


def refused(work: Callable[[], Any]) -> Any:
    """What ``work`` returns; None if it refuses in one line. Anything else it raises is a failure."""
    try:
        return work()
    except ValueError as error:
        text = str(error)
        assert type(error) is ValueError, repr(error)  # not a UnicodeError, a JSONDecodeError ...
        assert len(text.splitlines()) == 1, text
        return None


# -- what is tried ------------------------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\0",
        "{}",
        "{} and {}",
        "{0}",
        "%s",
        "\ud83d",
        "😀",
        "\u2028",
        "é" * 300,
        "Ada",
        "a/b",
        "..",
    ]
)
TEXTS = ODD | st.text(st.characters(exclude_categories=()), max_size=12)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """The value with a few fields dropped, replaced, renamed, repeated, or filled with odd text."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(value))
        if not found:
            break
        *parents, last = draw(st.sampled_from(found))
        inner = value
        for key in parents:
            inner = inner[key]
        match draw(st.sampled_from(["drop", "value", "text", "insert", "rename"])):
            case "drop":
                del inner[last]
            case "value":
                inner[last] = draw(VALUES)
            case "text":
                inner[last] = draw(TEXTS)
            case "insert" if isinstance(inner[last], str):
                at = draw(st.integers(0, len(inner[last])))
                inner[last] = inner[last][:at] + draw(TEXTS) + inner[last][at:]
            case "rename" if isinstance(inner, dict):
                inner[draw(TEXTS) if draw(st.booleans()) else f"{last}s"] = inner.pop(last)
            case _ if isinstance(inner, list):
                inner.append(copy.deepcopy(inner[last]))
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with a few pieces cut out or put in."""
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.sampled_from([0, 1, 2, 20, len(content)]))
        new = draw(
            st.binary(max_size=4)
            | st.sampled_from([b'"', b"{", b"[", b"\n", b"\\u0000", b"\\ud800", b"\xff\xfe"])
        )
        content = content[:start] + new + content[end:]
    return content


COUNTERFACT, KNOWEDIT = tiny_records(3), tiny_knowedit_records(4)
LINES = "".join(json.dumps(record) + "\n" for record in COUNTERFACT).encode()
KNOWEDIT_LINES = "".join(json.dumps(record) + "\n" for record in KNOWEDIT).encode()


# -- records and files --------------------------------------------------------------------------------------


def check_dataset(path: Path) -> None:
    """Read, choose and resolve: all refuse in one line, or what is read can be edited and scored."""
    dataset = refused(lambda: load_dataset(str(path)))
    if dataset is None:
        return
    assert len({case.case_id for case in dataset.cases}) == len(dataset.cases)
    for case in dataset.cases:
        request = case.request
        assert request.prompt.count("{}") == 1
        assert request.subject.strip()
        assert request.target_new.strip()
        assert case.target_true.strip()
        assert case.rewrite_prompt == request.prompt.replace("{}", request.subject)
        assert "{}" not in case.rewrite_prompt
        if isinstance(case, KnowEditCase):
            assert case.prompts["rewrite"] == (case.rewrite_prompt,)
            assert all(probe.answers[0] for probes in case.probes.values() for probe in probes)
        else:
            assert request.target_new.strip() != case.target_true.strip()
            assert case.paraphrase_prompts
            assert case.neighborhood_prompts
        texts = [text for prompts in case.prompts.values() for text in prompts]
        assert all(text.strip() and "\0" not in text for text in (*texts, *case.generation_prompts))
        json.dumps([case.case_id, texts], ensure_ascii=False).encode()  # as the run folder holds it
    for edits in (1, len(dataset.cases), len(dataset.cases) + 1):
        order = ("first", "random")[edits % 2]
        found = refused(
            lambda edits=edits, order=order: select(dataset, edits=edits, negatives=None, order=order, seed=0)
        )
        assert (found is None) == (edits > len(dataset.cases))
        assert found is None or len(found[0].cases) == edits
        assert found is None or all(len(note.splitlines()) == 1 for note in found[1])
    if (path.parent / "references.json").is_file():
        refused(lambda: load_references(str(path.parent / "references.json"), dataset.cases))
    spec = refused(lambda: resolve({"dataset": str(path), "device": "cpu", "batch_size": 1}))
    assert spec is not None
    assert spec.dataset == str(path)


@fuzz
@given(damaged(COUNTERFACT), st.sampled_from(["lines", "list", "packed"]))
@example([], "list")
@example([{}], "lines")
def test_records_in_counterfacts_schema(folder: Path, records: Any, form: str) -> None:
    check_dataset(written(folder, records, form))


@fuzz
@given(damaged(KNOWEDIT), st.sampled_from(["lines", "list", "packed"]))
@example([COUNTERFACT[0], KNOWEDIT[0]], "lines")
@example([KNOWEDIT[0], COUNTERFACT[0]], "lines")
def test_records_in_knowedits_schema(folder: Path, records: Any, form: str) -> None:
    check_dataset(written(folder, records, form))


def written(folder: Path, records: Any, form: str) -> Path:
    path = folder / ("records.jsonl.gz" if form == "packed" else "records.jsonl")
    text = json.dumps(records) if form == "list" else "".join(json.dumps(r) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode(), 1) if form == "packed" else text.encode())
    return path


@fuzz
@given(damaged_bytes(LINES) | damaged_bytes(KNOWEDIT_LINES) | st.binary(max_size=60))
def test_bytes_of_a_file(folder: Path, content: bytes) -> None:
    path = folder / "raw.jsonl"
    path.write_bytes(content)
    check_dataset(path)
    refused(lambda: read_texts(str(path)))


@fuzz
@given(damaged_bytes(gzip.compress(LINES, 1, mtime=0)))
def test_bytes_of_a_packed_file(folder: Path, content: bytes) -> None:
    path = folder / "raw.jsonl.gz"
    path.write_bytes(content)
    check_dataset(path)


SNIPPETS = [
    {
        "relation_id": record["requested_rewrite"]["relation_id"],
        "target_id": f"Q{number}",
        "samples": [{"text": "some words"}, {"text": "and more"}],
    }
    for number, record in enumerate(COUNTERFACT)
]


@fuzz
@given(damaged(SNIPPETS))
def test_reference_texts(folder: Path, snippets: Any) -> None:
    records = copy.deepcopy(COUNTERFACT)
    for number, record in enumerate(records):
        record["requested_rewrite"]["target_new"]["id"] = f"Q{number}"
    path = folder / "snippets.json"
    path.write_text(json.dumps(snippets), encoding="utf-8")
    cases = load_dataset(str(written(folder, records, "lines"))).cases
    found = refused(lambda: load_references(str(path), cases))
    if found is not None:
        values = [found(case.case_id, ["some words"]) for case in cases]
        assert any(value is not None for value in values)
        assert all(value is None or -1e-9 <= value <= 1 + 1e-9 for value in values)


# -- config and settings ------------------------------------------------------------------------------------

GIVEN = {
    "model": "gpt2", "editors": ["memit", "alphaedit"], "cells": ["baseline", "+R"], "dataset": "facts",
    "select": "first", "stats": "self", "limit_stats": 100, "batch_size": 2, "num-batches": 3,
    "chain": "merged", "pruning_ratio": [0.5, 1], "top-k": 3, "encoder": "minilm", "negatives": 4,
    "evaluate": "final", "capability": "six", "generation": True, "generation_prompts": 1, "seed": 7,
    "dtype": "float32", "device": "cpu", "set": ["memit.steps=9", "alphaedit.ridge=1e1"], "out": "base",
    "hyperparameters": "tuned.yaml",
}  # fmt: skip
SEVERAL = GIVEN | {"runs": {"small": {"batch-size": 3}, "large": {"seed": 1, "set": ["memit.steps=8"]}}}
TUNED = {
    "memit": {"layers": [1, 2], "steps": 4, "learning_rate": 0.1, "source": "here"},
    "alphaedit": {"layers": [1], "nullspace_threshold": 0.02},
    "tuning": {"case_ids": [1, 2], "dataset": {"digest": "0"}},
}
YAML_VALUES = VALUES | st.dates() | st.datetimes() | st.binary(max_size=3) | st.sampled_from(sorted(EDITORS))
MAPPINGS = st.dictionaries(st.sampled_from([*FLAGS, "out", "runs", "top-k"]) | TEXTS, YAML_VALUES, max_size=4)


def jobs(path: str) -> list[ablation.Job]:
    return ablation._jobs(ablation._parser().parse_args(["--config", path]))


def check_config(path: Path) -> None:
    found = refused(lambda: jobs(str(path)))
    if found is None:
        return
    assert len({job.folder for job in found}) == len(found) >= 1
    for job in found:
        spec = job.spec
        assert spec.batch_size >= 1 <= spec.num_batches
        assert RunSpec.from_json(spec.as_json()) == spec
        json.dumps(spec.as_json(), allow_nan=False, ensure_ascii=False).encode()  # as run.json holds it
        assert all(spec.editor(name).config.layers for name in spec.editors)
        if len(found) > 1:
            assert job.folder.parent == found[0].folder.parent
            assert ".." not in job.folder.parts[-1:]


def dumped(value: Any) -> str:
    try:
        return yaml.safe_dump(value)
    except yaml.YAMLError:  # what YAML cannot hold
        return "{}"


@fuzz
@given(damaged(GIVEN) | damaged(SEVERAL) | MAPPINGS)
@example({"runs": {"..": {}}})
@example({"seed": datetime.date(2020, 1, 1)})
def test_configs(folder: Path, values: Any) -> None:
    (folder / "tuned.yaml").write_text(yaml.safe_dump(TUNED))
    path = folder / "run.yaml"
    path.write_bytes(dumped(values).encode("utf-8", "surrogatepass"))
    check_config(path)


@fuzz
@given(damaged_bytes(yaml.safe_dump(SEVERAL).encode()) | st.text(st.sampled_from("ab:-{}[]&*!<|>'\"#\n ,1.")))
def test_text_of_a_config(folder: Path, text: bytes | str) -> None:
    (folder / "tuned.yaml").write_text(yaml.safe_dump(TUNED))
    path = folder / "raw.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    check_config(path)


@fuzz
@given(
    damaged(TUNED),
    st.lists(TEXTS | st.sampled_from(["memit.steps=3", "memit.layers=", "memit.="]), max_size=2),
)
def test_settings(folder: Path, values: Any, overrides: list[str]) -> None:
    path = folder / "mine.yaml"
    path.write_bytes(dumped(values).encode("utf-8", "surrogatepass"))
    file = refused(lambda: read_hyperparameters(str(path)))
    spec = refused(lambda: resolve({"device": "cpu"}, overrides, file))
    if spec is not None:
        json.dumps(spec.as_json(), allow_nan=False)


@fuzz
@given(
    st.sampled_from(sorted(FLAGS)),
    TEXTS | st.sampled_from(["a\udcffb", "/dev/null", "~nobody/x", "cuda:999"]),
)
def test_flags(folder: Path, flag: str, value: str) -> None:
    arguments = [f"--{flag.replace('_', '-')}", value, "--device=cpu"]

    def work() -> Any:
        try:
            return ablation._jobs(ablation._parser().parse_args(arguments))
        except SystemExit as end:
            assert end.code == 2
            return None

    refused(work)
