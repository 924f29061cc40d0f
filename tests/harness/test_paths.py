"""Files are written whole or not at all, and their bytes depend on their content alone."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from harness import paths
from harness.paths import (
    cache_folder,
    read_lines,
    write_atomically,
    write_json,
    write_lines_gz,
    write_tensors,
    write_text,
)


def test_the_cache_is_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMMR_CACHE", str(tmp_path / "here"))
    assert cache_folder("stats") == tmp_path / "here" / "stats"
    assert (tmp_path / "here" / "stats").is_dir()
    monkeypatch.delenv("SEQMMR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    assert cache_folder("stats") == tmp_path / "there" / "seqmmr" / "stats"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("stats") == tmp_path / "home" / ".cache" / "seqmmr" / "stats"


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"
    write_text(path, "new é")
    assert path.read_text("utf-8") == "new é"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "text")
        assert os.umask(0o027) == 0o027  # and the mask is as it was
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_an_empty_text_is_a_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    assert (tmp_path / "a").read_bytes() == b""


def test_json_is_sorted_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'


def test_packed_lines_come_back_and_have_the_same_bytes_anywhere(tmp_path: Path) -> None:
    rows = [{"a": 1, "text": "é\u2028\n"}, {"b": [1.5, None, True]}]
    write_lines_gz(tmp_path / "one.jsonl.gz", rows)
    write_lines_gz(tmp_path / "other" / "two.jsonl.gz", (row for row in rows))
    assert read_lines(tmp_path / "one.jsonl.gz") == rows
    content = (tmp_path / "one.jsonl.gz").read_bytes()
    assert content == (tmp_path / "other" / "two.jsonl.gz").read_bytes()
    assert content[4:8] == b"\0\0\0\0"  # no time
    assert gzip.decompress(content).count(b"\n") == 2


def test_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    values = torch.rand(200, dtype=torch.float64).tolist()
    write_lines_gz(tmp_path / "a.jsonl.gz", [{"v": value} for value in values])
    assert [row["v"] for row in read_lines(tmp_path / "a.jsonl.gz")] == values


def test_a_failing_row_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_lines_gz(tmp_path / "a.jsonl.gz", [{"a": 1}, {"a": object()}])
    assert list(tmp_path.glob("*")) == []
    assert list(tmp_path.glob(".*")) == []


METADATA = {"editor": "memit", "case_ids": '[1, "é"]', "digest": 'a"\n\\b\x1f', "more": "x", "last": "y"}


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3).T, "a.weight": torch.ones(3, dtype=torch.bfloat16),
        "bytes": torch.tensor([1, 255], dtype=torch.uint8), "empty": torch.zeros(0, 4),
    }  # fmt: skip
    path = tmp_path / "deep" / "a.safetensors"
    write_tensors(path, tensors, METADATA)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype


def test_tensor_files_have_the_same_bytes_every_time(tmp_path: Path) -> None:
    tensors = {"b": torch.rand(3, 4), "a": torch.rand(2)}
    contents = set()
    for i in range(12):
        write_tensors(tmp_path / f"{i}.safetensors", tensors, METADATA)
        contents.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(contents) == 1
    content = contents.pop()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(METADATA)
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + 4 * 14


def test_tensors_may_need_gradients_and_have_no_metadata(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2, requires_grad=True)}, {})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("a").tolist() == [1, 1]


def test_a_failing_tensor_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(paths, "_sort_metadata", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []
