"""Target values: what the hidden state at a subject's last token should become (ALGORITHMS 2).

The loss of one edit depends on its vector delta only through the blocks above the z-layer, and only at
the tokens from the subject's last one on. So the blocks up to the z-layer, and the keys and values of all
tokens before the subject's last one, are computed once; every step runs the few tokens behind, for all
unfinished edits together, with the head at the loss positions alone. This changes no result beyond
rounding: edits do not interact, Adam works by element, and a finished edit leaves the batch.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.api import EditorConfig, EditRequest
from editors.capture import (
    BlockCalls,
    CollectedPrefix,
    FixedPrefix,
    added_to_first,
    check_divisible,
    frozen,
    inputs_of,
    log_probabilities,
    logits_of,
    outputs_of,
    record_calls,
)
from editors.contexts import Contexts
from editors.sites import Place, device_of, sites_for
from editors.tokens import locate_subject, target_ids

KL_TEMPLATE = "{} is a"
STEP_TOKENS = 1024  # tokens in one pass of a step; rows beyond go into the next pass
POOL = 256  # edits optimised together; bounds the memory of the cached prefixes
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
STEP_SHARE, PREFIX_SHARE = 0.4, 0.2  # of free memory
PREFIX_TOKENS = 7 * 32  # of an edit: seven rows
SOLVED_FACTOR, SOLVED_KL = 0.1, 0.01  # PMET's rule once every target token is the likeliest


@dataclass(frozen=True, kw_only=True)
class TargetConfig(EditorConfig):
    """How target values are optimised; the names in brackets are the reference codes'."""

    steps: int = 25  # forward passes; at most steps - 1 updates (v_num_grad_steps)
    learning_rate: float = 0.5  # of Adam (v_lr)
    clamp_norm_factor: float = 0.75  # largest |delta| / |h_init|
    kl_factor: float = 0.0625  # weight of the KL term
    weight_decay: float = 0.5  # weight of |delta| / |h_init|^2 (v_weight_decay)
    stop_loss: float = 0.05  # an edit whose loss is below is finished

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be at least 1")
        for name in ("learning_rate", "clamp_norm_factor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("kl_factor", "weight_decay", "stop_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True)
class Targets:
    """Result of the optimisation for n edits at its first place; everything on the model's device."""

    values: Tensor  # (n, d_out), z = h_init + delta, float32 or better
    initial: Tensor  # (n, d_out), h_init
    first_loss: Tensor  # (n,), total loss at delta = 0
    last_loss: Tensor  # (n,), total loss of the last forward
    probability: Tensor  # (n,), mean over rows of exp(-NLL) at the last forward
    updates: Tensor  # (n,), Adam steps taken


