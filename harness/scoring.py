"""Scoring of prompts: how likely a model finds the new and the true target after each (ALGORITHMS 8.1).

Each prompt is run once for both targets: its last position gives their first tokens, and targets of more
tokens go on from the prompt's cached keys and values. The head is applied at target positions only.
Prompts of equal length run together, so there is no padding and no mask.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.capture import head_logits
from editors.sites import device_of
from editors.tokens import encode, target_ids

PASS_TOKENS = 2048  # tokens in one forward


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
    argmax: bool  # every target token is the most likely one


@dataclass(frozen=True)
class Answer:
    """A query's outcome under one set of weights."""

    new: Likelihood
    true: Likelihood


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Sequence[Query],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Score all queries; equal ones are computed once. Returned in the order given."""
    distinct = list(dict.fromkeys(queries))
    prompts = {prompt: encode(tokenizer, prompt) for prompt in dict.fromkeys(q.prompt for q in distinct)}
    texts = dict.fromkeys(t for q in distinct for t in (q.target_new, q.target_true))
    targets = {text: target_ids(tokenizer, text) for text in texts}
    answers: dict[Query, Answer] = {}
    for part in _batches(distinct, prompts):
        rows = [prompts[query.prompt] for query in part]
        pairs = [(targets[query.target_new], targets[query.target_true]) for query in part]
        for query, answer in zip(part, _score_batch(model, rows, pairs), strict=True):
            if not math.isfinite(answer.new.nll + answer.true.nll):
                raise FloatingPointError(f"the likelihoods after {query.prompt!r} are not finite")
            answers[query] = answer
        if progress:
            progress(len(answers), len(distinct))
    return [answers[query] for query in queries]


def _batches(queries: Sequence[Query], prompts: dict[str, list[int]]) -> Iterator[list[Query]]:
    part: list[Query] = []
    for query in sorted(queries, key=lambda q: len(prompts[q.prompt])):
        length = len(prompts[query.prompt])
        if part and (length != len(prompts[part[0].prompt]) or (len(part) + 1) * length > PASS_TOKENS):
            yield part
            part = []
        part.append(query)
    if part:
        yield part


def _score_batch(
    model: PreTrainedModel, prompts: list[list[int]], targets: list[tuple[list[int], list[int]]]
) -> list[Answer]:
    """prompts: rows of equal length; targets: for each row its new and its true target."""
    device = device_of(model)
    longer = [(row, which) for row, pair in enumerate(targets) for which in (0, 1) if len(pair[which]) > 1]
    out = model.base_model(input_ids=torch.tensor(prompts, device=device), use_cache=bool(longer))
    first = _log_softmax(model, out.last_hidden_state[:, -1])  # (rows, V)
    best = first.argmax(dim=-1)

    starts = torch.tensor([[target[0] for target in pair] for pair in targets], device=device)
    lengths = [[len(target) for target in pair] for pair in targets]
    sums: list[list[float]] = first.gather(1, starts).tolist()
    hits: list[list[bool]] = (starts == best[:, None]).tolist()
    if longer:
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
        tokens = torch.tensor([ids[i][t + 1] for i, t in at], device=device)
        log_p = _log_softmax(model, hidden.last_hidden_state[rows, positions])
        values = log_p.gather(1, tokens[:, None]).squeeze(1).tolist()
        right = (log_p.argmax(dim=-1) == tokens).tolist()
        for (i, _), value, hit in zip(at, values, right, strict=True):
            row, which = longer[i]
            sums[row][which] += value
            hits[row][which] &= hit

    def likelihood(row: int, which: int) -> Likelihood:
        total = -sums[row][which]
        return Likelihood(total / lengths[row][which], total, hits[row][which])

    return [Answer(new=likelihood(row, 0), true=likelihood(row, 1)) for row in range(len(prompts))]


def _log_softmax(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(m, V) log-probabilities in float32 or better for (m, d_model) final hidden states."""
    logits = head_logits(model, hidden)
    return functional.log_softmax(logits.to(torch.promote_types(torch.float32, logits.dtype)), dim=-1)
