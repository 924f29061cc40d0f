"""The halves of the records, pooled paired differences, and the page: on made-up records."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from benchmarks.tiny import HashedWords, tiny_model, tiny_records, tiny_texts, tiny_tokenizer
from harness.metrics import RESAMPLES
from harness.paths import read_lines
from harness.run import run_grid
from harness.spec import RunSpec, resolve
from reports.figures import write_figures
from routing import Decision
from studies import edits, mergers, probes
from studies import records as halves_of
from studies.__main__ import splice
from studies.edits import UNEDITED, Edited, Way
from studies.mergers import Outcomes, compare, merger_table
from studies.records import halves, related, write_halves

Row = dict[str, Any]
Wins = NDArray[np.bool_]


def record(case_id: int, relation: str, template: str, subject: str, *, original: bool) -> Row:
    rewrite = {
        "prompt": template, "subject": subject, "relation_id": relation,
        "target_new": {"str": "A"}, "target_true": {"str": "B"},
    }  # fmt: skip
    return {
        "case_id": case_id, "requested_rewrite": rewrite, "paraphrase_prompts": ["p"],
        "neighborhood_prompts": ["n"] * 10, "no_subject_relation_conflict": True,
        "source": "original" if original else "reconstructed",
    }  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 records of six relations, two of which share a template; some subjects are edited in several."""
    monkeypatch.setattr(halves_of, "EDITS", 20)
    monkeypatch.setattr(halves_of, "OTHERS", 30)
    chance = random.Random(0)
    rows = []
    for case_id in range(300):
        relation = f"P{case_id % 6}"
        template = (
            "{} shares" if relation in ("P0", "P1") and case_id // 6 % 4 == 0 else f"{{}} of {relation}"
        )
        subject = f"Subject {chance.randrange(150)}"
        rows.append(record(case_id, relation, template, subject, original=case_id < 60))
    folder = tmp_path / "data"
    folder.mkdir()
    for name, some in (("original_60", rows[:60]), ("reconstructed", rows)):
        lines = [json.dumps(row | ({"alternative_subject": "x"} if len(some) == 60 else {})) for row in some]
        (folder / f"counterfact_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_relations_that_share_a_template_stand_together() -> None:
    rows = [record(i, "P1", "{} is", "s", original=True) for i in range(3)]
    rows += [record(i, "P2", "{} is", "s", original=True) for i in range(3)]
    rows += [record(i, "P3", "{} is", "s", original=True) for i in range(2)]  # too few to count
    rows += [record(i, relation, "{} was", "s", original=True) for i in range(3) for relation in ("P2", "P4")]
    rows += [record(i, "P3", "{} will be", "s", original=True) for i in range(3)]
    assert sorted(map(sorted, related(rows))) == [["P1", "P2", "P4"], ["P3"]]


def test_halves_share_neither_subject_nor_relation(data: Path) -> None:
    choose, report = halves(str(data))
    parts = [
        {(r["requested_rewrite"]["relation_id"]) for r in choose},
        {(r["requested_rewrite"]["relation_id"]) for r in report},
    ]
    assert all(parts) and not parts[0] & parts[1]
    assert {"P0", "P1"} <= parts[0] or {"P0", "P1"} <= parts[1]
    subjects = [{r["requested_rewrite"]["subject"] for r in some} for some in (choose, report)]
    assert not subjects[0] & subjects[1]
    for some in (choose, report):
        assert len(some) >= 20
        edited, originals = some[:20], [r["case_id"] for r in some if r["source"] == "original"]
        assert {r["case_id"] for r in edited if r["source"] == "original"} >= set(originals[:20])
        assert all(r["alternative_subject"] == "x" for r in some if r["source"] == "original")


def test_orders_are_of_the_same_records_and_files_are_kept(data: Path, tmp_path: Path) -> None:
    paths = write_halves(str(data), tmp_path / "out")
    read = {name: [json.loads(line)["case_id"] for line in path.open()] for name, path in paths.items()}
    orders = [read[f"report-{n}"] for n in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders[1:]:
        assert sorted(order[:20]) == sorted(orders[0][:20])
        assert order[20:] == orders[0][20:]
    before = {path: path.read_bytes() for path in paths.values()}
    assert write_halves(str(data), tmp_path / "out") == paths
    assert {path: path.read_bytes() for path in paths.values()} == before


def outcome_rows(success: np.ndarray[Any, Any], case_ids: list[int], batches: list[int]) -> list[Row]:
    kinds = ("rewrite", "paraphrase", "neighborhood")
    return [
        {
            "case_id": case_id, "batch": batch, "kind": kind, "index": 0, "prompt": "p",
            "nll_new": float(wins == (kind == "neighborhood")),
            "nll_true": float(wins != (kind == "neighborhood")),
            "argmax_new": False, "argmax_true": False, "tokens_new": 1, "tokens_true": 1,
            "tokens_right_new": 0, "tokens_right_true": 0,
        }
        for case_id, batch, record_success in zip(case_ids, batches, success, strict=True)
        for kind, wins in zip(kinds, record_success, strict=True)
    ]  # fmt: skip


def score_of(success: np.ndarray[Any, Any]) -> float:
    rates = success.mean(axis=0)
    return 0.0 if (rates == 0).any() else float(3 / (1 / rates).sum())


def test_a_difference_is_paired_over_records_and_pooled_over_orders() -> None:
    draw = np.random.default_rng(0)
    runs, others = [], []
    ids = list(range(100))
    wins = {name: draw.random((2, 100, 3)) < rate for name, rate in (("own", 0.8), ("other", 0.6))}
    for order in range(2):
        places = draw.permutation(100)
        case_ids, batches = [ids[i] for i in places], [1 + i // 50 for i in range(100)]
        runs.append(outcome_rows(wins["own"][order][places], case_ids, batches))
        others.append(outcome_rows(wins["other"][order][places], case_ids, batches))
    found = compare(Outcomes.of(runs), Outcomes.of(others))
    own, other = wins["own"].reshape(-1, 3), wins["other"].reshape(-1, 3)
    assert found["Score"].value == pytest.approx(100 * score_of(own))
    assert found["Score"].difference == pytest.approx(100 * (score_of(own) - score_of(other)))
    assert found["locality"].value == pytest.approx(100 * own[:, 2].mean())
    drawn = np.random.default_rng(1).integers(0, 100, (RESAMPLES, 100))
    literal = [
        100
        * (score_of(wins["own"][:, some].reshape(-1, 3)) - score_of(wins["other"][:, some].reshape(-1, 3)))
        for some in drawn
    ]
    low, high = np.quantile(literal, (0.025, 0.975))
    assert found["Score"].low == pytest.approx(low, abs=1.5)
    assert found["Score"].high == pytest.approx(high, abs=1.5)
    same = compare(Outcomes.of(runs), Outcomes.of(runs))
    assert all((value.difference, value.low, value.high) == (0, 0, 0) for value in same.values())


class Asked:
    """Stands for edits whose outcomes are known."""

    def __init__(self, editor: str, rows: Mapping[str, Sequence[Row]]) -> None:
        self.editor, self.rows = editor, rows
        self.prompts = [row["prompt"] for row in next(iter(rows.values()))]

    def outcomes(self, way: Way) -> Sequence[Row]:
        return self.rows[str(way)]

    def abilities(self, way: Way, suite: Any) -> Sequence[Row]:
        return self.rows[str(way)]


def asked(ways: Sequence[Way], *, runs: int = 2) -> tuple[list[Any], dict[str, Wins]]:
    """Runs of 20 records in ten batches, and what they got right: (runs, records, kinds) of each way."""
    draw = np.random.default_rng(1)
    wins = {str(way): draw.random((runs, 20, 3)) < 0.7 for way in ways}
    ids, batches = list(range(20)), [1 + i // 2 for i in range(20)]
    return [
        Asked("memit", {way: outcome_rows(own[run], ids, batches) for way, own in wins.items()})
        for run in range(runs)
    ], wins


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_mergers_stand_beside_the_edited_and_the_shrunk_weights() -> None:
    runs, wins = asked(mergers.REPORTED)
    rows = cells_of(merger_table(runs, mergers.REPORTED, (mergers.BASE, mergers.SHRUNK)))
    assert [row[0] for row in rows] == [str(way) for way in mergers.REPORTED]
    scores = {name: 100 * score_of(own.reshape(-1, 3)) for name, own in wins.items()}
    for name, efficacy, _, _, score, to_base, to_shrunk, worst, last in rows:
        assert efficacy == f"{100 * wins[name].reshape(-1, 3)[:, 0].mean():.1f}"
        assert score == f"{scores[name]:.1f}"
        by_batch = [
            100 * (score_of(wins[name][:, 2 * b : 2 * b + 2].reshape(-1, 3))
                   - score_of(wins["none"][:, 2 * b : 2 * b + 2].reshape(-1, 3)))
            for b in range(10)
        ]  # fmt: skip
        if name == "none":
            assert to_base == worst == last == ""
        else:
            assert to_base.startswith(f"{scores[name] - scores['none']:+.1f} [")
            assert worst == f"{min(by_batch):+.1f}"
            assert last.startswith(f"{by_batch[-1]:+.1f} [")
        shrunk = f"{scores[name] - scores[str(mergers.SHRUNK)]:+.1f} ["
        assert to_shrunk.startswith(shrunk) if name != str(mergers.SHRUNK) else to_shrunk == ""


def test_a_routed_prompt_is_answered_by_the_weights_that_it_is_sent_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs, wins = asked([*mergers.REPORTED, Way(UNEDITED)])
    draw = np.random.default_rng(2)
    sent = {(router, run): draw.random((20, 3)) < 0.5 for router in mergers.ROUTERS for run in range(2)}

    def decided(router: str, settings: Any, path: Path, texts: Sequence[str], embed: Any) -> list[Decision]:
        goes = sent[router, int(path.name)].ravel().tolist()
        assert len(texts) == len(goes)
        return [Decision(expert="edited" if go else None, score=0.0, nearest=()) for go in goes]

    monkeypatch.setattr(mergers, "decisions", decided)
    rows = cells_of(mergers.routed_table(runs, [tmp_path / "0", tmp_path / "1"], HashedWords()))
    edited_kinds = np.array([True, True, False])
    for way, router, efficacy, generalization, locality, score, _ in rows:
        goes = np.stack([
            np.full((20, 3), True) if router == "all edited"
            else np.broadcast_to(edited_kinds, (20, 3)) if router == mergers.ORACLE
            else sent[router, run]
            for run in range(2)
        ])  # fmt: skip
        found = np.where(goes, wins[way], wins[UNEDITED]).reshape(-1, 3)
        assert [efficacy, generalization, locality] == [f"{100 * rate:.1f}" for rate in found.mean(axis=0)]
        assert score == f"{100 * score_of(found):.1f}"
    assert len(rows) == 3 * (2 + len(mergers.ROUTERS))


def test_general_tasks_are_weighed_alike() -> None:
    suite = SimpleNamespace(names=("seqmmr_sst", "seqmmr_cola"))
    draw = np.random.default_rng(3)

    def rows(right: float) -> list[Row]:
        found = []
        for name in suite.names:
            for gold, hit in zip(draw.integers(0, 2, 40), draw.random(40) < right, strict=True):
                pred = int(gold if hit else 1 - gold)
                logprobs = [0.0 if choice == pred else -1.0 for choice in range(2)]
                found.append({
                    "kind": f"task:{name}", "gold": int(gold), "pred": pred, "choice_logprobs": logprobs,
                    "pred_generated": None, "prompt": "p",
                })  # fmt: skip
        return found

    known = [{"unedited": rows(0.9), "none": rows(0.6), "refit": rows(0.8)} for _ in range(2)]
    known[1]["unedited"] = known[0]["unedited"]
    runs: Any = [Asked("memit", ways) for ways in known]
    table = cells_of(mergers.task_table(runs, suite))  # type: ignore[arg-type]

    answers = {
        (run, name, task): np.array(
            [(row["gold"], row["pred"]) for row in ways[name] if row["kind"] == f"task:{task}"]
        ).T
        for run, ways in enumerate(known)
        for name in ways
        for task in suite.names
    }

    for row, name in zip(table, known[0], strict=True):
        own = [
            50 * sum(f1_score(*answers[run, name, task], average="weighted") for run in range(2))
            for task in suite.names
        ]
        assert row[:4] == [name, *(f"{value:.1f}" for value in (*own, np.mean(own)))]
    literal = []
    for _ in range(1000):
        for task in suite.names:
            drawn = draw.integers(0, 40, 40)
            literal += [
                sign * weighted_f1(answers[run, name, task][:, drawn])
                for run in range(2)
                for name, sign in (("refit", 1), ("none", -1))
            ]
    spread = 100 * np.reshape(literal, (1000, 8)).sum(axis=1) / 4
    to_unedited, to_none = (list(map(float, re.findall(r"[+-][0-9.]+", cell))) for cell in table[2][4:])
    difference, low, high = to_none
    assert difference == pytest.approx(float(table[2][3]) - float(table[1][3]), abs=0.11)
    assert to_unedited[0] == pytest.approx(float(table[2][3]) - float(table[0][3]), abs=0.11)
    assert (low, high) == pytest.approx(tuple(np.quantile(spread, (0.025, 0.975))), abs=1.5)
    assert [len(list(filter(None, row[4:]))) for row in table] == [0, 1, 2]


def weighted_f1(answers: np.ndarray[Any, Any]) -> float:
    """By its definition, of two classes; answers: (2, n), gold and predicted."""
    gold, pred = answers == 1
    total = 0.0
    for truth, said in ((gold, pred), (~gold, ~pred)):
        total += truth.mean() * 2 * (truth & said).sum() / max(truth.sum() + said.sum(), 1)
    return total


def test_batches_are_drawn_by_merger(tmp_path: Path) -> None:
    runs, _ = asked(mergers.REPORTED)
    figure = mergers.merger_figure({"memit": runs, "alphaedit": runs})
    assert "The vertical axis runs from " in figure.caption
    assert {path.name for path in write_figures([figure], tmp_path)} == {
        f"mergers.{kind}" for kind in ("svg", "pdf", "png")
    }


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, records and a corpus; six edits of it in three batches."""
    monkeypatch.setenv("SEQMMR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(edits, "EDITS", 6)
    monkeypatch.setattr(edits, "BATCHES", 3)
    monkeypatch.setattr(edits, "EVERY", 2)
    monkeypatch.setattr(edits, "NEIGHBORS", 2)
    tiny_model("gpt2").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "tiny")
    for name, rows in (
        ("records.jsonl", tiny_records(20)),
        ("wiki_paragraphs.jsonl", [{"text": text} for text in tiny_texts(60)]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_probes_of_the_halves_share_no_general_task_and_no_text(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [SimpleNamespace(task=f"t{i % 2}", prompt=f"prompt {i}") for i in range(10)]
    monkeypatch.setattr(probes, "load_suite", lambda *_: SimpleNamespace(names=("t0", "t1"), items=items))
    for name, value in (("EDITS", 6), ("TASKS", 2), ("TEXTS", 5)):
        monkeypatch.setattr(probes, name, value)
    found = []
    for half in range(2):
        records = small / f"half-{half}.jsonl"
        records.write_text((small / "records.jsonl").read_text())
        asked = probes.probes_of(records, str(small), half=half)
        assert asked == probes.probes_of(records, str(small), half=half)  # from the file
        found.append(
            {kind: {p.prompt for p in asked if p.kind == kind} for kind in ("rewrite", "task", "text")}
        )
    first, second = found
    assert first["rewrite"] == second["rewrite"]
    assert first["task"] == {"prompt 0", "prompt 2", "prompt 1", "prompt 3"}
    assert second["task"] == {"prompt 4", "prompt 6", "prompt 5", "prompt 7"}
    assert not first["text"] & second["text"]
    assert all(len(one["text"]) == 5 for one in found)


SETTINGS = ("memit.layers=1,2", "memit.steps=4", "memit.covariance_weight=1", "memit.clamp_norm_factor=4")


def test_edits_are_made_once_and_asked_as_a_run_asks_them(small: Path) -> None:
    """Against the grid, which goes on from the same folder, scores every prompt, and merges by itself."""
    out, records, model = small / "run", small / "records.jsonl", str(small / "tiny")
    given: dict[str, Any] = {"order": 1, "model": model, "overrides": SETTINGS}
    edits.make_edits(records, "memit", str(small), out, **given)
    made = {path: path.stat().st_mtime_ns for path in (out / "deltas").rglob("*.safetensors")}
    assert len(made) == 3
    assert not list(out.glob("records.jsonl"))
    ways = [
        mergers.BASE,
        Way(UNEDITED),
        Way.of("shrink", scale=0.5),
        mergers.PAPER,
        Way.of("refit", ridge=10, forgotten=0),
    ]
    edited = Edited(out, small / "work")
    answers = {way: edited.outcomes(way) for way in ways}
    again = Edited(out, small / "work")
    assert [again.outcomes(way) for way in ways] == list(answers.values())
    assert "_loaded" not in vars(again)  # it is all on disk

    spec = RunSpec.from_json(json.loads((out / "run.json").read_text())["spec"])
    assert (spec.seed, spec.edits, spec.cells) == (1, 6, ("baseline",))
    assert run_grid(spec, out=out, data=str(small)) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    names = ("model", "dataset", "select", "editors", "device", "seed", "stats", "limit_stats")
    plain = {name: getattr(spec, name) for name in (*names, "batch_size", "num_batches")}
    grid = plain | {"cells": ("baseline", "+MM"), "merger": ("self-aware", "shrink", "refit")}
    merged = small / "merged"
    flags = [*SETTINGS, "shrink.scale=0.5", "refit.ridge=10", "refit.forgotten=0"]
    assert run_grid(resolve(grid, flags), out=merged, data=str(small)) == 0
    weights = ("memit", "unedited", "memit+MM@shrink", "memit+MM", "memit+MM@refit")
    for way, name in zip(ways, weights, strict=True):
        whole = {
            (row["case_id"], row["kind"], row["index"]): row
            for row in read_lines(merged / "cases.jsonl.gz")
            if row["weights"] == name
        }
        assert 0 < len(answers[way]) < len(whole)
        assert {row["case_id"] for row in answers[way]} == {
            case.case_id for batch in edited.batches for case in batch[::2]
        }
        for row in answers[way]:
            other = whole[row["case_id"], row["kind"], row["index"]]
            assert row["prompt"] == other["prompt"]
            assert row["nll_new"] == pytest.approx(other["nll_new"], rel=1e-4)
            assert row["nll_true"] == pytest.approx(other["nll_true"], rel=1e-4)
    unlike = [[row["nll_new"] for row in rows] for rows in answers.values()]
    assert all(a != b for i, a in enumerate(unlike) for b in unlike[:i])


def test_ways_are_written_as_they_are_read() -> None:
    for text in ("none", "unedited", "refit", "refit:ridge=500,scale=0.9", "refit:anchor=base"):
        assert str(Way.parse(text)) == text
    with pytest.raises(ValueError, match="unknown merger 'slerp'; known: unedited, none, self-aware"):
        Way.parse("slerp")


def test_the_page_is_changed_between_its_marks_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold \\1\n<!-- end of a -->\nafter\n")
    for _ in range(2):
        splice(page, "a", "new \\g<0>")
    assert page.read_text() == "before\n<!-- a -->\n\nnew \\g<0>\n\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="no marks of 'b'"):
        splice(page, "b", "x")
