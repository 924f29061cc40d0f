"""What a run needs: predicted from the config alone, and beside what it took."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import harness.run
from benchmarks.tiny import MODEL_TYPES, tiny_model, tiny_records, tiny_texts, tiny_tokenizer
from harness import ablation, budget, onednn
from harness.budget import Fact, Machine, Rates, Work, predict
from harness.data import load_dataset, select
from harness.plan import amount, comparison, duration, empty_model, free_memory, plan, shape_of, work_of
from harness.spec import RunSpec, resolve

Write = Callable[..., Path]
EDITORS = ("memit", "memit-seq", "alphaedit", "rect", "ft", "ultraedit")
SETTINGS = [
    "memit.layers=1,2", "memit-seq.layers=1,2", "alphaedit.layers=1,2", "rect.layers=1,2", "ft.layers=2",
    "prune.layers=1,2", "rome.layers=1", "ultraedit.down_layers=2", "alphaedit.nullspace_threshold=1",
    *(f"{name}.covariance_weight=1" for name in ("memit", "memit-seq", "rect", "prune")),
    *(f"{name}.steps=3" for name in ("memit", "memit-seq", "prune", "alphaedit", "rect", "ft", "rome")),
]  # fmt: skip


def settings(editors: Sequence[str]) -> list[str]:
    return [setting for setting in SETTINGS if setting.partition(".")[0] in editors]


@pytest.fixture
def flags(tiny_folder: Path, write_jsonl: Write) -> dict[str, Any]:
    """A small run on a tiny GPT-2."""
    write_jsonl(tiny_records(16), "records.jsonl")
    texts = write_jsonl([{"text": text} for text in tiny_texts(40)], "texts.jsonl")
    return {
        "model": str(tiny_folder), "dataset": str(texts.parent / "records.jsonl"), "stats": str(texts),
        "batch_size": 4, "num_batches": 2, "device": "cpu", "cells": ["baseline", "+MM"],
    }  # fmt: skip


def call(flags: dict[str, Any], editors: Sequence[str], *more: str) -> int:
    """The command's exit status."""
    given: dict[str, Any] = {**flags, "editors": editors, "set": settings(editors)}
    arguments: list[str] = []
    for name, value in given.items():
        values = value if isinstance(value, list | tuple) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return ablation.main([*arguments, *more])


# -- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_without_weights_has_the_sizes_of_the_real_one(
    model_type: str, flags: dict[str, Any]
) -> None:
    editors = ("memit", "ft")
    spec = resolve({**flags, "editors": editors}, settings(editors))
    model = tiny_model(model_type)
    shape = shape_of(empty_model(model.config, torch.float32), spec)
    assert shape == shape_of(model, spec)
    assert shape.parameters == sum(p.numel() for p in set(model.parameters()))
    outputs: list[torch.Tensor] = []
    hook = model.get_submodule(memit_module := next(iter(shape.edited["memit"])).removesuffix(".weight"))
    hook.register_forward_hook(lambda module, args, out: outputs.extend((args[0], out)))
    model(torch.zeros(1, 3, dtype=torch.long))
    d_out, d_in = shape.edited["memit"][f"{memit_module}.weight"]
    assert (d_in, d_out) == (outputs[0].shape[-1], outputs[1].shape[-1])


def test_llama_3_8b_is_counted_exactly(flags: dict[str, Any]) -> None:
    editors = ("memit",)
    spec = resolve({**flags, "editors": editors}, settings(editors))
    shape = shape_of(empty_model(llama_3_8b(), torch.bfloat16), spec)
    assert shape.parameters == 8_030_261_248
    assert shape.edited_entries == 2 * 4096 * 14336


def llama_3_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


# -- arithmetic ---------------------------------------------------------------------------------------------


def predicted(flags: dict[str, Any], editors: Sequence[str], rates: Rates) -> dict[str, float]:
    """Seconds by stage."""
    spec = resolve({**flags, "editors": tuple(editors)}, settings(editors))
    model = tiny_model("gpt2")
    shape = shape_of(model, spec)
    selection, _ = select(
        load_dataset(spec.dataset), edits=spec.edits, negatives=None, order=spec.select, seed=0
    )
    work = work_of(spec, selection, tiny_tokenizer(bos=True), shape)
    needs = predict(spec, shape, work, Machine(rates=rates, packs=False))
    return {need.stage: need.seconds or 0.0 for need in needs.stages}


