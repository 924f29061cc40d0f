"""Keys and hidden states of a batch of edits while its layers are changed one after the other.

The rows end at the subject's last token, since nothing behind it matters. They are run once up to the
lowest edited block; from there on each block is computed when it is needed, with the weights it then has.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors.api import EditRequest
from editors.capture import BlockCalls, inputs_of, outputs_of, packed, pad_right, record_calls
from editors.contexts import Contexts
from editors.linalg import weighted_mean
from editors.sites import Place, device_of, sites_for
from editors.tokens import locate_subject

PART_TOKENS = 8192  # tokens run at once, padding included


@dataclass
class _Part:
    rows: list[int]  # row = edit * templates + template
    last: Tensor  # (rows,), index of the subject's last token
    calls: BlockCalls
    hidden: Tensor  # what enters the block reached so far
    at: Tensor  # arange(rows), to index with


class SubjectRows:
    """A batch's rows, template by template, standing before the lowest edited block."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        contexts: Contexts,
        first: int,
    ) -> None:
        self.model, self.sites = model, sites_for(model)
        self.requests, self.contexts, self.layer = len(requests), contexts, first
        templates = contexts.templates
        rows: list[tuple[int, ...]] = []
        for request in requests:
            for template in templates:
                prompt = locate_subject(tokenizer, template.replace("{}", request.prompt), request.subject)
                rows.append(prompt.ids[: prompt.subject_last + 1])
        self.parts: list[_Part] = []
        device = device_of(model)
        with torch.no_grad():
            for indices in packed([len(row) for row in rows], PART_TOKENS):
                ids, mask = pad_right([rows[i] for i in indices], device)
                calls = record_calls(
                    model, self.sites, first=first, input_ids=ids, attention_mask=mask, use_cache=False
                )
                at = torch.arange(len(indices), device=device)
                self.parts.append(_Part(indices, mask.sum(dim=1) - 1, calls, calls.hidden, at))

    @torch.no_grad()
    def keys(self) -> Tensor:
        """Keys at the present layer, (d_in, n) float32 or better: the mean over templates."""
        module = self.sites.projection(self.model, self.layer)
        templates = len(self.contexts.templates)
        columns: Tensor | None = None
        for part in self.parts:
            with inputs_of(module) as seen:
                part.calls.run(part.hidden, self.layer, self.layer)
            key = seen[0].reshape(*part.hidden.shape[:2], -1)[part.at, part.last]
            key = key.to(torch.promote_types(torch.float32, key.dtype))
            if columns is None:
                columns = key.new_empty(key.shape[1], self.requests * templates)
            columns[:, torch.tensor(part.rows, device=key.device)] = key.T
        assert columns is not None
        return weighted_mean(columns.reshape(-1, self.requests, templates), self.contexts.weights)

    @torch.no_grad()
    def states(self, layer: int, place: Place = "block") -> Tensor:
        """Output of block ``layer``, or of its MLP output projection, at the rows' last tokens.

        (d_out, rows) float32 or better, with the present weights.
        """
        states: Tensor | None = None
        for part in self.parts:
            if place == "block":
                output = part.calls.run(part.hidden, self.layer, layer)
            else:
                with outputs_of(self.sites.projection(self.model, layer)) as seen:
                    part.calls.run(part.hidden, self.layer, layer)
                output = seen[0]
            state = output[part.at, part.last]
            state = state.to(torch.promote_types(torch.float32, state.dtype))
            if states is None:
                states = state.new_empty(state.shape[1], self.requests * len(self.contexts.templates))
            states[:, torch.tensor(part.rows, device=state.device)] = state.T
        assert states is not None
        return states

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Go on to stand before ``layer``, through the blocks between with the weights they now have."""
        for part in self.parts:
            part.hidden = part.calls.run(part.hidden, self.layer, layer - 1)
        self.layer = layer


def subject_keys(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contexts: Contexts,
    layers: Sequence[int],
) -> Iterator[tuple[int, Tensor]]:
    """Each layer, ascending, with a batch's keys there on the model as it is, (d_in, n)."""
    rows = SubjectRows(model, tokenizer, requests, contexts, layers[0])
    for layer in layers:
        rows.advance(layer)
        yield layer, rows.keys()
