"""Exact search among distinct texts, by an index where there are very many."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing.api import Embed
from routing.index import VectorIndex

_SPARE = 2  # candidates beyond those asked that are weighed again in float64
_CELLS = 2**24  # similarities held at a time, 64 MiB
_QUERIES = 256  # searched at a time; what is weighed again stays in the cache


class TextSearch:
    """Distinct texts, their unit vectors and what they belong to; may grow between searches."""

    def __init__(self, indexed_from: int) -> None:
        """indexed_from: texts from which the search is approximate (``VectorIndex``)."""
        self._indexed_from = indexed_from
        self._rows: dict[str, int] = {}
        self._parts: list[Tensor] = []
        self._index: tuple[int, VectorIndex] | None = None  # of so many of them
        self.places: list[list[int]] = []  # by row: the corpus positions that share the text

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self) -> list[str]:
        """By row."""
        return list(self._rows)

    def add(self, texts: Sequence[str], places: Sequence[int], embed: Embed) -> list[int]:
        """Texts of corpus positions, one each; the row of each."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if new:
            self._parts.append(directions(embed, new))
            for text in new:
                self._rows[text] = len(self._rows)
                self.places.append([])
        rows = [self._rows[text] for text in texts]
        for row, place in zip(rows, places, strict=True):
            self.places[row].append(place)
        return rows

    def vectors(self) -> Tensor:
        """(texts, d), unit length, by row."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def nearest(self, queries: Tensor, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The k largest cosines of each query and their rows, (queries, k) each, largest first, then by row.

        queries: (queries, d), unit length. k: fewer where there are fewer texts.
        """
        k = min(k, len(self))
        if not k or not len(queries):
            return np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        wide = min(k + _SPARE, len(self))
        parts = [self._ranked(part, self._found(part, wide), k) for part in torch.split(queries, _QUERIES)]
        return np.concatenate([cosines for cosines, _ in parts]), np.concatenate([rows for _, rows in parts])

    def _ranked(
        self, queries: Tensor, rows: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The k best of the rows found for each query, by cosines in float64."""
        vectors = self.vectors()
        texts = vectors[torch.from_numpy(rows).to(vectors.device)].double()
        cosines = torch.bmm(texts, queries[:, :, None].double())[:, :, 0].cpu().numpy()
        order = np.lexsort((rows, -cosines), axis=1)[:, :k]
        return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)

    def _found(self, queries: Tensor, wide: int) -> NDArray[np.int64]:
        """Rows of the nearest texts, (queries, wide), in no order that counts."""
        if len(self) >= self._indexed_from:
            found = self._indexed().candidates(queries, wide)
            if (found >= 0).all():
                return found
        vectors = self.vectors()
        parts = torch.split(queries, max(1, _CELLS // len(self)))
        nearest: NDArray[np.int64] = (
            torch.cat([(part @ vectors.T).topk(wide, dim=1).indices for part in parts]).cpu().numpy()
        )
        return nearest

    def _indexed(self) -> VectorIndex:
        if self._index is None or self._index[0] != len(self):
            self._index = len(self), VectorIndex(self.vectors())
        return self._index[1]


def directions(embed: Embed, texts: Sequence[str]) -> Tensor:
    """(len(texts), d) of unit length in float32; raises ValueError naming a text that has no direction."""
    vectors = embed(texts).float()
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"{len(texts)} texts got embeddings of shape {tuple(vectors.shape)}")
    lengths = vectors.norm(dim=1, keepdim=True)
    unusable = ~(lengths.isfinite() & (lengths > 0)).flatten()
    if unusable.any():
        text = texts[int(unusable.nonzero()[0])]
        raise ValueError(f"the embedding of {text!r} is zero or not finite, so it has no direction")
    return torch.div(vectors, lengths)
