"""Closed-form updates by direct float64 solves, every key and state taken afresh.

``memit_batch`` and its like return what was added to each parameter in its stored shape and dtype, the others
what changed in it, in its stored shape, in float64. All change the model in place.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reference.keys import block_states, keys, mlp_outputs
from benchmarks.reference.merging import top
from benchmarks.reference.models import (
    architecture,
    bias_of,
    change_weight,
    changes,
    weight_name,
    weight_of,
)
from benchmarks.reference.targets import TargetSettings, pmet_targets, rome_target, target_values
from benchmarks.reference.tokens import Templates
from editors.api import EditRequest

Covariance = Callable[[int], Tensor]  # layer -> (d_in, d_in)
Solve = Callable[[int, Tensor, Tensor], Tensor]  # layer, keys, residual -> (d_out, d_in)
Prune = Callable[[Tensor, Tensor], Tensor]  # change and weight, both as stored -> the change to make


@dataclass
class KeyMemory:
    """C_p of every layer: the sum of k k^T over the keys of all earlier batches."""

    moments: dict[int, Tensor] = field(default_factory=dict)  # layer -> (d_in, d_in), float64

    def moment(self, layer: int, like: Tensor) -> Tensor:
        """C_p, zero before the first batch; ``like`` is any (d_in, n) matrix of keys."""
        return self.moments.get(layer, like.new_zeros(like.shape[0], like.shape[0]))

    def add(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        templates: Templates,
        layers: Sequence[int],
    ) -> None:
        """Add the batch's keys as the model, already edited in all layers, gives them now."""
        for layer in layers:
            k = keys(model, tokenizer, requests, templates, layer).double()
            self.moments[layer] = self.moment(layer, k) + k @ k.T


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    zs: Tensor,
    solve: Solve,
    states: Callable[..., Tensor] = block_states,
    divisor: Callable[[float], float] = float,
    prune: Prune | None = None,
) -> dict[str, Tensor]:
    """Layer by layer upwards, give each a share of what is still missing at the last one.

    Keys and states are taken afresh with the lower layers already changed; weights change in place. What is
    missing is divided by ``divisor`` of the number of layers left.
    returns: what was added to each parameter, in its stored shape and dtype
    """
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers {list(layers)} are not ascending")
    deltas: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        k = keys(model, tokenizer, requests, templates, layer).double()
        h = states(model, tokenizer, requests, layers[-1]).double()
        residual = (zs.to(h) - h) / divisor(len(layers) - i)
        change = solve(layer, k, residual)
        if prune is not None:
            change = _as_stored(model, prune(_as_stored(model, change), _stored_weight(model, layer)))
        deltas[weight_name(model, layer)] = change_weight(model, layer, change)
    return deltas


def _as_stored(model: PreTrainedModel, change: Tensor) -> Tensor:
    """From (d_out, d_in) to the stored layout, or back."""
    return change.T if architecture(model).transposed else change


def _stored_weight(model: PreTrainedModel, layer: int) -> Tensor:
    return model.get_parameter(weight_name(model, layer)).detach()


def _targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    settings: TargetSettings | None,
    zs: Tensor | None,
) -> Tensor:
    if zs is not None:
        return zs
    if settings is None:
        raise ValueError("neither target settings nor target values were given")
    return target_values(model, tokenizer, requests, templates, layer=layers[-1], settings=settings)


def _memit_solve(covariances: Covariance, weight: float, memory: KeyMemory | None = None) -> Solve:
    """Delta = R K^T (weight C + C_p + K K^T)^-1."""

    def solve(layer: int, k: Tensor, residual: Tensor) -> Tensor:
        system = weight * covariances(layer).to(k) + k @ k.T
        if memory is not None:
            system = system + memory.moment(layer, k)
        change: Tensor = residual @ torch.linalg.solve(system, k).T
        return change

    return solve


def _alphaedit_solve(projectors: Covariance, ridge: float, memory: KeyMemory) -> Solve:
    """[P (K K^T + C_p) + ridge I] X = P K R^T; Delta = X^T."""

    def solve(layer: int, k: Tensor, residual: Tensor) -> Tensor:
        projector = projectors(layer).to(k)
        identity = torch.eye(k.shape[0], dtype=k.dtype, device=k.device)
        system = projector @ (k @ k.T + memory.moment(layer, k)) + ridge * identity
        change: Tensor = torch.linalg.solve(system, projector @ k @ residual.T).T
        return change

    return solve


def memit_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    covariances: Covariance,
    weight: float,
    settings: TargetSettings | None = None,
    zs: Tensor | None = None,
    memory: KeyMemory | None = None,
) -> dict[str, Tensor]:
    """Delta = R K^T (weight C + C_p + K K^T)^-1 at each layer; C_p is zero without a ``memory``."""
    zs = _targets(model, tokenizer, requests, templates, layers=layers, settings=settings, zs=zs)

    solve = _memit_solve(covariances, weight, memory)
    deltas = _write(model, tokenizer, requests, templates, layers=layers, zs=zs, solve=solve)
    if memory is not None:
        memory.add(model, tokenizer, requests, templates, layers)
    return deltas


