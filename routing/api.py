"""What a router is asked and what it answers: texts in, one decision a text out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Embed = Callable[[Sequence[str]], Tensor]  # texts -> (len(texts), d), any scale but zero


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which weights should answer one query."""

    expert: str | None  # None: unedited model
    score: float  # s_q; at least 0 where an expert answers
    nearest: tuple[int, ...]  # corpus positions, nearest first


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What an edit is about, for routers that look at more than its whole prompt."""

    name: str  # as it stands in the prompt
    aliases: tuple[str, ...] = ()  # other names of it, where they are known


class Router(Protocol):
    """Sends each text to the expert whose corpus it resembles, or to the unedited model."""

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        """Extend the corpus.

        expert:   None: unrelated texts, for the unedited model.
        subjects: of an expert's texts, one each. A router that needs them raises ValueError without.
        """
        ...

    def route(self, texts: Sequence[str]) -> list[Decision]:
        """One decision a text, in order, from the corpus as it is now."""
        ...