def concatenated(parts: Sequence[Targets]) -> Targets:
    """The targets of several groups of edits as one."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Targets(*(torch.cat(column) for column in columns))


@dataclass
class Passes:
    """How much runs together. Lowered where the device has no memory for so much, and so to be kept."""

    step_tokens: int = STEP_TOKENS
    pool: int = POOL

    @classmethod
    def fitting(cls, model: PreTrainedModel, free: int) -> "Passes":
        """What a share of so many free bytes holds, for the longest prompts usual and a middle z-layer.

        A token of a step keeps about eight hidden states and four MLP states of every block for the way
        back, and its logits three times in float32; a token of a prefix its keys and values.
        """
        config = model.config
        count = config.num_hidden_layers
        size = next(model.parameters()).element_size()
        width = config.hidden_size
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        token = count * (8 * width + 4 * inner) * size + 12 * config.vocab_size
        prefix = count * 2 * heads * (width // config.num_attention_heads) * size
        step_tokens = int(STEP_SHARE * free / token)
        pool = int(PREFIX_SHARE * free / (prefix * PREFIX_TOKENS))
        return cls(step_tokens=min(max(step_tokens, 128), 16384), pool=min(max(pool, 8), POOL))


class TargetSource(Protocol):
    """Where an editor gets its target values; ``optimise_targets`` unless a caller keeps some."""

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        contexts: Contexts,
        config: TargetConfig,
        *,
        layer: int | None = None,
        places: tuple[Place, ...] = ("block",),
        nll_factor: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Targets: ...


@dataclass(frozen=True)
class _Row:
    edit: int
    ids: tuple[int, ...]
    subject: int  # index of the subject's last token
    target: tuple[int, ...]  # empty: the KL row
    share: float  # of this row in its edit's NLL
    bare: bool  # the bare template's row, which gives h_init

    @property
    def suffix(self) -> int:
        return len(self.ids) - self.subject


def target_rows(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], contexts: Contexts
) -> list[_Row]:
    """The rewriting rows and the KL row of every request, as ids."""
    rows: list[_Row] = []
    templates = contexts.templates
    for edit, request in enumerate(requests):
        target = target_ids(tokenizer, request.target_new)
        for j, template in enumerate(templates):
            prompt = locate_subject(tokenizer, template.replace("{}", request.prompt), request.subject)
            ids = (*prompt.ids, *target[:-1])
            rows.append(_Row(edit, ids, prompt.subject_last, tuple(target), 1 / len(templates), j == 0))
        prompt = locate_subject(tokenizer, KL_TEMPLATE, request.subject)
        ids = prompt.ids[: prompt.subject_last + 1]  # nothing behind is read
        rows.append(_Row(edit, ids, prompt.subject_last, (), 0.0, False))
    return rows


class _Pass:
    """Rows of equal suffix length that run together; shrinks as edits finish.

    The blocks from ``live`` on are run at every step: those above the z-layer, and the z-layer itself if a
    vector is added inside it.
    """

    def __init__(
        self, model: PreTrainedModel, rows: list[_Row], z_layer: int, places: tuple[Place, ...]
    ) -> None:
        self.model, self.sites, self.rows = model, sites_for(model), rows
        self.inside = places != ("block",)
        self.live = z_layer if self.inside else z_layer + 1
        blocks = self.sites.blocks(model)
        modules = {
            "block": blocks[z_layer],
            "mlp": self.sites.projection(model, z_layer),
            "attention": model.get_submodule(self.sites.attention_projection.format(z_layer)),
        }
        self.modules = [modules[place] for place in places]
        self.suffix = rows[0].suffix
        self.prefix = max(row.subject for row in rows)
        self.device = device_of(model)
        ids = torch.zeros(len(rows), self.prefix + self.suffix, dtype=torch.long)
        mask = torch.zeros_like(ids)
        positions = torch.arange(ids.shape[1]).repeat(len(rows), 1)
        for i, row in enumerate(rows):  # prefix, padding, suffix: no row of the mask is ever empty
            ids[i, : row.subject] = torch.tensor(row.ids[: row.subject], dtype=torch.long)
            ids[i, self.prefix :] = torch.tensor(row.ids[row.subject :])
            mask[i, : row.subject] = 1
            mask[i, self.prefix :] = 1
            positions[i, self.prefix :] = torch.arange(row.subject, len(row.ids))
        self.mask, self.positions = mask.to(self.device), positions.to(self.device)
        collected = CollectedPrefix(first=self.live, positions=self.prefix)
        with ExitStack() as watching, torch.no_grad():
            entering = inputs_of(blocks[z_layer]) if self.inside else outputs_of(blocks[z_layer])
            hidden = watching.enter_context(entering)
            outputs = [watching.enter_context(outputs_of(module)) for module in self.modules]
            model.base_model(
                input_ids=ids.to(self.device), attention_mask=self.mask, position_ids=self.positions,
                past_key_values=collected, use_cache=True,
            )  # fmt: skip
        self.hidden = hidden[0][:, self.prefix :].clone()  # (rows, suffix, d_model), what enters ``live``
        self.initial = [output[0][:, self.prefix].clone() for output in outputs]  # per place (rows, d_out)
        self.kept = collected.kept
        self._prepare()

    def _prepare(self) -> None:
        """Record the calls above the z-layer and index the loss positions, for the present rows."""
        rows = self.rows
        with torch.no_grad():
            self.calls: BlockCalls = record_calls(
                self.model, self.sites, first=0,
                inputs_embeds=torch.zeros_like(self.hidden), attention_mask=self.mask,
                position_ids=self.positions[:, self.prefix :],
                past_key_values=FixedPrefix(self.kept, self.prefix), use_cache=True,
            )  # fmt: skip
        self.edits = self._index([row.edit for row in rows])
        at = [
            (i, self.suffix - len(row.target) + t, token, row.share / len(row.target))
            for i, row in enumerate(rows)
            for t, token in enumerate(row.target)
        ]
        self.loss_row = self._index([a[0] for a in at])
        self.loss_position = self._index([a[1] for a in at])
        self.loss_token = self._index([a[2] for a in at])
        self.loss_share = torch.tensor([a[3] for a in at], dtype=torch.float64, device=self.device)
        self.kl_row = self._index([i for i, row in enumerate(rows) if not row.target])

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def drop(self, finished: set[int]) -> bool:
        """Remove the rows of finished edits; False if none is left."""
        keep = [i for i, row in enumerate(self.rows) if row.edit not in finished]
        if len(keep) < len(self.rows) and keep:
            self._take(keep)
        return bool(keep)

    def halves(self) -> list["_Pass"]:
        """Two passes of half the rows each."""
        half = check_divisible(len(self.rows))
        parts = [copy.copy(self), copy.copy(self)]
        parts[0]._take(range(half))
        parts[1]._take(range(half, len(self.rows)))
        return parts

    def _take(self, keep: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index = torch.tensor(keep, device=self.device)
        self.rows = [self.rows[i] for i in keep]
        self.hidden, self.mask = self.hidden[index], self.mask[index]
        self.positions = self.positions[index]
        self.kept = {layer: (k[index], v[index]) for layer, (k, v) in self.kept.items()}
        self._prepare()

    def log_probabilities(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log p of the target tokens, whether each is the likeliest, and log p over V at the KL rows.

        delta: (places, n, d_out), one vector per place and edit. Returns (loss positions,) twice and
        (KL rows, V); the KL is taken at the subject's last token.
        """
        # index_select throughout: the backward of plain indexing adds by atomics, in no fixed order
        moves = [vectors.index_select(0, self.edits) for vectors in delta]
        hidden = self.hidden
        with ExitStack() as moving:
            if self.inside:
                for module, move in zip(self.modules, moves, strict=True):
                    moving.enter_context(added_to_first(module, move))
            else:
                first = hidden[:, 0].to(delta.dtype) + moves[0]
                hidden = torch.cat([first.to(hidden.dtype)[:, None], hidden[:, 1:]], dim=1)
            hidden = self.calls.run(hidden, self.live, len(self.calls.blocks) - 1)
        places = hidden.flatten(0, 1)
        at_loss = self._log_softmax(places.index_select(0, self.loss_row * self.suffix + self.loss_position))
        token = at_loss.gather(1, self.loss_token[:, None]).squeeze(1)
        likeliest = at_loss.detach().argmax(dim=1) == self.loss_token
        return token, likeliest, self._log_softmax(places.index_select(0, self.kl_row * self.suffix))

    def row_probabilities(self, token: Tensor, n: int) -> Tensor:
        """(n,) each edit's share of its mean over rewriting rows of exp(-NLL of the row)."""
        lengths = token.new_tensor([max(len(row.target), 1) for row in self.rows])
        shares = token.new_tensor([row.share for row in self.rows])
        mean = token.new_zeros(len(self.rows)).index_add(0, self.loss_row, token) / lengths
        return token.new_zeros(n).index_add(0, self.edits, shares * mean.exp())

    def _log_softmax(self, hidden: Tensor) -> Tensor:
        return log_probabilities(logits_of(self.model, self.sites, hidden))


