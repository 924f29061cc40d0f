"""The router, one query at a time."""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor


def similarity_weights(query: Tensor, corpus: Tensor) -> Tensor:
    """beta_i = exp(1 + cos(query, corpus_i)); query (d,), corpus (m, d)."""
    return torch.stack(
        [
            torch.exp(1 + torch.dot(query, other) / (torch.linalg.norm(query) * torch.linalg.norm(other)))
            for other in corpus
        ]
    )


def route_numeric(betas: Sequence[float], labels: Sequence[int]) -> float:
    """The s in [-10, 10] with the least sum of beta_i log(1 + exp(-label_i s)), found numerically.

    The betas are those of the neighbours kept; labels are +1 (edited) and -1 (unrelated).
    """

    def loss(s: float) -> float:
        terms = (
            beta * (math.log1p(math.exp(-abs(s))) + max(-label * s, 0.0))
            for beta, label in zip(betas, labels, strict=True)
        )
        return math.fsum(terms)

    found = minimize_scalar(loss, bounds=(-10.0, 10.0), method="bounded", options={"xatol": 1e-10})
    return float(found.x)


def route_one(query: Tensor, corpus: Tensor, labels: Sequence[int], k: int) -> float:
    """The score of one query: its k heaviest neighbours (of equal ones the first), then ``route_numeric``."""
    betas = similarity_weights(query, corpus)
    nearest = torch.sort(betas, descending=True, stable=True).indices[:k].tolist()
    return route_numeric([float(betas[i]) for i in nearest], [labels[i] for i in nearest])


def route_by_product(query: Tensor, corpus: Tensor, labels: Sequence[int], k: int) -> float:
    """The same as ``route_one``, with all cosines from one product; corpus (m, d) of unit length."""
    betas = torch.exp(1 + corpus @ (query / torch.linalg.norm(query)))
    nearest = torch.sort(betas, descending=True, stable=True).indices[:k].tolist()
    return route_numeric([float(betas[i]) for i in nearest], [labels[i] for i in nearest])
