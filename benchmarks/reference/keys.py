"""Keys, states and covariances, one text at a time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.reference.models import (
    block_of,
    frozen,
    full_precision,
    projection_of,
    recorded_input,
    recorded_output,
)
from benchmarks.reference.tokens import Templates, contexts, encode, filled, subject_last_index
from editors.api import EditRequest


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
    with frozen(model):
        for request in requests:
            groups = []
            for group in templates:
                found = []
                for prompt in contexts(request.prompt, [group]):
                    ids = encode(tokenizer, filled(prompt, request.subject))
                    with recorded_input(projection_of(model, layer)) as seen:
                        model(torch.tensor([ids], device=model.device), use_cache=False)
                    position = subject_last_index(tokenizer, prompt, request.subject)
                    found.append(full_precision(seen[0][0, position]))
                groups.append(torch.stack(found).mean(dim=0))
            columns.append(torch.stack(groups).mean(dim=0))
    return torch.stack(columns, dim=1)


@torch.no_grad()
def subject_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    module: nn.Module,
) -> Tensor:
    """What a module puts out at the subject's last token of the bare prompt, (d_out, n)."""
    columns = []
    with frozen(model):
        for request in requests:
            ids = encode(tokenizer, filled(request.prompt, request.subject))
            with recorded_output(module) as seen:
                model(torch.tensor([ids], device=model.device), use_cache=False)
            position = subject_last_index(tokenizer, request.prompt, request.subject)
            columns.append(full_precision(seen[0][0, position]))
    return torch.stack(columns, dim=1)


def block_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layer: int,
) -> Tensor:
    """H: the block's output at the subject's last token of the bare prompt, (d_out, n)."""
    return subject_outputs(model, tokenizer, requests, block_of(model, layer))


def mlp_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    layer: int,
) -> Tensor:
    """M: the MLP output projection's output there, (d_out, n)."""
    return subject_outputs(model, tokenizer, requests, projection_of(model, layer))


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
    with frozen(model):
        for text in texts:
            ids = encode(tokenizer, text)[:max_length]
            if not ids:
                continue
            with recorded_input(projection_of(model, layer)) as seen:
                model(torch.tensor([ids], device=model.device), use_cache=False)
            inputs = seen[0][0].double()
            total = total.to(inputs) + inputs.T @ inputs
            count += len(ids)
    if not count:
        raise ValueError("no tokens in the texts given for the covariance")
    return total / count