def _passes(rows: Sequence[_Row], tokens: int) -> Iterator[list[_Row]]:
    """Rows of one kind and equal suffix length, similar prefix lengths together, at most so many tokens."""
    ordered = sorted(rows, key=lambda row: (not row.target, row.suffix, row.subject))
    part: list[_Row] = []
    for row in ordered:
        same = part and (part[0].suffix, not part[0].target) == (row.suffix, not row.target)
        if part and (not same or (len(part) + 1) * row.suffix > tokens):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def optimise_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contexts: Contexts,
    config: TargetConfig,
    *,
    layer: int | None = None,
    places: tuple[Place, ...] = ("block",),
    nll_factor: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    passes: Passes | None = None,
) -> Targets:
    """Target values of all requests on the model as it is (ALGORITHMS 2).

    Per edit: mean over rewriting rows of the NLL per target token, plus kl_factor times KL(p_delta || p_0)
    at the subject's last token of "{subject} is a", plus weight_decay |delta| / |h_init|^2; Adam on delta;
    after each step |delta| is clamped to clamp_norm_factor |h_init|; stops below stop_loss.

    layer:      the z-layer; the last of config.layers by default.
    places:     whose outputs at the z-layer vectors are added to, at the subject's last token: the block
                (MEMIT), its MLP output projection (ROME), both projections (PMET). Each vector has its own
                h_init, decay and clamp; one Adam holds all. The result is the first place's.
    nll_factor: PMET's rule if given: the NLL counts this much; while every target token is the likeliest in
                every row, the next step takes SOLVED_FACTOR of it, and the edit is finished once the
                weighted KL is at most SOLVED_KL.
    progress:   called with (edit-steps done, edit-steps at most) after each step.
    passes:     how much runs together; what the device has no memory for is halved, and noted there.
    Raises FloatingPointError, naming the case, if a loss is not finite; MemoryError if one row is too much.
    """
    layer = config.layers[-1] if layer is None else layer
    passes = passes or Passes()
    results: list[Targets] = []
    total, done = len(requests) * config.steps, 0
    while done < len(requests):
        pool = requests[done : done + passes.pool]
        before = done * config.steps
        tell = (lambda steps, offset=before: progress(offset + steps, total)) if progress else None
        with frozen(model):
            made = _made(model, target_rows(tokenizer, pool, contexts), layer, places, passes)
            if made is not None:
                results.append(_optimise(made, passes, pool, config, nll_factor, tell))
                done += len(pool)
            else:
                passes.pool = check_divisible(len(pool))
    return concatenated(results)


