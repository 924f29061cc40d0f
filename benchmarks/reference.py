"""Knowledge editing one request at a time: the slow baseline of the benchmarks and the oracle of the tests.

Every function follows the equations literally, with full forward passes, direct float64 solves and no
caching. Nothing here is shared with the editors, so that an error there cannot hide.

Shapes: ``d_in`` width of the edited projection's input, ``d_out`` width of the residual stream,
``n`` requests.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.api import EditRequest

Templates = Sequence[Sequence[str]]  # groups of contexts, each with one {} where the prompt stands
Covariance = Callable[[int], Tensor]  # layer -> (d_in, d_in)
Solve = Callable[[int, Tensor, Tensor], Tensor]  # layer, keys, residual -> (d_out, d_in)


# Models


@dataclass(frozen=True)
class Architecture:
    """Where the parts of one model type are and how the edited weight is stored."""

    block: str
    projection: str  # inside the block
    transposed: bool  # weight stored as (d_in, d_out)
    norm: str
    head: str


_LLAMA = Architecture("model.layers.{}", "mlp.down_proj", False, "model.norm", "lm_head")
ARCHITECTURES = {
    "gpt2": Architecture("transformer.h.{}", "mlp.c_proj", True, "transformer.ln_f", "lm_head"),
    "gptj": Architecture("transformer.h.{}", "mlp.fc_out", False, "transformer.ln_f", "lm_head"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def architecture(model: PreTrainedModel) -> Architecture:
    """The row of the table above for this model."""
    model_type = model.config.model_type
    if model_type not in ARCHITECTURES:
        raise ValueError(f"no architecture for model type {model_type!r}; known: {sorted(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]


def weight_name(model: PreTrainedModel, layer: int) -> str:
    """Name of the edited parameter of a block."""
    parts = architecture(model)
    return f"{parts.block.format(layer)}.{parts.projection}.weight"


def _block(model: PreTrainedModel, layer: int) -> nn.Module:
    return model.get_submodule(architecture(model).block.format(layer))


def _projection(model: PreTrainedModel, layer: int) -> nn.Module:
    return _block(model, layer).get_submodule(architecture(model).projection)


def _tensor(output: Any) -> Tensor:
    """A block's hidden state; some model types return it in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and no gradients of weights, all as before afterwards."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    nn.Module.train(model, False)
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)


