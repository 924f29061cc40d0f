"""The regression grid on a tiny GPT-2: it passes as committed, and fails where the method is broken."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import regression
from harness.regression import REFERENCES, TINY, Figure, differences, figures, main
from merging import SelfAware
from routing import Decision, TopK


@pytest.fixture
def off(tmp_path: Path) -> Iterator[Any]:
    """Names of the figures that are off after a run with some flags changed."""

    reference = json.loads((REFERENCES / f"{TINY}.json").read_text("utf-8"))

    def run(**changes: Any) -> set[str]:
        return {row[0] for row in differences(reference, figures(TINY, tmp_path, changes))}

    yield run


def test_as_committed(off: Any) -> None:
    assert off() == set()


def test_lambda_times_ten_is_noticed(off: Any) -> None:
    settings = [
        s.replace("covariance_weight=100", "covariance_weight=1000") for s in regression.SETTINGS[TINY]["set"]
    ]
    found = off(set=settings)
    assert any(name.startswith("memit ") for name in found)
    assert not any(name.startswith("alphaedit ") for name in found)


def test_skipped_merging_is_noticed(off: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpruned(self: Any, base: Any, deltas: Any) -> Any:
        return dict(base) | {name: base[name] + change for delta in deltas for name, change in delta.items()}

    monkeypatch.setattr(SelfAware, "merge", unpruned)
    assert any("+MM" in name for name in off())


def test_swapped_routes_are_noticed(off: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TopK.route_many

    def swapped(self: TopK, texts: Any, ks: Any) -> Any:
        return {
            k: [
                Decision(expert=None if d.expert else "edited", score=-d.score, nearest=d.nearest)
                for d in made
            ]
            for k, made in right(self, texts, ks).items()
        }

    monkeypatch.setattr(TopK, "route_many", swapped)
    assert any("route_rewrite" in name for name in off())


def test_differences_name_what_is_off_or_missing() -> None:
    then = {"a": 0.5, "b": 0.5, "c": 1.0}
    now = {"a": Figure(0.6, 0.1), "b": Figure(0.61, 0.1), "d": Figure(1.0, 0.1)}
    assert [row[0] for row in differences(then, now)] == ["b", "c", "d"]


def test_a_model_without_reference_gets_the_line_that_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "gpt2-xl"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "nox -s regression -- --model gpt2-xl --update" in told
