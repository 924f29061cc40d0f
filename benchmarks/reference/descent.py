"""Editors that follow the gradient of the target's loss: fine-tuning and UltraEdit, one text at a time."""

from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reference.models import (
    architecture,
    changes,
    frozen,
    full_precision,
    recorded_input,
    recorded_output,
)
from benchmarks.reference.tokens import encode, filled, target_ids
from editors.api import EditRequest


def target_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    objective: str = "target_new",
) -> Tensor:
    """-log p of every target token, (T,), with its gradient.

    "target_new": each read after the ones before it; "prompt_last": all read at the prompt's last token.
    """
    prompt = encode(tokenizer, filled(request.prompt, request.subject))
    ids = target_ids(tokenizer, request.target_new)
    if objective == "prompt_last":
        row, places = prompt, [len(prompt) - 1] * len(ids)
    elif objective == "target_new":
        row, places = prompt + ids[:-1], [len(prompt) - 1 + t for t in range(len(ids))]
    else:
        raise ValueError(f"unknown objective {objective!r}; known: ['prompt_last', 'target_new']")
    logits = model(torch.tensor([row], device=model.device), use_cache=False).logits[0]
    log_p = torch.log_softmax(full_precision(logits), dim=-1)
    return torch.stack([-log_p[place, token] for place, token in zip(places, ids, strict=True)])


def ft_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    layer: int,
    steps: int = 25,
    lr: float = 5e-4,
    weight_decay: float = 0.0,
    norm_constraint: float | None = None,
    objective: str = "prompt_last",
    stop_loss: float = 1e-2,
    minibatch: int = 64,
) -> dict[str, Tensor]:
    """A fresh Adam on every parameter of one MLP output projection, its bias included (FT).

    ``steps`` epochs over minibatches in the order given. A minibatch's loss is the mean over its requests of
    the mean over target tokens of -log p; below ``stop_loss`` it takes no step, and an epoch whose mean,
    weighted by the minibatches' sizes, is below it is the last. After every minibatch each entry is brought
    back to within ``norm_constraint`` of its value before the batch.
    returns: what changed in each parameter, in its stored shape, in float64
    """
    parts = architecture(model)
    path = f"{parts.block.format(layer)}.{parts.projection}."
    named = {name: value for name, value in model.named_parameters() if name.startswith(path)}
    before = {name: value.detach().clone() for name, value in named.items()}
    with changes(model, list(named)) as found, frozen(model), torch.enable_grad():
        for parameter in named.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(list(named.values()), lr=lr, weight_decay=weight_decay)
        for _ in range(steps):
            total = 0.0
            for first in range(0, len(requests), minibatch):
                part = requests[first : first + minibatch]
                nlls = [target_nll(model, tokenizer, request, objective).mean() for request in part]
                loss = torch.stack(nlls).mean()
                total += loss.item() * len(part)
                if loss.item() >= stop_loss:
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                if norm_constraint is not None:
                    with torch.no_grad():
                        for name, value in named.items():
                            value.clamp_(before[name] - norm_constraint, before[name] + norm_constraint)
            if total / len(requests) < stop_loss:
                break
        optimizer.zero_grad(set_to_none=True)
    return found


@dataclass
class FeatureHistory:
    """All features [h, g] UltraEdit has seen, from which it takes their moments in one pass."""

    features: dict[Hashable, Tensor] = field(default_factory=dict)  # module or shape -> (N, d_in + d_out)

    def add(self, key: Hashable, features: Tensor) -> None:
        earlier = self.features.get(key, features[:0])
        self.features[key] = torch.cat([earlier, features])

    def moments(self, key: Hashable) -> tuple[int, Tensor, Tensor]:
        """Count, mean and population variance of each feature."""
        seen = self.features[key]
        mean = seen.mean(dim=0)
        return len(seen), mean, (seen - mean).pow(2).mean(dim=0)


def answer_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    modules: Sequence[str],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per module its inputs h (N, d_in) and the loss's gradients g (N, d_out) by its outputs, in float64.

    Both at the N positions that predict a target token, request by request; the loss is the mean of -log p
    over all of these.
    """
    ids = [target_ids(tokenizer, request.target_new) for request in requests]
    count = sum(len(target) for target in ids)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in modules}
    with frozen(model), torch.enable_grad():
        for path in modules:
            model.get_parameter(f"{path}.weight").requires_grad_(True)  # so that its output has a gradient
        for request, target in zip(requests, ids, strict=True):
            with ExitStack() as hooks:
                taken = [hooks.enter_context(recorded_input(model.get_submodule(path))) for path in modules]
                given = [hooks.enter_context(recorded_output(model.get_submodule(path))) for path in modules]
                loss = target_nll(model, tokenizer, request).sum() / count
            gradients = torch.autograd.grad(loss, [output[0] for output in given])
            for path, h, g in zip(modules, taken, gradients, strict=True):
                found[path][0].append(h[0][0, -len(target) :].detach().double())
                found[path][1].append(g[0, -len(target) :].double())
    return {path: (torch.cat(h), torch.cat(g)) for path, (h, g) in found.items()}


def ultraedit_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    modules: Sequence[str],
    state: FeatureHistory,
    learning_rate: float = 1e-6,
    ridge: float = 1.0,
    shared: bool,
) -> dict[str, Tensor]:
    """UltraEdit (arXiv 2505.14679): (H^T H + ridge I)^-1 H^T V in every module, by one linear solve.

    V's rows are -learning_rate |h^|^2 g^, with h^ and g^ the features normalised by the moments of all that
    ``state`` has seen, this batch included; H is not normalised. The moments belong to the module or, if
    ``shared``, to all modules of its shape (d_in, d_out). Everything is taken before any weight changes.
    ``modules`` are paths. The loss is one mean over the batch; the authors' code takes minibatches of ten.
    returns: what changed in each parameter, in its stored shape, in float64
    """
    features = answer_features(model, tokenizer, requests, modules)

    def key(path: str) -> Hashable:
        h, g = features[path]
        return (h.shape[1], g.shape[1]) if shared else path

    for path, (h, g) in features.items():
        state.add(key(path), torch.cat([h, g], dim=1))

    with changes(model, [f"{path}.weight" for path in modules]) as found, torch.no_grad():
        for path, (h, g) in features.items():
            d_in = h.shape[1]
            count, mean, variance = state.moments(key(path))
            deviation = torch.sqrt(variance * count / max(count - 1, 1))  # of the sample
            normal = (torch.cat([h, g], dim=1) - mean) / (deviation + 2.0**-23)
            v = torch.stack([-learning_rate * row[:d_in].pow(2).sum() * row[d_in:] for row in normal])
            shift = torch.linalg.solve(h.T @ h + ridge * torch.eye(d_in).to(h), h.T @ v)  # (d_in, d_out)
            weight = model.get_parameter(f"{path}.weight")
            linear = isinstance(model.get_submodule(path), nn.Linear)  # else stored as (d_in, d_out)
            weight.add_((shift.T if linear else shift).to(weight.dtype))
    return found
