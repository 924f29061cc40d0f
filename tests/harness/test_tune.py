"""Tuning: what is tried and what is chosen, on which records, and the file an ablation takes."""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import harness.kept_targets
import harness.run
import harness.tune
import harness.tuning
from benchmarks.reference import counterfact_rates
from benchmarks.tiny import tiny_model, tiny_records, tiny_texts, tiny_tokenizer
from editors import EDITORS
from editors.targets import Targets, optimise_targets
from harness import ablation, tune
from harness.data import load_dataset, select
from harness.kept_targets import KeptTargets
from harness.models import find_model, load_model
from harness.run import answer_fields, batch_queries
from harness.scoring import score
from harness.spec import read_hyperparameters, resolve
from harness.stats import gather_statistics, load_corpus
from harness.tuning import Grid, Setting, Trial, choose, layer_sets, search, strength_field
from reports.record import Score

Write = Callable[..., Path]
RECORDS, EDITS, SIZE = 6, 4, 3
STRENGTHS = {"memit": "memit=100,1,0.01", "alphaedit": "alphaedit=10,0.1"}
STEPS = ["memit.steps=4", "memit.clamp_norm_factor=4", "alphaedit.steps=4",
         "alphaedit.clamp_norm_factor=4", "alphaedit.nullspace_threshold=1"]  # fmt: skip


def call(command: Callable[[Sequence[str]], int], *arguments: str) -> int:
    """The exit status, however a command ends."""
    try:
        return command(arguments)
    except SystemExit as end:
        return int(end.code or 0)


class Place:
    """A folder with a model and data, where both commands can be run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "tiny"
        tiny_model("gpt2").save_pretrained(self.model)
        tiny_tokenizer(bos=True).save_pretrained(self.model)
        self.records = self.write("records.jsonl", tiny_records(30))
        self.texts = self.write("texts.jsonl", [{"text": text} for text in tiny_texts(60)])

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    @property
    def common(self) -> list[str]:
        return ["--model", str(self.model), "--dataset", str(self.records), "--stats", str(self.texts),
                "--device", "cpu"]  # fmt: skip

    def tune(self, out: Path, *more: str, editors: Sequence[str] = ("memit", "alphaedit")) -> int:
        return call(
            tune.main, *self.common, "--out", str(out), "--editors", *editors,
            "--set", *(s for s in STEPS if s.split(".")[0] in editors),
            "--records", str(RECORDS), "--batch-size", str(SIZE), "--evaluation-edits", str(EDITS),
            "--layers", "1-2", "2-3", "--strengths", *(STRENGTHS[editor] for editor in editors), *more,
        )  # fmt: skip

    def ablate(self, out: Path, *more: str) -> int:
        return call(
            ablation.main, *self.common, "--out", str(out), "--cells", "baseline",
            "--batch-size", "2", "--num-batches", str(EDITS // 2), *more,
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("tune")
        patch.setenv("SEQMMR_CACHE", str(folder / "cache"))
        yield Place(folder)


@pytest.fixture(scope="module")
def calls(place: Place) -> list[tuple[int, float]]:
    """(z-layer, learning rate) of every optimisation of target values that ``tuned`` took."""
    return []


@pytest.fixture(scope="module")
def tuned(place: Place, calls: list[tuple[int, float]]) -> Path:
    """The file of one run."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append((kwargs["layer"], args[4].learning_rate))
        return optimise_targets(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.kept_targets, "optimise_targets", counted)
        assert place.tune(place.folder / "tuned.yaml") == 0
    return place.folder / "tuned.yaml"


def tried(path: Path, editor: str) -> list[dict[str, Any]]:
    return [row for row in yaml.safe_load(path.read_text())["tuning"]["settings"] if row["editor"] == editor]


