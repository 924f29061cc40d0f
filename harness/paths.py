"""Where things are kept between runs, how files are written (whole or not at all), and how they are read.

What cannot be read is refused in one line that names the file, the place in it and the remedy.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import reprlib
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def cache_folder(name: str) -> Path:
    """A folder below ``SEQMMR_CACHE``, or below the user's cache folder."""
    root = os.environ.get("SEQMMR_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "seqmmr"
    folder = base / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"cache folder {str(folder)!r} cannot be made: {reason}; set SEQMMR_CACHE to a folder that can"
        ) from None
    return folder


class NotWrittenError(OSError):
    """A file could not be written: the disk is full, or the system refuses for another reason."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written: {self.strerror}"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    Raises NotWrittenError if the system refuses; a file that was there before is as it was.
    """
    try:
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
    except OSError as error:
        raise NotWrittenError(error.errno, error.strerror or str(error), str(path)) from error
    except SafetensorError as error:  # which says the system's reason in its text only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise NotWrittenError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


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


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file and its metadata; ValueError in one line if it cannot be read."""
    return _opened(path, whole=True)


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file alone; ValueError as ``read_tensors``."""
    return _opened(path, whole=False)[1]


def _opened(path: Path, *, whole: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys() if whole else ()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


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


class _Short(reprlib.Repr):
    """``repr`` that ends: of long, deep and very large values only as much as a line can show."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 400 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlevel = _SHORT.maxdict = 4


def shown(value: Any) -> str:
    """A value as a message says it: its ``repr``, shortened, in one line."""
    text = _SHORT.repr(value)
    return text if len(text) <= 400 else f"{text[:250]}...{text[-100:]}"


def checked_name(flag: str, text: str) -> str:
    """A value that names something, as it is; ValueError if nothing can have that name."""
    if not text.strip():
        raise ValueError(f"{flag} is {text!r}; give it a value, or leave it out")
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"{flag} is {shown(text)}; a name has no control characters, take them out")
    try:
        parts = text.encode().split(b"/")
    except UnicodeEncodeError:
        raise ValueError(f"{flag} is {shown(text)}, which is not UTF-8; rename it") from None
    if max(map(len, parts)) > 255 or len(text) > 2000:
        raise ValueError(f"{flag} is {shown(text)}, {len(text)} characters long; give a shorter name")
    return text


def is_there(name: str) -> bool:
    """Whether a path leads to something; names that no file can have lead to nothing."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _bytes(path: Path, where: str) -> bytes:
    """A file's content, unpacked if it is named ``.gz``."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device could be read once, or for ever
            kind = "a folder" if path.is_dir() else "no regular file"
            raise ValueError(f"{where} cannot be read: it is {kind}; give a file")
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise ValueError(f"{where} cannot be read: it does not exist; correct the path") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{where} cannot be read: {error}; pack it anew, or fetch it again") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}; correct the path") from None


def _text(raw: bytes, where: str) -> str:
    """UTF-8, with or without a mark at its beginning."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw.startswith(b"\x1f\x8b"):
            remedy = "it is packed with gzip, name it .gz"
        elif raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            remedy = "it is UTF-16, save it as UTF-8"
        else:
            remedy = f"{error.reason} in line {raw.count(10, 0, error.start) + 1}, save it as UTF-8"
        raise ValueError(f"{where} is not UTF-8: {remedy}") from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {shown(twice)} occurs twice in one object; leave one")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON value; take it out")


def _integer(digits: str) -> int:
    if len(digits) > 400:
        raise ValueError(f"a number of {len(digits)} digits; write it as a text")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number, parse_int=_integer)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # as half of a pair is written, and the pairs


def _json(text: str, where: str) -> Any:
    try:
        value = _DECODER.decode(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(
            f"{where} not JSON: {error.msg} ({line}column {error.colno}); it takes one object a line, or one "
            "list of objects"
        ) from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} broken: half of a surrogate pair (\\ud...); correct the text") from None
    except RecursionError:
        raise ValueError(f"{where} nested too deeply; records are flat") from None
    except ValueError as error:
        raise ValueError(f"{where} broken: {error}") from None
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL, JSONL.gz or JSON-array file.

    Raises ValueError naming the file and line where it is broken.
    """
    where = f"file {str(path)!r}"
    text = _text(_bytes(path, where), where)
    if text.lstrip().startswith("["):
        records = _json(text, f"{where} is")
    else:
        lines = enumerate(text.split("\n"), start=1)
        records = [_json(line, f"{where}, line {number}:") for number, line in lines if line.strip()]
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}, record {number}: {shown(record)} is not an object of fields and values"
            )
    if not records:
        raise ValueError(f"{where} has no records; give one with at least one JSON object")
    return list(records)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV or CSV.gz with a header line, by column; blank lines are passed over.

    Raises ValueError naming the file and line where it is broken.
    """
    where = f"file {str(path)!r}"
    reader = csv.DictReader(io.StringIO(_text(_bytes(path, where), where), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{where}: column {shown(twice)} occurs twice; leave one")
        for row in reader:
            if None in row or None in row.values():  # cells without a column, columns without a cell
                raise ValueError(
                    f"{where}, line {reader.line_num}: the row has not the header's {len(names)} cells; "
                    "put texts with commas in quotation marks"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{where}, line {reader.line_num + 1}: {error}; correct the row") from None
    if not rows:
        raise ValueError(f"{where} has no rows; give a header line and at least one row")
    return rows


class _Yaml(yaml.SafeLoader):
    """Plain data only, and no name twice: the first of the two would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{shown(twice)} occurs twice in one mapping")
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path, where: str) -> Any:
    """Plain data of a YAML file; ValueError in one line, beginning with ``where``, if it cannot be read."""
    text = _text(_bytes(path, where), where)
    try:
        loader = _Yaml(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
    except RecursionError:
        reason = "nested too deeply"
    except Exception:  # whatever Python says where a tag does not fit its text
        reason = "a tag does not fit its value"
    raise ValueError(f"{where} cannot be read: {reason}; correct the YAML")
