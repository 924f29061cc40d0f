"""A live display of a run: what is being done, how far it is, how long it still takes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 15.0  # between lines where the output is no terminal


class Display:
    """Stages shown as bars on a terminal, as occasional lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._bars: Progress | None = None

    @contextmanager
    def live(self) -> Iterator[None]:
        """Keep the bars on the screen while the context lasts."""
        if not self.console.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        try:
            with Progress(*columns, console=self.console) as self._bars:
                yield
        finally:
            self._bars = None

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    @contextmanager
    def stage(self, name: str, total: float = 1.0) -> Iterator["Stage"]:
        """A stage with a known amount of work; done when the context ends."""
        stage = Stage(self, name, total)
        try:
            yield stage
        finally:
            stage.close()


class Stage:
    """One stage of a run."""

    def __init__(self, display: Display, name: str, total: float) -> None:
        self.display, self.name, self.total, self.done = display, name, total, 0.0
        self.start = self.told = time.monotonic()
        bars = display._bars
        self.task = bars.add_task(name, total=total) if bars else None

    def update(self, done: float, detail: str = "") -> None:
        """How much is done, and what is being done."""
        self.done = done
        now = time.monotonic()
        bars = self.display._bars
        if bars and self.task is not None:
            label = f"{self.name} ({detail})" if detail else self.name
            bars.update(self.task, completed=done, description=label)
        elif now - self.told > QUIET_SECONDS and done > 0:
            self.told = now
            left = (now - self.start) * (self.total - done) / done
            self.display.say(
                f"  {self.name}: {100 * done / self.total:.0f} %"
                f"{', ' + detail if detail else ''}, about {left:.0f} s left"
            )

    def close(self) -> None:
        seconds = time.monotonic() - self.start
        bars = self.display._bars
        if bars and self.task is not None:
            bars.remove_task(self.task)
        self.display.say(f"{self.name}: {seconds:.1f} s")
