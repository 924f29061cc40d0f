"""Routers joined by name: ``a&b`` where both send a query to an expert, ``a|b`` where either does."""

from collections.abc import Callable, Sequence

from routing.api import Decision, Router, Subject


class Composed:
    """Routers over the same corpus, one of whose decisions is taken for each query.

    Of ``&`` the one with the lowest score, of ``|`` the one with the highest; of equal ones the first. So the
    score is the minimum or the maximum, and at least 0 exactly where all or any of them name an expert.
    """

    def __init__(self, parts: Sequence[Router], *, every: bool) -> None:
        """parts: at least one. every: all must name an expert (``&``), else any (``|``)."""
        self.parts = tuple(parts)
        self._choose: Callable[..., Decision] = min if every else max

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        for part in self.parts:
            part.add(expert, texts, subjects)

    def route(self, texts: Sequence[str]) -> list[Decision]:
        decisions = zip(*(part.route(texts) for part in self.parts), strict=True)
        return [self._choose(of_one_text, key=lambda decision: decision.score) for of_one_text in decisions]
