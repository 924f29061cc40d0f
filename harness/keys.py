"""Keys of the edited subjects, batch by batch, for mergers that look at them; files beside the changes.

They are what the edited matrices are given at the subjects' last tokens on the model that a batch left, and
the same solved by the covariance of the preserved keys, so that merged weights can be made again from a run
folder without the model's forward and without the statistics.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editors import EditRequest
from editors.contexts import BARE, Contexts
from editors.linalg import cholesky
from editors.rows import subject_keys
from editors.sites import Sites, sites_for
from harness.digested import content_digest, write_digested
from harness.paths import read_tensors
from merging import Keys


def keys_path(folder: Path, chain: str, batch: int) -> Path:
    """File of one batch (from 1) of a chain of changes."""
    return folder / "keys" / chain / f"batch-{batch:04d}.safetensors"


def keyed_layers(parameters: Sequence[str], sites: Sites, layers: Sequence[int]) -> dict[int, str]:
    """Layer -> name of its edited MLP output projection, of those that an editor may change."""
    names = {layer: sites.weight_name(layer) for layer in layers}
    return {layer: name for layer, name in names.items() if name in parameters}


def contexts_of(path: Path) -> Contexts:
    """The context templates in an editor's state; the bare prompt for one that uses none."""
    stored = read_tensors(path)[0].get("contexts") if path.is_file() else None
    if stored is None:
        return Contexts(((BARE,),))
    return Contexts(tuple(tuple(group) for group in json.loads(bytes(stored.tolist()))))


class Solver:
    """C^-1 k for the keys of some layers; each covariance is factored once."""

    def __init__(self, covariance: Callable[[int], Tensor], device: torch.device) -> None:
        self._covariance, self._device = covariance, device
        self._factors: dict[int, Tensor] = {}  # layer -> (d_in, d_in), float64, in the host's memory

    def __call__(self, layer: int, keys: Tensor) -> Tensor:
        """keys: (d_in, n); the same shape in float64."""
        if layer not in self._factors:
            self._factors[layer] = cholesky(self._covariance(layer).to(self._device)).cpu()
        return torch.cholesky_solve(keys.double(), self._factors[layer].to(keys.device))


def write_keys(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contexts: Contexts,
    layers: Mapping[int, str],
    solver: Solver,
    **said: str,
) -> None:
    """Take the keys of a batch on the model as it is, and store them.

    layers: layer -> name of its parameter; said: what identifies the batch.
    """
    tensors: dict[str, Tensor] = {}
    for layer, keys in subject_keys(model, tokenizer, requests, contexts, sorted(layers)):
        name = layers[layer]
        tensors[f"{name}.keys"] = keys.T.contiguous()
        tensors[f"{name}.solved"] = solver(layer, keys).T.to(keys.dtype).contiguous()
    transposed = "true" if sites_for(model).transposed else "false"
    write_digested(path, tensors, {"transposed": transposed, **said})


def read_keys(path: Path, device: torch.device) -> dict[str, Keys]:
    """The keys of a batch by parameter name; ValueError in one line if the file is not as it was written."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the run's own command makes it anew")
    tensors, metadata = read_tensors(path)
    if metadata.get("digest") != content_digest(tensors, metadata):
        raise ValueError(f"{path} was changed after it was written; delete it to have it made anew")
    transposed = metadata["transposed"] == "true"
    return {
        name: Keys(
            inputs=tensors[f"{name}.keys"].to(device),
            solved=tensors[f"{name}.solved"].to(device),
            transposed=transposed,
        )
        for name in sorted(part.removesuffix(".keys") for part in tensors if part.endswith(".keys"))
    }
