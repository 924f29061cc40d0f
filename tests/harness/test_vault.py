"""A run gives the same bytes whether its projectors are made in it or come from the vault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tiny import tiny_records, tiny_texts
from editors.linalg import NullSpace, null_space
from harness import ablation, stats
from harness.stats import Statistics

Write = Callable[..., Path]


def run(model: Path, write_jsonl: Write, out: Path) -> dict[str, object]:
    """What a small run of AlphaEdit leaves, times apart."""
    texts = write_jsonl([{"text": text} for text in tiny_texts(60)], "texts.jsonl")
    status = ablation.main([
        "--model", str(model), "--dataset", str(write_jsonl(tiny_records(6))), "--stats", str(texts),
        "--editors", "alphaedit", "--set", "alphaedit.layers=1,2", "alphaedit.steps=2",
        "alphaedit.nullspace_threshold=0.05", "--batch-size", "2", "--num-batches", "2",
        "--cells", "baseline", "--device", "cpu", "--dtype", "float32", "--out", str(out),
    ])  # fmt: skip
    assert status == 0
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    deltas = sorted((out / "deltas").rglob("*.safetensors"))
    assert len(deltas) == 2
    info = json.loads((out / "run.json").read_text())
    return {
        "deltas": [path.read_bytes() for path in deltas],
        "cases": (out / "cases.jsonl.gz").read_bytes(),
        "records": [{**line, "seconds": None} for line in lines],
        "shares": info["per_editor"]["alphaedit"]["nullspace_share"],
    }


def test_kept_projectors_change_no_byte(
    tiny_folder: Path, write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(self: Statistics, layer: int, threshold: float) -> NullSpace:
        return null_space(self.covariance(layer), threshold)

    with monkeypatch.context() as patch:
        patch.setattr(Statistics, "null_space", without)
        plain = run(tiny_folder, write_jsonl, tmp_path / "plain")
    vault = tmp_path / "cache" / "stats"
    assert len(list(vault.iterdir())) == 2  # covariances of two layers
    made = run(tiny_folder, write_jsonl, tmp_path / "made")
    assert len(list(vault.iterdir())) == 4
    monkeypatch.setattr(stats, "null_space", lambda *_: pytest.fail("it is kept"))
    kept = run(tiny_folder, write_jsonl, tmp_path / "kept")
    assert plain == made == kept
    shares = plain["shares"]
    assert isinstance(shares, dict)
    assert all(0 < share < 1 for share in shares.values())