@contextmanager
def _recorded_output(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(_tensor(output))

    handle = module.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _recorded_input(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _added(
    module: nn.Module, delta: Tensor, positions: Sequence[int], before: list[Tensor]
) -> Iterator[None]:
    """Add ``delta`` to the module's output at one position of every row; keep the first output unchanged."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = _tensor(output)
        if not before:
            before.append(hidden.detach().clone())
        changed = hidden.clone()
        for row, position in enumerate(positions):
            changed[row, position] = changed[row, position] + delta
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _full_precision(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype is torch.float64 else values.float()


# Tokens


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text with the special tokens the tokenizer adds by itself."""
    return list(tokenizer(text)["input_ids"])


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Ids of a continuation: one space in front if there is none, no special tokens."""
    text = target if target.startswith(" ") else f" {target}"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def filled(prompt: str, subject: str) -> str:
    """The prompt with the subject where its one {} stands."""
    before, after = prompt.split("{}")
    return before + subject + after


def subject_last_index(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str) -> int:
    """Position of the subject's last token: length of everything up to the subject's end, minus one."""
    before, _after = prompt.split("{}")
    return len(encode(tokenizer, before + subject)) - 1


def padded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], device: torch.device
) -> dict[str, Tensor]:
    """Rows of ids padded on the right, with their attention mask."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(len(row) for row in rows)
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _contexts(prompt: str, templates: Templates) -> list[str]:
    """The prompt inside every template, the subject's {} still open."""
    return [filled(template, prompt) for group in templates for template in group]


# Target values


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
    parts: list[tuple[float, float, float]]  # NLL, weighted KL, weighted decay, at every evaluated step
    updates: int
    probability: float  # mean over rows of exp(-NLL), at the last evaluated step


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
    """The residual-stream value at the subject that makes the model say the target.

    Minimises over delta, added to the output of block ``layer`` at the subject's last token of every row,
    the mean over rows of the target's mean NLL, plus ``kl`` times KL(now || at first) at the subject of
    "... is a", plus ``decay`` times |delta| / |h_init|^2. Adam; stops below 0.05; after each update delta
    is scaled back to at most ``clamp`` |h_init|. With ``loss_layer`` None the loss comes from the model's
    logits, else from final norm and head on that block's output.
    """
    ids = target_ids(tokenizer, request.target_new)
    prompts = _contexts(request.prompt, templates)
    rows = [encode(tokenizer, filled(prompt, request.subject)) + ids[:-1] for prompt in prompts]
    rows.append(encode(tokenizer, filled("{} is a", request.subject)))
    positions = [subject_last_index(tokenizer, prompt, request.subject) for prompt in [*prompts, "{} is a"]]
    bare = [template for group in templates for template in group].index("{}")

    with _frozen(model), torch.enable_grad():
        batch = padded(tokenizer, rows, model.device)
        projection = model.get_parameter(weight_name(model, layer))
        delta = torch.zeros(
            projection.shape[1 if architecture(model).transposed else 0],
            dtype=torch.promote_types(projection.dtype, torch.float32),
            device=projection.device,
            requires_grad=True,
        )
        wanted = torch.zeros_like(batch["input_ids"][:-1])
        scored = torch.zeros_like(wanted, dtype=torch.bool)
        for row, row_ids in enumerate(rows[:-1]):
            for t, token in enumerate(ids):
                wanted[row, len(row_ids) - len(ids) + t] = token
                scored[row, len(row_ids) - len(ids) + t] = True
        optimizer = torch.optim.Adam([delta], lr=lr)
        first_output: list[Tensor] = []
        first_log_p: Tensor | None = None
        losses: list[float] = []
        parts: list[tuple[float, float, float]] = []
        updates = 0
        for step in range(steps):
            with _added(_block(model, layer), delta, positions, first_output):
                logits = _logits(model, batch, None if loss_layer is None else max(loss_layer, layer))
            h_init = _full_precision(first_output[0][bare, positions[bare]])
            log_p = torch.log_softmax(_full_precision(logits), dim=-1)

            # As the reference does: read one token at every position, keep the last T real ones.
            read = log_p[:-1].gather(2, wanted.unsqueeze(2)).squeeze(2)
            nll = -read.masked_fill(~scored, 0).sum(dim=1) / len(ids)

            now = log_p[-1, positions[-1]]
            if first_log_p is None:
                first_log_p = now.detach().clone()
            divergence = kl * (now.exp() * (now - first_log_p)).sum()
            restraint = decay * torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(h_init) ** 2
            loss = nll.mean() + divergence + restraint
            losses.append(loss.item())
            parts.append((nll.mean().item(), divergence.item(), restraint.item()))
            probability = nll.neg().exp().mean().item()
            if loss.item() < 0.05 or step == steps - 1:
                break

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            with torch.no_grad():
                limit = clamp * torch.linalg.vector_norm(h_init)
                norm = torch.linalg.vector_norm(delta)
                if norm > limit:
                    delta.mul_(limit / norm)

    found = delta.detach().clone()
    return TargetResult(h_init + found, found, h_init, losses, parts, updates, probability)


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor], loss_layer: int | None) -> Tensor:
    """Logits at every position: the model's own, or final norm and head on a block's output."""
    if loss_layer is None:
        own: Tensor = model(**batch, use_cache=False).logits
        return own
    parts = architecture(model)
    with _recorded_output(_block(model, loss_layer)) as seen:
        model(**batch, use_cache=False)
    lens: Tensor = model.get_submodule(parts.head)(model.get_submodule(parts.norm)(seen[0]))
    return lens


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


# Keys, states, covariance


@torch.no_grad()
def keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Templates,
    layer: int,
) -> Tensor:
    """K: the projection's input at the subject's last token, mean in each group, then over groups.

    returns: (d_in, n), float64 for a float64 model, else float32
    """
    columns = []
    with _frozen(model):
        for request in requests:
            groups = []
            for group in templates:
                found = []
                for prompt in _contexts(request.prompt, [group]):
                    ids = encode(tokenizer, filled(prompt, request.subject))
                    with _recorded_input(_projection(model, layer)) as seen:
                        model(torch.tensor([ids], device=model.device), use_cache=False)
                    position = subject_last_index(tokenizer, prompt, request.subject)
                    found.append(_full_precision(seen[0][0, position]))
                groups.append(torch.stack(found).mean(dim=0))
            columns.append(torch.stack(groups).mean(dim=0))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def block_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layer: int,
) -> Tensor:
    """H: the block's output at the subject's last token of the bare prompt, (d_out, n)."""
    columns = []
    with _frozen(model):
        for request in requests:
            ids = encode(tokenizer, filled(request.prompt, request.subject))
            with _recorded_output(_block(model, layer)) as seen:
                model(torch.tensor([ids], device=model.device), use_cache=False)
            position = subject_last_index(tokenizer, request.prompt, request.subject)
            columns.append(_full_precision(seen[0][0, position]))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def covariance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    layer: int,
    max_length: int,
) -> Tensor:
    """C: mean of k k^T over every position, BOS included, of every text cut to ``max_length`` tokens.

    returns: (d_in, d_in), float64
    """
    total = torch.zeros(())
    count = 0
    with _frozen(model):
        for text in texts:
            ids = encode(tokenizer, text)[:max_length]
            if not ids:
                continue
            with _recorded_input(_projection(model, layer)) as seen:
                model(torch.tensor([ids], device=model.device), use_cache=False)
            inputs = seen[0][0].double()
            total = total.to(inputs) + inputs.T @ inputs
            count += len(ids)
    if not count:
        raise ValueError("no tokens in the texts given for the covariance")
    return total / count


# Updates


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
) -> dict[str, Tensor]:
    """Layer by layer upwards, give each an equal share of what is still missing at the last one.

    Keys and states are taken afresh with the lower layers already changed; weights change in place.
    returns: what was added to each parameter, in its stored shape and dtype
    """
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"layers {list(layers)} are not ascending")
    deltas: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        k = keys(model, tokenizer, requests, templates, layer).double()
        h = block_states(model, tokenizer, requests, layers[-1]).double()
        residual = (zs.to(h) - h) / (len(layers) - i)
        change = solve(layer, k, residual)
        name = weight_name(model, layer)
        weight = model.get_parameter(name)
        stored = (change.T if architecture(model).transposed else change).to(weight.dtype)
        with torch.no_grad():
            weight.add_(stored)
        deltas[name] = stored.contiguous()
    return deltas


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

    def solve(layer: int, k: Tensor, residual: Tensor) -> Tensor:
        system = weight * covariances(layer).to(k) + k @ k.T
        if memory is not None:
            system = system + memory.moment(layer, k)
        change: Tensor = residual @ torch.linalg.solve(system, k).T
        return change

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

    def solve(layer: int, k: Tensor, residual: Tensor) -> Tensor:
        projector = projectors(layer).to(k)
        identity = torch.eye(k.shape[0], dtype=k.dtype, device=k.device)
        system = projector @ (k @ k.T + memory.moment(layer, k)) + ridge * identity
        change: Tensor = torch.linalg.solve(system, projector @ k @ residual.T).T
        return change

    deltas = _write(model, tokenizer, requests, templates, layers=layers, zs=zs, solve=solve)
    memory.add(model, tokenizer, requests, templates, layers)
    return deltas


