"""Figures: what is drawn is what the records say, in files that are the same each time."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from reports import figures
from reports.figures import Figure, figures_of, to_svg, write_figures
from reports.load import Run, load_run
from reports.record import Record, Score

matplotlib = pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
CELLS = ("baseline", "+MM", "+R", "+MM+R")
SIX = tuple(f"seqmmr_{name}" for name in ("sst", "mmlu", "mrpc", "cola", "rte", "nli"))
KNOWEDIT = ("rewrite_acc", "rephrase_acc", "portability_reasoning", "relation_specificity")
COUNTERFACT = ("score", "efficacy", "generalization", "locality")


def value_of(cell: str, batch: int, after: int, metric: str, ratio: float | None = None) -> float:
    """A value of its own for every record; batch 0 is all of them pooled."""
    number = (len(cell) * 7 + batch * 13 + after * 17 + len(metric) * 5 + round((ratio or 0) * 40)) % 40
    return 0.45 + number / 100


@pytest.fixture
def grid(record: Callable[..., Record], score: Callable[..., Score], tmp_path: Path) -> Callable[..., Run]:
    """`grid(batches=3, size=10, editors=..., cells=..., ...)`: a run whose values are those of `value_of`."""

    def build(
        batches: int = 3,
        *,
        size: int = 10,
        editors: Iterable[str] = ("memit",),
        cells: Iterable[str] = CELLS,
        ratios: Iterable[float] = (0.85,),
        top_k: Iterable[int] = (2,),
        every: bool = False,
        metrics: Iterable[str] = COUNTERFACT,
        tasks: Iterable[str] = (),
        task_metrics: Iterable[str] = ("f1_weighted",),
        errors: dict[Any, str] | None = None,
        name: str = "run",
    ) -> Run:
        def written(editor: str, cell: str, ratio: float | None, k: int | None) -> Iterator[Record]:
            fields = {"pruning_ratio": ratio, "top_k": k}
            error = (errors or {}).get((editor, cell), (errors or {}).get((editor, cell, ratio)))
            if error is not None:
                yield record(editor, cell, error=error, **fields)
                return
            edited = cell != "unedited"
            for after in range(1, batches + 1) if every and edited else (batches,):
                for batch in range(after + 1):
                    yield record(
                        editor,
                        cell,
                        slice=f"batch:{batch}" if batch else "overall",
                        edits_applied=after * size if edited else 0,
                        scores=tuple(score(m, value_of(cell, batch, after, m, ratio)) for m in metrics),
                        **fields,
                    )
            for number, task in enumerate(tasks):
                values = [score(m, value_of(cell, number, 0, m)) for m in task_metrics]
                yield record(editor, cell, slice=f"task:{task}", scores=tuple(values), **fields)

        records = [*written("none", "unedited", None, None)]
        for editor in editors:
            for cell in cells:
                for ratio in ratios if "MM" in cell else (None,):
                    for k in top_k if cell.endswith("R") else (None,):
                        records += written(editor, cell, ratio, k)
        spec = {"editors": [*editors], "cells": [*cells], "batch_size": size, "num_batches": batches}
        spec |= {"pruning_ratio": [*ratios], "top_k": [*top_k]}
        return load_run(write(tmp_path / name, records, spec))

    return build


def write(folder: Path, records: Iterable[Record], spec: dict[str, Any]) -> Path:
    import json

    folder.mkdir()
    lines = (json.dumps(record.to_json()) + "\n" for record in records)
    (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"status": "complete", "spec": spec}), encoding="utf-8")
    return folder


def named(run: Run, name: str) -> Figure:
    return next(figure for figure in figures_of(run) if figure.name == name)


def names(run: Run) -> list[str]:
    return [figure.name for figure in figures_of(run)]


def lines(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.get_lines()}


def percents(values: Iterable[float]) -> Any:
    return pytest.approx([100 * value for value in values])


# Which figures


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, ["batches-memit"]),
        ({"batches": 1}, []),
        ({"batches": 1, "every": True, "ratios": (0.85, 0.9)}, []),
        ({"batches": 1, "tasks": SIX}, ["ability"]),
        ({"tasks": SIX[:1], "task_metrics": ("f1_weighted", "f1_generated")},
         ["ability", "ability-generated", "batches-memit"]),
        ({"ratios": (0.85, 0.9)}, ["ratios-memit", "batches-memit"]),
        ({"ratios": (0.85, 0.9), "cells": ("baseline", "+R")}, ["batches-memit"]),
        ({"every": True}, ["batches-memit", "forgetting-memit", "retention-memit", "progress-memit"]),
        ({"every": True, "metrics": KNOWEDIT, "batches": 2},
         ["batches-memit", "forgetting-memit", "retention-memit", "progress-memit"]),
        ({"editors": ("memit", "memit+blue", "memit-blue", "é%")},
         ["batches-memit", "batches-memit-blue", "batches-memit-blue-2", "batches-editor"]),
        ({"every": True, "cells": ("baseline",), "errors": {("memit", "baseline"): "RuntimeError: x"}}, []),
        ({"metrics": ("fluency",)}, []),
        ({"editors": (), "tasks": SIX}, []),
    ],
)  # fmt: skip
def test_which_figures_a_run_has(grid, setting, expected):
    assert names(grid(**setting)) == expected


def test_thirteen_editors_stand_in_one_figure_of_general_ability(grid):
    editors = [f"editor{number}" for number in range(13)]
    run = grid(2, editors=editors, tasks=SIX)
    assert names(run) == ["ability", *(f"batches-{editor}" for editor in editors)]
    drawn = named(run, "ability").draw()
    assert [axes.get_title(loc="left") for axes in drawn.axes] == editors
    assert drawn.get_figwidth() == 7 and drawn.get_figheight() < 9


def test_nothing_but_drawing_needs_matplotlib(grid):
    run = grid(every=True, ratios=(0.85, 0.9), tasks=SIX)
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from reports.figures import figures_of\n"
        "from reports.load import load_run\n"
        "print(*(figure.name for figure in figures_of(load_run(Path(sys.argv[1])))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, run.path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == names(run)


def test_whether_matplotlib_is_there(monkeypatch):
    assert figures.available()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    assert not figures.available()
    assert "matplotlib" in figures.MISSING_NOTE and "\n" not in figures.MISSING_NOTE


# What is drawn


def test_a_line_per_cell_with_its_interval_and_the_pooled_value(grid):
    run = grid(3)
    (axes,) = named(run, "batches-memit").draw().axes
    drawn = lines(axes)
    for cell in CELLS:
        assert drawn[cell] == percents(
            value_of(cell, b, 3, "score", 0.85 if "MM" in cell else None) for b in (1, 2, 3)
        )
        pooled = value_of(cell, 0, 3, "score", 0.85 if "MM" in cell else None)
        assert drawn[f"_{cell}, all"] == percents([pooled])
    lows = {round(float(y), 6) for band in axes.collections for y in band.get_paths()[0].vertices[:, 1]}
    assert round(100 * (value_of("+R", 2, 3, "score") - 0.04), 6) in lows
    assert [label.get_text() for label in axes.get_xticklabels()] == ["@1", "@2", "@3", "all"]


def test_a_line_per_pruning_ratio_of_the_first_top_k(grid):
    figure = named(grid(4, ratios=(0.95, 0.5, 0.7), top_k=(5, 2)), "ratios-memit")
    drawn = figure.draw()
    (axes,) = drawn.axes
    own = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in own] == ["0.5", "0.7", "0.95"]
    for line in own:
        ratio = float(line.get_label())
        expected = percents(value_of("+MM+R", b, 4, "score", ratio) for b in (1, 2, 3, 4))
        assert [float(y) for y in line.get_ydata()] == expected
    assert "top-k 5" in figure.caption and "top-k 2" not in figure.caption


def test_other_figures_show_the_first_ratio_of_the_spec(grid):
    figure = named(grid(2, ratios=(0.95, 0.5)), "batches-memit")
    (axes,) = figure.draw().axes
    assert lines(axes)["+MM"] == percents(value_of("+MM", b, 2, "score", 0.95) for b in (1, 2))
    assert "pruning ratio 0.95" in figure.caption


@pytest.mark.parametrize("metrics", [COUNTERFACT, KNOWEDIT])
def test_the_forgetting_matrix(grid, metrics):
    drawn = named(grid(4, every=True, metrics=metrics), "forgetting-memit").draw()
    panels = drawn.axes[:4]
    assert [axes.get_title(loc="left") for axes in panels] == [f"MEMIT {cell}" for cell in CELLS]
    scales = set()
    for cell, axes in zip(CELLS, panels, strict=True):
        (mesh,) = axes.collections
        array = mesh.get_array()
        assert array.shape == (4, 4)
        for batch in range(1, 5):
            for after in range(1, 5):
                at = (batch - 1, after - 1)
                assert bool(array.mask[at]) == (after < batch)
                if after >= batch:
                    value = 100 * value_of(cell, batch, after, metrics[0], 0.85 if "MM" in cell else None)
                    assert array[at] == pytest.approx(value)
                    (text,) = [t for t in axes.texts if t.get_position() == (after, batch)]
                    assert text.get_text() == f"{value:.0f}"
                    assert contrast(text.get_color(), mesh.cmap(mesh.norm(value))) > 4.5
        assert len(axes.texts) == 10
        scales.add(mesh.get_clim())
    assert len(scales) == 1


def contrast(one: Any, other: Any) -> float:
    """WCAG 2."""
    from matplotlib.colors import to_rgb

    def luminance(colour: Any) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("metrics", "titles"),
    [
        (COUNTERFACT, ["Score", "Efficacy", "Generalization", "Locality"]),
        (KNOWEDIT, ["Rewrite", "Rephrase", "Reasoning", "Relation specificity"]),
    ],
)
def test_retention_is_the_mean_over_the_batches_at_each_distance(grid, metrics, titles):
    figure = named(grid(3, every=True, metrics=metrics), "retention-memit")
    drawn = figure.draw()
    assert [axes.get_title(loc="left") for axes in drawn.axes] == titles
    for metric, axes in zip(metrics, drawn.axes, strict=True):
        assert not [band for band in axes.collections if len(band.get_paths())]
        for cell in CELLS:
            ratio = 0.85 if "MM" in cell else None
            at = {(b, t): value_of(cell, b, t, metric, ratio) for t in (1, 2, 3) for b in range(1, t + 1)}
            expected = [
                (at[1, 1] + at[2, 2] + at[3, 3]) / 3,
                (at[1, 2] + at[2, 3]) / 2,
                at[1, 3],
            ]
            assert lines(axes)[cell] == percents(expected)
    assert "3 of them at 0 and one fewer at each step" in figure.caption


def test_the_pooled_score_after_each_batch(grid):
    (axes,) = named(grid(3, size=200, every=True), "progress-memit").draw().axes
    assert lines(axes)["+R"] == percents(value_of("+R", 0, t, "score") for t in (1, 2, 3))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["200", "400", "600"]


def test_general_ability_shows_the_unedited_model_the_baseline_and_the_whole_method(grid):
    figure = named(grid(1, editors=("memit", "alphaedit"), tasks=SIX), "ability")
    drawn = figure.draw()
    assert [axes.get_title(loc="left") for axes in drawn.axes] == ["MEMIT", "AlphaEdit"]
    for axes in drawn.axes:
        dots = {line.get_label(): [float(x) for x in line.get_xdata()] for line in axes.get_lines()}
        assert list(dots) == ["baseline", "+MM+R"]
        for cell, values in dots.items():
            assert values == percents(value_of(cell, n, 0, "f1_weighted") for n in range(6))
        (unedited,) = [c for c in axes.collections if c.get_label() == "unedited"]
        expected = [value_of("unedited", n, 0, "f1_weighted") for n in range(6)]
        assert [segment[0][0] for segment in unedited.get_segments()] == percents(expected)
        assert [bar.get_x() for bar in axes.patches] == percents(value - 0.04 for value in expected)
        assert axes.get_xlim() == (0, 100)
    tasks = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert tasks == ["SST", "MMLU", "MRPC", "CoLA", "RTE", "NLI"]
    assert drawn.axes[0].get_ylim()[0] > drawn.axes[0].get_ylim()[1]  # the first task on top
    for words in ("weighted F1", "100 records a task", "95 %", "smollm2-135m", "facts", "10 edits"):
        assert words.lower() in figure.caption.lower()


def test_other_cells_stand_in_for_a_missing_one(grid):
    (axes,) = named(grid(1, cells=("baseline", "+MM", "+R"), tasks=SIX[:1]), "ability").draw().axes
    assert list(lines(axes)) == ["baseline", "+MM", "+R"]


def test_what_failed_says_so_and_what_does_not_apply_is_named(grid):
    errors = {
        ("memit", "+MM"): "RuntimeError: out of memory",
        ("prune", "+MM"): "not applicable",
        ("prune", "+MM+R"): "not applicable",
    }
    run = grid(2, every=True, editors=("memit", "prune"), errors=errors, tasks=SIX[:2])
    failed, other = named(run, "batches-memit"), named(run, "batches-prune")
    assert (
        "Failed: MEMIT +MM." in failed.caption and "Not applicable: PRUNE +MM, PRUNE +MM+R." in other.caption
    )
    (axes,), legend = failed.draw().axes, texts(failed.draw().legends[0])
    assert "+MM" not in lines(axes) and "+MM+R" in lines(axes) and "+MM: failed" in legend
    assert texts(other.draw().legends[0]) == ["baseline", "+R"]
    matrices = named(run, "forgetting-memit").draw().axes
    assert [text.get_text() for text in matrices[1].texts] == ["failed"] and not matrices[1].collections


def test_a_failed_cell_of_general_ability_says_so_at_each_task(grid):
    run = grid(1, errors={("memit", "baseline"): "RuntimeError: out of memory"}, tasks=SIX[:2])
    figure = named(run, "ability")
    (axes,) = figure.draw().axes
    assert [text.get_text() for text in axes.texts] == ["failed", "failed"]
    assert all(map(math.isnan, lines_x(axes)["baseline"])) and "Failed: MEMIT baseline." in figure.caption


def lines_x(axes: Any) -> dict[str, list[float]]:
    return {line.get_label(): [float(x) for x in line.get_xdata()] for line in axes.get_lines()}


def texts(artist: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in artist.findobj(Text) if text.get_text()]


def test_an_announced_cell_that_nobody_scored_is_a_dash(grid, record, tmp_path):
    run = grid(2, cells=("baseline",))
    spec = run.spec | {"cells": ["baseline", "+R"]}
    figure = named(load_run(write(tmp_path / "other", run.records, spec)), "batches-memit")
    assert texts(figure.draw().legends[0]) == ["baseline", "+R: –"]
    assert "Not scored: MEMIT +R." in figure.caption


def test_the_caption_states_the_range_of_the_axis(grid):
    run = grid(5, every=True, ratios=(0.5, 0.9))
    for figure in figures_of(run):
        if found := re.search(r"vertical axis runs from (\d+) to (\d+)", figure.caption):
            low, high = map(int, found.groups())
            assert high - low >= 40
            for axes in figure.draw().axes:
                assert (min(axes.get_yticks()), max(axes.get_yticks())) == (low, high)
                bottom, top = axes.get_ylim()
                assert low - 3 < bottom < low and high < top < high + 3
        else:
            assert figure.name.startswith("forgetting") and "Colours run from" in figure.caption


@pytest.mark.parametrize(
    "setting",
    [
        {"batches": 10, "size": 200, "every": True, "ratios": (0.5, 0.7, 0.85, 0.9, 0.95), "tasks": SIX},
        {"batches": 30, "every": True, "cells": ("baseline", "+MM", "+R")},
        {"batches": 5, "every": True, "errors": {("memit", "+MM"): "x", ("memit", "+MM+R"): "x"}},
        {"batches": 2, "every": True, "metrics": KNOWEDIT, "cells": ("baseline",)},
        {"batches": 1, "editors": tuple("abcdefghijklm"), "tasks": (*SIX, "seqmmr_rte_legacy")},
    ],
)
def test_no_text_lies_over_another_or_outside(grid, setting):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for figure in figures_of(grid(**setting)):
        drawn = figure.draw()
        renderer = FigureCanvasAgg(drawn).get_renderer()
        drawn.draw_without_rendering()
        shown = [text for text in drawn.findobj(Text) if text.get_visible() and text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
        for text, box in boxes:
            inside = box.x0 > -1 and box.y0 > -1
            assert inside and box.x1 < drawn.bbox.x1 + 1 and box.y1 < drawn.bbox.y1 + 1, (figure.name, text)
        for (text, one), (other, two) in combinations(boxes, 2):
            beside = one.x1 < two.x0 + 1 or two.x1 < one.x0 + 1
            above = one.y1 < two.y0 + 1 or two.y1 < one.y0 + 1
            assert beside or above, (figure.name, text, other)


# Files


def test_files_are_the_same_each_time(grid, tmp_path):
    run = grid(2, every=True, tasks=SIX[:2], cells=("baseline", "+MM+R"))
    some = ("ability", "forgetting-memit")  # dots and lines, squares and a colour bar
    first = write_figures([named(run, name) for name in some], tmp_path / "a" / "figures")
    assert [path.name for path in first] == [
        f"{name}.{kind}" for name in some for kind in ("svg", "pdf", "png")
    ]
    assert sorted(first) == sorted((tmp_path / "a" / "figures").iterdir())
    script = (
        "import sys; from pathlib import Path\n"
        "from reports.figures import figures_of, write_figures\n"
        "from reports.load import load_run\n"
        "some = [f for f in figures_of(load_run(Path(sys.argv[1]))) if f.name in sys.argv[3:]]\n"
        "write_figures(some, Path(sys.argv[2]))\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "0"}
    command = [sys.executable, "-c", script, run.path, tmp_path / "b", *some]
    subprocess.run(command, cwd=ROOT, check=True, env=environment)
    for path in first:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
        assert b"CreationDate" not in path.read_bytes() and b"dc:date" not in path.read_bytes()


def test_the_users_settings_change_nothing_and_stay(grid):
    figure = named(grid(2, every=True), "forgetting-memit")
    plain = to_svg(figure)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert to_svg(figure) == plain
        assert dict(matplotlib.rcParams) == before


def test_inline_svgs_share_no_id(grid):
    one, other = grid(2, every=True), grid(2, every=True, cells=("baseline", "+MM"), name="other")
    drawn = [to_svg(figure) for run in (one, other) for figure in figures_of(run)]
    assert len(drawn) == 8
    ids = [re.findall(r'\sid="([^"]*)"', svg) for svg in drawn]
    assert all(ids) and len({name for own in ids for name in own}) == sum(map(len, ids))
    for svg, own in zip(drawn, ids, strict=True):
        used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg)
        assert used and {one or other for one, other in used} <= set(own)


def test_an_inline_svg_is_an_element_with_searchable_text_and_no_style_for_the_page(grid):
    figure = named(grid(2, tasks=("seqmmr_sst", "a<b & $c$")), "ability")
    svg = to_svg(figure)
    assert svg == to_svg(figure) and svg.startswith("<svg ") and svg.rstrip().endswith("</svg>")
    root = ElementTree.fromstring(svg)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not tags & {"style", "metadata", "image", "script"}
    said = [element.text for element in root.iter() if element.tag.endswith(("text", "title"))]
    assert {figure.title, "MEMIT", "SST", "a<b & $c$", "baseline"} <= set(said)


def test_a_failed_write_leaves_nothing_half_written(grid, tmp_path):
    def broken() -> Any:
        drawn = figure.draw()
        drawn.axes[0].draw = lambda renderer: 1 / 0
        return drawn

    figure = named(grid(2), "batches-memit")
    with pytest.raises(ZeroDivisionError):
        write_figures([Figure(name="x", title="x", caption="", draw=broken)], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_markers_and_colours_tell_the_cells_apart(grid):
    (axes,) = named(grid(2), "batches-memit").draw().axes
    own = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    assert len({line.get_color() for line in own}) == len({line.get_marker() for line in own}) == 4
    assert all(contrast(one.get_color(), other.get_color()) != 1 for one, other in pairwise(own))
