"""What each batch changed, as files; and an editor's state between batches."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from editors import LowRank, WeightDeltas, dense
from harness.digested import content_digest, write_digested
from harness.paths import read_tensors

UNDIGESTED = {"editor", "case_ids", "digest_before", "digest_after"}  # all that such a file says


def delta_path(folder: Path, chain: str, batch: int) -> Path:
    """File of one batch (from 1); chain: an editor's name, with "+MM" behind it under the merged chain."""
    return folder / "deltas" / chain / f"batch-{batch:04d}.safetensors"


def parts_folder(folder: Path, chain: str, batch: int) -> Path:
    """Folder of what an unfinished batch (from 1) has reached."""
    return folder / "state" / chain / f"batch-{batch:04d}"


def state_path(folder: Path, chain: str) -> Path:
    """File of the editor's state after its last finished batch."""
    return folder / "state" / f"{chain}.safetensors"


def write_delta(
    path: Path, delta: WeightDeltas, *, editor: str, case_ids: Sequence[int | str], **more: str
) -> None:
    """Store one batch's change, naming its cases, with a digest of all that the file says."""
    tensors: dict[str, Tensor] = {}
    for name, change in delta.items():
        if isinstance(change, LowRank):
            tensors[f"{name}.left"], tensors[f"{name}.right"] = change.left, change.right
        else:
            tensors[name] = change
    metadata = {"editor": editor, "case_ids": json.dumps(list(case_ids)), **more}
    write_digested(path, tensors, metadata)


def stored_delta(path: Path) -> tuple[dict[str, Tensor | LowRank], dict[str, str]]:
    """One batch's change as it is stored, and its metadata.

    Raises ValueError in one line if the file cannot be read, or is not as it was written (where it has a
    digest of itself; files of older versions have none).
    """
    tensors, metadata = read_tensors(path)
    if "digest" not in metadata and metadata.keys() <= UNDIGESTED:
        pass  # as older versions wrote it
    elif metadata.get("digest") != content_digest(tensors, metadata):
        raise ValueError(f"{path} was changed after it was written: its digest is another")
    delta: dict[str, Tensor | LowRank] = {}
    for name, tensor in tensors.items():
        if name.endswith(".left"):
            stem = name.removesuffix(".left")
            delta[stem] = LowRank(tensor, tensors[f"{stem}.right"])
        elif not name.endswith(".right"):
            delta[name] = tensor
    return delta, metadata


def read_delta(path: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One batch's change, multiplied out, and its metadata; raises ValueError as ``stored_delta``."""
    stored, metadata = stored_delta(path)
    return multiplied_out(stored, device), metadata


def multiplied_out(delta: WeightDeltas, device: torch.device) -> dict[str, Tensor]:
    """A change as parameter name -> tensor of its stored shape.

    It is multiplied out where the editing did it, so that replayed weights are the edited ones to the bit.
    """
    return {
        name: dense(LowRank(change.left.to(device), change.right.to(device)))
        if isinstance(change, LowRank)
        else change.to(device)
        for name, change in delta.items()
    }


@dataclass(frozen=True)
class BatchCheckpoint:
    """The finished parts of one batch, a file each, until the batch is on disk as a whole."""

    folder: Path
    identity: Mapping[str, str]  # what the batch starts from; parts of anything else are made anew

    def load(self, part: str) -> dict[str, Tensor] | None:
        """A part as it was saved; ValueError if its file is broken."""
        path = self._path(part)
        if not path.is_file():
            return None
        tensors, metadata = read_tensors(path)
        if metadata.pop("digest", None) != content_digest(tensors, metadata):
            raise ValueError(f"{path} was changed after it was written; delete it to have it made anew")
        return tensors if metadata == self.identity else None

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a part."""
        write_digested(self._path(part), tensors, self.identity)

    def clear(self) -> None:
        """Remove all parts: the batch is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def write_state(path: Path, state: Mapping[str, Tensor], batches: int) -> None:
    """Store an editor's state after some batches."""
    write_digested(path, state, {"batches": str(batches)})


def read_state(path: Path) -> tuple[dict[str, Tensor], int]:
    """An editor's state, and after how many batches; nothing and 0 if there is none.

    Raises ValueError if the file is broken (older versions gave it no digest).
    """
    if not path.is_file():
        return {}, 0
    state, metadata = read_tensors(path)
    if metadata.get("digest", "") not in ("", content_digest(state, metadata)):
        raise ValueError(f"{path} was changed after it was written; --fresh begins anew")
    return state, int(metadata["batches"])
