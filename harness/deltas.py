"""What each batch changed, as files; and an editor's state between batches."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from editors import LowRank, WeightDeltas, dense
from harness.paths import write_tensors


def delta_path(folder: Path, chain: str, batch: int) -> Path:
    """File of one batch (from 1); chain: an editor's name, with "+MM" behind it under the merged chain."""
    return folder / "deltas" / chain / f"batch-{batch:04d}.safetensors"


def state_path(folder: Path, chain: str) -> Path:
    """File of the editor's state after its last finished batch."""
    return folder / "state" / f"{chain}.safetensors"


def write_delta(
    path: Path, delta: WeightDeltas, *, editor: str, case_ids: Sequence[int | str], **more: str
) -> None:
    """Store one batch's change, naming its cases."""
    tensors: dict[str, Tensor] = {}
    for name, change in delta.items():
        if isinstance(change, LowRank):
            tensors[f"{name}.left"], tensors[f"{name}.right"] = change.left, change.right
        else:
            tensors[name] = change
    write_tensors(path, tensors, {"editor": editor, "case_ids": json.dumps(list(case_ids)), **more})


def read_delta(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One batch's change and its metadata.

    The change is multiplied out where the editing did it, so that replayed weights are the edited ones to
    the bit: parameter name -> tensor of its stored shape.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    delta: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".left"):
            stem = name.removesuffix(".left")
            delta[stem] = dense(LowRank(tensor, tensors[f"{stem}.right"]))
        elif not name.endswith(".right"):
            delta[name] = tensor
    return delta, metadata


def write_state(path: Path, state: Mapping[str, Tensor], batches: int) -> None:
    """Store an editor's state after some batches."""
    write_tensors(path, state, {"batches": str(batches)})


def read_state(path: Path) -> tuple[dict[str, Tensor], int]:
    """An editor's state, and after how many batches; nothing and 0 if there is none."""
    if not path.is_file():
        return {}, 0
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["batches"])  # noqa: SIM118
