"""Calibrated routing: log-odds that a query asks for an edited fact, from a few features of both.

Two logistic models: one of edits whose subject the query names, which asks whether it wants their relation;
one of the nearest other edits, which asks whether it means their subject by another name. A query's score
is the largest over the edits it may ask for. The coefficients were fitted by studies/routers.py.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.api import Decision, Embed, Subject
from routing.features import FEATURES, Comparison, Pairs
from routing.relation import check_count
from routing.subject import CERTAIN

COEFFICIENTS = Path(__file__).with_name("calibrated.json")
MODELS = ("named", "similar")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """What was fitted, and on what."""

    encoder: str  # identity of the encoder that it was fitted with
    trained_on: str
    unrelated: float  # mean cosine to the nearest unrelated text, for a corpus without any
    weights: Mapping[str, Mapping[str, float]]  # model of MODELS -> feature, or "intercept" -> weight

    @classmethod
    def read(cls, path: Path) -> "Coefficients":
        """Raises ValueError in one line if the file holds none."""
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
            for model in MODELS:
                for feature, weight in found.weights[model].items():
                    if feature not in (*FEATURES, "intercept") or not np.isfinite(weight):
                        raise ValueError(f"{model}: {feature!r} is {weight!r}")
            _ = float(found.unrelated)
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ValueError(f"coefficients {str(path)!r} cannot be read: {reason}; make them anew") from None
        return found

    def log_odds(self, pairs: Pairs) -> NDArray[np.float64]:
        """(pairs,) that the query asks for the edit."""
        columns = np.array(
            [[self.weights[model].get(feature, 0.0) for feature in FEATURES] for model in MODELS]
        )
        intercepts = np.array([self.weights[model].get("intercept", 0.0) for model in MODELS])
        model = np.where(pairs.named, 0, 1)
        odds: NDArray[np.float64] = (pairs.features * columns[model]).sum(1) + intercepts[model]
        return odds


@dataclass(frozen=True, kw_only=True)
class CalibratedConfig:
    """The combination of all that was found to help."""

    threshold: float = 0.0  # log-odds from which a query goes to the edited model
    coefficients: str | None = None  # file of another encoder's; None: those fitted with minilm
    indexed_from: int = 1_000_000  # edits from which the search is approximate

    def __post_init__(self) -> None:
        check_count("indexed_from", self.indexed_from)
        if not np.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}; it must be a finite log-odds")
        if self.coefficients is not None:
            Coefficients.read(Path(self.coefficients))


class Calibrated:
    """Router by the log-odds of a fitted model, less the threshold.

    Embeds one or two short texts a query, all in one call: the sentence asked, and where an edited subject
    stands in it the sentence without that name.
    """

    def __init__(self, config: CalibratedConfig, embed: Embed) -> None:
        """``embed``: the encoder that the coefficients are for; with another one a warning is logged."""
        self.config = config
        self.coefficients = Coefficients.read(Path(config.coefficients or COEFFICIENTS))
        identity: Any = getattr(embed, "identity", None)
        if identity is not None and identity != self.coefficients.encoder:
            _log.warning(
                "router 'calibrated' was fitted with encoder %s, not with %s: fit it anew by "
                "studies/routers.py and name its file in the field coefficients",
                self.coefficients.encoder,
                identity,
            )
        self._comparison = Comparison(
            "calibrated", embed, indexed_from=config.indexed_from, unrelated=self.coefficients.unrelated
        )

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        self._comparison.add(expert, texts, subjects)

    def route(self, texts: Sequence[str]) -> list[Decision]:
        experts = self._comparison.edits.experts
        if not texts or not experts:
            return [Decision(expert=None, score=-CERTAIN, nearest=()) for _ in texts]
        pairs = self._comparison.pairs(texts)
        scores = np.clip(self.coefficients.log_odds(pairs), -CERTAIN, CERTAIN) - self.config.threshold
        order = np.lexsort((-pairs.place, -scores, pairs.query))
        starts = np.flatnonzero(np.diff(pairs.query[order], prepend=-1))
        decisions = []
        for places in np.split(order, starts[1:]):
            best = float(scores[places[0]])
            nearest = tuple(pairs.place[places].tolist())
            expert = experts[nearest[0]] if best >= 0 else None
            decisions.append(Decision(expert=expert, score=best, nearest=nearest))
        return decisions