def _made(
    model: PreTrainedModel, rows: Sequence[_Row], layer: int, places: tuple[Place, ...], passes: Passes
) -> list[_Pass] | None:
    """The passes of a pool with their prefixes; None if these do not fit the device together."""
    try:
        return [_Pass(model, part, layer, places) for part in _passes(rows, passes.step_tokens)]
    except torch.OutOfMemoryError:
        return None


def _optimise(
    parts: list[_Pass],
    passes: Passes,
    requests: Sequence[EditRequest],
    config: TargetConfig,
    nll_factor: float | None,
    progress: Callable[[int], None] | None,
) -> Targets:
    """One pool of edits, from delta = 0 to the last unfinished one."""
    n = len(requests)
    initial = _initial_states(parts, n)
    scale = initial.norm(dim=2)  # (places, n)
    adam = _Adam(initial, config.learning_rate)
    delta = torch.zeros_like(initial)
    active = torch.ones(n, dtype=torch.bool, device=initial.device)
    updates = torch.zeros(n, dtype=torch.long, device=initial.device)
    first_loss, last_loss, probability = (scale.new_zeros(n) for _ in range(3))
    full = scale.new_full((n,), 1.0 if nll_factor is None else nll_factor)
    factor = full
    unmoved: dict[int, Tensor] = {}  # edit -> (V,) log p_0 at its KL row

    for step in range(config.steps):
        last = step == config.steps - 1
        found = _evaluate(parts, passes, delta, factor, unmoved, config.kl_factor, backward=not last)
        size = delta.norm(dim=2)
        loss = factor * found.nll + found.kl + (config.weight_decay * size / scale**2).sum(dim=0)
        _check_finite(loss, active, requests, step)
        if step == 0:
            first_loss = loss
        last_loss = torch.where(active, loss, last_loss)
        probability = torch.where(active, found.probability, probability)
        active = active & (loss >= config.stop_loss)
        if nll_factor is not None:
            active = active & ~(found.solved & (found.kl <= SOLVED_KL))
            factor = torch.where(found.solved, SOLVED_FACTOR * full, full)
        if progress:
            unfinished = int(active.sum())
            progress((step + 1) * unfinished + config.steps * (n - unfinished))
        if last or not active.any():
            break
        decay = config.weight_decay / (size * scale**2)
        decay = torch.where(size > 0, decay, 0)  # the decay's gradient is zero at delta = 0
        gradient = found.gradient + decay[..., None] * delta
        moved = _clamped(delta - adam.step(gradient), config.clamp_norm_factor * scale)
        delta = torch.where(active[:, None], moved, delta)
        updates += active
        finished = set((~active).nonzero().flatten().tolist())
        parts = [part for part in parts if part.drop(finished)]

    values = (initial + delta)[0]
    return Targets(values, initial[0], first_loss, last_loss, probability, updates)


def _initial_states(parts: Sequence[_Pass], n: int) -> Tensor:
    """h_init (places, n, d_out) in float32 or better: the places' outputs at the bare template's subject."""
    like = parts[0].initial
    dtype = torch.promote_types(torch.float32, like[0].dtype)
    initial = like[0].new_empty(len(like), n, like[0].shape[-1], dtype=dtype)
    for part in parts:
        for i, row in enumerate(part.rows):
            if row.bare:
                for place, states in enumerate(part.initial):
                    initial[place, row.edit] = states[i].to(dtype)
    return initial


