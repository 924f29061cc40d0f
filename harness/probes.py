"""KnowEdit's prompts as rows of ``cases.jsonl.gz``: which answers are forced, and what is kept of each.

An argmax at a forced position is all that the protocol looks at (ALGORITHMS 8.2). Those of relation
specificity are kept, so that an edited model is compared with the unedited one without running it again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.data import EditCase, KnowEditCase, Probe, prompt_rows
from harness.scoring import Prediction, predict

Row = dict[str, Any]


def batch_probes(batches: Sequence[Sequence[EditCase]]) -> Iterator[tuple[Row, Probe]]:
    """Every scored prompt of every edited record, with what names it in ``cases.jsonl.gz``."""
    for row, case in prompt_rows(batches, lambda case: case.prompts):
        assert isinstance(case, KnowEditCase)
        yield row, case.probes[row["kind"]][row["index"]]


def probe_fields(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probes: Sequence[tuple[Row, Probe]],
    *,
    unedited: Sequence[Row] | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """What ``cases.jsonl.gz`` says of every prompt under the weights that are in the model.

    unedited: rows of the same prompts under the unedited model; None: these are the unedited weights.
    """
    queries = [(probe.prompt, answer) for _, probe in probes for answer in probe.answers]
    predictions = iter(predict(model, tokenizer, queries, progress=progress))
    fields = []
    for i, (row, probe) in enumerate(probes):
        found = [next(predictions) for _ in probe.answers]
        fields.append(_fields(row["kind"], found, None if unedited is None else unedited[i]))
    return fields


def _fields(kind: str, found: Sequence[Prediction], unedited: Row | None) -> Row:
    """found: of every answer, the forced one first; unedited: the prompt's row under no edits, as above."""
    forced = found[0]
    fields: Row = {"tokens": len(forced.answer), "tokens_right": forced.right}
    if kind.startswith("portability"):
        best = max(found, key=lambda prediction: prediction.right / len(prediction.answer))
        fields |= {"tokens_any": len(best.answer), "tokens_right_any": best.right}
    if kind == "relation_specificity":
        before = forced.predicted if unedited is None else unedited["predicted"]
        agreeing = sum(a == b for a, b in zip(forced.predicted, before, strict=True))
        fields |= {"tokens_agreeing": agreeing, "predicted": list(forced.predicted)}
    return fields
