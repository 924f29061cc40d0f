"""A search that reads only part of a very large corpus, by an inverted file of faiss."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_CELLS_PER_ROOT = 4  # cells of the corpus for each unit of the root of its size
_PROBED = 32  # nearest cells that a query searches
_TRAINING = 40  # vectors for each cell that the cells' centres are found from


class VectorIndex:
    """Candidates for the nearest texts: those in the cells nearest to a query.

    Approximate: a near text in another cell is missed. Of a corpus of n vectors a query reads about
    8 sqrt(n) and the 4 sqrt(n) centres.
    """

    def __init__(self, corpus: Tensor) -> None:
        """corpus: (n, d), unit length. Raises ValueError if faiss is not installed."""
        try:
            import faiss
        except ImportError:
            raise ValueError(
                f"a corpus of {len(corpus):,} texts is searched by a vector index, which needs faiss: "
                "pip install 'seqmmr[index]', or raise indexed_from"
            ) from None
        vectors = corpus.cpu().numpy()
        count, width = vectors.shape
        cells = max(1, min(round(_CELLS_PER_ROOT * math.sqrt(count)), count // _TRAINING))
        self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.seed = 0
        self._index.nprobe = min(_PROBED, cells)
        order = np.random.default_rng(0).permutation(count)[: cells * _TRAINING]
        self._index.train(np.ascontiguousarray(vectors[np.sort(order)]))
        self._index.add(vectors)

    def candidates(self, queries: Tensor, count: int) -> NDArray[np.int64]:
        """(queries, count) corpus positions, -1 where the probed cells hold fewer."""
        found: NDArray[np.int64] = self._index.search(queries.cpu().numpy(), count)[1]
        return found
