"""Target values by gradient descent, one request at a time: MEMIT's, ROME's and PMET's."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reference.models import (
    added,
    architecture,
    attention_of,
    block_of,
    frozen,
    full_precision,
    projection_of,
    recorded_output,
    weight_name,
    weight_of,
)
from benchmarks.reference.tokens import (
    Templates,
    contexts,
    encode,
    filled,
    padded,
    subject_last_index,
    target_ids,
)
from editors.api import EditRequest


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """Settings of the target optimisation, by the names of ``target_value``'s arguments."""

    steps: int
    lr: float
    clamp: float
    kl: float = 0.0625
    decay: float = 0.5
    loss_layer: int | None = None


@dataclass(frozen=True)
class TargetResult:
    """What the optimisation of one request found."""

    z: Tensor  # (d_out,), h_init + delta
    delta: Tensor  # (d_out,)
    h_init: Tensor  # (d_out,)
    losses: list[float]  # total, at every evaluated step
    parts: list[tuple[float, float, float]]  # weighted NLL, KL and decay, at every evaluated step
    updates: int
    probability: float  # mean over rows of exp(-NLL), at the last evaluated step


@dataclass(frozen=True)
class PmetResult:
    """The same with one vector for the MLP and one for attention."""

    mlp: TargetResult  # losses, parts, updates and probability are those of both
    attention: TargetResult


def target_value(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    templates: Templates,
    *,
    layer: int,
    steps: int,
    lr: float,
    clamp: float,
    kl: float = 0.0625,
    decay: float = 0.5,
    loss_layer: int | None = None,
) -> TargetResult:
    """The residual-stream value at the subject that makes the model say the target (MEMIT, AlphaEdit).

    Minimises over delta, added to the output of block ``layer`` at the subject's last token of every row,
    the mean over rows of the target's mean NLL, plus ``kl`` times KL(now || at first) at the subject of
    "... is a", plus ``decay`` times |delta| / |h_init|^2. Adam; stops below 0.05; after each update delta
    is scaled back to at most ``clamp`` |h_init|. With ``loss_layer`` None the loss comes from the model's
    logits, else from final norm and head on that block's output.
    """
    settings = TargetSettings(steps=steps, lr=lr, clamp=clamp, kl=kl, decay=decay, loss_layer=loss_layer)
    modules = [block_of(model, layer)]
    return _optimise(model, tokenizer, request, templates, modules, layer=layer, settings=settings)[0]


def rome_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    templates: Sequence[str],
    *,
    layer: int,
    settings: TargetSettings,
) -> TargetResult:
    """v* = h_init + delta: as ``target_value``, with delta added to the output of the MLP's projection.

    ``templates`` is ROME's flat list, "{}" among them; ``h_init`` and the clamp belong to that output.
    """
    modules = [projection_of(model, layer)]
    return _optimise(model, tokenizer, request, [templates], modules, layer=layer, settings=settings)[0]


def pmet_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    templates: Templates,
    *,
    layer: int,
    settings: TargetSettings,
    nll_factor: float = 1.0,
) -> PmetResult:
    """Two vectors, held by one Adam: on the MLP's output projection and on that of attention.

    Each has its own ``h_init``, clamp and term of decay. The NLL counts ``nll_factor`` times, at first and
    as long as a target token is not the most likely one in some row; else a tenth of that in the next step,
    and the loop ends if the weighted KL is at most 0.01.
    """
    modules = [projection_of(model, layer), attention_of(model, layer)]
    mlp, attention = _optimise(
        model,
        tokenizer,
        request,
        templates,
        modules,
        layer=layer,
        settings=settings,
        nll_factor=nll_factor,
        eased_when_right=True,
    )
    return PmetResult(mlp, attention)


