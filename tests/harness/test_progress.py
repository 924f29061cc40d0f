"""What the display prints where there is no terminal, and that its bars go on one."""

import io

import pytest
from rich.console import Console

from harness import progress
from harness.progress import Display


class Clock:
    """Seconds that pass as the test says."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_stage_is_one_line_at_its_end(clock: Clock) -> None:
    stream = io.StringIO()
    display = Display(stream)
    with display.live(), display.stage("score memit", total=4) as stage:
        stage.update(1)
        assert stream.getvalue() == ""
        clock.now += 2.5
    assert stream.getvalue() == "score memit: 2.5 s\n"


def test_a_long_stage_tells_how_far_it_is_now_and_then(clock: Clock) -> None:
    stream = io.StringIO()
    display = Display(stream)
    with display.stage("edit", total=4) as stage:
        clock.now += progress.QUIET_SECONDS + 1
        stage.update(0)  # nothing done: nothing to tell
        stage.update(1, "batch 2 of 4")
        stage.update(1.5)
        assert stream.getvalue() == "  edit: 25 %, batch 2 of 4, about 48 s left\n"
        clock.now += progress.QUIET_SECONDS + 1
        stage.update(2)
    assert stream.getvalue().splitlines()[1:] == ["  edit: 50 %, about 32 s left", "edit: 32.0 s"]


def test_a_stage_that_fails_is_closed(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Display(stream).stage("edit"):
        clock.now += 1
        raise RuntimeError
    assert stream.getvalue() == "edit: 1.0 s\n"


def test_lines_are_plain_and_long_ones_are_not_broken() -> None:
    stream = io.StringIO()
    text = "[bold]no markup[/bold] " + "word " * 60 + "[1, 2] 'quoted' 3.5"
    Display(stream).say(text)
    assert stream.getvalue() == text + "\n"


def test_a_terminal_gets_bars_and_the_same_last_line(clock: Clock) -> None:
    stream = io.StringIO()
    display = Display(stream)
    display.console = Console(file=stream, force_terminal=True, width=120, highlight=False)
    with display.live():
        with display.stage("score", total=2) as stage:
            stage.update(1, "half")
            assert display._bars is not None
            assert [task.description for task in display._bars.tasks] == ["score (half)"]
        assert display._bars.tasks == []
    assert display._bars is None
    assert "score: 0.0 s" in stream.getvalue()


def test_the_bars_go_after_an_error() -> None:
    display = Display(io.StringIO())
    display.console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(RuntimeError), display.live():
        raise RuntimeError
    assert display._bars is None
