"""Where things are kept between runs, and how files are written: whole or not at all."""

import gzip
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def cache_folder(name: str) -> Path:
    """A folder below ``SEQMMR_CACHE``, or below the user's cache folder."""
    root = os.environ.get("SEQMMR_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "seqmmr"
    folder = base / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """A JSON file with sorted keys, indented."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with metadata, whose bytes depend on these alone."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        save_file(ready, temporary, dict(metadata))
        _sort_metadata(temporary)

    write_atomically(path, write)


def _sort_metadata(path: Path) -> None:
    """Put the metadata's keys in order; safetensors writes them in another one every time."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            assert len(ordered) <= length, "the header grew by being sorted"
            file.seek(8)
            file.write(ordered.ljust(length))


def write_lines_gz(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Gzipped JSON Lines whose bytes depend on the rows alone (no time, no name in the header)."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
            for row in rows:
                packed.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())

    write_atomically(path, write)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL, JSONL.gz or JSON-array file.

    Raises ValueError naming the file and line where it is broken.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"file {str(path)!r} does not exist") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"file {str(path)!r} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"file {str(path)!r} is not UTF-8: {error}") from None
    records: list[dict[str, Any]] = []
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"file {str(path)!r} is not JSON: {error}") from None
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"file {str(path)!r}, line {number}: not JSON: {error}") from None
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"file {str(path)!r}, record {number}: {record!r} is not an object")
    if not records:
        raise ValueError(f"file {str(path)!r} has no records")
    return records
