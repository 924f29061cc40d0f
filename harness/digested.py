"""Safetensors files that hold a digest of all that they say, so that no change of them goes unnoticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from harness.models import update_digest
from harness.paths import write_tensors


def write_digested(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with its ``digest`` among the metadata, whole or not at all."""
    write_tensors(path, tensors, {**metadata, "digest": content_digest(tensors, metadata)})


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over what a file holds, its own digest left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        update_digest(digest, name, tensor)
    said = {name: text for name, text in metadata.items() if name != "digest"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()
