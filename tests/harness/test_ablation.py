"""The command: what it refuses before a model is loaded, and the grid from end to end on a tiny model."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import harness.kept_targets
import harness.run
from benchmarks.reference import counterfact_rates, forced_prediction, knowedit_rates
from benchmarks.tiny import (
    HashedWords,
    tiny_knowedit_records,
    tiny_model,
    tiny_records,
    tiny_texts,
    tiny_tokenizer,
)
from editors import EDITORS
from editors.capture import inputs_of
from harness import ablation
from harness.deltas import BatchCheckpoint, delta_path, read_delta
from harness.folder import STAGES
from harness.generation import fluency
from harness.grid import Merge
from harness.keys import contexts_of, keys_path, read_keys
from harness.models import load_model, tensors_digest
from harness.paths import read_lines
from harness.replay import Replay, edited_parameters
from harness.scoring import Query, score
from harness.spec import RunSpec
from merging import MERGERS, MergeChain

Row = dict[str, Any]
Write = Callable[..., Path]


LAYERS = ["memit.layers=1,2", "alphaedit.layers=1,2"]
SETTINGS = [
    *LAYERS, "memit.steps=4", "memit.covariance_weight=1", "memit.clamp_norm_factor=4",
    "alphaedit.steps=4", "alphaedit.nullspace_threshold=1", "alphaedit.ridge=0.1",
    "alphaedit.clamp_norm_factor=4",
]  # fmt: skip
BATCHES, SIZE = 3, 2


# -- what is refused ----------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    """The exit status, however the command ends."""
    try:
        return ablation.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harness.run, "load_model", refuse)


@pytest.fixture
def files(tmp_path: Path, tiny_folder: Path, write_jsonl: Write) -> dict[str, str]:
    """Good and bad files by name."""
    write_jsonl(tiny_records(12), "good.jsonl")
    write_jsonl([{"text": text} for text in tiny_texts(20)], "texts.jsonl")
    write_jsonl([{"text": "fine"}, {"title": "no text"}], "no-text.jsonl")
    write_jsonl([{**tiny_records(1)[0], "paraphrase_prompts": []}], "no-paraphrases.jsonl")
    write_jsonl([{**tiny_knowedit_records(1)[0], "portability": "text"}], "odd-knowedit.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"case_id": 1,\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "no-such-thing"}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    (tmp_path / "broken-run").mkdir()
    (tmp_path / "broken-run" / "run.json").write_text('{"spec": ')
    (tmp_path / "odd-run").mkdir()
    (tmp_path / "odd-run" / "run.json").write_text("[]")
    (tmp_path / "odd.yaml").write_text("modell: gpt2\n")
    found = {path.name: str(path) for path in tmp_path.iterdir()}
    return found | {
        "tiny": str(tiny_folder),
        "out": str(tmp_path / "run"),
        "missing": str(tmp_path / "missing"),
    }


def usual(files: dict[str, str], **changes: list[str]) -> list[str]:
    """Arguments that are right; ``changes`` replace the values of flags."""
    given = {
        "model": [files["tiny"]], "dataset": [files["good.jsonl"]], "stats": [files["texts.jsonl"]],
        "set": LAYERS, "batch_size": ["2"], "num_batches": ["2"], "device": ["cpu"], "out": [files["out"]],
    } | changes  # fmt: skip
    return [part for name, values in given.items() for part in (f"--{name.replace('_', '-')}", *values)]


WRONG: list[tuple[str, list[str], list[str]]] = [  # flag, values ({name}: a file), what the line says
    ("model", ["gpt3"], ["unknown model 'gpt3'", "gpt2-xl"]),
    ("model", ["{folder}"], ["config.json"]),
    ("model", ["{missing}"], ["unknown model"]),
    ("model", ["{bert}"], ["unknown architecture 'bert'", "editors/sites.py"]),
    ("model", ["{unknown}"], ["no-such-thing"]),
    ("editors", ["memitt"], ["unknown editor 'memitt'", "alphaedit"]),
    ("editors", [], ["--editors"]),
    ("cells", ["baseline", "+RR"], ["unknown cell '+RR'", "+MM+R"]),
    ("dataset", ["factz"], ["unknown dataset 'factz'", "facts"]),
    ("dataset", ["{missing}"], ["unknown dataset"]),
    ("dataset", ["{broken.jsonl}"], ["broken.jsonl', line 1"]),
    ("dataset", ["{empty.jsonl}"], ["empty.jsonl' has no records"]),
    ("dataset", ["{folder}"], ["cannot be read"]),
    ("dataset", ["{no-paraphrases.jsonl}"], ["case 0", "paraphrase_prompts"]),
    ("dataset", ["{odd-knowedit.jsonl}"], ["case 0", "'portability'"]),
    ("stats", ["wiki"], ["'wiki'", "wikipedia"]),
    ("stats", ["{missing}"], ["missing"]),
    ("stats", ["{no-text.jsonl}"], ["no-text.jsonl', record 2", "'text'"]),
    ("stats", ["{broken.jsonl}"], ["broken.jsonl', line 1"]),
    ("stats", ["{empty.jsonl}"], ["empty.jsonl' has no records"]),
    ("limit_stats", ["0"], ["limit_stats is 0"]),
    ("limit_stats", ["many"], ["--limit-stats", "'many'"]),
    ("batch_size", ["0"], ["batch_size is 0"]),
    ("batch_size", ["2.5"], ["--batch-size", "'2.5'"]),
    ("batch_size", ["1000"], ["2000 edits asked", "12 usable records"]),
    ("num_batches", ["-1"], ["num_batches is -1"]),
    ("chain", ["shadows"], ["unknown chain 'shadows'", "merged"]),
    ("merger", ["slerp"], ["unknown merger 'slerp'", "self-aware", "refit"]),
    ("merger", ["shrink", "shrink"], ["merger", "twice"]),
    ("router", ["subject&"], ["unknown router"]),
    ("pruning_ratio", ["1.5"], ["pruning_ratio is 1.5"]),
    ("pruning_ratio", ["half"], ["--pruning-ratio", "'half'"]),
    ("pruning_ratio", ["0.5", "0.5"], ["pruning_ratio", "twice"]),
    ("router", ["bert"], ["unknown router 'bert'", "topk"]),
    ("top_k", ["0"], ["top_k is 0"]),
    ("encoder", ["no such encoder"], ["'no such encoder'", "minilm"]),
    ("encoder", ["openai:text-embedding-3-small"], ["OPENAI_API_KEY"]),
    ("negatives", ["0"], ["negatives is 0"]),
    ("select", ["last"], ["unknown selection 'last'", "random"]),
    ("evaluate", ["sometimes"], ["'sometimes'", "final"]),
    ("capability", ["seqmmr_sts"], ["unknown task 'seqmmr_sts'", "seqmmr_sst"]),
    ("capability", ["none", "six"], ["none alone"]),
    ("capability", ["six", "seqmmr_nli"], ["twice"]),
    ("capability", ["{missing}.yaml"], ["task file", "does not exist"]),
    ("seed", ["-1"], ["seed is -1"]),
    ("seed", ["x"], ["--seed", "'x'"]),
    ("dtype", ["float8"], ["unknown dtype 'float8'", "bfloat16"]),
    ("device", ["gpu"], ["unknown device 'gpu'", "cuda"]),
    ("device", ["cuda:99"], ["'cuda:99'"]),
    ("set", ["memit.layers=1"], ["alphaedit", "layers"]),
    ("set", [*LAYERS, "memit.layers=1,99"], ["layers up to 99", "blocks 0 to 4"]),
    ("set", [*LAYERS, "memit.nothing=1"], ["unknown field 'nothing' of memit", "steps"]),
    ("set", [*LAYERS, "memit.steps=x"], ["memit.steps=x", "'x'"]),
    ("set", [*LAYERS, "memit.steps=0"], ["memit: steps is 0"]),
    ("set", [*LAYERS, "romme.steps=1"], ["unknown editor, merger or router 'romme'"]),
    ("set", [*LAYERS, "memit-seq.steps=1"], ["'memit-seq' is not in this run"]),
    ("out", ["{good.jsonl}"], ["good.jsonl", "--out"]),
    ("out", ["{good.jsonl}/run"], ["good.jsonl", "--out"]),
    ("out", ["{notes}"], ["notes", "holds no run"]),
    ("out", ["{broken-run}"], ["broken-run", "broken"]),
    ("out", ["{odd-run}"], ["odd-run", "broken"]),
    ("config", ["{missing}"], ["missing", "cannot be read"]),
    ("config", ["{odd.yaml}"], ["odd.yaml", "unknown name 'modell'", "model"]),
    ("nonsense", ["1"], ["--nonsense"]),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("flag", "values", "reasons"), WRONG, ids=[f"{flag} {' '.join(values)}" for flag, values, _ in WRONG]
)
def test_what_is_wrong_is_one_line_before_a_model_is_loaded(
    files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    values: list[str],
    reasons: list[str],
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in sorted(files, key=len, reverse=True):
        values = [value.replace(f"{{{name}}}", files[name]) for value in values]
    assert call(*usual(files, **{flag: values})) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.endswith("\n")
    assert output.err.count("\n") == 1, output.err
    assert all(reason in output.err for reason in reasons), output.err
    assert not Path(files["out"]).exists()
    assert (Path(files["notes"]) / "mine.txt").read_text() == "precious"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "extra",
    [
        ["--resume", "--fresh"],
        ["--data", "/no/such/folder", "--dataset", "counterfact"],
        ["--data", "/no/such/folder", "--capability", "six"],
    ],
)
def test_other_wrong_combinations(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    assert call(*usual(files), *extra) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("no_model")
def test_fresh_does_not_clear_what_is_no_run(files: dict[str, str]) -> None:
    assert call(*usual(files, out=[files["notes"]]), "--fresh") == 2
    assert (Path(files["notes"]) / "mine.txt").read_text() == "precious"


def test_right_arguments_get_as_far_as_the_model(files: dict[str, str], no_model: None) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        call(*usual(files))


# -- the config file ----------------------------------------------------------------------------------------


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The specs that would be run, with what goes beside them; nothing is run."""
    seen: list[Any] = []

    def note(spec: Any, **kwargs: Any) -> int:
        seen.append((spec, kwargs))
        raise ValueError("far enough")

    monkeypatch.setattr(harness.run, "run_grid", note)
    return seen


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_a_config_file_says_what_flags_say(tmp_path: Path, resolved: list[Any]) -> None:
    text = """
    model: gpt2
    editors: [memit-seq]
    cells: [baseline, +MM]
    batch-size: 3
    num_batches: 4
    pruning_ratio: [0.5, 1]
    top-k: 3
    seed: 7
    device: cpu
    encoder:
    set: [memit-seq.steps=9, memit-seq.layers=2]
    out: somewhere
    data: elsewhere
    """
    assert call("--config", config(tmp_path, text)) == 2
    ((spec, more),) = resolved
    assert (spec.model, spec.editors, spec.cells) == ("gpt2", ("memit-seq",), ("baseline", "+MM"))
    assert (spec.batch_size, spec.num_batches, spec.seed) == (3, 4, 7)
    assert (spec.pruning_ratio, spec.top_k, spec.encoder) == ((0.5, 1.0), (3,), "minilm")
    assert spec.settings["memit-seq"]["steps"] == 9
    assert (more["out"], more["data"]) == (Path("somewhere"), "elsewhere")