# -- what is tried ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "first", "among"),
    [
        (32, (4, 5, 6, 7, 8), (9, 10, 11, 12, 13)),  # Llama-3-8B
        (28, (4, 5, 6, 7, 8), (8, 9, 10, 11, 12)),  # Qwen2.5-7B
        (48, (6, 7, 8, 9, 10), (13, 14, 15, 16, 17)),  # GPT2-XL
        (30, (4, 5, 6, 7, 8), (2, 3, 4, 5, 6)),  # SmolLM2-135M
        (12, (2, 3), (3, 4)),  # GPT-2
        (4, (1,), (0,)),
        (1, (0,), (0,)),
    ],
)
def test_windows_are_where_the_published_ones_are(
    depth: int, first: tuple[int, ...], among: tuple[int, ...]
) -> None:
    found = layer_sets("memit", depth)
    assert found[0] == first
    assert among in found


@pytest.mark.parametrize("depth", range(1, 130))
def test_windows_are_inside_any_model(depth: int) -> None:
    found = layer_sets("alphaedit", depth)
    assert len(set(found)) == len(found) <= 4
    assert len({len(window) for window in found}) == 1
    for window in found:
        assert list(window) == list(range(window[0], window[-1] + 1))
        assert 0 <= window[0] <= window[-1] < depth


def test_editors_with_targets_in_every_layer_take_the_ends_of_the_windows() -> None:
    assert layer_sets("memit+blue", 32)[0] == (4, 8)


@pytest.mark.parametrize(
    ("editor", "field"),
    [("memit", "covariance_weight"), ("memit-seq", "covariance_weight"), ("pmet", "covariance_weight"),
     ("emmet", "covariance_weight"), ("alphaedit", "ridge"), ("rome", None), ("ft", None)],
)  # fmt: skip
def test_the_strength_is_lambda_or_ridge(editor: str, field: str | None) -> None:
    if field:
        assert strength_field(editor) == field
    else:
        with pytest.raises(ValueError, match=f"editor '{editor}' .* can be tuned: .*memit.*alphaedit"):
            strength_field(editor)


def setting(layer: int = 1, rate: float = 0.5, strength: float = 10.0) -> Setting:
    return Setting(editor="memit", layers=(layer,), learning_rate=rate, strength=strength)


def trial(where: Setting, value: float, locality: float = 0.5, deviation: float = 0.0) -> Trial:
    def plain(metric: str, value: float) -> Score:
        return Score(metric=metric, value=value, low=value, high=value, n=1, protocol="probability")

    scores = {"score": plain("score", value), "locality": plain("locality", locality)}
    return Trial(setting=where, scores=scores, deviation=deviation)


def test_the_search_goes_along_coordinates() -> None:
    grid = Grid(
        editor="memit", layers=((1,), (2,)), learning_rates=(0.5, 0.1), strengths=(100.0, 10.0, 1.0),
        start=setting(1, 0.5, 100),
    )  # fmt: skip
    asked: list[Setting] = []

    def attempt(where: Setting) -> Trial:
        asked.append(where)
        return trial(where, 1.0 if where.layers == (2,) and where.learning_rate == 0.1 else 0.5)

    found = search(grid, attempt)
    assert [t.setting for t in found] == asked
    assert asked[0] == grid.start
    middle = [setting(layer, rate, 10) for layer in (1, 2) for rate in (0.5, 0.1)]
    assert asked[1:5] == middle
    assert asked[5:] == [setting(2, 0.1, 100), setting(2, 0.1, 1)]  # 10 was tried already
    assert len(asked) == grid.most == 7


def test_where_all_of_the_middle_fails_the_start_is_gone_along() -> None:
    grid = Grid(
        editor="memit", layers=((1,), (2,)), learning_rates=(0.5,), strengths=(10.0, 1.0),
        start=setting(2, 0.5, 1),
    )  # fmt: skip

    def attempt(where: Setting) -> Trial:
        if where.strength == 10:
            return Trial(setting=where, scores={}, failure="no")
        return trial(where, 0.5)

    found = search(grid, attempt)
    assert {t.setting for t in found} == {setting(2, 0.5, 1), setting(1, 0.5, 10), setting(2, 0.5, 10)}
    assert choose(found, grid.start) == trial(setting(2, 0.5, 1), 0.5)


