"""The task definitions: their prompts to the letter, their records, and how answers are scored."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

import tasks.data
from tasks import SIX, TASKS, TASKS_DIR, generated, scoring
from tasks.data import FIELDS, GLUE, GLUE_SPLITS, MEMBERSHIP, MMLU, load, records_of

Record = dict[str, Any]
REAL_DATA = os.environ.get("SEQMMR_DATA")

PROMPTS: dict[str, tuple[str, Callable[[Record], str], list[str]]] = {  # data set, prompt, answers by label
    "seqmmr_sst": (
        "sst2",
        lambda r: "Review :" + r["sentence"] + "\nSentiment :",
        ["negative", "positive"],
    ),
    "seqmmr_mrpc": (
        "mrpc",
        lambda r: (
            "Are the sentences paraphrases of each other.\nSentence 1: " + r["sentence1"]
            + "\nSentence 2: " + r["sentence2"] + "\nAnswer:"
        ),
        ["No", "Yes"],
    ),
    "seqmmr_cola": (
        "cola",
        lambda r: "Is this sentence linguistically acceptable?\nSentence: " + r["sentence"] + "\nAnswer: ",
        ["No", "Yes"],
    ),
    "seqmmr_rte": (
        "rte",
        lambda r: r["sentence1"] + "\nquestion: " + r["sentence2"] + " True or False?\nanswer:",
        ["True", "False"],
    ),
    "seqmmr_rte_legacy": (
        "rte",
        lambda r: r["sentence1"] + "\nquestion: " + r["sentence2"] + " True or False?\nanswer:",
        ["False", "True"],
    ),
    "seqmmr_nli": (
        "nli",
        lambda r: r["sentence1"] + " entails the " + r["sentence2"] + " True or False? Answer:",
        ["False", "True"],
    ),
    "seqmmr_mmlu": (
        "mmlu",
        lambda r: (
            "Question: " + r["question"] + "\n(A) " + r["choices"][0] + "\n(B) " + r["choices"][1]
            + "\n(C) " + r["choices"][2] + "\n(D) " + r["choices"][3] + "\nAnswer:"
        ),
        ["A", "B", "C", "D"],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEQMMR_DATA", raising=False)


@pytest.fixture
def real_data() -> str:
    if not REAL_DATA:
        pytest.skip("SEQMMR_DATA names no folder with the real records")
    return REAL_DATA


@pytest.fixture(scope="module")
def loaded(glue_folder: Path) -> dict[str, Any]:
    """All definitions on made-up records."""
    manager = TaskManager(
        include_path=str(TASKS_DIR), include_defaults=False, metadata={"data": str(glue_folder)}
    )
    return dict(manager.load([name for task in TASKS for name in (task, generated(task))])["tasks"])


def lines(folder: Path, name: str) -> list[Record]:
    text = (folder / f"glue_{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]  # a text may have other line ends


def sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def requests_of(task: Any) -> list[Any]:
    task.build_all_requests(rank=0, world_size=1)
    return list(task.instances)


# -- definitions --------------------------------------------------------------------------------------------


def test_every_definition_is_found() -> None:
    """A YAML that does not parse, or repeats a name, is skipped without a word."""
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    both = {name for task in TASKS for name in (task, generated(task))}
    assert set(manager.all_tasks) == both | {"seqmmr_six"}
    assert set(PROMPTS) == set(TASKS)
    assert set(TASKS) == {*SIX, "seqmmr_rte_legacy"}


def test_the_group_has_the_six_in_both_readings(glue_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMMR_DATA", str(glue_folder))
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    found = manager.load("seqmmr_six")["tasks"]
    assert set(found) == {name for task in SIX for name in (task, generated(task))}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_answers_are_the_published_ones(
    loaded: dict[str, Any], glue_folder: Path, name: str
) -> None:
    data, prompt, answers = PROMPTS[name]
    records = lines(glue_folder, data)[10:110]
    assert len(records) == 100
    wanted = [(prompt(record), f" {answer}") for record in records for answer in answers]
    assert [request.args for request in requests_of(loaded[name])] == wanted
    assert [loaded[name].doc_to_target(r.doc) for r in loaded[name].instances[:: len(answers)]] == [
        record["label"] for record in records
    ]
    settings = {"until": [], "max_gen_toks": 5, "do_sample": False}
    written = requests_of(loaded[generated(name)])
    assert [request.args for request in written] == [(prompt(record), settings) for record in records]
    assert {request.request_type for request in written} == {"generate_until"}


def test_few_shots_come_from_the_first_ten(glue_folder: Path, loaded: dict[str, Any]) -> None:
    ids = [record["id"] for record in lines(glue_folder, "cola")]
    assert [doc["id"] for doc in loaded["seqmmr_cola"].fewshot_docs()] == ids[:10]
    assert [doc["id"] for doc in loaded["seqmmr_cola"].eval_docs] == ids[10:110]


# -- records ------------------------------------------------------------------------------------------------


def test_zipped_files_and_the_variable_are_read_too(
    glue_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (glue_folder / "glue_mmlu.jsonl").read_bytes()
    (tmp_path / "glue_mmlu.jsonl.gz").write_bytes(gzip.compress(content))
    monkeypatch.setenv("SEQMMR_DATA", str(tmp_path))
    found = load("mmlu", version=1.0, config_source="somewhere")
    assert found["test"][0] == {
        field: lines(glue_folder, "mmlu")[10][field] for field in ("id", *FIELDS["mmlu"], "label")
    }
    assert len(found["test"]) == 100
    assert [doc["id"] for doc in found["fewshot"]] == [f"mmlu-{i}" for i in range(10)]


BROKEN: list[tuple[Callable[[list[str]], list[str]], str]] = [
    (lambda rows: rows[:109], "109 records"),
    (lambda rows: [*rows[:3], "{", *rows[3:]], "line 4: not JSON"),
    (lambda rows: [*rows[:3], "[]", *rows[3:]], "line 4: .* not an object"),
    (lambda rows: [rows[0].replace('"label": 1', '"label": 2'), *rows[1:]], "record 0: label is 2"),
    (lambda rows: [rows[0].replace('"label": 1', '"label": true'), *rows[1:]], "label is True"),
    (lambda rows: [rows[0].replace('"sentence"', '"text"'), *rows[1:]], "field 'sentence' is None"),
    (lambda rows: [rows[0].replace('"id"', '"name"'), *rows[1:]], "id is None"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=[reason for _, reason in BROKEN])
def test_a_broken_file_is_one_line(
    glue_folder: Path, tmp_path: Path, change: Callable[[list[str]], list[str]], reason: str
) -> None:
    rows = (glue_folder / "glue_cola.jsonl").read_text().splitlines()
    (tmp_path / "glue_cola.jsonl").write_text("\n".join(change(rows)))
    with pytest.raises(ValueError, match=reason) as error:
        records_of("cola", str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no glue_rte\.jsonl.*SEQMMR_DATA"):
        records_of("rte", str(tmp_path))
    with pytest.raises(ValueError, match="does not exist; correct --data"):
        records_of("rte", str(tmp_path / "missing"))


# -- the hub, by stand-ins ----------------------------------------------------------------------------------


class Hub:
    """Answers as ``datasets.load_dataset`` would, with made-up texts under the real indices."""

    def __init__(self) -> None:
        self.members = json.loads(MEMBERSHIP.read_text())
        self.asked: list[tuple[Any, ...]] = []
        self.questions: dict[str, str] = {}

    def __call__(self, path: str, config: str, *, split: str, revision: str) -> list[Record]:
        self.asked.append((path, config, split, revision))
        name = next(n for n, place in GLUE_SPLITS.items() if place == (config, split))
        rows: list[Record] = [
            {"idx": index, "label": 1 - label if name == "nli" else label,
             **{field: f"{field} of {index}" for field in FIELDS[name]}}
            for index, label in self.members[name]
        ]  # fmt: skip
        known = {row["idx"] for row in rows}
        rows += [row | {"idx": max(known) + 1 + i} for i, row in enumerate(rows[:20])]
        random.Random(0).shuffle(rows)
        return rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(tasks.data, "load_dataset", stand_in)
    return stand_in


@pytest.mark.parametrize("name", GLUE_SPLITS)
def test_the_hub_gives_the_same_records_in_the_same_order(hub: Hub, name: str) -> None:
    records = records_of(name)
    assert hub.asked == [(GLUE[0], *GLUE_SPLITS[name], GLUE[1])]
    first = FIELDS[name][0]
    assert [record[first] for record in records] == [f"{first} of {i}" for i, _ in hub.members[name]]
    assert [record["label"] for record in records] == [label for _, label in hub.members[name]]
    assert [record["id"] for record in records] == [f"{name}-{i}" for i in range(110)]


def test_mmlu_is_picked_by_subject_and_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [f"Question {i}?" for i in range(110)]
    members = [[f"subject {i % 7}", sha1(q), i % 4] for i, q in enumerate(questions)]
    rows = [
        {"subject": f"subject {i % 7}", "question": q, "choices": list("wxyz"), "answer": i % 4}
        for i, q in enumerate(questions)
    ]
    random.Random(0).shuffle(rows)
    asked = []

    def hub(path: str, config: str, *, split: str, revision: str) -> list[Record]:
        asked.append((path, config, split, revision))
        return {"test": rows[:60], "validation": rows[60:], "dev": []}[split]

    monkeypatch.setattr(tasks.data, "load_dataset", hub)
    membership = tmp_path / "membership.json"
    membership.write_text(json.dumps({"mmlu": members}))
    monkeypatch.setattr(tasks.data, "MEMBERSHIP", membership)
    records = records_of("mmlu")
    assert asked == [(MMLU[0], "all", split, MMLU[1]) for split in ("test", "validation", "dev")]
    assert [record["question"] for record in records] == questions
    assert [record["label"] for record in records] == [i % 4 for i in range(110)]


def test_another_label_on_the_hub_is_an_error(hub: Hub) -> None:
    hub.members["rte"][7][1] = 1 - hub.members["rte"][7][1]
    with pytest.raises(ValueError, match=r"record 7 of rte.*glue_rte\.jsonl"):
        records_of("rte")


def test_without_network_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tasks.data, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"nyu-mll/glue@bcdcba79.*no route to host.*--data"):
        records_of("sst2")


@pytest.mark.data
@pytest.mark.parametrize("name", FIELDS)
def test_the_membership_is_that_of_the_real_files(real_data: str, name: str) -> None:
    members = json.loads(MEMBERSHIP.read_text())[name]
    rows = lines(Path(real_data), name)[:110]
    if name == "mmlu":
        found = [[r["subject"], sha1(r["question"]), r["label"]] for r in rows]
    else:
        found = [[r.get("glue_idx", r.get("source_index")), r["label"]] for r in rows]
    assert found == members
    classes = 4 if name == "mmlu" else 2
    labels = Counter(record["label"] for record in records_of(name, real_data)[10:])
    assert labels == dict.fromkeys(range(classes), 100 // classes)


# -- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        ("sst", " Positive\n", 1),
        ("sst", " negative, not positive", 1),  # positive is searched first
        ("sst", " NEGATIVE", 0),
        ("sst", " fine", -1),
        ("mrpc", " Yes", 1),
        ("mrpc", " I do not know", 0),  # "no" is in "not"
        ("mrpc", " no. yes", 1),
        ("cola", " No", 0),
        ("cola", "", -1),
        ("rte", " True", 0),
        ("rte", " False", 1),
        ("rte", " True or False", 1),  # false is searched first
        ("rte_legacy", " True", 1),
        ("rte_legacy", " True or False", 0),
        ("nli", " True or False", 1),  # true is searched first
        ("nli", " false", 0),
        ("mmlu", " B\n\nQuestion", 1),
        ("mmlu", " D", -1),  # an unfinished line
        ("mmlu", " C\nA\n", 0),  # A is searched first
    ],
)
def test_generated_answers_are_read_as_published(task: str, text: str, label: int) -> None:
    score = getattr(scoring, f"generated_{task}")
    found = score({"label": 1}, [text])
    assert found == {"f1_generated": (1, label), "invalid": float(label == -1)}


def test_choices_are_scored_from_log_probabilities() -> None:
    results = [(-3.0, False), (-1.0, True), (-1.0, False), (-2.5, False)]
    assert scoring.from_choices({"label": 3}, results) == {
        "f1_weighted": (3, 1), "f1_macro": (3, 1), "acc": 0.0, "gold_margin": -1.5,
    }  # fmt: skip
    assert scoring.from_choices({"label": 1}, results)["gold_margin"] == 0.0
    assert scoring.from_choices({"label": 1}, results)["acc"] == 1.0


def test_f1_of_a_case_worked_by_hand() -> None:
    items = [(0, 0), (0, 1), (1, 1), (1, 1), (1, -1), (2, 0)]
    each = {0: 2 * 1 / (2 + 2), 1: 2 * 2 / (3 + 3), 2: 0.0, -1: 0.0}
    assert scoring.f1_weighted(items) == pytest.approx((2 * each[0] + 3 * each[1] + 1 * each[2]) / 6)
    assert scoring.f1_macro(items) == pytest.approx(sum(each.values()) / 4)


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_that_of_scikit_learn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = random.Random(seed)
    items = [(draw.randrange(4), draw.randrange(-1, 4)) for _ in range(50)]
    golds, preds = zip(*items, strict=True)
    for average, ours in (("weighted", scoring.f1_weighted), ("macro", scoring.f1_macro)):
        assert ours(items) == pytest.approx(metrics.f1_score(golds, preds, average=average, zero_division=0))


def test_no_definition_reads_a_label_as_a_truth_value() -> None:
    """Bare yes, no, true and false are truth values in YAML."""
    for path in TASKS_DIR.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if line.startswith("doc_to_choice:"):
                assert re.fullmatch(r'doc_to_choice: \["\w+"(, "\w+")+\](  #.*)?', line), (path, line)


def test_the_package_is_complete_where_it_is_copied(tmp_path: Path, glue_folder: Path) -> None:
    """Definitions find their base files relative to themselves."""
    copied = shutil.copytree(TASKS_DIR, tmp_path / "elsewhere")
    manager = TaskManager(
        include_path=str(copied), include_defaults=False, metadata={"data": str(glue_folder)}
    )
    assert requests_of(manager.load("seqmmr_nli")["tasks"]["seqmmr_nli"])
