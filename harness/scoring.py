"""Scoring of prompts: how likely a model finds the new and the true target after each (ALGORITHMS 8.1), or
which tokens it would rather have said in place of a forced answer's (ALGORITHMS 8.2).

Each prompt is run once for all its targets: its last position gives their first tokens, and targets of more
tokens go on from the prompt's cached keys and values. The head is applied at target positions only.
Prompts of equal length run together, so there is no padding and no mask.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.capture import head_logits, in_halves, log_probabilities
from editors.sites import device_of
from editors.tokens import encode, target_ids

PASS_TOKENS = 2048  # tokens in one forward
T = TypeVar("T")


@dataclass(frozen=True)
class Query:
    """One prompt with its two candidate targets."""

    prompt: str
    target_new: str
    target_true: str


@dataclass(frozen=True)
class Likelihood:
    """What a model says of one target after one prompt."""

    nll: float  # mean negative log-probability per target token, nats
    sum_nll: float
    tokens: int  # of the target
    tokens_right: int  # of them, those that are the most likely one under teacher forcing

    @property
    def argmax(self) -> bool:
        """Every target token is the most likely one: greedy generation would write the target."""
        return self.tokens_right == self.tokens


@dataclass(frozen=True)
class Answer:
    """A query's outcome under one set of weights."""

    new: Likelihood
    true: Likelihood


@dataclass(frozen=True)
class Prediction:
    """A forced answer's tokens, and at each of their positions the most likely token."""

    answer: tuple[int, ...]
    predicted: tuple[int, ...]

    @property
    def right(self) -> int:
        """How many of the answer's tokens are predicted."""
        return sum(a == b for a, b in zip(self.answer, self.predicted, strict=True))


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Query],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Score all queries; equal ones are computed once. Returned in the order given.

    Prompts run in smaller batches where the device's memory is out. Raises FloatingPointError if a
    likelihood is not finite, MemoryError if one prompt alone does not fit.
    """
    distinct = list(dict.fromkeys(queries))
    prompts = {prompt: encode(tokenizer, prompt) for prompt in dict.fromkeys(q.prompt for q in distinct)}
    texts = dict.fromkeys(t for q in distinct for t in (q.target_new, q.target_true))
    targets = {text: target_ids(tokenizer, text) for text in texts}
    answers: dict[Query, Answer] = {}
    lengths = {query: len(prompts[query.prompt]) for query in distinct}

    def run(some: Sequence[Query]) -> list[Answer]:
        rows = [prompts[query.prompt] for query in some]
        return _score_batch(model, rows, [(targets[q.target_new], targets[q.target_true]) for q in some])

    for part in _batches(distinct, lengths):
        for some, found in in_halves(part, run):
            for query, answer in zip(some, found, strict=True):
                if not math.isfinite(answer.new.nll + answer.true.nll):
                    raise FloatingPointError(f"the likelihoods after {query.prompt!r} are not finite")
                answers[query] = answer
        if progress:
            progress(len(answers), len(distinct))
    return [answers[query] for query in queries]


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[tuple[str, str]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Most likely tokens along answers under teacher forcing; returned in the order given.

    queries: (prompt, answer); answers of one prompt share its forward, equal queries are computed once.
    Raises FloatingPointError if the logits are not finite.
    """
    answers: dict[str, dict[str, list[int]]] = {}  # prompt -> answer -> its ids
    for prompt, answer in dict.fromkeys(queries):
        answers.setdefault(prompt, {})[answer] = target_ids(tokenizer, answer)
    prompts = {prompt: encode(tokenizer, prompt) for prompt in answers}
    found: dict[tuple[str, str], Prediction] = {}
    lengths = {prompt: len(ids) for prompt, ids in prompts.items()}
    copies = {prompt: len(ids) for prompt, ids in answers.items()}

    def run(some: Sequence[str]) -> list[list[list[int]] | None]:
        targets = [list(answers[prompt].values()) for prompt in some]
        return _predict_batch(model, [prompts[prompt] for prompt in some], targets)

    for part in _batches(list(prompts), lengths, copies):
        for some, predicted in in_halves(part, run):
            for prompt, rows in zip(some, predicted, strict=True):
                if rows is None:
                    raise FloatingPointError(f"the logits after {prompt!r} are not finite")
                for (answer, ids), row in zip(answers[prompt].items(), rows, strict=True):
                    found[prompt, answer] = Prediction(tuple(ids), tuple(row))
        if progress:
            progress(len(found), sum(copies.values()))
    return [found[query] for query in queries]


