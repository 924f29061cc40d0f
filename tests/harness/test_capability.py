"""General ability: answers are lm-eval's own and never stale, and cells need no forward of their own."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

import harness.capability
import harness.run
from benchmarks.tiny import HashedWords, tiny_model, tiny_records, tiny_texts, tiny_tokenizer
from harness.capability import Evaluator, Suite, load_suite
from harness.folder import SpecMismatchError
from harness.lm import AnswerStore, RoutedLM
from harness.metrics import resampling_counts, task_scores
from harness.paths import read_lines
from harness.run import run_grid
from harness.spec import RunSpec, resolve
from tasks import SIX, generated

Row = dict[str, Any]
Write = Callable[..., Path]
TWO = ("seqmmr_cola", "seqmmr_mmlu")
SETTINGS = ["memit.layers=1,2", "memit.steps=4", "memit.covariance_weight=1", "memit.clamp_norm_factor=4"]


@pytest.fixture(scope="module")
def suite(glue_folder: Path) -> Suite:
    return load_suite(TWO, str(glue_folder))


def instance(method: Any, *args: Any) -> Instance:
    return Instance(method, {}, args, 0, ("task", 0, 1))


class Refusing:
    """A model that must not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the model was asked for {name}")


# -- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "bos"), [("gpt2", True), ("llama", True), ("qwen2", False)])
def test_answers_are_those_of_lm_eval(suite: Suite, model_type: str, bos: bool) -> None:
    model, tokenizer = tiny_model(model_type), tiny_tokenizer(bos=bos)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Evaluator(suite, model, tokenizer).rows()
    assert len(rows) == len(suite.items) == 200
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, logits_cache=False)
    for item, row in list(zip(suite.items, rows, strict=True))[::9]:
        asked = [instance("loglikelihood", item.prompt, f" {choice}") for choice in item.choices]
        wanted = [logprob for logprob, _ in plain.loglikelihood(asked, disable_tqdm=True)]
        assert row["choice_logprobs"] == pytest.approx(wanted, abs=1e-5)
        assert row["pred"] == wanted.index(max(wanted))


@torch.no_grad()
def test_log_probabilities_are_those_of_a_plain_forward(suite: Suite) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Evaluator(suite, model, tokenizer).rows()
    for item, row in list(zip(suite.items, rows, strict=True))[::9]:
        for choice, found in zip(item.choices, row["choice_logprobs"], strict=True):
            before = tokenizer(item.prompt.rstrip(" "))["input_ids"]  # its spaces belong to the answer
            ids = torch.tensor([tokenizer(f"{item.prompt} {choice}")["input_ids"]])
            logprobs = model(ids).logits[0].log_softmax(-1)
            answer = ids[0, len(before) :]
            wanted = logprobs[len(before) - 1 : -1].gather(1, answer[:, None]).sum()
            assert found == pytest.approx(float(wanted), abs=1e-5)


@torch.no_grad()
def test_generated_answers_are_those_of_a_plain_greedy_loop(suite: Suite) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    evaluator = Evaluator(suite, model, tokenizer)
    evaluator.rows()
    task = suite.tasks[generated("seqmmr_cola")]
    answers = evaluator.store.generate_until(task.instances)
    for request, found in list(zip(task.instances, answers, strict=True))[::9]:
        ids = tokenizer(request.args[0])["input_ids"]
        start = len(ids)
        while len(ids) < start + 5 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found == tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("named", [True, False])
def test_changed_weights_get_new_answers(suite: Suite, named: bool) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    weight = "transformer.h.2.mlp.c_proj.weight"
    evaluator = Evaluator(suite, model, tokenizer, changing=[weight] if named else None)
    before = evaluator.rows()
    inner, evaluator.store.inner = evaluator.store.inner, Refusing()
    assert evaluator.rows() == before  # every answer is known
    with pytest.raises(AssertionError, match="the model was asked"), torch.no_grad():
        model.get_parameter(weight).mul_(3)
        evaluator.rows()
    evaluator.store.inner = inner
    after = evaluator.rows()
    assert [row["choice_logprobs"] for row in after] != [row["choice_logprobs"] for row in before]
    fresh = Evaluator(suite, model, tokenizer).rows()
    assert after == fresh
    with torch.no_grad():
        model.get_parameter(weight).copy_(tiny_model("gpt2").get_parameter(weight))
    evaluator.store.inner = Refusing()
    assert evaluator.rows() == before  # the answers of these weights are still there


