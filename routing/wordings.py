"""A space of prompts in which it matters little how a relation is worded.

Sentence encoders see the wording of a prompt without its name ("it, who is employed by") as much as the
relation it asks for. Groups of wordings that ask for the same relation say in which directions wording
varies: their covariance within groups is whitened, as in linear discriminant analysis. It is found on some
relations and holds for others.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from routing.api import Embed
from routing.search import directions

WORDINGS = Path(__file__).with_name("wordings.json")
RIDGE = 0.3  # of the mean variance, added to every direction


def read_wordings(*, without: Collection[str] = ()) -> list[list[str]]:
    """Groups of prompts without their names, each of one relation; without: relations that are left out."""
    groups: dict[str, list[str]] = json.loads(WORDINGS.read_text(encoding="utf-8"))["groups"]
    return [group for relation, group in groups.items() if relation not in without]


class WordingSpace:
    """The map into that space, found when first used."""

    def __init__(self, embed: Embed, groups: Sequence[Sequence[str]]) -> None:
        """groups: at least one of two wordings; those that are embedded alike say nothing."""
        self._embed = embed
        self._groups = groups
        self._found: tuple[Tensor, Tensor] | None = None  # the mean (d,) and the map (d, d)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), d) in the space."""
        return self.map(directions(self._embed, texts))

    def map(self, vectors: Tensor) -> Tensor:
        """(n, d) unit vectors of the encoder -> (n, d) unit vectors of the space."""
        if self._found is None:
            self._found = _whitening([directions(self._embed, group) for group in self._groups])
        mean, whitening = self._found
        mapped = (vectors.double().cpu() - mean) @ whitening
        lengths = mapped.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return torch.div(mapped, lengths).float().to(vectors.device)


def _whitening(groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of all vectors (d,) and the whitening (d, d) of their covariance within groups, in float64.

    groups: (n, d) each.
    """
    parts = [group.double().cpu() for group in groups]
    within = torch.cat([part - part.mean(0) for part in parts])
    covariance = within.T @ within / len(within)
    width = len(covariance)
    ridge = RIDGE * covariance.trace().clamp(min=1e-12) / width
    values, axes = torch.linalg.eigh(covariance + ridge * torch.eye(width, dtype=torch.float64))
    return torch.cat(parts).mean(0), axes * values.rsqrt() @ axes.T