@dataclass(frozen=True)
class _Evaluation:
    """One forward, and backward, of all passes; per edit."""

    nll: Tensor  # (n,), mean over rewriting rows of the NLL per target token
    kl: Tensor  # (n,), weighted
    gradient: Tensor  # (places, n, d_out), of factor * nll + kl
    probability: Tensor  # (n,), mean over rewriting rows of exp(-NLL)
    solved: Tensor  # (n,), every target token is the likeliest in every row


def _evaluate(
    parts: list[_Pass],
    passes: Passes,
    delta: Tensor,
    factor: Tensor,
    unmoved: dict[int, Tensor],
    kl_factor: float,
    *,
    backward: bool,
) -> _Evaluation:
    """The loss terms at delta (places, n, d_out), the NLL weighted by factor (n,) in the gradient.

    parts:   replaced by their halves where the device has no memory for them.
    unmoved: log p_0 of the KL rows; filled by the first call, where delta is zero.
    """
    n, dtype = delta.shape[1], delta.dtype
    nll, kl, likely, misses = (delta.new_zeros(n) for _ in range(4))
    gradient = torch.zeros_like(delta)
    waiting, parts[:] = list(parts), []
    while waiting:
        part = waiting.pop(0)
        found = _terms(part, delta, factor, unmoved, kl_factor, backward)
        if found is None:
            waiting[:0] = part.halves()
            passes.step_tokens = waiting[0].suffix * len(waiting[0].rows)
            continue
        parts.append(part)
        own, apart, moved, token, likeliest = found
        nll += own
        kl += apart
        gradient += moved
        likely += part.row_probabilities(token, n)
        misses.index_add_(0, part.edits[part.loss_row], (~likeliest).to(dtype))
    return _Evaluation(nll, kl, gradient, likely, misses == 0)


def _terms(
    part: _Pass,
    delta: Tensor,
    factor: Tensor,
    unmoved: dict[int, Tensor],
    kl_factor: float,
    backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """NLL and KL (n,), gradient as delta, log p and likeliest of each target token; None: out of memory."""
    n, dtype = delta.shape[1], delta.dtype
    leaf = delta.detach().requires_grad_(backward)
    kl = delta.new_zeros(n)
    gradient = torch.zeros_like(delta)
    try:
        with torch.set_grad_enabled(backward):
            token, likeliest, at_subject = part.log_probabilities(leaf)
            token = token.to(dtype)
            edits = part.edits[part.loss_row]
            nll = delta.new_zeros(n).index_add(0, edits, -part.loss_share.to(dtype) * token)
            own = factor * nll
            if len(part.kl_row):
                edits_kl = part.edits[part.kl_row]
                for edit, row in zip(edits_kl.tolist(), at_subject.detach(), strict=True):
                    unmoved.setdefault(edit, row)
                start = torch.stack([unmoved[edit] for edit in edits_kl.tolist()])
                divergence = (at_subject.exp() * (at_subject - start)).sum(dim=1).to(dtype)
                kl = kl.index_add(0, edits_kl, kl_factor * divergence)
                own = own + kl
            if backward:
                gradient = torch.autograd.grad(own.sum(), leaf)[0]
    except torch.OutOfMemoryError:
        return None
    return nll.detach(), kl.detach(), gradient, token.detach(), likeliest


def _check_finite(loss: Tensor, active: Tensor, requests: Sequence[EditRequest], step: int) -> None:
    wrong = (active & ~loss.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise FloatingPointError(
            f"case {requests[wrong[0]].case_id}: the loss of its target value is {loss[wrong[0]].item()} "
            f"at step {step}; check the model's weights and the learning rate"
        )


def _clamped(vectors: Tensor, longest: Tensor) -> Tensor:
    """Vectors (places, n, d) scaled down to at most ``longest`` (places, n)."""
    length = vectors.norm(dim=2)
    return torch.where((length > longest)[..., None], vectors * (longest / length)[..., None], vectors)


class _Adam:
    """Adam on (places, n, d) with one step count: edits start together and finished ones are dropped."""

    def __init__(self, like: Tensor, learning_rate: float) -> None:
        self.learning_rate, self.steps = learning_rate, 0
        self.moment, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, gradient: Tensor) -> Tensor:
        """What to subtract."""
        self.steps += 1
        first, second = ADAM_BETAS
        self.moment = first * self.moment + (1 - first) * gradient
        self.square = second * self.square + (1 - second) * gradient**2
        moment = self.moment / (1 - first**self.steps)
        square = self.square / (1 - second**self.steps)
        return self.learning_rate * moment / (square.sqrt() + ADAM_EPS)