# Merging


def _min_max(values: Tensor) -> Tensor:
    """Affinely to [0, 1]; all zero when all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def _top(scores: Tensor, share: float) -> Tensor:
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
    return _top(torch.softmax(h.flatten(), dim=0).reshape(tau.shape), 1 - ratio)


def row_wise_variant(tau: Tensor, ratio: float) -> Tensor:
    """The reading to reject: normalise and softmax every row by itself, then select over the whole tensor."""
    h = torch.stack([_min_max(row) for row in tau.double() * tau.double()])
    return _top(torch.softmax(h, dim=1), 1 - ratio)


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


# Router


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


# Scoring


@dataclass(frozen=True)
class Likelihood:
    """How a model predicts one continuation under teacher forcing."""

    nll: float  # mean per token
    sum_nll: float
    argmax: bool  # every token is the most likely one


@torch.no_grad()
def likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> Likelihood:
    """Score one prompt and one target; token j of the target is read at ``len(prompt_ids) + j - 1``."""
    prompt_ids = encode(tokenizer, prompt)
    ids = target_ids(tokenizer, target)
    with _frozen(model):
        logits = model(torch.tensor([prompt_ids + ids], device=model.device), use_cache=False).logits[0]
    log_p = torch.log_softmax(_full_precision(logits), dim=-1)
    places = [len(prompt_ids) + j - 1 for j in range(len(ids))]
    nlls = [-log_p[place, token].item() for place, token in zip(places, ids, strict=True)]
    right = [int(log_p[place].argmax()) == token for place, token in zip(places, ids, strict=True)]
    return Likelihood(math.fsum(nlls) / len(nlls), math.fsum(nlls), all(right))


def score_record(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per prompt of a CounterFact record, by the names of the cases file."""
    rewrite = record["requested_rewrite"]
    prompts = [("rewrite", 0, filled(rewrite["prompt"], rewrite["subject"]))]
    prompts += [("paraphrase", i, text) for i, text in enumerate(record["paraphrase_prompts"])]
    prompts += [("neighborhood", i, text) for i, text in enumerate(record["neighborhood_prompts"])]
    rows: list[dict[str, Any]] = []
    for kind, index, prompt in prompts:
        row: dict[str, Any] = {"kind": kind, "index": index, "prompt": prompt}
        for which in ("new", "true"):
            found = likelihood(model, tokenizer, prompt, rewrite[f"target_{which}"]["str"])
            row |= {
                f"nll_{which}": found.nll,
                f"sum_nll_{which}": found.sum_nll,
                f"argmax_{which}": found.argmax,
            }
        rows.append(row)
    return rows


def counterfact_rates(records: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Rates from the rows of several records: mean over prompts inside a record, then over records.

    Success is strict; a tie fails. ``score`` is the harmonic mean of the three, zero when one is zero.
    """
    kinds = {"efficacy": "rewrite", "generalization": "paraphrase", "locality": "neighborhood"}
    rates: dict[str, float] = {}
    for metric, kind in kinds.items():
        target, other = ("true", "new") if kind == "neighborhood" else ("new", "true")
        success, argmax = [], []
        for rows in records:
            chosen = [row for row in rows if row["kind"] == kind]
            if chosen:
                won = [row[f"nll_{target}"] < row[f"nll_{other}"] for row in chosen]
                success.append(sum(won) / len(won))
                argmax.append(sum(bool(row[f"argmax_{target}"]) for row in chosen) / len(chosen))
        rates[metric] = math.fsum(success) / len(success)
        rates[f"{metric}_argmax"] = math.fsum(argmax) / len(argmax)
    three = [rates[metric] for metric in kinds]
    rates["score"] = 3 / math.fsum(1 / rate for rate in three) if all(three) else 0.0
    return rates
