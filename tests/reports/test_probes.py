"""Tables of probes, and how calibrated scores are: recomputed by hand."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reports.figures import reliability_figure, to_svg, trade_off_figure, write_figures
from reports.load import load_run
from reports.probes import (
    KINDS,
    Bin,
    Calibration,
    calibration,
    calibration_table,
    confusion_table,
    probe_tables,
    probes_by_router,
    trade_off,
    trade_offs,
)
from reports.record import Record, Score
from reports.rows import Row


def case_row(kind: str, route: str | None, score: float | None = 0.0, **more: Any) -> dict[str, Any]:
    row = {"weights": "probes", "kind": f"probe:{kind}", "prompt": "p", "to_edited": KINDS[kind].to_edited}
    return row | ({} if route is None else {"route": route, "route_score": score}) | more


def texts(table: Any) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def routed(record: Callable[..., Record], shares: dict[str, tuple[float, int]], **fields: Any) -> Row:
    scores = tuple(
        Score(metric=f"route_{kind}", value=value, low=value, high=value, n=n, protocol="routing")
        for kind, (value, n) in shares.items()
    )
    made = replace(record("memit", "+R", **fields), slice="probes", scores=scores)
    return Row(
        editor=made.editor, cell=made.cell, router=made.router, top_k=made.top_k, encoder=made.encoder,
        records=(made,),
    )  # fmt: skip


# -- shares by kind -----------------------------------------------------------------------------------------


def test_a_row_per_router_and_a_table_per_place_to_go(record: Callable[..., Record]) -> None:
    topk = routed(record, {"rewrite": (1, 10), "chat": (0.9, 20), "text": (0.56, 5)}, router="topk", top_k=2)
    other = routed(
        record, {"rewrite": (0.97, 10), "text": (0, 5)}, router="subject", top_k=None, encoder=None
    )
    again = replace(topk, editor="alphaedit")
    edited, unedited = probe_tables([topk, again, other])
    assert edited.headers == ("Router", "Encoder", "Top-k", "Rewrite", "Chat")
    assert texts(edited) == [["topk", "minilm", "2", "100.0", "90.0"], ["subject", "–", "–", "97.0", "–"]]
    assert "more is better" in edited.title
    assert "Rewrite (10): the edit's own prompt." in edited.notes[0]
    assert unedited.headers[3:] == ("Plain text",)
    assert texts(unedited) == [["topk", "minilm", "2", "56.0"], ["subject", "–", "–", "0.0"]]
    assert "less is better" in unedited.title


def test_no_table_without_probes(record: Callable[..., Record]) -> None:
    assert probe_tables([Row(editor="memit", cell="+R", records=(record("memit", "+R", 0.5),))]) == []
    failed = replace(record("memit", "+R"), error="out of memory")
    assert probe_tables([Row(editor="memit", cell="+R", records=(failed,))]) == []


# -- confusion ----------------------------------------------------------------------------------------------


def test_confusion_counts_and_weighs_kinds_alike() -> None:
    rows = [case_row("rewrite", "edited")] * 3 + [case_row("rewrite", "unedited")]
    rows += [case_row("chat", "edited")] + [case_row("text", "unedited")] * 9 + [case_row("text", "edited")]
    rows += [{"kind": "rewrite", "route": "edited"}, case_row("task", None)]  # no probe; not routed
    table = confusion_table(rows, name="topk")
    assert table is not None
    assert texts(table) == [
        ["edited", "all kinds", "5", "4", "1", "87.5", "12.5"],  # (3/4 + 1) / 2
        ["edited", "Rewrite", "4", "3", "1", "75.0", "25.0"],
        ["edited", "Chat", "1", "1", "0", "100.0", "0.0"],
        ["unedited", "all kinds", "10", "1", "9", "10.0", "90.0"],
        ["unedited", "Plain text", "10", "1", "9", "10.0", "90.0"],
    ]
    assert table.groups == (3,)
    assert "Balanced accuracy of all kinds: 88.8 %" in table.notes[0]  # (87.5 + 90) / 2
    assert "topk" in table.title


def test_paraphrases_are_pooled_once() -> None:
    rows = [case_row("paraphrase", "unedited"), case_row("paraphrase_noisy", "unedited")]
    rows += [case_row("paraphrase", "edited"), case_row("paraphrase_clean", "edited")]
    table = confusion_table(rows)
    assert table is not None
    assert texts(table)[0] == ["edited", "all kinds", "2", "1", "1", "50.0", "50.0"]
    assert "Balanced" not in table.notes[0]
    found = calibration(rows)
    assert found is not None
    assert found.count == 2


def test_the_probes_of_a_run_as_each_router_decided_them(
    record: Callable[..., Record], write_run: Callable[..., Path]
) -> None:
    probed = {"slice": "probes", "value": 0.5}
    records = [
        record("memit", "+R", router="topk", **probed),
        record("memit", "+R", router="subject", top_k=None, **probed),
    ]
    folder = write_run(records, spec={"router": ["topk", "subject"], "top_k": [2]})
    routes, scores = {"2": "unedited", "subject": "edited"}, {"2": -1.0, "subject": 3.0}
    row = case_row("rewrite", "unedited", -1.0, routes=routes, route_scores=scores)
    with gzip.open(folder / "cases.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(each) + "\n" for each in (row, {"weights": "memit", "kind": "rewrite"}))
    found = probes_by_router(load_run(folder))
    assert {name: [(r["route"], r["route_score"]) for r in rows] for name, rows in found.items()} == {
        "topk, k = 2": [("unedited", -1.0)], "subject": [("edited", 3.0)],
    }  # fmt: skip
    assert probes_by_router(load_run(write_run([record(value=0.5)], "other"))) == {}


def test_nothing_routed_is_no_table() -> None:
    assert confusion_table([case_row("text", None), {"kind": "rewrite", "route": "edited"}]) is None
    assert calibration([case_row("text", None), case_row("text", "edited", None)]) is None


# -- calibration --------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    rows = [case_row("rewrite", "edited", 1000.0), case_row("text", "edited", math.log(3))]  # 1 and 0.75
    rows += [case_row("rewrite", "edited", math.log(3)), case_row("text", "unedited", -1000.0)]  # 0
    found = calibration(rows, bins=4)
    assert found is not None
    assert found.count == 4
    assert [one.count for one in found.bins] == [1, 3]
    assert found.bins[0] == Bin(predicted=0, observed=0, count=1)
    assert found.bins[1].predicted == pytest.approx(2.5 / 3)
    assert found.bins[1].observed == pytest.approx(2 / 3)
    assert found.error == pytest.approx(3 / 4 * 0.5 / 3)
    assert found.brier == pytest.approx((0 + 0.75**2 + 0.25**2 + 0) / 4)


@pytest.mark.parametrize("bins", [1, 7, 10])
def test_calibration_equals_the_literal_one(bins: int) -> None:
    draw = random.Random(bins)
    rows = [case_row(draw.choice(["chat", "text"]), "edited", draw.gauss(0, 3)) for _ in range(300)]
    found = calibration(rows, bins=bins)
    assert found is not None
    probabilities = [1 / (1 + math.exp(-row["route_score"])) for row in rows]
    labels = [row["to_edited"] for row in rows]
    error = 0.0
    for number in range(bins):
        inside = [i for i, p in enumerate(probabilities) if number / bins <= p < (number + 1) / bins]
        if inside:
            gap = sum(probabilities[i] for i in inside) - sum(labels[i] for i in inside)
            error += abs(gap) / len(rows)
    assert found.error == pytest.approx(error)
    assert found.brier == pytest.approx(
        sum((p - y) ** 2 for p, y in zip(probabilities, labels, strict=True)) / len(rows)
    )
    assert sum(one.count for one in found.bins) == len(rows)


def test_bins_are_checked() -> None:
    with pytest.raises(ValueError, match="bins is 0; it must be at least 1"):
        calibration([], bins=0)


# -- table and figure of it ---------------------------------------------------------------------------------

FOUND = {
    "topk": Calibration(
        bins=(Bin(predicted=0.1, observed=0.4, count=30), Bin(predicted=0.9, observed=0.5, count=70)),
        error=0.37, brier=0.3,
    ),
    "calibrated": Calibration(
        bins=tuple(Bin(predicted=i / 10 + 0.05, observed=i / 9, count=10) for i in range(10)),
        error=0.021, brier=0.05,
    ),
}  # fmt: skip


def test_the_table_of_errors() -> None:
    assert texts(calibration_table(FOUND)) == [
        ["topk", "100", "0.370", "0.300"], ["calibrated", "100", "0.021", "0.050"],
    ]  # fmt: skip


def test_the_figure_draws_what_was_binned(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = reliability_figure(FOUND)
    curves, counts = figure.draw().axes
    lines = {line.get_label(): np.asarray(line.get_xydata()).tolist() for line in curves.get_lines()}
    assert lines["topk"] == [[0.1, 0.4], [0.9, 0.5]]
    assert len(lines["calibrated"]) == 10
    shares = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in counts.get_lines()}
    assert shares["topk"] == [30, 70]
    assert "topk 0.370; calibrated 0.021" in figure.caption
    assert "100 probes" in figure.caption
    assert to_svg(figure) == to_svg(reliability_figure(FOUND))
    assert {path.suffix for path in write_figures([figure], tmp_path)} == {".svg", ".pdf", ".png"}


def test_a_figure_of_no_router_is_refused() -> None:
    with pytest.raises(ValueError, match="no router has scores"):
        reliability_figure({})


# -- trade-offs ---------------------------------------------------------------------------------------------


def test_a_trade_off_is_the_shares_at_every_threshold() -> None:
    chance = random.Random(0)
    rows = [
        case_row(kind, chance.choice(("edited", "unedited")), round(chance.gauss(shift, 1), 1))
        for kind, shift in (("neighborhood", -1), ("alias", 1), ("text", 0))
        for _ in range(40)
    ]
    found = trade_off(rows, "neighborhood", "alias")
    assert found is not None
    scores = {kind: [r["route_score"] for r in rows if r["kind"] == f"probe:{kind}"]
              for kind in ("neighborhood", "alias")}  # fmt: skip
    thresholds = sorted({s for own in scores.values() for s in own}, reverse=True)
    wanted = [
        tuple(sum(s >= at for s in scores[kind]) / 40 for kind in ("neighborhood", "alias"))
        for at in thresholds
    ]
    assert list(found.points) == [(0, 0), *wanted]
    sent = [r["route"] == "edited" for r in rows if r["kind"] == "probe:alias"]
    assert found.chosen[1] == sum(sent) / 40
    assert trade_off(rows, "neighborhood", "hop") is None


def test_the_figure_of_trade_offs_is_drawn(tmp_path: Path) -> None:
    rows = [case_row(kind, "edited", float(i)) for kind in ("neighborhood", "alias") for i in range(3)]
    found = trade_offs({"topk": rows, "subject": rows})
    assert found.keys() == {("neighborhood", "alias")}
    figure = trade_off_figure(found)
    assert {path.suffix for path in write_figures([figure], tmp_path)} == {".svg", ".pdf", ".png"}
    svg = to_svg(figure)
    assert "Alias sent to edited" in svg
    assert svg == to_svg(figure)
    with pytest.raises(ValueError, match="no router"):
        trade_off_figure({})
