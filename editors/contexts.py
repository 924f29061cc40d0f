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
ROME_LENGTHS = (5, 10)


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


def sample_contexts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Contexts:
    """MEMIT's templates: the bare one, and one sampled continuation of each start before it."""
    sampled = _sampled(model, tokenizer, [(start, LENGTH) for start in STARTS], seed)
    return Contexts(((BARE,), sampled))


def sample_rome_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> Contexts:
    """ROME's templates in one group: the bare one and two continuations of each start at either length."""
    wanted = [(start, length) for length in ROME_LENGTHS for start in STARTS for _ in range(2)]
    return Contexts(((BARE, *_sampled(model, tokenizer, wanted, seed)),))


def _sampled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[tuple[str, int]], seed: int
) -> tuple[str, ...]:
    """Templates of (start, tokens in all), sampled with top 5 and temperature 1."""
    sampled: list[str] = []
    device = device_of(model)
    generate: Any = model.generate
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start, length in wanted:
            settings = GenerationConfig(  # type: ignore[no-untyped-call]  # none of the model's own: they may penalise repetition or cut
                do_sample=True, top_k=5, top_p=1.0, temperature=1.0, repetition_penalty=1.0,
                max_length=length, min_length=length,
                eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id or 0,
            )  # fmt: skip
            ids = tokenizer(start, return_tensors="pt")["input_ids"].to(device)
            out = generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            text = str(tokenizer.decode(out[0], skip_special_tokens=True))
            sampled.append(text.replace("{", " ").replace("}", " ") + ". {}")
    return tuple(sampled)
