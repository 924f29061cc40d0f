"""A tiny random GPT-2 with a tokenizer trained in place: the grid's mechanics without any download."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from harness.data import FACTS_FILE
from harness.paths import read_lines

END = "<|endoftext|>"
VOCABULARY = 1024


def build_tiny_gpt2(folder: Path, *, seed: int = 0) -> None:
    """Save model and tokenizer as transformers loads them; equal seeds give equal bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    texts = (json.dumps(record["requested_rewrite"]) for record in read_lines(FACTS_FILE)[:400])
    tokenizer.train_from_iterator(texts, trainer)
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=64, n_positions=128, vocab_size=VOCABULARY, bos_token_id=0,
        eos_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder)
