"""Token ids and places, one text at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Templates = Sequence[Sequence[str]]  # groups of contexts, each with one {} where the prompt stands


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text with the special tokens the tokenizer adds by itself."""
    return list(tokenizer(text)["input_ids"])


def target_ids(tokenizer: PreTrainedTokenizerBase, target: str) -> list[int]:
    """Ids of a continuation: one space in front if there is none, no special tokens."""
    text = target if target.startswith(" ") else f" {target}"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def filled(prompt: str, subject: str) -> str:
    """The prompt with the subject where its one {} stands."""
    before, after = prompt.split("{}")
    return before + subject + after


def subject_last_index(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str) -> int:
    """Position of the subject's last token: length of everything up to the subject's end, minus one."""
    before, _after = prompt.split("{}")
    return len(encode(tokenizer, before + subject)) - 1


def padded(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], device: torch.device
) -> dict[str, Tensor]:
    """Rows of ids padded on the right, with their attention mask."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(len(row) for row in rows)
    ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def contexts(prompt: str, templates: Templates) -> list[str]:
    """The prompt inside every template, the subject's {} still open."""
    return [filled(template, prompt) for group in templates for template in group]