def test_the_store_asks_only_for_what_is_missing() -> None:
    asked: list[tuple[str, list[Any]]] = []

    class Echo:
        def __getattr__(self, method: str) -> Any:
            def answer(requests: list[Instance], disable_tqdm: bool) -> list[Any]:
                asked.append((method, [request.args for request in requests]))
                return [f"{method} {request.args}" for request in requests]

            return answer

    weights = ["one"]
    store = AnswerStore(Echo(), lambda: weights[0])
    first = [instance("loglikelihood", "a", " b"), instance("loglikelihood", "a", " c")]
    answers = store.loglikelihood([*first, first[0]])
    assert asked == [("loglikelihood", [("a", " b"), ("a", " c")])]
    assert answers == [f"loglikelihood {args}" for args in [("a", " b"), ("a", " c"), ("a", " b")]]
    store.loglikelihood([instance("loglikelihood", "a", " c"), instance("loglikelihood", "d", " c")])
    assert asked[1:] == [("loglikelihood", [("d", " c")])]
    store.generate_until([instance("generate_until", "a", {"max_gen_toks": 5})])
    store.generate_until([instance("generate_until", "a", {"max_gen_toks": 6})])
    store.loglikelihood_rolling([instance("loglikelihood_rolling", "a")])
    assert [method for method, _ in asked[2:]] == ["generate_until"] * 2 + ["loglikelihood_rolling"]
    weights[0] = "two"
    store.loglikelihood(first)
    assert asked[5:] == [("loglikelihood", [("a", " b"), ("a", " c")])]


def test_what_is_not_finite_is_an_error(suite: Suite) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    with torch.no_grad():
        model.get_parameter("transformer.h.2.mlp.c_proj.weight").fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="seqmmr_cola, cola-10"):
        Evaluator(suite, model, tokenizer).rows()


# -- tasks --------------------------------------------------------------------------------------------------


def test_records_are_named_and_right_answers_known(suite: Suite, glue_folder: Path) -> None:
    for name, data in zip(TWO, ("cola", "mmlu"), strict=True):
        records = [json.loads(line) for line in (glue_folder / f"glue_{data}.jsonl").read_text().splitlines()]
        found = [(item.case_id, item.doc_id, item.gold) for item in suite.items if item.task == name]
        assert found == [(r["id"], i, r["label"]) for i, r in enumerate(records[10:110])]


def test_the_digest_is_of_requests_and_answers(suite: Suite, glue_folder: Path, tmp_path: Path) -> None:
    assert load_suite(TWO, str(glue_folder)).digest == suite.digest
    assert (
        load_suite(("seqmmr_rte",), str(glue_folder)).digest
        != load_suite(("seqmmr_rte_legacy",), str(glue_folder)).digest
    )
    folder = Path(shutil.copytree(glue_folder, tmp_path / "glue"))
    path = folder / "glue_cola.jsonl"
    rows = path.read_text().splitlines()
    rows[50] = rows[50].replace('"label": 1', '"label": 0')
    path.write_text("\n".join(rows))
    assert load_suite(TWO, str(folder)).digest != suite.digest


def test_legacy_labels_turn_the_answers_round(glue_folder: Path) -> None:
    names = ("seqmmr_rte", "seqmmr_rte_legacy")
    right, legacy = (load_suite((name,), str(glue_folder)).items for name in names)
    assert [item.prompt for item in right] == [item.prompt for item in legacy]
    for one, other in zip(right, legacy, strict=True):
        assert one.choices[one.gold] != other.choices[other.gold]
    assert all((item.choices[item.gold] == "True") == (item.gold == 0) for item in right)  # 0 is entailment


