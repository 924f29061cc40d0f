"""Top-k similarity-weighted routing, solved in closed form.

A query q has weights beta_i = exp(1 + cos(e_q, e_i)) to the corpus texts, the k largest kept. SeqMMR's score
minimises sum_i beta_i log(1 + exp(-l_i s)) over s, with labels l_i = +1 for edit requests and -1 for
unrelated texts. With W+ and W- the sums of beta over either label the minimum is s = log(W+ / W-), so the
query goes to the edited model exactly if W+ >= W-.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from routing.api import Decision, Embed, Subject
from routing.index import VectorIndex
from routing.search import directions

_CLIP = 10.0  # labels that all agree have no finite minimiser
_SPARE = 14  # candidates beyond k that an index hands on
_NOISE = 1e-5  # far more than two float32 products of unit vectors are off
_LARGEST = 127  # of 8 bits
_SCREENED = 1000  # corpus texts from which products in 8 bits pay
_GROUPS = 256  # of neighbouring corpus positions, whose maxima are looked at first
_CELLS = 2**24  # similarities held at a time, 64 MiB
_QUERIES = 256  # queries searched at a time; what is weighed again stays in the cache
_PAIRS = 2**11  # of a query and a text weighed again at a time


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

    Similarities are searched by float32 matrix products (of 8-bit integers where a CPU has instructions for
    them, and their error bounds what is left out) and the nearest texts weighed again in float64, so that
    decisions depend neither on that nor on how many queries are asked together.
    """

    def __init__(self, config: TopKConfig, embed: Embed) -> None:
        """``embed``: texts -> (len(texts), d), any scale but zero; only directions count."""
        self.config = config
        self._embed = embed
        self._experts: list[str | None] = []  # by corpus position
        self._positive: NDArray[np.bool_] = np.empty(0, dtype=bool)  # by corpus position, an expert is named
        self._parts: list[Tensor] = []  # unit vectors, (n, d) in all, in order of position
        self._rough: _EightBits | None = None  # them in 8 bits, where those are searched first
        self._index: tuple[int, VectorIndex] | None = None  # of so many of them

    def add(
        self, expert: str | None, texts: Sequence[str], subjects: Sequence[Subject] | None = None
    ) -> None:
        """``subjects`` are not looked at."""
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
        corpus = self._corpus()
        k = min(k, len(corpus))
        weights = np.empty((len(queries), k))
        places = np.empty((len(queries), k), dtype=np.int64)
        size = max(1, min(_QUERIES, _CELLS // len(corpus)))
        left = np.arange(len(queries))
        if len(corpus) >= self.config.indexed_from:
            narrowed = self._indexed().candidates(queries, k + _SPARE)
            full = (narrowed >= 0).all(axis=1)
            rows = np.repeat(np.flatnonzero(full), narrowed.shape[1])
            weights[full], places[full] = self._ranked(queries, rows, narrowed[full].ravel(), k)
            left = left[~full]
        for part in np.split(left, range(size, len(left), size)):
            if len(part):
                chunk = queries if len(part) == len(queries) else queries[torch.from_numpy(part)]
                weights[part], places[part] = self._ranked(chunk, *self._found(chunk, k), k)
        return weights, places

    def _found(self, queries: Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and corpus positions, (found,) each, rows in order: all that may be among the k nearest."""
        corpus, rough = self._corpus(), self._rough_corpus()
        if rough is None:
            similarities = queries @ corpus.T
            rows, found = _candidates(similarities, torch.full_like(similarities[:, :1], _NOISE), k)
        else:
            rows, found = _candidates(*rough.similarities(queries), k)
            pairs = zip(torch.split(found, _PAIRS), torch.split(rows, _PAIRS), strict=True)
            cosines = torch.cat(
                [corpus.index_select(0, f).mul_(queries.index_select(0, r)).sum(1) for f, r in pairs]
            )
            near = cosines >= _kth(cosines, rows, k)[rows] - _NOISE
            rows, found = rows[near], found[near]
        return rows.cpu().numpy(), found.cpu().numpy()

    def _indexed(self) -> VectorIndex:
        """The index over the whole corpus, made anew when that has grown."""
        corpus = self._corpus()
        if self._index is None or self._index[0] != len(corpus):
            self._index = len(corpus), VectorIndex(corpus)
        return self._index[1]

    def _ranked(
        self, queries: Tensor, rows: NDArray[np.int64], places: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The k largest weights, in float64, of the corpus ``places`` found for ``rows`` of the queries.

        rows, places: (found,), at least k of every row that is there, rows in order -> two of (rows, k).
        """
        corpus, doubles, cosines = self._corpus(), queries.double(), np.empty(len(rows))
        for start in range(0, len(rows), _PAIRS):
            some = slice(start, start + _PAIRS)
            texts, asked = (torch.from_numpy(part[some]).to(corpus.device) for part in (places, rows))
            products = corpus.index_select(0, texts).double().mul_(doubles.index_select(0, asked))
            cosines[some] = products.sum(1).cpu().numpy()
        weights = np.exp(1.0 + cosines)
        order = np.lexsort((places, ~self._positive[places], -weights, rows))
        first = np.flatnonzero(np.diff(rows, prepend=-1))  # in the order a row keeps its stretch
        best = order[first[:, None] + np.arange(k)]
        return weights[best], places[best]

    def _corpus(self) -> Tensor:
        """(n, d), unit length."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def _rough_corpus(self) -> "_EightBits | None":
        """The corpus in 8 bits if it is large and this CPU is faster with them."""
        corpus = self._corpus()
        if len(corpus) < _SCREENED or corpus.device.type != "cpu" or not _eight_bits_are_fast():
            return None
        if self._rough is None or self._rough.count < len(corpus):
            self._rough = _EightBits(corpus)
        return self._rough

    def _directions(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), d) of unit length in float32."""
        vectors = directions(self._embed, texts)
        if self._parts and vectors.shape[1] != self._parts[0].shape[1]:
            known = self._parts[0].shape[1]
            raise ValueError(f"embeddings have {vectors.shape[1]} dimensions, those of the corpus {known}")
        return vectors


class _EightBits:
    """A corpus of unit vectors rounded to 8 bits, for similarities of known error."""

    def __init__(self, corpus: Tensor) -> None:
        self.count = len(corpus)
        self._scale = corpus.abs().max() / _LARGEST
        rounded, off = _rounded(corpus, self._scale)
        self._values = rounded.T.contiguous()  # (d, n)
        self._off = off.max()

    def similarities(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(queries, n) integers growing with the cosine, and (queries, 1): how far off their order may be.

        With q' and e' the rounded vectors, |qe - q'e'| <= |q - q'||e| + |q'||e - e'|.
        """
        scale = queries.abs().amax(1, keepdim=True) / _LARGEST
        rounded, off = _rounded(queries, scale)
        error = off + (1 + off) * self._off
        margins = (2 * error + _NOISE) / (scale * self._scale)
        return torch._int_mm(rounded, self._values), margins.ceil().int()


def _rounded(vectors: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(n, d) in int8 as multiples of the scale, and (n, 1): the lengths of what rounding took away."""
    scaled = vectors / scale
    rounded = scaled.round()
    return rounded.to(torch.int8), (scaled - rounded).norm(dim=1, keepdim=True) * scale


def _candidates(similarities: Tensor, margins: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows and corpus positions, (found,) each, rows in order: all that may be among a row's k nearest.

    similarities: (rows, corpus); margins: (rows, 1), how far off their order may be.
    The k-th largest of the maxima of neighbouring positions is a floor of the k-th largest similarity, and
    only neighbourhoods that reach it, less the margin, are looked into.
    """
    count = similarities.shape[1]
    deep = max(1, count // max(_GROUPS, 16 * k))
    whole = count - count % deep
    maxima = similarities[:, :whole].reshape(len(similarities), -1, deep).amax(2)
    if whole < count:
        maxima = torch.cat([maxima, similarities[:, whole:].amax(1, keepdim=True)], dim=1)
    floor = maxima.topk(k, dim=1).values[:, -1:] - margins
    rows, group = (maxima >= floor).nonzero(as_tuple=True)
    places = deep * group[:, None] + torch.arange(deep, device=group.device)
    near = similarities[rows[:, None], places.clamp(max=count - 1)] >= floor[rows]
    which, within = (near & (places < count)).nonzero(as_tuple=True)
    return rows[which], places[which, within]


def _kth(values: Tensor, rows: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row.

    values: (found,); rows: (found,) from 0 on in order, each at least k times.
    """
    counts = rows.bincount()
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    table = values.new_full((len(counts), int(counts.max())), -math.inf)
    table[rows, within] = values
    return table.topk(k, dim=1).values[:, -1]


@cache
def _eight_bits_are_fast() -> bool:
    return bool(torch.cpu._is_vnni_supported())


def _score(edited: float, unedited: float) -> float:
    """log(W+ / W-), clipped."""
    if not (edited and unedited):
        return _CLIP if edited else -_CLIP
    return max(-_CLIP, min(_CLIP, math.log(edited / unedited)))
