"""What a run is: presets, overrides, checks, and the run id."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from editors import EDITORS
from harness import spec as spec_module
from harness.grid import cells_of, merges_of, needs_unmerged, routes_of, weights_id
from harness.models import MODELS
from harness.spec import (
    RunSpec,
    default_device,
    editor_settings,
    hyperparameter_source,
    hyperparameters,
    resolve,
    upgraded,
)

CPU = {"device": "cpu"}


def refused(given: Mapping[str, Any], *overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        resolve({**CPU, **given}, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


# -- presets ------------------------------------------------------------------------------------------------


def test_nothing_given_is_the_embedded_default() -> None:
    spec = resolve(CPU)
    assert (spec.model, spec.dataset, spec.select, spec.stats) == ("smollm2-135m", "facts", "random", "self")
    assert spec.editors == ("memit", "alphaedit")
    assert spec.cells == ("baseline", "+MM", "+R", "+MM+R")
    assert (spec.batch_size, spec.num_batches, spec.edits) == (20, 5, 100)
    assert (spec.chain, spec.merger, spec.pruning_ratio) == ("shadow", ("self-aware",), (0.85,))
    assert (spec.router, spec.top_k, spec.encoder, spec.negatives) == (("topk",), (2,), "minilm", None)
    assert (spec.evaluate, spec.seed, spec.dtype, spec.device) == ("final", 0, "float32", "cpu")
    assert spec.limit_stats is None


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"smollm2-135m", "gpt2"}))
def test_the_papers_models_have_the_papers_setting(model: str) -> None:
    spec = resolve({**CPU, "model": model})
    assert (spec.dataset, spec.select, spec.stats) == ("counterfact", "first", "wikipedia")
    assert (spec.batch_size, spec.num_batches) == (200, 10)
    assert spec.limit_stats is None  # the protocol counts articles
    assert spec.settings["alphaedit"]["nullspace_threshold"] == 0.02


def test_a_model_without_preset_takes_the_embedded_data() -> None:
    layers = ("memit.layers=1", "alphaedit.layers=1")
    spec = resolve({**CPU, "model": "owner/name"}, layers)
    assert (spec.dataset, spec.select, spec.stats) == ("facts", "random", "self")
    assert resolve({**CPU, "model": "gpt2"}).dataset == "facts"


def test_counterfact_is_taken_from_the_top_on_any_model() -> None:
    assert resolve({**CPU, "dataset": "counterfact"}).select == "first"
    assert resolve({**CPU, "dataset": "counterfact", "select": "random"}).select == "random"
    assert resolve({**CPU, "model": "llama3-8b", "dataset": "facts"}).select == "random"


def test_the_dtype_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert default_device() == "cuda"
    assert resolve({}).dtype == "bfloat16"
    assert resolve({"device": "cuda:1"}).dtype == "bfloat16"
    assert resolve(CPU).dtype == "float32"
    assert resolve({"dtype": "float32"}).dtype == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve({}).device == "cpu"


def test_absent_and_none_are_the_same() -> None:
    assert resolve({**CPU, "model": None, "seed": None, "top_k": None}) == resolve(CPU)


@pytest.mark.parametrize("editor", sorted(EDITORS))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_preset_builds_a_config_of_every_editor(model: str, editor: str) -> None:
    config = resolve({**CPU, "model": model, "editors": [editor]}).editor(editor).config
    assert isinstance(config, EDITORS[editor][0])
    assert hyperparameter_source(model, editor)


def test_every_row_of_the_table_is_of_a_known_model_and_editor() -> None:
    assert hyperparameters().keys() == MODELS.keys()
    for rows in hyperparameters().values():
        assert rows.keys() <= EDITORS.keys()


@pytest.mark.parametrize(
    ("model", "editor", "fields"),
    [
        ("llama3-8b", "memit", {"layers": (4, 5, 6, 7, 8), "steps": 25, "learning_rate": 0.1}),
        ("llama3-8b-instruct", "alphaedit", {"clamp_norm_factor": 0.75, "ridge": 10.0}),
        ("gpt2-xl", "memit", {"layers": (13, 14, 15, 16, 17), "steps": 20, "covariance_weight": 20000.0}),
        ("gpt-j-6b", "memit", {"layers": (3, 4, 5, 6, 7, 8), "covariance_weight": 15000.0}),
        ("qwen2.5-7b", "alphaedit", {"clamp_norm_factor": 4.0, "weight_decay": 0.001, "ridge": 1.0}),
    ],
)
def test_published_settings_are_those_of_their_sources(
    model: str, editor: str, fields: dict[str, Any]
) -> None:
    settings = editor_settings(model, [editor])[editor]
    assert {name: settings[name] for name in fields} == fields


# -- overrides ----------------------------------------------------------------------------------------------


def test_overrides_have_their_fields_types() -> None:
    spec = resolve(
        CPU,
        [
            "memit.layers=3,4, 5",
            "memit.steps=7",
            "memit.learning_rate=1e-2",
            "alphaedit.ridge=3",
            "memit.steps=8",
        ],
    )
    memit = spec.settings["memit"]
    assert memit["layers"] == (3, 4, 5)
    assert memit["steps"] == 8  # the last one counts
    assert memit["learning_rate"] == 0.01
    ridge = spec.settings["alphaedit"]["ridge"]
    assert (ridge, type(ridge)) == (3.0, float)
    assert spec.settings["alphaedit"]["steps"] == 20
    assert spec.editor("memit").config.layers == (3, 4, 5)


@pytest.mark.parametrize(
    ("override", "reasons"),
    [
        ("memit", ["EDITOR.FIELD=VALUE", "'memit'"]),
        ("memit.steps", ["EDITOR.FIELD=VALUE"]),
        ("steps=3", ["EDITOR.FIELD=VALUE"]),
        ("memmit.steps=3", ["unknown editor, merger or router 'memmit'", "alphaedit"]),
        ("memit-seq.steps=3", ["'memit-seq' is not in this run", "memit, alphaedit"]),
        ("memit.stepz=3", ["unknown field 'stepz' of memit", "steps"]),
        ("memit.ridge=3", ["unknown field 'ridge' of memit"]),
        ("memit.steps=many", ["memit.steps=many", "'many' is not a int"]),
        ("memit.steps=2.5", ["'2.5' is not a int"]),
        ("memit.steps=", ["'' is not a int"]),
        ("memit.layers=a,b", ["'a,b' is not a tuple"]),
        ("memit.layers=", ["memit", "layers is empty"]),
        ("memit.layers=5,4", ["memit", "ascending"]),
        ("memit.layers=4,4", ["memit", "ascending"]),
        ("memit.layers=-1,4", ["memit", "not negative"]),
        ("memit.steps=0", ["memit: steps is 0"]),
        ("memit.learning_rate=0", ["memit: learning_rate is 0.0"]),
        ("memit.covariance_weight=-1", ["memit: covariance_weight is -1.0"]),
        ("alphaedit.ridge=0", ["alphaedit: ridge is 0.0"]),
        ("memit.covariance_weight=nan", ["'nan' is not a float"]),
        ("memit.learning_rate=inf", ["'inf' is not a float"]),
    ],
)
def test_a_wrong_override_is_said(override: str, reasons: list[str]) -> None:
    text = refused({}, override)
    assert all(reason in text for reason in reasons), text


def test_fields_of_other_types_are_parsed() -> None:
    from typing import Literal

    parse = spec_module._parse
    assert parse("true", bool, "") is True
    assert parse("False", bool, "") is False
    assert parse("b", Literal["a", "b"], "") == "b"
    assert parse("none", int | None, "") is None
    assert parse("4", int | None, "") == 4
    assert parse("text", str, "") == "text"
    for text, kind in (("yes", bool), ("c", Literal["a", "b"]), ("x", int | None)):
        with pytest.raises(ValueError, match=f"--set here: {text!r} is not a"):
            parse(text, kind, "--set here")


def test_a_model_without_a_row_needs_its_layers_named() -> None:
    text = refused({"model": "owner/name"})
    assert "no hyperparameters for memit on 'owner/name'" in text
    assert "--set memit.layers=" in text
    assert "alphaedit" in refused({"model": "owner/name"}, "memit.layers=1")
    spec = resolve({**CPU, "model": "owner/name"}, ["memit.layers=1", "alphaedit.layers=1,2"])
    assert spec.settings["memit"]["steps"] == 25  # the config's default
    assert spec.settings["memit"]["covariance_weight"] == 15000.0


# -- checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        ({"editors": ["memit", "memitt"]}, ["unknown editor 'memitt'", "memit-seq"]),
        ({"editors": []}, ["editors is []"]),
        ({"editors": ["memit", "memit"]}, ["editors", "twice"]),
        ({"cells": ["+M"]}, ["unknown cell '+M'", "+MM+R"]),
        ({"cells": []}, ["cells is []"]),
        ({"cells": ["+R", "+R"]}, ["cells", "twice"]),
        ({"dataset": "factz"}, ["unknown dataset 'factz'", "counterfact"]),
        ({"stats": "wikipdia"}, ["'wikipdia'", "wikipedia", "self"]),
        ({"select": "last"}, ["unknown selection 'last'", "first", "random"]),
        ({"chain": "shade"}, ["unknown chain 'shade'", "shadow", "merged"]),
        ({"merger": ["slerp"]}, ["unknown merger 'slerp'", "self-aware"]),
        ({"merger": ["shrink", "shrink"]}, ["merger", "twice"]),
        ({"router": ["bert"]}, ["unknown router 'bert'", "topk"]),
        ({"router": ["subject&bert"]}, ["unknown router 'bert'", "topk"]),
        ({"dtype": "float8"}, ["unknown dtype 'float8'", "bfloat16"]),
        ({"evaluate": "never"}, ["unknown evaluation 'never'", "final"]),
        ({"batch_size": 0}, ["batch_size is 0"]),
        ({"num_batches": -1}, ["num_batches is -1"]),
        ({"limit_stats": 0}, ["limit_stats is 0"]),
        ({"negatives": 0}, ["negatives is 0"]),
        ({"pruning_ratio": [1.5]}, ["pruning_ratio is 1.5"]),
        ({"pruning_ratio": [-0.1]}, ["pruning_ratio is -0.1"]),
        ({"pruning_ratio": [math.nan]}, ["pruning_ratio is nan"]),
        ({"pruning_ratio": [0.5, 0.5]}, ["pruning_ratio", "twice"]),
        ({"pruning_ratio": []}, ["pruning_ratio is []"]),
        ({"top_k": [0]}, ["top_k is 0"]),
        ({"top_k": [2, 2]}, ["top_k", "twice"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"seed": 2**63}, ["seed is"]),
        ({"device": "tpux"}, ["unknown device 'tpux'", "cuda"]),
        ({"device": "cuda:77"}, ["device 'cuda:77' is not there"]),
    ],
)
def test_what_is_wrong_is_said_with_what_is_known(given: dict[str, Any], reasons: list[str]) -> None:
    text = refused(given)
    assert all(reason in text for reason in reasons), text


def test_files_stand_for_datasets_and_corpora(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.touch()
    spec = resolve({**CPU, "dataset": str(path), "stats": str(path)})
    assert (spec.dataset, spec.stats, spec.select) == (str(path), str(path), "random")
    assert spec.limit_stats is None


# -- the run id ---------------------------------------------------------------------------------------------


CHANGES: dict[str, Any] = {
    "model": "gpt2", "editors": ("alphaedit", "memit"), "cells": ("+R",), "dataset": "counterfact",
    "select": "first", "stats": "wikipedia", "limit_stats": 5, "batch_size": 3, "num_batches": 3,
    "chain": "merged", "pruning_ratio": (0.5,), "top_k": (3,), "encoder": "other", "negatives": 4, "seed": 1,
    "dtype": "bfloat16", "device": "cuda", "evaluate": "x", "merger": ("x",), "router": ("x",),
    "aliases": True, "probes": True,
    "settings": {"memit": {"layers": (1,)}}, "capability": ("seqmmr_sst",),
    "generation": True, "generation_prompts": 2, "references": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RunSpec)])
def test_every_field_changes_the_run_id(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunSpec, "__post_init__", lambda _: None)
    spec = resolve(CPU)
    changed = dataclasses.replace(spec, **{field: CHANGES[field]})
    assert changed.digest() != spec.digest()


def test_one_setting_changes_the_run_id() -> None:
    assert resolve(CPU, ["memit.steps=21"]).digest() != resolve(CPU).digest()
    assert resolve(CPU, ["memit.steps=20"]).digest() == resolve(CPU).digest()


def test_a_value_written_as_a_whole_number_gives_the_same_run_id() -> None:
    assert (
        resolve(CPU, ["memit.clamp_norm_factor=1"]).digest()
        == resolve(CPU, ["memit.clamp_norm_factor=1.0"]).digest()
    )


def test_a_spec_is_plain_data() -> None:
    plain = resolve(CPU).as_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["settings"]["memit"]["layers"] == [4, 5, 6, 7, 8]
    assert plain.keys() == {field.name for field in dataclasses.fields(RunSpec)}


# -- cells --------------------------------------------------------------------------------------------------


def test_cells_of_several_ratios_and_ks() -> None:
    spec = resolve({**CPU, "pruning_ratio": [0.85, 0.5], "top_k": [2, 3]})
    found = [
        (cell.name, cell.merge and cell.merge.pruning_ratio, cell.route and cell.route.top_k)
        for cell in cells_of(spec, "memit")
    ]
    assert found == [
        ("baseline", None, None),
        ("+MM", 0.85, None), ("+MM", 0.5, None),
        ("+R", None, 2), ("+R", None, 3),
        ("+MM+R", 0.85, 2), ("+MM+R", 0.85, 3), ("+MM+R", 0.5, 2), ("+MM+R", 0.5, 3),
    ]  # fmt: skip
    assert [weights_id(spec, "memit", ratio) for ratio in (None, *merges_of(spec))] == [
        "memit", "memit+MM", "memit+MM@0.5",
    ]  # fmt: skip


def test_only_mergers_and_routers_that_have_them_are_run_at_every_ratio_and_k() -> None:
    spec = resolve(
        {**CPU, "pruning_ratio": [0.85, 0.5], "top_k": [2, 3], "merger": ["shrink", "random"],
         "router": ["subject", "topk|subject"]}
    )  # fmt: skip
    assert [str(merge) for merge in merges_of(spec)] == ["shrink", "random at 0.85", "random at 0.5"]
    assert [str(route) for route in routes_of(spec)] == [
        "subject", "topk|subject with k 2", "topk|subject with k 3",
    ]  # fmt: skip
    assert [weights_id(spec, "memit", merge) for merge in merges_of(spec)] == [
        "memit+MM", "memit+MM@random", "memit+MM@random@0.5",
    ]  # fmt: skip


def test_settings_of_mergers_and_routers_are_resolved_and_checked() -> None:
    given = {**CPU, "merger": ["shrink"], "router": ["subject|topk"]}
    spec = resolve(given, ["shrink.scale=0.7"])
    assert spec.settings["shrink"] == {"scale": 0.7}
    assert spec.settings["topk"] == {"indexed_from": 1_000_000}
    assert spec.settings.keys() == {"memit", "alphaedit", "shrink", "subject", "topk"}
    assert spec.build_merger("shrink", None).config.scale == 0.7  # type: ignore[attr-defined]
    assert RunSpec.from_json(spec.as_json()) == spec
    for override, reason in (
        ("shrink.scale=2", "shrink: scale is 2.0"),
        ("shrink.sclae=1", "unknown field 'sclae' of shrink"),
        ("ema.rate=0.5", "'ema' is not in this run"),
        ("topk.top_k=3", "--top-k"),
        ("nothing.x=1", "unknown editor, merger or router 'nothing'"),
    ):
        with pytest.raises(ValueError, match=reason):
            resolve(given, [override])


def test_a_spec_of_one_merger_and_router_by_name_is_read() -> None:
    plain = resolve(CPU).as_json()
    older = plain | {"merger": "self-aware", "router": "topk"}
    older["settings"] = {name: row for name, row in plain["settings"].items() if name in EDITORS}
    del older["aliases"], older["probes"]
    assert RunSpec.from_json(older) == resolve(CPU)
    assert upgraded(older) == upgraded(plain) == plain  # so that its folder is gone on with


@pytest.mark.parametrize(
    ("chain", "cells", "unmerged", "merged", "routed"),
    [
        ("shadow", ["+MM"], True, True, False),
        ("merged", ["+MM"], False, True, False),
        ("merged", ["+MM+R"], False, True, True),
        ("merged", ["+R"], True, False, True),
        ("shadow", ["baseline"], True, False, False),
    ],
)
def test_only_what_a_cell_needs_is_made(
    chain: str, cells: list[str], unmerged: bool, merged: bool, routed: bool
) -> None:
    spec = resolve({**CPU, "chain": chain, "cells": cells})
    assert needs_unmerged(spec) is unmerged
    assert bool(merges_of(spec)) is merged
    assert spec.routes is routed