def test_answers_of_unequal_length_are_said(suite: Suite) -> None:
    class Letters:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(text)))}

    (note,) = suite.notes(Letters())
    assert note.startswith("seqmmr_cola: its answers have 3 and 4 tokens")


@pytest.fixture
def own_task(tmp_path: Path, write_jsonl: Write) -> Callable[..., str]:
    """``own_task(output_type=...)``: a YAML file with a task of somebody else's."""
    records = [
        {"question": f"the old town {i}", "options": ["Rome", "Paris", "Oslo"], "answer": answer}
        for i, answer in enumerate(["Oslo", "Rome", "Oslo", "Rome"])
    ]
    data = write_jsonl(records, "own.jsonl")

    def write(**changes: Any) -> str:
        config = {
            "task": "towns", "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "hf")},
            "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "options", "doc_to_target": "answer",
            "metric_list": [{"metric": name} for name in ("acc", "acc_mutual_info")],
        } | changes  # fmt: skip
        path = tmp_path / "towns.yaml"
        path.write_text(json.dumps(config))
        return str(path)

    return write


def test_any_multiple_choice_task_is_taken(own_task: Callable[..., str]) -> None:
    suite = load_suite((own_task(),))
    assert suite.names == ("towns",)
    assert [item.gold for item in suite.items] == [2, 0, 2, 0]
    assert [item.case_id for item in suite.items] == ["0", "1", "2", "3"]
    assert suite.items[1].prompt == "Question: the old town 1\nAnswer:"
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=True)
    tokenizer.pad_token = tokenizer.eos_token
    rows = Evaluator(suite, model, tokenizer).rows()
    assert all(len(row["choice_logprobs"]) == 3 for row in rows)  # without those of the bare answers
    assert all(row["pred_generated"] is None for row in rows)
    assert "f1_generated" not in {score.metric for score in task_scores(rows, None, 0)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"output_type": "generate_until", "generation_kwargs": {"until": ["."]}, "metric_list": None},
         "'towns' is generate_until; it must be multiple_choice"),
        ({"doc_to_target": "question"}, "'towns', record 0: 'the old town 0' is not one of its choices"),
        ({"doc_to_text": "{{nothing}}"}, "'.*towns.yaml' cannot be loaded: UndefinedError"),
        ({"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}, "'.*towns.yaml' cannot be loaded"),
    ],
)  # fmt: skip
def test_a_task_that_does_not_do_is_one_line(own_task: Callable[..., str], changes: Row, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        load_suite((own_task(**changes),))
    assert "\n" not in str(error.value)


def test_an_unknown_task_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    index = SimpleNamespace(all_tasks=["hellaswag"])
    monkeypatch.setattr(harness.capability, "TaskManager", lambda **_: index)
    with pytest.raises(ValueError, match="unknown task 'helaswag'; known: six, seqmmr_sst"):
        load_suite(("helaswag",))


def test_missing_records_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no glue_cola\.jsonl.*--data"):
        load_suite(TWO, str(tmp_path))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(["none"], ()), (["six"], SIX), (["six", "hellaswag"], (*SIX, "hellaswag")),
     (["seqmmr_rte_legacy"], ("seqmmr_rte_legacy",))],
)  # fmt: skip
def test_names_of_the_flag(given: list[str], wanted: tuple[str, ...]) -> None:
    assert resolve({"model": "gpt2", "device": "cpu", "capability": given}).capability == wanted
    assert resolve({"model": "gpt2", "device": "cpu"}).capability == ()