@pytest.mark.parametrize("editor", ["memit", "rome", "ft"])
def test_the_arithmetic_of_a_run_is_what_pytorch_counts(
    editor: str, flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a fifth; attention, which is little where a model is wide, is left out."""
    monkeypatch.setattr(onednn, "available", lambda: False)  # its products are not counted
    for name in ("SHARES", "CALL_SECONDS", "GRADIENT_CALL_SECONDS", "ENTRY_SECONDS"):
        value = 1.0 if name == "SHARES" else 0.0
        monkeypatch.setattr(budget, name, dict.fromkeys(getattr(budget, name), value))
    monkeypatch.setattr(budget, "BYTE_SECONDS", 0.0)
    monkeypatch.setattr(harness.run, "write_reports", lambda out: None)
    monkeypatch.setattr("harness.plan.compare", lambda *_: [])  # measures the speed
    monkeypatch.setattr("harness.plan.comparison", lambda *_: "")
    monkeypatch.setitem(flags, "cells", ["baseline"])
    with FlopCounterMode(display=False) as counter:
        assert call(flags, [editor], f"--out={tmp_path / 'run'}", "--set", f"{editor}.stop_loss=0") == 0
    needed = predicted(flags, [editor], Rates(model=1, single=1, double=1))
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    assert sum(needed.values()) == pytest.approx(products, rel=0.2)


def test_target_values_that_another_editor_made_cost_nothing_again(flags: dict[str, Any]) -> None:
    rates = Rates(model=1e9, single=1e9, double=1e12)
    alone = {editor: predicted(flags, [editor], rates)[f"edit {editor}"] for editor in ("memit-seq", "prune")}
    after = predicted(flags, ["memit", "memit-seq", "prune"], rates)
    assert 0.5 * alone["memit-seq"] < after["edit memit-seq"] < 0.8 * alone["memit-seq"]  # the first of two
    assert after["edit prune"] < 0.5 * alone["prune"]  # all: its stream is MEMIT's


# -- the command --------------------------------------------------------------------------------------------


def test_a_plan_loads_no_model_and_makes_no_folder(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness.run, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    before = sorted(tmp_path.iterdir())
    assert call(flags, ["memit", "alphaedit"], "--plan", f"--out={tmp_path / 'run'}") == 0
    assert sorted(path for path in tmp_path.iterdir() if path.name != "cache") == before
    text = capsys.readouterr().out
    for stage in ("statistics", "edit memit", "score alphaedit", "in all"):
        assert f"\n| {stage} " in text
    assert "GFLOP/s" in text
    assert "GPU" not in text


def test_what_the_run_refuses_the_plan_refuses(
    flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call({**flags, "batch_size": 1000}, ["memit"], "--plan") == 2
    assert "2000 edits asked" in capsys.readouterr().err
    assert call(flags, ["memit"], "--plan", "--set", "memit.layers=99") == 2
    assert "memit: layers [99] are not in the model" in capsys.readouterr().err


def test_a_config_is_enough_even_for_a_device_that_is_not_here(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llama"
    llama_3_8b().save_pretrained(folder)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert call({**flags, "model": folder, "device": "cuda:1"}, ["memit"], "--plan") == 0
    text = capsys.readouterr().out
    assert "bfloat16 on cuda:1" in text
    assert "times are not predicted" in text
    assert "four characters" in text
    whole = next(line for line in text.splitlines() if line.startswith("| in all"))
    _, _, seconds, gpu, *_ = (cell.strip() for cell in whole.split("|"))
    assert seconds == "–"
    assert 17 <= float(gpu.removesuffix(" GB")) <= 60  # 16 GB of weights, and 1.6 GB for a covariance


def test_too_little_memory_is_said(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = resolve({**flags, "editors": ("memit",)}, settings(["memit"]))
    assert "Warning" not in plan(spec, data=None)
    monkeypatch.setattr("harness.plan.free_memory", lambda device: 10**6)
    assert "Warning: not enough memory, about " in plan(spec, data=None)


# -- beside the run -----------------------------------------------------------------------------------------


def test_a_run_says_what_was_predicted_and_what_it_took(
    flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(flags, EDITORS, f"--out={tmp_path / 'run'}") == 0
    shown = capsys.readouterr().err
    info = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    rows = {row["stage"]: row for row in info["budget"]}
    assert comparison(info["budget"]) in shown
    assert rows["in all"]["seconds"] == pytest.approx(sum(info["timings"].values()))
    timed = {name for name in info["timings"] if not name.endswith("+MM")}
    assert timed <= rows.keys()
    scored = info["timings"]["score memit"] + info["timings"]["score memit+MM"]
    assert rows["score memit"]["seconds"] == pytest.approx(scored, abs=2e-3)
    assert rows["in all"]["cpu_memory_bytes"] > 10**8
    assert rows["in all"]["gpu_memory_bytes"] is None
    for editor in EDITORS:
        row = rows[f"edit {editor}"]
        assert row["disk_bytes"] == sum(
            path.stat().st_size
            for folder in (f"deltas/{editor}", "state")
            for path in (tmp_path / "run" / folder).glob("*.safetensors")
            if folder != "state" or path.stem == editor
        )
        assert row["predicted_disk_bytes"] == pytest.approx(row["disk_bytes"], rel=0.02), editor
    cached = sum(path.stat().st_size for path in (tmp_path / "cache" / "stats").iterdir())
    shape = shape_of(tiny_model("gpt2"), RunSpec.from_json(info["spec"]))
    assert rows["statistics"]["disk_bytes"] == 0  # they are beside the run folder
    needs = predict(
        RunSpec.from_json(info["spec"]), shape, Work(facts=(Fact(before=3, behind=1, target=1),) * 8),
        Machine(rates=None, packs=False),
    )  # fmt: skip
    assert needs.whole.cached * 0.5 < cached < needs.whole.cached * 1.02


# -- as text ------------------------------------------------------------------------------------------------


def test_predictions_have_two_digits() -> None:
    times = {
        None: "–",
        0.2: "< 1 s",
        14.4: "14 s",
        89: "89 s",
        100: "1.7 min",
        384: "6.4 min",
        47_000: "13 h",
    }
    assert {seconds: duration(seconds) for seconds in times} == times
    sizes = {None: "–", 0: "0", 999: "< 1 MB", 4_231_367: "4.2 MB", 16_060_522_496: "16 GB"}
    assert {size: amount(size) for size in sizes} == sizes


def test_free_memory_is_of_this_machine() -> None:
    assert 0 < free_memory("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