def memit_seq_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    covariances: Covariance,
    weight: float,
    memory: KeyMemory,
    settings: TargetSettings | None = None,
    zs: Tensor | None = None,
) -> dict[str, Tensor]:
    """MEMIT that also protects the keys of earlier batches, which ``memory`` holds and takes up."""
    return memit_batch(
        model,
        tokenizer,
        requests,
        templates,
        layers=layers,
        covariances=covariances,
        weight=weight,
        settings=settings,
        zs=zs,
        memory=memory,
    )


def nullspace_projector(second_moment: Tensor, threshold: float) -> Tensor:
    """P = U U^T over the eigenvectors of C whose eigenvalue is strictly below the threshold."""
    values, vectors = torch.linalg.eigh(second_moment.double())
    projector = torch.zeros_like(second_moment, dtype=torch.float64)
    for value, vector in zip(values, vectors.T, strict=True):
        if value < threshold:
            projector += torch.outer(vector, vector)
    return projector


def alphaedit_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    projectors: Covariance,
    ridge: float,
    memory: KeyMemory,
    settings: TargetSettings | None = None,
    zs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Solve [P (K K^T + C_p) + ridge I] X = P K R^T at each layer; Delta = X^T.

    ``projectors`` gives P of a layer, from the unedited model.
    """
    zs = _targets(model, tokenizer, requests, templates, layers=layers, settings=settings, zs=zs)

    solve = _alphaedit_solve(projectors, ridge, memory)
    deltas = _write(model, tokenizer, requests, templates, layers=layers, zs=zs, solve=solve)
    memory.add(model, tokenizer, requests, templates, layers)
    return deltas


def emmet_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    covariances: Covariance,
    weight: float,
    identity_weight: float = 0.0,
    ridge: float = 0.1,
    settings: TargetSettings | None = None,
    zs: Tensor | None = None,
) -> dict[str, Tensor]:
    """Delta = R (K^T C'^-1 K + ridge I)^-1 K^T C'^-1 with C' = weight C + identity_weight I (EMMET).

    ``ridge`` counts only for more than one request.
    """
    zs = _targets(model, tokenizer, requests, templates, layers=layers, settings=settings, zs=zs)

    def solve(layer: int, k: Tensor, residual: Tensor) -> Tensor:
        d_in, n = k.shape
        system = weight * covariances(layer).to(k) + identity_weight * torch.eye(d_in).to(k)
        y = torch.linalg.solve(system, k)  # C'^-1 K
        small = k.T @ y + (ridge if n > 1 else 0.0) * torch.eye(n).to(k)
        change: Tensor = residual @ torch.linalg.solve(small, y.T)
        return change

    with changes(model, [weight_name(model, layer) for layer in layers]) as found:
        _write(model, tokenizer, requests, templates, layers=layers, zs=zs, solve=solve)
    return found


def pmet_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    covariances: Covariance,
    weight: float,
    settings: TargetSettings | None = None,
    nll_factor: float = 1.0,
    zs: Tensor | None = None,
) -> dict[str, Tensor]:
    """MEMIT's solve, spread by the square root of the layers left, towards values of the MLP's output.

    The residual is what the output of the last layer's MLP projection still misses. ``zs`` are such values,
    (d_out, n).
    """
    if zs is None:
        if settings is None:
            raise ValueError("neither target settings nor target values were given")
        zs = pmet_targets(
            model, tokenizer, requests, templates, layer=layers[-1], settings=settings, nll_factor=nll_factor
        )
    with changes(model, [weight_name(model, layer) for layer in layers]) as found:
        _write(
            model,
            tokenizer,
            requests,
            templates,
            layers=layers,
            zs=zs,
            solve=_memit_solve(covariances, weight),
            states=mlp_outputs,
            divisor=math.sqrt,
        )
    return found


def rome_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    *,
    layer: int,
    covariance: Tensor | None,
    robust: bool,
    use_covariance: bool,
    settings: TargetSettings | None = None,
    values: Tensor | None = None,
) -> dict[str, Tensor]:
    """Delta = (v* - W k0) u^T / (k0^T u), u along C^-1 k, one request after another (ROME).

    k is the key's mean over ``templates``, ROME's flat list, "{}" among them; k0 is the key of the bare
    prompt, or, if ``robust``, k as well (R-ROME). W k0 stands for the projection's output, its bias
    included. Without ``use_covariance``, u is along k. ``values`` gives the v* instead, (d_out, n).
    """
    if use_covariance and covariance is None:
        raise ValueError("use_covariance is set, but no covariance was given")
    with changes(model, [weight_name(model, layer)]) as found:
        for column, request in enumerate(requests):
            if values is not None:
                v = values[:, column : column + 1].double()
            elif settings is not None:
                target = rome_target(model, tokenizer, request, templates, layer=layer, settings=settings)
                v = target.z.double().unsqueeze(1)
            else:
                raise ValueError("neither target settings nor target values were given")
            k = keys(model, tokenizer, [request], [templates], layer).double()
            k0 = k if robust else keys(model, tokenizer, [request], [["{}"]], layer).double()
            u = torch.linalg.solve(covariance.to(k), k) if use_covariance and covariance is not None else k
            u = u / torch.linalg.vector_norm(u)
            output = weight_of(model, layer) @ k0 + bias_of(model, layer)
            change_weight(model, layer, (v - output) @ u.T / (k0.T @ u))
    return found


def rect_prune(delta: Tensor, weight: Tensor, share: float) -> Tensor:
    """Keep the round(share * D) entries largest in |delta| / (|weight| + 1e-8), zero elsewhere.

    Of equal ratios those with the lowest flat index stay, in the layout given.
    """
    ratio = delta.double().abs() / (weight.double().abs() + 1e-8)
    return torch.where(top(ratio, share), delta, torch.zeros_like(delta))


def rect_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    covariances: Covariance,
    weight: float,
    share: float = 0.4,
    during_walk: bool = False,
    settings: TargetSettings | None = None,
    zs: Tensor | None = None,
) -> dict[str, Tensor]:
    """MEMIT with ``rect_prune`` on every layer's change, against the weights before the batch (RECT).

    The layers are walked with the unpruned changes and pruned at the end, or, ``during_walk``, each before
    the next is computed.
    """
    zs = _targets(model, tokenizer, requests, templates, layers=layers, settings=settings, zs=zs)
    prune = partial(rect_prune, share=share)
    solve = _memit_solve(covariances, weight)
    names = [weight_name(model, layer) for layer in layers]
    with changes(model, names) as found:
        before = {name: model.get_parameter(name).detach().clone() for name in names}
        walked = _write(
            model,
            tokenizer,
            requests,
            templates,
            layers=layers,
            zs=zs,
            solve=solve,
            prune=prune if during_walk else None,
        )
        if not during_walk:
            with torch.no_grad():
                for name, delta in walked.items():
                    model.get_parameter(name).copy_(before[name] + prune(delta, before[name]))
    return found


def prune_weights(
    base: Tensor, edited: Tensor, log_base: float = math.e, legacy_double_apply: bool = False
) -> Tensor:
    """PRUNE: the change between two weights with its singular values above the largest of ``base`` drawn in.

    Those, s > s_max, become log(s) - log(s_max) + s_max; the others stay. ``legacy_double_apply`` adds the
    restrained change to ``edited`` instead of ``base``. Either layout; returns float64.
    """
    base, edited = base.double(), edited.double()
    largest = torch.linalg.svdvals(base)[0].item()
    u, values, vh = torch.linalg.svd(edited - base, full_matrices=False)
    restrained = torch.zeros_like(base)
    for i, value in enumerate(values.tolist()):
        if value > largest:
            value = math.log(value, log_base) - math.log(largest, log_base) + largest  # noqa: PLW2901
        restrained += value * torch.outer(u[:, i], vh[i])
    return (edited if legacy_double_apply else base) + restrained


def blue_memit_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    covariances: Covariance,
    weight: float,
    settings: TargetSettings,
) -> dict[str, Tensor]:
    """MEMIT's solve in two layers, each with target values of its own (BLUE, arXiv 2502.03748)."""
    solve = _memit_solve(covariances, weight)
    return _write_two(model, tokenizer, requests, templates, layers=layers, settings=settings, solve=solve)


def blue_alphaedit_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    projectors: Covariance,
    ridge: float,
    memory: KeyMemory,
    settings: TargetSettings,
) -> dict[str, Tensor]:
    """The same with AlphaEdit's solve; its memory takes up the keys of both layers after the batch."""
    solve = _alphaedit_solve(projectors, ridge, memory)
    found = _write_two(model, tokenizer, requests, templates, layers=layers, settings=settings, solve=solve)
    memory.add(model, tokenizer, requests, templates, layers)
    return found


def _write_two(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layers: Sequence[int],
    settings: TargetSettings,
    solve: Solve,
) -> dict[str, Tensor]:
    """In each layer, lower one first, move that layer's own block output all the way to its own targets.

    The second layer's targets, keys and states are those of the model with the first one changed.
    """
    if len(layers) != 2 or layers[0] >= layers[1]:
        raise ValueError(f"layers {list(layers)} are not two layers, lower one first")
    with changes(model, [weight_name(model, layer) for layer in layers]) as found:
        for layer in layers:
            zs = target_values(model, tokenizer, requests, templates, layer=layer, settings=settings)
            k = keys(model, tokenizer, requests, templates, layer).double()
            residual = zs.double() - block_states(model, tokenizer, requests, layer).double()
            change_weight(model, layer, solve(layer, k, residual))
    return found