@pytest.mark.parametrize(
    ("given", "reason"),
    [(["none", "six"], "none alone"), (["six", "seqmmr_nli"], "twice"), (["seqmmr_sts"], "unknown task"),
     (["seqmmr_sst_generated"], "unknown task")],
)  # fmt: skip
def test_wrong_names_of_the_flag(given: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        resolve({"model": "gpt2", "device": "cpu", "capability": given})


# -- the grid -----------------------------------------------------------------------------------------------


class Grid:
    """One small run with two general tasks."""

    def __init__(self, folder: Path, model: Path, glue: Path) -> None:
        self.folder, self.model, self.glue = folder, model, glue
        for name, rows in (
            ("records.jsonl", tiny_records(12)),
            ("texts.jsonl", [{"text": text} for text in tiny_texts(60)]),
        ):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def spec(self, **changes: Any) -> RunSpec:
        given = {
            "model": str(self.model), "dataset": str(self.folder / "records.jsonl"), "editors": ["memit"],
            "stats": str(self.folder / "texts.jsonl"), "batch_size": 2, "num_batches": 2, "device": "cpu",
            "dtype": "float32", "top_k": [2, 3], "capability": TWO,
        } | changes  # fmt: skip
        return resolve(given, SETTINGS)

    def run(self, out: Path, glue: Path | None = None, **changes: Any) -> int:
        return run_grid(self.spec(**changes), out=out, data=str(glue or self.glue))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, glue_folder: Path) -> Iterator[Grid]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.run, "encoder", HashedWords)
        yield Grid(tmp_path_factory.mktemp("grid"), tiny_folder, glue_folder)


@pytest.fixture(scope="module")
def done(grid: Grid) -> Path:
    """A finished run; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMMR_CACHE", str(grid.folder / "cache"))
        assert grid.run(grid.folder / "done") == 0
    return grid.folder / "done"


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def contents(out: Path) -> tuple[bytes, list[Row]]:
    records = [record | {"seconds": 0} for record in read_lines(out / "records.jsonl")]
    return (out / "cases.jsonl.gz").read_bytes(), records


def task_records(out: Path) -> list[Row]:
    return [r for r in read_lines(out / "records.jsonl") if r["slice"].startswith("task:")]


def task_rows(out: Path) -> dict[tuple[str, str], list[Row]]:
    """(weights, slice) -> rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in read_lines(out / "cases.jsonl.gz"):
        if row["kind"].startswith("task:"):
            found.setdefault((row["weights"], row["kind"]), []).append(row)
    return found


def test_cases_have_a_row_per_record_and_weight_set(done: Path, suite: Suite) -> None:
    found = task_rows(done)
    assert set(found) == {(w, f"task:{n}") for w in ("unedited", "memit", "memit+MM") for n in TWO}
    for (weights, kind), rows in found.items():
        items = [item for item in suite.items if f"task:{item.task}" == kind]
        wanted = [(item.case_id, item.doc_id, item.prompt, item.gold) for item in items]
        assert [(r["case_id"], r["index"], r["prompt"], r["gold"]) for r in rows] == wanted
        for row, item in zip(rows, items, strict=True):
            assert row["edits_applied"] == (0 if weights == "unedited" else 4)
            assert len(row["choice_logprobs"]) == len(item.choices)
            assert row["choice_logprobs"][row["pred"]] == max(row["choice_logprobs"])
            assert row["pred_generated"] in range(-1, len(item.choices))
            assert ("route" in row) == ("route_score" in row) == ("routes" in row) == (weights != "unedited")
            if "route" in row:
                assert (row["route"] == "edited") == (row["route_score"] >= 0)
                assert row["routes"]["2"] == row["route"]
    logprobs = {w: [r["choice_logprobs"] for r in found[w, "task:seqmmr_mmlu"]] for w, _ in found}
    assert logprobs["unedited"] != logprobs["memit"] != logprobs["memit+MM"]
    routes = {row["route"] for (w, _), rows in found.items() for row in rows if w == "memit"}
    assert routes == {"edited", "unedited"}, "the encoder of this test sends everything one way"


def f1(golds: list[int], preds: list[int], average: str) -> float:
    """F1 by its definition, class by class."""
    each, weight = {}, {}
    for c in {*golds, *preds}:
        hits = sum(g == p == c for g, p in zip(golds, preds, strict=True))
        each[c] = 2 * hits / (golds.count(c) + preds.count(c))
        weight[c] = golds.count(c) if average == "weighted" else 1
    return sum(each[c] * weight[c] for c in each) / sum(weight.values())


