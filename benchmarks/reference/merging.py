"""Merging and its masks, by the literal equations."""

import torch
from torch import Tensor


def _min_max(values: Tensor) -> Tensor:
    """Affinely to [0, 1]; all zero when all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def top(scores: Tensor, share: float) -> Tensor:
    """Mask of the round(share * D) largest scores, of equal ones those with the lowest flat index."""
    count = round(share * scores.numel())
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


def mask_literal(tau: Tensor, ratio: float) -> Tensor:
    """Keep the top 1 - ratio of W_self = softmax(Normalize(tau * tau)), in float64, over all entries.

    Meant for small tensors: where squares differ by less than about 1e-16 of the largest, the softmax
    cannot tell them apart any more.
    """
    h = _min_max(tau.double() * tau.double())
    return top(torch.softmax(h.flatten(), dim=0).reshape(tau.shape), 1 - ratio)


def row_wise_variant(tau: Tensor, ratio: float) -> Tensor:
    """The reading to reject: normalise and softmax every row by itself, then select over the whole tensor."""
    h = torch.stack([_min_max(row) for row in tau.double() * tau.double()])
    return top(torch.softmax(h, dim=1), 1 - ratio)


def merge_literal(base: Tensor, *taus: Tensor, ratio: float) -> Tensor:
    """base + Pr_1 tau_1 + Pr_2 tau_2 + ..., task vectors as given, in the dtype of ``base``."""
    merged = base.clone()
    for tau in taus:
        merged = merged + mask_literal(tau, ratio) * tau
    return merged


def merge_shadow(base: Tensor, *deltas: Tensor, ratio: float) -> Tensor:
    """The merged model following an unmerged chain: tau_t = M_t - merged_{t-1}, M_t = M_{t-1} + delta_t."""
    model = base.clone()
    merged = base.clone()
    for delta in deltas:
        model = model + delta
        tau = model - merged
        merged = merged + mask_literal(tau, ratio) * tau
    return merged