# -- what is chosen -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_preserves_most_within_one_standard_error(seed: int) -> None:
    draw = random.Random(seed)
    trials = [
        trial(setting(draw.randrange(4), draw.choice((0.1, 0.5)), draw.choice((1.0, 10.0))),
              draw.choice((0.5, 0.6, 0.65, 0.7)), draw.choice((0.2, 0.3)), draw.choice((0.0, 0.06, 0.2)))
        for _ in range(draw.randrange(1, 9))
    ]  # fmt: skip
    failed = Trial(setting=setting(strength=1000), scores={}, failure="no")
    start = setting(1, 0.5, 10)
    chosen = choose([failed, *trials], start)
    assert chosen is not None
    top = max(t.value("score") for t in trials)
    error = next(t.deviation for t in trials if t.value("score") == top)
    near = [t for t in trials if top - t.value("score") <= error]
    assert chosen in near
    assert chosen.setting.strength == max(t.setting.strength for t in near)
    near = [t for t in near if t.setting.strength == chosen.setting.strength]
    assert chosen.value("locality") == max(t.value("locality") for t in near)
    near = [t for t in near if t.value("locality") == chosen.value("locality")]
    assert abs(chosen.setting.layers[0] - 1) == min(abs(t.setting.layers[0] - 1) for t in near)
    near = [t for t in near if abs(t.setting.layers[0] - 1) == abs(chosen.setting.layers[0] - 1)]
    assert chosen.setting.learning_rate == max(t.setting.learning_rate for t in near)


def test_nothing_is_chosen_of_failures() -> None:
    assert choose([], setting()) is None
    assert choose([Trial(setting=setting(), scores={}, failure="no")], setting()) is None


@pytest.mark.parametrize("editor", ["memit", "alphaedit"])
def test_the_file_marks_what_the_rule_says(tuned: Path, editor: str) -> None:
    rows = tried(tuned, editor)
    best = max(rows, key=lambda row: float(row["score"]))
    field = strength_field(editor)
    near = [row for row in rows if row["score"] >= best["score"] - best["score_standard_error"]]
    (chosen,) = (row for row in rows if row.get("chosen"))
    (start,) = (row for row in rows if row.get("start"))
    assert chosen in near
    assert chosen[field] == max(row[field] for row in near)
    assert start is rows[0]
    assert (start["layers"], start["learning_rate"]) == ([1, 2], 0.5)
    assert start[field] == {"memit": 100, "alphaedit": 10}[editor]
    assert {(tuple(row["layers"]), row["learning_rate"]) for row in rows} == {
        (layers, rate) for layers in ((1, 2), (2, 3)) for rate in (0.5, 0.1)
    }


# -- the numbers --------------------------------------------------------------------------------------------


def one_by_one(
    place: Place, row: dict[str, Any], ids: Sequence[Any], config: dict[str, Any]
) -> dict[str, float]:
    """The rates of one setting by the editor itself: a fresh model for every batch, nothing kept."""
    cases = {case.case_id: case for case in load_dataset(str(place.records)).cases}
    scored: dict[Any, list[dict[str, Any]]] = {}
    for at in range(0, RECORDS, SIZE):
        loaded = load_model(str(place.model), find_model(str(place.model)), dtype=torch.float32, device="cpu")
        corpus = load_corpus(str(place.texts), loaded, limit=None, seed=0, progress=lambda *_: None)
        found = gather_statistics(loaded, row["layers"], corpus, limit=None, progress=lambda *_: None)
        kind, editor = EDITORS[row["editor"]]
        start: Any = editor(kind(**config)).start
        stream = start(loaded.model, loaded.tokenizer, covariance=found.covariance, seed=0)
        batch = [cases[case_id] for case_id in ids[at : at + SIZE]]
        stream.edit([case.request for case in batch])
        for (about, query), answer in zip(
            (pairs := list(batch_queries([batch]))),
            score(loaded.model, loaded.tokenizer, [query for _, query in pairs]),
            strict=True,
        ):
            assert query.prompt == about["prompt"]
            scored.setdefault(about["case_id"], []).append(about | answer_fields(answer))
    return counterfact_rates(list(scored.values()))