def test_flags_win_over_the_config_file(tmp_path: Path, resolved: list[Any]) -> None:
    text = "seed: 7\nbatch_size: 3\neditors: memit\ndevice: cpu\nout: a\n"
    text += "set: [memit.steps=9, memit.kl_factor=1]\n"
    flags = ["--seed", "8", "--out", "b", "--set", "memit.steps=10"]
    assert call("--config", config(tmp_path, text), *flags) == 2
    ((spec, more),) = resolved
    assert (spec.seed, spec.batch_size, spec.editors) == (8, 3, ("memit",))
    assert spec.settings["memit"]["steps"] == 10
    assert spec.settings["memit"]["kl_factor"] == 1.0
    assert more["out"] == Path("b")


def test_set_may_be_given_several_times(resolved: list[Any]) -> None:
    call("--device", "cpu", "--set", "memit.steps=9", "--set", "alphaedit.steps=8", "memit.kl_factor=1")
    settings = resolved[0][0].settings
    assert (settings["memit"]["steps"], settings["alphaedit"]["steps"]) == (9, 8)
    assert settings["memit"]["kl_factor"] == 1.0


@pytest.mark.parametrize("text", ["set:\n", "seed:\n", "out:\n"])
def test_a_name_without_a_value_is_as_if_absent(tmp_path: Path, resolved: list[Any], text: str) -> None:
    call("--config", config(tmp_path, text), "--device", "cpu")
    assert resolved[0][0].seed == 0


def test_several_runs_of_one_config_share_what_stands_beside_them(
    tmp_path: Path, resolved: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
    device: cpu
    seed: 7
    set: [memit.steps=9]
    editors: memit
    out: base
    runs:
      small: {batch-size: 3, num-batches: 4}
      large: {batch_size: 5, set: memit.steps=8}
    """
    path = config(tmp_path, text)
    assert call("--config", path, "--num-batches", "6") == 2
    assert [more["out"] for _, more in resolved] == [Path("base/small"), Path("base/large")]
    assert [(spec.batch_size, spec.num_batches, spec.seed) for spec, _ in resolved] == [(3, 6, 7), (5, 6, 7)]
    assert [spec.settings["memit"]["steps"] for spec, _ in resolved] == [9, 8]
    assert "harness.report base/small base/large" in capsys.readouterr().out


def test_a_wrong_run_of_several_is_refused_before_the_first(tmp_path: Path, resolved: list[Any]) -> None:
    assert call("--config", config(tmp_path, "runs: {a: {device: cpu}, b: {editors: memitt}}")) == 2
    assert not resolved


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("runs: {}", ["runs is {}"]),
        ("runs: [a]", ["runs is ['a']"]),
        ("runs: {a: 1}", ["runs is"]),
        ("runs: {../a: {seed: 1}}", ["'../a'", "folder"]),
        ("runs: {a: {sead: 1}}", ["unknown name 'sead'"]),
        ("runs: {a: {out: b}}", ["out belongs beside runs"]),
        ("batch_size: many", ["batch_size is 'many'", "int"]),
        ("batch_size: 2.5", ["batch_size is 2.5", "int"]),
        ("batch_size: true", ["batch_size is True", "int"]),
        ("batch_size: [2, 3]", ["batch_size is [2, 3]", "one value"]),
        ("seed: {a: 1}", ["seed is {'a': 1}"]),
        ("pruning_ratio: [0.5, half]", ["pruning_ratio is [0.5, 'half']", "float"]),
        ("editors: [memit, [alphaedit]]", ["editors"]),
        ("editors: [memit, null]", ["editors"]),
        ("editors: memitt", ["unknown editor 'memitt'"]),
        ("out: [a, b]", ["out is ['a', 'b']", "one value"]),
        ("config: other.yaml", ["unknown name 'config'"]),
        ("fresh: true", ["unknown name 'fresh'"]),
        ("- model", ["no mapping"]),
        ("", ["no mapping"]),
        ("model: [", ["cannot be read"]),
        ("a: b: c", ["cannot be read"]),
    ],
)
def test_a_wrong_config_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, reasons: list[str]
) -> None:
    assert call("--config", config(tmp_path, text), "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(reason in error for reason in [*reasons]), error


# -- the grid, end to end -----------------------------------------------------------------------------------


class Grid:
    """A place with a model, data and an encoder, where the command can be run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "tiny"
        tiny_model("gpt2").save_pretrained(self.model)
        tiny_tokenizer(bos=True).save_pretrained(self.model)
        self.write("records.jsonl", tiny_records(20))
        self.write("texts.jsonl", [{"text": text} for text in tiny_texts(60)])

    def write(self, name: str, rows: list[Row]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, out: Path, *more: str, editors: Sequence[str] = ("memit", "alphaedit")) -> int:
        arguments = [
            "--model", str(self.model), "--dataset", str(self.folder / "records.jsonl"),
            "--stats", str(self.folder / "texts.jsonl"), "--device", "cpu", "--dtype", "float32",
            "--batch-size", str(SIZE), "--num-batches", str(BATCHES), "--out", str(out),
            "--editors", *editors, "--set", *(s for s in SETTINGS if s.split(".")[0] in editors), *more,
        ]  # fmt: skip
        return call(*arguments)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grid]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.run, "encoder", HashedWords)
        yield Grid(tmp_path_factory.mktemp("grid"))


MANY = ["--pruning-ratio", "0.85", "0.5", "--top-k", "2", "3"]


