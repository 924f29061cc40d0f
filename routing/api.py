"""What a router is asked and what it answers: texts in, one decision a text out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Which weights should answer one query."""

    expert: str | None  # None: unedited model
    score: float  # s_q; at least 0 where an expert answers
    nearest: tuple[int, ...]  # corpus positions, nearest first


class Router(Protocol):
    """Sends each text to the expert whose corpus it resembles, or to the unedited model."""

    def add(self, expert: str | None, texts: Sequence[str]) -> None:
        """Extend the corpus; None: unrelated texts, for the unedited model."""
        ...

    def route(self, texts: Sequence[str]) -> list[Decision]:
        """One decision a text, in order, from the corpus as it is now."""
        ...

    def route_many(self, texts: Sequence[str], ks: Sequence[int]) -> dict[int, list[Decision]]:
        """The same under several top-k, from one search."""
        ...