def _optimise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EditRequest,
    templates: Templates,
    modules: Sequence[nn.Module],
    *,
    layer: int,
    settings: TargetSettings,
    nll_factor: float = 1.0,
    eased_when_right: bool = False,
) -> list[TargetResult]:
    """One vector for each module, added to its output at the subject's last token of every row."""
    bare = [template for group in templates for template in group].index("{}")
    lens = None if settings.loss_layer is None else max(settings.loss_layer, layer)

    with frozen(model), torch.enable_grad():
        batch, positions, wanted, scored = _rows(tokenizer, request, templates, model.device)
        count = scored[0].sum()  # T
        deltas = [_zero(model, layer) for _ in modules]
        optimizer = torch.optim.Adam(deltas, lr=settings.lr)
        first_outputs: list[list[Tensor]] = [[] for _ in modules]
        first_log_p: Tensor | None = None
        losses: list[float] = []
        parts: list[tuple[float, float, float]] = []
        updates = 0
        factor = nll_factor
        for step in range(settings.steps):
            with ExitStack() as hooks:
                for module, delta, first in zip(modules, deltas, first_outputs, strict=True):
                    hooks.enter_context(added(module, delta, positions, first))
                logits = logits_of(model, batch, lens)
            initial = [full_precision(first[0][bare, positions[bare]]) for first in first_outputs]
            log_p = torch.log_softmax(full_precision(logits), dim=-1)

            # As the reference does: read one token at every position, keep the last T real ones.
            read = log_p[:-1].gather(2, wanted.unsqueeze(2)).squeeze(2)
            nll = -read.masked_fill(~scored, 0).sum(dim=1) / count

            now = log_p[-1, positions[-1]]
            if first_log_p is None:
                first_log_p = now.detach().clone()
            divergence = settings.kl * (now.exp() * (now - first_log_p)).sum()
            terms = [
                torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(init) ** 2
                for delta, init in zip(deltas, initial, strict=True)
            ]
            restraint = settings.decay * torch.stack(terms).sum()
            loss = factor * nll.mean() + divergence + restraint
            losses.append(loss.item())
            parts.append((factor * nll.mean().item(), divergence.item(), restraint.item()))
            probability = nll.neg().exp().mean().item()
            if loss.item() < 0.05 or step == settings.steps - 1:
                break
            if eased_when_right:
                right = bool((log_p[:-1].argmax(dim=-1) == wanted)[scored].all())
                if right and divergence.item() <= 0.01:
                    break
                factor = 0.1 * nll_factor if right else nll_factor

            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            updates += 1
            for delta, init in zip(deltas, initial, strict=True):
                _clamp(delta, settings.clamp * torch.linalg.vector_norm(init))

    return [
        TargetResult(init + found, found, init, losses, parts, updates, probability)
        for init, found in zip(initial, (delta.detach().clone() for delta in deltas), strict=True)
    ]


def _rows(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, templates: Templates, device: torch.device
) -> tuple[dict[str, Tensor], list[int], Tensor, Tensor]:
    """The rewriting rows and, last, the KL row.

    returns: the padded batch; the subject's last token in each row; for the rewriting rows the token each
    position predicts and whether it is one of the target's, both (rows, tokens)
    """
    ids = target_ids(tokenizer, request.target_new)
    prompts = [*contexts(request.prompt, templates), "{} is a"]
    rows = [encode(tokenizer, filled(prompt, request.subject)) for prompt in prompts]
    rows = [row + ids[:-1] for row in rows[:-1]] + rows[-1:]
    positions = [subject_last_index(tokenizer, prompt, request.subject) for prompt in prompts]
    batch = padded(tokenizer, rows, device)
    wanted = torch.zeros_like(batch["input_ids"][:-1])
    scored = torch.zeros_like(wanted, dtype=torch.bool)
    for row, row_ids in enumerate(rows[:-1]):
        for t, token in enumerate(ids):
            wanted[row, len(row_ids) - len(ids) + t] = token
            scored[row, len(row_ids) - len(ids) + t] = True
    return batch, positions, wanted, scored


@torch.no_grad()
def _clamp(delta: Tensor, limit: Tensor) -> None:
    """Scale a vector back to a norm if it is longer."""
    norm = torch.linalg.vector_norm(delta)
    if norm > limit:
        delta.mul_(limit / norm)


def _zero(model: PreTrainedModel, layer: int) -> Tensor:
    """A vector to optimise, (d_out,), float64 for a float64 model, else float32."""
    dtype = torch.promote_types(model.get_parameter(weight_name(model, layer)).dtype, torch.float32)
    d_out = weight_of(model, layer).shape[0]
    return torch.zeros(d_out, dtype=dtype, device=model.device, requires_grad=True)


def logits_of(model: PreTrainedModel, batch: Mapping[str, Tensor], loss_layer: int | None) -> Tensor:
    """Logits at every position: the model's own, or final norm, head and soft cap on a block's output."""
    if loss_layer is None:
        own: Tensor = model(**batch, use_cache=False).logits
        return own
    parts = architecture(model)
    with recorded_output(block_of(model, loss_layer)) as seen:
        model(**batch, use_cache=False)
    lens: Tensor = model.get_submodule(parts.head)(model.get_submodule(parts.norm)(seen[0]))
    cap = model.config.final_logit_softcapping if parts.soft_capped else None
    return lens if cap is None else cap * torch.tanh(lens / cap)


def target_values(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layer: int,
    settings: TargetSettings,
) -> Tensor:
    """Z, one column per request: (d_out, n)."""
    found = [
        target_value(model, tokenizer, request, templates, layer=layer, **vars(settings)).z
        for request in requests
    ]
    return torch.stack(found, dim=1)


def pmet_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    *,
    layer: int,
    settings: TargetSettings,
    nll_factor: float = 1.0,
) -> Tensor:
    """PMET's values of the MLP's output, the only ones it uses: (d_out, n)."""
    found = [
        pmet_target(
            model, tokenizer, request, templates, layer=layer, settings=settings, nll_factor=nll_factor
        ).mlp.z
        for request in requests
    ]
    return torch.stack(found, dim=1)
