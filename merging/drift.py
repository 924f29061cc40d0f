"""How far a change moves what a weight does to the keys that should be preserved."""

import torch
from torch import Tensor


def preserved_key_drift(delta: Tensor, weight: Tensor, covariance: Tensor) -> float:
    """Relative size of the change on preserved keys, sqrt(tr(tau C tau^T) / tr(W C W^T)).

    delta:      tau, (d_out, d_in); pruned or not.
    weight:     W, (d_out, d_in), before any edit.
    covariance: C, (d_in, d_in), uncentered second moment of the preserved keys; its dtype and device are
                those of the products, sums are float64.

    A projected update has drift near zero (Delta = Delta P); pruning it raises the drift.
    """

    def energy(matrix: Tensor) -> float:
        matrix = matrix.to(covariance)
        return float(((matrix @ covariance) * matrix).sum(dtype=torch.float64))

    reference = energy(weight)
    if reference <= 0:
        raise ValueError("the weight is zero on every preserved key, so drift relative to it has no meaning")
    return float((max(energy(delta), 0.0) / reference) ** 0.5)