@pytest.fixture(scope="module")
def done(grid: Grid) -> Path:
    """A finished run with several ratios and k; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMMR_CACHE", str(grid.folder / "cache"))
        assert grid.run(grid.folder / "done", *MANY) == 0
    return grid.folder / "done"


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def records_of(out: Path) -> list[Row]:
    return [record | {"seconds": 0} for record in read_lines(out / "records.jsonl")]


def contents(out: Path) -> dict[str, Any]:
    """All that must not depend on when and where a run was made."""
    found: dict[str, Any] = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted((out / "deltas").rglob("*.safetensors"))
    }
    return found | {"cases": (out / "cases.jsonl.gz").read_bytes(), "records": records_of(out)}


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = contents(one), contents(other)
    assert mine.keys() == theirs.keys()
    differing = [name for name in mine if mine[name] != theirs[name]]
    assert not differing


def rows_by_weights(out: Path) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in read_lines(out / "cases.jsonl.gz"):
        found.setdefault(row["weights"], []).append(row)
    return found


def test_the_folder_holds_what_the_contract_names(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    assert names >= {
        "run.json",
        "records.jsonl",
        "cases.jsonl.gz",
        "deltas",
        "report.md",
        "report.tex",
        "report.html",
    }
    info = json.loads((done / "run.json").read_text())
    assert info["status"] == "complete"
    provenance = info["provenance"]
    assert provenance.keys() >= {"commit", "dirty", "packages", "model", "dataset", "case_ids", "threads"}
    assert len(provenance["case_ids"]) == BATCHES * SIZE
    assert provenance["model"]["digest"]
    assert provenance["dataset"]["digest"]
    assert provenance["statistics"]["tokens"] > 0
    assert info["timings"]
    for editor in ("memit", "alphaedit"):
        entry = info["per_editor"][editor]
        assert entry["edit_seconds_per_edit"] > 0
        assert entry["inference_seconds_per_sample"] > 0
        assert entry["peak_memory_bytes"] > 0
        assert sorted(path.name for path in (done / "deltas" / editor).iterdir()) == [
            f"batch-{batch:04d}.safetensors" for batch in range(1, BATCHES + 1)
        ]
    assert info["spec"]["settings"]["memit"]["steps"] == 4
    assert not [path for path in done.rglob("*") if path.name.endswith((".part", ".tmp"))]


def test_records_have_the_fields_of_the_contract(done: Path) -> None:
    records = records_of(done)
    run_id = json.loads((done / "run.json").read_text())["run_id"]
    for record in records:
        assert record.keys() == {
            "schema_version", "run_id", "model", "dataset", "editor", "cell", "chain", "pruning_ratio",
            "top_k", "encoder", "seed", "edits_applied", "slice", "scores", "seconds", "error", "spec",
            "provenance", "merger", "router",
        }  # fmt: skip
        assert record["merger"] == ("self-aware" if "MM" in record["cell"] else None)
        assert record["router"] == ("topk" if record["cell"].endswith("R") else None)
        assert (record["schema_version"], record["run_id"], record["error"]) == (1, run_id, None)
        assert record["edits_applied"] == (0 if record["editor"] == "none" else BATCHES * SIZE)
        assert (
            (record["pruning_ratio"] is not None) == ("MM" in record["cell"]) == (record["chain"] is not None)
        )
        assert (
            (record["top_k"] is not None) == record["cell"].endswith("R") == (record["encoder"] is not None)
        )
        names = {score["metric"] for score in record["scores"]}
        assert names >= {"efficacy", "generalization", "locality", "score", "efficacy_argmax"}
        assert ("route_rewrite" in names) == record["cell"].endswith("R")
        for found in record["scores"]:
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
            assert found["n"] > 0
            assert ("difference" in found) == (
                record["cell"] not in ("unedited", "baseline") and not found["metric"].startswith("route_")
            )
    slices = ["overall", *(f"batch:{k}" for k in range(1, BATCHES + 1))]
    cells = [("unedited", None, None)]
    editor = [
        ("baseline", None, None),
        ("+MM", 0.85, None),
        ("+MM", 0.5, None),
        ("+R", None, 2),
        ("+R", None, 3),
    ]
    editor += [("+MM+R", ratio, k) for ratio in (0.85, 0.5) for k in (2, 3)]
    wanted = [("none", *cell, s) for cell in cells for s in slices]
    wanted += [(name, *cell, s) for name in ("memit", "alphaedit") for cell in editor for s in slices]
    assert [
        tuple(record[name] for name in ("editor", "cell", "pruning_ratio", "top_k", "slice"))
        for record in records
    ] == wanted


def test_cases_have_the_fields_of_the_contract(done: Path) -> None:
    found = rows_by_weights(done)
    assert set(found) == {
        "unedited", *(f"{e}{mark}" for e in ("memit", "alphaedit") for mark in ("", "+MM", "+MM@0.5")),
    }  # fmt: skip
    keys = [
        (row["case_id"], row["kind"], row["index"], row["prompt"], row["batch"]) for row in found["unedited"]
    ]
    assert len(set(keys)) == len(keys) == BATCHES * SIZE * (1 + 2 + 3)
    case_ids = json.loads((done / "run.json").read_text())["provenance"]["case_ids"]
    for weights, rows in found.items():
        assert [(r["case_id"], r["kind"], r["index"], r["prompt"], r["batch"]) for r in rows] == keys
        for row in rows:
            assert row["batch"] == case_ids.index(row["case_id"]) // SIZE + 1
            assert row["edits_applied"] == (0 if weights == "unedited" else BATCHES * SIZE)
            assert ("route" in row) == ("routes" in row) == ("route_score" in row) == (weights != "unedited")
            if weights != "unedited":
                assert row["route"] in ("edited", "unedited")
                assert (row["route"] == "edited") == (row["route_score"] >= 0)
                assert set(row["routes"]) == {"2", "3"}
                assert row["routes"]["2"] == row["route"]
    assert found["memit"] != found["unedited"]
    routes = {row["route"] for row in found["memit"]}
    assert routes == {"edited", "unedited"}, "the encoder of this test sends everything one way"


def rates_by_record(records: list[list[Row]]) -> dict[str, float]:
    """KnowEdit's, from rows grouped as ``counterfact_rates`` takes them."""
    return knowedit_rates([row for rows in records for row in rows])


def recomputed(
    out: Path, record: Row, rates_of: Callable[[list[list[Row]]], dict[str, float]] = counterfact_rates
) -> dict[str, float]:
    """A record's rates and routing shares from cases.jsonl.gz alone."""
    found = rows_by_weights(out)
    unedited = {(row["case_id"], row["kind"], row["index"]): row for row in found["unedited"]}
    weights = "unedited" if record["editor"] == "none" else record["editor"]
    if record["pruning_ratio"] is not None:
        weights += "+MM" if record["pruning_ratio"] == 0.85 else "+MM@0.5"
    records: dict[Any, list[Row]] = {}
    shares: dict[str, dict[Any, list[bool]]] = {}
    for row in found[weights]:
        if record["slice"] not in ("overall", f"batch:{row['batch']}"):
            continue
        shown = row
        if record["top_k"] is not None:
            edited = row["routes"][str(record["top_k"])] == "edited"
            shares.setdefault(f"route_{row['kind']}", {}).setdefault(row["case_id"], []).append(edited)
            shown = row if edited else unedited[row["case_id"], row["kind"], row["index"]]
        records.setdefault(row["case_id"], []).append(shown)
    rates = rates_of(list(records.values()))
    return rates | {
        name: sum(sum(s) / len(s) for s in by_case.values()) / len(by_case)
        for name, by_case in shares.items()
    }


def test_every_figure_follows_from_the_cases_alone(done: Path) -> None:
    for record in records_of(done):
        wanted = recomputed(done, record)
        values = {found["metric"]: found["value"] for found in record["scores"]}
        assert values.keys() == wanted.keys()
        for metric, value in wanted.items():
            assert values[metric] == pytest.approx(value, abs=1e-12), (
                record["cell"],
                record["slice"],
                metric,
            )


def test_differences_are_to_the_editors_own_baseline(done: Path) -> None:
    records = records_of(done)
    base = {
        (r["editor"], r["slice"], s["metric"]): s["value"]
        for r in records if r["cell"] == "baseline" for s in r["scores"]
    }  # fmt: skip
    for record in records:
        for found in record["scores"]:
            if "difference" in found:
                before = base[record["editor"], record["slice"], found["metric"]]
                assert found["difference"] == pytest.approx(found["value"] - before, abs=1e-12)
                assert found["difference_low"] <= found["difference"] <= found["difference_high"]