@pytest.mark.parametrize("editor", ["memit", "alphaedit"])
@pytest.mark.parametrize("which", [0, 3, -1])
def test_a_setting_is_scored_as_the_editor_alone_would_be(
    place: Place, tuned: Path, editor: str, which: int
) -> None:
    """With target values kept and one model for all, against nothing kept and a model for each batch."""
    table = yaml.safe_load(tuned.read_text())
    row = tried(tuned, editor)[which]
    field = strength_field(editor)
    config = {name: value for name, value in table[editor].items() if name != "source"}
    config |= {"layers": tuple(row["layers"]), "learning_rate": row["learning_rate"], field: row[field]}
    for metric, value in one_by_one(place, row, table["tuning"]["case_ids"], config).items():
        assert row[metric] == pytest.approx(value, abs=1e-6), metric


def test_the_settings_differ_in_what_they_do(tuned: Path) -> None:
    for editor in ("memit", "alphaedit"):
        assert len({(row["score"], row["locality"]) for row in tried(tuned, editor)}) > 1


def test_target_values_are_optimised_once_for_each_layer_and_rate(
    tuned: Path, calls: list[tuple[int, float]]
) -> None:
    """Whatever the strength and the editor; the two batches are two."""
    assert sorted(calls) == sorted(2 * [(layer, rate) for layer in (2, 3) for rate in (0.5, 0.1)])


def test_keeping_target_values_changes_no_number(
    place: Place, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.tuning, "KeptTargets", lambda _: optimise_targets)
    assert place.tune(tmp_path / "again.yaml") == 0
    assert (tmp_path / "again.yaml").read_bytes() == tuned.read_bytes()


def test_target_values_of_an_edited_model_are_not_kept(place: Place, tmp_path: Path) -> None:
    """BLUE optimises its second layer's on the model whose first layer is changed."""
    seen: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["layer"])
        return optimise_targets(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.kept_targets, "optimise_targets", counted)
        assert call(
            tune.main, *place.common, "--out", str(tmp_path / "blue.yaml"), "--editors", "memit+blue",
            "--set", "memit+blue.steps=3", "--records", "2", "--evaluation-edits", "2", "--layers", "1,3",
            "--learning-rates", "0.5", "--strengths", "10,1", "0.1",
        ) == 0  # fmt: skip
    rows = tried(tmp_path / "blue.yaml", "memit+blue")
    assert [row["covariance_weight"] for row in rows] == [10, 1, 0.1]
    assert sorted(seen) == [1, 3, 3, 3]


def test_a_kept_target_value_is_that_of_its_own_arguments() -> None:
    """Another layer, rate, place, template or request is another entry; the strength is none."""
    made: list[int] = []
    weights: list[str | None] = ["unedited"]

    def count(*_: Any, **__: Any) -> Targets:
        made.append(1)
        return Targets(*[torch.tensor(len(made))] * 6)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.kept_targets, "optimise_targets", count)
        kept = KeptTargets(lambda: weights[0])
        source: Any = lambda *args, **kwargs: int(kept(*args, **kwargs).updates)
        config = EDITORS["memit"][0]
        first = (None, None, ["a"], ("{}",), config(layers=(1, 2)))
        assert source(*first) == 1
        assert source(*first[:4], config(layers=(2,), covariance_weight=3)) == 1
        assert source(*first[:4], EDITORS["alphaedit"][0](layers=(0, 2))) == 1
        others = [
            source(*first, layer=1), source(*first, places=("mlp",)), source(*first, nll_factor=1.0),
            source(*first[:4], config(layers=(3,))), source(*first[:4], config(layers=(2,), steps=3)),
            source(*first[:4], config(layers=(2,), learning_rate=0.1)),
            source(None, None, ["b"], *first[3:]), source(None, None, ["a"], ("x {}",), first[4]),
        ]  # fmt: skip
        assert others == list(range(2, 10))
        assert kept.saved_seconds > 0
        weights[0] = "edited"
        assert [source(*first), source(*first)] == [10, 10]
        weights[0] = None
        assert [source(*first), source(*first)] == [11, 12]