def recomputed(shown: list[Row], unedited: list[Row]) -> dict[str, float]:
    golds, preds = [row["gold"] for row in shown], [row["pred"] for row in shown]
    margins = []
    for row in shown:
        *_, second, best = sorted(row["choice_logprobs"])
        gold = row["choice_logprobs"][row["gold"]]
        margins.append(gold - (second if gold == best else best))
    return {
        "f1_weighted": f1(golds, preds, "weighted"),
        "f1_macro": f1(golds, preds, "macro"),
        "accuracy": sum(g == p for g, p in zip(golds, preds, strict=True)) / len(golds),
        "f1_generated": f1(golds, [row["pred_generated"] for row in shown], "weighted"),
        "gold_margin": sum(margins) / len(margins),
        "agreement": sum(a["pred"] == b["pred"] for a, b in zip(shown, unedited, strict=True)) / len(shown),
    }


def test_scores_of_unequal_classes_and_their_resamples() -> None:
    """The real lists are balanced, where weighted and plain mean agree."""
    draw = random.Random(0)
    golds = [0] * 24 + [1] * 5 + [2]
    rows, unedited = (
        [
            {"gold": gold, "pred": (p := draw.randrange(3)), "pred_generated": draw.randrange(-1, 3),
             "choice_logprobs": [float(i == p) for i in range(3)]}
            for gold in golds
        ]
        for _ in range(2)
    )  # fmt: skip
    scores = {score.metric: score for score in task_scores(rows, unedited, 0)}
    wanted = recomputed(rows, unedited)
    assert wanted["f1_weighted"] != pytest.approx(wanted["f1_macro"], abs=0.01)
    assert {name: score.value for name, score in scores.items()} == pytest.approx(wanted, abs=1e-12)
    drawn: dict[str, list[float]] = {name: [] for name in wanted}
    differences: dict[str, list[float]] = {name: [] for name in wanted}
    for counts in resampling_counts(len(rows), 0):
        again = [i for i, count in enumerate(counts) for _ in range(int(count))]
        one, other = [rows[i] for i in again], [unedited[i] for i in again]
        mine, before = recomputed(one, other), recomputed(other, other)
        for name in wanted:
            drawn[name].append(mine[name])
            differences[name].append(mine[name] - before[name])
    for name, score in scores.items():
        assert [score.low, score.high] == pytest.approx(np.quantile(drawn[name], [0.025, 0.975]), abs=1e-12)
        if name != "agreement":
            interval = np.quantile(differences[name], [0.025, 0.975])
            assert [score.difference_low, score.difference_high] == pytest.approx(interval, abs=1e-12)


def test_every_figure_follows_from_the_cases_alone(done: Path) -> None:
    rows = task_rows(done)
    records = task_records(done)
    cells = [("none", "unedited", None)] + [
        ("memit", cell, k) for cell in ("baseline", "+MM", "+R", "+MM+R")
        for k in ((2, 3) if "R" in cell else (None,))
    ]  # fmt: skip
    assert [(r["editor"], r["cell"], r["top_k"], r["slice"]) for r in records] == [
        (*cell, f"task:{name}") for cell in cells for name in TWO
    ]
    for record in records:
        assert record["error"] is None
        weights = "unedited" if record["editor"] == "none" else "memit"
        own = rows[weights + ("+MM" if "MM" in record["cell"] else ""), record["slice"]]
        unedited = rows["unedited", record["slice"]]
        shown = own
        if record["top_k"] is not None:
            edited = [row["routes"][str(record["top_k"])] == "edited" for row in own]
            shown = [a if e else b for a, b, e in zip(own, unedited, edited, strict=True)]
        wanted = recomputed(shown, unedited)
        before = recomputed(unedited, unedited)
        scores = {score["metric"]: score for score in record["scores"]}
        if record["top_k"] is not None:
            route = scores.pop("route_task")
            assert route["value"] == pytest.approx(sum(edited) / len(edited), abs=1e-12)
            assert route["protocol"] == "routing"
        assert scores.keys() == wanted.keys()
        for name, score in scores.items():
            assert score["value"] == pytest.approx(wanted[name], abs=1e-12), (record["cell"], name)
            assert score["low"] <= score["high"]
            assert score["n"] == 100
            assert score["protocol"] == ("generated" if name == "f1_generated" else "log_probability")
            differs = record["editor"] != "none" and name != "agreement"
            assert ("difference" in score) == differs
            if differs:
                assert score["difference"] == pytest.approx(wanted[name] - before[name], abs=1e-12)
                assert score["difference_low"] <= score["difference_high"]