def test_deltas_add_up_to_the_weights_that_were_scored(grid: Grid, done: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(grid.model)
    names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in (1, 2)]
    case_ids = json.loads((done / "run.json").read_text())["provenance"]["case_ids"]
    from safetensors import safe_open

    for editor in ("memit", "alphaedit"):
        weights = {name: model.get_parameter(name).detach().clone() for name in names}
        for batch in range(1, BATCHES + 1):
            path = delta_path(done, editor, batch)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            assert json.loads(metadata["case_ids"]) == case_ids[(batch - 1) * SIZE : batch * SIZE]
            assert metadata["digest_before"] == tensors_digest(weights)
            delta = read_delta(path, torch.device("cpu"))[0]
            assert set(delta) == set(names)
            weights = {name: weights[name] + change for name, change in delta.items()}
            assert metadata["digest_after"] == tensors_digest(weights)
        edited = AutoModelForCausalLM.from_pretrained(grid.model)
        edited.load_state_dict(weights, strict=False)
        rows = rows_by_weights(done)[editor]
        targets = {
            r["case_id"]: [r["requested_rewrite"][f"target_{which}"]["str"] for which in ("new", "true")]
            for r in read_lines(grid.folder / "records.jsonl")
        }
        answers = score(
            edited, tiny_tokenizer(bos=True), [Query(row["prompt"], *targets[row["case_id"]]) for row in rows]
        )
        for row, answer in zip(rows, answers, strict=True):
            assert row["nll_new"] == pytest.approx(answer.new.nll, abs=1e-4)
            assert row["sum_nll_true"] == pytest.approx(answer.true.sum_nll, abs=1e-4)


def test_the_same_command_gives_the_same_bytes(grid: Grid, done: Path, tmp_path: Path) -> None:
    """In another folder, with empty caches."""
    assert grid.run(tmp_path / "again", *MANY) == 0
    assert_same(tmp_path / "again", done)


def test_a_finished_run_is_not_computed_again(
    grid: Grid, done: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(harness.run, "score", refuse)
    for name in ("memit", "alphaedit"):
        monkeypatch.setattr(EDITORS[name][1], "start", refuse)
    assert grid.run(copied, *MANY) == 0
    assert_same(copied, done)
    output = capsys.readouterr().out
    assert "Efficacy" in output
    assert str(copied) in output


def remove(out: Path, *patterns: str) -> None:
    for pattern in patterns:
        found = list(out.glob(pattern))
        assert found, pattern
        for path in found:
            path.unlink()


LATER = ("scores/memit*", "scores/alphaedit*", "cases.jsonl.gz", "records.jsonl", "report.*")


@pytest.mark.parametrize(
    "gone",
    [
        LATER,
        (*LATER, "deltas/*/batch-0003.safetensors"),
        (*LATER, "deltas/*/batch-000[23].safetensors"),  # the state is then ahead of the deltas
        (*LATER, "deltas/*/batch-000[123].safetensors"),
        (*LATER, "deltas/alphaedit/batch-0002.safetensors"),
    ],
    ids=["scores", "last batch", "two batches", "all batches", "a gap"],
)
def test_what_is_missing_is_made_again_with_the_same_bytes(
    grid: Grid, done: Path, copied: Path, gone: tuple[str, ...]
) -> None:
    remove(copied, *gone)
    assert grid.run(copied, *MANY) == 0
    assert_same(copied, done)


@pytest.mark.parametrize(
    ("function", "at"),
    [("write_delta", 2), ("write_state", 2), ("write_state", 3), ("write_lines_gz", 4)],
)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    grid: Grid, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, at: int
) -> None:
    calls = [0]
    plain = getattr(harness.run, function)

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(harness.run, function, stop)
        assert grid.run(tmp_path / "run", *MANY) == 130
    assert grid.run(tmp_path / "run", *MANY) == 0
    assert_same(tmp_path / "run", done)


