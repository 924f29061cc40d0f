"""Top-k similarity-weighted routing, solved in closed form.

A query q has weights beta_i = exp(1 + cos(e_q, e_i)) to the corpus texts, the k largest kept. SeqMMR's score
minimises sum_i beta_i log(1 + exp(-l_i s)) over s, with labels l_i = +1 for edit requests and -1 for
unrelated texts. With W+ and W- the sums of beta over either label the minimum is s = log(W+ / W-), so the
query goes to the edited model exactly if W+ >= W-.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing.api import Decision
from routing.index import VectorIndex

_CLIP = 10.0  # labels that all agree have no finite minimiser
_SPARE = 14  # candidates beyond k that a first look hands on
_NOISE = 1e-5  # far more than two float32 products of unit vectors are off
_SCREENED = 1000  # corpus texts from which bfloat16 products pay
_CELLS = 2**24  # similarities held at a time, 64 MiB
_QUERIES = 256  # queries searched at a time; what is weighed again stays in the cache


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    """The router of SeqMMR."""

    top_k: int = 2  # corpus texts that vote
    indexed_from: int = 1_000_000  # corpus texts from which the search is approximate (``VectorIndex``)

    def __post_init__(self) -> None:
        for name in ("top_k", "indexed_from"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class TopK:
    """Router over an exact search, of a very large corpus over an index; the corpus may grow between queries.

    Equal weights: positives come before negatives, then the lower corpus position, and W+ = W- means edited.
    So k = 2 decides like the nearest neighbour. Of several experts among the positives that vote, the one
    with the largest single weight answers. Without any positive in the corpus everything goes to the
    unedited model, with the lowest score. A k beyond the corpus lets the whole corpus vote.

    Similarities are searched by float32 matrix products (in bfloat16 where a CPU has instructions for it, and
    its error bounds what is then left out) and the nearest texts weighed again in float64, so that decisions
    depend neither on that nor on how many queries are asked together.
    """

    def __init__(self, config: TopKConfig, embed: Callable[[Sequence[str]], Tensor]) -> None:
        """``embed``: texts -> (len(texts), d), any scale but zero; only directions count."""
        self.config = config
        self._embed = embed
        self._experts: list[str | None] = []  # by corpus position
        self._positive: NDArray[np.bool_] = np.empty(0, dtype=bool)  # by corpus position, an expert is named
        self._parts: list[Tensor] = []  # unit vectors, (n, d) in all, in order of position
        self._rough: Tensor | None = None  # them in bfloat16, where that is searched first
        self._index: tuple[int, VectorIndex] | None = None  # of so many of them

    def add(self, expert: str | None, texts: Sequence[str]) -> None:
        if texts:
            self._parts.append(self._directions(texts))
            self._experts += [expert] * len(texts)
            self._positive = np.append(self._positive, np.full(len(texts), expert is not None))

    def route(self, texts: Sequence[str]) -> list[Decision]:
        return self.route_many(texts, (self.config.top_k,))[self.config.top_k]

    def route_many(self, texts: Sequence[str], ks: Sequence[int]) -> dict[int, list[Decision]]:
        """Decisions under each k of ``ks``, from one search: k -> one decision a text."""
        if not ks or min(ks) < 1:
            raise ValueError(f"ks is {tuple(ks)}; name at least one k, each at least 1")
        if not texts:
            return {k: [] for k in ks}
        if not self._parts:
            nothing = Decision(expert=None, score=-_CLIP, nearest=())
            return {k: [nothing] * len(texts) for k in ks}
        weights, places = self._nearest(self._directions(texts), max(ks))
        return {k: self._decide(weights[:, :k], places[:, :k]) for k in ks}

    def _decide(self, weights: NDArray[np.float64], places: NDArray[np.int64]) -> list[Decision]:
        """weights, places: (queries, k), nearest first."""
        positive = self._positive[places]
        for_edited = np.where(positive, weights, 0.0).sum(1).tolist()
        for_unedited = np.where(positive, 0.0, weights).sum(1).tolist()
        leading = places[np.arange(len(places)), positive.argmax(1)].tolist()
        return [
            Decision(
                expert=self._experts[first] if edited >= unedited else None,
                score=_score(edited, unedited),
                nearest=tuple(nearest),
            )
            for edited, unedited, first, nearest in zip(
                for_edited, for_unedited, leading, places.tolist(), strict=True
            )
        ]

    def _nearest(self, queries: Tensor, k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The k largest weights of each query and their corpus positions, (queries, k) each, largest first.

        queries: (queries, d), unit length.
        """
        corpus, rough = self._corpus(), self._rough_corpus()
        k = min(k, len(corpus))
        weights = np.empty((len(queries), k))
        places = np.empty((len(queries), k), dtype=np.int64)
        size = max(1, min(_QUERIES, _CELLS // len(corpus)))
        left = np.arange(len(queries))
        if len(corpus) >= self.config.indexed_from:
            narrowed = self._indexed().candidates(queries, k + _SPARE)
            full = (narrowed >= 0).all(axis=1)
            if full.any():
                found = torch.from_numpy(narrowed[full]).to(corpus.device)
                weights[full], places[full] = self._ranked(queries[torch.from_numpy(full)], found, k)
            left = left[~full]
        for part in np.split(left, range(size, len(left), size)):
            chunk = queries if len(part) == len(queries) else queries[torch.from_numpy(part)]
            if rough is None:
                similarities = chunk @ corpus.T
            else:  # in this order oneDNN takes half the time
                similarities = (rough @ chunk.to(rough.dtype).T).T.contiguous()
            for rows, found in _candidates(similarities, k):
                at = part[rows.cpu().numpy()]
                weights[at], places[at] = self._ranked(chunk[rows], found, k)
        return weights, places

    def _indexed(self) -> VectorIndex:
        """The index over the whole corpus, made anew when that has grown."""
        corpus = self._corpus()
        if self._index is None or self._index[0] != len(corpus):
            self._index = len(corpus), VectorIndex(corpus)
        return self._index[1]

    def _ranked(
        self, queries: Tensor, found: Tensor, k: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Weights in float64 of the corpus positions found, (queries, found) -> the k largest, in order."""
        cosines = (self._corpus()[found].double() * queries.double().unsqueeze(1)).sum(-1)
        weights: NDArray[np.float64] = np.exp(1.0 + cosines.cpu().numpy())
        places: NDArray[np.int64] = found.cpu().numpy()
        order = np.lexsort((places, ~self._positive[places], -weights), axis=-1)[:, :k]
        return np.take_along_axis(weights, order, 1), np.take_along_axis(places, order, 1)

    def _corpus(self) -> Tensor:
        """(n, d), unit length."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def _rough_corpus(self) -> Tensor | None:
        """The corpus in bfloat16 if it is large and this CPU is faster with it."""
        corpus = self._corpus()
        if len(corpus) < _SCREENED or corpus.device.type != "cpu" or not _bfloat16_is_fast():
            return None
        if self._rough is None or len(self._rough) < len(corpus):
            self._rough = corpus.bfloat16()
        return self._rough

    def _directions(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), d) of unit length in float32."""
        vectors = self._embed(texts).float()
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError(f"{len(texts)} texts got embeddings of shape {tuple(vectors.shape)}")
        if self._parts and vectors.shape[1] != self._parts[0].shape[1]:
            known = self._parts[0].shape[1]
            raise ValueError(f"embeddings have {vectors.shape[1]} dimensions, those of the corpus {known}")
        lengths = vectors.norm(dim=1, keepdim=True)
        unusable = ~(lengths.isfinite() & (lengths > 0)).flatten()
        if unusable.any():
            text = texts[int(unusable.nonzero()[0])]
            raise ValueError(f"the embedding of {text!r} is zero or not finite, so it has no direction")
        return torch.div(vectors, lengths)


def _candidates(similarities: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows, and (rows, m) the positions among which their k nearest are; every row once.

    similarities: (rows, corpus), products of unit vectors in float32 or bfloat16.
    """
    columns = similarities.shape[1]
    rows = torch.arange(len(similarities), device=similarities.device)
    for breadth in (k + _SPARE, 8 * (k + _SPARE)):
        left = similarities if len(rows) == len(similarities) else similarities[rows]
        values, found = left.topk(min(breadth, columns), dim=1)
        if breadth >= columns:
            yield rows, found
            return
        done = values[:, -1].float() < _floor(values[:, k - 1])
        yield rows[done], found[done]
        rows = rows[~done]
        if not len(rows):
            return
    for row in rows:
        own = similarities[row]
        yield row[None], (own.float() >= _floor(own.topk(k).values[-1])).nonzero().T


def _floor(kth: Tensor) -> Tensor:
    """What a similarity must reach to be that of a text among the k nearest, given the k-th largest."""
    value = kth.float()
    if kth.dtype != torch.bfloat16:
        return value - _NOISE
    # either of two products is off by 2^-8 of |q||e| = 1 from rounding the vectors, and by 2^-9 of itself
    return value - (2**-7 + 2**-8 * value.abs() + _NOISE)


@cache
def _bfloat16_is_fast() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _score(edited: float, unedited: float) -> float:
    """log(W+ / W-), clipped."""
    if not (edited and unedited):
        return _CLIP if edited else -_CLIP
    return max(-_CLIP, min(_CLIP, math.log(edited / unedited)))
