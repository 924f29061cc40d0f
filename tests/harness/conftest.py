"""Every test has caches of its own and sees real data only where it asks for it."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tiny

REAL_DATA = os.environ.get("SEQMMR_DATA")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQMMR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEQMMR_DATA", raising=False)


@pytest.fixture
def real_data() -> str:
    if not REAL_DATA:
        pytest.skip("SEQMMR_DATA names no folder with the real records")
    return REAL_DATA


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """``write_jsonl(records, "name.jsonl")``: a file in tmp_path."""

    def write(records: Sequence[Mapping[str, Any]], name: str = "records.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 and its tokenizer as save_pretrained writes them; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    tiny.tiny_model("gpt2").save_pretrained(folder)
    tiny.tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder
