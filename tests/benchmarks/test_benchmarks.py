"""The parts on tiny settings, where both sides must agree; what is written of them; nothing about times."""

import io
import json
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import harness.run
from benchmarks import __main__ as command
from benchmarks import edit_once, reference, table
from benchmarks.measure import Result, agreement
from benchmarks.parts import PARTS, answering, editing
from benchmarks.parts.answering import routed_forward, router, router_decision, scoring
from benchmarks.parts.editing import covariance, keys, solve, targets
from benchmarks.parts.merging import merge
from benchmarks.parts.whole import grid, memory, memory_of_editing
from benchmarks.subjects import Subject, random_llama, spread, trained_tokenizer
from benchmarks.tiny import TEMPLATES, HashedWords, tiny_model, tiny_records, tiny_texts, tiny_tokenizer
from editors.contexts import Contexts
from editors.memit import MemitConfig
from editors.rows import SubjectRows
from harness.data import load_dataset
from harness.models import prepare_tokenizer
from merging import SelfAware
from routing import TopK

NAMES = (
    "targets", "keys", "covariance", "solve", "scoring", "merge", "router", "router-decision", "grid",
    "routed-forward", "memory",
)  # fmt: skip
ROOT = Path(__file__).parent.parent.parent
Part = Callable[[Subject], list[Result]]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMMR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQMMR_DATA", raising=False)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in tiny_records(12)), encoding="utf-8")
    return path


@pytest.fixture
def subject(records: Path) -> Subject:
    """A tiny Llama in float64, where the order of sums leaves nothing to see."""
    tokenizer = tiny_tokenizer(bos=True)
    prepare_tokenizer(tokenizer)
    fast, plain = (tiny_model("llama", dtype=torch.float64).requires_grad_(False) for _ in range(2))
    return Subject(
        name="tiny", fast=fast, plain=plain, tokenizer=tokenizer, data="records",
        config=MemitConfig(layers=(1, 2, 3), steps=3, kl_factor=0.0625),
        contexts=Contexts(tuple(tuple(group) for group in TEMPLATES)), cases=load_dataset(str(records)).cases,
    )  # fmt: skip


def folder_of_model(tmp_path: Path) -> Path:
    tiny_model("gpt2").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


SMALL: dict[str, Part] = {
    "targets": lambda subject: targets(subject, 1, edits=7, alone=3),
    "keys": lambda subject: keys(subject, 1, edits=7, alone=3),
    "covariance": lambda subject: covariance(subject, 1, texts=2),
    "solve": lambda subject: solve(1, d_in=40, n=6, device="cpu"),
    "scoring": lambda subject: scoring(subject, 1, records=6, alone=3),
    "merge": lambda subject: merge(1, rows=30, columns=50, device="cpu"),
    "router": lambda subject: router(
        1, device="cpu", corpus=60, queries=24, batch=10, alone=12, embedder=HashedWords
    ),
    "router-decision": lambda subject: router_decision(
        1, device="cpu", vectors=1200, width=8, queries=70, batch=16, larger=64, alone=20
    ),
    "routed-forward": lambda subject: routed_forward(subject, 1, rows=4, tokens=6),
}


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_of_a_part_agree(name: str, subject: Subject) -> None:
    for result in SMALL[name](subject):
        assert (result.name, result.device, result.repeats) == (name, "cpu", 1)
        assert result.value is not None and result.value > 0
        assert result.baseline is not None and result.baseline > 0
        assert result.ratio == result.baseline / result.value


def changed(wrong: Callable[[Any], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **more: wrong(original(*args, **more))


def off(value: Any) -> Any:
    """A result that is wrong by a percent, wherever it holds a figure."""
    if isinstance(value, Tensor | float):
        return 1.01 * value
    if isinstance(value, dict):
        return {name: off(one) for name, one in value.items()}
    if isinstance(value, list):
        return [off(one) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: off(getattr(value, field.name)) for field in fields(value)})
    return value


@pytest.mark.parametrize(
    ("name", "holder", "attribute"),
    [
        ("targets", editing, "optimise_targets"),
        ("keys", SubjectRows, "keys"),
        ("keys", SubjectRows, "states"),
        ("covariance", editing, "gather_covariances"),
        ("solve", editing, "solve_with_keys"),
        ("scoring", answering, "score"),
        ("merge", SelfAware, "merge"),
        ("router-decision", TopK, "route"),
    ],
)
def test_a_wrong_result_is_refused(
    name: str, holder: Any, attribute: str, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, attribute, changed(off, getattr(holder, attribute)))
    with pytest.raises(RuntimeError, match=r"of the two sides are .* apart"):
        SMALL[name](subject)


def test_rows_of_a_mixed_batch_are_compared(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = answering.RoutedModel.rows
    monkeypatch.setattr(answering.RoutedModel, "rows", lambda self, route: rows(self, "edited"))
    with pytest.raises(RuntimeError, match="bit for bit"):
        SMALL["routed-forward"](subject)


@pytest.fixture(scope="module")
def small_llama() -> Subject:
    """What runs on a GPU, at a size for this machine: bfloat16, ids beyond the tokenizer's."""
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 700, "max_position_embeddings": 512, "initializer_range": 0.2,
    }  # fmt: skip
    tokenizer = trained_tokenizer(600)
    prepare_tokenizer(tokenizer)
    return random_llama(shape, "tiny", tokenizer, device="cpu", layers=(1, 2, 3), steps=4)


@pytest.mark.parametrize("name", ["targets", "keys", "covariance", "scoring", "routed-forward"])
def test_parts_run_on_a_random_llama_of_half_precision(name: str, small_llama: Subject) -> None:
    (result,) = SMALL[name](small_llama)
    assert result.value is not None
    if name == "targets":
        assert "4 to 4 steps" in result.setting  # none stops early


def test_editing_a_random_llama_changes_its_matrices(small_llama: Subject) -> None:
    before = [small_llama.fast.get_parameter(name).clone() for name in small_llama.edited]
    (result,) = memory_of_editing(small_llama, edits=6)
    assert result.baseline is None and result.value is not None
    for name, weight in zip(small_llama.edited, before, strict=True):
        after = small_llama.fast.get_parameter(name)
        assert after.dtype is torch.float32 and not torch.equal(after, weight)


def test_four_cells_are_run_beside_one(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.run, "encoder", HashedWords)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(20)), encoding="utf-8")
    given = {
        "model": str(folder_of_model(tmp_path)), "editors": ["memit"], "dataset": str(records),
        "stats": str(texts), "batch_size": 2, "num_batches": 2,
    }  # fmt: skip
    (result,) = grid(1, device="cpu", given=given, overrides=["memit.layers=1,2", "memit.steps=3"])
    assert result.value is not None and result.baseline is not None
    assert "its records are equal in both" in result.setting
    assert not (tmp_path / "cache" / "embeddings").exists()


def test_memory_is_asked_of_either_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """In this process, which has imported all there is."""
        assert command[1:3] == ["-m", "benchmarks.edit_once"]
        with redirect_stdout(io.StringIO()) as printed:
            status = edit_once.main(command[3:])
        return subprocess.CompletedProcess(command, status, printed.getvalue(), "")

    written: list[str] = []
    monkeypatch.setattr(subprocess, "run", run)
    for name in ("edit", "edit_one_by_one"):
        side = getattr(edit_once, name)
        monkeypatch.setattr(
            edit_once, name, lambda *given, side=side, name=name: (side(*given), written.append(name))
        )
    (result,) = memory(edits=3, alone=2, model=str(folder_of_model(tmp_path)), overrides=["memit.layers=1,2"])
    assert written == ["edit", "edit_one_by_one"]
    for peak in (result.value, result.baseline):  # in MiB: Python with PyTorch, and next to nothing else
        assert peak is not None and 100 < peak < 8000


# -- the baselines added for these parts --------------------------------------------------------------------


def test_a_padded_record_is_scored_as_row_by_row(subject: Subject) -> None:
    prompts = [prompt for texts in subject.cases[3].prompts.values() for prompt in texts]
    pair = ("the old town", "Rome")
    model, tokenizer = subject.plain, subject.tokenizer
    found = reference.record_likelihoods(model, tokenizer, prompts, pair)
    for prompt, row in zip(prompts, found, strict=True):
        for target, one in zip(pair, row, strict=True):
            alone = reference.likelihood(model, tokenizer, prompt, target)
            assert one.nll == pytest.approx(alone.nll, rel=1e-9)
            assert one.right == alone.right


def test_one_product_routes_as_text_by_text() -> None:
    draw = torch.Generator().manual_seed(0)
    corpus = torch.nn.functional.normalize(torch.randn(30, 6, generator=draw, dtype=torch.float64), dim=1)
    labels = [1, -1, -1] * 10
    for query in torch.randn(8, 6, generator=draw, dtype=torch.float64):
        expected = reference.route_one(query, corpus, labels, 3)
        assert reference.route_by_product(query, corpus, labels, 3) == pytest.approx(expected, abs=1e-6)


# -- what is chosen and written -----------------------------------------------------------------------------


def test_the_parts_are_those_of_the_interface() -> None:
    assert set(PARTS) == {*NAMES, *(f"{name}@gpu" for name in NAMES)}
    assert set(table.TARGETS) <= set(PARTS)


def test_a_name_stands_for_both_rows_and_a_gpu_name_for_one() -> None:
    assert command.chosen(["merge"]) == ["merge", "merge@gpu"]
    assert command.chosen(["merge@gpu", "keys"]) == ["keys", "keys@gpu", "merge@gpu"]
    assert command.chosen([]) == list(PARTS)


def test_spread_takes_the_shortest_and_the_longest(subject: Subject) -> None:
    lengths = [len(case.rewrite_prompt) for case in subject.cases]
    places = spread(subject.cases, 4)
    assert len(set(places)) == 4
    assert lengths[places[0]] == min(lengths) and lengths[places[-1]] == max(lengths)


def test_results_that_are_no_number_do_not_agree() -> None:
    with pytest.raises(RuntimeError):
        agreement("losses", float("nan"), 1.0)


def row(name: str, value: float | None, baseline: float | None = None, **more: Any) -> Result:
    others = {"unit": "s", "repeats": 5, "device": "cpu", "setting": f"how {name} was made"} | more
    return Result(name=name, value=value, baseline=baseline, **others)


def report(results: Sequence[Result], **machine: Any) -> dict[str, Any]:
    made_on = {"processor": "P", "cores": 2, "threads": 2, "memory_gb": 8, "gpu": None} | machine
    return {
        "machine": made_on, "versions": {"torch": "2.0"}, "commit": "a" * 40,
        "results": [result.as_json() for result in results],
    }  # fmt: skip


def test_the_command_writes_what_the_interface_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(repeats: int) -> list[Result]:
        raise ValueError("no such\nencoder")

    monkeypatch.setitem(PARTS, "merge", lambda repeats: [row("merge", 0.2, 3.0, repeats=repeats)])
    monkeypatch.setitem(PARTS, "keys", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results.json"
    assert command.main(["merge", "keys", "--repeats", "3", "--out", str(out)]) == 1  # one part failed
    made = json.loads(out.read_text())
    assert list(made) == ["machine", "versions", "commit", "results"]
    by_name = {result["name"]: result for result in made["results"]}
    assert by_name["merge"] == {
        "name": "merge", "value": 0.2, "unit": "s", "baseline": 3.0, "ratio": 3.0 / 0.2, "repeats": 3,
        "device": "cpu", "setting": "how merge was made",
    }  # fmt: skip
    assert by_name["keys"]["setting"] == "not measured: ValueError: no such encoder"
    for name in ("merge@gpu", "keys@gpu"):
        assert by_name[name]["value"] is None and by_name[name]["ratio"] is None
        assert by_name[name]["setting"] == "not measured: no GPU"
    assert table.check(made, "results.json") is made
    printed = capsys.readouterr()
    assert "0.2 s" in printed.out and "15x" in printed.out
    assert "merge: " in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mrege"], "unknown name 'mrege'; known: router-decision"),
        (["merge@tpu"], "unknown name 'merge@tpu'"),
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["--out", "."], "is a folder; give a file"),
        (["--table", "missing.json"], "missing.json cannot be read"),
        (["--table", "odd.json"], "odd.json is no report of benchmarks"),
        (["--table", "old.json"], "old.json: {'name': 'gone'} is no result of a benchmark"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    Path("odd.json").write_text("[1]")
    Path("old.json").write_text(json.dumps(report([]) | {"results": [{"name": "gone"}]}))
    monkeypatch.setattr(command, "measured", lambda *_: pytest.fail("something was measured"))
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not Path("page.md").exists()


def test_the_page_joins_the_rows_of_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = report([
        row("merge", 0.3, 6.0), row("targets", 0.5, 8.0), row("solve", 0.002, unit="ms"),
        row("solve", 1234.0, unit="ms"), row("merge@gpu", None, unit="", setting="not measured: no GPU"),
        row("memory@gpu", None, unit="", setting="not measured: no GPU"),
    ])  # fmt: skip
    gpu = report([row("merge", 9.0), row("merge@gpu", 0.004, 0.1, device="G")], gpu="G", processor="Q")
    files = [tmp_path / "cpu.json", tmp_path / "gpu.json"]
    for file, content in zip(files, (cpu, gpu), strict=True):
        file.write_text(json.dumps(content))
    monkeypatch.setattr(command, "PAGE", tmp_path / "docs" / "benchmarks.md")
    assert command.main(["--table", *map(str, files)]) == 0
    lines = (tmp_path / "docs" / "benchmarks.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["part", "target", "measured", "baseline", "ratio", "met"]
    assert {tuple(some) for some in cells[2:]} == {
        ("merge", "0.25 s", "0.3 s", "6 s", "20x", "**no**"),
        ("targets", "10x", "0.5 s", "8 s", "16x", "yes"),
        ("solve", "–", "0.002 ms", "–", "–", "–"),
        ("solve", "–", "1,234 ms", "–", "–", "–"),
        ("merge@gpu", "5 ms", "0.004 s", "0.1 s", "25x", "yes"),
        ("memory@gpu", "22 GB", "not measured", "–", "–", "–"),
    }
    found = [some[0] for some in cells[2:]]
    assert found == ["solve", "solve", "memory@gpu", "merge", "merge@gpu", "targets"]
    assert "- P, cores: 2, threads: 2; 8 GB; no GPU; torch 2.0; commit aaaaaaaaaaaa" in lines
    assert "- **merge@gpu** (G, 5 repeats): how merge@gpu was made." in lines


def test_the_page_of_the_docs_is_made_of_the_files_beside_it() -> None:
    files = sorted((ROOT / "docs").glob("benchmarks*.json"))
    if not files:
        pytest.skip("no figures are kept in docs/")
    reports = [table.check(json.loads(file.read_text("utf-8")), file.name) for file in files]
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf-8") == table.page(reports)
