"""Facts as rows of ids, run from one block on: the loss of their targets, for methods that descend on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.api import EditRequest
from editors.capture import log_probabilities, logits_of, packed, pad_right, record_calls
from editors.sites import device_of, sites_for
from editors.tokens import encode, target_ids

Objective = Literal["prompt_last", "target_new"]
PASS_TOKENS = 1024  # tokens run at once, padding included; rows beyond go into the next pass


@dataclass(frozen=True)
class AnswerRow:
    """One fact as ids, and which token is to be predicted at which position."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]  # (position, token), positions ascending


def answer_rows(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], objective: Objective
) -> list[AnswerRow]:
    """The prompt of every request, with all but the last token of its target behind it if they are read."""
    rows: list[AnswerRow] = []
    for request in requests:
        prompt = encode(tokenizer, request.prompt.replace("{}", request.subject))
        target = target_ids(tokenizer, request.target_new)
        last = len(prompt) - 1
        if objective == "prompt_last":
            rows.append(AnswerRow(tuple(prompt), tuple((last, token) for token in target)))
        else:
            answers = tuple((last + i, token) for i, token in enumerate(target))
            rows.append(AnswerRow((*prompt, *target[:-1]), answers))
    return rows


class AnswerPass:
    """Rows that run together; what enters block ``first`` is computed once, with the weights of now.

    shares: weight of each answer of a row in the loss. The context ``frozen`` is the caller's.
    """

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[AnswerRow], shares: Sequence[float], first: int
    ) -> None:
        self.model, self.sites, self.first = model, sites_for(model), first
        device = device_of(model)
        ids, mask = pad_right([row.ids for row in rows], device)
        with torch.no_grad():
            self.calls = record_calls(
                model, self.sites, first=first, input_ids=ids, attention_mask=mask, use_cache=False
            )
        at = [
            (i * ids.shape[1] + position, token, share)
            for i, (row, share) in enumerate(zip(rows, shares, strict=True))
            for position, token in row.answers
        ]
        places = sorted({place for place, _, _ in at})  # each once: the backward adds in no fixed order
        number = {place: i for i, place in enumerate(places)}
        self.places = torch.tensor(places, device=device)  # in (rows x length)
        self.place = torch.tensor([number[place] for place, _, _ in at], device=device)  # of each answer
        self.token = torch.tensor([token for _, token, _ in at], device=device)
        self.share = torch.tensor([share for _, _, share in at], dtype=torch.float64, device=device)

    @property
    def hidden(self) -> Tensor:
        """What enters block ``first``, (rows, length, d_model)."""
        return self.calls.hidden

    def at_places(self, states: Tensor) -> Tensor:
        """Of (rows, length, d), or (rows x length, d), where tokens are predicted: (places, d)."""
        return states.reshape(-1, states.shape[-1]).index_select(0, self.places)

    def loss(self, hidden: Tensor) -> Tensor:
        """Sum over answers of share times -log p(token), for ``hidden`` entering block ``first``."""
        states = self.calls.run(hidden, self.first, len(self.calls.blocks) - 1)
        logits = logits_of(self.model, self.sites, self.at_places(states))
        likely = log_probabilities(logits)  # (places, V)
        token = likely.flatten().index_select(0, self.place * likely.shape[1] + self.token)
        return -(self.share.to(token.dtype) * token).sum()


def passes_of(rows: Sequence[AnswerRow]) -> Iterator[list[int]]:
    """Which rows run together, by their index."""
    return packed([len(row.ids) for row in rows], PASS_TOKENS)
