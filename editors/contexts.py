"""Context templates: short texts sampled from the unedited model, put before a prompt (ALGORITHMS 1.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from editors.sites import device_of

BARE = "{}"
STARTS = ("The", "Therefore", "Because", "I", "You")
LENGTH = 10  # tokens in all, the start and any leading special token included


@dataclass(frozen=True)
class Contexts:
    """Groups of templates with one ``{}`` each; means are taken inside a group, then over groups."""

    groups: tuple[tuple[str, ...], ...]

    @property
    def templates(self) -> tuple[str, ...]:
        """All templates in order; the first is the bare ``{}``."""
        return tuple(template for group in self.groups for template in group)

    @property
    def weights(self) -> tuple[float, ...]:
        """Each template's share in a mean over groups of means inside groups."""
        return tuple(1 / (len(self.groups) * len(group)) for group in self.groups for _ in group)


def sample_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int, starts: Sequence[str] = STARTS
) -> Contexts:
    """The bare template, and one sampled continuation of each start (top 5, temperature 1) before it."""
    sampled: list[str] = []
    device = device_of(model)
    generate: Any = model.generate
    settings = GenerationConfig(  # type: ignore[no-untyped-call]  # none of the model's own: they may penalise repetition or cut
        do_sample=True, top_k=5, top_p=1.0, temperature=1.0, repetition_penalty=1.0,
        max_length=LENGTH, min_length=LENGTH,
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id or 0,
    )  # fmt: skip
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in starts:
            ids = tokenizer(start, return_tensors="pt")["input_ids"].to(device)
            out = generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            text = str(tokenizer.decode(out[0], skip_special_tokens=True))
            sampled.append(text.replace("{", " ").replace("}", " ") + ". {}")
    return Contexts(((BARE,), tuple(sampled)))