def test_the_run_says_what_was_evaluated(done: Path, suite: Suite) -> None:
    info = json.loads((done / "run.json").read_text())
    assert info["spec"]["capability"] == list(TWO)
    assert info["spec"]["capability_digest"] == suite.digest
    facts = info["provenance"]["capability"]
    assert facts["routed_text"] == "the full prompt as given to the model"
    assert facts["batch_size"] == 16
    assert facts["tasks"] == dict.fromkeys((n for t in TWO for n in (t, generated(t))), "1.0")
    text = (done / "report.md").read_text()
    assert "General ability: weighted F1 of the likelier answer" in text
    assert "CoLA" in text


def test_the_scores_of_edits_do_not_depend_on_the_tasks(grid: Grid, done: Path, tmp_path: Path) -> None:
    assert grid.run(tmp_path / "run", capability=["none"]) == 0
    plain = [row for row in read_lines(done / "cases.jsonl.gz") if not row["kind"].startswith("task:")]
    assert read_lines(tmp_path / "run" / "cases.jsonl.gz") == plain


def test_cells_are_read_from_what_is_stored(
    grid: Grid, done: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forward, not even an evaluator: routed cells choose between stored rows."""
    for name in ("cases.jsonl.gz", "records.jsonl"):
        (copied / name).unlink()
    monkeypatch.setattr(harness.capability, "Evaluator", Refusing())
    assert grid.run(copied) == 0
    assert contents(copied) == contents(done)


def test_each_weight_set_is_evaluated_once(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = Evaluator.rows

    def rows(self: Evaluator) -> list[Row]:
        calls.append(1)
        return plain(self)

    monkeypatch.setattr(Evaluator, "rows", rows)
    assert grid.run(tmp_path / "run") == 0
    assert len(calls) == 3  # unedited, edited, merged; seven cells


def test_a_stopped_run_goes_on_to_the_same_bytes(
    grid: Grid, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    plain = Evaluator.rows

    def stop(self: Evaluator) -> list[Row]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(Evaluator, "rows", stop)
    with pytest.raises(KeyboardInterrupt):
        grid.run(tmp_path / "run")
    assert grid.run(tmp_path / "run") == 0
    assert len(calls) == 4  # the unedited model's answers were kept
    assert contents(tmp_path / "run") == contents(done)


@pytest.mark.parametrize(
    ("at", "cells"), [(3, {"+MM", "+MM+R"}), (1, {"unedited", "baseline", "+MM", "+R", "+MM+R"})]
)
def test_a_failure_costs_only_the_tasks_that_need_it(
    grid: Grid, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, cells: set[str]
) -> None:
    calls: list[int] = []
    plain = Evaluator.rows

    def fail(self: Evaluator) -> list[Row]:
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("out of\nmemory")
        return plain(self)

    monkeypatch.setattr(Evaluator, "rows", fail)
    out = tmp_path / "run"
    assert grid.run(out) > 0
    failed = [record for record in read_lines(out / "records.jsonl") if record["error"]]
    assert {record["cell"] for record in failed} == cells
    assert all(record["slice"].startswith("task:") for record in failed)
    assert all("RuntimeError: out of memory" in record["error"] for record in failed)
    assert {record["slice"] for record in failed} == {f"task:{name}" for name in TWO}
    edits = [[r for r in contents(o)[1] if not r["slice"].startswith("task:")] for o in (out, done)]
    assert edits[0] == edits[1]
    assert json.loads((out / "run.json").read_text())["status"] == "failed"


def test_other_records_are_another_run(grid: Grid, copied: Path, glue_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(glue_folder, tmp_path / "glue"))
    path = folder / "glue_mmlu.jsonl"
    rows = path.read_text().splitlines()
    rows[20] = rows[20].replace("town", "city").replace('"question": "', '"question": "Now ')
    path.write_text("\n".join(rows))
    with pytest.raises(SpecMismatchError, match="capability_digest"):
        grid.run(copied, glue=folder)


# -- a cell of a run as a model of lm-eval ------------------------------------------------------------------


def cell_model(done: Path, **more: Any) -> Any:
    text = ",".join(f"{name}={value}" for name, value in ({"run": done, "editor": "memit"} | more).items())
    extra = {"batch_size": 16, "max_batch_size": None, "device": "cpu"}
    return get_model("seqmmr").create_from_arg_string(text, extra)


@pytest.mark.parametrize(
    ("cell", "top_k"), [("baseline", None), ("+MM", None), ("+R", 3), ("+MM+R", None), ("+MM+R", 3)]
)
def test_a_cell_of_a_run_answers_as_the_run_did(
    done: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch, cell: str, top_k: int | None
) -> None:
    monkeypatch.setattr("harness.encoders.encoder", HashedWords)
    lm = cell_model(done, cell=cell, **({} if top_k is None else {"top_k": top_k}))
    evaluator = Evaluator(suite, lm.inner.model, lm.inner.tokenizer, changing=[])
    evaluator.store.inner = lm
    rows, found = task_rows(done), evaluator.rows()
    own = [row for n in TWO for row in rows["memit+MM" if "MM" in cell else "memit", f"task:{n}"]]
    plain = [row for n in TWO for row in rows["unedited", f"task:{n}"]]
    seen = set()
    for answer, edited, unedited in zip(found, own, plain, strict=True):
        route = edited["routes"][str(top_k or 2)] if "R" in cell else "edited"
        wanted = edited if route == "edited" else unedited
        assert answer["choice_logprobs"] == pytest.approx(wanted["choice_logprobs"], rel=1e-6, abs=1e-5)
        seen.add(route)
    assert seen == ({"edited", "unedited"} if "R" in cell else {"edited"})


def test_all_requests_of_a_record_go_one_way() -> None:
    model = tiny_model("gpt2")
    weight = "transformer.h.2.mlp.c_proj.weight"
    edited = {weight: model.get_parameter(weight).detach() + 1}

    class Weights:
        def loglikelihood(self, requests: list[Instance], disable_tqdm: bool) -> list[Any]:
            return [
                (request.args, bool(model.get_parameter(weight).equal(edited[weight])))
                for request in requests
            ]

    asked: list[list[str]] = []

    def router(prompts: Sequence[str]) -> list[bool]:
        asked.append(list(prompts))
        return [prompt == "yes" for prompt in prompts]

    requests = [
        Instance("loglikelihood", {}, (context, choice), 0, ("task", doc, 1))
        for doc, contexts in ((0, ("yes", "")), (1, ("no", "")))
        for context in contexts
        for choice in ("a", "b")
    ]
    found = RoutedLM(Weights(), model, edited, router).loglikelihood(requests)
    assert asked == [["yes", "no"]]
    assert found == [(request.args, request.doc_id == 0) for request in requests]
    assert not model.get_parameter(weight).equal(edited[weight])


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"editor": "rome"}, "no cell rome"),
        ({"cell": "+X"}, "no cell memit, \\+X"),
        ({"top_k": 7}, "topk with k 2, topk with k 3"),
        ({"run": "nowhere"}, "'nowhere' cannot be read"),
        ({"edtor": "memit"}, "unknown model argument 'edtor'"),
    ],
)
def test_a_cell_that_is_not_there_is_refused(done: Path, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cell_model(done, **more)


def test_the_command_line_is_lm_evals() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.lm", "run", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--model_args" in done.stdout