@pytest.mark.parametrize("at", [1, 5, 7])
def test_a_stopped_batch_goes_on_from_its_parts(
    grid: Grid, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The parts saved before the stop are used, not made again, and none is left at the end."""
    calls = [0]
    made: list[str] = []
    plain = BatchCheckpoint.save

    def stop(self: BatchCheckpoint, part: str, tensors: Any) -> None:
        calls[0] += 1
        made.append(f"{self.folder.parent.name}/{self.folder.name}/{part}")
        plain(self, part, tensors)
        if calls[0] == at:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(BatchCheckpoint, "save", stop)
    assert grid.run(out, *MANY) == 130
    assert grid.run(out, *MANY) == 0
    assert len(set(made)) == len(made)
    assert not list((out / "state").rglob("batch-*"))
    assert_same(out, done)


def test_editors_that_ask_for_the_same_target_values_share_them(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first batch, and of all that PRUNE's stream has in common with MEMIT's; the same bytes alone."""
    made: list[int] = []
    plain = harness.kept_targets.optimise_targets

    def count(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(harness.kept_targets, "optimise_targets", count)
    editors = ["memit", "prune", "alphaedit"]
    fields = ("steps=4", "layers=1,2", "learning_rate=0.5", "clamp_norm_factor=4")
    same = [f"{editor}.{field}" for editor in editors for field in fields]
    strength = ["memit.covariance_weight=20", "prune.covariance_weight=20"]
    common = ["--cells", "baseline", "--set", *same, *strength]
    assert grid.run(tmp_path / "all", *common, editors=editors) == 0
    assert len(made) == BATCHES + BATCHES - 1
    for editor in ("memit", "alphaedit"):
        own = [setting for setting in (*same, *strength) if setting.split(".")[0] == editor]
        assert grid.run(tmp_path / editor, "--cells", "baseline", "--set", *own, editors=[editor]) == 0

    def change(folder: str, editor: str, batch: int) -> dict[str, torch.Tensor]:
        return read_delta(delta_path(tmp_path / folder, editor, batch), torch.device("cpu"))[0]

    for batch in range(1, BATCHES + 1):
        for one, other in (
            (("memit", "memit"), ("all", "prune")),
            (("alphaedit",) * 2, ("all", "alphaedit")),
        ):
            alone, together = change(*one, batch), change(*other, batch)
            assert all(torch.equal(alone[name], together[name]) for name in alone)


HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_belongs_to_one_process_at_a_time_and_is_free_when_that_dies(
    grid: Grid, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copied)
    command = [sys.executable, "-c", HOLDER, str(copied / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert grid.run(copied, *MANY) == 2
        assert "another process is working on folder" in capsys.readouterr().err
        assert contents(copied) == before
        holder.kill()
    assert grid.run(copied, *MANY) == 0
    assert contents(copied) == before


def test_another_spec_in_the_same_folder_is_refused_with_the_differences(
    grid: Grid, done: Path, copied: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grid.run(copied, *MANY, "--seed", "5", "--chain", "merged") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "seed: 0 there, 5 now" in error
    assert "chain: 'shadow' there, 'merged' now" in error
    assert "--fresh" in error
    assert_same(copied, done)


def test_another_version_of_a_stage_is_refused(
    grid: Grid, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(STAGES, "scoring", 2)
    assert grid.run(copied, *MANY) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "another version of the code (scoring: 1 there, 2 now)" in error


def test_fresh_begins_anew(grid: Grid, done: Path, copied: Path) -> None:
    (copied / "mine.txt").write_text("kept")
    assert grid.run(copied, "--cells", "baseline", "--fresh", editors=["memit"]) == 0
    assert {record["cell"] for record in records_of(copied)} == {"unedited", "baseline"}
    assert not (copied / "deltas" / "alphaedit").exists()
    assert set(rows_by_weights(copied)) == {"unedited", "memit"}
    assert not any("route" in row for row in rows_by_weights(copied)["memit"])
    assert (copied / "mine.txt").read_text() == "kept"


def test_changed_records_are_another_run(
    grid: Grid, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = grid.folder / "records.jsonl"
    before = path.read_text()
    try:
        path.write_text(before.replace(' is"', ' was"', 1))
        assert grid.run(copied, *MANY) == 2
        assert "data_digest" in capsys.readouterr().err
    finally:
        path.write_text(before)


def test_changed_weights_are_another_run(
    grid: Grid, done: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(*args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        return type(loaded)(**{**vars(loaded), "digest": "another"})

    monkeypatch.setattr(harness.run, "load_model", other)
    assert grid.run(copied, *MANY) == 2
    assert "was made with another model" in capsys.readouterr().err
    assert_same(copied, done)


@pytest.mark.parametrize("chain", ["shadow", "merged"])
def test_merging_that_prunes_nothing_is_the_baseline(
    grid: Grid, done: Path, tmp_path: Path, chain: str
) -> None:
    out = tmp_path / "run"
    assert grid.run(out, "--chain", chain, "--pruning-ratio", "0") == 0
    found: dict[tuple[str, ...], Any] = {}
    for record in records_of(out):
        scores = [
            {name: value for name, value in s.items() if not name.startswith("difference")}
            for s in record["scores"]
        ]
        found[record["editor"], record["cell"], record["slice"]] = scores
    for editor in ("memit", "alphaedit"):
        for part in ("overall", "batch:1", "batch:2", "batch:3"):
            assert found[editor, "+MM", part] == found[editor, "baseline", part]
            assert found[editor, "+MM+R", part] == found[editor, "+R", part]
    for editor in ("memit", "alphaedit"):
        rows = rows_by_weights(out)
        assert [row["nll_new"] for row in rows[f"{editor}+MM"]] == [row["nll_new"] for row in rows[editor]]
    assert (out / "deltas" / "memit+MM").is_dir() == (chain == "merged")
    baseline = [r for r in records_of(done) if r["cell"] == "baseline" and r["slice"] == "overall"]
    same = [r for r in records_of(out) if r["cell"] == "baseline" and r["slice"] == "overall"]
    assert [r["scores"] for r in same] == [r["scores"] for r in baseline]


def test_the_merged_chain_edits_what_it_merged(grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert grid.run(out, "--chain", "merged", "--cells", "+MM", "+MM+R", *MANY) == 0
    folders = {path.name for path in (out / "deltas").iterdir()}
    assert folders == {f"{editor}+MM{mark}" for editor in ("memit", "alphaedit") for mark in ("", "@0.5")}
    model = AutoModelForCausalLM.from_pretrained(grid.model)
    config, kind = MERGERS["self-aware"]
    from safetensors import safe_open

    for chain, ratio in (("memit+MM", 0.85), ("alphaedit+MM@0.5", 0.5)):
        delta = read_delta(delta_path(out, chain, 1), torch.device("cpu"))[0]
        weights = {name: model.get_parameter(name).detach().clone() for name in delta}
        for batch in range(1, BATCHES + 1):
            with safe_open(delta_path(out, chain, batch), framework="pt") as file:
                metadata = file.metadata()
            assert metadata["digest_before"] == tensors_digest(weights)
            weights = kind(config(pruning_ratio=ratio)).merge(
                weights, [read_delta(delta_path(out, chain, batch), torch.device("cpu"))[0]]
            )
            assert metadata["digest_after"] == tensors_digest(weights)
    remove(out, "deltas/*/batch-0003.safetensors", "scores/memit*", "scores/alphaedit*")
    before = {p: p.read_bytes() for p in (out / "deltas").rglob("*.safetensors")} | {
        p: p.read_bytes() for p in [out / "cases.jsonl.gz"]
    }
    assert grid.run(out, "--chain", "merged", "--cells", "+MM", "+MM+R", *MANY) == 0
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("kind", [FloatingPointError, KeyError])
def test_an_editor_that_fails_is_recorded_and_the_rest_goes_on(
    grid: Grid, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    class Broken(EDITORS["memit"][1]):  # type: ignore[misc]
        def start(self, *_: Any, **__: Any) -> None:
            raise kind("the update\nis not finite")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setitem(EDITORS, "memit", (EDITORS["memit"][0], Broken))
        assert grid.run(out, *MANY) == 1
    records = records_of(out)
    broken = [record for record in records if record["editor"] == "memit"]
    assert {record["cell"] for record in broken} == {"baseline", "+MM", "+R", "+MM+R"}
    for record in broken:
        assert "is not finite" in record["error"]
        assert kind.__name__ in record["error"]
        assert "\n" not in record["error"]
        assert record["scores"] == []
    whole = records_of(done)
    for editor in ("none", "alphaedit"):
        assert [r for r in records if r["editor"] == editor] == [r for r in whole if r["editor"] == editor]
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert (out / "report.md").is_file()
    assert grid.run(out, *MANY) == 0  # and the next time it is done after all
    assert_same(out, done)


def test_an_editor_that_fails_midway_leaves_the_next_one_a_clean_model(
    grid: Grid, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = harness.run.write_delta

    def fail(path: Path, *args: Any, editor: str, **kwargs: Any) -> None:
        if editor == "memit" and path.name == "batch-0002.safetensors":
            raise OSError("disk full")
        plain(path, *args, editor=editor, **kwargs)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(harness.run, "write_delta", fail)
        assert grid.run(out, *MANY) == 1
    found = [r for r in records_of(out) if r["editor"] == "alphaedit"]
    assert found == [r for r in records_of(done) if r["editor"] == "alphaedit"]
    assert grid.run(out, *MANY) == 0
    assert_same(out, done)


def test_fewer_unrelated_prompts_are_said_in_the_report(grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert grid.run(out, "--cells", "+R", "--negatives", "50", editors=["memit"]) == 0
    info = json.loads((out / "run.json").read_text())
    assert len(info["provenance"]["negative_ids"]) == 20 - BATCHES * SIZE
    assert not set(info["provenance"]["negative_ids"]) & set(info["provenance"]["case_ids"])
    assert "14 unrelated prompts instead of 50" in " ".join(info["notes"])
    assert "14 unrelated prompts instead of 50" in (out / "report.md").read_text()


def test_half_precision_models_run_and_agree_with_themselves(grid: Grid, tmp_path: Path) -> None:
    for name in ("one", "two"):
        cells = ("--cells", "baseline", "+MM")
        assert grid.run(tmp_path / name, "--dtype", "bfloat16", *cells, editors=["memit"]) == 0
    assert_same(tmp_path / "one", tmp_path / "two")
    rows = rows_by_weights(tmp_path / "one")
    assert [row["nll_new"] for row in rows["memit"]] != [row["nll_new"] for row in rows["unedited"]]
    delta = read_delta(delta_path(tmp_path / "one", "memit", 1), torch.device("cpu"))[0]
    assert {tensor.dtype for tensor in delta.values()} == {torch.float32}


def test_cases_are_packed_without_a_time(done: Path) -> None:
    content = (done / "cases.jsonl.gz").read_bytes()
    assert content[4:8] == b"\0\0\0\0"
    assert gzip.decompress(content).endswith(b"}\n")


@pytest.mark.parametrize("chain", ["shadow", "merged"])
@pytest.mark.parametrize(
    "cells", [["+MM"], ["+MM+R"], ["+R"], ["+MM", "+R"], ["baseline", "+MM+R"]], ids="".join
)
def test_any_cells_can_be_asked_for(grid: Grid, tmp_path: Path, chain: str, cells: list[str]) -> None:
    assert grid.run(tmp_path / "run", "--cells", *cells, "--chain", chain, editors=["memit"]) == 0
    found = {
        record["cell"]: record for record in records_of(tmp_path / "run") if record["slice"] == "overall"
    }
    assert list(found) == ["unedited", *cells]
    for cell in cells:
        differs = ["difference" in score for score in found[cell]["scores"] if score["protocol"] != "routing"]
        expected = cell != "baseline" and bool({"baseline", "+R"} & set(cells))  # unmerged outcomes are there
        assert all(differs) == any(differs) == expected


def test_a_router_that_fails_costs_the_routed_cells_only(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(HashedWords):
        def __call__(self, texts: Sequence[str]) -> torch.Tensor:
            raise RuntimeError("the service is away")

    monkeypatch.setattr(harness.run, "encoder", Broken)
    assert grid.run(tmp_path / "run", editors=["memit"]) == 1
    for record in records_of(tmp_path / "run"):
        if "R" in record["cell"]:
            assert record["error"] == "RuntimeError: the service is away"
        else:
            assert record["scores"] and "error" not in {k for k, v in record.items() if v is not None}


def test_a_delta_that_does_not_follow_is_refused(grid: Grid, done: Path, copied: Path) -> None:
    first, second = (delta_path(copied, "memit", batch) for batch in (1, 2))
    second.write_bytes(first.read_bytes())
    shutil.rmtree(copied / "scores")
    assert grid.run(copied, *MANY) == 1
    errors = {r["editor"]: r["error"] for r in records_of(copied) if r["slice"] == "overall" and r["error"]}
    assert set(errors) == {"memit"}
    assert "made on other weights" in errors["memit"]


def test_likelihoods_that_are_not_finite_are_no_result(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = MergeChain.step

    def broken(self: MergeChain, *args: Any) -> dict[str, torch.Tensor]:
        return {name: value * float("nan") for name, value in plain(self, *args).items()}

    monkeypatch.setattr(MergeChain, "step", broken)
    assert grid.run(tmp_path / "run", "--cells", "baseline", "+MM", editors=["memit"]) == 1
    found = {r["cell"]: r for r in records_of(tmp_path / "run") if r["slice"] == "overall"}
    assert found["baseline"]["scores"]
    assert "not finite" in found["+MM"]["error"]


# -- all editors --------------------------------------------------------------------------------------------

EVERY = {
    "ft": ["layers=2", "steps=2"],
    "rome": ["layers=2", "steps=3"],
    "r-rome": ["layers=2", "steps=3"],
    "memit+blue": ["layers=1,2", "steps=3", "covariance_weight=1"],
    "memit-seq": ["layers=1,2", "steps=3", "covariance_weight=1"],
    "emmet": ["layers=1", "steps=3", "covariance_weight=1"],
    "pmet": ["layers=1,2", "steps=3", "covariance_weight=1"],
    "rect": ["layers=1,2", "steps=3", "covariance_weight=1"],
    "prune": ["layers=1,2", "steps=4", "covariance_weight=1", "clamp_norm_factor=4"],
    "alphaedit+blue": ["layers=1,2", "steps=3", "nullspace_threshold=1", "ridge=0.1"],
    "ultraedit": ["up_layers=3", "down_layers=2", "learning_rate=1e-3"],
}


def fields_of(editors: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    return ["--set", *(f"{editor}.{field}" for editor in editors for field in EVERY[editor]), *more]


@pytest.mark.parametrize("chain", ["shadow", "merged"])
def test_all_editors_run_in_one_grid(grid: Grid, tmp_path: Path, chain: str) -> None:
    editors = list(EVERY)
    assert {*editors, "memit", "alphaedit"} == set(EDITORS)
    out = tmp_path / "run"
    more = [*fields_of(editors), "--chain", chain, "--cells", "baseline", "+MM", "+R"]
    assert grid.run(out, *more, editors=["memit", *editors]) == 0
    rows = rows_by_weights(out)
    base = {name: p.clone() for name, p in tiny_model("gpt2").named_parameters()}
    for editor in editors:
        errors = {r["cell"]: r["error"] for r in records_of(out) if r["editor"] == editor}
        merged = "not applicable" if editor == "prune" else None
        assert errors == {"baseline": None, "+MM": merged, "+R": None}
        assert (f"{editor}+MM" in rows) == (editor != "prune")
        assert len(rows[editor]) == len(rows["unedited"])
        assert rows[editor] != rows["unedited"]
        for batch in range(1, BATCHES + 1):
            delta, _ = read_delta(delta_path(out, editor, batch), torch.device("cpu"))
            assert all(change.shape == base[name].shape for name, change in delta.items())
            assert all(change.any() for change in delta.values())


def test_prune_is_released_restrained_and_edits_unrestrained(grid: Grid, tmp_path: Path) -> None:
    """Its batches are MEMIT's; what is scored is not, once a bound is exceeded (here by adding twice)."""
    runs = {}
    for name, flag in (("correct", "false"), ("legacy", "true")):
        runs[name] = tmp_path / name
        more = [*fields_of(["prune"], [f"prune.legacy_double_apply={flag}"]), "--cells", "baseline"]
        assert grid.run(runs[name], *more, editors=["memit", "prune"]) == 0
    for batch in range(1, BATCHES + 1):
        memit, prune = (
            read_delta(delta_path(runs["correct"], e, batch), torch.device("cpu"))[0]
            for e in ("memit", "prune")
        )
        assert all(torch.equal(memit[name], prune[name]) for name in memit)
    info = json.loads((runs["correct"] / "run.json").read_text())
    restrained = info["per_editor"]["prune"]["singular_values_restrained"]
    strip = lambda rows: [{k: v for k, v in row.items() if k != "weights"} for row in rows]
    correct, legacy = (rows_by_weights(runs[name]) for name in ("correct", "legacy"))
    assert (strip(correct["prune"]) == strip(correct["memit"])) == (not any(restrained.values()))
    assert strip(legacy["prune"]) != strip(legacy["memit"])


# -- KnowEdit -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowedit(grid: Grid) -> Path:
    """A finished run on records in KnowEdit's schema; not to be changed."""
    records = tiny_knowedit_records(20)
    for record in records:
        record["portability"]["Subject_Aliasing"] = said_unedited(record["subject"])
    records[3]["subject"] = "nobody"
    grid.write("knowedit.jsonl", records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMMR_CACHE", str(grid.folder / "cache"))
        assert grid.run(grid.folder / "knowedit", *knowedit_flags(grid)) == 0
    return grid.folder / "knowedit"


def knowedit_flags(grid: Grid) -> list[str]:
    return ["--dataset", str(grid.folder / "knowedit.jsonl"), *MANY]


def said_unedited(subject: str) -> list[Row]:
    """Prompts after which the tiny model says a word of one token, with that word as their answer."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    found = []
    for verb in ("knows", "speaks", "is", "sings", "reads", "eats", "saw", "left"):
        (token, *_) = forced_prediction(model, tokenizer, f"{subject} {verb}", "Rome")[1]
        word = tokenizer.decode([token])
        if word.strip() and tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"] == [token]:
            found.append({"prompt": f"{subject} {verb}", "ground_truth": word.strip()})
    return found


def answers_of(grid: Grid) -> dict[tuple[int, str, str], list[str]]:
    """(case id, kind, prompt) -> the answers given, the forced one first; read off the file literally."""
    found: dict[tuple[int, str, str], list[str]] = {}
    for record in read_lines(grid.folder / "knowedit.jsonl"):
        entries = [("rewrite", {"prompt": record["prompt"], "ground_truth": record["target_new"]})]
        entries += [("rephrase", {"prompt": record["rephrase_prompt"], "ground_truth": record["target_new"]})]
        entries += [("relation_specificity", e) for e in record["locality"]["Relation_Specificity"]]
        entries += [
            (f"portability_{g.lower()}", e) for g, some in record["portability"].items() for e in some
        ]
        for kind, entry in entries:
            given = entry["ground_truth"]
            if isinstance(given, list):
                given = [a for part in given for a in (part if isinstance(part, list) else [part])]
            found[record["case_id"], kind, entry["prompt"]] = [given] if isinstance(given, str) else given
    return found


def test_knowedit_cases_have_the_fields_of_the_contract(knowedit: Path) -> None:
    found = rows_by_weights(knowedit)
    assert set(found) == {
        "unedited", *(f"{e}{mark}" for e in ("memit", "alphaedit") for mark in ("", "+MM", "+MM@0.5")),
    }  # fmt: skip
    keys = [(row["case_id"], row["kind"], row["index"], row["prompt"]) for row in found["unedited"]]
    assert len(set(keys)) == len(keys)
    kinds = {"rewrite", "rephrase", "relation_specificity", "portability_reasoning"}
    assert {row["kind"] for row in found["unedited"]} >= kinds
    for weights, rows in found.items():
        assert [(row["case_id"], row["kind"], row["index"], row["prompt"]) for row in rows] == keys
        for row in rows:
            assert row.keys() >= {"weights", "edits_applied", "batch", "tokens", "tokens_right"}
            assert not row.keys() & {"nll_new", "nll_true", "argmax_new"}
            assert ("tokens_agreeing" in row) == (row["kind"] == "relation_specificity")
            assert ("route" in row) == (weights != "unedited")
    assert {row["route"] for row in found["memit"]} == {"edited", "unedited"}


def test_every_knowedit_figure_follows_from_the_cases_alone(knowedit: Path) -> None:
    records = records_of(knowedit)
    assert len(records) == (1 + 2 * 9) * (1 + BATCHES)
    for record in records:
        wanted = recomputed(knowedit, record, rates_by_record)
        values = {found["metric"]: found["value"] for found in record["scores"]}
        assert values == pytest.approx(wanted, abs=1e-12), (record["cell"], record["slice"])
        assert {"rewrite_acc", "rephrase_acc", "relation_specificity"} <= values.keys()
        for found in record["scores"]:
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
            assert found["protocol"] == (
                "routing" if found["metric"].startswith("route_") else "teacher_forced"
            )


def test_the_unedited_model_agrees_with_itself(knowedit: Path) -> None:
    for record in records_of(knowedit):
        if record["editor"] == "none":
            (found,) = [s for s in record["scores"] if s["metric"] == "relation_specificity"]
            assert (found["low"], found["value"], found["high"]) == (1, 1, 1)


def test_knowedit_rows_equal_the_literal_argmax(grid: Grid, knowedit: Path) -> None:
    answers, tokenizer = answers_of(grid), tiny_tokenizer(bos=True)
    rows = rows_by_weights(knowedit)
    models = {name: AutoModelForCausalLM.from_pretrained(grid.model) for name in ("unedited", "memit")}
    with torch.no_grad():
        for batch in range(1, BATCHES + 1):
            for name, change in read_delta(delta_path(knowedit, "memit", batch), torch.device("cpu"))[
                0
            ].items():
                models["memit"].get_parameter(name).add_(change)
    differing = right = 0
    for name, model in models.items():
        for row in rows[name]:
            given = answers[row["case_id"], row["kind"], row["prompt"]]
            outcomes = [forced_prediction(model, tokenizer, row["prompt"], answer) for answer in given]
            shares = [sum(a == b for a, b in zip(*outcome, strict=True)) for outcome in outcomes]
            assert (row["tokens"], row["tokens_right"]) == (len(outcomes[0][0]), shares[0])
            right += shares[0] > 0
            if row["kind"].startswith("portability"):
                best = max(share / len(ids) for share, (ids, _) in zip(shares, outcomes, strict=True))
                assert row["tokens_right_any"] / row["tokens_any"] == best
            if row["kind"] == "relation_specificity":
                assert row["predicted"] == outcomes[0][1]
                plain = forced_prediction(models["unedited"], tokenizer, row["prompt"], given[0])[1]
                agreeing = sum(a == b for a, b in zip(plain, outcomes[0][1], strict=True))
                assert row["tokens_agreeing"] == agreeing
                differing += agreeing < row["tokens"]
    assert differing, "the edits of this test change no prediction, so that agreement tests nothing"
    assert right, "no token of any answer is predicted, so that shares are all nothing"


@pytest.mark.parametrize("gone", [LATER, ("scores/*", "cases.jsonl.gz")], ids=["edited", "all"])
def test_missing_knowedit_scores_are_made_again_with_the_same_bytes(
    grid: Grid, knowedit: Path, tmp_path: Path, gone: tuple[str, ...]
) -> None:
    """Agreement is then with the unedited model's stored argmax."""
    again = Path(shutil.copytree(knowedit, tmp_path / "run"))
    remove(again, *gone)
    assert grid.run(again, *knowedit_flags(grid)) == 0
    assert_same(again, knowedit)


def test_the_knowedit_report_has_its_columns_and_notes(knowedit: Path) -> None:
    info = json.loads((knowedit / "run.json").read_text())
    assert sum(info["provenance"]["dataset"]["dropped"].values()) == 1
    assert len(info["provenance"]["negative_ids"]) == 19 - BATCHES * SIZE
    assert not set(info["provenance"]["negative_ids"]) & set(info["provenance"]["case_ids"])
    assert "left out because the subject is not in the prompt: 1" in " ".join(info["notes"])
    assert "the 26 unrelated prompts of 13 records instead of 301" in " ".join(info["notes"])
    for suffix in ("md", "tex", "html"):
        text = (knowedit / f"report.{suffix}").read_text()
        for title in ("Rewrite", "Rephrase", "Subject aliasing", "Relation specificity"):
            assert title in text
        assert "Generalization" not in text


# -- after every batch --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_batch(grid: Grid) -> Path:
    """The run of ``done``, scored after every batch; not to be changed."""
    out = grid.folder / "every-batch"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMMR_CACHE", str(grid.folder / "cache"))
        assert grid.run(out, *MANY, "--evaluate", "every-batch") == 0
    return out


def final_only(rows: list[Row]) -> list[Row]:
    return [row | {"run_id": "", "spec": ""} for row in rows if row["edits_applied"] in (0, BATCHES * SIZE)]


def test_scoring_after_every_batch_leaves_the_final_figures(done: Path, every_batch: Path) -> None:
    assert final_only(records_of(every_batch)) == final_only(records_of(done))
    for weights, rows in rows_by_weights(every_batch).items():
        assert [row for row in rows if row["edits_applied"] in (0, BATCHES * SIZE)] == rows_by_weights(done)[
            weights
        ]


def test_every_batch_is_scored_after_every_later_one(every_batch: Path) -> None:
    cells: dict[Any, list[tuple[int, str]]] = {}
    for record in records_of(every_batch):
        if record["editor"] != "none":
            key = tuple(record[name] for name in ("editor", "cell", "pruning_ratio", "top_k"))
            cells.setdefault(key, []).append((record["edits_applied"], record["slice"]))
    wanted = [
        (point * SIZE, part)
        for point in range(1, BATCHES + 1)
        for part in ["overall", *(f"batch:{k}" for k in range(1, point + 1))]
    ]
    assert len(cells) == 2 * 9
    assert all(found == wanted for found in cells.values())


def test_a_run_stopped_after_a_batch_has_its_figures_there(grid: Grid, every_batch: Path) -> None:
    """The first point is what a run of one batch gives, router corpus and merging included."""
    out = grid.folder / "one-batch"
    case_ids = json.loads((every_batch / "run.json").read_text())["provenance"]["negative_ids"]
    assert len(case_ids) == BATCHES * SIZE
    assert grid.run(out, *MANY, "--num-batches", "1", "--negatives", str(BATCHES * SIZE)) == 0
    mine, theirs = (
        [
            {k: v for k, v in row.items() if k not in ("route", "route_score", "routes")}
            for rows in rows_by_weights(folder).values()
            for row in rows
            if row["edits_applied"] == SIZE and row["batch"] == 1
        ]
        for folder in (every_batch, out)
    )
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            wanted = pytest.approx(other[name], rel=1e-4) if "nll" in name else other[name]
            assert value == wanted


def test_figures_of_every_batch_follow_from_the_cases_alone(every_batch: Path) -> None:
    cases = read_lines(every_batch / "cases.jsonl.gz")
    unedited = {(r["case_id"], r["kind"], r["index"]): r for r in cases if r["weights"] == "unedited"}
    seen = set()
    for record in records_of(every_batch):
        if record["cell"] != "+R" or record["slice"] != "overall":
            continue
        rows = [
            row
            if row["routes"][str(record["top_k"])] == "edited"
            else unedited[row["case_id"], row["kind"], row["index"]]
            for row in cases
            if (row["weights"], row["edits_applied"]) == (record["editor"], record["edits_applied"])
        ]
        by_case: dict[Any, list[Row]] = {}
        for row in rows:
            by_case.setdefault(row["case_id"], []).append(row)
        values = {score["metric"]: score["value"] for score in record["scores"]}
        for metric, value in counterfact_rates(list(by_case.values())).items():
            assert values[metric] == pytest.approx(value, abs=1e-12)
        seen.add(record["edits_applied"])
    assert seen == {SIZE * point for point in range(1, BATCHES + 1)}


def test_routes_of_a_point_know_only_its_edits(every_batch: Path) -> None:
    rows = [
        r for r in rows_by_weights(every_batch)["memit"] if r["batch"] == 1 and r["kind"] == "neighborhood"
    ]
    scores: dict[Any, dict[int, float]] = {}
    for row in rows:
        scores.setdefault((row["case_id"], row["index"]), {})[row["edits_applied"]] = row["route_score"]
    assert all(len(points) == BATCHES for points in scores.values())
    assert any(len(set(points.values())) > 1 for points in scores.values())


def test_a_stopped_run_of_every_batch_goes_on(grid: Grid, every_batch: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(every_batch, tmp_path / "run"))
    for name in ("cases.jsonl.gz", "records.jsonl", "scores/after-0001/memit+MM.jsonl.gz"):
        (out / name).unlink()
    assert grid.run(out, *MANY, "--evaluate", "every-batch") == 0
    assert_same(out, every_batch)


# -- generated texts ----------------------------------------------------------------------------------------


def test_generated_texts_are_scored_routed_and_kept(grid: Grid, tmp_path: Path) -> None:
    records = tiny_records(12)
    for i, record in enumerate(records):
        record["generation_prompts"] = ["The river runs", "The river runs", record["paraphrase_prompts"][0]]
        record["requested_rewrite"]["relation_id"] = "P1"
        record["requested_rewrite"]["target_new"]["id"] = f"Q{i % 2}"
    data, references = tmp_path / "data.jsonl", tmp_path / "references.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"relation_id": "P1", "target_id": "Q0", "samples": [{"text": "the river and the town"}]}
    references.write_text(json.dumps(entry) + "\n")
    out = tmp_path / "run"
    more = ["--dataset", str(data), "--generation", "--references", str(references)]
    assert grid.run(out, *more, editors=["memit"]) == 0
    rows = {
        name: [r for r in rows if r["kind"] == "generation"] for name, rows in rows_by_weights(out).items()
    }
    assert set(rows) == {"unedited", "memit", "memit+MM"}
    assert all(len(texts) == 3 * BATCHES * SIZE for texts in rows.values())
    assert {r["route"] for r in rows["memit"]} == {"edited", "unedited"}

    def mean_fluency(texts: list[str]) -> float:
        return sum(map(fluency, texts)) / len(texts)

    for record in records_of(out):
        if record["slice"] != "overall":
            continue
        own = rows[
            "unedited" if record["editor"] == "none" else "memit+MM" if "MM" in record["cell"] else "memit"
        ]
        shown = [
            plain["text"] if "R" in record["cell"] and row["route"] == "unedited" else row["text"]
            for row, plain in zip(own, rows["unedited"], strict=True)
        ]
        scores = {score["metric"]: score for score in record["scores"]}
        assert scores["fluency"]["value"] == pytest.approx(mean_fluency(shown))
        assert 0 <= scores["consistency"]["value"] <= 1
        assert scores["consistency"]["n"] < scores["fluency"]["n"]  # one of the two targets has references
    report = (out / "report.md").read_text()
    assert "Fluency" in report and "Consistency" in report
    fewer = tmp_path / "fewer"
    assert grid.run(fewer, *more, "--generation-prompts", "1", editors=["memit"]) == 0
    for name, texts in rows_by_weights(fewer).items():
        mine = [r for r in texts if r["kind"] == "generation"]
        assert [r["text"] for r in mine] == [r["text"] for r in rows[name] if r["index"] == 0]


def test_generation_is_refused_where_there_is_nothing_to_generate(
    files: dict[str, str],
    no_model: None,
    tmp_path: Path,
    write_jsonl: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = [record | {"generation_prompts": []} for record in tiny_records(12)]
    plain = str(write_jsonl(records, "plain.jsonl"))
    assert call(*usual(files, dataset=[plain]), "--generation") == 2
    assert "generation_prompts" in capsys.readouterr().err
    for flag, value in (("--references", files["texts.jsonl"]), ("--generation-prompts", "2")):
        assert call(*usual(files), flag, value) == 2
        assert "--generation" in capsys.readouterr().err


# -- mergers and routers beside the paper's -----------------------------------------------------------------


MODULES = [
    "--merger", "refit", "self-aware", "random", "shrink", "--router", "subject&relation", "topk",
    "--top-k", "2", "3", "--probes", "--set", "refit.forgotten=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def modules(grid: Grid) -> Path:
    """A finished run with several mergers and routers; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMMR_CACHE", str(grid.folder / "cache"))
        assert grid.run(grid.folder / "modules", *MODULES, editors=["memit"]) == 0
    return grid.folder / "modules"


MERGED = {  # (merger, ratio) of a record -> name of its weights
    ("refit", None): "memit+MM",
    ("self-aware", 0.85): "memit+MM@self-aware",
    ("random", 0.85): "memit+MM@random",
    ("shrink", None): "memit+MM@shrink",
}
ROUTED = {("subject&relation", None): "subject&relation", ("topk", 2): "topk@2", ("topk", 3): "topk@3"}


def test_every_merger_and_router_of_a_run_has_its_cells(modules: Path) -> None:
    overall = [r for r in records_of(modules) if r["slice"] == "overall"]
    assert [(r["cell"], r["merger"], r["pruning_ratio"]) for r in overall if r["cell"] == "+MM"] == [
        ("+MM", *merge) for merge in MERGED
    ]
    assert [(r["router"], r["top_k"]) for r in overall if r["cell"] == "+R"] == list(ROUTED)
    found = rows_by_weights(modules)
    assert found.keys() == {"unedited", "memit", *MERGED.values(), "probes"}
    unedited = {(row["case_id"], row["kind"], row["index"]): row for row in found["unedited"]}
    for record in overall:
        if record["editor"] == "none":
            continue
        weights = "memit" if record["merger"] is None else MERGED[record["merger"], record["pruning_ratio"]]
        shown: dict[Any, list[Row]] = {}
        for row in found[weights]:
            routed = record["router"] and row["routes"][ROUTED[record["router"], record["top_k"]]]
            key = (row["case_id"], row["kind"], row["index"])
            shown.setdefault(row["case_id"], []).append(unedited[key] if routed == "unedited" else row)
        values = {score["metric"]: score["value"] for score in record["scores"]}
        for metric, value in counterfact_rates(list(shown.values())).items():
            assert values[metric] == pytest.approx(value, abs=1e-12)


def test_probes_are_routed_and_every_share_follows_from_the_cases(modules: Path) -> None:
    rows = rows_by_weights(modules)["probes"]
    assert {row["kind"] for row in rows} >= {"probe:rewrite", "probe:neighborhood", "probe:text"}
    assert {row["routes"]["topk@2"] for row in rows} == {"edited", "unedited"}
    records = [r for r in records_of(modules) if r["slice"] == "probes"]
    assert len(records) == len(ROUTED) * (1 + len(MERGED))
    for record in records:
        name = ROUTED[record["router"], record["top_k"]]
        for found in record["scores"]:
            own = [r for r in rows if r["kind"] == found["metric"].replace("route_", "probe:")]
            by_case: dict[Any, list[bool]] = {}
            for row in own:
                key = row["case_id"] if row["case_id"] is not None else f"no record {row['index']}"
                by_case.setdefault(key, []).append(row["routes"][name] == "edited")
            shares = [sum(sent) / len(sent) for sent in by_case.values()]
            assert (found["value"], found["n"]) == (pytest.approx(sum(shares) / len(shares)), len(own))


def test_the_cells_of_a_run_stand_in_its_report(modules: Path) -> None:
    report = (modules / "report.md").read_text("utf-8")
    for name in ("merger=refit", "merger=shrink", "router=topk", "subject&relation", "Distracting"):
        assert name in report, name


def test_keys_that_are_missing_are_taken_again_with_the_same_bytes(
    grid: Grid, modules: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(modules, tmp_path / "run"))
    kept = {path.name: path.read_bytes() for path in (out / "keys" / "memit").iterdir()}
    assert len(kept) == BATCHES
    remove(out, "keys/memit/batch-0002.safetensors", "scores/memit+MM.jsonl.gz")
    assert grid.run(out, *MODULES, editors=["memit"]) == 0
    assert {path.name: path.read_bytes() for path in (out / "keys" / "memit").iterdir()} == kept
    assert_same(out, modules)


def test_keys_are_those_of_the_model_that_a_batch_left(grid: Grid, modules: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(grid.model)
    tokenizer, name = tiny_tokenizer(bos=True), "transformer.h.1.mlp.c_proj.weight"
    cpu = torch.device("cpu")
    records = {r["case_id"]: r["requested_rewrite"] for r in read_lines(grid.folder / "records.jsonl")}
    case_ids = json.loads((modules / "run.json").read_text())["provenance"]["case_ids"]
    contexts = contexts_of(modules / "state" / "memit.safetensors")
    for batch in range(1, BATCHES + 1):
        for parameter, change in read_delta(delta_path(modules, "memit", batch), cpu)[0].items():
            model.get_parameter(parameter).data += change
        keys = read_keys(keys_path(modules, "memit", batch), cpu)[name]
        assert keys.transposed
        for i, case_id in enumerate(case_ids[(batch - 1) * SIZE : batch * SIZE]):
            rewrite = records[case_id]
            wanted = torch.zeros(keys.inputs.shape[1])
            for template, weight in zip(contexts.templates, contexts.weights, strict=True):
                prefix = template.replace("{}", rewrite["prompt"].partition("{}")[0] + rewrite["subject"])
                with inputs_of(model.transformer.h[1].mlp.c_proj) as seen, torch.no_grad():
                    model(torch.tensor([tokenizer(prefix)["input_ids"]]))
                wanted += weight * seen[0][0, -1]
            torch.testing.assert_close(keys.inputs[i], wanted, rtol=1e-4, atol=1e-5)


def test_a_refitted_model_can_be_exported(modules: Path, tmp_path: Path) -> None:
    from harness import ledger

    out = tmp_path / "exported"
    flags = ["--cell", "+MM", "--merger", "refit", "--out", str(out)]
    assert ledger.main([str(modules), "export", *flags]) == 0
    spec = RunSpec.from_json(json.loads((modules / "run.json").read_text())["spec"])
    model = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(spec.model)
    names = edited_parameters(spec, base)
    weights = {name: base.get_parameter(name).detach() for name in names}
    replay = Replay(folder=modules, spec=spec, base=weights, device=torch.device("cpu"))
    *_, last = replay.history("memit", Merge(merger="refit"))
    assert all(torch.equal(model.get_parameter(name), last[name]) for name in names)
    assert not any(torch.equal(last[name], weights[name]) for name in names)


@pytest.mark.usefixtures("no_model")
def test_a_merger_of_keys_is_refused_for_an_editor_of_other_matrices(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = usual(files, editors=["ultraedit"], merger=["self-aware", "refit"], set=["ultraedit.up_layers=3"])
    assert call(*wrong) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "merger 'refit' needs keys of MLP output projections, and ultraedit changes none of them" in line


def test_the_merged_chain_takes_keys_before_it_merges(grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--chain", "merged", "--cells", "+MM", "--merger", "refit"]
    assert grid.run(out, *flags, editors=["memit"]) == 0
    assert len(list((out / "keys" / "memit+MM").iterdir())) == BATCHES
    before = contents(out)
    remove(out, "deltas/memit+MM/batch-0003.safetensors", "scores/memit*", "keys/memit+MM/batch-0003*")
    assert grid.run(out, *flags, editors=["memit"]) == 0
    assert contents(out) == before