def _batches(
    items: Sequence[T], lengths: Mapping[T, int], copies: Mapping[T, int] | None = None
) -> Iterator[list[T]]:
    """Items of equal length together, shortest first, of PASS_TOKENS tokens in all or one alone.

    copies: how many targets may go on from each prompt's cache; None: always as many.
    """
    part: list[T] = []
    rows = 0
    for item in sorted(items, key=lambda item: lengths[item]):
        length, more = lengths[item], copies[item] if copies else 1
        if part and (length != lengths[part[0]] or (rows + more) * length > PASS_TOKENS):
            yield part
            part, rows = [], 0
        part.append(item)
        rows += more
    if part:
        yield part


@dataclass(frozen=True)
class _States:
    """Final hidden states at every position that predicts a target's token."""

    first: Tensor  # (rows, d_model), last position of every prompt: it predicts its targets' first tokens
    later: Tensor | None  # (m, d_model), along targets of more tokens; None if there is none
    places: list[tuple[int, int, int]]  # m of (row, which of its targets, index of the token predicted)


def _target_states(
    model: PreTrainedModel, prompts: list[list[int]], targets: Sequence[Sequence[list[int]]]
) -> _States:
    """prompts: rows of equal length; targets: for each row the ids of its targets."""
    device = device_of(model)
    longer = [(row, which) for row, some in enumerate(targets) for which, t in enumerate(some) if len(t) > 1]
    out = model.base_model(input_ids=torch.tensor(prompts, device=device), use_cache=bool(longer))
    first = out.last_hidden_state[:, -1]
    if not longer:
        return _States(first, None, [])
    ids = [targets[row][which] for row, which in longer]
    width = max(len(target) for target in ids) - 1
    suffix = torch.zeros(len(ids), width, dtype=torch.long)
    for i, target in enumerate(ids):  # padding stands behind, where nothing looks at it
        suffix[i, : len(target) - 1] = torch.tensor(target[:-1])
    cache = out.past_key_values
    cache.batch_select_indices(torch.tensor([row for row, _ in longer], device=device))
    hidden = model.base_model(input_ids=suffix.to(device), past_key_values=cache, use_cache=True)
    at = [(i, t) for i, target in enumerate(ids) for t in range(len(target) - 1)]
    rows, positions = (torch.tensor(index, device=device) for index in zip(*at, strict=True))
    places = [(*longer[i], t + 1) for i, t in at]
    return _States(first, hidden.last_hidden_state[rows, positions], places)


def _predict_batch(
    model: PreTrainedModel, prompts: list[list[int]], targets: list[list[list[int]]]
) -> list[list[list[int]] | None]:
    """Most likely tokens along every target of every row; None for a row whose logits are not finite."""
    states = _target_states(model, prompts, targets)
    top, best = head_logits(model, states.first).max(dim=-1)
    finite = torch.isfinite(top).tolist()
    predicted = [  # the first token of all; those behind it follow
        [[token] * len(target) for target in some] for token, some in zip(best.tolist(), targets, strict=True)
    ]
    if states.later is not None:
        top, best = head_logits(model, states.later).max(dim=-1)
        for (row, which, t), token, fine in zip(
            states.places, best.tolist(), torch.isfinite(top).tolist(), strict=True
        ):
            predicted[row][which][t] = token
            finite[row] &= fine
    return [some if fine else None for some, fine in zip(predicted, finite, strict=True)]


def _score_batch(
    model: PreTrainedModel, prompts: list[list[int]], targets: list[tuple[list[int], list[int]]]
) -> list[Answer]:
    """prompts: rows of equal length; targets: for each row its new and its true target."""
    device = device_of(model)
    states = _target_states(model, prompts, targets)
    first = _log_softmax(model, states.first)  # (rows, V)
    best = first.argmax(dim=-1)

    starts = torch.tensor([[target[0] for target in pair] for pair in targets], device=device)
    lengths = [[len(target) for target in pair] for pair in targets]
    sums: list[list[float]] = first.gather(1, starts).tolist()
    hits: list[list[int]] = (starts == best[:, None]).int().tolist()
    if states.later is not None:
        tokens = torch.tensor([targets[row][which][t] for row, which, t in states.places], device=device)
        log_p = _log_softmax(model, states.later)
        values = log_p.gather(1, tokens[:, None]).squeeze(1).tolist()
        right = (log_p.argmax(dim=-1) == tokens).tolist()
        for (row, which, _), value, hit in zip(states.places, values, right, strict=True):
            sums[row][which] += value
            hits[row][which] += hit

    def likelihood(row: int, which: int) -> Likelihood:
        total = -sums[row][which]
        tokens = lengths[row][which]
        return Likelihood(total / tokens, total, tokens, hits[row][which])

    return [Answer(new=likelihood(row, 0), true=likelihood(row, 1)) for row in range(len(prompts))]


def _log_softmax(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(m, V) log-probabilities in float32 or better for (m, d_model) final hidden states."""
    return log_probabilities(head_logits(model, hidden))