def test_what_an_editor_releases_is_scored(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EDITORS["prune"][1], "released", lambda _, base, edited: (dict(base), {}))
    out = tmp_path / "prune.yaml"
    more = ("--learning-rates", "0.5", "--strengths", "1")
    assert call(
        tune.main, *place.common, "--out", str(out), "--editors", "prune", "--set", "prune.steps=3",
        "--records", "4", "--evaluation-edits", "2", "--layers", "1", *more,
    ) == 0  # fmt: skip
    unedited = yaml.safe_load(out.read_text())["tuning"]["unedited"]
    (row,) = tried(out, "prune")
    assert {name: row[name] for name in unedited} == unedited


# -- failures -----------------------------------------------------------------------------------------------


def test_a_setting_that_fails_is_not_chosen(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No direction of these keys is below the threshold in any layer: AlphaEdit fails, MEMIT does not."""
    more = ("--set", "alphaedit.nullspace_threshold=1e-9")
    assert place.tune(tmp_path / "some.yaml", *more) == 1
    table = yaml.safe_load((tmp_path / "some.yaml").read_text())
    assert set(table) == {"memit", "tuning"}
    failed = tried(tmp_path / "some.yaml", "alphaedit")
    assert len(failed) == 5
    assert all("below nullspace_threshold" in row["failure"] and "score" not in row for row in failed)
    output = capsys.readouterr().out
    assert "alphaedit: every setting failed" in output
    assert "failed: ValueError: layer 1: no covariance eigenvalue" in output
    assert place.tune(tmp_path / "none.yaml", *more, editors=["alphaedit"]) == 1
    assert not (tmp_path / "none.yaml").exists()


def test_edits_that_do_not_take_are_said(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--strengths", "memit=1e9", "--learning-rates", "0.1")
    assert place.tune(tmp_path / "weak.yaml", *more, editors=["memit"]) == 0
    assert "memit: no Score is above the unedited model's" in capsys.readouterr().out


# -- the records --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["first", "random"])
@pytest.mark.parametrize("negatives", [None, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_records_are_outside_the_ablations(
    place: Place, order: str, negatives: int | None, seed: int
) -> None:
    dataset = load_dataset(str(place.records))
    given = {"dataset": str(place.records), "select": order, "negatives": negatives, "seed": seed,
             "device": "cpu"}  # fmt: skip
    cases = tune.records_apart(dataset, resolve(given), edits=9, records=10)
    used, _ = select(dataset, edits=9, negatives=negatives, order=order, seed=seed)
    ids = [case.case_id for case in cases]
    assert len(set(ids)) == 10
    assert not set(ids) & {case.case_id for case in (*used.cases, *used.negatives)}
    again = tune.records_apart(dataset, resolve(given), edits=9, records=10)
    other = tune.records_apart(dataset, resolve(given | {"seed": seed + 1}), edits=9, records=10)
    assert [case.case_id for case in again] == ids != [case.case_id for case in other]


def test_an_ablation_with_the_file_meets_none_of_its_records(
    place: Place, tuned: Path, tmp_path: Path
) -> None:
    """The run as the printed line has it; its router's negatives are outside too."""
    assert place.ablate(tmp_path / "run", "--hyperparameters", str(tuned)) == 0
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    made_of, table = info["provenance"], yaml.safe_load(tuned.read_text())
    used = {*made_of["case_ids"], *made_of["negative_ids"]}
    assert len(used) == 2 * EDITS
    assert not used & set(table["tuning"]["case_ids"])
    assert not any("tuned.yaml" in note for note in info["notes"])
    assert made_of["dataset"]["digest"] == table["tuning"]["dataset"]["digest"]
    # what a reader takes from run.json is what was tuned
    for editor in ("memit", "alphaedit"):
        fields = {name: value for name, value in table[editor].items() if name != "source"}
        assert info["spec"]["settings"][editor] == fields
        assert made_of["hyperparameter_sources"][editor] == table[editor]["source"]
        assert "tuned by harness.tune: 6 records of" in table[editor]["source"]


def test_an_ablation_that_meets_them_says_so(place: Place, tuned: Path, tmp_path: Path) -> None:
    ids = yaml.safe_load(tuned.read_text())["tuning"]["case_ids"]
    out = tmp_path / "run"
    more = ("--seed", "1", "--negatives", "20", "--editors", "memit", "--hyperparameters", str(tuned))
    assert place.ablate(out, *more) == 0
    info = json.loads((out / "run.json").read_text())
    edited, negatives = (
        len(set(ids) & set(info["provenance"][name])) for name in ("case_ids", "negative_ids")
    )
    assert edited + negatives > 0
    (note,) = (note for note in info["notes"] if "tuned.yaml" in note)
    assert f"{edited} of the {EDITS} edited ones and {negatives} of the 20 unrelated" in note
    assert note in (out / "report.md").read_text()


# -- the file -----------------------------------------------------------------------------------------------


def test_the_file_resolves_to_the_chosen_settings(place: Place, tuned: Path) -> None:
    file = read_hyperparameters(str(tuned))
    assert set(file.rows) == {"memit", "alphaedit"}
    given = {"model": "owner/name", "device": "cpu"}  # a model without a preset
    spec = resolve(given, (), file)
    for editor in ("memit", "alphaedit"):
        (chosen,) = (row for row in tried(tuned, editor) if row.get("chosen"))
        settings = spec.settings[editor]
        assert settings["layers"] == tuple(chosen["layers"])
        assert settings["learning_rate"] == chosen["learning_rate"]
        assert settings[strength_field(editor)] == chosen[strength_field(editor)]
        assert (settings["steps"], settings["clamp_norm_factor"]) == (4, 4.0)  # of --set
        assert settings["weight_decay"] == 0.5  # the config's default
    assert spec.digest() == resolve(given, (), read_hyperparameters(str(tuned))).digest()
    assert resolve(given, ["memit.steps=9"], file).settings["memit"]["steps"] == 9  # --set wins


def test_a_row_of_a_file_replaces_the_presets(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("alphaedit: {layers: [3, 4], ridge: 1.0e-3, learning_rate: 1e-2}\n")
    file = read_hyperparameters(str(path))
    spec = resolve({"device": "cpu"}, (), file)
    preset = resolve({"device": "cpu"})
    assert spec.settings["memit"] == preset.settings["memit"]
    alphaedit = spec.settings["alphaedit"]
    assert (alphaedit["layers"], alphaedit["ridge"], alphaedit["learning_rate"]) == ((3, 4), 0.001, 0.01)
    assert (alphaedit["steps"], preset.settings["alphaedit"]["steps"]) == (25, 20)  # the config's default
    assert file.sources_of(spec.editors) == {"alphaedit": "mine.yaml"}


def test_a_config_file_may_name_it(tmp_path: Path, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(spec: Any, **more: Any) -> int:
        seen.append((spec, more["hyperparameters"]))
        raise ValueError("far enough")

    monkeypatch.setattr(harness.run, "run_grid", note)
    config = tmp_path / "run.yaml"
    config.write_text(f"model: owner/name\ndevice: cpu\nhyperparameters: {tuned}\n")
    assert call(ablation.main, "--config", str(config)) == 2
    ((spec, file),) = seen
    assert spec.settings["memit"]["steps"] == 4
    assert file.name == "tuned.yaml"


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(harness.run, "load_model", refuse)
    monkeypatch.setattr(harness.tune, "load_model", refuse)


WRONG_FILES = [
    ("memitt: {layers: [1]}", ["unknown editor 'memitt'", "alphaedit"]),
    ("memit: {layers: [1], stepz: 3}", ["unknown field 'stepz' of memit", "steps"]),
    ("memit: {layers: [1], steps: many}", ["memit.steps", "'many'", "int"]),
    ("memit: {layers: [1], steps: 2.5}", ["memit.steps", "2.5", "int"]),
    ("memit: {layers: [1], steps: true}", ["memit.steps", "True", "int"]),
    ("memit: {layers: [1], steps: [1]}", ["memit.steps", "[1]", "int"]),
    ("memit: {layers: [1], learning_rate: .nan}", ["memit.learning_rate", "nan"]),
    ("memit: {layers: [1], learning_rate:}", ["memit.learning_rate", "none"]),
    ("memit: {layers: [1.5]}", ["memit.layers", "[1.5]", "whole numbers"]),
    ("memit: {layers: '4-8'}", ["memit.layers", "'4-8'", "whole numbers"]),
    ("memit: {layers: []}", ["memit", "layers is empty"]),
    ("memit: {layers: [2, 1]}", ["memit", "ascending"]),
    ("memit: {layers: [1, 99]}", ["layers up to 99", "blocks 0 to 4"]),
    ("memit: {layers: [1], covariance_weight: 0}", ["memit: covariance_weight is 0.0"]),
    ("memit: {steps: 3}", ["no hyperparameters for memit", "--set memit.layers"]),
    ("memit: {}", ["no hyperparameters for memit"]),
    ("alphaedit: {layers: [1]}", ["no hyperparameters for memit", "--hyperparameters"]),
    ("memit: 3", ["memit is 3", "mapping"]),
    ("memit: {layers: [1]}\nalphaedit: {layers: [1], steps: no}", ["alphaedit.steps", "False"]),
    ("tuning: 3\nmemit: {layers: [1]}", ["tuning is 3"]),
    ("- memit", ["no mapping"]),
    ("", ["no mapping"]),
    ("memit: [", ["cannot be read"]),
    (None, ["cannot be read"]),
]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("text", "reasons"), WRONG_FILES)
def test_a_wrong_file_is_one_line_before_a_model_is_loaded(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, reasons: list[str]
) -> None:
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    more = ("--editors", "memit", "--hyperparameters", str(path))
    assert place.ablate(tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(reason in error for reason in reasons), error
    assert not (tmp_path / "run").exists()


def test_odd_notes_of_tuning_are_ignored(tmp_path: Path, place: Place) -> None:
    dataset = load_dataset(str(place.records))
    selection, _ = select(dataset, edits=4, negatives=None, order="first", seed=0)
    for tuning in (
        "",
        "{case_ids: 3}",
        "{case_ids: [1], dataset: x}",
        "{dataset: {digest: y}, case_ids: [1]}",
    ):
        path = tmp_path / "file.yaml"
        path.write_text(f"memit: {{layers: [1]}}\ntuning: {tuning}\n")
        assert read_hyperparameters(str(path)).overlap(dataset, selection) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        (["--editors", "memitt"], ["'memitt' is unknown", "alphaedit"]),
        (["--editors", "rome"], ["'rome' has no target values with", "memit"]),
        (["--editors", "memit", "memit"], ["editors", "twice"]),
        (["--model", "gpt3"], ["unknown model 'gpt3'"]),
        (["--dataset", "factz"], ["unknown dataset 'factz'"]),
        (["--stats", "wiki"], ["'wiki'"]),
        (["--device", "gpu"], ["unknown device 'gpu'"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--select", "last"], ["unknown selection 'last'"]),
        (["--records", "0"], ["records is 0"]),
        (["--records", "many"], ["--records", "'many'"]),
        (["--records", "23"], ["23 records asked", "22 beside the 8 left to the ablation", "--records"]),
        (["--evaluation-edits", "31"], ["31 edits are left", "30 usable records", "--evaluation-edits"]),
        (["--evaluation-edits", "0"], ["evaluation_edits is 0"]),
        (["--batch-size", "0"], ["batch_size is 0"]),
        (["--layers", "4-x"], ["--layers", "'4-x' is no layer set"]),
        (["--layers", "4-3"], ["'4-3' is no layer set"]),
        (["--layers", "3,2"], ["memit", "ascending"]),
        (["--layers", "1-2", "3-9"], ["layers up to 9", "blocks 0 to 4"]),
        (["--layers", "1-2", "1,2"], ["--layers", "twice"]),
        (["--learning-rates", "0"], ["memit: learning_rate is 0.0"]),
        (["--learning-rates", "nan"], ["--learning-rates", "'nan' is no finite number"]),
        (["--learning-rates", "0.5", "0.5"], ["--learning-rates", "twice"]),
        (["--strengths", "10,x"], ["--strengths", "'x' is no finite number"]),
        (["--strengths", "10,inf"], ["'inf' is no finite number"]),
        (["--strengths", "0"], ["memit: covariance_weight is 0.0"]),
        (["--strengths", "memit=1", "alphaedit=0"], ["alphaedit: ridge is 0.0"]),
        (["--strengths", "pmet=1"], ["'pmet', which is not in this run: memit, alphaedit"]),
        (["--set", "memit.layers=1"], ["memit.layers=1", "--layers"]),
        (["--set", "memit.covariance_weight=1"], ["--strengths"]),
        (["--set", "memit.steps=x"], ["memit.steps=x"]),
        (["--set", "memit.stepz=1"], ["unknown field 'stepz'"]),
        (["--set", "pmet.steps=1"], ["'pmet' is not in this run"]),
        (["--out", "."], ["--out '.'"]),
        (["--hyperparameters", "x"], ["--hyperparameters"]),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(
    place: Place, capsys: pytest.CaptureFixture[str], arguments: list[str], reasons: list[str]
) -> None:
    given = ["--evaluation-edits", "4", "--records", "6", *arguments]
    assert call(tune.main, *place.common, *given) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert all(reason in output.err for reason in reasons), output.err


def test_right_arguments_get_as_far_as_the_model(place: Place, no_model: None) -> None:
    with pytest.raises(AssertionError, match="a model was loaded"):
        call(tune.main, *place.common, "--evaluation-edits", "4", "--records", "6")


def test_without_flags_the_larger_models_defaults_are_the_start(place: Place) -> None:
    parser = tune._parser()
    args = parser.parse_args([*place.common, "--evaluation-edits", "4", "--records", "6"])
    plan = tune.make_plan(args)
    memit, alphaedit = plan.grids
    assert memit.start == Setting(editor="memit", layers=(1,), learning_rate=0.5, strength=15000.0)
    assert alphaedit.start == Setting(editor="alphaedit", layers=(1,), learning_rate=0.5, strength=10.0)
    assert memit.middle[0].strength == 2000.0
    assert alphaedit.middle[0].strength == 10.0
    assert memit.learning_rates == (0.5, 0.1)
    assert memit.start in memit.along(memit.middle[0])
    assert isinstance(args, argparse.Namespace)


def test_the_same_seed_gives_the_same_bytes_and_the_printed_table_says_them(
    place: Place,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With empty caches."""
    monkeypatch.setenv("SEQMMR_CACHE", str(tmp_path / "cache"))
    assert place.tune(tmp_path / "again.yaml") == 0
    assert (tmp_path / "again.yaml").read_bytes() == tuned.read_bytes()
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith("|")]
    rows = tried(tuned, "memit") + tried(tuned, "alphaedit")
    assert len(lines) == 2 + 1 + len(rows)
    for line, row in zip(lines[3:], rows, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["editor"]
        assert cells[4:7] == [f"{100 * row[m]:.1f}" for m in ("efficacy", "generalization", "locality")]
        assert cells[7].startswith(f"{100 * row['score']:.1f} [")
        assert ("chosen" in cells[8], "start" in cells[8]) == ("chosen" in row, "start" in row)
    ids = yaml.safe_load(tuned.read_text())["tuning"]["case_ids"]
    assert f": {' '.join(map(str, ids))}" in output.out
    assert f"--hyperparameters {tmp_path / 'again.yaml'}" in output.out
    assert "one bootstrap standard error" in output.out
