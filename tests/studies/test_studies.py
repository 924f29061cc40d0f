"""The halves of the records, pooled paired differences, and the page: on made-up records."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.metrics import RESAMPLES
from harness.paths import write_lines_gz
from harness.spec import RunSpec
from studies import mergers
from studies import records as halves_of
from studies.__main__ import splice
from studies.mergers import Outcomes, compare
from studies.records import halves, related, write_halves

Row = dict[str, Any]


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


def test_mergers_are_reported_beside_the_edited_and_the_shrunk_weights(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    names = {
        "baseline": "memit", "self-aware": "memit+MM",
        **{merger: f"memit+MM@{merger}" for merger in mergers.REPORTED if merger != "self-aware"},
    }  # fmt: skip
    wins = {name: draw.random((2, 20, 3)) < 0.7 for name in names}
    for order in range(2):
        ids, batches = list(range(20)), [1 + i // 2 for i in range(20)]
        rows = [
            row | {"weights": weights}
            for name, weights in names.items()
            for row in outcome_rows(wins[name][order], ids, batches)
        ]
        write_lines_gz(tmp_path / str(order) / "cases.jsonl.gz", rows)
    lines = mergers._report([tmp_path / "0", tmp_path / "1"], "memit").splitlines()[2:]
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines}
    assert cells.keys() == names.keys()
    scores = {name: 100 * score_of(own.reshape(-1, 3)) for name, own in wins.items()}
    for name, (efficacy, *_, score, beside, worst) in cells.items():
        assert efficacy == f"{100 * wins[name].reshape(-1, 3)[:, 0].mean():.1f}"
        assert score.startswith(f"{scores[name]:.1f} ({scores[name] - scores['baseline']:+.1f} [")
        assert beside.startswith(f"{scores[name] - scores['shrink']:+.1f} [")
        by_batch = [
            100 * (score_of(wins[name][:, 2 * b : 2 * b + 2].reshape(-1, 3))
                   - score_of(wins["baseline"][:, 2 * b : 2 * b + 2].reshape(-1, 3)))
            for b in range(10)
        ]  # fmt: skip
        assert worst == f"{min(by_batch):+.1f}"


def test_runs_of_the_halves_are_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki_paragraphs.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "records.jsonl").touch()
    made: dict[str, RunSpec] = {}

    def grid(spec: RunSpec, *, out: Path, data: str) -> int:
        made[out.name] = spec
        return int(out.name == "report-2")

    monkeypatch.setattr(mergers, "run_grid", grid)
    for name in ("choose", "report-0", "report-1"):
        mergers._run(name, tmp_path / "records.jsonl", str(tmp_path), tmp_path / name, "cpu")
    assert made["choose"].cells == ("baseline",)
    assert [made[name].seed for name in made] == [0, 0, 1]
    assert made["report-0"].merger == mergers.REPORTED
    assert made["report-0"].settings["shrink"] == mergers.CHOSEN["shrink"]
    assert made["report-0"].capability and not made["report-1"].capability
    assert {spec.edits for spec in made.values()} == {1000}
    with pytest.raises(ValueError, match="report-2: cells of the run failed"):
        mergers._run("report-2", tmp_path / "records.jsonl", str(tmp_path), tmp_path / "report-2", "cpu")


def test_the_page_is_changed_between_its_marks_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold \\1\n<!-- end of a -->\nafter\n")
    for _ in range(2):
        splice(page, "a", "new \\g<0>")
    assert page.read_text() == "before\n<!-- a -->\n\nnew \\g<0>\n\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="no marks of 'b'"):
        splice(page, "b", "x")
