"""From texts to token ids: prompts, targets, and where the subject ends (ALGORITHMS 1.3, 1.5)."""

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids, with the position of its subject's last token."""

    ids: tuple[int, ...]
    subject_last: int


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt with the model's own leading special tokens and none behind."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return _without_trailing_special(tokenizer, ids, tokenizer(text, add_special_tokens=False)["input_ids"])


def _without_trailing_special(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], plain: list[int]
) -> list[int]:
    special = set(tokenizer.all_special_ids)
    while len(ids) > len(plain) and ids and ids[-1] in special and (not plain or plain[-1] != ids[-1]):
        ids = ids[:-1]
    return ids


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Ids of a target, with one leading space and no special tokens.

    Raises ValueError if nothing is left.
    """
    text = target if target.startswith(" ") else " " + target
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or not target.strip():
        raise ValueError(f"target {target!r} has no tokens; give a word")
    return ids


def locate_subject(tokenizer: PreTrainedTokenizerBase, template: str, subject: str) -> Prompt:
    """Ids of ``template`` with the subject filled in, and the index of the subject's last token.

    The token is the last one that overlaps the subject's characters in the full text. The length rule of
    the reference codes, ``len(encode(prefix + subject)) - 1``, is computed beside it; a disagreement (a
    suffix that merges with the subject's end) is logged and the overlap rule is kept.

    template: text with exactly one ``{}``; raises ValueError otherwise, or if no token overlaps.
    """
    parts = template.split("{}")
    if len(parts) != 2:
        raise ValueError(f"template {template!r} needs exactly one {{}}, it has {len(parts) - 1}")
    start = len(parts[0])
    text = parts[0] + subject + parts[1]
    ids = encode(tokenizer, text)
    by_length = len(encode(tokenizer, parts[0] + subject)) - 1
    if not tokenizer.is_fast:
        return Prompt(tuple(ids), by_length)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][: len(ids)]
    end = start + len(subject.rstrip())
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not overlapping:
        raise ValueError(f"subject {subject!r} has no token in {text!r}")
    if overlapping[-1] != by_length:
        logger.warning(
            "the last token of subject %r in %r is %d by its characters and %d by length; the first is used",
            subject, text, overlapping[-1], by_length,
        )  # fmt: skip
    return Prompt(tuple(ids), overlapping[-1])
