"""Keys of the edited subjects, batch by batch, for mergers that look at them; files beside the changes.

They are what the edited matrices are given at the subjects' last tokens on the model that a batch left, and
the same solved by the covariance of the preserved keys, so that merged weights can be made again from a run
folder without the model's forward and without the statistics.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from editors import Editor, EditRequest
from editors.contexts import BARE, Contexts
from editors.linalg import cholesky
from editors.rows import subject_keys
from editors.sites import sites_for
from harness.digested import content_digest, write_digested
from harness.models import LoadedModel
from harness.paths import read_tensors
from merging import Keys


def keys_path(folder: Path, chain: str, batch: int) -> Path:
    """File of one batch (from 1) of a chain of changes."""
    return folder / "keys" / chain / f"batch-{batch:04d}.safetensors"


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
    loaded: LoadedModel,
    editor: Editor,
    requests: Sequence[EditRequest],
    solver: Solver,
    *,
    state: Path,
    **said: str,
) -> None:
    """Take the keys of a batch on the model as it is, in every layer whose MLP output projection the editor
    changes, and store them.

    state: file of the editor's state, which has its context templates; said: what identifies the batch.
    """
    sites, model = sites_for(loaded.model), loaded.model
    changed = editor.parameters(sites)
    names = {layer: sites.weight_name(layer) for layer in sorted(editor.config.layers)}
    names = {layer: name for layer, name in names.items() if name in changed}
    tensors: dict[str, Tensor] = {}
    for layer, keys in subject_keys(model, loaded.tokenizer, requests, contexts_of(state), list(names)):
        tensors[f"{names[layer]}.keys"] = keys.T.contiguous()
        tensors[f"{names[layer]}.solved"] = solver(layer, keys).T.to(keys.dtype).contiguous()
    write_digested(path, tensors, {"transposed": "true" if sites.transposed else "false", **said})


def contexts_of(state: Path) -> Contexts:
    """The context templates in an editor's state; the bare prompt for one that uses none."""
    stored = read_tensors(state)[0].get("contexts") if state.is_file() else None
    if stored is None:
        return Contexts(((BARE,),))
    return Contexts(tuple(tuple(group) for group in json.loads(bytes(stored.tolist()))))


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
